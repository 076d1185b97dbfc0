"""User memory: the short-term cache and the long-term partitions with their knowledge (paper, section 3.2).

`MemoryStore` is the one contract; every engine passes the same suite (`tests/contract`). It is `WorkQueue` (what is
still to be made) and what is held. The promises:

1. An acknowledged behavior is never lost to a killed process, and never counted twice (event id).
2. Behaviors of one user keep their arrival order; a partition, once cut, never changes but by `forget`.
3. Each partition's knowledge is committed exactly once; a crash can repeat a writer's call, never its effect.
4. Summaries are independent of each other; the shift of partition j waits for the summaries j-1 and j.
5. Reading never waits for a writer, a worker or a rebuild.
6. `forget` leaves nothing behind, and a late worker cannot bring it back.
7. Vectors of two encodings lie side by side: a reader asks for its own and never sees the other.
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
from liber_runtime.memory.history import History
from liber_runtime.partition import PartitionCondition

Step: TypeAlias = Literal["summary", "shift", "representation"]
"""What a partition still needs, in this order; a first partition needs no shift."""

MAX_SHARDS = 64
"""Of a SQLite store: each shard is a file with connections of its own."""

STEPS: tuple[Step, ...] = ("summary", "shift", "representation")


@dataclass(frozen=True, slots=True)
class Appended:
    """What `MemoryStore.append` did: behaviors kept, behaviors known already, partitions cut."""

    behaviors: int
    duplicates: int
    partitions: int


@dataclass(frozen=True, slots=True)
class Mark:
    """How far into a log an append has come; kept with the behaviors, so that a log can be resumed.

    Attributes:
        source: identifies the log, e.g. by name and content.
        position: what the reader of the log goes on from (lines, bytes, a part's number); never goes back.
    """

    source: str
    position: int


@dataclass(frozen=True, slots=True)
class Task:
    """One step of one partition, claimed by one worker, with all that the step reads.

    Attributes:
        user_id: whose partition.
        number: which partition, from 1.
        step: what to make.
        claim: proves that the claim is still held; `commit` and `renew` take nothing without it.
        attempts: how often the step was claimed, this time included. Above 1 a call may have been repeated.
        profile: the user's profile (for a summary).
        behaviors: the partition's behaviors (for a summary).
        fingerprint: of the encoding that a representation is wanted of; empty if any will do.
        previous: the summary of partition number-1 (for a shift).
        summary: this partition's summary (for a shift or a representation).
        shift: this partition's shift (for a representation; empty for the first partition).
    """

    user_id: str
    number: int
    step: Step
    claim: str
    attempts: int
    fingerprint: str = ""
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
class Failure:
    """Why a task was not made, and what becomes of its step.

    Attributes:
        error: one line, for whoever looks after the dead.
        retry_seconds: the step is ready again after so long; None gives it up: it is dead until `revive`.
        attempted: False if the claim shall not count as an attempt: what the step needs was away, which says nothing
            about the step.
    """

    error: str
    retry_seconds: float | None
    attempted: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """A task's end: a `Text` for a summary or a shift, a `Representation` for a representation, or a `Failure`."""

    task: Task
    made: Text | Representation | Failure


@dataclass(frozen=True, slots=True)
class Committed:
    """What `WorkQueue.commit` did: results taken, and results whose claim was lost (expired, or a forgotten user)."""

    kept: int
    discarded: int


@dataclass(frozen=True, slots=True)
class DeadStep:
    """A step given up after repeated failures, with the newest of their reasons."""

    user_id: str
    number: int
    step: Step
    attempts: int
    error: str
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class UserMemory:
    """Everything one score needs of one user.

    Attributes:
        profile: what is known of the user.
        history: the newest behaviors, oldest first; cache and partitions alike.
        representations: float32[J, d], the newest partitions' vectors of the encoding asked for, in order; [0, 0] if
            there are none, [J, 0] if they are not of one length. As they lie in the store: whoever reads them checks.
        foreign: fingerprints of the user's vectors if none of them is of the encoding asked for and the store is not
            to make such ones (`WorkQueue.encode_by`): whoever asked reads the wrong store. Empty otherwise.
    """

    profile: Attributes
    history: History
    representations: npt.NDArray[np.float32]
    foreign: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PartitionRecord:
    """A partition with its knowledge, as `MemoryStore.timeline` shows it.

    Attributes:
        number: from 1.
        behaviors: what the summary is made from; with the behaviors before, what the shift is made from. Empty if
            all of them were erased: the number stays.
        summary: None until it is made.
        shift: None until it is made; stays None for a first partition and after one whose behaviors were all erased.
        representations: of each encoding, by fingerprint.
    """

    number: int
    behaviors: tuple[Behavior, ...]
    summary: Text | None
    shift: Text | None
    representations: Mapping[str, Representation]


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
        age_seconds: of the oldest of these, by step; 0.0 where there is none. A step's age begins when all that it
            reads is there, not when its partition is cut: a shift's when the second of its summaries is. Claims,
            failures and retries leave it alone; it begins anew when the step's inputs change or it is revived.
        dead: steps given up after repeated failures, by step.
        repeated: claims beyond a step's first: the writer calls that may have been repeated.
        vectors: representations kept, by fingerprint.
        encodings: fingerprints that `WorkQueue.encode_by` asked for.
    """

    users: int
    behaviors: int
    items: int
    partitions: int
    pending: Mapping[Step, int]
    age_seconds: Mapping[Step, float]
    dead: Mapping[Step, int]
    repeated: int
    vectors: Mapping[str, int]
    encodings: frozenset[str]


class WorkQueue(Protocol):
    """What partitions still need.

    A step is ready when its inputs are there and final:

    - a summary when its partition is cut;
    - a shift when the summaries of its partition and of the one before are there and neither is about to be replaced;
    - a representation when the partition's texts are there and neither is about to be replaced.

    A partition needs a shift unless it is the first, or the one before it holds no behaviors any more.
    """

    def claim(self, steps: Collection[Step], limit: int, lease_seconds: float, fingerprint: str = "") -> list[Task]:
        """Takes up to `limit` ready steps for `lease_seconds`; an expired claim can be taken by anyone.

        Steps that became ready long ago come before newer ones as far as the engine can tell; none starves.

        Args:
            steps: which kinds.
            limit: most steps.
            lease_seconds: how long the claim is held unless it is renewed.
            fingerprint: of the caller's encoder. Representations wanted of another encoding are left to others.
        """
        ...

    def renew(self, tasks: Sequence[Task], lease_seconds: float) -> list[Task]:
        """Holds claims for another `lease_seconds` from now; returns the tasks whose claim is lost."""
        ...

    def commit(self, results: Sequence[Result]) -> Committed:
        """Takes what was made, once, and makes the steps ready that waited for it; gives back what failed.

        A text or vector takes the place of an older one. What was made from an older text becomes a step again.

        Raises:
            InvalidInputError: a result of another kind than its task, a vector that is not finite float32[d], or one of
                another encoding than the task wants. Nothing is kept then.
        """
        ...

    def dead(self, limit: int = 1000) -> list[DeadStep]:
        """At most `limit` steps that were given up."""
        ...

    def revive(self) -> int:
        """Makes all dead steps ready again, with all their attempts ahead; returns how many."""
        ...

    def rewrite(self, *, writer: str = "", prompt_version: str = "", user_ids: Collection[str] | None = None) -> int:
        """Makes texts again, for a better prompt or writer; returns how many are queued now.

        The old text is served until the new one is committed. A new summary brings its shift and the next one with it,
        a new text its vectors; those are not counted.

        Args:
            writer: only texts by this writer; empty for any.
            prompt_version: only texts by this prompt; empty for any.
            user_ids: only these users'; None for all.
        """
        ...

    def encode_by(self, fingerprints: Collection[str]) -> int:
        """From now on every partition gets a vector of each of these encodings; returns how many are to be made now.

        Pending representations of other encodings are dropped. Vectors of encodings wanted neither now nor before this
        call are deleted: so a switch from A to B is ``encode_by({A, B})``, and when B is complete and served
        ``encode_by({B})``, after which A can still be read until the next change. No text is touched, no writer called.
        Before the first call any encoding will do.
        """
        ...


class MemoryStore(WorkQueue, Protocol):
    """Where behaviors, partitions and knowledge live. Safe to share between threads and between processes.

    Every method raises `StoreError` when the engine fails; nothing is then half-written.
    """

    @property
    def domain(self) -> Domain | None:
        """The description of the data set held, None before `describe` was first given one."""
        ...

    @property
    def condition(self) -> PartitionCondition:
        """When the cache is cut: chosen when the store is made, the same for every process."""
        ...

    def describe(
        self,
        domain: Domain | None = None,
        items: Iterable[Item] = (),
        profiles: Mapping[str, Attributes] | None = None,
    ) -> None:
        """Sets the data set's description, adds or replaces items and users' profiles."""
        ...

    def items(self, item_ids: Collection[str]) -> dict[str, Item]:
        """The items among `item_ids` that are known."""
        ...

    def append(self, behaviors: Sequence[Behavior], mark: Mark | None = None) -> Appended:
        """Keeps behaviors, in order, and cuts partitions (Algorithm 1, lines 2-7), durably.

        A behavior whose event id the user already has, or had when it was erased, is a duplicate and changes nothing.
        All or none of one user's behaviors are kept; of several users', an engine of many files or machines that fails
        in the middle may have kept some users' and not others'. The call then raises, and repeating it is safe.

        Args:
            behaviors: any number, of any users.
            mark: kept once all behaviors are.

        Raises:
            InvalidInputError: a timestamp more than a day ahead of the clock. Nothing is kept then.
        """
        ...

    def position(self, source: str) -> int:
        """The position last marked for a source; 0 if none was."""
        ...

    def read(self, user_ids: Sequence[str], history: int, partitions: int, fingerprint: str) -> list[UserMemory | None]:
        """What scoring needs, in the order of `user_ids`; None for a user of whom nothing is held.

        Args:
            user_ids: any number, repeats allowed.
            history: at most this many newest behaviors each.
            partitions: at most this many newest representations each.
            fingerprint: of the encoding whose vectors are wanted; vectors that were made without one being wanted
                (before `encode_by`) carry their maker's.
        """
        ...

    def users(self) -> list[str]:
        """Ids of all users with behaviors or a profile."""
        ...

    def timeline(self, user_id: str) -> Timeline | None:
        """All that is held of a user; None if nothing is."""
        ...

    def forget(self, user_id: str, event_id: str | None = None) -> Forgotten:
        """Removes all that is held of a user, or one behavior with all that was made from it.

        Of a user nothing stays, pending steps included, and a claim held on it commits nothing. Of a single behavior of
        partition j, summary j, shift j, shift j+1 and the vectors j and j+1 are deleted at once and queued to be made
        from what remains; what stays is a digest of the event id, so that a log that is read again does not bring it
        back.
        """
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
        url: ``sqlite:///relative/path.db`` or ``sqlite:////absolute/path.db``, with ``?shards=N`` for N files that
            share the users; ``redis://host:port/0?name=liber``, or ``rediss://`` over TLS, for one Redis or a cluster
            (`liber_runtime.memory.redis.address.parse_address`).
        condition: when the cache is cut. Fixed when the store is made (default ``count(20)``, the paper's K);
            afterwards None takes the store's own.
        create: make the store if it is missing. What only reads or erases says no, lest a mistyped path become one.

    Raises:
        ConfigurationError: an unknown scheme, a condition that is not the store's, or no store where none is made.
        StoreError: the engine cannot be opened.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "sqlite" and separator and rest.startswith("/") and rest != "/":
        return _open_sqlite(url, rest[1:], condition, create)
    if scheme in ("redis", "rediss") and separator and rest:
        return _open_redis(url, condition, create)
    raise ConfigurationError(
        f"store {url!r:.200} is not understood; write sqlite:///path/to/memory.db or redis://host:6379/0?name=liber"
    )


def _open_redis(url: str, condition: PartitionCondition | None, create: bool) -> MemoryStore:
    try:
        from liber_runtime.memory.redis import RedisStore
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise ConfigurationError(
            "stores in Redis need the package redis; install it: pip install 'liber-runtime[redis]'"
        ) from None
    return RedisStore(url, condition, create=create)


def _open_sqlite(url: str, place: str, condition: PartitionCondition | None, create: bool) -> MemoryStore:
    from liber_runtime.memory.sharded import ShardedStore, shard_paths
    from liber_runtime.memory.sqlite import SQLiteStore

    path, _, query = place.partition("?")
    shards = query.removeprefix("shards=")
    if query and (shards == query or not shards.isdecimal() or not 1 <= int(shards) <= MAX_SHARDS):
        raise ConfigurationError(
            f"store {url!r}: {query!r} is not understood; write ?shards=N, N from 1 to {MAX_SHARDS}"
        )
    paths = shard_paths(path, int(shards)) if shards else [path]
    if not create and not Path(paths[0]).exists():
        raise ConfigurationError(
            f"there is no store {url}; name another with --store or LIBER_STORE, or make one with `liber ingest` "
            "or `liber build`"
        )
    if not shards:
        return SQLiteStore(path, condition)
    opened: list[SQLiteStore] = []
    try:
        opened += (SQLiteStore(each, condition) for each in paths)
    except BaseException:
        for store in opened:
            store.close()
        raise
    return ShardedStore(opened)
