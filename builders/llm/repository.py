"""An LLM -> the model repository of its own Triton, in either of TensorRT-LLM's layouts, from one description.

- ``inflight_batcher_llm`` serves an engine: the ensemble ``ensemble`` of ``preprocessing`` (prompt to tokens),
  ``tensorrt_llm`` (the engine, in NVIDIA's C++ backend) and ``postprocessing`` (tokens to text).
- ``llmapi`` serves the checkpoint itself: one Python model ``tensorrt_llm`` around TensorRT-LLM's LLM API, and a
  ``model.yaml`` with the arguments of its ``LLM``.

The Python models belong to the version of TensorRT-LLM that runs them: their code and the tensors they declare are
copied out of NVIDIA's image while the repository is written. The configurations of ``tensorrt_llm`` and ``ensemble``
for engines are in ``models/``: they name the part of the backend's tensors that is needed here. Afterwards the
whole is checked as one: each step of the ensemble gets what it needs, of the type it takes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from builders.llm.checkpoint import LlmCheckpoint
from builders.llm.engines import TOKENIZER, EngineSettings
from builders.llm.sizes import CACHE_FRACTION
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.server.repository import ModelConfig, read_config

Layout: TypeAlias = Literal["inflight_batcher_llm", "llmapi"]

IMAGE_MODELS = Path("/app/all_models")
"""Where NVIDIA's image has the models of every layout."""

DESCRIPTION = Path(__file__).resolve().parent / "models"

COPIED: Mapping[Layout, tuple[str, ...]] = {
    "inflight_batcher_llm": ("preprocessing", "postprocessing"),
    "llmapi": ("tensorrt_llm",),
}
"""Python models that come out of NVIDIA's image."""

OWN: Mapping[Layout, tuple[str, ...]] = {"inflight_batcher_llm": ("tensorrt_llm", "ensemble"), "llmapi": ()}
"""Models that are described here."""

_LLMAPI_INPUTS = {
    "text_input": "TYPE_STRING",
    "sampling_param_max_tokens": "TYPE_INT32",
    "sampling_param_temperature": "TYPE_FP32",
}
_LLMAPI_OUTPUT = "text_output"

_QUANTIZED_AS = {"fp16": None, "fp8": "FP8", "int4-awq": "W4A16_AWQ"}
"""How ModelOpt names what a checkpoint's weights are."""

_QUOTED_BLANK = re.compile(r'"\$\{(\w+)\}"')
_BLANK = re.compile(r"\$\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class LlmService:
    """What both layouts are rendered from.

    Attributes:
        settings: of the engine, or of the LLM API, which takes the same limits.
        checkpoint: directory of the Hugging Face checkpoint, as the server sees it; for ``llmapi``.
        engine: directory of the engine, as the server sees it; for ``inflight_batcher_llm``.
        cache_fraction: part of the free GPU memory that becomes KV cache.
    """

    settings: EngineSettings
    checkpoint: Path
    engine: Path | None = None
    cache_fraction: float = CACHE_FRACTION


def models_of(layout: Layout) -> tuple[str, ...]:
    """Names of the models of a layout."""
    return (*COPIED[layout], *OWN[layout])


def check_repository(repository: Path, layout: Layout, image_models: Path = IMAGE_MODELS) -> None:
    """Finds, before hours of work, what writing a repository would stumble over.

    Raises:
        ConfigurationError: NVIDIA's models are not there, or the repository holds other models.
    """
    for name in COPIED[layout]:
        for part in ("config.pbtxt", "1/model.py"):
            path = image_models / layout / name / part
            if not path.is_file():
                raise ConfigurationError(
                    f"{path} is not there; it belongs to NVIDIA's image (tritonserver:...-trtllm-python-py3): run this "
                    "inside it, or name a copy of its all_models by --image-models or LIBER_TENSORRT_LLM_MODELS"
                )
    others = {path.parent.name for path in repository.glob("*/config.pbtxt")} - set(models_of(layout))
    shared = repository / "tensorrt_llm" / "config.pbtxt"
    if shared.is_file() and (read_config(shared).backend == "python") != (layout == "llmapi"):
        others.add("tensorrt_llm of another layout")
    if others:
        raise ConfigurationError(
            f"{repository} holds {', '.join(sorted(others))}, which the layout {layout} does not have; name another "
            "--repository, and leave the models of scoring in one of their own"
        )


def check_llmapi(checkpoint: LlmCheckpoint, settings: EngineSettings) -> None:
    """Checks that a checkpoint's weights are what the settings say: the LLM API serves them as they are.

    Raises:
        InvalidInputError: they are not.
    """
    wanted = _QUANTIZED_AS[settings.quantization]
    if checkpoint.quantization != wanted:
        has = checkpoint.quantization or "not quantized"
        advice = "the --quantization that they have, or the original model"
        if wanted and checkpoint.quantization is None:
            advice = "a checkpoint that ModelOpt has quantized so (quantize.py --export_format hf)"
        raise InvalidInputError(
            f"the weights of {checkpoint.directory} are {has}, and the layout llmapi serves them as they are, not as "
            f"{settings.quantization}; give {advice}"
        )


def write_repository(
    service: LlmService, layout: Layout, repository: Path, image_models: Path = IMAGE_MODELS
) -> tuple[Path, ...]:
    """Writes the models of a layout into `repository` (made if missing), in place of older ones.

    Args:
        service: what is served.
        layout: of the repository.
        repository: of this LLM alone.
        image_models: directory of NVIDIA's models, with a directory for each layout.

    Returns:
        The directories of the models.

    Raises:
        ConfigurationError: see `check_repository`; or NVIDIA's models have other tensors than those known here.
    """
    check_repository(repository, layout, image_models)
    configs = {name: read_config(DESCRIPTION / name / "config.pbtxt") for name in OWN[layout]}
    configs |= {name: _read_template(image_models / layout / name / "config.pbtxt", service) for name in COPIED[layout]}
    if layout == "llmapi":
        _check_tensors(configs["tensorrt_llm"])
    else:
        _set_engine(configs, service)
        check_ensemble(configs["ensemble"], configs)
    for name, config in configs.items():
        building = repository / f".{name}"
        shutil.rmtree(building, ignore_errors=True)
        if name in COPIED[layout]:
            ignored = shutil.ignore_patterns("__pycache__", "model.yaml")
            shutil.copytree(image_models / layout / name / "1", building / "1", ignore=ignored)
        else:
            (building / "1").mkdir(parents=True)
        (building / "config.pbtxt").write_text(text_format.MessageToString(config), "utf-8")
        if layout == "llmapi":
            (building / "1" / "model.yaml").write_text(model_yaml(service), "utf-8")
        shutil.rmtree(repository / name, ignore_errors=True)
        building.rename(repository / name)
    return tuple(repository / name for name in models_of(layout))


def model_yaml(service: LlmService) -> str:
    """The arguments of ``LLM`` and what Triton is told, as ``model.yaml`` has them.

    The text is JSON, which YAML includes.
    """
    settings = service.settings
    arguments: dict[str, Any] = {
        "model": str(service.checkpoint),
        "tensor_parallel_size": settings.tp,
        "max_batch_size": settings.max_batch_size,
        "max_num_tokens": settings.max_num_tokens,
        "max_seq_len": settings.max_seq_len,
        "kv_cache_config": {
            "enable_block_reuse": True,
            "dtype": "fp8" if settings.quantization == "fp8" else "auto",
            "free_gpu_memory_fraction": service.cache_fraction,
        },
        "enable_chunked_prefill": True,
        # A request has one prompt; sequences are batched inside, as they come.
        "triton_config": {"max_batch_size": 0, "decoupled": False},
    }
    return json.dumps(arguments, indent=2) + "\n"


def check_ensemble(ensemble: ModelConfig, models: Mapping[str, ModelConfig]) -> None:
    """Checks that every step's model is there and gets each tensor it needs, of the type it takes.

    Raises:
        ConfigurationError: it does not.
    """
    types = {tensor.name: tensor.data_type for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        inputs = {tensor.name: tensor for tensor in models[step.model_name].input}
        outputs = {tensor.name: tensor for tensor in models[step.model_name].output}
        unknown = [*(set(step.input_map) - set(inputs)), *(set(step.output_map) - set(outputs))]
        unmet = [name for name, tensor in inputs.items() if not tensor.optional and name not in step.input_map]
        unlike = (
            [name for name, origin in step.input_map.items() if types.get(origin) != inputs[name].data_type]
            if (not unknown)
            else []
        )
        for wrong, what in ((unknown, "has no tensor"), (unmet, "also needs"), (unlike, "takes another type of")):
            if wrong:
                raise ConfigurationError(
                    f"{step.model_name} of this image {what} {', '.join(sorted(wrong))}, so the ensemble does not fit "
                    "it; use an image with TensorRT-LLM 1.0 to 1.2"
                )
        types |= {made: outputs[name].data_type for name, made in step.output_map.items()}
    unlike = [tensor.name for tensor in ensemble.output if types.get(tensor.name) != tensor.data_type]
    if unlike:
        raise ConfigurationError(f"no model of this image makes {', '.join(unlike)} as the ensemble promises it")


def _set_engine(configs: Mapping[str, ModelConfig], service: LlmService) -> None:
    """Fills in what follows from the engine."""
    if service.engine is None:
        raise ConfigurationError("the layout inflight_batcher_llm serves an engine; build one first")
    for config in configs.values():
        config.max_batch_size = service.settings.max_batch_size
    _set(configs["tensorrt_llm"], "gpt_model_path", str(service.engine))
    _set(configs["tensorrt_llm"], "kv_cache_free_gpu_mem_fraction", f"{service.cache_fraction:g}")
    for name, special in (("preprocessing", "add_special_tokens"), ("postprocessing", "skip_special_tokens")):
        _set(configs[name], "tokenizer_dir", str(service.engine / TOKENIZER))
        _set(configs[name], special, "true")


def _set(config: ModelConfig, parameter: str, value: str) -> None:
    config.parameters[parameter].string_value = value


def _read_template(path: Path, service: LlmService) -> ModelConfig:
    """Reads a configuration of NVIDIA's, in which values that differ between services are blanks: ``${name}``.

    A blank parameter becomes empty, which the models take for unset.
    """
    filled = {
        "triton_max_batch_size": service.settings.max_batch_size,
        "preprocessing_instance_count": 1,
        "postprocessing_instance_count": 1,
        "max_queue_delay_microseconds": 0,
        "max_queue_size": 0,  # no limit: the writer limits its calls in flight
    }
    text = _QUOTED_BLANK.sub('""', path.read_text("utf-8"))
    unknown = sorted(set(_BLANK.findall(text)) - set(filled))
    if unknown:
        raise ConfigurationError(
            f"{path} leaves {', '.join(unknown)} open, which is not known here; use an image with TensorRT-LLM 1.0 to "
            "1.2"
        )
    text = _BLANK.sub(lambda match: str(filled[match[1]]), text)
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ConfigurationError(f"model configuration {path} cannot be read: {error}") from None


def _check_tensors(config: ModelConfig) -> None:
    """Checks that the model of the LLM API takes what the writer sends."""
    types = {tensor.name: model_config_pb2.DataType.Name(tensor.data_type) for tensor in config.input}
    wrong = [name for name, type_ in _LLMAPI_INPUTS.items() if types.get(name) != type_]
    wrong += [tensor.name for tensor in config.input if not tensor.optional and tensor.name not in _LLMAPI_INPUTS]
    wrong += [] if any(tensor.name == _LLMAPI_OUTPUT for tensor in config.output) else [_LLMAPI_OUTPUT]
    if wrong:
        raise ConfigurationError(
            f"the model tensorrt_llm of this image has other tensors than those known here ({', '.join(wrong)}); use "
            "an image that docs/llm.md names"
        )
