"""`MemoryStore` in one SQLite file: the embedded default.

WAL, so that reading never waits for a writer; ``synchronous=FULL``, so that what is acknowledged is on the disk; group
commit, so that many threads that append wait for the disk together. Any number of processes may open the same file.

Erasing: deleted content is overwritten with zeros (``secure_delete``) and `SQLiteStore.forget` empties the write-ahead
log. What SQLite moved from page to page earlier may have left copies in unused parts of pages; `SQLiteStore.close`
therefore rewrites the file (``VACUUM``) if something was forgotten. Copies that the file system, its snapshots or a
backup made are beyond its reach.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from liber_runtime.behavior import Attributes, Behavior, Domain, Item, Text
from liber_runtime.memory import (
    STEPS,
    Appended,
    Forgotten,
    Mark,
    PartitionRecord,
    Representation,
    Statistics,
    Step,
    Timeline,
    UserMemory,
)
from liber_runtime.memory.checks import check_arrival, name_condition, read_condition, require_condition
from liber_runtime.memory.packing import (
    PackedRun,
    dump_attributes,
    event_digest,
    load_attributes,
    pack,
    unpack,
)
from liber_runtime.memory.sqlite.erasing import forget_event, forget_user
from liber_runtime.memory.sqlite.file import StoreFile
from liber_runtime.memory.sqlite.queue import TEXT_FIELDS, SQLiteQueue, count
from liber_runtime.memory.sqlite.reading import keep_behaviors, read_users, wanted_of
from liber_runtime.partition import PartitionCondition, stream


class _Held(NamedTuple):
    """What is held of one user while an append is under way."""

    user: int
    behaviors: int
    partitions: int
    cache: PackedRun


class SQLiteStore(SQLiteQueue):
    """`liber_runtime.memory.MemoryStore` in one file; see there for what each method promises.

    A store object belongs to the process that opened it; other processes open the file themselves.

    Args:
        path: the file; made, with its directory, if it is missing.
        condition: when the cache is cut. Fixed when the file is made (default ``count(20)``); None takes the file's
            own. One that cannot be read back from its text (`InterestDrift`) must be given again by whoever appends.
        clock: seconds since 1970-01-01 UTC; what leases and retries are measured with.

    Raises:
        ConfigurationError: a condition that is not the file's.
        StoreError: the file cannot be opened, is not a store, or was made by a newer version.
    """

    def __init__(
        self, path: str, condition: PartitionCondition | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(StoreFile(path), clock)
        try:
            self._given, self._condition_text = condition, self._agree_on(condition)
        except BaseException:
            self._file.close(lambda db: None)
            raise

    def _agree_on(self, condition: PartitionCondition | None) -> str:
        """Keeps the condition of a new file; checks it against, or takes it from, one that exists."""
        wanted = name_condition(condition)
        query = "SELECT value FROM settings WHERE name = 'condition'"
        with self._file.read() as db:
            row = db.execute(query).fetchone()
        if row is None:

            def settle(db: sqlite3.Connection) -> tuple[str]:
                db.execute("INSERT OR IGNORE INTO settings VALUES ('condition', ?)", (wanted,))
                kept: tuple[str] = db.execute(query).fetchone()
                return kept

            row = self._file.write(settle)
        require_condition(row[0], condition, self._file.path)
        return str(row[0])

    # -- description ---------------------------------------------------------------------------------------------

    @property
    def domain(self) -> Domain | None:
        """See `MemoryStore.domain`."""
        with self._file.read() as db:
            row = db.execute("SELECT value FROM settings WHERE name = 'domain'").fetchone()
        return Domain(**load_attributes(row[0])) if row else None

    @property
    def condition(self) -> PartitionCondition:
        """See `MemoryStore.condition`.

        Raises:
            ConfigurationError: the file's condition cannot be read back from its text and was not given.
        """
        if self._given is None:
            self._given = read_condition(self._condition_text, self._file.path)
        return self._given

    def describe(
        self,
        domain: Domain | None = None,
        items: Iterable[Item] = (),
        profiles: Mapping[str, Attributes] | None = None,
    ) -> None:
        """See `MemoryStore.describe`."""
        catalogue = [(item.item_id, item.title, dump_attributes(item.attributes)) for item in items]
        people = [(user_id, dump_attributes(profile)) for user_id, profile in (profiles or {}).items()]

        def keep(db: sqlite3.Connection) -> None:
            if domain is not None:
                text = dump_attributes(dataclasses.asdict(domain))
                db.execute("INSERT OR REPLACE INTO settings VALUES ('domain', ?)", (text,))
            db.executemany(
                "INSERT INTO items VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET title = excluded.title, attributes = excluded.attributes",
                catalogue,
            )
            db.executemany(
                "INSERT INTO users (user_id, profile) VALUES (?, ?)"
                " ON CONFLICT (user_id) DO UPDATE SET profile = excluded.profile",
                people,
            )

        self._file.write(keep)

    def items(self, item_ids: Collection[str]) -> dict[str, Item]:
        """See `MemoryStore.items`."""
        found = {}
        with self._file.read() as db:
            for item_id in set(item_ids):
                row = db.execute("SELECT title, attributes FROM items WHERE item_id = ?", (item_id,)).fetchone()
                if row:
                    found[item_id] = Item(item_id, row[0], load_attributes(row[1]))
        return found

    # -- behaviors -----------------------------------------------------------------------------------------------

    def append(self, behaviors: Sequence[Behavior], mark: Mark | None = None) -> Appended:
        """See `MemoryStore.append`."""
        check_arrival(behaviors)
        condition = self.condition
        by_user: defaultdict[str, dict[bytes, Behavior]] = defaultdict(dict)
        for behavior in behaviors:
            by_user[behavior.user_id].setdefault(event_digest(behavior.event_id), behavior)

        def keep(db: sqlite3.Connection) -> tuple[int, int]:
            held = _hold(db, by_user)
            arriving = _enter(db, held, by_user)
            kept = sum(map(len, arriving.values()))
            cut = self._stream(db, condition, held, arriving)
            new_users = sum(bool(fresh) and not held[user_id].behaviors for user_id, fresh in arriving.items())
            count(db, users=new_users, behaviors=kept, partitions=cut)
            if mark is not None:
                db.execute(
                    "INSERT INTO marks VALUES (?, ?)"
                    " ON CONFLICT DO UPDATE SET position = max(position, excluded.position)",
                    (mark.source, mark.position),
                )
            return kept, cut

        kept, cut = self._file.write(keep) if by_user or mark else (0, 0)
        return Appended(kept, len(behaviors) - kept, cut)

    def _stream(
        self,
        db: sqlite3.Connection,
        condition: PartitionCondition,
        held: Mapping[str, _Held],
        arriving: Mapping[str, Mapping[bytes, Behavior]],
    ) -> int:
        """Runs Algorithm 1 for every user; returns how many partitions were cut."""
        partitions: list[tuple[object, ...]] = []
        copies: list[tuple[object, ...]] = []
        caches: list[tuple[object, ...]] = []
        for user_id, fresh in arriving.items():
            user, behaviors, number, cache = held[user_id]
            if not fresh:
                continue
            streamed = stream(condition, cache, fresh.values(), _last_partition(db, user, user_id, number))
            if streamed.partitions:
                packed = [pack(cut) for cut in streamed.partitions]
                partitions += ((user, number + at, *cut) for at, cut in enumerate(packed, 1))
                copies.append(keep_behaviors(db, user, number, packed))
            caches.append((behaviors + len(fresh), number + len(streamed.partitions), *pack(streamed.cache), user))
        now = self._clock()
        db.executemany("INSERT INTO partitions VALUES (?, ?, ?, ?, ?, ?)", partitions)
        db.executemany("INSERT OR REPLACE INTO newest_behaviors VALUES (?, ?, ?, ?, ?)", copies)
        db.executemany(
            "INSERT INTO steps (user, number, step, due, since) VALUES (?, ?, 'summary', ?, ?)",
            ((row[0], row[1], now, now) for row in partitions),
        )
        db.executemany(
            "UPDATE users SET behaviors = ?, partitions = ?, item_ids = ?, feedback = ?, timestamps = ?, event_ids = ?"
            " WHERE user = ?",
            caches,
        )
        return len(partitions)

    def position(self, source: str) -> int:
        """See `MemoryStore.position`."""
        with self._file.read() as db:
            row = db.execute("SELECT position FROM marks WHERE source = ?", (source,)).fetchone()
        return int(row[0]) if row else 0

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, user_ids: Sequence[str], history: int, partitions: int, fingerprint: str) -> list[UserMemory | None]:
        """See `MemoryStore.read`."""
        if not user_ids:
            return []
        with self._file.read() as db:
            encoding, wanted = wanted_of(db, fingerprint)
            found = read_users(db, list(dict.fromkeys(user_ids)), history, partitions, encoding, wanted)
        return [found[user_id] for user_id in user_ids]

    def users(self) -> list[str]:
        """See `MemoryStore.users`; in the order they first came."""
        with self._file.read() as db:
            return [user_id for (user_id,) in db.execute("SELECT user_id FROM users ORDER BY user")]

    def timeline(self, user_id: str) -> Timeline | None:
        """See `MemoryStore.timeline`."""
        with self._file.read() as db:
            row = db.execute(
                "SELECT user, profile, item_ids, feedback, timestamps, event_ids FROM users WHERE user_id = ?",
                (user_id,),
            ).fetchone()
            if row is None:
                return None
            user, profile, *cache = row
            texts = {
                (number, values[0]): Text(*values)
                for number, *values in db.execute(
                    f"SELECT number, {', '.join(TEXT_FIELDS)} FROM texts WHERE user = ?", (user,)
                )
            }
            vectors: dict[int, dict[str, Representation]] = {}
            for number, vector, fingerprint in db.execute(
                "SELECT number, vector, fingerprint FROM representations JOIN encodings USING (encoding)"
                " WHERE user = ?",
                (user,),
            ):
                vectors.setdefault(number, {})[fingerprint] = Representation(np.frombuffer(vector, "<f4"), fingerprint)
            records = tuple(
                PartitionRecord(
                    number,
                    tuple(unpack(user_id, *packed)),
                    texts.get((number, "summary")),
                    texts.get((number, "shift")),
                    vectors.get(number, {}),
                )
                for number, *packed in db.execute(
                    "SELECT number, item_ids, feedback, timestamps, event_ids FROM partitions"
                    " WHERE user = ? ORDER BY number",
                    (user,),
                )
            )
        return Timeline(user_id, load_attributes(profile), records, tuple(unpack(user_id, *cache)))

    def forget(self, user_id: str, event_id: str | None = None) -> Forgotten:
        """See `MemoryStore.forget`."""

        def erase(db: sqlite3.Connection) -> Forgotten | None:
            row = db.execute("SELECT user FROM users WHERE user_id = ?", (user_id,)).fetchone()
            if row is None:
                return None
            if event_id is None:
                return forget_user(db, row[0])
            return forget_event(db, row[0], user_id, event_id, self._clock())

        forgotten = self._file.write(erase)
        if forgotten is None:
            return Forgotten(0, 0)
        self._file.empty_log()
        return forgotten

    def statistics(self) -> Statistics:
        """See `MemoryStore.statistics`."""
        oldest = "SELECT min(since) FROM steps WHERE step = ?"
        with self._file.read() as db:
            totals = dict(db.execute("SELECT name, value FROM counters").fetchall())
            since: dict[Step, float | None] = {step: db.execute(oldest, (step,)).fetchone()[0] for step in STEPS}
            encodings = db.execute("SELECT fingerprint, vectors, wanted FROM encodings ORDER BY encoding").fetchall()
        now = self._clock()
        return Statistics(
            users=totals["users"],
            behaviors=totals["behaviors"],
            items=totals["items"],
            partitions=totals["partitions"],
            pending={step: totals[f"pending {step}"] for step in STEPS},
            age_seconds={step: 0.0 if at is None else max(now - at, 0.0) for step, at in since.items()},
            dead={step: totals[f"dead {step}"] for step in STEPS},
            repeated=totals["repeated"],
            vectors={fingerprint: vectors for fingerprint, vectors, _ in encodings if vectors},
            encodings=frozenset(fingerprint for fingerprint, _, wanted in encodings if wanted),
        )

    def close(self) -> None:
        """See `MemoryStore.close`.

        If something was forgotten, the file is rewritten, which takes time and room in proportion to its size. Where
        that fails (no room, another process writes) the next close does it.
        """
        self._file.close(_scrub)


def _scrub(db: sqlite3.Connection) -> None:
    """Rewrites the file if something was forgotten since that was last done."""
    ((forgotten,),) = db.execute("SELECT value FROM counters WHERE name = 'unscrubbed'")
    if forgotten:
        db.execute("VACUUM")
        count(db, unscrubbed=-forgotten)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _hold(db: sqlite3.Connection, user_ids: Collection[str]) -> dict[str, _Held]:
    """What is held of users; new ones get numbers."""
    wanted = (json.dumps(list(user_ids)),)
    db.execute("INSERT OR IGNORE INTO users (user_id) SELECT value FROM json_each(?)", wanted)
    return {
        user_id: _Held(user, behaviors, partitions, PackedRun(user_id, (item_ids, feedback, timestamps, event_ids)))
        for user_id, user, behaviors, partitions, item_ids, feedback, timestamps, event_ids in db.execute(
            "SELECT user_id, user, behaviors, partitions, item_ids, feedback, timestamps, event_ids"
            " FROM json_each(?) CROSS JOIN users ON user_id = value",
            wanted,
        )
    }


def _enter(
    db: sqlite3.Connection, held: Mapping[str, _Held], by_user: Mapping[str, Mapping[bytes, Behavior]]
) -> Mapping[str, Mapping[bytes, Behavior]]:
    """Enters event ids; returns the behaviors whose ids the user never had: nearly always all of them."""
    # In key order, so that a long-standing user's many new ids touch each page of the index once.
    rows = [(held[user_id].user, digest) for user_id, fresh in by_user.items() for digest in sorted(fresh)]
    db.execute("SAVEPOINT events")
    entered = db.executemany("INSERT OR IGNORE INTO events VALUES (?, ?)", rows).rowcount
    if entered == len(rows):
        db.execute("RELEASE events")
        return by_user
    # Some are known: which ones is found out before they are entered.
    db.execute("ROLLBACK TO events")
    db.execute("RELEASE events")
    arriving = {user_id: _unknown(db, held[user_id].user, fresh) for user_id, fresh in by_user.items()}
    db.executemany(
        "INSERT INTO events VALUES (?, ?)",
        [(held[user_id].user, digest) for user_id, fresh in arriving.items() for digest in sorted(fresh)],
    )
    return arriving


def _unknown(db: sqlite3.Connection, user: int, arriving: Mapping[bytes, Behavior]) -> Mapping[bytes, Behavior]:
    query = "SELECT 1 FROM events WHERE user = ? AND digest = ?"
    known = {digest for digest in sorted(arriving) if db.execute(query, (user, digest)).fetchone()}
    return {digest: behavior for digest, behavior in arriving.items() if digest not in known}


def _last_partition(db: sqlite3.Connection, user: int, user_id: str, number: int) -> Callable[[], Sequence[Behavior]]:
    """Fetches the last partition when, and only when, the condition asks for it."""
    fetched: list[Sequence[Behavior]] = []

    def fetch() -> Sequence[Behavior]:
        if not fetched:
            row = db.execute(
                "SELECT item_ids, feedback, timestamps, event_ids FROM partitions WHERE user = ? AND number = ?",
                (user, number),
            ).fetchone()
            fetched.append(unpack(user_id, *row) if row else ())
        return fetched[0]

    return fetch
