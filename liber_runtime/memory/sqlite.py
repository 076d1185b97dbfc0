"""`MemoryStore` in one SQLite file: the embedded default.

WAL, so that reading never waits for a writer; ``synchronous=FULL``, so that what is acknowledged is on the disk.
One connection writes, behind a lock; each thread that reads borrows a connection of its own. Any number of
processes may open the same file.

Erasing: deleted content is overwritten with zeros (``secure_delete``) and `SQLiteStore.forget` empties the write-ahead
log. What SQLite moved from page to page earlier may have left copies in unused parts of pages; `SQLiteStore.close`
therefore rewrites the file (``VACUUM``) if someone was forgotten. Copies that the file system, its snapshots or a
backup made are beyond its reach.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from liber_runtime.behavior import Attributes, Behavior, Domain, Item, Text
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, StoreError
from liber_runtime.memory import (
    STEPS,
    Appended,
    Committed,
    Forgotten,
    PartitionRecord,
    Representation,
    Result,
    Statistics,
    Step,
    Task,
    Timeline,
    UserMemory,
)
from liber_runtime.memory.packing import dump_attributes, load_attributes, newest, pack, unpack
from liber_runtime.memory.sqlite_schema import BUSY_SECONDS, migrate, remedy_for, use_wal
from liber_runtime.partition import Count, PartitionCondition, parse_condition, stream

MAX_ERROR_CHARACTERS = 2000
"""Of an error kept with a step that failed."""

_LOG_SECONDS = 1.0  # reads last milliseconds; whoever reads longer is not waited for
_LEAST_SQLITE = (3, 37, 0)  # the first with STRICT tables
_NO_VECTORS = np.zeros((0, 0), dtype=np.float32)


class _Held(NamedTuple):
    """What is held of one user while an append is under way."""

    user: int
    partitions: int
    cache: list[Behavior]


class SQLiteStore:
    """`liber_runtime.memory.MemoryStore` in one file; see there for what each method promises.

    A claim whose lease has expired can still be committed until someone else takes it: the work is paid for.
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
        self._path = str(Path(path).absolute())
        self._clock = clock
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._idle_readers: list[sqlite3.Connection] = []
        if sqlite3.sqlite_version_info < _LEAST_SQLITE:
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; use a Python with SQLite 3.37 or newer")
        with self._explained():
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect()
            try:
                use_wal(self._writer)
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.execute("PRAGMA secure_delete = ON")
                self._writer.execute("PRAGMA foreign_keys = ON")
                self._writer.execute("PRAGMA wal_autocheckpoint = 4000")
                migrate(self._writer, self._path)
                self._given, self._condition_text = self._agree_on(condition)
            except BaseException:
                self._writer.close()
                raise

    def _agree_on(self, condition: PartitionCondition | None) -> tuple[PartitionCondition | None, str]:
        """Keeps the condition of a new file; checks it against, or takes it from, one that exists."""
        kind = type(condition)
        if condition is not None and (kind.__str__, kind.__repr__) == (object.__str__, object.__repr__):
            raise ConfigurationError(
                f"partition condition {kind.__name__} does not say what it is; give it a __str__ that names "
                "its settings, so that the store knows it again"
            )
        wanted = str(condition or Count())
        query = "SELECT value FROM settings WHERE name = 'condition'"
        row = self._writer.execute(query).fetchone()
        if row is None:
            self._writer.execute("INSERT OR IGNORE INTO settings VALUES ('condition', ?)", (wanted,))
            row = self._writer.execute(query).fetchone()
        (kept,) = row
        if condition is not None and kept != wanted:
            raise ConfigurationError(
                f"store {self._path} cuts partitions by {kept}, not {wanted}; leave the condition out to take the "
                "store's own, or make a new store"
            )
        return condition, kept

    # -- description ---------------------------------------------------------------------------------------------

    @property
    def domain(self) -> Domain | None:
        """See `MemoryStore.domain`."""
        with self._read() as db:
            row = db.execute("SELECT value FROM settings WHERE name = 'domain'").fetchone()
        return Domain(**load_attributes(row[0])) if row else None

    @property
    def condition(self) -> PartitionCondition:
        """See `MemoryStore.condition`.

        Raises:
            ConfigurationError: the file's condition cannot be read back from its text and was not given.
        """
        if self._given is None:
            try:
                self._given = parse_condition(self._condition_text)
            except ConfigurationError:
                raise ConfigurationError(
                    f"store {self._path} cuts partitions by {self._condition_text}, which is made in Python only; "
                    "open the store with that condition to append to it"
                ) from None
        return self._given

    def put_items(self, domain: Domain, items: Iterable[Item]) -> None:
        """See `MemoryStore.put_items`."""
        rows = [(item.item_id, item.title, dump_attributes(item.attributes)) for item in items]
        with self._write() as db:
            db.execute(
                "INSERT OR REPLACE INTO settings VALUES ('domain', ?)", (dump_attributes(dataclasses.asdict(domain)),)
            )
            db.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?)", rows)

    def put_profiles(self, profiles: Mapping[str, Attributes]) -> None:
        """See `MemoryStore.put_profiles`."""
        rows = [(user_id, dump_attributes(profile)) for user_id, profile in profiles.items()]
        with self._write() as db:
            db.executemany(
                "INSERT INTO users (user_id, profile) VALUES (?, ?)"
                " ON CONFLICT (user_id) DO UPDATE SET profile = excluded.profile",
                rows,
            )

    def items(self, item_ids: Collection[str]) -> dict[str, Item]:
        """See `MemoryStore.items`."""
        found = {}
        with self._read() as db:
            for item_id in set(item_ids):
                row = db.execute("SELECT title, attributes FROM items WHERE item_id = ?", (item_id,)).fetchone()
                if row:
                    found[item_id] = Item(item_id, row[0], load_attributes(row[1]))
        return found

    # -- behaviors -----------------------------------------------------------------------------------------------

    def append(self, behaviors: Sequence[Behavior]) -> Appended:
        """See `MemoryStore.append`."""
        condition = self.condition
        arriving: dict[str, dict[str, Behavior]] = {}
        for behavior in behaviors:
            arriving.setdefault(behavior.user_id, {}).setdefault(behavior.event_id, behavior)
        with self._write() as db:
            held = {user_id: _hold(db, user_id) for user_id in arriving}
            _drop_known(db, held, arriving)
            kept = sum(map(len, arriving.values()))
            cut = self._stream(db, condition, held, arriving)
            new_users = sum(not held[user_id].partitions and not held[user_id].cache for user_id in arriving)
            _count(db, users=new_users, behaviors=kept, partitions=cut)
        return Appended(kept, len(behaviors) - kept, cut)

    def _stream(
        self,
        db: sqlite3.Connection,
        condition: PartitionCondition,
        held: Mapping[str, _Held],
        arriving: Mapping[str, Mapping[str, Behavior]],
    ) -> int:
        """Runs Algorithm 1 for every user; returns how many partitions were cut."""
        partitions: list[tuple[object, ...]] = []
        caches: list[tuple[object, ...]] = []
        for user_id, fresh in arriving.items():
            user, number, cache = held[user_id]
            if not fresh:
                continue
            streamed = stream(condition, cache, fresh.values(), _last_partition(db, user, user_id, number))
            partitions += ((user, number + at, *pack(cut)) for at, cut in enumerate(streamed.partitions, 1))
            caches.append((number + len(streamed.partitions), *pack(streamed.cache), user))
        due = self._clock()
        db.executemany("INSERT INTO partitions VALUES (?, ?, ?, ?, ?, ?)", partitions)
        db.executemany(
            "INSERT INTO steps (user, number, step, due) VALUES (?, ?, 'summary', ?)",
            ((row[0], row[1], due) for row in partitions),
        )
        db.executemany(
            "UPDATE users SET partitions = ?, item_ids = ?, feedback = ?, timestamps = ?, event_ids = ? WHERE user = ?",
            caches,
        )
        return len(partitions)

    # -- knowledge -----------------------------------------------------------------------------------------------

    def claim(self, steps: Collection[Step], limit: int, lease_seconds: float) -> list[Task]:
        """See `MemoryStore.claim`."""
        if limit < 1:
            return []
        claim = secrets.token_hex(8)
        with self._write() as db:
            now = self._clock()
            ready = [
                row for step in STEPS if step in steps for row in db.execute(_READY[step], (now, limit)).fetchall()
            ]
            # Each query is ordered; the oldest of all kinds come first.
            ready.sort(key=lambda row: row[:3])
            ready = ready[:limit]
            db.executemany(
                "UPDATE steps SET claim = ?, due = ?, attempts = attempts + 1"
                " WHERE user = ? AND number = ? AND step = ?",
                ((claim, now + lease_seconds, row[1], row[2], row[3]) for row in ready),
            )
            # A repeated encoding costs no writer call, so it is not counted.
            _count(db, repeated=sum(row[4] > 0 and row[3] != "representation" for row in ready))
        return [_task(claim, *row[2:]) for row in ready]

    def commit(self, results: Sequence[Result]) -> Committed:
        """See `MemoryStore.commit`.

        Raises:
            InvalidInputError: a result of another kind than its task, or a vector that is not finite float32[d].
        """
        made = [(result.task, _check_made(result)) for result in results]
        kept = 0
        with self._write() as db:
            now = self._clock()
            for task, result in made:
                user = _end_claim(db, task)
                if user is None:
                    continue
                kept += 1
                if isinstance(result, Text):
                    db.execute(
                        "INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (user, task.number, *(getattr(result, name) for name in _TEXT_FIELDS)),
                    )
                    for number, step in _unblocked(db, user, task.number, task.step):
                        db.execute(
                            "INSERT OR IGNORE INTO steps (user, number, step, due) VALUES (?, ?, ?, ?)",
                            (user, number, step, now),
                        )
                else:
                    db.execute(
                        "INSERT OR REPLACE INTO representations VALUES (?, ?, ?, ?)",
                        (user, task.number, result.vector.tobytes(), result.fingerprint),
                    )
        return Committed(kept, len(results) - kept)

    def release(
        self, tasks: Sequence[Task], error: str, retry_seconds: float | None, *, attempted: bool = True
    ) -> None:
        """See `MemoryStore.release`."""
        shown = error[:MAX_ERROR_CHARACTERS].encode(errors="replace").decode()
        with self._write() as db:
            due = None if retry_seconds is None else self._clock() + retry_seconds
            db.executemany(
                "UPDATE steps SET claim = NULL, due = ?, error = ?, attempts = attempts - ?"
                " WHERE user = (SELECT user FROM users WHERE user_id = ?) AND number = ? AND step = ? AND claim = ?",
                ((due, shown, not attempted, task.user_id, task.number, task.step, task.claim) for task in tasks),
            )

    def reencode(self, fingerprint: str) -> int:
        """See `MemoryStore.reencode`. A claim held on such a step is void: its vector may be one of the old kind."""
        with self._write() as db:
            return db.execute(
                "INSERT INTO steps (user, number, step, due)"
                " SELECT user, number, 'representation', ? FROM representations WHERE fingerprint <> ?"
                " ON CONFLICT DO UPDATE SET due = excluded.due, claim = NULL, attempts = 0, error = NULL",
                (self._clock(), fingerprint),
            ).rowcount

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, user_ids: Sequence[str], history: int, partitions: int) -> list[UserMemory | None]:
        """See `MemoryStore.read`.

        While a rebuild changes the length of the vectors, only those as long as the newest one are returned.
        """
        with self._read() as db:
            found = {user_id: _read_user(db, user_id, history, partitions) for user_id in dict.fromkeys(user_ids)}
        return [found[user_id] for user_id in user_ids]

    def users(self) -> list[str]:
        """See `MemoryStore.users`."""
        with self._read() as db:
            return [user_id for (user_id,) in db.execute("SELECT user_id FROM users ORDER BY user")]

    def timeline(self, user_id: str) -> Timeline | None:
        """See `MemoryStore.timeline`."""
        with self._read() as db:
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
                    f"SELECT number, {', '.join(_TEXT_FIELDS)} FROM texts WHERE user = ?", (user,)
                )
            }
            vectors = {
                number: Representation(np.frombuffer(vector, "<f4"), fingerprint)
                for number, vector, fingerprint in db.execute(
                    "SELECT number, vector, fingerprint FROM representations WHERE user = ?", (user,)
                )
            }
            records = tuple(
                PartitionRecord(
                    number,
                    tuple(unpack(user_id, *packed)),
                    texts.get((number, "summary")),
                    texts.get((number, "shift")),
                    vectors.get(number),
                )
                for number, *packed in db.execute(
                    "SELECT number, item_ids, feedback, timestamps, event_ids FROM partitions"
                    " WHERE user = ? ORDER BY number",
                    (user,),
                )
            )
        return Timeline(user_id, load_attributes(profile), records, tuple(unpack(user_id, *cache)))

    def forget(self, user_id: str) -> Forgotten:
        """See `MemoryStore.forget`."""
        with self._write() as db:
            row = db.execute("SELECT user FROM users WHERE user_id = ?", (user_id,)).fetchone()
            if row is None:
                return Forgotten(0, 0)
            (behaviors,) = db.execute("SELECT count(*) FROM events WHERE user = ?", row).fetchone()
            (partitions,) = db.execute("SELECT count(*) FROM partitions WHERE user = ?", row).fetchone()
            db.execute("DELETE FROM users WHERE user = ?", row)
            _count(db, users=-min(behaviors, 1), behaviors=-behaviors, partitions=-partitions, unscrubbed=1)
        self._empty_log()
        return Forgotten(behaviors, partitions)

    def _empty_log(self) -> None:
        """Moves the write-ahead log into the file and empties it: older copies of what was deleted lie in it.

        A reader that holds on to an older state puts this off until the log is next emptied, at the latest when the
        last process closes the store.
        """
        with self._lock, self._explained():
            self._writer.execute(f"PRAGMA busy_timeout = {int(_LOG_SECONDS * 1000)}")
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._writer.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")

    def _scrub(self) -> None:
        """Rewrites the file if someone was forgotten since that was last done."""
        ((forgotten,),) = self._writer.execute("SELECT value FROM counters WHERE name = 'unscrubbed'")
        if forgotten:
            self._writer.execute("VACUUM")
            _count(self._writer, unscrubbed=-forgotten)
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def statistics(self) -> Statistics:
        """See `MemoryStore.statistics`."""
        pending: dict[Step, int] = dict.fromkeys(STEPS, 0)
        dead: dict[Step, int] = dict.fromkeys(STEPS, 0)
        with self._read() as db:
            totals = dict(db.execute("SELECT name, value FROM counters").fetchall())
            (items,) = db.execute("SELECT count(*) FROM items").fetchone()
            for step, alive, number in db.execute("SELECT step, due IS NOT NULL, count(*) FROM steps GROUP BY 1, 2"):
                (pending if alive else dead)[step] = number
        return Statistics(
            users=totals["users"],
            behaviors=totals["behaviors"],
            items=items,
            partitions=totals["partitions"],
            pending=pending,
            dead=dead,
            repeated=totals["repeated"],
        )

    # -- the file ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See `MemoryStore.close`. A read that is under way in another thread ends undisturbed.

        If someone was forgotten, the file is rewritten, which takes time and room in proportion to its size. Where
        that fails (no room, another process writes) the next close does it.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with self._explained():
                while self._idle_readers:
                    self._idle_readers.pop().close()
                if self._process == os.getpid():
                    with contextlib.suppress(sqlite3.Error):
                        self._scrub()
                self._writer.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One durable transaction: all of the body or none of it."""
        with self._lock, self._explained():
            self._check_usable()
            db = self._writer
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """One state of the store, whatever is written meanwhile."""
        with self._explained():
            self._check_usable()
            try:
                db = self._idle_readers.pop()
            except IndexError:
                db = self._connect()
                db.execute("PRAGMA query_only = ON")
            try:
                db.execute("BEGIN")
                yield db
                db.execute("COMMIT")
            except BaseException:
                db.close()
                raise
            self._idle_readers.append(db)
            if self._closed:
                db.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        db.execute("PRAGMA cache_size = -32768")
        return db

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError(f"store {self._path} is closed; open it again with open_store")
        if self._process != os.getpid():
            raise StoreError(f"store {self._path} was opened by process {self._process}; open it in each process")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the engine's errors into one line that says what to do."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"store {self._path}: {error}; {remedy_for(str(error))}") from error
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"{error.object!r:.80} is not valid UTF-8; re-encode the source as UTF-8") from None


# -- transactions, step by step ----------------------------------------------------------------------------------

_TEXT_FIELDS = tuple(field.name for field in dataclasses.fields(Text))

# One query per step brings all that the step reads. CROSS JOIN keeps the queue as the outer loop, in due order.
_READY: Mapping[Step, str] = {
    "summary": """
        SELECT s.due, s.user, s.number, s.step, s.attempts, u.user_id,
               u.profile, p.item_ids, p.feedback, p.timestamps, p.event_ids
        FROM steps s CROSS JOIN users u USING (user) CROSS JOIN partitions p USING (user, number)
        WHERE s.step = 'summary' AND s.due <= ? ORDER BY s.due, s.user, s.number LIMIT ?""",
    "shift": """
        SELECT s.due, s.user, s.number, s.step, s.attempts, u.user_id, before.text, now.text
        FROM steps s CROSS JOIN users u USING (user)
        CROSS JOIN texts before ON before.user = s.user AND before.number = s.number - 1 AND before.kind = 'summary'
        CROSS JOIN texts now ON now.user = s.user AND now.number = s.number AND now.kind = 'summary'
        WHERE s.step = 'shift' AND s.due <= ? ORDER BY s.due, s.user, s.number LIMIT ?""",
    "representation": """
        SELECT s.due, s.user, s.number, s.step, s.attempts, u.user_id, summary.text, coalesce(shift.text, '')
        FROM steps s CROSS JOIN users u USING (user)
        CROSS JOIN texts summary
            ON summary.user = s.user AND summary.number = s.number AND summary.kind = 'summary'
        LEFT JOIN texts shift ON shift.user = s.user AND shift.number = s.number AND shift.kind = 'shift'
        WHERE s.step = 'representation' AND s.due <= ? ORDER BY s.due, s.user, s.number LIMIT ?""",
}


def _hold(db: sqlite3.Connection, user_id: str) -> _Held:
    """What is held of a user; a new one gets a number."""
    row = db.execute(
        "SELECT user, partitions, item_ids, feedback, timestamps, event_ids FROM users WHERE user_id = ?", (user_id,)
    ).fetchone()
    if row is None:
        user = db.execute("INSERT INTO users (user_id) VALUES (?)", (user_id,)).lastrowid
        assert user is not None
        return _Held(user, 0, [])
    user, partitions, *cache = row
    return _Held(user, partitions, unpack(user_id, *cache))


def _drop_known(db: sqlite3.Connection, held: Mapping[str, _Held], arriving: Mapping[str, dict[str, Behavior]]) -> None:
    """Enters the event ids and takes the behaviors that were known already out of `arriving`."""
    for user_id, fresh in arriving.items():
        user, partitions, cache = held[user_id]
        if not partitions and not cache:
            continue
        for event_id in sorted(fresh):
            if db.execute("SELECT 1 FROM events WHERE user = ? AND event_id = ?", (user, event_id)).fetchone():
                del fresh[event_id]
    # In key order, so that a long-standing user's many new ids touch each page of the index once.
    db.executemany(
        "INSERT INTO events VALUES (?, ?)",
        ((held[user_id].user, event_id) for user_id, fresh in arriving.items() for event_id in sorted(fresh)),
    )


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


def _task(claim: str, number: int, step: Step, attempts: int, user_id: str, *reads: Any) -> Task:
    if step == "summary":
        profile, *packed = reads
        return Task(
            user_id,
            number,
            step,
            claim,
            attempts + 1,
            profile=load_attributes(profile),
            behaviors=tuple(unpack(user_id, *packed)),
        )
    if step == "shift":
        return Task(user_id, number, step, claim, attempts + 1, previous=reads[0], summary=reads[1])
    return Task(user_id, number, step, claim, attempts + 1, summary=reads[0], shift=reads[1])


def _end_claim(db: sqlite3.Connection, task: Task) -> int | None:
    """Takes a step off the queue; returns its user's number, or None if the claim is no longer held."""
    row = db.execute(
        "DELETE FROM steps WHERE user = (SELECT user FROM users WHERE user_id = ?)"
        " AND number = ? AND step = ? AND claim = ? RETURNING user",
        (task.user_id, task.number, task.step, task.claim),
    ).fetchone()
    return None if row is None else int(row[0])


def _unblocked(db: sqlite3.Connection, user: int, number: int, step: Step) -> Iterator[tuple[int, Step]]:
    """The steps that waited for this text and for nothing else (paper, section 3.3.2: the cascade)."""
    if step == "shift" or number == 1:
        yield number, "representation"
    if step == "summary":
        if number > 1 and _has_text(db, user, number - 1, "summary"):
            yield number, "shift"
        if _has_text(db, user, number + 1, "summary") and not _has_text(db, user, number + 1, "shift"):
            yield number + 1, "shift"


def _has_text(db: sqlite3.Connection, user: int, number: int, kind: str) -> bool:
    found = db.execute("SELECT 1 FROM texts WHERE user = ? AND number = ? AND kind = ?", (user, number, kind))
    return found.fetchone() is not None


def _read_user(db: sqlite3.Connection, user_id: str, history: int, partitions: int) -> UserMemory | None:
    row = db.execute(
        "SELECT user, profile, partitions, item_ids, feedback FROM users WHERE user_id = ?", (user_id,)
    ).fetchone()
    if row is None:
        return None
    user, profile, cut, item_ids, feedback = row
    if len(feedback) < 8 * history and cut:
        # Rows are fetched one by one: only as many partitions are touched as the history needs.
        runs = db.execute("SELECT item_ids, feedback FROM partitions WHERE user = ? ORDER BY number DESC", (user,))
        for older_ids, older_feedback in runs:
            item_ids = f"{older_ids}\n{item_ids}" if item_ids else older_ids
            feedback = older_feedback + feedback
            if len(feedback) >= 8 * history:
                break
        runs.close()
    vectors, fingerprints = _NO_VECTORS, frozenset[str]()
    if cut and partitions > 0:
        rows = db.execute(
            "SELECT vector, fingerprint FROM representations WHERE user = ? ORDER BY number DESC LIMIT ?",
            (user, partitions),
        ).fetchall()
        if rows:
            size = len(rows[0][0])
            rows = [row for row in reversed(rows) if len(row[0]) == size]
            vectors = np.frombuffer(b"".join([row[0] for row in rows]), "<f4").reshape(len(rows), -1)
            fingerprints = frozenset([row[1] for row in rows])
    return UserMemory(load_attributes(profile), newest(item_ids, feedback, history), vectors, fingerprints)


def _count(db: sqlite3.Connection, **changes: int) -> None:
    db.executemany(
        "UPDATE counters SET value = value + ? WHERE name = ?",
        [(change, name) for name, change in changes.items() if change],
    )


def _check_made(result: Result) -> Text | Representation:
    made = result.made
    kind = made.kind if isinstance(made, Text) else "representation"
    if kind != result.task.step:
        raise InvalidInputError(f"a {kind} was made for a {result.task.step} step of user {result.task.user_id!r}")
    if isinstance(made, Text):
        return made
    vector = np.asarray(made.vector, dtype="<f4")
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise InvalidInputError(
            f"representation {result.task.number} of user {result.task.user_id!r} has shape {vector.shape} or holds "
            "values that are not finite; it must be float32[d]"
        )
    return Representation(vector, made.fingerprint)
