"""`MemoryStore` in Redis: one server, or a cluster of them.

What changes together lies in one slot: a user's behaviors, texts, vectors and steps, and the queues and counters of the
bucket that the user is in. So each change is one call of a function inside Redis, whole or not at all, and a read is
one round trip to each server that has any of the users.

Erasing deletes keys and fields at once. Copies stay in the append-only file until Redis next rewrites it
(``BGREWRITEAOF``), and in backups.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from liber_runtime.behavior import Attributes, Behavior, Domain, Item
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import (
    STEPS,
    Appended,
    Forgotten,
    Mark,
    PartitionRecord,
    Representation,
    Statistics,
    Timeline,
    UserMemory,
)
from liber_runtime.memory.checks import check_arrival, name_condition, read_condition, require_condition
from liber_runtime.memory.packing import dump_attributes, event_digest, load_attributes, stack_vectors
from liber_runtime.memory.redis.address import Address, parse_address
from liber_runtime.memory.redis.appending import Appender
from liber_runtime.memory.redis.keys import Catalogue, Keys
from liber_runtime.memory.redis.queue import RedisQueue
from liber_runtime.memory.redis.records import (
    dump_item,
    dump_run,
    load_item,
    load_run,
    load_text,
    newest_of,
    newest_of_two,
)
from liber_runtime.memory.redis.servers import Call, Servers, function
from liber_runtime.partition import PartitionCondition

FORMAT = "1"
"""Of what lies in Redis; another one is refused."""

_ITEMS_PER_CALL = 500
_PARTITIONS_PER_LOOK = 1_000
_FIELDS = b"\r\n$7\r\nprofile\r\n$3\r\ncut\r\n$5\r\ncache\r\n$4\r\nlast\r\n$9\r\nencodings\r\n"


class RedisStore(RedisQueue):
    """`liber_runtime.memory.MemoryStore` in Redis; see there for what each method promises.

    A store object belongs to the process that opened it, and may be shared by its threads.

    Args:
        url: see `parse_address`.
        condition: when the cache is cut. Fixed when the store is made (default ``count(20)``); None takes the store's
            own. One that cannot be read back from its text (`InterestDrift`) must be given again by whoever appends.
        create: make the store if there is none.
        clock: seconds since 1970-01-01 UTC for leases and retries; None for the servers' own.

    Raises:
        ConfigurationError: a URL that is not understood, a condition that is not the store's, or no store.
        StoreError: Redis cannot be reached or refuses us, or a newer version made the store.
    """

    def __init__(
        self,
        url: str,
        condition: PartitionCondition | None = None,
        *,
        create: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        address = parse_address(url)
        servers = Servers(address)
        try:
            catalogue = Catalogue(address.name)
            self._condition_text, buckets = _agree(servers, catalogue, address, condition, create)
        except BaseException:
            servers.close()
            raise
        super().__init__(servers, Keys(address.name, buckets), catalogue, clock)
        self._given = condition
        self._appender = Appender(servers, self._keys)

    # -- description ---------------------------------------------------------------------------------------------

    @property
    def domain(self) -> Domain | None:
        """See `MemoryStore.domain`."""
        with self._use():
            kept = self._setting("domain")
            return Domain(**load_attributes(kept.decode())) if kept else None

    @property
    def condition(self) -> PartitionCondition:
        """See `MemoryStore.condition`.

        Raises:
            ConfigurationError: the store's condition cannot be read back from its text and was not given.
        """
        if self._given is None:
            self._given = read_condition(self._condition_text, str(self._servers.address))
        return self._given

    def describe(
        self,
        domain: Domain | None = None,
        items: Iterable[Item] = (),
        profiles: Mapping[str, Attributes] | None = None,
    ) -> None:
        """See `MemoryStore.describe`."""
        with self._use():
            # All of it is made ready before any of it is sent: text that cannot be kept is refused whole.
            slot, catalogue = self._catalogue.slot, self._catalogue
            calls = []
            if domain is not None:
                text = dump_attributes(dataclasses.asdict(domain)).encode()
                calls.append(Call(slot, ("HSET", catalogue.settings, "domain", text)))
            fields = [part for item in items for part in (item.item_id.encode(), dump_item(item))]
            for start in range(0, len(fields), 2 * _ITEMS_PER_CALL):
                calls.append(Call(slot, ("HSET", catalogue.items, *fields[start : start + 2 * _ITEMS_PER_CALL])))
            moment = time.time()
            for number, (user_id, profile) in enumerate((profiles or {}).items()):
                bucket = self._keys.bucket_of(user_id)
                keys = [self._keys.user(user_id), self._keys.registry(bucket)]
                text = dump_attributes(profile).encode()
                calls.append(
                    self._call_bucket("describe", bucket, keys, user_id, text, f"{moment + number * 1e-6:.6f}")
                )
            self._servers.run(calls, durable=True)

    def items(self, item_ids: Collection[str]) -> dict[str, Item]:
        """See `MemoryStore.items`."""
        with self._use():
            wanted = list(dict.fromkeys(item_ids))
            parts = [wanted[start : start + _ITEMS_PER_CALL] for start in range(0, len(wanted), _ITEMS_PER_CALL)]
            calls = [Call(self._catalogue.slot, ("HMGET", self._catalogue.items, *part)) for part in parts]
            return {
                item_id: load_item(item_id, record)
                for part, records in zip(parts, self._servers.run(calls), strict=True)
                for item_id, record in zip(part, records, strict=True)
                if record is not None
            }

    # -- behaviors -----------------------------------------------------------------------------------------------

    def append(self, behaviors: Sequence[Behavior], mark: Mark | None = None) -> Appended:
        """See `MemoryStore.append`."""
        with self._use():
            condition = self.condition
            check_arrival(behaviors)
            kept, partitions = self._appender.append(condition, behaviors)
            if mark is not None:
                call = function(
                    self._catalogue.slot, "mark", [self._catalogue.marks], mark.source.encode(), mark.position
                )
                self._servers.run_one(call, durable=True)
            return Appended(kept, len(behaviors) - kept, partitions)

    def position(self, source: str) -> int:
        """See `MemoryStore.position`."""
        with self._use():
            call = Call(self._catalogue.slot, ("HGET", self._catalogue.marks, source.encode()))
            return int(self._servers.run_one(call) or 0)

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, user_ids: Sequence[str], history: int, partitions: int, fingerprint: str) -> list[UserMemory | None]:
        """See `MemoryStore.read`. Users are read one by one, each in one state; all of them in one round trip."""
        with self._use():
            asked = list(dict.fromkeys(user_ids))
            newest = max(partitions, 0)
            replies = self._servers.run(self._call_for_scoring(asked, newest, fingerprint))
            found: dict[str, UserMemory | None] = {}
            lacking = []
            for user_id, held, members in zip(asked, replies[::2], replies[1::2], strict=True):
                found[user_id], is_all = _load_memory(held, members, history, newest)
                if not is_all:
                    lacking.append(user_id)
            if lacking:
                found |= self._read_further(lacking, history, newest, fingerprint)
            return [found[user_id] for user_id in user_ids]

    def _call_for_scoring(self, user_ids: Sequence[str], newest: int, fingerprint: str) -> list[Call]:
        """Two plain commands for each user, packed by hand: a score asks for many users and waits for all of them."""
        # The newest 0 are asked for as an empty range.
        first, last = ("0", str(newest - 1)) if newest else ("1", "0")
        end = f"\r\n$1\r\n{first}\r\n${len(last)}\r\n{last}\r\n$3\r\nREV\r\n".encode()
        calls = []
        for user_id in user_ids:
            slot, user, vectors = self._keys.for_scoring(user_id, fingerprint)
            user_key, vectors_key = user.encode(), vectors.encode()
            calls.append(Call(slot, b"*7\r\n$5\r\nHMGET\r\n$%d\r\n%b%b" % (len(user_key), user_key, _FIELDS)))
            calls.append(Call(slot, b"*5\r\n$6\r\nZRANGE\r\n$%d\r\n%b%b" % (len(vectors_key), vectors_key, end)))
        return calls

    def _read_further(
        self, user_ids: Sequence[str], history: int, partitions: int, fingerprint: str
    ) -> dict[str, UserMemory | None]:
        """Reads users of whom the first look did not bring all: a history over several partitions, vectors of others.

        Returns:
            By user; see `MemoryStore.read`.
        """
        calls = []
        for user_id in user_ids:
            bucket = self._keys.bucket_of(user_id)
            keys = [self._keys.user(user_id), self._keys.vectors(user_id, fingerprint), self._keys.bucket(bucket)]
            calls.append(self._call_bucket("read", bucket, keys, history, partitions, fingerprint))
        found: dict[str, UserMemory | None] = {}
        for user_id, reply in zip(user_ids, self._servers.run(calls), strict=True):
            if reply is None:
                found[user_id] = None
                continue
            profile, runs, members, foreign = reply
            others = frozenset(foreign.decode().split("\n")) if foreign else frozenset[str]()
            found[user_id] = UserMemory(
                load_attributes(profile.decode()), newest_of(runs, history), _load_matrix(members), others
            )
        return found

    def users(self) -> list[str]:
        """See `MemoryStore.users`. In the order they came, by the clocks of those who brought them."""
        with self._use():
            calls = [
                Call(self._keys.slots[bucket], ("ZRANGE", self._keys.registry(bucket), 0, -1, "WITHSCORES"))
                for bucket in self._keys.buckets
            ]
            arrivals = [
                (float(score), member.decode())
                for reply in self._servers.run(calls)
                for member, score in zip(reply[::2], reply[1::2], strict=True)
            ]
            return [user_id for _, user_id in sorted(arrivals)]

    def timeline(self, user_id: str) -> Timeline | None:
        """See `MemoryStore.timeline`. A long history is read in parts, again if behaviors came in between."""
        with self._use():
            while True:
                records: list[PartitionRecord] = []
                first, revision = 1, None
                while True:
                    last = first + _PARTITIONS_PER_LOOK - 1
                    (reply,) = self._run_users(
                        lambda first=first, last=last: [self._call_user("timeline", user_id, first, last)]  # type: ignore[misc]
                    )
                    if reply is None:
                        return None
                    if revision not in (None, reply[0]):
                        break
                    revision, cut, profile, cache, rows, fingerprints, vectors = reply
                    by_encoding = dict(zip(map(bytes.decode, fingerprints), vectors, strict=True))
                    records += _load_records(user_id, first, rows, by_encoding)
                    if cut <= last:
                        behaviors = tuple(load_run(user_id, cache))
                        return Timeline(user_id, load_attributes(profile.decode()), tuple(records), behaviors)
                    first = last + 1

    def statistics(self) -> Statistics:
        """See `MemoryStore.statistics`."""
        with self._use():
            calls = [
                Call(self._keys.slots[bucket], ("HGETALL", self._keys.bucket(bucket))) for bucket in self._keys.buckets
            ]
            calls.append(Call(self._catalogue.slot, ("HLEN", self._catalogue.items)))
            *replies, items = self._servers.run(calls)
            buckets = [dict(zip(reply[::2], reply[1::2], strict=True)) for reply in replies]
            totals: dict[str, int] = {}
            for held in buckets:
                for name, value in held.items():
                    if name not in (b"wanted", b"known", b"generation"):
                        totals[name.decode()] = totals.get(name.decode(), 0) + int(value)
            vectors = {name[8:]: count for name, count in totals.items() if name.startswith("vectors ") and count}
            wanted = self._setting("wanted") or b""
            ages = self._ages(buckets)
        return Statistics(
            users=totals.get("users", 0),
            behaviors=totals.get("behaviors", 0),
            items=items,
            partitions=totals.get("partitions", 0),
            pending={step: totals.get(f"pending {step}", 0) for step in STEPS},
            age_seconds=ages,
            dead={step: totals.get(f"dead {step}", 0) for step in STEPS},
            repeated=totals.get("repeated", 0),
            vectors=vectors,
            encodings=frozenset(wanted.decode().split("\n")) - {""},
        )

    # -- erasing -------------------------------------------------------------------------------------------------

    def forget(self, user_id: str, event_id: str | None = None) -> Forgotten:
        """See `MemoryStore.forget`."""
        with self._use():
            try:
                if event_id is not None:
                    return self._forget_event(user_id, event_id)
                ((behaviors, partitions),) = self._run_users(lambda: [self._call_user("forget", user_id)], durable=True)
                return Forgotten(behaviors, partitions)
            finally:
                self._appender.forget(user_id)

    def _forget_event(self, user_id: str, event_id: str) -> Forgotten:
        token = secrets.token_bytes(12)
        while True:
            found = self._find(user_id, event_id)
            if found is None:
                return Forgotten(0, 0)
            revision, number, run = found
            rest = dump_run([each for each in load_run(user_id, run) if each.event_id != event_id])
            (erased,) = self._run_users(
                lambda rest=rest, revision=revision, number=number: [  # type: ignore[misc]
                    self._call_user("erase", user_id, token, revision, number, rest)
                ],
                durable=True,
            )
            if erased:
                return Forgotten(1, 0)

    def _find(self, user_id: str, event_id: str) -> tuple[bytes, int, bytes] | None:
        """Revision, partition (0 for the cache) and run that hold a behavior."""
        bucket = self._keys.bucket_of(user_id)
        keys, first = [self._keys.user(user_id), self._keys.events(user_id)], 1
        while True:
            last = first + _PARTITIONS_PER_LOOK - 1
            call = self._call_bucket("find", bucket, keys, event_id, event_digest(event_id), first, last)
            revision, cut, *found = self._servers.run_one(call)
            if found:
                return revision, found[0], found[1]
            if cut <= last:
                return None
            first = last + 1

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See `MemoryStore.close`."""
        self._closed = True
        self._servers.close()

    def _setting(self, name: str) -> bytes | None:
        kept: bytes | None = self._servers.run_one(Call(self._catalogue.slot, ("HGET", self._catalogue.settings, name)))
        return kept


def _agree(
    servers: Servers, catalogue: Catalogue, address: Address, condition: PartitionCondition | None, create: bool
) -> tuple[str, int]:
    """The condition and the number of buckets that hold for all processes; the first one to come decides."""
    wanted = name_condition(condition)
    if not create and servers.run_one(Call(catalogue.slot, ("HGET", catalogue.settings, "condition"))) is None:
        raise ConfigurationError(
            f"there is no store {address}; name another with --store or LIBER_STORE, or make one with `liber ingest` "
            "or `liber build`"
        )
    choices = ("format", FORMAT, "condition", wanted, "buckets", address.buckets)
    call = function(catalogue.slot, "agree", [catalogue.settings], *choices)
    made_by, kept, buckets = (value.decode() for value in servers.run_one(call, durable=True))
    if made_by != FORMAT:
        raise ConfigurationError(
            f"store {address} has format {made_by}, this liber-runtime knows {FORMAT}; upgrade liber-runtime"
        )
    require_condition(kept, condition, str(address))
    return kept, int(buckets)


def _load_memory(
    held: Sequence[bytes | None], members: Sequence[bytes], history: int, newest: int
) -> tuple[UserMemory | None, bool]:
    """A user's memory from what the first look brought, and whether that is all of it."""
    profile, cut, cache, last, encodings = held
    if profile is None and cut is None:
        return None, True
    known, partitions = newest_of_two(last or b"", cache or b"", history), int(cut or 0)
    is_all = (len(known) >= history or partitions < 2) and (bool(members) or not encodings or not newest)
    attributes = load_attributes(profile.decode()) if profile else {}
    return UserMemory(attributes, known, _load_matrix(members)), is_all


def _load_matrix(members: Sequence[bytes]) -> npt.NDArray[np.float32]:
    """float32[J, d] of members of a sorted set, newest first; [J, 0] if they are not of one length."""
    matrix = stack_vectors(members[::-1])
    # Without the numbers that lead the members: one copy of all, and none of each.
    return matrix[:, 1:]


def _load_records(
    user_id: str, first: int, rows: Sequence[Sequence[bytes | None]], vectors: Mapping[str, Sequence[bytes]]
) -> list[PartitionRecord]:
    """The partitions from number `first` on."""
    made: dict[int, dict[str, Representation]] = {}
    for fingerprint, members in vectors.items():
        for member in members:
            vector = np.frombuffer(member, "<f4", offset=4)
            made.setdefault(int.from_bytes(member[:4], "big"), {})[fingerprint] = Representation(vector, fingerprint)
    return [
        PartitionRecord(
            number,
            tuple(load_run(user_id, run or b"")),
            load_text("summary", summary) if summary else None,
            load_text("shift", shift) if shift else None,
            made.get(number, {}),
        )
        for number, (run, summary, shift) in enumerate(rows, first)
    ]
