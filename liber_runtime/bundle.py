"""The bundle: one trained, exported, versioned set of vocabulary, encoder, PCA, fuser and backbone.

A bundle is a directory. `builders` writes it, `builders.repository` publishes it into a model repository, and the
steps of the two ensembles read their part of it from their version directories.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, TypeAlias

import pydantic

from liber_runtime.exceptions import ConfigurationError

FORMAT = 3

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
TOKENIZER = "tokenizer.json"
ENCODER = "encoder.onnx"
ENCODER_SPEC = "encoder.json"
PCA = "pca.onnx"
FUSER = "fuser.onnx"
BACKBONE = "backbone.onnx"
TABLES = "backbone.tables"
"""Large tables of the backbone's graph, which names them as its external data; empty if it has none."""

PARTS = (VOCABULARY, TOKENIZER, ENCODER, ENCODER_SPEC, PCA, FUSER, BACKBONE, TABLES)
"""Files that a bundle may have beside its manifest; `parts_of` says which it has."""


Precision: TypeAlias = Literal["fp32", "int8"]
"""Of the weights that a backbone's graph multiplies by."""


def parts_of(fused: bool) -> tuple[str, ...]:
    """Files of a bundle beside its manifest: a backbone that reads no interest comes without a fuser."""
    return tuple(part for part in PARTS if fused or part != FUSER)


class EncoderSpec(pydantic.BaseModel, frozen=True):
    """How texts become tokens and tokens an embedding.

    Attributes:
        name: of the checkpoint, e.g. ``all-MiniLM-L6-v2`` or ``bert-base-uncased``.
        digest: sha256 over the exported graph and the tokenizer.
        embedding_size: width of the pooled embedding, before PCA.
        max_tokens: longest chunk the encoder takes, special tokens included; longer texts are read in chunks.
        start_id: token that opens a chunk ([CLS]).
        end_id: token that closes a chunk ([SEP]).
        pad_id: token that fills a chunk.
    """

    name: str
    digest: str
    embedding_size: int
    max_tokens: int
    start_id: int
    end_id: int
    pad_id: int

    @classmethod
    def load(cls, directory: Path) -> EncoderSpec:
        """Reads the specification that lies beside an exported encoder.

        Raises:
            ConfigurationError: missing or not a specification.
        """
        try:
            return cls.model_validate_json((directory / ENCODER_SPEC).read_bytes())
        except (OSError, pydantic.ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(
                f"{directory / ENCODER_SPEC} cannot be read ({reason}); run `liber build`"
            ) from None


class Manifest(pydantic.BaseModel, frozen=True):
    """What a bundle is and what it goes with.

    Attributes:
        format: layout of the bundle; this version of LIBER reads `FORMAT`.
        bundle_id: hash over the parts.
        created_at: ISO 8601, UTC.
        domain: name of the data set.
        encoder: see `EncoderSpec`.
        fingerprint: of encoder and PCA together; vectors made by another pair are refused.
        dimension: d, size of r_j and of the interest.
        history_length: T, behaviors the backbone itself reads.
        lookback: L, newest behaviors of a user that are given to its graph.
        max_partitions: newest representations of a user that are fused.
        backbone: name of the CTR model.
        fusion: how the backbone takes the interest, see ``builders.assembly.Fusion``.
        fused: whether it takes it at all. Without it there is no fuser, and scoring reads no vectors.
        precision: of the backbone's weights in its graph.
        writers: authors of the texts it was trained on.
        seed: of training.
        digests: sha256 per part.
    """

    format: int
    bundle_id: str
    created_at: str
    domain: str
    encoder: EncoderSpec
    fingerprint: str
    dimension: int
    history_length: int
    lookback: int
    max_partitions: int
    backbone: str
    fusion: str
    fused: bool
    precision: Precision
    writers: tuple[str, ...]
    seed: int
    digests: dict[str, str]

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads the manifest in `directory`.

        Raises:
            ConfigurationError: missing, unreadable or of another format.
        """
        path = directory / MANIFEST
        try:
            content = path.read_bytes()
            # Alone and first: what else a manifest of another format holds is not known here.
            found = _Format.model_validate_json(content).format
            if found != FORMAT:
                raise ConfigurationError(
                    f"bundle {directory} has format {found}, this version reads {FORMAT}; run `liber build` again"
                )
            return cls.model_validate_json(content)
        except (OSError, pydantic.ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(f"bundle manifest {path} cannot be read ({reason}); run `liber build`") from None

    @property
    def parts(self) -> tuple[str, ...]:
        """Files of this bundle beside the manifest."""
        return parts_of(self.fused)


class _Format(pydantic.BaseModel):
    format: int


def verify(directory: Path) -> Manifest:
    """Checks that every part of a bundle is there and is what the manifest says.

    Raises:
        ConfigurationError: a part is missing or its digest differs.
    """
    manifest = Manifest.load(directory)
    for part in manifest.parts:
        path = directory / part
        if not path.is_file():
            raise ConfigurationError(f"bundle {directory} lacks {part}; run `liber build` again")
        if digest_of(path) != manifest.digests.get(part):
            raise ConfigurationError(f"{path} is not the file the manifest was written for; run `liber build` again")
    return manifest


def digest_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
