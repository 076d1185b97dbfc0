"""`WorkQueue` in a SQLite file: which steps are ready, who holds them, what was made of them."""

from __future__ import annotations

import dataclasses
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

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
from liber_runtime.memory.packing import load_attributes, unpack
from liber_runtime.memory.sqlite.file import StoreFile
from liber_runtime.memory.sqlite.reading import keep_vectors

MAX_ERROR_CHARACTERS = 2000
"""Of an error kept with a step that failed."""

USERS_PER_SWEEP = 500
"""Users in one transaction of what goes over the whole store, so that nobody waits long for it."""

TEXT_FIELDS = tuple(field.name for field in dataclasses.fields(Text))


class SQLiteQueue:
    """`liber_runtime.memory.WorkQueue`; see there for what each method promises.

    A claim whose lease has expired can still be committed until someone else takes it: the work is paid for.
    """

    def __init__(self, file: StoreFile, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock

    def claim(self, steps: Collection[Step], limit: int, lease_seconds: float, fingerprint: str = "") -> list[Task]:
        """See `WorkQueue.claim`."""
        if limit < 1 or not steps:
            return []
        with self._file.read() as db:
            # An idle worker's looks cost appenders nothing.
            if not any(_ready(db, steps, fingerprint, self._clock(), 1)):
                return []
        claim = secrets.token_hex(8)

        def take(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
            now = self._clock()
            # Each query is ordered; the oldest of all kinds come first.
            ready = sorted(_ready(db, steps, fingerprint, now, limit), key=lambda row: row[:3])[:limit]
            db.executemany(
                "UPDATE steps SET claim = ?, due = ?, attempts = attempts + 1"
                " WHERE user = ? AND number = ? AND step = ? AND encoding = ?",
                ((claim, now + lease_seconds, *row[1:5]) for row in ready),
            )
            # A repeated encoding costs no writer call, so it is not counted.
            count(db, repeated=sum(row[5] > 0 and row[3] != "representation" for row in ready))
            return ready

        return [_task(claim, *row[2:]) for row in self._file.write(take)]

    def renew(self, tasks: Sequence[Task], lease_seconds: float) -> list[Task]:
        """See `WorkQueue.renew`."""

        def extend(db: sqlite3.Connection) -> list[Task]:
            due = self._clock() + lease_seconds
            return [
                task
                for task in tasks
                if not db.execute(f"UPDATE steps SET due = ? WHERE {_HELD}", (due, *_held(task))).rowcount
            ]

        return self._file.write(extend) if tasks else []

    def commit(self, results: Sequence[Result]) -> Committed:
        """See `WorkQueue.commit`."""
        made = [(result.task, check_made(result)) for result in results]

        def keep(db: sqlite3.Connection) -> int:
            now = self._clock()
            encodings = _Encodings(db)
            kept = sum(_keep(db, encodings, task, result, now) for task, result in made)
            keep_vectors(db, encodings.changed)
            return kept

        kept = self._file.write(keep) if made else 0
        return Committed(kept, len(results) - kept)

    def dead(self, limit: int = 1000) -> list[DeadStep]:
        """See `WorkQueue.dead`."""
        with self._file.read() as db:
            return [
                DeadStep(*row)
                for row in db.execute(
                    "SELECT u.user_id, s.number, s.step, s.attempts, coalesce(s.error, ''),"
                    " coalesce(e.fingerprint, '') FROM steps s JOIN users u USING (user)"
                    " LEFT JOIN encodings e USING (encoding) WHERE s.due IS NULL"
                    " ORDER BY s.user, s.number, s.step LIMIT ?",
                    (limit,),
                )
            ]

    def revive(self) -> int:
        """See `WorkQueue.revive`."""
        return self._file.write(
            lambda db: (
                db.execute(
                    "UPDATE steps SET due = :now, since = :now, claim = NULL, attempts = 0, error = NULL"
                    " WHERE due IS NULL",
                    {"now": self._clock()},
                ).rowcount
            )
        )

    def rewrite(self, *, writer: str = "", prompt_version: str = "", user_ids: Collection[str] | None = None) -> int:
        """See `WorkQueue.rewrite`. Users are taken in turn, some hundred in a transaction."""

        def queue_again(db: sqlite3.Connection, users: Collection[int]) -> int:
            now, queued = self._clock(), 0
            matching = (
                "SELECT number FROM texts WHERE user = ? AND kind = ? AND (? = '' OR writer = ?)"
                " AND (? = '' OR prompt_version = ?)"
            )
            chosen = (writer, writer, prompt_version, prompt_version)
            for user in users:
                for (number,) in db.execute(matching, (user, "summary", *chosen)).fetchall():
                    queue_summary(db, user, number, now)
                    queued += 1
                for (number,) in db.execute(matching, (user, "shift", *chosen)).fetchall():
                    # A summary that is made again brings its shifts with it.
                    if not (_is_open(db, user, number, "summary") or _is_open(db, user, number - 1, "summary")):
                        _queue_shift(db, user, number, now)
                        queued += 1
            return queued

        return sum(self._sweep(queue_again, user_ids))

    def encode_by(self, fingerprints: Collection[str]) -> int:
        """See `WorkQueue.encode_by`. Users are taken in turn, some hundred in a transaction."""

        def want(db: sqlite3.Connection) -> tuple[list[int], list[int]]:
            before = {row[0] for row in db.execute("SELECT encoding FROM encodings WHERE wanted")}
            encodings = _Encodings(db)
            wanted = [encodings.number(fingerprint) for fingerprint in sorted(set(fingerprints))]
            db.execute("UPDATE encodings SET wanted = 0")
            db.executemany("UPDATE encodings SET wanted = 1 WHERE encoding = ?", ((each,) for each in wanted))
            everything = [row[0] for row in db.execute("SELECT encoding FROM encodings")]
            return wanted, [each for each in everything if each not in before and each not in wanted]

        wanted, outdated = self._file.write(want)

        def sweep(db: sqlite3.Connection, users: Collection[int]) -> int:
            now, queued = self._clock(), 0
            for user in users:
                _drop_unwanted(db, user, wanted)
                for each in wanted or [0]:
                    queued += db.execute(_LACKING, {"user": user, "encoding": each, "now": now}).rowcount
                for each in outdated:
                    gone = db.execute("DELETE FROM representations WHERE user = ? AND encoding = ?", (user, each))
                    _count_vectors(db, each, -gone.rowcount)
            return queued

        queued = sum(self._sweep(sweep, None))
        self._file.write(
            lambda db: db.executemany(
                "DELETE FROM encodings WHERE encoding = ? AND NOT wanted AND vectors = 0",
                ((each,) for each in outdated),
            )
        )
        return queued

    def _sweep(
        self, work: Callable[[sqlite3.Connection, Collection[int]], int], user_ids: Collection[str] | None
    ) -> Iterator[int]:
        """Does `work` for all users there are now, or those named, a few hundred in a transaction."""
        with self._file.read() as db:
            if user_ids is None:
                users = [row[0] for row in db.execute("SELECT user FROM users ORDER BY user")]
            else:
                find = "SELECT user FROM users WHERE user_id = ?"
                rows = [db.execute(find, (user_id,)).fetchone() for user_id in dict.fromkeys(user_ids)]
                users = [row[0] for row in rows if row]
        for start in range(0, len(users), USERS_PER_SWEEP):
            part = users[start : start + USERS_PER_SWEEP]
            yield self._file.write(lambda db, part=part: work(db, part))  # type: ignore[misc]


def _drop_unwanted(db: sqlite3.Connection, user: int, wanted: Collection[int]) -> None:
    """Takes off the vectors that nobody wants any more, with the outdated ones that they were to replace."""
    unwanted = [
        (number, encoding)
        for number, encoding in db.execute(
            "SELECT number, encoding FROM steps WHERE user = ? AND step = 'representation'", (user,)
        )
        if encoding not in (wanted or (0,))
    ]
    for number, encoding in unwanted:
        drop_vectors(db, user, (number,), encoding)
        db.execute(
            "DELETE FROM steps WHERE user = ? AND number = ? AND step = 'representation' AND encoding = ?",
            (user, number, encoding),
        )


class _Encodings:
    """Fingerprints and their numbers in this file, within one transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        rows = db.execute("SELECT fingerprint, encoding, wanted FROM encodings").fetchall()
        self._numbers = {fingerprint: encoding for fingerprint, encoding, _ in rows}
        self.wanted = [encoding for _, encoding, wanted in rows if wanted]
        self.changed: set[tuple[int, int]] = set()
        """(user, encoding) of the vectors that this transaction brought."""

    def number(self, fingerprint: str) -> int:
        """Of a fingerprint; a new one is entered."""
        if fingerprint not in self._numbers:
            row = self._db.execute("INSERT INTO encodings (fingerprint) VALUES (?)", (fingerprint,))
            assert row.lastrowid is not None
            self._numbers[fingerprint] = row.lastrowid
        return int(self._numbers[fingerprint])


# One query per step brings all that the step reads. CROSS JOIN keeps the queue as the outer loop, in due order.
_READY: Mapping[Step, str] = {
    "summary": """
        SELECT s.due, s.user, s.number, s.step, s.encoding, s.attempts, '', u.user_id,
               u.profile, p.item_ids, p.feedback, p.timestamps, p.event_ids
        FROM steps s CROSS JOIN users u USING (user) CROSS JOIN partitions p USING (user, number)
        WHERE s.step = 'summary' AND s.encoding = ? AND s.due <= ? ORDER BY s.due, s.user, s.number LIMIT ?""",
    "shift": """
        SELECT s.due, s.user, s.number, s.step, s.encoding, s.attempts, '', u.user_id, before.text, now.text
        FROM steps s CROSS JOIN users u USING (user)
        CROSS JOIN texts before ON before.user = s.user AND before.number = s.number - 1 AND before.kind = 'summary'
        CROSS JOIN texts now ON now.user = s.user AND now.number = s.number AND now.kind = 'summary'
        WHERE s.step = 'shift' AND s.encoding = ? AND s.due <= ? ORDER BY s.due, s.user, s.number LIMIT ?""",
    "representation": """
        SELECT s.due, s.user, s.number, s.step, s.encoding, s.attempts, coalesce(e.fingerprint, ''), u.user_id,
               summary.text, coalesce(shift.text, '')
        FROM steps s CROSS JOIN users u USING (user)
        CROSS JOIN texts summary
            ON summary.user = s.user AND summary.number = s.number AND summary.kind = 'summary'
        LEFT JOIN texts shift ON shift.user = s.user AND shift.number = s.number AND shift.kind = 'shift'
        LEFT JOIN encodings e ON e.encoding = s.encoding
        WHERE s.step = 'representation' AND s.encoding = ? AND s.due <= ? ORDER BY s.due, s.user, s.number LIMIT ?""",
}

_HELD = "user = (SELECT user FROM users WHERE user_id = ?) AND number = ? AND step = ? AND encoding = ? AND claim = ?"

# Partitions whose texts are there and final and that have no vector of an encoding (of any, for encoding 0).
_LACKING = """
    INSERT INTO steps (user, number, step, encoding, due, since)
    SELECT t.user, t.number, 'representation', :encoding, :now, :now FROM texts t
    WHERE t.user = :user AND t.kind = 'summary'
      AND NOT EXISTS (SELECT 1 FROM representations r WHERE r.user = t.user AND r.number = t.number
                      AND (:encoding = 0 OR r.encoding = :encoding))
      AND NOT EXISTS (SELECT 1 FROM steps s WHERE s.user = t.user AND s.number = t.number
                      AND (s.step <> 'representation' OR s.encoding = :encoding))
      AND (EXISTS (SELECT 1 FROM texts c WHERE c.user = t.user AND c.number = t.number AND c.kind = 'shift')
           OR NOT EXISTS (SELECT 1 FROM partitions p WHERE p.user = t.user AND p.number = t.number - 1
                          AND p.item_ids <> ''))
"""


def _ready(
    db: sqlite3.Connection, steps: Collection[Step], fingerprint: str, now: float, limit: int
) -> Iterator[tuple[Any, ...]]:
    for step in STEPS:
        if step not in steps:
            continue
        encodings = [0]
        if step == "representation" and fingerprint:
            encodings += [
                row[0] for row in db.execute("SELECT encoding FROM encodings WHERE fingerprint = ?", (fingerprint,))
            ]
        for encoding in encodings:
            yield from db.execute(_READY[step], (encoding, now, limit)).fetchall()


def _task(
    claim: str, number: int, step: Step, encoding: int, attempts: int, fingerprint: str, user_id: str, *reads: Any
) -> Task:
    # The encoding's number rides along in the claim, so that ending it needs no look-up.
    held = f"{encoding}/{claim}"
    if step == "summary":
        profile, *packed = reads
        return Task(
            user_id,
            number,
            step,
            held,
            attempts + 1,
            profile=load_attributes(profile),
            behaviors=tuple(unpack(user_id, *packed)),
        )
    if step == "shift":
        return Task(user_id, number, step, held, attempts + 1, previous=reads[0], summary=reads[1])
    return Task(user_id, number, step, held, attempts + 1, fingerprint, summary=reads[0], shift=reads[1])


def _held(task: Task) -> tuple[str, int, str, int, str]:
    encoding, _, claim = task.claim.partition("/")
    return task.user_id, task.number, task.step, int(encoding), claim


def _keep(
    db: sqlite3.Connection, encodings: _Encodings, task: Task, made: Text | Representation | Failure, now: float
) -> bool:
    """Takes one result; returns whether its claim was still held."""
    if isinstance(made, Failure):
        due = None if made.retry_seconds is None else now + made.retry_seconds
        error = made.error[:MAX_ERROR_CHARACTERS].encode(errors="replace").decode()
        changed = db.execute(
            "UPDATE steps SET claim = NULL, due = ?, error = ?, attempts = attempts - ?"
            f"{', since = NULL' if due is None else ''} WHERE {_HELD}",
            (due, error, not made.attempted, *_held(task)),
        )
        return changed.rowcount > 0
    row = db.execute(f"DELETE FROM steps WHERE {_HELD} RETURNING user", _held(task)).fetchone()
    if row is None:
        return False
    user = int(row[0])
    if isinstance(made, Representation):
        encoding = encodings.number(made.fingerprint)
        _keep_vector(db, user, task.number, encoding, made.vector.tobytes())
        encodings.changed.add((user, encoding))
        return True
    db.execute(
        f"INSERT OR REPLACE INTO texts (user, number, {', '.join(TEXT_FIELDS)})"
        f" VALUES (?, ?{', ?' * len(TEXT_FIELDS)})",
        (user, task.number, *(getattr(made, name) for name in TEXT_FIELDS)),
    )
    if made.kind == "shift":
        queue_representation(db, encodings.wanted, user, task.number, now)
    else:
        after_summary(db, encodings.wanted, user, task.number, now)
    return True


def _keep_vector(db: sqlite3.Connection, user: int, number: int, encoding: int, vector: bytes) -> None:
    replaced = db.execute(
        "UPDATE representations SET vector = ? WHERE user = ? AND encoding = ? AND number = ?",
        (vector, user, encoding, number),
    )
    if not replaced.rowcount:
        db.execute("INSERT INTO representations VALUES (?, ?, ?, ?)", (user, encoding, number, vector))
        _count_vectors(db, encoding, 1)


# -- the cascade (paper, section 3.3.2): what becomes ready, and what is no longer worth making -------------------


def after_summary(db: sqlite3.Connection, wanted: Sequence[int], user: int, number: int, now: float) -> None:
    """Queues what a new summary lets be made: the shifts it is part of, or the vector where there is no shift."""
    if not _needs_shift(db, user, number):
        queue_representation(db, wanted, user, number, now)
    for at in (number, number + 1):
        if _needs_shift(db, user, at) and all(
            _has_summary(db, user, each) and not _is_open(db, user, each, "summary") for each in (at - 1, at)
        ):
            _queue_shift(db, user, at, now)


def after_emptied(db: sqlite3.Connection, user: int, number: int, now: float) -> None:
    """Queues the vector of the partition after one without behaviors: it has no shift to wait for."""
    if _has_summary(db, user, number + 1):
        queue_representation(db, _Encodings(db).wanted, user, number + 1, now)


def queue_summary(db: sqlite3.Connection, user: int, number: int, now: float) -> None:
    """Queues a summary to be made, again if need be; steps that would read the old one are taken off."""
    _open(db, user, number, "summary", 0, now)
    db.execute(
        "DELETE FROM steps WHERE user = ? AND (number = ? AND step <> 'summary' OR number = ? AND step = 'shift')",
        (user, number, number + 1),
    )


def _queue_shift(db: sqlite3.Connection, user: int, number: int, now: float) -> None:
    _open(db, user, number, "shift", 0, now)
    db.execute("DELETE FROM steps WHERE user = ? AND number = ? AND step = 'representation'", (user, number))


def queue_representation(db: sqlite3.Connection, wanted: Sequence[int], user: int, number: int, now: float) -> None:
    """Queues the vectors of a partition whose texts are there, unless one of them is about to be replaced."""
    if _is_open(db, user, number, "summary") or _is_open(db, user, number, "shift"):
        return
    for encoding in wanted or (0,):
        _open(db, user, number, "representation", encoding, now)


def _open(db: sqlite3.Connection, user: int, number: int, step: Step, encoding: int, now: float) -> None:
    """Makes a step ready. A claim on it is void: it was made on inputs that are no longer there."""
    db.execute(
        "INSERT INTO steps (user, number, step, encoding, due, since) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET due = excluded.due, since = excluded.since, claim = NULL, attempts = 0,"
        " error = NULL",
        (user, number, step, encoding, now, now),
    )


def _is_open(db: sqlite3.Connection, user: int, number: int, step: Step) -> bool:
    found = db.execute("SELECT 1 FROM steps WHERE user = ? AND number = ? AND step = ?", (user, number, step))
    return found.fetchone() is not None


def _has_summary(db: sqlite3.Connection, user: int, number: int) -> bool:
    found = db.execute("SELECT 1 FROM texts WHERE user = ? AND number = ? AND kind = 'summary'", (user, number))
    return found.fetchone() is not None


def has_behaviors(db: sqlite3.Connection, user: int, number: int) -> bool:
    """Whether a partition is there and not all of its behaviors were erased."""
    found = db.execute("SELECT 1 FROM partitions WHERE user = ? AND number = ? AND item_ids <> ''", (user, number))
    return found.fetchone() is not None


def _needs_shift(db: sqlite3.Connection, user: int, number: int) -> bool:
    return number > 1 and has_behaviors(db, user, number - 1)


# -- totals ------------------------------------------------------------------------------------------------------


def count(db: sqlite3.Connection, **changes: int) -> None:
    """Changes the store's totals."""
    db.executemany(
        "UPDATE counters SET value = value + ? WHERE name = ?",
        [(change, name) for name, change in changes.items() if change],
    )


def _count_vectors(db: sqlite3.Connection, encoding: int, change: int) -> None:
    db.execute("UPDATE encodings SET vectors = vectors + ? WHERE encoding = ?", (change, encoding))


def drop_vectors(db: sqlite3.Connection, user: int, numbers: Iterable[int] | None = None, only: int = 0) -> None:
    """Deletes a user's vectors: those of some partitions, or all; of one encoding, or of any (0)."""
    every = [row[0] for row in db.execute("SELECT encoding FROM encodings")]
    where = "" if numbers is None else " AND number = ?"
    rows = [()] if numbers is None else [(number,) for number in numbers]
    for encoding in [only] if only else every:
        delete = f"DELETE FROM representations WHERE user = ? AND encoding = ?{where}"
        gone = sum(db.execute(delete, (user, encoding, *row)).rowcount for row in rows)
        _count_vectors(db, encoding, -gone)
