"""User memory: the short-term cache and the long-term partitions with their knowledge (paper, section 3.2).

`MemoryStore` is the one contract; every engine passes the same suite (`tests/contract`). The promises:

1. An acknowledged behavior is never lost to a killed process, and never counted twice (event id).
2. Behaviors of one user keep their arrival order; a partition, once cut, never changes.
3. Each partition's knowledge is committed exactly once; a crash can repeat a writer's call, never its effect.
4. Summaries are independent of each other; the shift of partition j waits for the summaries j-1 and j.
5. Reading never waits for a writer, a worker or a rebuild.
6. `forget` leaves nothing behind, and a late worker cannot bring it back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from liber_runtime.behavior import Attributes, Behavior, Domain, Item, Text
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.partition import PartitionCondition

Step: TypeAlias = Literal["summary", "shift", "representation"]
"""What a partition still needs, in this order; a first partition needs no shift."""

STEPS: tuple[Step, ...] = ("summary", "shift", "representation")


@dataclass(frozen=True, slots=True)
class Appended:
    """What `MemoryStore.append` did: behaviors kept, behaviors known already, partitions cut."""

    behaviors: int
    duplicates: int
    partitions: int


@dataclass(frozen=True, slots=True)
class Task:
    """One step of one partition, claimed by one worker, with all that the step reads.

    Attributes:
        user_id: whose partition.
        number: which partition, from 1.
        step: what to make.
        claim: proves that the claim is still held; `commit` and `release` take nothing without it.
        attempts: how often the step was claimed, this time included. Above 1 a call may have been repeated.
        profile: the user's profile (for a summary).
        behaviors: the partition's behaviors (for a summary).
        previous: the summary of partition number-1 (for a shift).
        summary: this partition's summary (for a shift or a representation).
        shift: this partition's shift (for a representation; empty for the first partition).
    """

    user_id: str
    number: int
    step: Step
    claim: str
    attempts: int
    profile: Attributes = field(default_factory=dict)
    behaviors: tuple[Behavior, ...] = ()
    previous: str = ""
    summary: str = ""
    shift: str = ""


@dataclass(frozen=True, slots=True)
class Representation:
    """r_j: float32[d] and the fingerprint of the encoder and PCA that made it."""

    vector: npt.NDArray[np.float32]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a worker made of a task: a `Text` for a summary or a shift, a `Representation` for a representation."""

    task: Task
    made: Text | Representation


@dataclass(frozen=True, slots=True)
class Committed:
    """What `MemoryStore.commit` did: results kept, and results whose claim was lost (expired or forgotten user)."""

    kept: int
    discarded: int


@dataclass(frozen=True, slots=True)
class UserMemory:
    """Everything one score needs of one user.

    Attributes:
        profile: what is known of the user.
        history: the newest behaviors as (item id, feedback), oldest first; cache and partitions alike.
        representations: float32[J, d], the newest partitions' vectors in order; [0, 0] if there are none.
        fingerprints: of those vectors; more than one while a rebuild is under way.
    """

    profile: Attributes
    history: tuple[tuple[str, float], ...]
    representations: npt.NDArray[np.float32]
    fingerprints: frozenset[str]


@dataclass(frozen=True, slots=True)
class PartitionRecord:
    """A partition with its knowledge, as `MemoryStore.timeline` shows it; what is not made yet is None."""

    number: int
    behaviors: tuple[Behavior, ...]
    summary: Text | None
    shift: Text | None
    representation: Representation | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """All that is held of one user."""

    user_id: str
    profile: Attributes
    partitions: tuple[PartitionRecord, ...]
    cache: tuple[Behavior, ...]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `MemoryStore.forget` removed."""

    behaviors: int
    partitions: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts over the whole store.

    Attributes:
        users: with at least one behavior.
        behaviors: kept.
        items: in the catalogue.
        partitions: cut.
        pending: steps waiting or claimed, by step.
        dead: steps given up after repeated failures, by step.
        repeated: claims beyond a step's first: the writer calls that may have been repeated.
    """

    users: int
    behaviors: int
    items: int
    partitions: int
    pending: Mapping[Step, int]
    dead: Mapping[Step, int]
    repeated: int


class MemoryStore(Protocol):
    """Where behaviors, partitions and knowledge live. Safe to share between threads and between processes.

    Every method raises `StoreError` when the engine fails; nothing is then half-written.
    """

    @property
    def domain(self) -> Domain | None:
        """The description of the data set held, None before `put_items` was first called."""
        ...

    @property
    def condition(self) -> PartitionCondition:
        """When the cache is cut: chosen when the store is made, the same for every process."""
        ...

    def append(self, behaviors: Sequence[Behavior]) -> Appended:
        """Keeps behaviors, in order, and cuts partitions (Algorithm 1, lines 2-7), durably, all or none.

        A behavior whose event id the user already has is a duplicate and changes nothing.
        """
        ...

    def put_items(self, domain: Domain, items: Iterable[Item]) -> None:
        """Sets the data set's description and adds or replaces items."""
        ...

    def put_profiles(self, profiles: Mapping[str, Attributes]) -> None:
        """Adds or replaces users' profiles."""
        ...

    def items(self, item_ids: Collection[str]) -> dict[str, Item]:
        """The items among `item_ids` that are known."""
        ...

    def claim(self, steps: Collection[Step], limit: int, lease_seconds: float) -> list[Task]:
        """Takes up to `limit` ready steps for `lease_seconds`; an expired claim can be taken by anyone.

        A summary is ready when its partition is cut, a shift when both summaries are there, a representation when
        the texts are.
        """
        ...

    def commit(self, results: Sequence[Result]) -> Committed:
        """Keeps what was made, once, and makes the steps ready that waited for it."""
        ...

    def release(
        self, tasks: Sequence[Task], error: str, retry_seconds: float | None, *, attempted: bool = True
    ) -> None:
        """Gives claims back: ready again after `retry_seconds`, or dead with `error` when that is None.

        With `attempted` False the claim does not count as an attempt: what the step needs was away, and says nothing
        about the step.
        """
        ...

    def reencode(self, fingerprint: str) -> int:
        """Makes the representation step ready again for every vector with another fingerprint; returns how many.

        The old vector is kept until the new one is committed. Texts are not touched and no writer is called.
        """
        ...

    def read(self, user_ids: Sequence[str], history: int, partitions: int) -> list[UserMemory | None]:
        """What scoring needs, in the order of `user_ids`; None for a user of whom nothing is held.

        Args:
            user_ids: any number, repeats allowed.
            history: at most this many newest behaviors each.
            partitions: at most this many newest representations each.
        """
        ...

    def users(self) -> list[str]:
        """Ids of all users with behaviors or a profile, in the order they first came."""
        ...

    def timeline(self, user_id: str) -> Timeline | None:
        """All that is held of a user; None if nothing is."""
        ...

    def forget(self, user_id: str) -> Forgotten:
        """Removes all that is held of a user, pending steps included; a claim held on it commits nothing."""
        ...

    def statistics(self) -> Statistics:
        """Counts over the whole store."""
        ...

    def close(self) -> None:
        """Releases files and connections; the store cannot be used afterwards."""
        ...


def absolute_url(url: str) -> str:
    """The same store, whatever directory a process runs in."""
    scheme, separator, rest = url.partition(":///")
    return f"{scheme}{separator}{Path(rest).absolute()}" if scheme == "sqlite" and rest else url


def open_store(url: str, condition: PartitionCondition | None = None, *, create: bool = True) -> MemoryStore:
    """Opens, or makes, the store at `url`.

    Args:
        url: ``sqlite:///relative/path.db`` or ``sqlite:////absolute/path.db``.
        condition: when the cache is cut. Fixed when the store is made (default ``count(20)``, the paper's K);
            afterwards None takes the store's own.
        create: make the store if it is missing. What only reads or erases says no, lest a mistyped path become one.

    Raises:
        ConfigurationError: an unknown scheme, a condition that is not the store's, or no store where none is made.
        StoreError: the engine cannot be opened.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "sqlite" and separator and rest.startswith("/") and rest != "/":
        from liber_runtime.memory.sqlite import SQLiteStore

        if not create and not Path(rest[1:]).exists():
            raise ConfigurationError(
                f"there is no store {url}; name another with --store or LIBER_STORE, or make one with `liber ingest` "
                "or `liber build`"
            )
        return SQLiteStore(rest[1:], condition)
    raise ConfigurationError(f"store {url!r} is not understood; write sqlite:///path/to/memory.db")
