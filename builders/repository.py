"""A bundle -> the model repository that Triton loads, one new version of every model at a time.

The directories under ``model_repository/`` are the description: configurations and thin ``model.py`` shells. Publishing
copies them beside the bundle's parts into a repository and pins every step of the ensembles to the new version, so
that a running server switches from one bundle to the next as a whole.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from builders.bundle import place_file
from liber_runtime.bundle import (
    BACKBONE,
    ENCODER,
    ENCODER_SPEC,
    FUSER,
    MANIFEST,
    PCA,
    TOKENIZER,
    VOCABULARY,
    verify,
)
from liber_runtime.exceptions import ConfigurationError, ScoringError
from liber_runtime.model_control import load_models

DESCRIPTION = Path(__file__).resolve().parent.parent / "model_repository"

PARTS_OF_MODEL: Mapping[str, Sequence[str]] = {
    "user_memory": (MANIFEST, VOCABULARY),
    "attention_fuser": (FUSER,),
    "ctr_backbone": (BACKBONE,),
    "bert_tokenizer": (TOKENIZER, ENCODER_SPEC),
    "bert_encoder": (ENCODER,),
    "pca_projection": (PCA, MANIFEST),
}

EMBEDDING_MODELS = ("bert_tokenizer", "bert_encoder")
EMBEDDING_ENSEMBLES = ("liber_embed",)
BUNDLE_ENSEMBLES = ("liber_encode", "liber_score")

BUNDLE_MODELS = (*PARTS_OF_MODEL, *BUNDLE_ENSEMBLES)
"""In the order in which a running server loads them. An ensemble whose step does not load is lost, also in the version
that served; a step that does not load on its own leaves what serves alone, and says why."""

KEPT_VERSIONS = 2
"""The version that serves, and the one before it, which may still be answering."""


def publish(bundle: Path, repository: Path) -> int:
    """Publishes a bundle into `repository` (made if missing); returns the new version.

    A server that has the repository open takes the new version by loading `BUNDLE_MODELS`, see `deploy`.

    Raises:
        ConfigurationError: the bundle is incomplete or was changed.
    """
    verify(bundle)
    return _publish(bundle, repository, tuple(PARTS_OF_MODEL), BUNDLE_ENSEMBLES)


def deploy(bundle: Path, repository: Path, url: str) -> int:
    """Publishes a bundle and has the running server on `repository` switch to it; returns the new version.

    Args:
        bundle: its directory.
        repository: the one that the server at `url` serves.
        url: host:port of Triton's gRPC endpoint.

    Raises:
        ConfigurationError: the bundle is incomplete or was changed.
        ScoringError: the server does not answer or cannot load the bundle. It goes on serving the version before, to
            which the repository is set back.
    """
    version = publish(bundle, repository)
    try:
        load_models(url, BUNDLE_MODELS)
    except ScoringError:
        if withdraw(repository, version):
            with contextlib.suppress(ScoringError):
                load_models(url, BUNDLE_MODELS)
        raise
    return version


def withdraw(repository: Path, version: int) -> bool:
    """Takes a bundle's newest version out of `repository` again; returns False, and keeps it, if there is no other."""
    rest = [number for number in _versions(repository / BUNDLE_ENSEMBLES[-1]) if number < version]
    if not rest:
        return False
    for name in BUNDLE_ENSEMBLES:
        _pin(read_config(repository / name / "config.pbtxt"), max(rest), repository / name)
    for name in BUNDLE_MODELS:
        shutil.rmtree(repository / name / str(version))
    return True


def publish_encoder(encoder: Path, repository: Path) -> int:
    """Publishes an exported encoder alone, as ``liber_embed``: what a PCA is fitted with, before there is a bundle."""
    return _publish(encoder, repository, EMBEDDING_MODELS, EMBEDDING_ENSEMBLES)


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    """Parses a ``config.pbtxt`` as Triton does.

    Raises:
        ConfigurationError: missing or not a model configuration.
    """
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise ConfigurationError(f"model configuration {path} cannot be read: {error}") from None


def _publish(source: Path, repository: Path, models: Sequence[str], ensembles: Sequence[str]) -> int:
    version = 1 + max((number for name in (*models, *ensembles) for number in _versions(repository / name)), default=0)
    for name in models:
        _add_version(source, repository / name, PARTS_OF_MODEL[name], version)
        _write(repository / name / "config.pbtxt", (DESCRIPTION / name / "config.pbtxt").read_text())
    for name in ensembles:
        (repository / name / str(version)).mkdir(parents=True)
        _pin(read_config(DESCRIPTION / name / "config.pbtxt"), version, repository / name)
    for name in (*models, *ensembles):
        for old in sorted(_versions(repository / name))[:-KEPT_VERSIONS]:
            shutil.rmtree(repository / name / str(old))
    return version


def _pin(config: model_config_pb2.ModelConfig, version: int, ensemble: Path) -> None:
    for step in config.ensemble_scheduling.step:
        step.model_version = version
    _write(ensemble / "config.pbtxt", text_format.MessageToString(config))


def _versions(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return [int(entry.name) for entry in directory.iterdir() if entry.is_dir() and entry.name.isdigit()]


def _add_version(source: Path, model: Path, parts: Sequence[str], version: int) -> None:
    # Built beside its place and renamed, so that no server ever sees half a version.
    building = model / f".{version}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    shutil.copyfile(DESCRIPTION / model.name / "1" / "model.py", building / "model.py")
    for part in parts:
        place_file(source / part, building / part)
    building.rename(model / str(version))


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)
