from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_harness import ITEMS, D, T, draw_inputs, make_features_module, unfold
from torch import Tensor, nn

from builders.models.dien import DIEN
from builders.models.features import Inputs


class Model(nn.Module):
    """Features, then DIEN; an interest is given, not fused."""

    def __init__(self, interest_size: int = D) -> None:
        super().__init__()
        self.features = make_features_module(interest_size=interest_size)
        self.backbone = DIEN(self.features.schema, hidden_size=16)
        self.eval()

    def forward(self, inputs: Inputs) -> Tensor:
        logits: Tensor = self.backbone(self.features(inputs))
        return logits

    def forward_with_auxiliary(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return self.backbone.forward_with_auxiliary(self.features(inputs))


def draw(model: Model, users: int, candidates: int | None, seed: int = 0) -> Inputs:
    return draw_inputs(model.features, users, candidates, seed=seed)


@pytest.mark.parametrize(("users", "candidates"), [(1, 1), (3, 50), (40, 200)])
def test_folded_equals_unfolded(users: int, candidates: int) -> None:
    model = Model()
    inputs = draw(model, users, candidates)
    repeated = unfold(inputs)
    with torch.inference_mode():
        folded = model(inputs)
        torch.testing.assert_close(folded, model(repeated), atol=1e-5, rtol=0)
        arange = torch.arange(candidates, dtype=torch.int32)
        torch.testing.assert_close(folded, model(repeated._replace(user_index=arange)), atol=1e-5, rtol=0)


@given(seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=25)
def test_padding_never_changes_a_result(seed: int) -> None:
    model = Model()
    inputs = draw(model, 5, 20, seed)
    padded = torch.arange(T) >= inputs.history_length[:, None]
    generator = torch.Generator().manual_seed(seed)
    garbage = torch.randint(1, ITEMS + 1, padded.shape, generator=generator, dtype=torch.int32)
    other = inputs._replace(
        history_item=inputs.history_item + garbage * padded, history_feedback=inputs.history_feedback + padded.int()
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(other), model(inputs), atol=1e-6, rtol=0)


def test_every_input_of_a_user_matters_to_that_user_alone() -> None:
    model = Model()
    inputs = draw(model, 3, 30)
    user = inputs.user_index
    inputs.history_length[:] = T
    with torch.inference_mode():
        expected = model(inputs)
        for name in ("history_item", "history_feedback", "profile", "interest"):
            changed = getattr(inputs, name).clone()
            changed[1] = 1 - changed[1].clamp(max=1)
            found = model(inputs._replace(**{name: changed}))
            assert (found != expected)[user == 1].all()
            torch.testing.assert_close(found[user != 1], expected[user != 1], atol=1e-6, rtol=0)


def test_without_liber_it_takes_no_interest() -> None:
    model = Model(interest_size=0)
    inputs = draw(model, 3, 5)
    assert model(inputs).shape == (5,)
    with pytest.raises(ValueError, match="interest of 0, but one is given"):
        model(inputs._replace(interest=torch.zeros(3, D)))


def test_the_auxiliary_loss_ignores_padding_and_reaches_the_extractor() -> None:
    model = Model()
    inputs = draw(model, 8, None)._replace(item_index=torch.ones(8, dtype=torch.int32))
    torch.manual_seed(3)
    logits, loss = model.forward_with_auxiliary(inputs)
    torch.testing.assert_close(logits, model(inputs))
    padded = (torch.arange(T) >= inputs.history_length[:, None]).int()
    assert padded.any()
    torch.manual_seed(3)
    _, same = model.forward_with_auxiliary(
        inputs._replace(history_item=inputs.history_item + padded, history_feedback=inputs.history_feedback + padded)
    )
    torch.testing.assert_close(same, loss)
    loss.backward()
    gradient = model.backbone.extractor.recurrent.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    short = inputs._replace(history_length=torch.ones_like(inputs.history_length))
    assert model.forward_with_auxiliary(short)[1] == 0
