"""An ONNX graph on the CPU, its heavy parts as compiled kernels, with errors a person can act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from liber_runtime.exceptions import ConfigurationError, LiberError
from liber_runtime.native import Kernel, Kernels
from liber_runtime.served.backend import Tensors

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
            graph = _whole(path, threads) if kernels is None else _cut(path, threads, kernels)
        except LiberError:
            raise
        except Exception as error:  # ONNX Runtime and the parser raise a dozen types of their own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigurationError(f"graph {path} cannot be loaded ({reason}); build the bundle again") from None
        self._stages = graph.stages
        self.inputs = tuple(graph.shapes)
        self.outputs = graph.outputs
        self.shapes = graph.shapes
        """Of the inputs; 0 where a size is open."""
        self.kernels = graph.kernels

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
class Stage:
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


@dataclass(frozen=True)
class Graph:
    """A graph that can be run: its stages in order, sizes of its inputs (0 where open), its outputs.

    `kernels` are the functions that kernels stand in for.
    """

    stages: Sequence[Stage]
    shapes: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    kernels: tuple[str, ...] = ()


def open_graph(model: str | bytes, threads: int, folder: Path) -> onnxruntime.InferenceSession:
    """A session on a file or on a serialized graph whose tables lie in `folder`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool would take the cores from the other models of the ensemble between two requests.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _whole(path: Path, threads: int) -> Graph:
    session = open_graph(str(path), threads, path.parent)
    shapes = {
        entry.name: tuple(size if isinstance(size, int) else 0 for size in entry.shape)
        for entry in session.get_inputs()
    }
    outputs = tuple(entry.name for entry in session.get_outputs())
    return Graph([Stage(session, list(shapes), outputs)], shapes, outputs)


def _cut(path: Path, threads: int, kernels: Kernels) -> Graph:
    # Parsing a graph takes time and memory, most of all for an encoder: only where there is something to cut out.
    from liber_runtime.served.stages import cut

    return cut(path, threads, kernels) or _whole(path, threads)
