"""The least that the same writes cost: a bare loop over the engine, without LIBER's Python.

A ground makes stores to measure, and twins: a store, and a bare loop beside it on a copy of its data. On SQLite the
loop is given, for every append, the very rows that the store will write, made and packed before any clock runs: it
knows beforehand which behaviors are new, which users exist, what is in their caches and where partitions are cut. While
it is timed it only hands rows to the engine, in the same transactions, with the same settings. Afterwards both must
hold the same, row by row; otherwise there is no figure. For Redis see `bench.bare_redis`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from bench.workload import Source, describe, fill
from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import LiberError
from liber_runtime.memory import MemoryStore, open_store
from liber_runtime.memory.packing import event_digest, pack, unpack
from liber_runtime.partition import Count, stream

T = TypeVar("T")

CONDITION = Count(20)

WARM = 30
"""Behaviors that each user has before appends are measured: a partition, and half a cache."""


class Bare(Protocol):
    """A loop over the engine that writes what a store writes."""

    def beside(
        self, appends: Sequence[Sequence[Behavior]], run: Callable[[], T], threads: int
    ) -> tuple[T, float | None]:
        """Lets the store make these appends and writes the same itself, neither while the other does.

        Args:
            appends: what `run` appends to the store.
            run: makes the appends, and times them.
            threads: that `run` appends by.

        Returns:
            What `run` returned, and the seconds of the loop; None if it could not write the same in as many steps.
        """
        ...

    def check(self) -> None:
        """Makes sure that both hold the same.

        Raises:
            LiberError: they do not.
        """
        ...


class Ground(Protocol):
    """Where stores are made to be measured."""

    @property
    def name(self) -> str:
        """``sqlite`` or ``redis``."""
        ...

    def store(self) -> AbstractContextManager[MemoryStore]:
        """A new store, gone afterwards."""
        ...

    def twins(self, users: Sequence[str], source: Source) -> AbstractContextManager[tuple[MemoryStore, Bare]]:
        """A new store that knows these users, and a bare loop on a copy of it; both gone afterwards."""
        ...


class SQLiteGround:
    """Files in a directory."""

    name = "sqlite"

    def __init__(self, directory: Path) -> None:
        """Makes files below `directory`, which is there."""
        self._directory = directory
        self._numbers = itertools.count(1)

    @contextlib.contextmanager
    def store(self) -> Iterator[MemoryStore]:
        """See `Ground.store`."""
        with self._place() as place, contextlib.closing(_open(place / "memory.db")) as store:
            yield store

    @contextlib.contextmanager
    def twins(self, users: Sequence[str], source: Source) -> Iterator[tuple[MemoryStore, Bare]]:
        """See `Ground.twins`."""
        with self._place() as place:
            with contextlib.closing(_open(place / "memory.db")) as store:
                describe(store, users)
                fill(store, dict.fromkeys(users, WARM), source)
            shutil.copyfile(place / "memory.db", place / "bare.db")
            with (
                contextlib.closing(_open(place / "memory.db")) as store,
                contextlib.closing(BareSQLite(place / "bare.db", place / "memory.db")) as bare,
            ):
                yield store, bare

    @contextlib.contextmanager
    def _place(self) -> Iterator[Path]:
        place = self._directory / str(next(self._numbers))
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place)


def settle() -> None:
    """Lets the collector forget about what was prepared: a caller's own objects are no part of the store's cost."""
    gc.collect()
    gc.freeze()


def _open(path: Path) -> MemoryStore:
    return open_store(f"sqlite:///{path}", CONDITION)


_COLUMNS = {
    "users": "user, user_id, profile, behaviors, partitions, item_ids, feedback, timestamps, event_ids",
    "events": "user, digest",
    "partitions": "user, number, item_ids, feedback, timestamps, event_ids",
    "steps": "user, number, step, encoding",
    "counters": "name, value",
}
"""What a store and the loop must hold alike: all that an append writes, but for times."""


class _Rows(NamedTuple):
    """What one append writes."""

    events: list[tuple[object, ...]]
    partitions: list[tuple[object, ...]]
    steps: list[tuple[object, ...]]
    caches: list[tuple[object, ...]]
    counters: list[tuple[object, ...]]


class _Held(NamedTuple):
    """What the bare loop knows of a user before the next append."""

    user: int
    behaviors: int
    partitions: int
    cache: list[Behavior]


class BareSQLite:
    """sqlite3 and nothing else: the store's file, settings and rows; one transaction for each append."""

    def __init__(self, path: Path, beside: Path) -> None:
        """Opens `path`, a copy of the store's file `beside`."""
        self._beside = beside
        self._turns = itertools.count()
        self._db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "secure_delete = ON",
            "foreign_keys = ON",
            "wal_autocheckpoint = 4000",
            "cache_size = -32768",
        ):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        self._held = {
            user_id: _Held(user, behaviors, partitions, unpack(user_id, *cache))
            for user, user_id, behaviors, partitions, *cache in self._db.execute(
                "SELECT user, user_id, behaviors, partitions, item_ids, feedback, timestamps, event_ids FROM users"
            )
        }

    def beside(
        self, appends: Sequence[Sequence[Behavior]], run: Callable[[], T], threads: int
    ) -> tuple[T, float | None]:
        """See `Bare.beside`. Who goes first changes from turn to turn; however many threads the store has, one here."""
        prepared = [self._rows(append) for append in appends]
        settle()
        if next(self._turns) % 2:
            return run(), self._write(prepared)
        seconds = self._write(prepared)
        return run(), seconds

    def _rows(self, behaviors: Sequence[Behavior]) -> _Rows:
        arriving: dict[str, list[Behavior]] = {}
        for behavior in behaviors:
            arriving.setdefault(behavior.user_id, []).append(behavior)
        rows = _Rows([], [], [], [], [])
        for user_id, fresh in arriving.items():
            user, behaviors_before, number, cache = self._held[user_id]
            streamed = stream(CONDITION, cache, fresh, lambda: ())
            for at, cut in enumerate(streamed.partitions, number + 1):
                rows.partitions.append((user, at, *pack(cut)))
                now = time.time()
                rows.steps.append((user, at, now, now))
            number += len(streamed.partitions)
            held = behaviors_before + len(fresh)
            digests = sorted(event_digest(behavior.event_id) for behavior in fresh)
            rows.events.extend((user, digest) for digest in digests)
            rows.caches.append((held, number, *pack(streamed.cache), user))
            self._held[user_id] = _Held(user, held, number, list(streamed.cache))
        rows.counters.extend([(len(behaviors), "behaviors"), (len(rows.partitions), "partitions")])
        return rows

    def _write(self, prepared: Sequence[_Rows]) -> float:
        db = self._db
        began = time.perf_counter()
        for rows in prepared:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO events VALUES (?, ?)", rows.events)
            db.executemany("INSERT INTO partitions VALUES (?, ?, ?, ?, ?, ?)", rows.partitions)
            db.executemany(
                "INSERT INTO steps (user, number, step, due, since) VALUES (?, ?, 'summary', ?, ?)", rows.steps
            )
            db.executemany(
                "UPDATE users SET behaviors = ?, partitions = ?, item_ids = ?, feedback = ?, timestamps = ?,"
                " event_ids = ? WHERE user = ?",
                rows.caches,
            )
            db.executemany("UPDATE counters SET value = value + ? WHERE name = ?", rows.counters)
            db.execute("COMMIT")
        return time.perf_counter() - began

    def check(self) -> None:
        """See `Bare.check`: the tables of both files, but for the times in them."""
        self._db.execute("ATTACH ? AS beside", (str(self._beside),))
        try:
            different = {table: self._different(table, columns) for table, columns in _COLUMNS.items()}
        finally:
            self._db.execute("DETACH beside")
        for table, rows in different.items():
            if rows:
                raise LiberError(
                    f"the bare loop's {table} differ from the store's in {rows} rows; bring bench.bare up to what the "
                    "store writes"
                )

    def _different(self, table: str, columns: str) -> int:
        """Rows of a table that only one of the files has."""
        here, there = (f"SELECT {columns} FROM {name}.{table}" for name in ("main", "beside"))
        only = f"SELECT * FROM ({here} EXCEPT {there}) UNION ALL SELECT * FROM ({there} EXCEPT {here})"
        return int(self._db.execute(f"SELECT count(*) FROM ({only})").fetchone()[0])

    def close(self) -> None:
        """Closes the file."""
        self._db.close()
