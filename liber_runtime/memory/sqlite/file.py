"""One SQLite file: its connections, its transactions, and what is done when it is closed."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from liber_runtime.exceptions import InvalidInputError, StoreError
from liber_runtime.memory.sqlite.schema import BUSY_SECONDS, migrate, remedy_for, use_wal

T = TypeVar("T")

_GROUP = 256
"""Most writes that share a transaction; a bound on how long the first of them waits for the rest."""

_LOG_SECONDS = 1.0  # reads last milliseconds; whoever reads longer is not waited for
_LEAST_SQLITE = (3, 37, 0)  # the first with STRICT tables


@dataclass(slots=True)
class _Write(Generic[T]):
    """A write that waits for its turn, and what came of it."""

    work: Callable[[sqlite3.Connection], T]
    done: bool = False
    value: T | None = None
    error: BaseException | None = None


class StoreFile:
    """A file that many threads and processes read and write.

    Writing is group commit: a thread that finds others waiting runs their writes in its own transaction, each behind
    a savepoint, and the disk is waited for once. Reading borrows a connection of its own and never waits for a writer.

    Args:
        path: the file; made, with its directory, if it is missing.

    Raises:
        StoreError: the file cannot be opened, is not a store, or was made by a newer version.
    """

    def __init__(self, path: str) -> None:
        self.path = str(Path(path).absolute())
        self._process = os.getpid()
        self._closed = False
        self._turn = threading.Lock()
        self._waiting: deque[_Write[Any]] = deque()
        self._idle_readers: list[sqlite3.Connection] = []
        if sqlite3.sqlite_version_info < _LEAST_SQLITE:
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old; use a Python with SQLite 3.37 or newer")
        with self._explained():
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect()
            try:
                use_wal(self._writer)
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.execute("PRAGMA secure_delete = ON")
                self._writer.execute("PRAGMA foreign_keys = ON")
                self._writer.execute("PRAGMA wal_autocheckpoint = 4000")
                migrate(self._writer, self.path)
            except BaseException:
                self._writer.close()
                raise

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` in a durable transaction: all of it or none of it, and acknowledged only when it is on the disk.

        Raises:
            StoreError: the engine failed; nothing of it is kept.
        """
        write = _Write(work)
        with self._explained():
            self._check_usable()
            self._waiting.append(write)
            with self._turn:
                # Whoever had the turn before may have taken this write along.
                while not write.done:
                    self._run_group()
            if write.error is not None:
                raise write.error
            return cast(T, write.value)

    def _run_group(self) -> None:
        """Runs the writes that wait in one transaction."""
        group = [self._waiting.popleft() for _ in range(min(len(self._waiting), _GROUP))]
        db = self._writer
        try:
            self._check_usable()
            db.execute("BEGIN IMMEDIATE")
            for write in group:
                self._run(write, alone=len(group) == 1)
            db.execute("COMMIT")
        except BaseException as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if not isinstance(error, Exception):
                for write in group:
                    write.error = StoreError(f"store {self.path}: the write was interrupted; repeat the call")
                raise
            for write in group:
                write.error = write.error or error
        finally:
            for write in group:
                write.done = True

    def _run(self, write: _Write[Any], alone: bool) -> None:
        db = self._writer
        if alone:
            write.value = write.work(db)
            return
        db.execute("SAVEPOINT one")
        try:
            write.value = write.work(db)
        except Exception as error:
            # A full disk ends the whole transaction, and then nobody's write is kept.
            if not db.in_transaction:
                raise
            write.error = error
            db.execute("ROLLBACK TO one")
        db.execute("RELEASE one")

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
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

    def empty_log(self) -> None:
        """Moves the write-ahead log into the file and empties it: older copies of what was deleted lie in it.

        A reader that holds on to an older state puts this off until the log is next emptied, at the latest when the
        last process closes the store.
        """
        with self._turn, self._explained():
            self._check_usable()
            self._writer.execute(f"PRAGMA busy_timeout = {int(_LOG_SECONDS * 1000)}")
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._writer.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")

    def close(self, last: Callable[[sqlite3.Connection], None]) -> None:
        """Closes all connections; a read that is under way in another thread ends undisturbed.

        Args:
            last: what is done before; where it fails, the next close does it.
        """
        with self._turn:
            if self._closed:
                return
            self._closed = True
            with self._explained():
                while self._idle_readers:
                    self._idle_readers.pop().close()
                if self._process == os.getpid():
                    with contextlib.suppress(sqlite3.Error):
                        last(self._writer)
                self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        db.execute("PRAGMA cache_size = -32768")
        return db

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError(f"store {self.path} is closed; open it again with open_store")
        if self._process != os.getpid():
            raise StoreError(f"store {self.path} was opened by process {self._process}; open it in each process")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the engine's errors into one line that says what to do."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"store {self.path}: {error}; {remedy_for(str(error))}") from error
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"{error.object!r:.80} is not valid UTF-8; re-encode the source as UTF-8") from None
