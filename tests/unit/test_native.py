"""Each compiled kernel against the definition of its function, on every instruction set this processor has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_harness import every_target, needs_compiler
from torch import Tensor

from builders.models.functions import BODIES
from liber_runtime import native
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.native import Kernels, load_kernels
from liber_runtime.native.compile import library_path, targets

ITEMS, BUCKETS = 30, 6


pytestmark = needs_compiler


def draw(seed: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return (
        lambda *shape: torch.randn(shape, generator=generator),
        lambda high, *shape: torch.randint(high, shape, generator=generator, dtype=torch.int32),
    )


class Batch:
    """U users with histories of mixed lengths, N candidates."""

    def __init__(self, seed: int, users: int, rows: int, steps: int) -> None:
        normal, integers = draw(seed)
        self.length = integers(steps + 1, users)
        self.length[0] = steps
        self.item, self.user_index = integers(ITEMS, rows), integers(users, rows)
        self.history, self.given = integers(ITEMS, users, steps), integers(BUCKETS, users, steps)
        self.feedback = normal(users, steps)


def compare(
    target: str, threads: int, function: str, tensors: Sequence[Tensor], constants: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    arrays = [tensor.numpy() for tensor in tensors]
    kernel = load_kernels(target, threads).make(function, {place: arrays[place] for place in constants}, len(arrays))
    assert kernel is not None
    given = [np.zeros(0, np.float32) if place in constants else array for place, array in enumerate(arrays)]
    return kernel(given), BODIES[function](*tensors).numpy()


shapes = given(
    seed=st.integers(0, 2**20),
    users=st.integers(1, 20),
    rows=st.integers(1, 70),
    steps=st.integers(1, 40),
    threads=st.integers(1, 3),
)
some = settings(max_examples=12, deadline=None)


@every_target
@some
@shapes
def test_comparisons(target: str, seed: int, users: int, rows: int, steps: int, threads: int) -> None:
    batch, (normal, integers) = Batch(seed, users, rows, steps), draw(seed)
    width, kinds = int(integers(40, 1)) + 1, int(integers(3, 1)) + 1
    compared = (batch.item, batch.history, batch.length, batch.feedback, batch.user_index)
    found, expected = compare(target, threads, "SimilarFeedback", (normal(ITEMS, width), *compared), (0,))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4)
    unit = torch.nn.functional.normalize(normal(ITEMS, width), dim=1)
    unit[0] = 0
    found, expected = compare(target, threads, "AlikeFeedback", (unit, *compared, 12 * normal(kinds).abs()), (0, 6))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


@every_target
@some
@shapes
def test_what_is_made_of_histories(target: str, seed: int, users: int, rows: int, steps: int, threads: int) -> None:
    batch, (normal, integers) = Batch(seed, users, rows, steps), draw(seed)
    tables = (normal(ITEMS, rows), normal(BUCKETS, 5))
    histories = (batch.history, batch.given)
    found, expected = compare(
        target, threads, "PoolHistory", (*tables, *histories, batch.length, batch.feedback), (0, 1)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    size = int(integers(40, 1)) + 1
    layer = (normal(size, rows + 5), normal(size))
    found, expected = compare(target, threads, "MapHistory", (*tables, *histories, *layer), (0, 1, 4, 5))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    levels = (normal(ITEMS, 1), normal(BUCKETS, 1), torch.tensor(0.4))
    found, expected = compare(target, threads, "Residuals", (*levels, *histories, batch.length), (0, 1, 2))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@every_target
@some
@shapes
def test_folding_in(target: str, seed: int, users: int, rows: int, steps: int, threads: int) -> None:
    batch, (normal, integers) = Batch(seed, users, rows, steps), draw(seed)
    # As many unknowns as the iterations solve exactly; with more, both stop where rounding has led them.
    vectors = normal(ITEMS, int(integers(9, 1)) + 1)
    tensors = (vectors, batch.history, batch.length, batch.feedback, torch.tensor(3.0))
    found, expected = compare(target, threads, "FoldIn", tensors, (0, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@every_target
@some
@shapes
def test_recurrences_and_attention(target: str, seed: int, users: int, rows: int, steps: int, threads: int) -> None:
    batch, (normal, integers) = Batch(seed, users, rows, steps), draw(seed)
    hidden, units = int(integers(40, 1)) + 1, int(integers(40, 1)) + 1
    recurrent = normal(3 * hidden, hidden) * hidden**-0.5
    found, states = compare(target, threads, "GRU", (normal(steps, users, 3 * hidden), batch.length, recurrent), (2,))
    real = (torch.arange(steps)[:, None] < batch.length).numpy()
    np.testing.assert_allclose(found[real], states[real], rtol=0, atol=1e-5)
    assert not found[~real].any()

    scale = hidden**-0.5
    unit = (normal(units, hidden) * scale, normal(units), normal(units, hidden) * scale, normal(units, hidden) * scale)
    activation = (*unit, torch.tensor([0.2]), normal(1, units) * units**-0.5, normal(1))
    attended = (normal(rows, hidden), torch.from_numpy(states), batch.length, batch.user_index, *activation)
    layer = (normal(3 * hidden, hidden) * scale, normal(3 * hidden), recurrent)
    found, expected = compare(target, threads, "InterestEvolution", (*attended, *layer), range(4, 14))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for function in ("LocalActivation", "SoftmaxActivation"):
        found, expected = compare(target, threads, function, attended, range(4, 11))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@every_target
@some
@given(
    seed=st.integers(0, 2**20),
    users=st.integers(1, 9),
    rows=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    threads=st.integers(1, 3),
)
def test_an_mlp(target: str, seed: int, users: int, rows: int, sizes: list[int], threads: int) -> None:
    normal, integers = draw(seed)
    layers: list[Tensor] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [normal(outputs, inputs) * inputs**-0.5, normal(outputs), normal(1)]
    layers += [normal(1, sizes[-1]), normal(1)]
    tensors = (normal(rows, sizes[0]), normal(users, sizes[1]), integers(users, rows), *layers)
    found, expected = compare(target, threads, "FoldedMLP", tensors, range(3, len(tensors)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@every_target
def test_extreme_gates_saturate_and_stay_finite(target: str) -> None:
    inputs = torch.linspace(-1e4, 1e4, 20 * 3 * 8).view(20, 1, 24)
    found, expected = compare(
        target, 1, "GRU", (inputs, torch.tensor([20], dtype=torch.int32), torch.eye(8).repeat(3, 1)), (2,)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("place", "wrong"), [(1, ITEMS), (1, -1), (2, ITEMS), (2, -7), (5, 4), (5, -1)])
def test_an_index_that_points_outside_is_refused_and_nothing_is_read(place: int, wrong: int) -> None:
    batch = Batch(1, users=4, rows=5, steps=6)
    inputs = [np.zeros((ITEMS, 16), np.float32)]
    inputs += [each.numpy() for each in (batch.item, batch.history, batch.length, batch.feedback, batch.user_index)]
    kernel = load_kernels("auto", 1).make("SimilarFeedback", {0: inputs[0]}, len(inputs))
    kernel(inputs)
    inputs[place].flat[0] = wrong
    with pytest.raises(InvalidInputError, match="lies outside of the catalogue or of the request's users"):
        kernel(inputs)


def test_a_length_that_lies_is_bounded_by_the_history() -> None:
    batch = Batch(2, users=3, rows=5, steps=6)
    inputs = [np.ones((ITEMS, 16), np.float32)]
    inputs += [each.numpy() for each in (batch.item, batch.history, batch.length, batch.feedback, batch.user_index)]
    kernel = load_kernels("auto", 2).make("SimilarFeedback", {0: inputs[0]}, len(inputs))
    inputs[3][:] = (6, 0, 6)
    expected = kernel(inputs)
    inputs[3][:] = (2**30, -5, 7)
    np.testing.assert_array_equal(kernel(inputs), expected)


def test_a_large_catalogue_is_not_mapped_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = {0: np.zeros((9, 4), np.float32), 1: np.zeros((3, 2), np.float32)}
    constants |= {4: np.zeros((5, 6), np.float32), 5: np.zeros(5, np.float32)}
    kernels = load_kernels("auto", 1)
    assert kernels.make("MapHistory", constants, 6) is not None
    monkeypatch.setattr(native, "MAPPED_BYTES", 4 * 9 * 5 - 1)
    assert kernels.make("MapHistory", constants, 6) is None


def test_a_node_whose_weights_are_computed_has_no_kernel() -> None:
    kernels = load_kernels("auto", 1)
    assert kernels.make("GRU", {}, 3) is None
    assert kernels.make("SomethingElse", {0: np.zeros(1)}, 1) is None


def test_no_kernels_are_wanted_or_the_processor_has_not_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_kernels("none", 1) is None
    with pytest.raises(ConfigurationError, match=r"LIBER_KERNELS='z80': this processor .* set it to auto or none"):
        load_kernels("z80", 1)
    monkeypatch.setattr(native, "_processor_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(ConfigurationError, match=r"it lacks .*avx512f"):
        load_kernels("x86-64-v4", 1)
    fallback = load_kernels("auto", 1)
    assert fallback is not None
    assert fallback.target == targets()[-1], "the kernels that every processor of this kind runs"


def test_without_a_library_a_graph_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "library_path", lambda target: tmp_path / library_path(target).name)
    assert load_kernels("auto", 1) is None
    with pytest.raises(ConfigurationError, match=r"cannot be loaded .* compile them with"):
        Kernels(targets()[0], 1)
