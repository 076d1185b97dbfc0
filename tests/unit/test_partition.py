from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.partition import (
    AllOf,
    AnyOf,
    Count,
    InterestDrift,
    PartitionCondition,
    PreviousPartition,
    Streamed,
    TimeGap,
    TimeWindow,
    parse_condition,
    stream,
)

VECTORS = {f"i{number}": vector for number, vector in enumerate(np.eye(4, dtype=np.float32))}

seconds = st.one_of(st.integers(1, 10**9), st.floats(1e-3, 1e9))
leaves = st.one_of(st.builds(Count, st.integers(1, 60)), st.builds(TimeGap, seconds), st.builds(TimeWindow, seconds))
printable_conditions = st.recursive(
    leaves,
    lambda inner: st.lists(inner, min_size=1, max_size=3).flatmap(
        lambda parts: st.sampled_from([AnyOf(*parts), AllOf(*parts)])
    ),
    max_leaves=5,
)
small_leaves = st.one_of(
    st.builds(Count, st.integers(1, 6)),
    st.builds(TimeGap, st.integers(1, 20)),
    st.builds(TimeWindow, st.integers(1, 40)),
    st.builds(InterestDrift, st.just(VECTORS), st.floats(0.1, 1.5), st.integers(1, 4), st.integers(1, 6)),
)
conditions = st.one_of(
    small_leaves,
    st.lists(small_leaves, min_size=1, max_size=3).map(lambda parts: AnyOf(*parts)),
    st.lists(small_leaves, min_size=1, max_size=3).map(lambda parts: AllOf(*parts)),
)


def log(gaps: Sequence[int], items: Sequence[int] | None = None) -> list[Behavior]:
    times = itertools.accumulate(gaps)
    chosen = items or [0] * len(gaps)
    return [Behavior("u", f"i{item}", 3.0, float(time)) for time, item in zip(times, chosen, strict=True)]


logs = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=50).map(
    lambda pairs: log([gap for gap, _ in pairs], [item for _, item in pairs])
)


def oracle(condition: PartitionCondition, behaviors: Sequence[Behavior]) -> tuple[list[tuple[int, int]], int]:
    """Algorithm 1 over positions: [start, end) of every partition, and where the cache begins."""
    runs: list[tuple[int, int]] = []
    start = 0
    for arrived in range(1, len(behaviors) + 1):
        last = behaviors[slice(*runs[-1])] if runs else []
        cut = condition.boundary(behaviors[start:arrived], lambda last=last: last)  # type: ignore[misc]
        if cut:
            runs.append((start, start + cut))
            start += cut
    return runs, start


@given(conditions, logs)
def test_stream_is_algorithm_1(condition: PartitionCondition, behaviors: list[Behavior]) -> None:
    runs, cached = oracle(condition, behaviors)
    streamed = stream(condition, (), behaviors)
    assert streamed.partitions == tuple(tuple(behaviors[start:end]) for start, end in runs)
    assert streamed.cache == tuple(behaviors[cached:])


@given(conditions, logs)
def test_every_behavior_is_there_once_and_in_order(condition: PartitionCondition, behaviors: list[Behavior]) -> None:
    streamed = stream(condition, (), behaviors)
    assert [*itertools.chain(*streamed.partitions), *streamed.cache] == behaviors
    assert all(streamed.partitions)


@given(conditions, logs, st.lists(st.integers(0, 50), max_size=6))
def test_chunks_make_the_same_partitions(
    condition: PartitionCondition, behaviors: list[Behavior], cuts: list[int]
) -> None:
    partitions: list[tuple[Behavior, ...]] = []
    cache: tuple[Behavior, ...] = ()
    for begin, end in itertools.pairwise([0, *sorted(cuts), len(behaviors)]):
        last = partitions[-1] if partitions else ()
        streamed = stream(condition, cache, behaviors[begin:end], lambda last=last: last)  # type: ignore[misc]
        partitions.extend(streamed.partitions)
        cache = streamed.cache
    assert Streamed(tuple(partitions), cache) == stream(condition, (), behaviors)


def sizes(condition: PartitionCondition, behaviors: Sequence[Behavior]) -> tuple[list[int], int]:
    streamed = stream(condition, (), behaviors)
    return [len(run) for run in streamed.partitions], len(streamed.cache)


@given(st.integers(1, 30), st.integers(0, 100))
def test_count_cuts_runs_of_k(size: int, length: int) -> None:
    assert sizes(Count(size), log([1] * length)) == ([size] * (length // size), length % size)


def test_time_gap_leaves_the_behavior_after_the_gap_in_the_cache() -> None:
    assert sizes(TimeGap(10), log([0, 10, 11, 1, 1, 50])) == ([2, 3], 1)


def test_time_window_is_measured_from_the_first_behavior_of_the_cache() -> None:
    assert sizes(TimeWindow(10), log([0, 5, 5, 5, 5, 1])) == ([3], 3)


def test_any_of_cuts_at_the_earliest_boundary_and_all_of_waits_for_all() -> None:
    behaviors = log([0, 1, 1, 100, 1, 100])
    assert sizes(AnyOf(Count(4), TimeGap(10)), behaviors) == ([3, 2], 1)
    assert sizes(AllOf(Count(6), TimeGap(10)), behaviors) == ([5], 1)
    assert sizes(AllOf(Count(7), TimeGap(10)), behaviors) == ([], 6)


def test_interest_drift_cuts_when_the_interest_turns() -> None:
    condition = InterestDrift(VECTORS, distance=0.3, least=3, first=4)
    steady = [0, 0, 0, 0, *[0] * 8]
    assert sizes(condition, log([1] * 12, steady)) == ([4], 8)
    turning = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert sizes(condition, log([1] * 10, turning)) == ([4, 3], 3)
    gradual = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    # Cosine distance to the first partition: 4 old, n new behaviors -> 1 - 4 / sqrt(16 + n * n) > 0.3 at n = 5.
    assert sizes(condition, log([1] * 13, gradual)) == ([4, 9], 0)


def test_interest_drift_ignores_items_without_a_vector() -> None:
    condition = InterestDrift(VECTORS, distance=0.3, least=2, first=2)
    assert sizes(condition, log([1] * 6, [0, 0, 9, 9, 9, 9])) == ([2], 4)
    assert sizes(condition, log([1] * 5, [0, 0, 9, 9, 2])) == ([2, 3], 0)


@given(printable_conditions)
def test_a_condition_reads_back_as_it_prints(condition: PartitionCondition) -> None:
    assert parse_condition(str(condition)) == condition


@pytest.mark.parametrize(
    "text",
    [
        "",
        "count",
        "count()",
        "count(0)",
        "count(-1)",
        "count(2.5)",
        "count('x')",
        "count(1e999)",
        "count(20, 30)",
        "count(size=20)",
        "time_gap(0)",
        "time_gap(1e999)",
        "time_window(None)",
        "any_of()",
        "all_of(20)",
        "any_of(count(20)",
        "interest_drift(0.3)",
        "__import__('os')",
        "count(20); count(20)",
        "count(20)\x00",
        "any_of(" * 2000 + ")" * 2000,
    ],
)
def test_what_is_not_a_condition_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_condition(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_no_text_escapes_as_another_error(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_condition(f"nothing({text!r})")
    with pytest.raises(ConfigurationError):
        parse_condition(f"count(20) + {text!r}")


@pytest.mark.parametrize(("distance", "least", "first"), [(0.0, 5, 20), (2.1, 5, 20), (0.3, 0, 20), (0.3, 5, 0)])
def test_interest_drift_refuses_what_cannot_cut(distance: float, least: int, first: int) -> None:
    with pytest.raises(ConfigurationError, match="interest drift"):
        InterestDrift(VECTORS, distance, least, first)


@pytest.mark.parametrize("cut", [-1, 3])
def test_a_boundary_outside_the_cache_is_refused(cut: int) -> None:
    class Wild:
        def boundary(self, cache: Sequence[Behavior], previous: PreviousPartition) -> int:
            return cut

    with pytest.raises(ConfigurationError, match=f"cut {cut} behaviors of a cache of 1"):
        stream(Wild(), (), log([1]))
