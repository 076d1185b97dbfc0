"""An ONNX graph on the CPU, its heavy parts as compiled kernels, with errors a person can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import external_data_helper, numpy_helper

from liber_runtime.exceptions import ConfigurationError, LiberError
from liber_runtime.native import Kernel, Kernels
from liber_runtime.served.backend import Tensors

DOMAIN = "liber"
"""Of the functions that a kernel can stand in for."""

Values = dict[str, npt.NDArray[Any]]


class OnnxSession:
    """One graph; `run` maps input names to arrays and back.

    A graph of `builders.export` calls functions that are defined in it by standard operators. Where there is a kernel
    for one, the graph is cut around it: what has to be known before a kernel runs is one stage, what is left at the end
    another, each a session of ONNX Runtime.
    """

    def __init__(self, path: Path, threads: int, kernels: Kernels | None = None) -> None:
        """Loads the graph.

        Args:
            path: of the ONNX file; tables that are kept apart from it lie beside it.
            threads: of ONNX Runtime.
            kernels: None to run the whole graph in ONNX Runtime.

        Raises:
            ConfigurationError: the file is missing or not a graph that ONNX Runtime reads.
        """
        try:
            model = onnx.load(str(path), load_external_data=False)
            made = _make_kernels(model, path.parent, kernels) if kernels is not None else {}
            self._stages: Sequence[_Stage] = _cut(model, path, made, threads) if made else [_whole(path, threads)]
        except LiberError:
            raise
        except Exception as error:  # ONNX Runtime and the parser raise a dozen types of their own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigurationError(f"graph {path} cannot be loaded ({reason}); build the bundle again") from None
        constants = {initializer.name for initializer in model.graph.initializer}
        self.inputs = tuple(entry.name for entry in model.graph.input if entry.name not in constants)
        self.outputs = tuple(entry.name for entry in model.graph.output)
        self.shapes = {
            entry.name: tuple(size.dim_value for size in entry.type.tensor_type.shape.dim)
            for entry in model.graph.input
        }
        """Of the inputs; 0 where a size is open."""
        self.kernels = tuple(node.op_type for node in model.graph.node if node.output and node.output[0] in made)

    def run(self, tensors: Tensors) -> Values:
        """Runs the graph on exactly its inputs; further tensors are ignored.

        Raises:
            InvalidInputError: an index that points outside of what a kernel reads.
        """
        values: Values = {name: tensors[name] for name in self.inputs}
        for stage in self._stages:
            stage.run(values)
        return {name: values[name] for name in self.outputs}


@dataclass(frozen=True)
class _Stage:
    """A part of a graph in ONNX Runtime, then the kernels that had to wait for it."""

    session: onnxruntime.InferenceSession | None
    inputs: Sequence[str]
    outputs: Sequence[str]
    kernels: Sequence[tuple[Kernel, Sequence[str], str]] = ()

    def run(self, values: Values) -> None:
        """Adds what this stage computes to `values`."""
        if self.session is not None:
            found = self.session.run(self.outputs, {name: values[name] for name in self.inputs})
            values.update(zip(self.outputs, found, strict=True))
        for kernel, inputs, output in self.kernels:
            values[output] = kernel([values.get(name, _NOTHING) for name in inputs])


_NOTHING = np.zeros(0, np.float32)
"""In the place of a kernel's constant, which it has."""


def _options(threads: int, folder: Path) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool would take the cores from the other models of the ensemble between two requests.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def _whole(path: Path, threads: int) -> _Stage:
    session = onnxruntime.InferenceSession(
        str(path), _options(threads, path.parent), providers=["CPUExecutionProvider"]
    )
    return _Stage(
        session,
        [entry.name for entry in session.get_inputs()],
        [entry.name for entry in session.get_outputs()],
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


def _cut(model: onnx.ModelProto, path: Path, made: Mapping[str, Kernel], threads: int) -> list[_Stage]:
    """The stages of a graph: for every kernel what it waits for, and at the end what no kernel waited for."""
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
            session = onnxruntime.InferenceSession(
                part.SerializeToString(), _options(threads, path.parent), providers=["CPUExecutionProvider"]
            )
        waiting = [
            (made[node.output[0]], list(node.input), node.output[0])
            for node in graph.node
            if node.output[0] in made and depth[node.output[0]] == number + 1
        ]
        stages.append(_Stage(session, inputs, outputs, waiting))
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
