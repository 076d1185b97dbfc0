"""int8 weights: the graph scores almost as the model does, with kernels and without, or it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from model_harness import draw_inputs, make_features_module
from test_bundle import make_bundle
from torch import nn

from builders import export
from builders.export import INT8_TOLERANCE, export_backbone
from builders.models import make_backbone
from builders.models.backbone import Ranker
from builders.models.layers import FoldedMLP
from builders.quantization import quantize
from builders.repository import publish
from liber_runtime.bundle import BACKBONE, TABLES, Manifest
from liber_runtime.cli.application import application
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.native import load_kernels
from liber_runtime.native.compile import compile_kernels
from liber_runtime.served.session import OnnxSession


def make_ranker(name: str, items: int = 30) -> Ranker:
    features = make_features_module(interest_size=0, items=items, history_length=4, lookback=8)
    return Ranker(features, make_backbone(name, features.schema)).eval()


@pytest.mark.skipif(not compile_kernels(), reason="there is no C++ compiler")
def test_a_graph_with_int8_weights_scores_almost_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, path = 300, tmp_path / BACKBONE
    monkeypatch.setattr(export, "APART_BYTES", 4 * 4 * items)
    model = make_ranker("DIEN", items)
    export_backbone(model, path, precision="int8")
    assert (tmp_path / TABLES).stat().st_size > 4 * 4 * items
    graph = onnx.load(path, load_external_data=False)
    assert {each.domain for each in graph.opset_import} == {"", "liber"}
    # The recurrences multiply by one weight each in every step, the attention and the MLP by several.
    products = [node for node in graph.graph.node if node.op_type == "MatMulInteger"]
    weights = {each.name: each for each in graph.graph.initializer if each.name in {node.input[1] for node in products}}
    assert len(products) > 15 > len(weights) > 5
    assert {each.data_type for each in weights.values()} == {onnx.TensorProto.INT8}
    plain, cut = OnnxSession(path, 1), OnnxSession(path, 1, load_kernels("auto", 1))
    assert plain.kernels == ()
    assert set(cut.kernels) == {"PoolHistory", "Residuals", "FoldIn", "SimilarFeedback", "AlikeFeedback"}
    for users, candidates in ((5, 60), (40, 300)):
        inputs = draw_inputs(model.features, users, candidates)
        tensors = {name: each.numpy() for name, each in inputs._asdict().items() if each is not None}
        found = plain.run(tensors)["click_probability"]
        np.testing.assert_allclose(cut.run(tensors)["click_probability"], found, rtol=0, atol=1e-3)
        with torch.inference_mode():
            expected = model.backbone(model.features(inputs)).sigmoid().numpy()
        difference = np.abs(found - expected)
        assert 1e-6 < difference.max() < INT8_TOLERANCE
        assert np.corrcoef(found, expected)[0, 1] > 0.95


@pytest.mark.parametrize(
    ("scale", "message"),
    [(1.0, r"differs from the trained model by .* on inputs"), (0.05, "on average, where candidates are .* apart")],
    ids=["far-apart", "almost-alike"],
)
def test_weights_that_int8_makes_nonsense_of_are_refused(scale: float, message: str, tmp_path: Path) -> None:
    model = make_ranker("DNN")
    folded = next(each for each in model.modules() if isinstance(each, FoldedMLP))
    following, last = (each for each in folded.rest if isinstance(each, nn.Linear))
    with torch.no_grad():
        # One hidden unit that nothing reads is so large that all others are nothing beside it, in 256 steps.
        folded.candidate.bias[0] = 1e6
        following.weight[:, 0] = 0
        last.weight *= scale
    with pytest.raises(ConfigurationError, match=f"{message}.*; this model needs --precision fp32"):
        export_backbone(model, tmp_path / BACKBONE, precision="int8")


def test_a_graph_without_products_by_weights_is_refused() -> None:
    graph = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        both (float[n, 4] left, float[4, m] right) => (float[n, m] product) { product = MatMul(left, right) }
    """)
    with pytest.raises(ConfigurationError, match="no matrix product of this graph has weights to quantize"):
        quantize(graph)


def test_a_product_by_a_weight_is_the_same_however_it_is_written() -> None:
    """Transposed twice, transposed by the product itself, with a bias and without."""
    graph = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        forms (float[n, 3] rows) => (float[n, 2] first, float[n, 2] second, float[n, 2] third)
        <float[2, 3] weight = {1, 2, 3, 4, 5, 6}, float[2] bias = {0.5, -0.5}>
        {
            turned = Transpose<perm = [1, 0]>(weight)
            again = Transpose<perm = [1, 0]>(turned)
            first = MatMul(rows, turned)
            second = Gemm<transB = 1>(rows, again, bias)
            third = Gemm<transB = 1, alpha = 2.0>(rows, weight, bias)
        }
    """)
    made = quantize(graph)
    kinds = [node.op_type for node in made.graph.node]
    assert kinds.count("MatMulInteger") == 2
    assert kinds.count("Gemm") == 1, "a product that is scaled stays what it is"
    session = export.onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = np.array([[1, 0, 2], [-1, 3, 0.5]], dtype=np.float32)
    weight, bias = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32), np.array([0.5, -0.5], dtype=np.float32)
    product = rows @ weight.T
    for found, expected in zip(
        session.run(None, {"rows": rows}), (product, product + bias, 2 * product + bias), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=0.15)


def test_the_manifest_says_the_precision_and_int8_is_not_for_gpus(tmp_path: Path) -> None:
    assert make_bundle(tmp_path / "usual").precision == "fp32"
    assert make_bundle(tmp_path / "small", precision="int8") == Manifest.load(tmp_path / "small")
    with pytest.raises(ConfigurationError, match="int8 weights are for target cpu"):
        publish(tmp_path / "small", tmp_path / "repository", target="gpu")
    assert not (tmp_path / "repository").exists()
    assert publish(tmp_path / "small", tmp_path / "repository") == 1


@pytest.mark.parametrize("words", [[], ["re-encode"]])
def test_a_precision_that_there_is_not(words: list[str]) -> None:
    command = typer.main.get_command(application).commands["build"]  # type: ignore[attr-defined]
    for word in words:
        command = command.commands[word]
    with pytest.raises(typer.BadParameter, match="'int4' is not one of 'fp32', 'int8'"):
        command.make_context("build", ["--precision", "int4"])
