from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from model_harness import AGE, GENRES, draw_inputs, make_features_module, run_flat
from torch import Tensor

from builders import export
from builders.export import export_backbone, export_fuser
from builders.models import make_backbone
from builders.models.backbone import Ranker
from builders.models.features import Inputs
from builders.models.fuser import AttentionFuser, Fuser, MeanFuser
from builders.models.kar import HybridExpertAdaptor
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.vocabulary import Field

T, D, ITEMS = 20, 32, 300
LOOKBACK = 50
INPUTS = ["item_index", "user_index", "history_item", "history_feedback", "history_length", "profile", "interest"]

Exported = tuple[Ranker, onnxruntime.InferenceSession]


def make_dien(
    interest_size: int = D, user_fields: tuple[Field, ...] = (AGE,), history_length: int = T, **options: int
) -> Ranker:
    features = make_features_module(
        item_fields=(GENRES,),
        user_fields=user_fields,
        interest_size=interest_size,
        items=ITEMS,
        history_length=history_length,
        embedding_dim=16,
        **options,
    )
    fuser = AttentionFuser(interest_size) if interest_size else None
    return Ranker(features, make_backbone("DIEN", features.schema), fuser)


def export_model(model: Ranker, path: Path) -> Exported:
    export_backbone(model, path)
    return model.eval(), onnxruntime.InferenceSession(str(path))


def score(model: Ranker, inputs: Inputs) -> np.ndarray:
    """What PyTorch says of a given interest, which the graph is given too."""
    with torch.inference_mode():
        return model.backbone(model.features(inputs)).sigmoid().numpy()


def run(session: onnxruntime.InferenceSession, inputs: list[Tensor]) -> np.ndarray:
    names = [entry.name for entry in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
    return output


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model, path = make_dien().train(), tmp_path_factory.mktemp("onnx") / "backbone.onnx"
    export_backbone(model, path)
    assert all(module.training for module in model.modules()), "an export leaves the model as it was"
    assert sorted(each.name for each in path.parent.iterdir()) == ["backbone.onnx", "backbone.tables"]
    return model.eval(), onnxruntime.InferenceSession(str(path))


@pytest.fixture(scope="module")
def far_sighted(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of features whose numbers look back further than the backbone reads."""
    return export_model(make_dien(lookback=LOOKBACK), tmp_path_factory.mktemp("onnx") / "backbone.onnx")


def assert_the_graph_equals_pytorch(exported: Exported, users: int, candidates: int, history: str) -> None:
    model, session = exported
    inputs = draw_inputs(model.features, users, candidates, history=history, seed=users + candidates)
    expected = score(model, inputs)
    found = run(session, [getattr(inputs, name) for name in INPUTS])
    assert found.dtype == np.float32
    assert found.shape == (candidates,)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    if candidates == 1000:
        assert found.std() > 1e-3


@pytest.mark.parametrize("users", [1, 3, 1000])
@pytest.mark.parametrize("candidates", [1, 3, 1000])
@pytest.mark.parametrize("history", ["empty", "full", "mixed"])
def test_the_exported_backbone_equals_pytorch(backbone: Exported, users: int, candidates: int, history: str) -> None:
    assert_the_graph_equals_pytorch(backbone, users, candidates, history)


@pytest.mark.parametrize("users", [1, 3, 100])
@pytest.mark.parametrize("history", ["empty", "full", "mixed"])
def test_a_graph_that_looks_back_further_than_its_backbone_equals_pytorch(
    far_sighted: Exported, users: int, history: str
) -> None:
    assert_the_graph_equals_pytorch(far_sighted, users, 1000, history)


def test_a_graph_looks_back_further_than_its_backbone(far_sighted: Exported) -> None:
    """Users whose history is shorter than T, longer, and full: the older behaviors of the last two are looked at."""
    model, session = far_sighted
    inputs = draw_inputs(model.features, 3, 300)
    length = torch.tensor([T - 3, T + 3, LOOKBACK], dtype=torch.int32)
    place = torch.arange(LOOKBACK)
    item = torch.where(place < length[:, None], inputs.history_item[0], 0)
    feedback = torch.where(place < length[:, None], inputs.history_feedback[0], 0)
    older = place < length[:, None] - T
    assert older.sum(1).tolist() == [0, 3, LOOKBACK - T]
    inputs = inputs._replace(history_item=item, history_feedback=feedback, history_length=length)
    other = inputs._replace(history_item=torch.where(older, item % ITEMS + 1, item))
    for batch in (inputs, other):
        np.testing.assert_allclose(run_flat(session, batch), score(model, batch), atol=1e-5, rtol=0)
    moved = np.abs(run_flat(session, other) - run_flat(session, inputs))
    assert inputs.user_index is not None
    short, *long = (moved[inputs.user_index.numpy() == user] for user in range(3))
    np.testing.assert_allclose(short, 0, atol=1e-6)
    assert [bool((each > 1e-4).any()) for each in long] == [True, True]


def test_the_wire_contract_of_a_graph_that_looks_back_further(far_sighted: Exported) -> None:
    _, session = far_sighted
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    assert shapes["history_item"] == shapes["history_feedback"] == ["users", LOOKBACK]


def test_the_exported_adaptor_of_kar_equals_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = make_features_module(meeting=HybridExpertAdaptor(4, 4))
    assert features.schema.pair == HybridExpertAdaptor.fields
    ranker = Ranker(features, make_backbone("DNN", features.schema), MeanFuser(4))
    model, session = export_model(ranker, tmp_path / "backbone.onnx")
    for users, candidates in ((1, 1), (5, 60), (60, 40)):
        inputs = draw_inputs(features, users, candidates, seed=users)
        found = run(session, [getattr(inputs, name) for name in INPUTS])
        np.testing.assert_allclose(found, score(model, inputs), atol=1e-5, rtol=0)
    other = inputs._replace(interest=-inputs.interest)
    assert np.abs(run_flat(session, other) - found).max() > 1e-3


def test_the_wire_contract_of_the_backbone(backbone: Exported) -> None:
    _, session = backbone
    assert {entry.name: (entry.type, entry.shape) for entry in session.get_inputs()} == {
        "item_index": ("tensor(int32)", ["candidates"]),
        "user_index": ("tensor(int32)", ["candidates"]),
        "history_item": ("tensor(int32)", ["users", T]),
        "history_feedback": ("tensor(int32)", ["users", T]),
        "history_length": ("tensor(int32)", ["users"]),
        "profile": ("tensor(int32)", ["users", 1]),
        "interest": ("tensor(float)", ["users", D]),
    }
    assert [(entry.name, entry.type, entry.shape) for entry in session.get_outputs()] == [
        ("click_probability", "tensor(float)", ["candidates"])
    ]


def test_a_base_model_has_no_interest_input(tmp_path: Path) -> None:
    _, session = export_model(make_dien(interest_size=0, history_length=3), tmp_path / "base.onnx")
    assert [entry.name for entry in session.get_inputs()] == INPUTS[:-1]


def test_a_model_without_profile_fields_keeps_the_input(tmp_path: Path) -> None:
    _, session = export_model(make_dien(user_fields=(), history_length=3), tmp_path / "backbone.onnx")
    assert [entry.name for entry in session.get_inputs()] == INPUTS


@pytest.fixture(scope="module", params=[AttentionFuser, MeanFuser])
def fuser(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Fuser, onnxruntime.InferenceSession]:
    torch.manual_seed(0)
    model, path = request.param(D), tmp_path_factory.mktemp("onnx") / "fuser.onnx"
    export_fuser(model, path)
    return model, onnxruntime.InferenceSession(str(path))


@pytest.mark.parametrize("users", [1, 3, 1000])
@pytest.mark.parametrize("partitions", [0, 1, 40])
def test_the_exported_fuser_equals_pytorch(
    fuser: tuple[Fuser, onnxruntime.InferenceSession], users: int, partitions: int
) -> None:
    model, session = fuser
    representations = torch.randn(users, partitions, D)
    mask = torch.arange(partitions) < torch.randint(partitions + 1, (users, 1))
    mask[0], mask[-1] = True, users == 1
    with torch.inference_mode():
        expected = model(representations, mask).numpy()
    # A graph is given one row at least, and reads no more than the counts say.
    rows = torch.cat((representations[mask], torch.full((1, D), 7.0)))
    found = run(session, [rows, mask.sum(1).int()])
    assert found.shape == (users, D)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_the_wire_contract_of_the_fuser(fuser: tuple[Fuser, onnxruntime.InferenceSession]) -> None:
    _, session = fuser
    assert [(entry.name, entry.type, entry.shape) for entry in session.get_inputs()] == [
        ("representations", "tensor(float)", ["partitions", D]),
        ("partition_count", "tensor(int32)", ["users"]),
    ]
    assert [(entry.name, entry.type, entry.shape) for entry in session.get_outputs()] == [
        ("interest", "tensor(float)", ["users", D])
    ]


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ConfigurationError, match=r"fuser.onnx differs from the trained model by"):
        export_fuser(AttentionFuser(D), tmp_path / "fuser.onnx")
