"""A bundle -> the model repository that Triton loads, one new version of every model at a time.

The directories under ``model_repository/`` are the description: configurations and thin ``model.py`` shells. Publishing
copies them beside the bundle's parts into a repository and pins every step of the ensembles to the new version, so
that a running server switches from one bundle to the next as a whole.

A repository is for one target. On ``cpu`` every model is a Python model, which any Triton runs, the one of the wheel
too. On ``gpu`` the models around a graph are the graph itself in Triton's ONNX Runtime backend (`onnx_backend`), with
the same names and tensors; ``user_memory`` and ``bert_tokenizer`` stay what they are.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from builders.bundle import place_file
from builders.onnx_backend import MODEL, write_model
from liber_runtime.bundle import (
    BACKBONE,
    ENCODER,
    ENCODER_SPEC,
    FUSER,
    MANIFEST,
    PCA,
    TABLES,
    TOKENIZER,
    VOCABULARY,
    Manifest,
    Precision,
    verify,
)
from liber_runtime.exceptions import ConfigurationError, ScoringError
from liber_runtime.model_control import check_access, load_models, unload_models
from liber_runtime.server.repository import read_config
from liber_runtime.settings import load_settings

DESCRIPTION = Path(__file__).resolve().parent.parent / "model_repository"

PARTS_OF_MODEL: Mapping[str, Sequence[str]] = {
    "user_memory": (MANIFEST, VOCABULARY),
    "attention_fuser": (FUSER,),
    "ctr_backbone": (BACKBONE, TABLES),
    "bert_tokenizer": (TOKENIZER, ENCODER_SPEC),
    "bert_encoder": (ENCODER,),
    "pca_projection": (PCA, MANIFEST),
}

Target: TypeAlias = Literal["cpu", "gpu"]

GRAPH_OF_MODEL: Mapping[str, str] = {
    "attention_fuser": FUSER,
    "ctr_backbone": BACKBONE,
    "bert_encoder": ENCODER,
    "pca_projection": PCA,
}
"""The models that are nothing but a graph where Triton runs graphs by itself."""

EMBEDDING_MODELS = ("bert_tokenizer", "bert_encoder")
EMBEDDING_ENSEMBLES = ("liber_embed",)
BUNDLE_ENSEMBLES = ("liber_encode", "liber_score")

BUNDLE_MODELS = (*PARTS_OF_MODEL, *BUNDLE_ENSEMBLES)
"""All that a bundle may need, in the order in which a running server loads it. An ensemble whose step does not load is
lost, also in the version that served; a step that does not load on its own leaves what serves alone, and says why."""

KEPT_VERSIONS = 2
"""The version that serves, and the one before it, which may still be answering."""


def publish(bundle: Path, repository: Path, *, target: Target = "cpu", tensorrt: bool = False) -> int:
    """Publishes a bundle into `repository` (made if missing); returns the new version.

    A server that has the repository open takes the new version by loading its models, see `deploy`. A bundle that is
    not fused comes without ``attention_fuser``, and its ``liber_score`` without that step.

    Args:
        bundle: its directory.
        repository: for this target, or not there yet.
        target: see the module.
        tensorrt: for ``gpu``, see `write_model`.

    Raises:
        ConfigurationError: the bundle is incomplete or was changed, or the repository is for another target.
    """
    manifest = verify(bundle)
    choose_target(repository, target, tensorrt, manifest.precision)
    version = _publish(bundle, repository, models_of(manifest), BUNDLE_ENSEMBLES, target, tensorrt)
    for number in _unreadable(repository):
        _remove(repository, BUNDLE_MODELS, number)
    return version


def target_of(repository: Path) -> Target | None:
    """What `repository` was published for; None if it holds no bundle."""
    path = repository / "ctr_backbone" / "config.pbtxt"
    if not path.is_file():
        return None
    return "cpu" if read_config(path).backend == "python" else "gpu"


def models_of(manifest: Manifest) -> tuple[str, ...]:
    """The models that run the parts of a bundle, in the order in which a running server loads them."""
    there = {*manifest.parts, MANIFEST}
    return tuple(name for name, parts in PARTS_OF_MODEL.items() if there.issuperset(parts))


def choose_target(repository: Path, target: Target | None, tensorrt: bool, precision: Precision = "fp32") -> Target:
    """The target to publish for: `target`, else what `repository` was published for, else ``cpu``.

    Raises:
        ConfigurationError: the repository is for another target, TensorRT is asked for on a CPU, or int8 weights on a
            GPU.
    """
    there = target_of(repository)
    chosen = target or there or "cpu"
    if there not in (None, chosen):
        raise ConfigurationError(
            f"model repository {repository} is for target {there}, the bundle is to be published for {chosen}; name "
            f"another --repository, or pass --target {there}"
        )
    if tensorrt and chosen != "gpu":
        raise ConfigurationError(f"TensorRT is for target gpu, not for {chosen}; pass --target gpu, or no --tensorrt")
    if precision == "int8" and chosen == "gpu":
        # DynamicQuantizeLinear has no CUDA kernel: every product would fetch its factor from the GPU and bring it back.
        raise ConfigurationError("int8 weights are for target cpu; build for target gpu with --precision fp32")
    return chosen


def deploy(bundle: Path, repository: Path, url: str, *, target: Target = "cpu", tensorrt: bool = False) -> int:
    """Publishes a bundle and has the running server on `repository` switch to it; returns the new version.

    Args:
        bundle: its directory.
        repository: the one that the server at `url` serves.
        url: host:port of Triton's gRPC endpoint.
        target: see `publish`.
        tensorrt: see `publish`.

    Raises:
        ConfigurationError: the bundle is incomplete or was changed, the repository is for another target, or the
            settings of TLS or the control key will not do.
        ScoringError: the server does not answer or cannot load the bundle. It goes on serving the version before, to
            which the repository is set back.
    """
    check_access(load_settings())
    version = publish(bundle, repository, target=target, tensorrt=tensorrt)
    try:
        _load(url, repository)
    except ScoringError:
        if withdraw(repository, version):
            with contextlib.suppress(ScoringError):
                _load(url, repository)
        raise
    return version


def withdraw(repository: Path, version: int) -> bool:
    """Takes a bundle's newest version out of `repository` again; returns False, and keeps it, if there is no other."""
    rest = [number for number in _versions(repository / BUNDLE_ENSEMBLES[-1]) if number < version]
    if not rest:
        return False
    models = models_of(_manifest(repository, max(rest)))
    for name in BUNDLE_ENSEMBLES:
        _write_ensemble(repository / name, models, max(rest))
    _remove(repository, BUNDLE_MODELS, version)
    return True


def publish_encoder(encoder: Path, repository: Path) -> int:
    """Publishes an exported encoder alone, as ``liber_embed``: what a PCA is fitted with, before there is a bundle."""
    return _publish(encoder, repository, EMBEDDING_MODELS, EMBEDDING_ENSEMBLES, "cpu", False)


def _publish(
    source: Path,
    repository: Path,
    models: Sequence[str],
    ensembles: Sequence[str],
    target: Target,
    tensorrt: bool,
) -> int:
    held = BUNDLE_MODELS if set(ensembles) == set(BUNDLE_ENSEMBLES) else (*models, *ensembles)
    old = {number for name in held for number in _versions(repository / name)}
    version = 1 + max(old, default=0)
    try:
        configs = {
            name: _add_graph(source, repository / name, version, tensorrt)
            if target == "gpu" and name in GRAPH_OF_MODEL
            else _add_shell(source, repository / name, version)
            for name in models
        }
    except ConfigurationError:
        _remove(repository, models, version)
        raise
    # One configuration is for all versions of a model: with tensors of another kind those before would not load.
    kept = KEPT_VERSIONS - 1 if all(_has_tensors(repository / name, configs[name]) for name in models) else 0
    for name in models:
        _write(repository / name / "config.pbtxt", configs[name])
    for name in ensembles:
        (repository / name / str(version)).mkdir(parents=True)
        _write_ensemble(repository / name, models, version)
    for number in sorted(old, reverse=True)[kept:]:
        _remove(repository, held, number)
    return version


def _has_tensors(model: Path, config: str) -> bool:
    """Whether a model in the repository takes and gives what `config` says; True if there is none."""
    path = model / "config.pbtxt"
    if not path.is_file():
        return True
    before, after = read_config(path), text_format.Parse(config, model_config_pb2.ModelConfig())
    return list(before.input) == list(after.input) and list(before.output) == list(after.output)


def _remove(repository: Path, models: Sequence[str], version: int) -> None:
    """Deletes a version of models, and a model of which none is left: no server could load that."""
    for name in models:
        shutil.rmtree(repository / name / str(version), ignore_errors=True)
        if (repository / name).is_dir() and not _versions(repository / name):
            shutil.rmtree(repository / name)


def _load(url: str, repository: Path) -> None:
    """Has a running server take what `repository` holds of a bundle, and leave what it holds no more."""
    newest = max(_versions(repository / BUNDLE_ENSEMBLES[-1]))
    load_models(url, (*models_of(_manifest(repository, newest)), *BUNDLE_ENSEMBLES))
    unload_models(url, [name for name in PARTS_OF_MODEL if not (repository / name).is_dir()])


def _manifest(repository: Path, version: int) -> Manifest:
    return Manifest.load(repository / "user_memory" / str(version))


def _unreadable(repository: Path) -> list[int]:
    """Versions of a format that this LIBER does not read, which no server could load any more."""
    numbers = []
    for number in _versions(repository / "user_memory"):
        try:
            _manifest(repository, number)
        except ConfigurationError:
            numbers.append(number)
    return numbers


def _write_ensemble(ensemble: Path, models: Collection[str], version: int) -> None:
    """Writes the configuration of an ensemble: the steps that are among `models`, pinned to one version of them."""
    config = read_config(DESCRIPTION / ensemble.name / "config.pbtxt")
    steps = [step for step in config.ensemble_scheduling.step if step.model_name in models]
    made = {tensor.name for tensor in config.input} | {name for step in steps for name in step.output_map.values()}
    read = {tensor.name for tensor in config.output} | {name for step in steps for name in step.input_map.values()}
    for step in steps:
        step.model_version = version
        for mapped, others in ((step.input_map, made), (step.output_map, read)):
            for name in [name for name, tensor in mapped.items() if tensor not in others]:
                del mapped[name]
    config.ensemble_scheduling.CopyFrom(model_config_pb2.ModelEnsembling(step=steps))
    _write(ensemble / "config.pbtxt", text_format.MessageToString(config))


def _versions(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return [int(entry.name) for entry in directory.iterdir() if entry.is_dir() and entry.name.isdigit()]


def _add_shell(source: Path, model: Path, version: int) -> str:
    """Adds a version of a Python model; returns its configuration."""
    with _building(model, version) as building:
        shutil.copyfile(DESCRIPTION / model.name / "1" / "model.py", building / "model.py")
        for part in PARTS_OF_MODEL[model.name]:
            place_file(source / part, building / part)
    return (DESCRIPTION / model.name / "config.pbtxt").read_text()


def _add_graph(source: Path, model: Path, version: int, tensorrt: bool) -> str:
    """Adds a version of a model that is a graph; returns its configuration."""
    with _building(model, version) as building:
        if TABLES in PARTS_OF_MODEL[model.name]:
            place_file(source / TABLES, building / TABLES)
        config = write_model(
            source / GRAPH_OF_MODEL[model.name],
            read_config(DESCRIPTION / model.name / "config.pbtxt"),
            building / MODEL,
            strings={"fingerprint": Manifest.load(source).fingerprint},
            tensorrt=tensorrt,
        )
    return str(text_format.MessageToString(config))


@contextlib.contextmanager
def _building(model: Path, version: int) -> Iterator[Path]:
    # Built beside its place and renamed, so that no server ever sees half a version.
    building = model / f".{version}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    yield building
    building.rename(model / str(version))


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)
