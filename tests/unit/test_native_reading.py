"""The kernels around a ranker, of a fuser and of ids, on every instruction set, against what they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_harness import every_target, needs_compiler

from builders.models.functions import BODIES
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.native import load_kernels
from liber_runtime.vocabulary import Field

pytestmark = needs_compiler
some = settings(max_examples=25, deadline=None)
IDS = st.text(st.sampled_from("ab1-é映 "), max_size=20)


@every_target
@some
@given(
    seed=st.integers(0, 2**20),
    counts=st.lists(st.integers(0, 45), min_size=1, max_size=70),
    size=st.integers(1, 50),
    threads=st.integers(1, 3),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_partitions_are_fused_as_defined(
    target: str, seed: int, counts: Sequence[int], size: int, threads: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = torch.tensor(counts, dtype=torch.int32)
    partitions = torch.randn(int(count.sum()) + 1, size, generator=generator)
    scores = scale * torch.randn(size, size, generator=generator) / size
    value = torch.randn(size, size, generator=generator) / size**0.5
    kernels = load_kernels(target, threads)
    assert kernels is not None
    kernel = kernels.make("FusePartitions", {2: scores.numpy(), 3: value.numpy()}, 4)
    assert kernel is not None
    expected = BODIES["FusePartitions"](partitions.double(), count, scores.double(), value.double()).numpy()
    np.testing.assert_allclose(kernel([partitions.numpy(), count.numpy()]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("counts", [[3, 3], [-1, 2], [2**31 - 1, 2**31 - 1]])
def test_counts_of_more_partitions_than_there_are_are_refused(counts: list[int]) -> None:
    kernels = load_kernels("auto", 1)
    assert kernels is not None
    kernel = kernels.make("FusePartitions", {2: np.eye(4, dtype=np.float32), 3: np.eye(4, dtype=np.float32)}, 4)
    assert kernel is not None
    with pytest.raises(InvalidInputError):
        kernel([np.zeros((5, 4), np.float32), np.array(counts, np.int32)])


@every_target
@some
@given(
    catalogue=st.lists(IDS.filter(bool), max_size=60),
    histories=st.lists(st.lists(IDS, max_size=12), min_size=1, max_size=9),
    skipped=st.integers(0, 5),
)
def test_ids_have_the_numbers_that_a_dictionary_gives_them(
    target: str, catalogue: list[str], histories: list[list[str]], skipped: int
) -> None:
    """Half of what is looked up is in the catalogue, which may name an item twice."""
    histories = [
        [catalogue[len(item) % len(catalogue)] if catalogue and place % 2 else item for place, item in enumerate(ids)]
        for ids in histories
    ]
    numbers = {item: number for number, item in enumerate(catalogue, 1)}
    skip = [min(skipped, len(ids)) for ids in histories]
    expected = np.zeros((len(histories), 12), np.int32)
    for row, (ids, left) in enumerate(zip(histories, skip, strict=True)):
        expected[row, : len(ids) - left] = [numbers.get(item, 0) for item in ids[left:]]
    kernels = load_kernels(target, 1)
    assert kernels is not None
    joined = "\n".join(item for ids in histories for item in ids).encode()
    held = np.array([len(ids) for ids in histories], np.int32)
    found = kernels.index(catalogue).find(joined, held, np.array(skip, np.int32), 12)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("held", "steps"), [([3], 5), ([1], 5), ([2], 1)])
def test_ids_that_are_more_or_fewer_than_is_said_are_refused(held: list[int], steps: int) -> None:
    kernels = load_kernels("auto", 1)
    assert kernels is not None
    with pytest.raises(InvalidInputError):
        kernels.index(["a"]).find(b"a\nb", np.array(held, np.int32), np.zeros(1, np.int32), steps)


@every_target
def test_feedback_has_the_buckets_of_the_vocabulary(target: str) -> None:
    boundaries = (-1.0, 0.0, 0.5, 2.5)
    values = np.array([-2, -1, -0.5, 0, 0.49, 0.5, 2.5, 9], "<f8")
    field = Field(name="feedback", kind="number", boundaries=boundaries)
    kernels = load_kernels(target, 1)
    assert kernels is not None
    held, skipped = np.array([3, 0, 5], np.int32), np.array([1, 0, 2], np.int32)
    levels = kernels.levels(values.tobytes(), held, skipped, boundaries, 4)
    kept = [values[1:3], [], values[5:8]]
    expected = [[*(field.indices(float(value))[0] for value in each), 0, 0, 0, 0][:4] for each in kept]
    assert levels.tolist() == expected
