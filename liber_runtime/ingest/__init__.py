"""Behaviors into a store: in batches, counted, and resumable.

`append_behaviors` takes any iterable. `log` reads files so that a second run goes on where the first ended, `bulk`
brings in months of logs at once, `kafka` follows a topic. All of them append `Batch` by `Batch`: what is kept, and how
far its source has been read, become durable together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from liber_runtime.behavior import Behavior
from liber_runtime.memory import Appended, Mark, MemoryStore

BATCH_BEHAVIORS = 10_000
"""Behaviors of one `MemoryStore.append` where nothing else bounds a batch."""

NOTHING = Appended(behaviors=0, duplicates=0, partitions=0)


@dataclass(frozen=True, slots=True)
class Batch:
    """Behaviors that are appended together.

    Attributes:
        behaviors: in arrival order.
        marks: what may be said of the source once the behaviors are kept; the first becomes durable with them.
        offset: how far the source has been read, for whoever shows the progress.
    """

    behaviors: Sequence[Behavior]
    marks: tuple[Mark, ...] = ()
    offset: int = 0


Tell: TypeAlias = Callable[[Appended, int], None]
"""Called after each batch with what was appended so far and the batch's `offset`."""


def append_batches(store: MemoryStore, batches: Iterable[Batch], tell: Tell | None = None) -> Appended:
    """Appends batch by batch; the next one is read when the last one is kept.

    Returns:
        What all of them came to.

    Raises:
        StoreError: the store failed. The batches before, which `tell` was told of, are kept.
    """
    total = NOTHING
    for batch in batches:
        total = plus(total, store.append(batch.behaviors, batch.marks[0] if batch.marks else None))
        for mark in batch.marks[1:]:
            store.append((), mark)
        if tell is not None:
            tell(total, batch.offset)
    return total


def append_behaviors(
    store: MemoryStore,
    behaviors: Iterable[Behavior],
    *,
    source: str = "",
    batch: int = BATCH_BEHAVIORS,
    tell: Tell | None = None,
) -> Appended:
    """Appends behaviors from anywhere.

    Args:
        store: where to.
        behaviors: in arrival order.
        source: names where they come from. With a name a second call goes on behind the last batch that the first one
            kept; `behaviors` must then begin as they did before. Without one, what is known already counts as a
            duplicate.
        batch: behaviors appended at a time.
        tell: called after each batch; the offset is the number of behaviors taken from `behaviors`.

    Raises:
        StoreError: the store failed; what `tell` was told of is kept.
        InvalidInputError: a behavior is refused, see `MemoryStore.append`.
    """
    return append_batches(store, _counted(behaviors, source, store.position(source) if source else 0, batch), tell)


def plus(one: Appended, other: Appended) -> Appended:
    """What two appends came to."""
    return Appended(
        one.behaviors + other.behaviors, one.duplicates + other.duplicates, one.partitions + other.partitions
    )


def _counted(behaviors: Iterable[Behavior], source: str, start: int, size: int) -> Iterator[Batch]:
    remaining = itertools.islice(behaviors, start, None)
    offset = start
    while taken := list(itertools.islice(remaining, size)):
        offset += len(taken)
        yield Batch(taken, (Mark(source, offset),) if source else (), offset)
