"""A graph that is cut around its kernels answers as the graph does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_harness import GENRES, draw_inputs, make_features_module

from builders import export
from builders.export import export_backbone
from builders.models import BACKBONES, make_backbone
from builders.models.backbone import Ranker
from builders.models.features import Inputs
from builders.models.fuser import AttentionFuser
from liber_runtime.bundle import TABLES
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.native import load_kernels
from liber_runtime.native.compile import compile_kernels
from liber_runtime.served.session import OnnxSession

OWN_KERNELS = {
    "DIEN": {"MapHistory", "GRU", "InterestEvolution", "FoldedMLP"},
    "DIN": {"MapHistory", "LocalActivation", "FoldedMLP"},
    "FiBiNet": set(),
    "LR": set(),
}
"""Of the backbones that have others than the folded MLP."""
OF_ALL = {"PoolHistory", "Residuals", "FoldIn", "SimilarFeedback", "AlikeFeedback"}

pytestmark = pytest.mark.skipif(not compile_kernels(), reason="there is no C++ compiler")


def make_ranker(name: str, items: int = 300) -> Ranker:
    features = make_features_module(
        item_fields=(GENRES,),
        interest_size=8,
        items=items,
        history_length=6,
        lookback=15,
        embedding_dim=8,
        meeting=True,
    )
    return Ranker(features, make_backbone(name, features.schema), AttentionFuser(8))


def arrays_of(inputs: Inputs) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs._asdict().items() if tensor is not None}


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_backbone_scores_the_same_with_kernels_and_without(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = make_ranker(name).eval()
    export_backbone(model, tmp_path / "backbone.onnx")
    plain = OnnxSession(tmp_path / "backbone.onnx", 1)
    assert plain.kernels == ()
    for threads in (1, 2):
        cut = OnnxSession(tmp_path / "backbone.onnx", 1, load_kernels("auto", threads))
        assert set(cut.kernels) == OF_ALL | OWN_KERNELS.get(name, {"FoldedMLP"})
        assert cut.inputs == plain.inputs
        for history, users, candidates in (("mixed", 5, 30), ("empty", 2, 3), ("full", 1, 1), ("mixed", 40, 40)):
            inputs = draw_inputs(model.features, users, candidates, history=history)
            found = cut.run(arrays_of(inputs))["click_probability"]
            np.testing.assert_allclose(found, plain.run(arrays_of(inputs))["click_probability"], rtol=0, atol=2e-6)
            with torch.inference_mode():
                expected = model.backbone(model.features(inputs)).sigmoid().numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_large_tables_are_mapped_from_a_file_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = make_ranker("DIEN").eval(), tmp_path / "backbone.onnx"
    inputs = arrays_of(draw_inputs(model.features, 5, 30))
    export_backbone(model, path)
    assert (tmp_path / TABLES).stat().st_size == 0
    whole, expected = path.stat().st_size, OnnxSession(path, 1).run(inputs)["click_probability"]
    monkeypatch.setattr(export, "APART_BYTES", 4 * 300 * 8)
    export_backbone(model, path)
    kept = (tmp_path / TABLES).stat().st_size
    assert kept > 4 * 301 * 8 * 3
    assert path.stat().st_size < whole - kept / 2
    for kernels in (None, load_kernels("auto", 1)):
        found = OnnxSession(path, 1, kernels).run(inputs)["click_probability"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_tables_that_are_not_there_are_told(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "APART_BYTES", 4 * 300 * 8)
    path = tmp_path / "backbone.onnx"
    export_backbone(make_ranker("DNN").eval(), path)
    if damage == "missing":
        (tmp_path / TABLES).unlink()
    else:
        (tmp_path / TABLES).write_bytes((tmp_path / TABLES).read_bytes()[:4096])
    for kernels in (None, load_kernels("auto", 1)):
        with pytest.raises(ConfigurationError, match=r"cannot be loaded .*; build the bundle again"):
            OnnxSession(path, 1, kernels)


@pytest.mark.parametrize(("tensor", "wrong"), [("item_index", 10**6), ("history_item", -3), ("user_index", 5)])
def test_an_index_that_points_outside_is_refused(tensor: str, wrong: int, tmp_path: Path) -> None:
    model = make_ranker("DNN").eval()
    export_backbone(model, tmp_path / "backbone.onnx")
    session = OnnxSession(tmp_path / "backbone.onnx", 1, load_kernels("auto", 1))
    inputs = arrays_of(draw_inputs(model.features, 5, 30, history="full"))
    inputs[tensor] = inputs[tensor].copy()
    inputs[tensor].flat[0] = wrong
    with pytest.raises(InvalidInputError, match=r"lies outside of"):
        session.run(inputs)
