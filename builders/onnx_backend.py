"""A bundle's graphs as models of Triton's own ONNX Runtime backend: on GPUs, with no Python process in between.

On the CPU a thin Python model stands around every graph: it takes the leading 1 off a request's tensors, merges the
requests, and adds what is no tensor of the graph. Here the graph itself has to do that for one request. Model-local
functions, which the CPU runs as compiled kernels, become the standard operators that they are defined by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import model_config_pb2

from liber_runtime.exceptions import ConfigurationError

MODEL = "model.onnx"
"""The name under which the backend looks for a graph."""

IR_VERSION, OPSET = 10, 21
"""Newest that ONNX Runtime 1.19 reads, the one in the images of Triton 24.10."""

_LEADING = "leading_axis"
_ELEMENTS = {
    model_config_pb2.TYPE_FP32: TensorProto.FLOAT,
    model_config_pb2.TYPE_INT32: TensorProto.INT32,
    model_config_pb2.TYPE_INT64: TensorProto.INT64,
}


def write_model(
    source: Path,
    config: model_config_pb2.ModelConfig,
    path: Path,
    *,
    strings: Mapping[str, str],
    tensorrt: bool,
) -> model_config_pb2.ModelConfig:
    """Writes a graph of a bundle as a model that takes the tensors of `config`, and returns its configuration.

    One run answers one request: the backend merges none, because tensors of several requests cannot be put together
    without shifting `user_index`. Arithmetic is that of float32 throughout (no TF32).

    Args:
        source: the bundle's graph.
        config: of the Python model that runs it on the CPU; stays as it is. Tensors that the graph lacks are added:
            inputs that it does not read, and outputs among `strings`.
        path: of the graph to write; its external data lies beside it already.
        strings: outputs that are one fixed string each.
        tensorrt: let TensorRT compile what it can; it does so when shapes are seen first, which takes minutes.

    Raises:
        ConfigurationError: the graph cannot be read, or is of no use to the backend.
    """
    model = _load(source)
    graph = model.graph
    if config.max_batch_size:
        _lead(graph)
    _complete_inputs(graph, config)
    _complete_outputs(graph, config, strings)
    model.ir_version = min(model.ir_version, IR_VERSION)
    onnx.save(model, str(path))
    return _configure(config, path, tensorrt)


def _load(source: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(source), load_external_data=False)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
            kept = [entry for entry in model.opset_import if entry.domain in _domains(model.graph.node)]
            del model.opset_import[:]
            model.opset_import.extend(kept)
    except Exception as error:  # the parser's and the inliner's own
        raise ConfigurationError(f"graph {source} cannot be read ({_line(error)}); build the bundle again") from None
    newest = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if newest > OPSET:
        raise ConfigurationError(
            f"graph {source} has opset {newest}, Triton's ONNX Runtime reads up to {OPSET}; export it with that"
        )
    return model


def _domains(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Of the operators, those in the bodies of loops and branches too."""
    found = set()
    for node in nodes:
        found.add(node.domain)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                found |= _domains(body.node)
    return found


def _lead(graph: onnx.GraphProto) -> None:
    """Gives every input and output a leading 1, taken off before the first node and put on after the last."""
    inner = {value.name: f"{value.name}/folded" for value in (*graph.input, *graph.output)}
    nodes = list(graph.node)
    _rename(nodes, inner)
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, dtype=np.int64), _LEADING))
    before = [helper.make_node("Squeeze", [value.name, _LEADING], [inner[value.name]]) for value in graph.input]
    after = [helper.make_node("Unsqueeze", [inner[value.name], _LEADING], [value.name]) for value in graph.output]
    del graph.node[:]
    graph.node.extend([*before, *nodes, *after])
    for value in (*graph.input, *graph.output):
        tensor = value.type.tensor_type
        shape = [1, *(dim.dim_value or dim.dim_param or None for dim in tensor.shape.dim)]
        value.CopyFrom(helper.make_tensor_value_info(value.name, tensor.elem_type, shape))


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Renames values where they are made and read, in the bodies of loops and branches too."""
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                _rename(body.node, names)
                for value in body.output:
                    value.name = names.get(value.name, value.name)


def _complete_inputs(graph: onnx.GraphProto, config: model_config_pb2.ModelConfig) -> None:
    """Adds inputs that the graph does not read, and a value for those that a request may leave out.

    The backend takes an input as optional if the graph has a value in its place.
    """
    there = {value.name: value for value in graph.input}
    leading = [1] if config.max_batch_size else []
    for tensor in config.input:
        rank = len(leading) + len(tensor.dims)
        # Of an optional input nothing is fixed but the leading 1, so that bundles with it and without it agree.
        if tensor.optional or tensor.name not in there:
            shape: list[str | int | None] = [*leading]
            shape += [f"{tensor.name}_{axis}" for axis in range(len(leading), rank)]
            value = helper.make_tensor_value_info(tensor.name, _ELEMENTS[tensor.data_type], shape)
            if tensor.name in there:
                there[tensor.name].CopyFrom(value)
            else:
                graph.input.append(value)
        if tensor.optional:
            kind = helper.tensor_dtype_to_np_dtype(_ELEMENTS[tensor.data_type])
            graph.initializer.append(numpy_helper.from_array(np.zeros([1] * rank, dtype=kind), tensor.name))


def _complete_outputs(graph: onnx.GraphProto, config: model_config_pb2.ModelConfig, strings: Mapping[str, str]) -> None:
    there = {value.name for value in graph.output}
    for tensor in config.output:
        if tensor.name in there or tensor.name not in strings:
            continue
        text = numpy_helper.from_array(np.array([strings[tensor.name]], dtype=np.object_), tensor.name)
        graph.node.append(helper.make_node("Constant", [], [tensor.name], value=text))
        graph.output.append(helper.make_tensor_value_info(tensor.name, TensorProto.STRING, [1]))


def _configure(config: model_config_pb2.ModelConfig, path: Path, tensorrt: bool) -> model_config_pb2.ModelConfig:
    """The configuration of the backend, with the shapes that ONNX Runtime itself sees in the written graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # It warns of what is meant: a value in the place of an optional input is no constant.
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen types of its own
        raise ConfigurationError(f"graph {path} cannot be loaded ({_line(error)}); build the bundle again") from None
    seen = {
        value.name: value.shape
        for value in (*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs())
    }
    ours = model_config_pb2.ModelConfig()
    ours.CopyFrom(config)
    ours.ClearField("backend")
    ours.ClearField("dynamic_batching")
    ours.platform = "onnxruntime_onnx"
    ours.max_batch_size = 0
    for tensor in (*ours.input, *ours.output):
        if tensor.name not in seen:
            raise ConfigurationError(f"graph {path} has no tensor {tensor.name}, which its model gives or takes")
        tensor.dims[:] = [size if isinstance(size, int) else -1 for size in seen[tensor.name]]
    for tensor in ours.input:
        tensor.allow_ragged_batch = False
    for group in ours.instance_group:
        group.kind = model_config_pb2.ModelInstanceGroup.KIND_GPU
    accelerators = ours.optimization.execution_accelerators.gpu_execution_accelerator
    if tensorrt:
        accelerators.add(name="tensorrt", parameters={"precision_mode": "FP32"})
    accelerators.add(name="cuda", parameters={"use_tf32": "0"})
    return ours


def _line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
