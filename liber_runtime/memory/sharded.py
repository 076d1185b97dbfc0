"""`MemoryStore` over several others, each with its share of the users: where one file's writer is not enough.

A user's behaviors, knowledge and steps lie in one shard, chosen by a hash of the user id, so that everything about one
user stays one transaction. The catalogue and the marks of logs lie in the first shard.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from liber_runtime.behavior import Attributes, Behavior, Domain, Item
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import (
    STEPS,
    Appended,
    Committed,
    DeadStep,
    Forgotten,
    Mark,
    MemoryStore,
    Result,
    Statistics,
    Step,
    Task,
    Timeline,
    UserMemory,
)
from liber_runtime.memory.checks import check_arrival, check_made
from liber_runtime.partition import PartitionCondition

T = TypeVar("T")
S = TypeVar("S")


class ShardedStore:
    """`liber_runtime.memory.MemoryStore`; see there for what each method promises.

    Args:
        shards: stores with the same condition, always in the same order and number.
    """

    def __init__(self, shards: Sequence[MemoryStore]) -> None:
        self._shards = shards
        self._turns = itertools.count()
        # The disk is waited for in all shards at once.
        self._pool = ThreadPoolExecutor(len(shards), thread_name_prefix="shard")

    @property
    def domain(self) -> Domain | None:
        """See `MemoryStore.domain`."""
        return self._shards[0].domain

    @property
    def condition(self) -> PartitionCondition:
        """See `MemoryStore.condition`."""
        return self._shards[0].condition

    def describe(
        self,
        domain: Domain | None = None,
        items: Iterable[Item] = (),
        profiles: Mapping[str, Attributes] | None = None,
    ) -> None:
        """See `MemoryStore.describe`."""
        self._shards[0].describe(domain, items)
        people = profiles or {}
        for shard, users in self._split(people, lambda user_id: user_id).items():
            self._shards[shard].describe(profiles={user_id: people[user_id] for user_id in users})

    def items(self, item_ids: Collection[str]) -> dict[str, Item]:
        """See `MemoryStore.items`."""
        return self._shards[0].items(item_ids)

    def append(self, behaviors: Sequence[Behavior], mark: Mark | None = None) -> Appended:
        """See `MemoryStore.append`."""
        check_arrival(behaviors)
        parts = self._split(behaviors, lambda behavior: behavior.user_id)
        done = self._each(parts, lambda store, part: store.append(part))
        if mark is not None or not parts:
            self._shards[0].append([], mark)
        return Appended(
            sum(one.behaviors for one in done),
            sum(one.duplicates for one in done),
            sum(one.partitions for one in done),
        )

    def position(self, source: str) -> int:
        """See `MemoryStore.position`."""
        return self._shards[0].position(source)

    def read(self, user_ids: Sequence[str], history: int, partitions: int, fingerprint: str) -> list[UserMemory | None]:
        """See `MemoryStore.read`."""
        found: dict[str, UserMemory | None] = {}
        for shard, users in self._split(dict.fromkeys(user_ids), lambda user_id: user_id).items():
            found.update(zip(users, self._shards[shard].read(users, history, partitions, fingerprint), strict=True))
        return [found[user_id] for user_id in user_ids]

    def users(self) -> list[str]:
        """See `MemoryStore.users`."""
        return [user_id for shard in self._shards for user_id in shard.users()]

    def timeline(self, user_id: str) -> Timeline | None:
        """See `MemoryStore.timeline`."""
        return self._of(user_id).timeline(user_id)

    def forget(self, user_id: str, event_id: str | None = None) -> Forgotten:
        """See `MemoryStore.forget`."""
        return self._of(user_id).forget(user_id, event_id)

    def statistics(self) -> Statistics:
        """See `MemoryStore.statistics`."""
        each = [shard.statistics() for shard in self._shards]
        return Statistics(
            users=sum(one.users for one in each),
            behaviors=sum(one.behaviors for one in each),
            items=each[0].items,
            partitions=sum(one.partitions for one in each),
            pending={step: sum(one.pending[step] for one in each) for step in STEPS},
            age_seconds={step: max(one.age_seconds[step] for one in each) for step in STEPS},
            dead={step: sum(one.dead[step] for one in each) for step in STEPS},
            repeated=sum(one.repeated for one in each),
            vectors=dict(sum((Counter(one.vectors) for one in each), Counter())),
            encodings=frozenset[str]().union(*(one.encodings for one in each)),
        )

    def close(self) -> None:
        """See `MemoryStore.close`."""
        for shard in self._shards:
            shard.close()
        self._pool.shutdown()

    # -- what is still to be made --------------------------------------------------------------------------------

    def claim(self, steps: Collection[Step], limit: int, lease_seconds: float, fingerprint: str = "") -> list[Task]:
        """See `WorkQueue.claim`. The shards take turns at being asked first."""
        first = next(self._turns)
        tasks: list[Task] = []
        for at in range(len(self._shards)):
            shard = self._shards[(first + at) % len(self._shards)]
            tasks += shard.claim(steps, limit - len(tasks), lease_seconds, fingerprint)
        return tasks

    def renew(self, tasks: Sequence[Task], lease_seconds: float) -> list[Task]:
        """See `WorkQueue.renew`."""
        parts = self._split(tasks, lambda task: task.user_id)
        lost = self._each(parts, lambda store, part: store.renew(part, lease_seconds))
        gone = {id(task) for part in lost for task in part}
        return [task for task in tasks if id(task) in gone]

    def commit(self, results: Sequence[Result]) -> Committed:
        """See `WorkQueue.commit`."""
        for result in results:
            check_made(result)
        parts = self._split(results, lambda result: result.task.user_id)
        done = self._each(parts, lambda store, part: store.commit(part))
        return Committed(sum(one.kept for one in done), sum(one.discarded for one in done))

    def dead(self, limit: int = 1000) -> list[DeadStep]:
        """See `WorkQueue.dead`."""
        return [step for shard in self._shards for step in shard.dead(limit)][:limit]

    def revive(self) -> int:
        """See `WorkQueue.revive`."""
        return sum(shard.revive() for shard in self._shards)

    def rewrite(self, *, writer: str = "", prompt_version: str = "", user_ids: Collection[str] | None = None) -> int:
        """See `WorkQueue.rewrite`."""
        return sum(
            shard.rewrite(writer=writer, prompt_version=prompt_version, user_ids=user_ids) for shard in self._shards
        )

    def encode_by(self, fingerprints: Collection[str]) -> int:
        """See `WorkQueue.encode_by`."""
        return sum(shard.encode_by(fingerprints) for shard in self._shards)

    # -- shards --------------------------------------------------------------------------------------------------

    def _number(self, user_id: str) -> int:
        return zlib.crc32(user_id.encode(errors="surrogatepass")) % len(self._shards)

    def _of(self, user_id: str) -> MemoryStore:
        return self._shards[self._number(user_id)]

    def _split(self, values: Iterable[T], user_id: Callable[[T], str]) -> dict[int, list[T]]:
        """Values by shard, in their order."""
        parts: dict[int, list[T]] = {}
        for value in values:
            parts.setdefault(self._number(user_id(value)), []).append(value)
        return parts

    def _each(self, parts: Mapping[int, list[T]], work: Callable[[MemoryStore, list[T]], S]) -> list[S]:
        """Does `work` in every shard that has a part, at once where there are several."""
        if len(parts) == 1:
            return [work(self._shards[shard], part) for shard, part in parts.items()]
        jobs = [self._pool.submit(work, self._shards[shard], part) for shard, part in parts.items()]
        return [job.result() for job in jobs]


def shard_paths(path: str, shards: int) -> list[str]:
    """The files of a sharded SQLite store.

    Raises:
        ConfigurationError: the store was made with another number of shards, whose users would not be found.
    """
    file = Path(path)
    mine = [f"{path}.{number}of{shards}" for number in range(1, shards + 1)]
    there = sorted(str(each) for each in file.parent.glob(f"{file.name}.*of*") if each.suffix.lstrip(".").isalnum())
    others = [each for each in there if each not in mine]
    if others:
        made = others[0].rpartition("of")[2]
        raise ConfigurationError(
            f"store {path} was made with {made} shards and not {shards}; open it with ?shards={made}, or make a new "
            "store and ingest the logs into it"
        )
    return mine
