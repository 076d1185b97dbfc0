"""`WorkQueue` in Redis: streams whose consumer groups hold who has claimed what."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from liber_runtime.behavior import Text
from liber_runtime.memory import (
    STEPS,
    Committed,
    DeadStep,
    Failure,
    Representation,
    Result,
    Step,
    Task,
)
from liber_runtime.memory.checks import check_made
from liber_runtime.memory.packing import load_attributes
from liber_runtime.memory.redis.connected import Argument, Connected, require_lines
from liber_runtime.memory.redis.records import dump_text, load_run, words_of
from liber_runtime.memory.redis.servers import Call, function

MAX_ERROR_CHARACTERS = 2000
"""Of an error kept with a step that failed."""

LONGEST_SECONDS = 300 * 86_400.0
"""The longest lease or pause that the queues can express; a longer one is cut to it."""

ANY = "*"
"""What was wanted before `RedisQueue.encode_by` was first called."""

_FIRST_LOOK = 16
_USERS_PER_ROUND = 256
_PARTITIONS_PER_CALL = 1_000
_DEAD_PER_SCAN = 200


class _Claimed(NamedTuple):
    """An entry of a queue that is ours for the length of the lease."""

    user_id: str
    number: int
    step: Step
    fingerprint: str
    entry: str
    attempts: int


class RedisQueue(Connected):
    """`liber_runtime.memory.WorkQueue`; see there for what each method promises.

    A claim whose lease has expired can still be committed until someone else takes it: the work is paid for. A claim
    whose worker was killed before it was told comes back when its lease expires, as one more attempt.
    """

    def claim(self, steps: Collection[Step], limit: int, lease_seconds: float, fingerprint: str = "") -> list[Task]:
        """See `WorkQueue.claim`. Buckets are looked at in turn, from another one each time, so that none starves."""
        with self._use():
            kinds: list[tuple[Step, str]] = [(step, "") for step in STEPS if step in steps]
            if fingerprint and "representation" in steps:
                kinds.append(("representation", fingerprint))
            if limit < 1 or not kinds:
                return []
            tasks: list[Task] = []
            for buckets in _portions(self._keys.buckets):
                ready = self._count_ready(buckets, kinds, limit - len(tasks))
                tasks += self._fetch(self._claim_in(ready, kinds, limit - len(tasks), lease_seconds))
                if len(tasks) >= limit:
                    break
            return tasks

    def _count_ready(self, buckets: Sequence[int], kinds: Sequence[tuple[Step, str]], limit: int) -> dict[int, int]:
        """How many steps can be claimed, by bucket; a look costs an idle store nothing but the look."""
        clock = self._clock()
        calls = [
            self._call_bucket("ready", bucket, self._queues(bucket, kinds), clock, limit, *(step for step, _ in kinds))
            for bucket in buckets
        ]
        return {bucket: count for bucket, count in zip(buckets, self._servers.run(calls), strict=True) if count}

    def _queues(self, bucket: int, kinds: Sequence[tuple[Step, str]]) -> list[str]:
        return [self._keys.bucket(bucket), *(self._keys.queue(bucket, *kind) for kind in kinds)]

    def _claim_in(
        self, ready: Mapping[int, int], kinds: Sequence[tuple[Step, str]], limit: int, lease_seconds: float
    ) -> list[_Claimed]:
        """Claims from buckets that had something ready, evenly, at most `limit`."""
        shares = _share(ready, limit)
        clock, lease = self._clock(), _milliseconds(lease_seconds)
        calls = [
            self._call_bucket(
                "claim", bucket, self._queues(bucket, kinds), clock, share, lease, *(step for step, _ in kinds)
            )
            for bucket, share in shares.items()
        ]
        return [
            _Claimed(user_id.decode(), number, kinds[queue - 1][0], kinds[queue - 1][1], entry.decode(), attempts)
            for taken in self._servers.run(calls, durable=True)
            for queue, entry, attempts, user_id, number in taken
        ]

    def _fetch(self, claimed: Sequence[_Claimed]) -> list[Task]:
        """The tasks with what they read; those whose user was forgotten in between are left out."""
        calls = [
            function(
                self._keys.slots[self._keys.bucket_of(each.user_id)],
                "inputs",
                [self._keys.user(each.user_id), self._keys.steps(each.user_id)],
                each.step,
                each.number,
                each.fingerprint,
            )
            for each in claimed
        ]
        tasks = []
        for each, reply in zip(claimed, self._servers.run(calls), strict=True):
            if reply is None:
                continue
            held, first, second = reply
            entry, _, generation = held.decode().partition(" ")
            if entry == each.entry:
                tasks.append(_task(each, f"{entry} {generation} {each.attempts}", first, second))
        return tasks

    def renew(self, tasks: Sequence[Task], lease_seconds: float) -> list[Task]:
        """See `WorkQueue.renew`."""
        with self._use():
            clock, lease = self._clock(), _milliseconds(lease_seconds)
            self._know([task.fingerprint for task in tasks])
            replies = self._run_users(
                lambda: [self._call_user("renew", task.user_id, *_held(task), clock, lease) for task in tasks],
                durable=True,
            )
            return [task for task, reply in zip(tasks, replies, strict=True) if not reply]

    def commit(self, results: Sequence[Result]) -> Committed:
        """See `WorkQueue.commit`.

        Results of one user are kept in their order, each whole or not at all. A result that was kept by a server that
        was killed before it could say so is counted as discarded when it is sent again; its effect is there once.
        """
        made = [(result.task, check_made(result)) for result in results]
        fingerprints = {each.fingerprint for _, each in made if isinstance(each, Representation)}
        require_lines(fingerprints)
        with self._use():
            clock = self._clock()
            payloads = [_payload(each) for _, each in made]
            self._know([*fingerprints, *(task.fingerprint for task, _ in made)])
            replies = self._run_users(
                lambda: [
                    self._call_user("commit", task.user_id, *_held(task), clock, *payload)
                    for (task, _), payload in zip(made, payloads, strict=True)
                ],
                durable=True,
            )
            kept = sum(replies)
            return Committed(kept, len(results) - kept)

    def _ages(self, buckets: Sequence[Mapping[bytes, bytes]]) -> dict[Step, float]:
        """Seconds since the oldest step of each kind was queued, by the servers' clock; 0.0 where there is none.

        The first entry of a stream is its oldest, claimed or not, and its id begins with the time it came. So this is
        one look at each stream that holds anything, however long they are.

        Args:
            buckets: the counters and settings of each bucket.
        """
        calls = [Call(self._catalogue.slot, ("TIME",))]
        steps: list[Step] = []
        for bucket, held in zip(self._keys.buckets, buckets, strict=True):
            known = held.get(b"known", b"").decode().split("\n")
            for step in STEPS:
                if int(held.get(f"pending {step}".encode(), 0)) <= 0:
                    continue
                for fingerprint in {"", *known} if step == "representation" else ("",):
                    queue = self._keys.queue(bucket, step, fingerprint)
                    calls.append(Call(self._keys.slots[bucket], ("XRANGE", queue, "-", "+", "COUNT", 1)))
                    steps.append(step)
        ages: dict[Step, float] = dict.fromkeys(STEPS, 0.0)
        (seconds, microseconds), *oldest = self._servers.run(calls)
        for step, entries in zip(steps, oldest, strict=True):
            for entry, _ in entries:
                age = int(seconds) + int(microseconds) / 1e6 - int(entry.partition(b"-")[0]) / 1e3
                ages[step] = max(ages[step], age)
        return ages

    # -- the dead ------------------------------------------------------------------------------------------------

    def dead(self, limit: int = 1000) -> list[DeadStep]:
        """See `WorkQueue.dead`."""
        with self._use():
            found: list[DeadStep] = []
            for bucket in self._keys.buckets:
                for steps in self._scan_dead(bucket):
                    found += steps
                    if len(found) >= limit:
                        return found[:limit]
            return found

    def _scan_dead(self, bucket: int) -> Iterator[list[DeadStep]]:
        """The dead of a bucket, some at a time; each at least once."""
        cursor: bytes | str = "0"
        seen: set[bytes] = set()
        while True:
            command = ("HSCAN", self._keys.dead(bucket), cursor, "COUNT", _DEAD_PER_SCAN)
            cursor, pairs = self._servers.run_one(Call(self._keys.slots[bucket], command))
            fresh = [pair for pair in zip(pairs[::2], pairs[1::2], strict=True) if pair[0] not in seen]
            seen.update(field for field, _ in fresh)
            yield [_dead_step(*pair) for pair in fresh]
            if cursor == b"0":
                return

    def revive(self) -> int:
        """See `WorkQueue.revive`."""
        with self._use():
            revived = 0
            for bucket in self._keys.buckets:
                for steps in list(self._scan_dead(bucket)):
                    self._know([step.fingerprint for step in steps])
                    replies = self._run_users(
                        lambda steps=steps: [  # type: ignore[misc]
                            self._call_user("revive", each.user_id, each.step, each.number, each.fingerprint)
                            for each in steps
                        ],
                        durable=True,
                    )
                    revived += sum(replies)
            return revived

    # -- making things again -------------------------------------------------------------------------------------

    def rewrite(self, *, writer: str = "", prompt_version: str = "", user_ids: Collection[str] | None = None) -> int:
        """See `WorkQueue.rewrite`. Users are taken in turn; a rewrite that was cut short can be repeated."""
        with self._use():
            users = self._all_users() if user_ids is None else [list(dict.fromkeys(user_ids))]
            return sum(self._sweep("rewrite", part, writer, prompt_version) for part in users)

    def encode_by(self, fingerprints: Collection[str]) -> int:
        """See `WorkQueue.encode_by`.

        Every bucket knows the new encodings before the first user is looked at, so that whatever is committed
        meanwhile brings its own vectors. A change that was cut short is finished by repeating it.
        """
        require_lines(fingerprints)
        with self._use():
            wanted = "\n".join(sorted(set(fingerprints)))
            settings = [self._catalogue.settings]
            generation, before = self._servers.run_one(
                function(self._catalogue.slot, "change", settings, wanted), durable=True
            )
            kept = {*fingerprints, *before.decode().split("\n")} - {""}
            known = "\n".join(sorted(kept - {ANY}))
            replies = self._servers.run(
                [
                    self._call_bucket("want", bucket, [self._keys.bucket(bucket)], generation, wanted, known)
                    for bucket in self._keys.buckets
                ],
                durable=True,
            )
            self._know({each for reply in replies if reply for each in reply.decode().split("\n")})
            outdated = "" if ANY in kept else "\n".join(sorted({*self._encodings} - kept - {""}))
            queued = 0
            for part in self._all_users():
                self._run_users(
                    lambda part=part: [self._call_user("unencode", user_id, outdated) for user_id in part],  # type: ignore[misc]
                    durable=True,
                )
                queued += self._sweep("encode", part)
            self._servers.run_one(function(self._catalogue.slot, "finish", settings, generation), durable=True)
            return queued

    def _sweep(self, verb: str, user_ids: Sequence[str], *arguments: Argument) -> int:
        """Calls a function for ranges of these users' partitions; returns the sum of the replies."""
        total = 0
        for start in range(0, len(user_ids), _USERS_PER_ROUND):
            part = list(user_ids[start : start + _USERS_PER_ROUND])
            cuts = self._partitions_of(part)
            ranges = [
                (user_id, first, first + _PARTITIONS_PER_CALL - 1)
                for user_id in part
                for first in range(1, cuts[user_id] + 1, _PARTITIONS_PER_CALL)
            ]
            replies = self._run_users(
                lambda ranges=ranges: [  # type: ignore[misc]
                    self._call_user(verb, user_id, *arguments, first, last) for user_id, first, last in ranges
                ],
                durable=True,
            )
            total += sum(replies)
        return total

    def _partitions_of(self, user_ids: Sequence[str]) -> dict[str, int]:
        calls = [
            Call(self._keys.slots[self._keys.bucket_of(user_id)], ("HGET", self._keys.user(user_id), "cut"))
            for user_id in user_ids
        ]
        return {user_id: int(cut or 0) for user_id, cut in zip(user_ids, self._servers.run(calls), strict=True)}

    def _all_users(self) -> Iterator[list[str]]:
        """The users there are now, bucket by bucket."""
        for bucket in self._keys.buckets:
            members = self._servers.run_one(
                Call(self._keys.slots[bucket], ("ZRANGE", self._keys.registry(bucket), 0, -1))
            )
            if members:
                yield [member.decode() for member in members]


def _portions(buckets: range) -> Iterator[list[int]]:
    """All buckets from a random one on, few at first: where much is ready, a few are enough."""
    start, size = random.randrange(len(buckets)), _FIRST_LOOK
    order = [*buckets[start:], *buckets[:start]]
    while order:
        yield order[:size]
        order, size = order[size:], 4 * size


def _share(ready: Mapping[int, int], limit: int) -> dict[int, int]:
    """How many steps to take of each bucket: an even share, and what others leave over."""
    shares: dict[int, int] = {}
    left = limit
    for at, bucket in enumerate(sorted(ready, key=ready.__getitem__)):
        share = min(ready[bucket], -(-left // (len(ready) - at)))
        if share:
            shares[bucket] = share
            left -= share
    return shares


def _milliseconds(seconds: float) -> int:
    return int(min(max(seconds, 0.0), LONGEST_SECONDS) * 1000)


def _held(task: Task) -> Iterable[Argument]:
    """A task's step and the three parts of its claim, as the functions take them."""
    return (task.step, task.number, task.fingerprint, *task.claim.split(" "))


def _payload(made: Text | Representation | Failure) -> tuple[Argument, ...]:
    if isinstance(made, Text):
        return "text", dump_text(made)
    if isinstance(made, Representation):
        return "vector", made.fingerprint, made.vector.tobytes()
    if made.retry_seconds is None:
        return "dead", made.error[:MAX_ERROR_CHARACTERS].encode(errors="replace")
    return "retry", _milliseconds(made.retry_seconds), int(made.attempted)


def _task(claimed: _Claimed, claim: str, first: bytes, second: bytes) -> Task:
    user_id, number, step, fingerprint, _, attempts = claimed
    if step == "summary":
        profile, behaviors = load_attributes(first.decode()), tuple(load_run(user_id, second))
        return Task(user_id, number, step, claim, attempts, profile=profile, behaviors=behaviors)
    if step == "shift":
        return Task(user_id, number, step, claim, attempts, previous=words_of(first), summary=words_of(second))
    return Task(user_id, number, step, claim, attempts, fingerprint, summary=words_of(first), shift=words_of(second))


def _dead_step(name: bytes, value: bytes) -> DeadStep:
    step, number, fingerprint, user_id = name.decode().split("\n", 3)
    attempts, _, error = value.decode(errors="replace").partition("\n")
    assert step in STEPS
    return DeadStep(user_id, int(number), step, int(attempts), error, fingerprint)
