from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.models.fuser import AttentionFuser

SIZE = 8


@pytest.fixture
def fuser() -> AttentionFuser:
    torch.manual_seed(0)
    return AttentionFuser(SIZE)


def test_it_computes_equation_6(fuser: AttentionFuser) -> None:
    r = torch.randn(4, SIZE)
    attention = torch.softmax(fuser.query(r) @ fuser.key(r).T / SIZE**0.5, dim=1)
    expected = (attention @ fuser.value(r)).mean(0)
    found = fuser(r[None], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


@given(count=st.integers(0, 6), padding=st.integers(0, 5), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_padding_changes_nothing(count: int, padding: int, seed: int) -> None:
    torch.manual_seed(seed)
    fuser = AttentionFuser(SIZE)
    representations = torch.randn(2, count + padding, SIZE) * 10
    mask = (torch.arange(count + padding) < count).expand(2, -1)
    found = fuser(representations, mask)
    expected = fuser(representations[:, :count], mask[:, :count])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = fuser.weights(representations, mask)
    assert not weights[:, count:].any()
    torch.testing.assert_close(weights.sum(1), torch.full((2,), float(count > 0)))


@given(order=st.permutations(range(5)))
@settings(deadline=None)
def test_the_interest_does_not_depend_on_the_order_of_partitions(order: list[int]) -> None:
    torch.manual_seed(1)
    fuser, representations = AttentionFuser(SIZE), torch.randn(1, 5, SIZE)
    mask = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(
        fuser(representations[:, order], mask), fuser(representations, mask), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        fuser.weights(representations[:, order], mask), fuser.weights(representations, mask)[:, order]
    )


def test_users_do_not_see_each_other(fuser: AttentionFuser) -> None:
    representations, mask = torch.randn(3, 4, SIZE), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    together = fuser(representations, mask)
    for user in range(3):
        alone = fuser(representations[user : user + 1], mask[user : user + 1])
        torch.testing.assert_close(together[user : user + 1], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together[1], fuser.value(representations[1, 0]), atol=1e-6, rtol=0)
    assert not together[2].any()


def test_gradients_stay_finite_for_users_without_partitions(fuser: AttentionFuser) -> None:
    representations = torch.randn(2, 3, SIZE, requires_grad=True)
    fuser(representations, torch.tensor([[True, True, False], [False, False, False]])).sum().backward()
    assert representations.grad is not None
    assert representations.grad.isfinite().all()
    assert not representations.grad[1].any()
