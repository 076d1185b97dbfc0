from __future__ import annotations

import os
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from builders.datasets import Dataset, load, sample
from builders.replay import Samples, calls_per_user, replay, split
from liber_runtime.behavior import Behavior, Item
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.partition import AllOf, AnyOf, Count, PartitionCondition, TimeGap, TimeWindow, stream
from liber_runtime.vocabulary import Field, Vocabulary

LIBER_DATA = os.environ.get("LIBER_DATA", "")
needs_movielens = pytest.mark.skipif(not LIBER_DATA, reason="LIBER_DATA does not name a MovieLens-100K directory")

VOCABULARY = Vocabulary(
    items=("i0", "i1", "i2", "i3"),  # i4 is unknown to it
    user_fields=(),
    item_fields=(),
    feedback=Field(name="feedback", kind="number", boundaries=(1.5, 2.5, 3.5, 4.5)),
)
CATALOGUE = {f"i{number}": Item(f"i{number}", f"Item {number}") for number in range(3)}


def dataset_of(events: list[tuple[int, int, int, int]]) -> Dataset:
    behaviors = [
        Behavior(f"u{user}", f"i{item}", stars, time, f"e{n}") for n, (user, item, stars, time) in enumerate(events)
    ]
    return Dataset(sample.DOMAIN, behaviors, CATALOGUE, {})


datasets = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 5), st.integers(0, 200)), min_size=1, max_size=80
).map(dataset_of)
leaves = st.one_of(
    st.builds(Count, st.integers(1, 6)),
    st.builds(TimeGap, st.integers(1, 20)),
    st.builds(TimeWindow, st.integers(1, 60)),
)
conditions = st.one_of(leaves, st.builds(AnyOf, leaves, leaves), st.builds(AllOf, leaves, leaves))


def replayed(dataset: Dataset, condition: PartitionCondition, minimum: int) -> Samples:
    counts: dict[str, int] = {}
    for behavior in dataset.behaviors:
        counts[behavior.user_id] = counts.get(behavior.user_id, 0) + 1
    assume(max(counts.values()) > minimum)
    return replay(dataset, condition, minimum)


def earlier(dataset: Dataset, samples: Samples, row: int) -> list[Behavior]:
    """What the user of a sample did before it, straight from the log."""
    user = samples.user_ids[samples.user[row]]
    return [each for each in dataset.behaviors[: samples.behavior[row]] if each.user_id == user]


@given(datasets, conditions, st.integers(0, 8))
def test_there_is_one_sample_per_behavior_with_enough_before_it(
    dataset: Dataset, condition: PartitionCondition, minimum: int
) -> None:
    samples = replayed(dataset, condition, minimum)
    expected = [
        row
        for row, behavior in enumerate(dataset.behaviors)
        if sum(each.user_id == behavior.user_id for each in dataset.behaviors[:row]) >= minimum
    ]
    assert samples.behavior.tolist() == expected
    assert np.all(np.diff(samples.timestamp) >= 0)
    for row, place in enumerate(expected):
        behavior = dataset.behaviors[place]
        assert samples.user_ids[samples.user[row]] == behavior.user_id
        assert samples.item_ids[samples.item[row]] == behavior.item_id
        assert samples.label[row] == (behavior.feedback > 3)
        assert samples.timestamp[row] == behavior.timestamp


@given(datasets, conditions, st.integers(0, 8))
def test_a_sample_sees_its_users_earlier_behaviors_and_nothing_else(
    dataset: Dataset, condition: PartitionCondition, minimum: int
) -> None:
    samples = replayed(dataset, condition, minimum)
    for row in range(len(samples)):
        begin = samples.offsets[samples.user[row]]
        history = slice(begin, begin + samples.position[row])
        expected = earlier(dataset, samples, row)
        assert [dataset.behaviors[each] for each in samples.sequence_behavior[history]] == expected
        assert [samples.item_ids[each] for each in samples.sequence_item[history]] == [
            each.item_id for each in expected
        ]
        assert samples.sequence_feedback[history].tolist() == [each.feedback for each in expected]


@given(datasets, conditions, st.integers(0, 8))
def test_a_sample_sees_the_partitions_that_a_store_would_have_then(
    dataset: Dataset, condition: PartitionCondition, minimum: int
) -> None:
    samples = replayed(dataset, condition, minimum)
    boundaries = samples.boundaries
    for row in range(len(samples)):
        user = samples.user[row]
        expected = stream(condition, (), earlier(dataset, samples, row)).partitions
        assert samples.partitions[row] == len(expected)
        first = boundaries.offsets[user]
        rows = range(first, first + len(expected))
        assert boundaries.user[rows].tolist() == [user] * len(expected)
        assert boundaries.number[rows].tolist() == list(range(1, len(expected) + 1))
        begin = samples.offsets[user]
        for place, run in zip(rows, expected, strict=True):
            members = samples.sequence_behavior[begin + boundaries.start[place] : begin + boundaries.end[place]]
            assert tuple(dataset.behaviors[each] for each in members) == run
        of_user = boundaries.user == user
        assert int((samples.partitions_before(row) & of_user).sum()) == len(expected)


@given(datasets, conditions, st.integers(0, 8), st.integers(1, 12))
def test_history_batches_hold_the_newest_behaviors_oldest_first(
    dataset: Dataset, condition: PartitionCondition, minimum: int, length: int
) -> None:
    samples = replayed(dataset, condition, minimum)
    indexed = samples.in_vocabulary(VOCABULARY)
    rows = np.arange(len(samples), dtype=np.int64)[::-1]
    batch = indexed.history(rows, length)
    assert batch.item.dtype == batch.feedback.dtype == batch.length.dtype == np.int32
    assert batch.item.shape == batch.feedback.shape == (len(samples), length)
    for place, row in enumerate(rows):
        seen = earlier(dataset, samples, int(row))[-length:]
        padding = [0] * (length - len(seen))
        items = VOCABULARY.item_indices([each.item_id for each in seen]).tolist()
        assert batch.length[place] == len(seen)
        assert batch.item[place].tolist() == items + padding
        assert batch.feedback[place].tolist() == [int(each.feedback) for each in seen] + padding
    assert indexed.item.tolist() == VOCABULARY.item_indices([samples.item_ids[each] for each in samples.item]).tolist()


def test_a_partition_under_a_time_condition_is_complete_when_the_next_behavior_arrives() -> None:
    dataset = dataset_of([(0, 0, 5, 0), (0, 1, 1, 1), (0, 2, 5, 100), (0, 3, 1, 101)])
    samples = replay(dataset, TimeGap(10), minimum=0)
    assert samples.boundaries.end.tolist() == [2]
    assert samples.boundaries.completed.tolist() == [2]
    assert samples.partitions.tolist() == [0, 0, 0, 1]


def test_split_is_by_global_time_and_disjoint() -> None:
    samples = replay(dataset_of([(n % 2, n % 4, 1 + 4 * (n // 2 % 2), n) for n in range(300)]), Count(20))
    parts = split(samples)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (210, 24, 26)
    everything = np.concatenate([parts.train, parts.validation, parts.test])
    assert everything.tolist() == list(range(260))
    assert np.array_equal(parts.training_part, everything[:234])
    before_test = samples.partitions_before(int(parts.test[0]))
    assert before_test.sum() == 12


def test_no_eligible_user_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"no user has more than 20 behaviors \(the most is 3\)"):
        replay(dataset_of([(0, 0, 5, 0), (0, 1, 1, 1), (0, 2, 1, 2), (1, 2, 1, 2)]), Count(20))
    with pytest.raises(InvalidInputError, match="the most is 0"):
        replay(dataset_of([]), Count(20))


@pytest.mark.parametrize(
    ("count", "alike", "named"),
    [
        (500, range(405), "the train part of 500 samples has 405 of label 1 and 0 of label 0, and needs 10 of each"),
        (500, range(405, 450), "the validation part of 500 samples has 45 of label 1 and 0 of label 0"),
        (500, range(450, 500), "the test part of 500 samples has 50 of label 1 and 0 of label 0"),
        (500, range(414, 450), "the validation part of 500 samples has 41 of label 1 and 4 of label 0"),
        (30, (), "the validation part of 30 samples has 1 of label 1 and 2 of label 0"),
        (5, (), "the train part of 5 samples has 1 of label 1 and 2 of label 0"),
    ],
)
def test_parts_with_too_few_of_a_label_are_named(count: int, alike: Collection[int], named: str) -> None:
    events = [(0, 0, 5 if n in alike else 1 + 4 * (n % 2), n) for n in range(count)]
    samples = replay(dataset_of(events), Count(5), minimum=0)
    with pytest.raises(InvalidInputError, match=f"{named}.*bring a longer log"):
        split(samples)


def test_users_without_a_sample_are_kept_and_change_nothing() -> None:
    events = [(n % 2, n % 4, 1 + 4 * (n // 2 % 2), n) for n in range(300)]
    without, with_them = replay(dataset_of(events), Count(20)), replay(dataset_of([*events, (7, 1, 5, 150)]), Count(20))
    assert len(with_them) == len(without)
    assert with_them.user_ids == (*without.user_ids, "u7")
    assert with_them.label.tolist() == without.label.tolist()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fractions_outside_0_to_1_are_named(fraction: float) -> None:
    samples = replay(dataset_of([(0, 0, 1 + 4 * (n % 2), n) for n in range(50)]), Count(5), minimum=0)
    with pytest.raises(InvalidInputError, match="test_fraction"):
        split(samples, test_fraction=fraction)
    with pytest.raises(InvalidInputError, match="validation_fraction"):
        split(samples, validation_fraction=fraction)


def test_a_condition_that_cuts_outside_the_cache_is_named() -> None:
    class Wild:
        def boundary(self, *_: object) -> int:
            return 99

        def __str__(self) -> str:
            return "wild()"

    with pytest.raises(ConfigurationError, match=r"wild\(\) cut 99 behaviors"):
        replay(dataset_of([(0, 0, 5, 0)]), Wild())


def test_calls_per_user_counts_summaries_and_shifts_before_the_last_behavior() -> None:
    # u0: 41 behaviors -> 2 partitions before the last -> 2 + 1 calls. u1: 40 -> 1 before the last -> 1 + 0. u2: none.
    events = [(0, 0, 5, n) for n in range(41)] + [(1, 0, 5, n) for n in range(40)] + [(2, 0, 5, n) for n in range(20)]
    assert calls_per_user(replay(dataset_of(events), Count(20))) == (3 + 1) / 2


@needs_movielens
def test_movielens_100k_makes_the_figures_of_the_paper() -> None:
    dataset = load(LIBER_DATA)
    samples = replay(dataset, Count(20))
    parts = split(samples)
    assert len(samples) == 81_140
    assert len(np.unique(samples.user)) == 911
    assert (len(parts.training_part), len(parts.test)) == (73_026, 8_114)
    assert round(float(samples.label.mean()), 3) == 0.545
    test_users = set(samples.user[parts.test].tolist())
    assert len(test_users) == 163
    assert len(test_users - set(samples.user[parts.training_part].tolist())) == 76
    # Table 6: 8.96.
    assert round(calls_per_user(samples), 4) == 8.9649
