"""Cuts a graph around the functions that have kernels.

What has to be known before a kernel runs is one stage in ONNX Runtime; what no kernel waits for is another, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import external_data_helper, numpy_helper

from liber_runtime.native import Kernel, Kernels
from liber_runtime.served.session import Graph, Stage, open_graph

DOMAIN = "liber"
"""Of the functions that a kernel can stand in for."""


def cut(path: Path, threads: int, kernels: Kernels) -> Graph | None:
    """The graph of a file in stages; None if it calls no function that there is a kernel for.

    Args:
        path: of the ONNX file; tables that are kept apart from it lie beside it.
        threads: of ONNX Runtime.
        kernels: for the functions of the graph.
    """
    model = onnx.load(str(path), load_external_data=False)
    made = _make_kernels(model, path.parent, kernels)
    if not made:
        return None
    constants = {initializer.name for initializer in model.graph.initializer}
    return Graph(
        _stages(model, path.parent, made, threads),
        {
            entry.name: tuple(size.dim_value for size in entry.type.tensor_type.shape.dim)
            for entry in model.graph.input
            if entry.name not in constants
        },
        tuple(entry.name for entry in model.graph.output),
        tuple(node.op_type for node in model.graph.node if node.output and node.output[0] in made),
    )


def _make_kernels(model: onnx.ModelProto, folder: Path, kernels: Kernels) -> dict[str, Kernel]:
    """Kernels by the output of the node that each stands for."""
    initializers = {initializer.name: initializer for initializer in model.graph.initializer}
    made = {}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in initializers:  # weights that are equal are written once
            initializers[node.output[0]] = initializers[node.input[0]]
        if node.domain != DOMAIN:
            continue
        constants = {
            place: read_tensor(initializers[name], folder)
            for place, name in enumerate(node.input)
            if name in initializers
        }
        kernel = kernels.make(node.op_type, constants, len(node.input))
        if kernel is not None:
            made[node.output[0]] = kernel
    return made


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[Any]:
    """A constant of a graph; memory-mapped if it lies in a file of its own in `folder`."""
    if not external_data_helper.uses_external_data(tensor):
        return numpy_helper.to_array(tensor)
    place = external_data_helper.ExternalDataInfo(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / place.location, dtype, "r", offset=place.offset or 0, shape=tuple(tensor.dims))


def _stages(model: onnx.ModelProto, folder: Path, made: Mapping[str, Kernel], threads: int) -> list[Stage]:
    """For every kernel what it waits for, and at the end what no kernel waited for."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=False).graph
    types = {entry.name: entry for entry in (*graph.input, *graph.value_info, *graph.output)}
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}

    depth: dict[str, int] = {}  # of a value: the kernels behind one another that come before it
    for node in graph.node:
        before = max((depth.get(name, 0) for name in node.input), default=0)
        for output in node.output:
            depth[output] = before + (output in made)
    last = max(depth.values())

    stage_of: dict[str, int] = {}  # of a node's outputs; what no kernel waits for is put off to the end
    for node in graph.node:
        if node.output[0] in made:
            for name in _ancestors(node.input, maker, made):
                stage_of[name] = min(stage_of.get(name, last), depth[node.output[0]] - 1)
    stages = []
    for number in range(last + 1):
        nodes = [
            node for node in graph.node if node.output[0] not in made and stage_of.get(node.output[0], last) == number
        ]
        own = {output for node in nodes for output in node.output}
        read_later = _read_outside(graph, own)
        outputs = [output for node in nodes for output in node.output if output in read_later]
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        inputs = [name for name in read if name not in own and name not in initializers]
        session = None
        if outputs:
            part = onnx.helper.make_model(
                onnx.helper.make_graph(
                    nodes,
                    f"stage_{number}",
                    [_typed(types, maker, made, name) for name in inputs],
                    [_typed(types, maker, made, name) for name in outputs],
                    [initializers[name] for name in read if name in initializers],
                ),
                functions=model.functions,
                opset_imports=model.opset_import,
                ir_version=model.ir_version,
            )
            session = open_graph(part.SerializeToString(), threads, folder)
        waiting = [
            (made[node.output[0]], list(node.input), node.output[0])
            for node in graph.node
            if node.output[0] in made and depth[node.output[0]] == number + 1
        ]
        stages.append(Stage(session, inputs, outputs, waiting))
    return stages


def _ancestors(names: Iterable[str], maker: Mapping[str, onnx.NodeProto], made: Mapping[str, Kernel]) -> Iterable[str]:
    """The values that ONNX Runtime has to compute for `names`, up to kernels and inputs."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen or name in made or name not in maker:
            continue
        seen.add(name)
        waiting.extend(maker[name].input)
        seen.update(maker[name].output)
    return seen


def _read_outside(graph: onnx.GraphProto, own: set[str]) -> set[str]:
    """Which of the values of some nodes others read, or the caller."""
    read = {entry.name for entry in graph.output}
    for node in graph.node:
        if node.output[0] not in own:
            read.update(node.input)
    return read & own


def _typed(
    types: Mapping[str, onnx.ValueInfoProto],
    maker: Mapping[str, onnx.NodeProto],
    made: Mapping[str, Kernel],
    name: str,
) -> onnx.ValueInfoProto:
    """A value with the type of its entries; its sizes are left open."""
    kind = onnx.TensorProto.FLOAT if name in made else types[name].type.tensor_type.elem_type
    return onnx.helper.make_tensor_value_info(name, kind, None)
