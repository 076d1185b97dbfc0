from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders.models import functions
from builders.models.layers import (
    AUGRU,
    GRU,
    MLP,
    BilinearInteraction,
    CompressedInteraction,
    FactorizationMachine,
    FieldEmbedding,
    FoldedLinear,
    FoldedMLP,
    InterestAttention,
    gather_users,
    masked_softmax,
    newest_steps,
    sequence_mask,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def naive_augru(layer: AUGRU, inputs: Tensor, attention: Tensor) -> Tensor:
    """Eq. 2-5 and 9-10 of DIEN written out, one row and one gate at a time."""
    size = layer.hidden_size
    w_u, w_r = layer.gates_input.weight.split(size)
    b_u, b_r = layer.gates_input.bias.split(size)
    u_u, u_r, u_h = layer.recurrent.weight.split(size)
    finals = []
    for row in range(inputs.shape[1]):
        h = torch.zeros(size)
        for t in range(inputs.shape[0]):
            i = inputs[t, row]
            u = torch.sigmoid(w_u @ i + u_u @ h + b_u) * attention[t, row]
            r = torch.sigmoid(w_r @ i + u_r @ h + b_r)
            candidate = torch.tanh(layer.candidate_input.weight @ i + r * (u_h @ h) + layer.candidate_input.bias)
            h = (1 - u) * h + u * candidate
        finals.append(h)
    return torch.stack(finals)


def test_augru_equals_the_naive_loop() -> None:
    layer, inputs, attention = AUGRU(5, 7), torch.randn(6, 4, 5), torch.rand(6, 4)
    torch.testing.assert_close(layer(inputs, attention), naive_augru(layer, inputs, attention), atol=1e-6, rtol=0)


def test_gru_is_an_augru_with_full_attention() -> None:
    gru, augru, inputs = GRU(5, 7), AUGRU(5, 7), torch.randn(6, 4, 5)
    augru.load_state_dict(gru.state_dict())
    states = gru(inputs, torch.full((4,), 6))
    assert states.shape == (6, 4, 7)
    for length in range(1, 7):
        expected = naive_augru(augru, inputs[:length], torch.ones(length, 4))
        torch.testing.assert_close(states[length - 1], expected, atol=1e-6, rtol=0)


@given(length=st.integers(0, 6), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=25)
def test_served_without_attention_leave_the_augru_as_it_is(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer, inputs, attention = AUGRU(3, 4), torch.randn(6, 2, 3), torch.rand(6, 2)
    attention[length:] = 0
    final = layer(inputs, attention)
    # Exactly, whatever comes after. A product of other shape may round otherwise, so the shape stays.
    other = torch.cat([inputs[:length], torch.randn(6 - length, 2, 3)])
    torch.testing.assert_close(final, layer(other, attention), atol=0, rtol=0)
    expected = layer(inputs[:length], attention[:length]) if length else torch.zeros(2, 4)
    torch.testing.assert_close(final, expected, atol=1e-7 if length else 0, rtol=0)


def test_a_folded_augru_equals_an_unfolded_one() -> None:
    layer, inputs, attention = AUGRU(5, 7), torch.randn(6, 3, 5), torch.rand(6, 8)
    user_index = torch.tensor([0, 2, 2, 1, 0, 0, 1, 2], dtype=torch.int32)
    torch.testing.assert_close(
        layer(inputs, attention, user_index), layer(inputs[:, user_index.long()], attention), atol=1e-6, rtol=0
    )


def test_split_attention_equals_the_concatenated_form() -> None:
    size, hidden = 6, 5
    concatenated = torch.nn.Linear(4 * size, hidden)
    w_q, w_k, w_d, w_p = concatenated.weight.detach().split(size, dim=1)
    layer = InterestAttention(size, hidden)
    with torch.no_grad():
        layer.query.weight.copy_(w_q + w_d)
        layer.query.bias.copy_(concatenated.bias)
        layer.key.weight.copy_(w_k - w_d)
        layer.product.weight.copy_(w_p)
    query, keys = torch.randn(9, size), torch.randn(4, 3, size)
    user_index = torch.arange(9) % 3
    q, k = query.expand(4, 9, size), keys[:, user_index]
    expected = layer.score(layer.activation(concatenated(torch.cat((q, k, q - k, q * k), dim=-1)))).squeeze(-1)
    torch.testing.assert_close(layer(query, keys, user_index), expected, atol=1e-6, rtol=0)


def test_the_mlp_reads_both_halves_as_one_layer() -> None:
    layer = FoldedMLP(3, 4, [6, 5], dropout=0.5).eval()
    user, candidate, user_index = torch.randn(2, 3), torch.randn(7, 4), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    weight = torch.cat((layer.user.weight, layer.candidate.weight), dim=1)
    hidden = torch.cat((user[user_index], candidate), dim=1) @ weight.T + layer.candidate.bias
    torch.testing.assert_close(layer(user, candidate, user_index), layer.rest(hidden).squeeze(-1), atol=1e-6, rtol=0)


def test_a_folded_linear_map_is_one_linear_map() -> None:
    layer = FoldedLinear(3, 4, 2)
    user, candidate, user_index = torch.randn(2, 3), torch.randn(7, 4), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    weight = torch.cat((layer.user.weight, layer.candidate.weight), dim=1)
    expected = torch.cat((user[user_index], candidate), dim=1) @ weight.T + layer.candidate.bias
    torch.testing.assert_close(layer(user, candidate, user_index), expected, atol=1e-6, rtol=0)


def test_an_mlp_is_a_folded_one_without_a_user() -> None:
    layer, folded, rows = (
        MLP(4, [6, 5], dropout=0.5).eval(),
        FoldedMLP(3, 4, [6, 5], dropout=0.5).eval(),
        torch.randn(7, 4),
    )
    folded.candidate.load_state_dict(layer.first.state_dict())
    folded.rest.load_state_dict(layer.rest.state_dict())
    torch.testing.assert_close(layer(rows), folded(torch.zeros(7, 3), rows), atol=1e-6, rtol=0)


@pytest.mark.parametrize("softmax", [False, True])
def test_attention_pools_the_real_steps_of_each_candidates_user(softmax: bool) -> None:
    unit, query, steps, length = (
        InterestAttention(5, 3),
        torch.randn(7, 5),
        torch.randn(4, 3, 5),
        torch.tensor([4, 2, 0]),
    )
    user_index = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    found = functions.local_activation(query, steps, length, user_index, *unit.weights(), softmax=softmax)
    scores = unit(query, steps, user_index)
    for row, user in enumerate(user_index.tolist()):
        weights = scores[: length[user], row]
        weights = weights.softmax(0) if softmax else weights
        torch.testing.assert_close(found[row], weights @ steps[: length[user], user], atol=1e-6, rtol=0)


def test_a_factorization_machine_sums_the_products_of_all_pairs() -> None:
    fields = torch.randn(5, 4, 3)
    expected = sum((fields[:, i] * fields[:, j]).sum(1) for i, j in itertools.combinations(range(4), 2))
    torch.testing.assert_close(FactorizationMachine()(fields), expected, atol=1e-5, rtol=0)


def test_the_cin_equals_its_equations() -> None:
    """Eq. 6 of xDeepFM written out: every map is made, then summed."""
    layer, fields = CompressedInteraction(4, (6, 4, 3)), torch.randn(5, 4, 3)
    maps, read = fields, []
    for weight, kept in zip(layer.weights, (3, 2, 0), strict=True):
        cross = torch.einsum("hij,nie,nje->nhe", weight.unflatten(1, (-1, 4)), maps, fields)
        maps, direct = cross[:, :kept], cross[:, kept:]
        read.append(direct.sum(2))
    torch.testing.assert_close(layer(fields), torch.cat(read, dim=1), atol=1e-5, rtol=0)
    assert layer.output_size == 3 + 2 + 3


@pytest.mark.parametrize("sizes", [(), (5, 4)])
def test_a_cin_that_cannot_be_halved_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sizes of the CIN are \[.*at least one, and even but for the last"):
        CompressedInteraction(4, sizes)


def test_an_unknown_kind_of_bilinear_interaction_is_refused() -> None:
    with pytest.raises(ValueError, match="'interaction'; there are 'all' and 'each'"):
        BilinearInteraction(4, 3, "interaction")


def test_a_multi_valued_field_is_the_mean_of_its_known_values() -> None:
    layer = FieldEmbedding(5, 4, width=3)
    rows = layer(torch.tensor([[2, 4, 0], [3, 0, 0], [0, 0, 0]]))
    table = layer.table.weight
    torch.testing.assert_close(rows, torch.stack(((table[2] + table[4]) / 2, table[3], torch.zeros(4))))
    rows.sum().backward()
    assert layer.table.weight.grad is not None
    assert not layer.table.weight.grad[0].any()


def test_a_single_valued_field_learns_a_row_for_unknown_values() -> None:
    layer = FieldEmbedding(5, 4)
    layer(torch.tensor([[0], [3]])).sum().backward()
    assert layer.table.weight.grad is not None
    assert layer.table.weight.grad[0].all()


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_masked_softmax_sums_to_one_over_the_valid_entries(lengths: list[int]) -> None:
    length = torch.tensor(lengths, dtype=torch.int32)
    mask = sequence_mask(length, 5)
    assert mask.sum(0).tolist() == lengths
    weights = masked_softmax(torch.randn(5, len(lengths)) * 100, mask, dim=0)
    torch.testing.assert_close(weights.sum(0), (length > 0).float())
    assert not weights[~mask].any()


def test_gathering_nothing_copies_nothing() -> None:
    rows = torch.randn(3, 2)
    assert gather_users(rows, None) is rows
    torch.testing.assert_close(gather_users(rows, torch.tensor([2, 2])), rows[[2, 2]])


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), longest=st.integers(9, 12), steps=st.integers(1, 14)
)
@settings(deadline=None, max_examples=100)
def test_the_newest_steps_of_every_row_are_kept(lengths: list[int], longest: int, steps: int) -> None:
    length = torch.tensor(lengths, dtype=torch.int32)
    # Whatever stands in the padding: it must not come back among what is kept.
    rows = torch.arange(1, len(lengths) * longest + 1, dtype=torch.int32).view(len(lengths), longest)
    padded = rows * (torch.arange(longest) < length[:, None])
    found = newest_steps(padded, length, steps)
    assert found.dtype == torch.int32
    if steps >= longest:
        assert found is padded
        return
    torch.testing.assert_close(newest_steps(rows, length, steps), found)
    for row, real, kept in zip(rows.tolist(), lengths, found.tolist(), strict=True):
        newest = row[max(real - steps, 0) : real]
        assert kept == newest + [0] * (steps - len(newest))
