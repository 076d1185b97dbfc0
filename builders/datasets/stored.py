"""What a memory store holds, as a data set: a bundle is made from it where there is no log any more, or none is needed.

A store keeps each user's behaviors in the order they arrived in, and no order between users. The data set has all of
them in the order of time, and each user's own as they arrived: they are merged by the latest time that each user had
reached, so that a behavior that came late stands where the store has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from builders.datasets import Dataset
from liber_runtime.behavior import Attributes, Behavior
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import MemoryStore, Timeline
from liber_runtime.partition import PartitionCondition, stream

ITEMS_PER_READ = 10_000


def load(store: MemoryStore, catalogue: Sequence[str] = ()) -> Dataset:
    """Reads everything that a store holds.

    What arrives meanwhile may be in it or not, for each user separately; scoring and appending go on.

    Args:
        store: any.
        catalogue: ids of further items than those behaviors name, e.g. of a bundle's vocabulary: a store tells of an
            item only to who asks for it.

    Raises:
        ConfigurationError: the store has no description of its data set.
    """
    domain = store.domain
    if domain is None:
        raise ConfigurationError(
            "the store has no description of its data set; bring one with `liber ingest --items --domain`"
        )
    profiles: dict[str, Attributes] = {}
    cuts: dict[str, tuple[int, ...]] = {}
    sequences: list[list[Behavior]] = []
    for user_id in store.users():
        timeline = store.timeline(user_id)
        if timeline is None:  # forgotten since
            continue
        if timeline.profile:
            profiles[user_id] = timeline.profile
        runs = [record.behaviors for record in timeline.partitions if record.behaviors]
        sequences.append([*itertools.chain.from_iterable(runs), *timeline.cache])
        if _was_cut_otherwise(store.condition, runs, timeline):
            cuts[user_id] = tuple(map(len, runs))
    behaviors = merge(sequences)
    item_ids = list(dict.fromkeys(itertools.chain(catalogue, (each.item_id for each in behaviors))))
    found = {
        item_id: item
        for start in range(0, len(item_ids), ITEMS_PER_READ)
        for item_id, item in store.items(item_ids[start : start + ITEMS_PER_READ]).items()
    }
    return Dataset(
        domain=domain,
        behaviors=behaviors,
        items={item_id: found[item_id] for item_id in item_ids if item_id in found},
        profiles=profiles,
        origin="what the store holds",
        ordered=True,
        cuts=cuts,
    )


def merge(sequences: Iterable[Sequence[Behavior]]) -> list[Behavior]:
    """Behaviors of several users by time, each user's own in the order given.

    Args:
        sequences: one user's behaviors each, in arrival order.
    """
    reached = (
        (latest, behavior)
        for sequence in sequences
        for latest, behavior in zip(
            itertools.accumulate((each.timestamp for each in sequence), max), sequence, strict=True
        )
    )
    # Stable, and what a user has reached never falls.
    return [behavior for _, behavior in sorted(reached, key=lambda each: each[0])]


def _was_cut_otherwise(condition: PartitionCondition, runs: Sequence[Sequence[Behavior]], timeline: Timeline) -> bool:
    """Whether Algorithm 1 over what is left makes other partitions than there are: behaviors were erased."""
    streamed = stream(condition, (), itertools.chain(*runs, timeline.cache))
    return [len(run) for run in streamed.partitions] != [len(run) for run in runs]
