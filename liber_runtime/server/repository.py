"""What a model repository says of itself: its models, which of them a server is to load, which backends they need."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from liber_runtime.exceptions import ConfigurationError

__all__ = ["ModelConfig", "models_to_load", "read_config", "read_configs", "require_backends"]

_BACKEND_OF_PLATFORM = {"onnxruntime_onnx": "onnxruntime", "tensorrt_plan": "tensorrt"}


def read_config(path: Path) -> ModelConfig:
    """Parses a ``config.pbtxt`` as Triton does.

    Raises:
        ConfigurationError: missing or not a model configuration.
    """
    try:
        return text_format.Parse(path.read_text(), ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise ConfigurationError(f"model configuration {path} cannot be read: {error}") from None


def read_configs(repository: Path) -> dict[str, ModelConfig | None]:
    """The configuration of every model, by the name of its directory; None for one that cannot be read.

    What is wrong with that is for Triton to say.
    """
    configs: dict[str, ModelConfig | None] = {}
    for path in sorted(repository.glob("*/config.pbtxt")):
        try:
            configs[path.parent.name] = read_config(path)
        except ConfigurationError:
            configs[path.parent.name] = None
    return configs


def models_to_load(configs: Mapping[str, ModelConfig | None]) -> tuple[str, ...]:
    """The ensembles, with which Triton loads their steps, and what cannot be read; all models without any ensemble."""
    ensembles = {name for name, config in configs.items() if config is not None and config.platform == "ensemble"}
    return tuple(name for name, config in configs.items() if name in ensembles or config is None or not ensembles)


def require_backends(
    repository: Path,
    configs: Mapping[str, ModelConfig | None],
    models: Collection[str],
    backends: Path,
    binary: Path,
) -> None:
    """Checks that a server has what `models` and the steps of ensembles among them run on.

    Args:
        repository: of the models.
        configs: of all models that are there.
        models: those to be loaded.
        backends: the server's directory of backends.
        binary: the server, for the message.

    Raises:
        ConfigurationError: a backend is missing.
    """
    readable = {name: config for name, config in configs.items() if config is not None}
    steps = {step.model_name for name in readable.keys() & models for step in readable[name].ensemble_scheduling.step}
    lacking: dict[str, list[str]] = {}
    for name in sorted(readable.keys() & {*models, *steps}):
        backend = readable[name].backend or _BACKEND_OF_PLATFORM.get(readable[name].platform, "")
        if backend and not (backends / backend).is_dir():
            lacking.setdefault(backend, []).append(name)
    if "onnxruntime" in lacking:
        raise ConfigurationError(
            f"model repository {repository} is for target gpu: {', '.join(lacking['onnxruntime'])} run in Triton's "
            f"onnxruntime backend, and the Triton at {binary} has none, it serves target cpu; serve the repository in "
            "NVIDIA's Triton image, or publish the bundle into another one with `liber build --target cpu`"
        )
    for backend, names in lacking.items():
        raise ConfigurationError(
            f"{', '.join(names)} in {repository} need Triton's {backend} backend, which the Triton at {binary} lacks; "
            "use a Triton that has it"
        )
