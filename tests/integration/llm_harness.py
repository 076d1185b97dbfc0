"""A model repository with an LLM in the layouts of TensorRT-LLM, answered by a `LlamaEngine`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

_MODEL = Path(__file__).parent / "llm_repository" / "model.py"

_SAMPLING = {"temperature": "FP32", "top_k": "INT32", "top_p": "FP32", "seed": "UINT64"}
_INFLIGHT_SWITCHES = ("exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens", "stream")
_INFLIGHT_INPUTS = {
    "text_input": "STRING",
    "max_tokens": "INT32",
    **_SAMPLING,
    **dict.fromkeys(_INFLIGHT_SWITCHES, "BOOL"),
}
_INFLIGHT_OUTPUTS = {"text_output": "STRING", "num_input_tokens": "INT32", "num_output_tokens": "INT32"}
_LLMAPI_INPUTS = {
    "text_input": "STRING",
    "sampling_param_max_tokens": "INT32",
    **{f"sampling_param_{name}": type_ for name, type_ in _SAMPLING.items()},
    "sampling_param_exclude_input_from_output": "BOOL",
    "return_finish_reason": "BOOL",
    "streaming": "BOOL",
}
_LLMAPI_OUTPUTS = {"text_output": "STRING", "finish_reason": "STRING"}
_NEEDED = ("text_input", "max_tokens", "sampling_param_max_tokens")


@dataclass(frozen=True)
class _Contract:
    layout: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    batch: int


def write_llm_repository(repository: Path, engine: str) -> Path:
    """The models of both layouts.

    ``ensemble`` and ``tensorrt_llm_bls`` (`inflight_batcher_llm`), ``tensorrt_llm`` (`llmapi`), ``tensorrt_llm_stream``
    (the same, decoupled) and ``tensorrt_llm_queued`` (one call at a time, and one more may wait).
    """
    llmapi = _Contract("llmapi", _LLMAPI_INPUTS, _LLMAPI_OUTPUTS, 0)
    inflight = _Contract("inflight_batcher_llm", _INFLIGHT_INPUTS, _INFLIGHT_OUTPUTS, 8)
    one_at_a_time = _Contract("inflight_batcher_llm", _INFLIGHT_INPUTS, _INFLIGHT_OUTPUTS, 1)
    streaming = "model_transaction_policy { decoupled: true }\n"
    queued = "dynamic_batching { default_queue_policy { max_queue_size: 1 } }\n" + _parameter("waits", "yes")
    _write(repository / "tensorrt_llm", llmapi, engine)
    _write(repository / "tensorrt_llm_stream", llmapi, engine, streaming)
    _write(repository / "tensorrt_llm_queued", one_at_a_time, engine, queued)
    _write(repository / "tensorrt_llm_bls", inflight, engine)
    inputs = "".join(_pair("input_map", name) for name in _INFLIGHT_INPUTS)
    outputs = "".join(_pair("output_map", name) for name in _INFLIGHT_OUTPUTS)
    step = (
        f'ensemble_scheduling {{ step [{{ model_name: "tensorrt_llm_bls" model_version: -1 {inputs} {outputs} }}] }}\n'
    )
    (repository / "ensemble" / "1").mkdir(parents=True)
    (repository / "ensemble" / "config.pbtxt").write_text(
        'name: "ensemble"\nplatform: "ensemble"\nmax_batch_size: 8\n'
        + _tensors("input", _INFLIGHT_INPUTS)
        + _tensors("output", _INFLIGHT_OUTPUTS)
        + step
    )
    return repository


def _write(directory: Path, contract: _Contract, engine: str, more: str = "") -> None:
    (directory / "1").mkdir(parents=True)
    shutil.copy2(_MODEL, directory / "1" / "model.py")
    (directory / "config.pbtxt").write_text(
        f'name: "{directory.name}"\nbackend: "python"\nmax_batch_size: {contract.batch}\n'
        + _tensors("input", contract.inputs)
        + _tensors("output", contract.outputs)
        + _parameter("layout", contract.layout)
        + _parameter("engine", engine)
        + "instance_group [{ kind: KIND_CPU count: 1 }]\n"
        + more
    )


def _tensors(kind: str, types: dict[str, str]) -> str:
    return "".join(
        f'{kind} [{{ name: "{name}" data_type: TYPE_{type_} dims: [{-1 if type_ == "STRING" else 1}]'
        + (" optional: true" if kind == "input" and name not in _NEEDED else "")
        + " }]\n"
        for name, type_ in types.items()
    )


def _pair(kind: str, name: str) -> str:
    return f'{kind} {{ key: "{name}" value: "{name}" }} '


def _parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'
