from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from builders import export
from builders.export import export_backbone, export_fuser
from builders.models.dien import DIEN
from builders.models.fuser import AttentionFuser
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.vocabulary import Field

T, D, ITEMS = 20, 32, 300
GENRES = Field(name="genres", kind="categories", values=("a", "b", "c"), width=2)
AGE = Field(name="age", kind="number", boundaries=(20.0, 40.0))
STARS = Field(name="stars", kind="number", boundaries=(1.5, 2.5, 3.5, 4.5))
INPUTS = ["item_index", "user_index", "history_item", "history_feedback", "history_length", "profile", "interest"]


def make_dien(interest_size: int = D, user_fields: tuple[Field, ...] = (AGE,)) -> DIEN:
    torch.manual_seed(0)
    table = np.stack([np.arange(ITEMS + 1), *np.random.default_rng(0).integers(0, 4, (2, ITEMS + 1))], axis=1)
    table[0] = 0
    model = DIEN(table.astype(np.int32), (GENRES,), user_fields, STARS, history_size=T, interest_size=interest_size)
    for name, parameter in model.named_parameters():
        if "table" in name:
            torch.nn.init.normal_(parameter)
    return model


def draw(users: int, candidates: int, history: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(users + candidates)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    length = {"empty": torch.zeros(users, dtype=torch.int32), "full": torch.full((users,), T, dtype=torch.int32)}.get(
        history, integers(T + 1, users)
    )
    real = torch.arange(T) < length[:, None]
    return [
        integers(ITEMS + 1, candidates),
        integers(users, candidates),
        integers(ITEMS + 1, users, T) * real,
        integers(STARS.size, users, T) * real,
        length,
        integers(AGE.size, users, 1),
        torch.randn(users, D, generator=generator),
    ]


def run(session: onnxruntime.InferenceSession, inputs: list[Tensor]) -> np.ndarray:
    names = [entry.name for entry in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
    return output


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> tuple[DIEN, onnxruntime.InferenceSession]:
    model, path = make_dien().train(), tmp_path_factory.mktemp("onnx") / "backbone.onnx"
    export_backbone(model, path)
    assert model.training, "an export leaves the model as it was"
    assert [each.name for each in path.parent.iterdir()] == ["backbone.onnx"]
    return model.eval(), onnxruntime.InferenceSession(str(path))


@pytest.mark.parametrize("users", [1, 3, 1000])
@pytest.mark.parametrize("candidates", [1, 3, 1000])
@pytest.mark.parametrize("history", ["empty", "full", "mixed"])
def test_the_exported_backbone_equals_pytorch(
    backbone: tuple[DIEN, onnxruntime.InferenceSession], users: int, candidates: int, history: str
) -> None:
    model, session = backbone
    inputs = draw(users, candidates, history)
    with torch.inference_mode():
        expected = model(*inputs).sigmoid().numpy()
    found = run(session, inputs)
    assert found.dtype == np.float32
    assert found.shape == (candidates,)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    if candidates == 1000:
        assert found.std() > 1e-3


def test_the_wire_contract_of_the_backbone(backbone: tuple[DIEN, onnxruntime.InferenceSession]) -> None:
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
    export_backbone(make_dien(interest_size=0), tmp_path / "base.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "base.onnx"))
    assert [entry.name for entry in session.get_inputs()] == INPUTS[:-1]


def test_a_model_without_profile_fields_keeps_the_input(tmp_path: Path) -> None:
    export_backbone(make_dien(user_fields=()), tmp_path / "backbone.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "backbone.onnx"))
    assert [entry.name for entry in session.get_inputs()] == INPUTS


@pytest.fixture(scope="module")
def fuser(tmp_path_factory: pytest.TempPathFactory) -> tuple[AttentionFuser, onnxruntime.InferenceSession]:
    torch.manual_seed(0)
    model, path = AttentionFuser(D), tmp_path_factory.mktemp("onnx") / "fuser.onnx"
    export_fuser(model, path)
    return model, onnxruntime.InferenceSession(str(path))


@pytest.mark.parametrize("users", [1, 3, 1000])
@pytest.mark.parametrize("partitions", [0, 1, 40])
def test_the_exported_fuser_equals_pytorch(
    fuser: tuple[AttentionFuser, onnxruntime.InferenceSession], users: int, partitions: int
) -> None:
    model, session = fuser
    representations = torch.randn(users, partitions, D)
    mask = torch.arange(partitions) < torch.randint(partitions + 1, (users, 1))
    mask[0], mask[-1] = True, users == 1
    with torch.inference_mode():
        expected = model(representations, mask).numpy()
    found = run(session, [representations, mask])
    assert found.shape == (users, D)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_the_wire_contract_of_the_fuser(fuser: tuple[AttentionFuser, onnxruntime.InferenceSession]) -> None:
    _, session = fuser
    assert [(entry.name, entry.type, entry.shape) for entry in session.get_inputs()] == [
        ("representations", "tensor(float)", ["users", "partitions", D]),
        ("partition_mask", "tensor(bool)", ["users", "partitions"]),
    ]
    assert [(entry.name, entry.type, entry.shape) for entry in session.get_outputs()] == [
        ("interest", "tensor(float)", ["users", D])
    ]


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ConfigurationError, match=r"fuser.onnx differs from the trained model by"):
        export_fuser(AttentionFuser(D), tmp_path / "fuser.onnx")
