"""A log file read batch by batch, so that reading it again goes on where the store has it.

A file is known by its content, not by its name: what the store keeps with a batch is a digest of everything in the file
up to the batch's end. So a file that has grown goes on where it ended, a file that was renamed is the same file, and a
file that was replaced by another, even by one that begins alike, goes on where the two part.

Batches end at the first record behind each full `BLOCK_BYTES`, wherever reading began: these are the places a later run
looks for, and it finds them without parsing what lies before. Where reading stopped (the end, or a broken line) a
second mark says how far behind the last such place that was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from liber_runtime.behavior import Behavior
from liber_runtime.behavior_log import STANDARD_INPUT, START, BehaviorLog, Place, is_parquet, size_of
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.ingest import BATCH_BEHAVIORS, Batch
from liber_runtime.memory import Mark, MemoryStore

BLOCK_BYTES = 1 << 20
"""A batch ends at the first record behind each multiple of this."""

_READ_BYTES = 1 << 20
_MISSED_BLOCKS = 16
"""Blocks in a row without a mark after which no more are looked for: a record of several lines may hide one."""


class Prefix:
    """The first bytes of a file, as a digest that can be carried forward."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._digest = hashlib.blake2b(digest_size=16)
        self._line = 0
        self.offset = 0

    @property
    def digest(self) -> str:
        """Of the bytes before `offset`."""
        return self._digest.hexdigest()

    @property
    def place(self) -> Place:
        """Where the prefix ends."""
        return Place(self.offset, self._line)

    def copy(self) -> Prefix:
        """The same prefix, carried forward on its own."""
        other = Prefix(self._path)
        other._digest, other._line, other.offset = self._digest.copy(), self._line, self.offset
        return other

    def extend(self, offset: int) -> bool:
        """Takes in the bytes up to `offset`; False if the file ends before."""
        with self._rest() as stream:
            while self.offset < offset:
                data = stream.read(min(_READ_BYTES, offset - self.offset))
                if not data:
                    return False
                self._take(data)
        return True

    def extend_by_line(self) -> bool:
        """Takes in the bytes up to the next line break; False if the file ends before."""
        with self._rest() as stream:
            while data := stream.readline(_READ_BYTES):
                self._take(data)
                if data.endswith(b"\n"):
                    return True
        return False

    def _rest(self) -> BinaryIO:
        try:
            stream = self._path.open("rb")
            stream.seek(self.offset)
        except OSError as error:
            raise InvalidInputError(
                f"{self._path} cannot be read ({error.strerror}); check the path and its permissions"
            ) from None
        return stream

    def _take(self, data: bytes) -> None:
        self._digest.update(data)
        self._line += data.count(b"\n")
        self.offset += len(data)


class LogFile:
    """One log on its way into one store.

    Args:
        path: as `BehaviorLog` takes it.
        store: where it goes.
        from_start: read the whole file, whatever the store has of it.

    Attributes:
        start: where reading begins: behind what the store has already.
        size: bytes of a text file, rows of a Parquet file; None for standard input.

    Raises:
        InvalidInputError: the file cannot be opened.
        StoreError: the store failed.
    """

    def __init__(self, path: str | Path, store: MemoryStore, *, from_start: bool = False) -> None:
        self.path = path
        self.size: int | None = None
        self._store = store
        self._kept = Prefix(path)
        self._anchor = ""
        self._is_stream = str(path) == STANDARD_INPUT
        self._is_parquet = not self._is_stream and is_parquet(path)
        if not self._is_stream:
            self.size = size_of(path)
        if self._is_parquet:
            self._anchor = f"parquet:{digest_of(path)}"
            rows = 0 if from_start else store.position(self._anchor)
            self.start = Place(rows, rows)
        elif self._is_stream:
            self.start = START
        else:
            self._resume(from_start)
            self.start = self._kept.place

    def batches(self, log: BehaviorLog | None = None) -> Iterator[Batch]:
        """Yields what the store does not have yet.

        Args:
            log: the log if it is open already, as standard input is; it must begin at `start`.

        Raises:
            InvalidInputError: a broken line; what came before it was yielded.
        """
        log = log if log is not None else BehaviorLog(self.path, self.start)
        behaviors: list[Behavior] = []
        try:
            for marks in self._filled(log, behaviors):
                yield Batch(tuple(behaviors), marks, log.offset)
                behaviors.clear()
        except InvalidInputError as error:
            if log.place == START and not behaviors:
                raise
            yield from self._last(log, behaviors)
            raise going_on(error) from None
        yield from self._last(log, behaviors)

    def marks(self, place: Place) -> tuple[Mark, ...]:
        """What to mark when all before `place` is kept, wherever in the file that is.

        Raises:
            InvalidInputError: the file is shorter than that by now.
        """
        if self._is_parquet:
            return (Mark(self._anchor, place.offset),)
        if self._is_stream or place == START:
            return ()
        self._keep(place.offset)
        return Mark(f"log:{self._kept.digest}", place.offset), Mark(f"end:{self._anchor}", place.offset)

    def _filled(self, log: BehaviorLog, behaviors: list[Behavior]) -> Iterator[tuple[Mark, ...]]:
        """Adds to `behaviors`; yields the marks of a batch each time one is full."""
        by_count = self._is_stream or self._is_parquet
        boundary = _next_block(self.start.offset)
        for behavior in log:
            behaviors.append(behavior)
            if by_count:
                if len(behaviors) >= BATCH_BEHAVIORS:
                    yield self.marks(log.place)
            elif log.offset >= boundary:
                self._keep(boundary - 1)
                # Of a record of several lines only the first line's end is where the next run looks.
                if self._kept.extend_by_line() and self._kept.offset == log.offset:
                    self._anchor = self._kept.digest
                self._keep(log.offset)
                boundary = _next_block(log.offset)
                yield (Mark(f"log:{self._kept.digest}", log.offset),)

    def _last(self, log: BehaviorLog, behaviors: list[Behavior]) -> Iterator[Batch]:
        if behaviors or log.place != self.start:
            yield Batch(tuple(behaviors), self.marks(log.place), log.offset)

    def _keep(self, offset: int) -> None:
        if not self._kept.extend(offset):
            raise InvalidInputError(
                f"{self.path} has become shorter while it was read; let nothing rewrite it, and run the same command "
                "again"
            )

    def _resume(self, from_start: bool) -> None:
        """Finds the longest prefix that the store is known to have, and the digest of its last block."""
        head = self._kept.copy()
        if head.extend_by_line():
            head.extend_by_line()
        self._anchor = head.digest
        while not from_start:
            block = self._next_marked_block()
            if block is not None:
                self._kept, self._anchor = block, block.digest
                continue
            end = self._marked_end()
            if end is None:
                return
            self._kept = end

    def _next_marked_block(self) -> Prefix | None:
        prefix = self._kept.copy()
        for _ in range(_MISSED_BLOCKS):
            # A record that ends right at the multiple ends the block.
            if not prefix.extend(_next_block(prefix.offset) - 1) or not prefix.extend_by_line():
                return None
            if self._store.position(f"log:{prefix.digest}"):
                return prefix
        return None

    def _marked_end(self) -> Prefix | None:
        offset = self._store.position(f"end:{self._anchor}")
        prefix = self._kept.copy()
        if offset <= prefix.offset or not prefix.extend(offset):
            return None
        return prefix if self._store.position(f"log:{prefix.digest}") else None


def digest_of(path: str | Path) -> str:
    """Digest of a whole file."""
    whole = Prefix(path)
    whole.extend(Path(path).stat().st_size)
    return whole.digest


def going_on(error: InvalidInputError) -> InvalidInputError:
    """The refusal of a broken line behind others, with what to do about it."""
    return InvalidInputError(f"{error}; all before it is kept: correct the line and run the same command to go on")


def _next_block(offset: int) -> int:
    return (offset // BLOCK_BYTES + 1) * BLOCK_BYTES
