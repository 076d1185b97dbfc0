"""A data set made from what a store holds is the store's own: order, partitions, items, profiles."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.datasets import Dataset, sample, stored
from builders.replay import replay
from liber_runtime.behavior import Behavior, Item
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import MemoryStore, Timeline, open_store
from liber_runtime.partition import AnyOf, Count, PartitionCondition, TimeGap, TimeWindow, stream

ITEMS = [Item(f"i{number}", f"Item {number}", {"year": 1990 + number}) for number in range(4)]

Event = tuple[int, int, int]

# (user, item, time): times fall as often as they rise, for a store keeps what comes late where it comes.
events = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 60)), min_size=1, max_size=40)
leaves = st.one_of(
    st.builds(Count, st.integers(1, 6)),
    st.builds(TimeGap, st.integers(1, 20)),
    st.builds(TimeWindow, st.integers(1, 60)),
)
conditions = st.one_of(leaves, st.builds(AnyOf, leaves, leaves))


@contextlib.contextmanager
def filled(log: list[Event], condition: PartitionCondition) -> Iterator[MemoryStore]:
    """A store that the events arrived in one after the other."""
    with tempfile.TemporaryDirectory() as directory:
        store = open_store(f"sqlite:///{Path(directory) / 'memory.db'}", condition)
        try:
            store.describe(sample.DOMAIN, ITEMS, {"u0": {"age": 30}, "nobody": {"age": 40}})
            store.append(
                [
                    Behavior(f"u{user}", f"i{item}", 3.0, float(time), f"e{n}")
                    for n, (user, item, time) in enumerate(log)
                ]
            )
            yield store
        finally:
            store.close()


def timelines(store: MemoryStore) -> dict[str, Timeline]:
    found = {user: timeline for user in store.users() if (timeline := store.timeline(user))}
    return {user: timeline for user, timeline in found.items() if timeline.partitions or timeline.cache}


def behaviors_of(timeline: Timeline) -> list[Behavior]:
    return [*itertools.chain.from_iterable(each.behaviors for each in timeline.partitions), *timeline.cache]


def assert_replays(dataset: Dataset, store: MemoryStore) -> None:
    """Every user's partitions in the replay are those that the store has and that hold something."""
    samples = replay(dataset, store.condition, minimum=0)
    boundaries = samples.boundaries
    for user, user_id in enumerate(samples.user_ids):
        held = store.timeline(user_id)
        assert held is not None
        rows = range(boundaries.offsets[user], boundaries.offsets[user + 1])
        sequence = samples.sequence_behavior[samples.offsets[user] : samples.offsets[user + 1]]
        runs = [
            tuple(dataset.behaviors[row] for row in sequence[boundaries.start[row] : boundaries.end[row]])
            for row in rows
        ]
        assert runs == [record.behaviors for record in held.partitions if record.behaviors]
        assert boundaries.number[rows].tolist() == list(range(1, len(rows) + 1))


@settings(max_examples=60, deadline=None)
@given(events, conditions)
def test_it_replays_to_the_partitions_of_the_store(log: list[Event], condition: PartitionCondition) -> None:
    with filled(log, condition) as store:
        dataset = stored.load(store)
        assert not dataset.cuts
        assert_replays(dataset, store)
        for user, timeline in timelines(store).items():
            assert [each for each in dataset.behaviors if each.user_id == user] == behaviors_of(timeline)
        # What a sample sees is what the store would have answered when its behavior arrived.
        samples = replay(dataset, condition, minimum=0)
        for row, place in enumerate(samples.behavior.tolist()):
            user = dataset.behaviors[place].user_id
            before = [each for each in dataset.behaviors[:place] if each.user_id == user]
            assert samples.partitions[row] == len(stream(condition, (), before).partitions)


@settings(max_examples=40, deadline=None)
@given(events, conditions, st.sets(st.integers(0, 39), min_size=1))
def test_it_replays_to_what_is_left_when_behaviors_were_erased(
    log: list[Event], condition: PartitionCondition, erased: set[int]
) -> None:
    with filled([*log, (3, 0, 0)], condition) as store:
        for number in erased & set(range(len(log))):
            store.forget(f"u{log[number][0]}", f"e{number}")
        dataset = stored.load(store)
        assert len(dataset.behaviors) == len(log) + 1 - len(erased & set(range(len(log))))
        assert_replays(dataset, store)


@given(events)
def test_users_are_merged_by_the_latest_time_each_has_reached(log: list[Event]) -> None:
    sequences: dict[int, list[Behavior]] = {}
    for number, (user, item, time) in enumerate(log):
        sequences.setdefault(user, []).append(Behavior(f"u{user}", f"i{item}", 3.0, float(time), f"e{number}"))
    merged = stored.merge(sequences.values())
    reached: dict[str, float] = {}
    order = []
    for behavior in merged:
        reached[behavior.user_id] = max(behavior.timestamp, reached.get(behavior.user_id, -np.inf))
        order.append(reached[behavior.user_id])
    assert order == sorted(order)
    for user, sequence in sequences.items():
        assert [each for each in merged if each.user_id == f"u{user}"] == sequence


def test_a_log_in_time_order_comes_back_as_it_was() -> None:
    original = sample.generate(seed=3, users=20, items=40, behaviors=600)
    with filled([], Count(20)) as store:
        store.describe(original.domain, original.items.values(), original.profiles)
        store.append(original.behaviors)
        dataset = stored.load(store, list(original.items))
    assert [each.timestamp for each in dataset.behaviors] == [each.timestamp for each in original.behaviors]
    assert {*dataset.behaviors} == {*original.behaviors}
    assert dataset.items == original.items
    assert list(dataset.items) == list(original.items)
    assert dataset.profiles == {**original.profiles, "u0": {"age": 30}, "nobody": {"age": 40}}
    assert dataset.domain == original.domain


def test_items_are_those_of_behaviors_and_of_the_catalogue_that_is_named() -> None:
    with filled([(0, 1, 5), (0, 5, 6)], Count(20)) as store:
        assert list(stored.load(store).items) == ["i1"]
        assert list(stored.load(store, ["i3", "i1", "elsewhere"]).items) == ["i3", "i1"]
        assert stored.load(store).items["i1"] == ITEMS[1]


def test_a_store_that_was_never_described_is_refused(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'memory.db'}")
    store.append([Behavior("u", "i", 3.0, 1.0)])
    with pytest.raises(ConfigurationError, match=r"no description of its data set; bring one with `liber ingest"):
        stored.load(store)
    store.close()
