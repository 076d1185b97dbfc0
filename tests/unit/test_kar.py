from __future__ import annotations

import pytest
import torch

from builders.models.kar import Experts, HybridExpertAdaptor
from builders.models.meeting import Meeting

USER_INDEX = torch.tensor([2, 0, 0, 1, 2])


@pytest.fixture
def adaptor() -> HybridExpertAdaptor:
    torch.manual_seed(0)
    return HybridExpertAdaptor(6, 4, hidden_size=8)


def test_it_is_a_meeting_of_two_fields_in_which_the_interest_is_not_alone(adaptor: HybridExpertAdaptor) -> None:
    assert isinstance(adaptor, Meeting)
    assert adaptor.fields == ("knowledge of the user", "knowledge of the item")
    assert not adaptor.reads_interest_alone
    assert adaptor(torch.randn(3, 6), torch.randn(5, 6), USER_INDEX).shape == (5, 2, 4)


def test_a_side_is_the_gated_sum_of_the_shared_and_its_own_experts(adaptor: HybridExpertAdaptor) -> None:
    user, item = torch.randn(3, 6), torch.randn(3, 6)
    fields = adaptor(user, item, None)
    sides = ((user, adaptor.user, adaptor.user_gate), (item, adaptor.item, adaptor.item_gate))
    for place, (knowledge, own, gate) in enumerate(sides):
        experts = [*adaptor.shared.experts, *own.experts]
        assert len(experts) == 2 + 5
        expected = torch.zeros(3, 4)
        for row in range(3):
            weights = torch.softmax(gate(knowledge[row]), dim=0)
            for weight, expert in zip(weights, experts, strict=True):
                expected[row] += weight * expert(knowledge[row])
        torch.testing.assert_close(fields[:, place], expected)


def test_a_user_is_adapted_once_for_all_candidates(adaptor: HybridExpertAdaptor) -> None:
    rows: list[int] = []

    def note(_: Experts, inputs: tuple[torch.Tensor]) -> None:
        rows.append(len(inputs[0]))

    adaptor.user.register_forward_pre_hook(note)
    user, item = torch.randn(3, 6), torch.randn(5, 6)
    folded = adaptor(user, item, USER_INDEX)
    assert rows == [3]
    torch.testing.assert_close(folded, adaptor(user[USER_INDEX], item, None))


def test_an_item_teaches_its_own_experts_and_the_shared_ones(adaptor: HybridExpertAdaptor) -> None:
    fields = adaptor(torch.randn(3, 6), torch.randn(3, 6), None)
    fields[:, 1].sum().backward()

    def learns(*modules: torch.nn.Module) -> list[bool]:
        weights = [weight for module in modules for weight in module.parameters()]
        return [weight.grad is not None and bool(weight.grad.any()) for weight in weights]

    assert not any(learns(adaptor.user, adaptor.user_gate))
    assert all(learns(adaptor.shared, adaptor.item, adaptor.item_gate))
