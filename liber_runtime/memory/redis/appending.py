"""Append: behaviors are partitioned here, and kept there if nothing has changed meanwhile.

There is one partitioner, `liber_runtime.partition.stream`, in Python. So an append is optimistic: it partitions on the
cache it believes the user to have, and the function in Redis keeps the outcome, whole, only if the user is still as
believed; otherwise it answers with what is there, and the append goes from that.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.memory.packing import event_digest
from liber_runtime.memory.redis.keys import Keys
from liber_runtime.memory.redis.records import dump_run, load_run
from liber_runtime.memory.redis.servers import Call, Servers, function
from liber_runtime.partition import PartitionCondition, PreviousPartition, stream

BEHAVIORS_PER_ROUND = 10_000
"""Behaviors on their way at once, but never less than one user's: those are kept whole."""

MAX_CALL_BYTES = 512 * 1024 * 1024
"""Of one user's behaviors in one append, packed: what a Redis server takes in."""

REMEMBERED_USERS = 8_192
"""Caches that a store keeps at hand, so that who appends steadily needs one round trip for each append."""


class Held(NamedTuple):
    """What a user's memory looked like when it was last seen.

    Attributes:
        revision: changes with every change of the behaviors; empty for a user without any.
        partitions: how many were cut.
        cache: behaviors in no partition yet.
    """

    revision: bytes = b""
    partitions: int = 0
    cache: tuple[Behavior, ...] = ()


class Appender:
    """Keeps behaviors of any users.

    Args:
        servers: where to.
        keys: of the store.
    """

    def __init__(self, servers: Servers, keys: Keys) -> None:
        self._servers = servers
        self._keys = keys
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, Held] = OrderedDict()

    def append(self, condition: PartitionCondition, behaviors: Sequence[Behavior]) -> tuple[int, int]:
        """Partitions and keeps what is not known yet; returns behaviors kept and partitions cut."""
        arriving: dict[str, dict[str, Behavior]] = {}
        for behavior in behaviors:
            arriving.setdefault(behavior.user_id, {}).setdefault(behavior.event_id, behavior)
        kept = partitions = 0
        for users in _rounds(arriving):
            more = self._append_users(condition, users)
            kept, partitions = kept + more[0], partitions + more[1]
        return kept, partitions

    def _append_users(self, condition: PartitionCondition, left: dict[str, dict[str, Behavior]]) -> tuple[int, int]:
        # One token for all tries: a try whose reply was lost is recognised when it is sent again.
        token, moment = secrets.token_bytes(12), time.time()
        digests = {user_id: {id_: event_digest(id_) for id_ in fresh} for user_id, fresh in left.items()}
        kept = partitions = tries = 0
        while left:
            after = {user_id: self._partition(condition, user_id, fresh, token) for user_id, fresh in left.items()}
            calls = [
                self._call(user_id, token, after[user_id], [digests[user_id][id_] for id_ in left[user_id]], arrival)
                for user_id, arrival in zip(left, _arrivals(moment), strict=False)
            ]
            refused: dict[str, dict[str, Behavior]] = {}
            for (user_id, fresh), reply in zip(left.items(), self._servers.run(calls, durable=True), strict=True):
                if reply == 1:
                    kept, partitions = kept + len(fresh), partitions + len(after[user_id].runs)
                    self._remember(user_id, after[user_id].held)
                    continue
                fresh = self._learn(user_id, fresh, *reply)
                if fresh:
                    refused[user_id] = fresh
            left, tries = refused, tries + 1
            if left and tries > 1:
                time.sleep(random.uniform(0, 0.002 * min(tries, 10)))
        return kept, partitions

    def _partition(
        self, condition: PartitionCondition, user_id: str, fresh: Mapping[str, Behavior], token: bytes
    ) -> _After:
        """Runs Algorithm 1 on what the user's memory is believed to be."""
        before = self._recall(user_id)
        streamed = stream(condition, before.cache, fresh.values(), self._previous(user_id, before.partitions))
        return _After(
            before.revision,
            [dump_run(partition) for partition in streamed.partitions],
            dump_run(streamed.cache),
            Held(token, before.partitions + len(streamed.partitions), streamed.cache),
        )

    def _call(self, user_id: str, token: bytes, after: _After, digests: Sequence[bytes], arrival: str) -> Call:
        if sum(map(len, after.runs)) + 16 * len(digests) + len(after.cache) > MAX_CALL_BYTES:
            raise InvalidInputError(
                f"{len(digests)} behaviors of user {user_id!r} in one call are more than {MAX_CALL_BYTES} bytes; "
                "append them in several calls"
            )
        return function(
            self._keys.slots[self._keys.bucket_of(user_id)],
            "append",
            self._keys.arrival(user_id),
            user_id,
            token,
            after.revision,
            len(digests),
            b"".join(digests),
            after.cache,
            arrival,
            *after.runs,
        )

    def _learn(
        self, user_id: str, fresh: Mapping[str, Behavior], revision: bytes, partitions: int, cache: bytes, known: bytes
    ) -> dict[str, Behavior]:
        """Takes in what is there; returns the behaviors that are new to it."""
        self._remember(user_id, Held(revision, partitions, tuple(load_run(user_id, cache))))
        if not known:
            return dict(fresh)
        return {id_: behavior for (id_, behavior), is_known in zip(fresh.items(), known, strict=True) if is_known == 48}

    def _previous(self, user_id: str, number: int) -> PreviousPartition:
        """Fetches the last partition when, and only when, the condition asks for it."""
        fetched: list[Sequence[Behavior]] = []

        def fetch() -> Sequence[Behavior]:
            if not fetched:
                slot = self._keys.slots[self._keys.bucket_of(user_id)]
                command = ("HGET", self._keys.user(user_id), f"p{number}")
                run = self._servers.run_one(Call(slot, command)) if number else None
                fetched.append(load_run(user_id, run or b""))
            return fetched[0]

        return fetch

    def _recall(self, user_id: str) -> Held:
        """What was last seen of a user; a user never seen is believed to be new."""
        with self._lock:
            held = self._seen.get(user_id)
            if held is None:
                return Held()
            self._seen.move_to_end(user_id)
            return held

    def _remember(self, user_id: str, held: Held) -> None:
        with self._lock:
            self._seen[user_id] = held
            self._seen.move_to_end(user_id)
            if len(self._seen) > REMEMBERED_USERS:
                self._seen.popitem(last=False)

    def forget(self, user_id: str) -> None:
        """Drops what is remembered of a user."""
        with self._lock:
            self._seen.pop(user_id, None)


class _After(NamedTuple):
    """A user's memory as it will be if nothing has changed: the revision it was made from, and what is new."""

    revision: bytes
    runs: list[bytes]
    cache: bytes
    held: Held


def _rounds(arriving: Mapping[str, dict[str, Behavior]]) -> Iterator[dict[str, dict[str, Behavior]]]:
    """Whole users, about `BEHAVIORS_PER_ROUND` behaviors at a time."""
    users: dict[str, dict[str, Behavior]] = {}
    size = 0
    for user_id, fresh in arriving.items():
        users[user_id] = fresh
        size += len(fresh)
        if size >= BEHAVIORS_PER_ROUND:
            yield users
            users, size = {}, 0
    if users:
        yield users


def _arrivals(moment: float) -> Iterable[str]:
    """Times a microsecond apart: users are listed in the order they came, also those of one call."""
    number = 0
    while True:
        yield f"{moment + number * 1e-6:.6f}"
        number += 1
