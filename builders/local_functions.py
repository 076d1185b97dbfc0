"""Defines the functions that an exported graph calls inside the graph itself, in standard operators.

The nodes come from `builders.models.functions`; the definitions are ONNX model-local functions
(https://onnx.ai/onnx/repo-docs/IR.html#functions), which every ONNX Runtime inlines.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import onnx
from onnx import helper
from torch import Tensor, nn

from builders.models.functions import AXES, BODIES, DOMAIN, Recorder, fixed_sizes

OPSET = 18
"""Of every exported graph."""


class _Body(nn.Module):
    """A function as a module, for the exporter."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, *tensors: Tensor) -> Tensor:
        return BODIES[self._name](*tensors)


def define(model: onnx.ModelProto, recorder: Recorder, export: Callable[..., None]) -> None:
    """Adds the definition of every function that was recorded while `model` was exported.

    Args:
        model: changed in place.
        recorder: of the export.
        export: as `torch.onnx.export`: a module, its inputs, a file, names and dynamic axes.
    """
    for type_name, (name, tensors) in recorder.calls.items():
        key = f"{name} {fixed_sizes(name, tensors)} {[tensor.dtype for tensor in tensors]}"
        if key not in _definitions:
            _definitions[key] = _define(name, tensors, export)
        function = onnx.FunctionProto()
        function.CopyFrom(_definitions[key])
        function.name = type_name
        model.functions.append(function)
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])


_definitions: dict[str, onnx.FunctionProto] = {}
"""Those that this process has made: they follow from the function and its fixed sizes alone."""


def _define(name: str, tensors: tuple[Tensor, ...], export: Callable[..., None]) -> onnx.FunctionProto:
    inputs = [f"input_{number}" for number in range(len(tensors))]
    axes = {inputs[number]: dict(open_axes) for number, open_axes in enumerate(AXES[name])}
    file = io.BytesIO()
    export(_Body(name).eval(), tensors, file, input_names=inputs, output_names=["output"], dynamic_axes=axes)
    body = onnx.load_model_from_string(file.getvalue()).graph
    constants = [
        helper.make_node("Constant", [], [initializer.name], value=initializer) for initializer in body.initializer
    ]
    nodes = [*constants, *body.node]
    return helper.make_function(DOMAIN, name, inputs, ["output"], nodes, [helper.make_opsetid("", OPSET)])
