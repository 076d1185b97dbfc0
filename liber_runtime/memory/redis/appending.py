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
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.memory.packing import event_digest
from liber_runtime.memory.redis.keys import Keys
from liber_runtime.memory.redis.records import dump_run, load_run
from liber_runtime.memory.redis.servers import Call, Servers, function
from liber_runtime.partition import PartitionCondition, PreviousPartition, stream

BEHAVIORS_PER_ROUND = 2_000
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
        left: dict[str, dict[str, Behavior]] = {}
        for behavior in behaviors:
            user_id = behavior.user_id
            if user_id not in left:
                left[user_id] = {}
            left[user_id].setdefault(behavior.event_id, behavior)
        # One token for all tries: a try whose reply was lost is recognised when it is sent again.
        token, moment = secrets.token_bytes(12), time.time()
        kept = partitions = tries = 0
        while left:
            refused: dict[str, dict[str, Behavior]] = {}
            drafts: deque[dict[str, _Draft]] = deque()
            calls = self._call_in_rounds(condition, left, token, moment, drafts)
            for replies in self._servers.stream(calls, durable=True):
                for (user_id, draft), reply in zip(drafts.popleft().items(), replies, strict=True):
                    if reply == 1:
                        kept, partitions = kept + len(draft.fresh), partitions + len(draft.runs)
                        self._remember(user_id, draft.after)
                    elif fresh := self._learn(user_id, draft.fresh, *reply):
                        refused[user_id] = fresh
            left, tries = refused, tries + 1
            if left and tries > 1:
                time.sleep(random.uniform(0, 0.002 * min(tries, 10)))
        return kept, partitions

    def _call_in_rounds(
        self,
        condition: PartitionCondition,
        arriving: Mapping[str, dict[str, Behavior]],
        token: bytes,
        moment: float,
        drafts: deque[dict[str, _Draft]],
    ) -> Iterator[list[Call]]:
        """Makes the calls of one round after the other; their drafts go into `drafts`."""
        number = 0
        for users in _rounds(arriving):
            drafts.append({user_id: self._draft(condition, user_id, fresh, token) for user_id, fresh in users.items()})
            calls = []
            for user_id, draft in drafts[-1].items():
                # A microsecond apart: users are listed in the order they came, also those of one call.
                calls.append(self._call(user_id, token, draft, f"{moment + number * 1e-6:.6f}"))
                number += 1
            yield calls

    def _draft(self, condition: PartitionCondition, user_id: str, fresh: dict[str, Behavior], token: bytes) -> _Draft:
        """Runs Algorithm 1 on what the user's memory is believed to be."""
        before = self._recall(user_id)
        streamed = stream(condition, before.cache, fresh.values(), self._previous(user_id, before.partitions))
        return _Draft(
            fresh,
            before.revision,
            [dump_run(partition) for partition in streamed.partitions],
            dump_run(streamed.cache),
            Held(token, before.partitions + len(streamed.partitions), tuple(streamed.cache)),
        )

    def _call(self, user_id: str, token: bytes, draft: _Draft, arrival: str) -> Call:
        digests = b"".join(map(event_digest, draft.fresh))
        if sum(map(len, draft.runs)) + len(digests) + len(draft.cache) > MAX_CALL_BYTES:
            raise InvalidInputError(
                f"{len(draft.fresh)} behaviors of user {user_id!r} in one call are more than {MAX_CALL_BYTES} bytes; "
                "append them in several calls"
            )
        return function(
            self._keys.slots[self._keys.bucket_of(user_id)],
            "append",
            self._keys.arrival(user_id),
            user_id,
            token,
            draft.revision,
            len(draft.fresh),
            digests,
            draft.cache,
            arrival,
            *draft.runs,
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


class _Draft(NamedTuple):
    """What an append makes of a user's memory, if that is still as believed.

    Attributes:
        fresh: the behaviors, by event id.
        revision: what the memory is believed to be at.
        runs: the partitions cut, packed.
        cache: what remains, packed.
        after: what the memory is when this is kept.
    """

    fresh: dict[str, Behavior]
    revision: bytes
    runs: list[bytes]
    cache: bytes
    after: Held


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
