"""A Hugging Face checkpoint of a Llama model: fetched, checked before hours go into it, known by content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from liber_runtime.bundle import digest_of
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.progress import progress

ARCHITECTURE = "LlamaForCausalLM"

FileDigests: TypeAlias = dict[str, dict[str, int | str]]
"""Size and sha256 by the name of a file."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a tokenizer is loaded from; one of the first two is always there."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In one file by this name, or in several that ``NAME.index.json`` lists."""
_LFS_POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama model, from its ``config.json``.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP.
        layers: number of blocks.
        heads: query heads of a block.
        key_value_heads: key and value heads of a block; fewer than `heads` with grouped-query attention.
        head_size: width of a head.
        vocabulary_size: rows of the embedding.
        positions: longest context that the model was made for.
        tied: whether the output layer is the embedding.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary_size: int
    positions: int
    tied: bool = False

    @property
    def block_weights(self) -> int:
        """Weights of the linear layers of all blocks: what quantization makes smaller."""
        attention = self.hidden_size * self.head_size * 2 * (self.heads + self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding alone."""
        return self.vocabulary_size * self.hidden_size

    @property
    def norm_weights(self) -> int:
        """Weights of all norms."""
        return (2 * self.layers + 1) * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.block_weights + self.embedding_weights * (1 if self.tied else 2) + self.norm_weights


LLAMA2_7B = LlamaShape(4096, 11008, 32, 32, 32, 128, 32000, 4096)
LLAMA2_13B = LlamaShape(5120, 13824, 40, 40, 40, 128, 32000, 4096)

PUBLISHED: Mapping[str, LlamaShape] = {
    "meta-llama/Llama-2-7b-hf": LLAMA2_7B,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA2_7B,
    "meta-llama/Llama-2-13b-hf": LLAMA2_13B,
    "meta-llama/Llama-2-13b-chat-hf": LLAMA2_13B,
}
"""Gated models whose sizes are public: a dry run needs no access to them."""


@dataclasses.dataclass(frozen=True)
class LlmCheckpoint:
    """A checkpoint that was found complete.

    Attributes:
        directory: of the checkpoint, absolute.
        shape: its sizes.
        weights: names of the files with weights; none if only the configuration was fetched.
        tokenizer: names of the files of its tokenizer that are there.
        quantization: how its weights are quantized, as ModelOpt and others name it; None for plain weights.
    """

    directory: Path
    shape: LlamaShape
    weights: tuple[str, ...] = ()
    tokenizer: tuple[str, ...] = ()
    quantization: str | None = None

    def digests(self) -> FileDigests:
        """Size and sha256 of every file that an engine follows from.

        All bytes are read: fine-tuned weights differ from their origin in nothing else. A file in the hub's cache lies
        under its sha256 already, and is not read again.
        """
        names = sorted({"config.json", *self.weights, *self.tokenizer})
        files = {name: self.directory / name for name in names if (self.directory / name).is_file()}
        found: FileDigests = {}
        if not files:
            return found
        with progress("read the checkpoint", sum(path.stat().st_size for path in files.values()) >> 20) as advance:
            for name, path in files.items():
                size = path.stat().st_size
                found[name] = {"bytes": size, "sha256": _cached_digest(path) or digest_of(path)}
                advance(size >> 20)
        return found


def identity(digests: FileDigests) -> str:
    """One digest, in hexadecimal, of what `LlmCheckpoint.digests` found."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def open_llm_checkpoint(directory: Path) -> LlmCheckpoint:
    """Reads what a checkpoint says of itself, and checks that its files are there and whole.

    Raises:
        InvalidInputError: it is no checkpoint of a Llama model, or brings code of its own.
        ConfigurationError: files are missing or cut short.
    """
    checkpoint = _open_configuration(directory)
    weights = _find_weights(directory)
    for name in weights:
        _check_weights(directory / name)
    if not {"tokenizer.json", "tokenizer.model"} & set(checkpoint.tokenizer):
        raise ConfigurationError(
            f"{directory} has no tokenizer (tokenizer.json or tokenizer.model); copy it there from the original model"
        )
    return dataclasses.replace(checkpoint, weights=weights)


def find_checkpoint(model: str, *, dry_run: bool = False) -> LlmCheckpoint:
    """The checkpoint at a path, or of the Hugging Face hub, downloaded into its cache.

    Args:
        model: a directory, or a name on the hub as ``owner/name``.
        dry_run: download no weights, and of `PUBLISHED` models nothing at all.

    Raises:
        InvalidInputError: neither a directory nor a name on the hub, or no Llama model.
        ConfigurationError: it cannot be downloaded, or is not complete.
    """
    if model and Path(model).is_dir():
        return open_llm_checkpoint(Path(model).absolute())
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith((".", "/")):
        raise InvalidInputError(
            f"--model {model}: there is no such directory, and a name on the Hugging Face hub is owner/name, e.g. "
            "meta-llama/Llama-2-13b-hf"
        )
    if not dry_run:
        return open_llm_checkpoint(_download(model, weights=True))
    if model in PUBLISHED:
        return LlmCheckpoint(_snapshot_of(model), PUBLISHED[model])
    return _open_configuration(_download(model, weights=False))


def _download(model: str, *, weights: bool) -> Path:
    """Fetches a checkpoint, or without `weights` its configuration alone, into the hub's cache."""
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot(*patterns: str) -> Path:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(patterns)))

    try:
        # First, for it is small: whether there is access is told at once.
        directory = Path(huggingface_hub.hf_hub_download(model, "config.json")).parent
        if not weights:
            return directory
        small = ("*.json", "tokenizer.model", "*.jinja")
        directory = snapshot(*small, "*.safetensors")
        # The pickled weights only where there are no others: most models have both, and each is the whole model.
        return directory if any(directory.glob("*.safetensors")) else snapshot(*small, "*.bin")
    except errors.GatedRepoError:
        reason = f"accept the licence on its page, https://huggingface.co/{model}, and set HF_TOKEN to your token"
        raise ConfigurationError(f"{model} is a gated model: {reason}") from None
    except errors.RepositoryNotFoundError:
        raise ConfigurationError(
            f"the Hugging Face hub has no model {model}, or none that HF_TOKEN gives access to; check name and token"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ConfigurationError(
            f"{model} is not in the local cache and the Hugging Face hub cannot be reached; download it where there is "
            "a network, and give its directory as --model"
        ) from None
    except errors.EntryNotFoundError:
        raise ConfigurationError(f"{model} has no config.json; name a repository in Hugging Face's format") from None
    except errors.HfHubHTTPError as error:
        raise ConfigurationError(
            f"{model} cannot be downloaded: {str(error).strip().splitlines()[0]}; try again later"
        ) from None


def _snapshot_of(model: str) -> Path:
    """Where the hub's cache has a model, or will have it; its revision is known only when it is there."""
    import huggingface_hub
    from huggingface_hub import constants

    there = huggingface_hub.try_to_load_from_cache(model, "config.json")
    if isinstance(there, str):
        return Path(there).parent
    return Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots" / "REVISION"


def _open_configuration(directory: Path) -> LlmCheckpoint:
    config = _read_json(directory / "config.json")
    named = config.get("architectures") or ["nothing"]
    if named != [ARCHITECTURE]:
        raise InvalidInputError(
            f"{directory} is a checkpoint of {', '.join(map(str, named))}, and engines are built of {ARCHITECTURE}; "
            "serve other models with trtllm-serve or vLLM, and use the writer openai"
        )
    tokenizer = tuple(name for name in TOKENIZER_FILES if (directory / name).is_file())
    told = [config]
    if "tokenizer_config.json" in tokenizer:
        told.append(_read_json(directory / "tokenizer_config.json"))
    if any("auto_map" in each for each in told):
        # NVIDIA's scripts load with trust_remote_code.
        raise InvalidInputError(
            f"{directory} brings Python code of its own (auto_map), which would be run; Llama needs none: remove "
            "auto_map, or use the original model"
        )
    return LlmCheckpoint(directory, _shape(directory, config), (), tokenizer, _quantization(directory, config))


def _shape(directory: Path, config: Mapping[str, Any]) -> LlamaShape:
    def size(name: str, default: object = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInputError(f"{directory / 'config.json'}: {name} is {value!r}, not a size; repair the file")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return LlamaShape(
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        key_value_heads=size("num_key_value_heads", heads),
        head_size=size("head_dim", hidden // heads),
        vocabulary_size=size("vocab_size"),
        positions=size("max_position_embeddings", 2048),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _quantization(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "hf_quant_config.json"
    told = _read_json(path).get("quantization", {}) if path.is_file() else config.get("quantization_config")
    if not told:
        return None
    return str(told.get("quant_algo") or told.get("quant_method") or "unknown")


def _find_weights(directory: Path) -> tuple[str, ...]:
    """Names of the files with weights: all that the index names, or the only one."""
    for single in _WEIGHTS:
        index = f"{single}.index.json"
        if (directory / index).is_file():
            named = _read_json(directory / index).get("weight_map")
            if not isinstance(named, dict) or not named:
                raise ConfigurationError(f"{directory / index} names no weights; download it again")
            return _present(directory, set(map(str, named.values())), index)
        if (directory / single).is_file():
            return (single,)
    raise ConfigurationError(
        f"{directory} has no weights (model.safetensors, pytorch_model.bin, or an index of several); download the "
        "whole checkpoint"
    )


def _present(directory: Path, names: Iterable[str], index: str) -> tuple[str, ...]:
    missing = [name for name in sorted(names) if not (directory / name).is_file()]
    if missing:
        raise ConfigurationError(
            f"{directory} lacks {len(missing)} of the files that {index} names, first {missing[0]}; download them"
        )
    return tuple(sorted(names))


def _check_weights(path: Path) -> None:
    """Finds a file that was cut short, from its own header, without reading the weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(len(_LFS_POINTER))
        if begin == _LFS_POINTER:
            raise ConfigurationError(f"{path} is a pointer of Git LFS, not weights; run: git lfs pull")
        if size == 0:
            raise ConfigurationError(f"{path} is empty; download it again")
        if path.suffix != ".safetensors":
            return
        file.seek(0)
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else {}
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends)
        except (struct.error, ValueError, KeyError, IndexError, TypeError):
            raise ConfigurationError(f"{path} is no safetensors file; download it again") from None
    if size != whole:
        raise ConfigurationError(f"{path} has {size} of {whole} bytes; download it again")


def _cached_digest(path: Path) -> str | None:
    target = path.resolve()
    known = path.is_symlink() and target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name)
    return target.name if known else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path.parent} has no {path.name}; give the directory of a checkpoint in Hugging Face's format"
        ) from None
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a JSON object; download it again")
    return content
