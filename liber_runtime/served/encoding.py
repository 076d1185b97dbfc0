"""``bert_tokenizer``, ``bert_encoder`` and ``pca_projection``: two texts -> one representation r_j (Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from liber_runtime.bundle import ENCODER, PCA, TOKENIZER, EncoderSpec, Manifest
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.served.backend import Outcome, Tensors
from liber_runtime.served.session import OnnxSession
from liber_runtime.settings import load_settings


class TokenizerModel:
    """summary BYTES[B], shift BYTES[B] -> input_ids and attention_mask int64[C,L], chunk_owner int64[C].

    The two texts of a pair are read as one, ``[CLS] summary [SEP] shift [SEP]``, so that each is encoded in the light
    of the other; what is longer than `max_tokens` is cut into chunks, each opened and closed by the special tokens.
    `chunk_owner` says which pair a chunk belongs to.
    """

    inputs = ("summary", "shift")

    def __init__(self, tokenizer: tokenizers.Tokenizer, spec: EncoderSpec) -> None:
        self._tokenizer = tokenizer
        self._spec = spec

    @classmethod
    def load(cls, directory: Path) -> TokenizerModel:
        """Reads the bundle's part in `directory`.

        Raises:
            ConfigurationError: the tokenizer cannot be read.
        """
        path = directory / TOKENIZER
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(f"tokenizer {path} cannot be read ({error}); build the bundle again") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, EncoderSpec.load(directory))

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """See `ServedModel.run`."""
        outcomes: list[Outcome] = []
        for tensors in batch:
            try:
                outcomes.append(self._tokenize(_texts("summary", tensors), _texts("shift", tensors)))
            except InvalidInputError as error:
                outcomes.append(error)
        return outcomes

    def _tokenize(self, summaries: list[str], shifts: list[str]) -> Outcome:
        if len(summaries) != len(shifts) or not summaries:
            raise InvalidInputError(
                f"{len(summaries)} summaries and {len(shifts)} shifts; send one of each per partition, at least one"
            )
        spec = self._spec
        encoded = self._tokenizer.encode_batch(summaries + shifts, add_special_tokens=False)
        chunks: list[list[int]] = []
        owners: list[int] = []
        room = spec.max_tokens - 2
        for owner, (summary, shift) in enumerate(
            zip(encoded[: len(summaries)], encoded[len(summaries) :], strict=True)
        ):
            ids = [*summary.ids, spec.end_id, *shift.ids] if shift.ids else summary.ids
            for start in range(0, max(1, len(ids)), room):
                chunks.append([spec.start_id, *ids[start : start + room], spec.end_id])
                owners.append(owner)
        lengths = np.array([len(chunk) for chunk in chunks])
        mask = np.arange(lengths.max()) < lengths[:, np.newaxis]
        input_ids = np.full(mask.shape, spec.pad_id, dtype=np.int64)
        input_ids[mask] = np.concatenate(chunks)
        return {
            "input_ids": input_ids,
            "attention_mask": mask.astype(np.int64),
            "chunk_owner": np.array(owners, dtype=np.int64),
        }


class EncoderModel:
    """Token chunks -> text_embedding float32[B,h]: masked mean over all tokens of a pair's chunks."""

    inputs = ("input_ids", "attention_mask", "chunk_owner")

    def __init__(self, session: OnnxSession) -> None:
        self._session = session

    @classmethod
    def load(cls, directory: Path) -> EncoderModel:
        """Reads the bundle's part in `directory`."""
        return cls(OnnxSession(directory / ENCODER, load_settings().session_threads))

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """See `ServedModel.run`."""
        return [dict(self._session.run(tensors)) for tensors in batch]


class ProjectionModel:
    """text_embedding float32[B,h] -> representation float32[B,d], fingerprint BYTES[1]."""

    inputs = ("text_embedding",)

    def __init__(self, session: OnnxSession, fingerprint: str) -> None:
        self._session = session
        self._fingerprint = np.array([fingerprint.encode()], dtype=np.object_)

    @classmethod
    def load(cls, directory: Path) -> ProjectionModel:
        """Reads the bundle's part in `directory`."""
        return cls(OnnxSession(directory / PCA, threads=1), Manifest.load(directory).fingerprint)

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """See `ServedModel.run`."""
        return [{**self._session.run(tensors), "fingerprint": self._fingerprint} for tensors in batch]


def _texts(name: str, tensors: Tensors) -> list[str]:
    texts = []
    for position, value in enumerate(tensors[name]):
        try:
            texts.append(value.decode())
        except UnicodeDecodeError:
            raise InvalidInputError(f"{name}[{position}] is not UTF-8; send texts encoded as UTF-8") from None
    return texts
