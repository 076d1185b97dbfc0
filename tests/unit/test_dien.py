from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders.models.backbone import ItemEmbedding, LiberModel
from builders.models.dien import DIEN
from builders.models.fuser import AttentionFuser
from liber_runtime.vocabulary import Field

T, D, ITEMS = 6, 4, 30
GENRES = Field(name="genres", kind="categories", values=("a", "b", "c"), width=2)
YEAR = Field(name="year", kind="number", boundaries=(1980.0, 1990.0))
AGE = Field(name="age", kind="number", boundaries=(20.0, 40.0))
SEX = Field(name="sex", kind="category", values=("F", "M"))
STARS = Field(name="stars", kind="number", boundaries=(1.5, 2.5, 3.5, 4.5))


def item_table() -> np.ndarray:
    generator = np.random.default_rng(0)
    columns = [np.arange(ITEMS + 1), *(generator.integers(0, 4, ITEMS + 1) for _ in range(3))]
    table = np.stack(columns, axis=1).astype(np.int32)
    table[0] = 0
    return table


def make(interest_size: int = D) -> DIEN:
    torch.manual_seed(0)
    model = DIEN(
        item_table(), (YEAR, GENRES), (AGE, SEX), STARS, history_size=T, interest_size=interest_size, hidden_size=16
    )
    # Large embeddings: initial weights are so small that a wrong gather would hide below the tolerance.
    for name, parameter in model.named_parameters():
        if "table" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def draw(users: int, candidates: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    length = integers(T + 1, users)
    length[0], length[-1] = T, 0
    real = torch.arange(T) < length[:, None]
    return [
        integers(ITEMS + 1, candidates),
        integers(users, candidates),
        integers(ITEMS + 1, users, T) * real,
        integers(STARS.size, users, T) * real,
        length,
        torch.stack((integers(AGE.size, users), integers(SEX.size, users)), dim=1),
        torch.randn(users, D, generator=generator),
    ]


@pytest.mark.parametrize(("users", "candidates"), [(1, 1), (3, 50), (40, 200)])
def test_folded_equals_unfolded(users: int, candidates: int) -> None:
    model, (item, user, *rest) = make(), draw(users, candidates)
    with torch.inference_mode():
        folded = model(item, user, *rest)
        repeated = [part[user.long()] for part in rest]
        torch.testing.assert_close(folded, model(item, None, *repeated), atol=1e-5, rtol=0)
        arange = torch.arange(candidates, dtype=torch.int32)
        torch.testing.assert_close(folded, model(item, arange, *repeated), atol=1e-5, rtol=0)


@given(seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=25)
def test_padding_never_changes_a_result(seed: int) -> None:
    model, (item, user, history, feedback, length, profile, interest) = make(), draw(5, 20, seed)
    padded = torch.arange(T) >= length[:, None]
    generator = torch.Generator().manual_seed(seed)
    garbage = torch.randint(1, ITEMS + 1, history.shape, generator=generator, dtype=torch.int32)
    with torch.inference_mode():
        expected = model(item, user, history, feedback, length, profile, interest)
        found = model(item, user, history + garbage * padded, feedback + padded.int(), length, profile, interest)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_every_input_of_a_user_matters_to_that_user_alone() -> None:
    model, inputs = make(), draw(3, 30)
    _item, user, _history, _feedback, length, _profile, _interest = inputs
    length[:] = T
    with torch.inference_mode():
        expected = model(*inputs)
        for position in (2, 3, 5, 6):
            changed = [part.clone() for part in inputs]
            changed[position][1] = 1 - changed[position][1].clamp(max=1)
            found = model(*changed)
            assert (found != expected)[user == 1].all()
            torch.testing.assert_close(found[user != 1], expected[user != 1], atol=1e-6, rtol=0)


def test_without_liber_it_takes_no_interest() -> None:
    model, inputs = make(interest_size=0), draw(3, 5)
    assert model(*inputs[:-1]).shape == (5,)
    with pytest.raises(RuntimeError):
        model(*inputs)


def test_the_auxiliary_loss_ignores_padding_and_reaches_the_extractor() -> None:
    model, (_, _, *rest) = make(), draw(8, 8)
    item = torch.ones(8, dtype=torch.int32)
    torch.manual_seed(3)
    logits, loss = model.forward_with_auxiliary(item, None, *rest)
    torch.testing.assert_close(logits, model(item, None, *rest))
    history, feedback, length = rest[:3]
    padded = (torch.arange(T) >= length[:, None]).int()
    torch.manual_seed(3)
    _, same = model.forward_with_auxiliary(item, None, history + padded, feedback + padded, *rest[2:])
    torch.testing.assert_close(same, loss)
    loss.backward()
    gradient = model.extractor.recurrent.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    rest[2] = torch.ones_like(length)
    assert model.forward_with_auxiliary(item, None, *rest)[1] == 0


def test_items_embed_alike_one_by_one_and_in_bulk() -> None:
    torch.manual_seed(0)
    layer = ItemEmbedding(item_table(), (YEAR, GENRES), embedding_dim=4).eval()
    index = torch.arange(ITEMS + 1, dtype=torch.int32).repeat(3)
    bulk = layer(index)
    torch.testing.assert_close(bulk, torch.cat([layer(each) for each in index.split(1)]))
    torch.testing.assert_close(bulk[: ITEMS + 1], layer.catalogue())


def test_dropped_ids_become_the_out_of_vocabulary_row() -> None:
    table = item_table()[:, :1]
    layer = ItemEmbedding(table, (), embedding_dim=4, id_dropout=1.0)
    index = torch.tensor([5, 9])
    assert not torch.equal(layer.eval()(index)[0], layer(index)[1])
    dropped = layer.train()(index)
    torch.testing.assert_close(dropped, layer.id.table.weight[[0, 0]])


def test_a_table_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="3 columns; 1 \\+ 3"):
        ItemEmbedding(item_table()[:, :3], (YEAR, GENRES), embedding_dim=4)


def test_fuser_and_backbone_must_agree_on_the_size() -> None:
    with pytest.raises(ValueError, match="interest of 4, the fuser gives 5"):
        LiberModel(AttentionFuser(5), make())


def test_the_liber_model_is_the_fuser_then_the_backbone() -> None:
    backbone, (*inputs, _) = make(), draw(3, 9)
    model = LiberModel(AttentionFuser(D), backbone).eval()
    representations, mask = torch.randn(3, 2, D), torch.tensor([[True, True], [True, False], [False, False]])
    expected = backbone(*inputs, model.fuser(representations, mask))
    torch.testing.assert_close(model(representations, mask, *inputs), expected)
    torch.testing.assert_close(model.forward_with_auxiliary(representations, mask, *inputs)[0], expected)
