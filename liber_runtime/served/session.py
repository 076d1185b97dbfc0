"""An ONNX graph on the CPU, with errors a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

from liber_runtime.exceptions import ConfigurationError
from liber_runtime.served.backend import Tensors


class OnnxSession:
    """One ONNX Runtime session; `run` maps input names to arrays and back."""

    def __init__(self, path: Path, threads: int) -> None:
        """Loads the graph.

        Raises:
            ConfigurationError: the file is missing or not a graph that ONNX Runtime reads.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # A spinning pool would take the cores from the other models of the ensemble between two requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            reason = str(error).splitlines()[0]
            raise ConfigurationError(f"graph {path} cannot be loaded ({reason}); build the bundle again") from None
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, tensors: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Runs the graph on exactly its inputs; further tensors are ignored."""
        values = self._session.run(None, {name: tensors[name] for name in self.inputs})
        return dict(zip(self.outputs, values, strict=True))
