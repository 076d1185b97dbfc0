"""Dynamic quantization: a backbone's graph with its weights in int8.

A weight is one byte with a scale for every output of its layer; what it is multiplied with becomes bytes when the graph
runs, with one scale for the whole batch. So a score depends a little on what else is scored in the same run. Everything
else stays float32: embeddings and statistics, which are looked up and not multiplied, and the products of two values
that both depend on the request.

Where the compiled kernels run, float32 is the faster one (`bench.precision`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper

from builders.models.functions import DOMAIN
from liber_runtime.exceptions import ConfigurationError

_PRODUCTS = ("MatMul", "Gemm")
_SAME = ("Transpose", "Identity")


def quantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with int8 weights in its products, in operators of the ONNX standard.

    Functions that multiply by weights (recurrences, attention, MLPs) are written out, for no kernel computes in int8.
    The others compare, look up and pool; they stay functions, so that their kernels run where there are any.

    Args:
        model: of `builders.export`, its functions in it; stays as it is.

    Raises:
        ConfigurationError: there is no weight to quantize, or ONNX Runtime cannot do it.
    """
    written_out = [(DOMAIN, function.name) for function in model.functions if _multiplies_by_an_input(function)]
    model = onnx.inliner.inline_selected_functions(model, written_out)
    names = _gather_weights(model.graph)
    if not names:
        raise ConfigurationError("no matrix product of this graph has weights to quantize; build it with fp32")
    try:
        return _quantize(model, names)
    except Exception as error:  # its exceptions have nothing in common
        raise ConfigurationError(f"the graph cannot be quantized ({str(error).splitlines()[0]:.200})") from error


def _quantize(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # It advises, through the root logger, to have the graph optimized first: a served graph is quantized as it is.
    silenced = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "int8.onnx"
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=names,
                per_channel=True,
                # Seven bits: with eight, processors without VNNI would overflow sums of two products, and score
                # differently from the one that the graph was checked on.
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
            made = onnx.load(str(path))
            # Shapes it noted are those of the example that was traced, whose catalogue may be a short one.
            del made.graph.value_info[:]
            return made
    finally:
        logging.root.setLevel(silenced)


def _multiplies_by_an_input(function: onnx.FunctionProto) -> bool:
    """Whether a function has products by what the graph gives it, which are weights, not by what it looks up."""
    maker = {output: node for node in function.node for output in node.output}
    return any(
        _source(node.input[1], maker)[0] in function.input for node in function.node if node.op_type in _PRODUCTS
    )


def _source(name: str, maker: Mapping[str, onnx.NodeProto]) -> tuple[str, bool]:
    """The value that `name` is but for transpositions of a matrix, and whether these leave it transposed."""
    transposed = False
    while name in maker and maker[name].op_type in _SAME:
        transposed ^= maker[name].op_type == "Transpose"
        name = maker[name].input[0]
    return name, transposed


def _gather_weights(graph: onnx.GraphProto) -> list[str]:
    """Makes every product by a weight a MatMul by a constant [in, out]; returns the names of these nodes."""
    maker = {output: node for node in graph.node for output in node.output}
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    weights: dict[tuple[str, bool], onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    names: list[str] = []
    for node in graph.node:
        name, transposed = _source(node.input[1], maker) if node.op_type in _PRODUCTS else ("", False)
        options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if name not in initializers or len(initializers[name].dims) != 2 or not plain:
            nodes.append(node)
            continue
        key = (name, transposed ^ bool(options.get("transB", 0)))
        if key not in weights:
            array = numpy_helper.to_array(initializers[name])
            weights[key] = numpy_helper.from_array(
                np.ascontiguousarray(array.T if key[1] else array), f"{name}/weight{len(weights)}"
            )
        names.append(f"product_{len(names)}")
        bias = [each for each in node.input[2:] if each]
        output = f"{node.output[0]}/product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], weights[key].name], [output], name=names[-1]))
        if bias:
            nodes.append(helper.make_node("Add", [output, *bias], [node.output[0]]))
    kept = _needed(nodes, [entry.name for entry in graph.output])
    read = {name for node in kept for name in node.input}
    constants = [*graph.initializer, *weights.values()]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(each for each in constants if each.name in read)
    return names


def _needed(nodes: Iterable[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that something is made of, in their order."""
    read, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    return kept[::-1]
