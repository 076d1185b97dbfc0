"""Months of logs at once: each user's behaviors are gathered first, so that the user is written once.

Appending a log as it comes touches most users in every batch, and each touch reads and writes the user's row again.
Here the log is first spilled into parts on disk, by a hash of the user id; then each part is grouped by user and
appended user by user. Both keep the order of the behaviors of a user, which is all that Algorithm 1 depends on, so the
store ends up as if the log had been appended as it came.

Killed at any moment, the same call goes on where it was: while spilling from the last checkpoint in the manifest, while
appending from the store's mark for the part. Memory is bounded by `BulkLimits`, whatever the size of the logs or of one
user: a part that does not fit is grouped in pieces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from liber_runtime.behavior import Behavior
from liber_runtime.behavior_log import STANDARD_INPUT, START, BehaviorLog, Place, is_parquet, size_of
from liber_runtime.exceptions import ConfigurationError, IngestError, InvalidInputError
from liber_runtime.ingest import Batch, append_batches
from liber_runtime.ingest.log import LogFile, Prefix, digest_of, going_on
from liber_runtime.memory import Appended, Mark, MemoryStore

TellSpilled: TypeAlias = Callable[[int, int, int], None]
"""Called with the behaviors spilled so far, how far the logs are read (bytes; rows of Parquet), and how large they are.
"""

TellAppended: TypeAlias = Callable[[Appended, int, int], None]
"""Called with what was appended so far, how many of the behaviors that were spilled are done, and how many there are.
"""

_MANIFEST = "manifest.json"
_LOCK = "lock"
_FORMAT = 1
_PARQUET_IS_SMALLER = 4


@dataclasses.dataclass(frozen=True)
class BulkLimits:
    """What is held in memory and on disk at a time.

    Attributes:
        part_bytes: log bytes that make up one part.
        parts: most parts, each of which is an open file while spilling.
        chunk_bytes: of a part that are grouped by user at once.
        buffered: behaviors in memory while spilling.
        flushes: how often the buffer is written before the spill is made durable.
        batch: behaviors in one append.
    """

    part_bytes: int = 16 << 20
    parts: int = 256
    chunk_bytes: int = 64 << 20
    buffered: int = 100_000
    flushes: int = 10
    batch: int = 20_000


@dataclasses.dataclass
class _Spilled:
    """How far one log has been spilled."""

    path: str
    offset: int
    line: int
    digest: str


@dataclasses.dataclass
class _Manifest:
    """What is durable in the work directory.

    Attributes:
        job: names this backfill in the store's marks.
        store: digest of the store's URL.
        chunk_bytes: as `BulkLimits.chunk_bytes` when the backfill began: it decides the order within a part.
        logs: in the order they were given.
        sizes: bytes of each part.
        counts: behaviors of each part.
        complete: all logs are spilled.
        format: of this directory.
    """

    job: str
    store: str
    chunk_bytes: int
    logs: list[_Spilled]
    sizes: list[int]
    counts: list[int]
    complete: bool = False
    format: int = _FORMAT


class Backfill:
    """One backfill of some logs into one store; see the module.

    Args:
        store: where to.
        store_url: tells a work directory of this store from that of another.
        paths: log files as `BehaviorLog` takes them, oldest first; not standard input.
        work: directory for the parts, about as large as the logs; made if it is missing, removed at the end.
        limits: of memory and files.

    Raises:
        InvalidInputError: standard input, or a log that cannot be read.
        ConfigurationError: the work directory is in use, holds something else, or belongs to another backfill.
        IngestError: the work directory cannot be written.
        StoreError: the store failed.
    """

    def __init__(
        self,
        store: MemoryStore,
        store_url: str,
        paths: Sequence[str | Path],
        work: Path,
        limits: BulkLimits | None = None,
    ) -> None:
        if any(str(path) == STANDARD_INPUT for path in paths):
            raise InvalidInputError(
                "standard input cannot be read twice, as a bulk run that was cut short must; write it to a file, or "
                "leave --bulk out"
            )
        self._store = store
        self._paths = [str(Path(path).absolute()) for path in paths]
        self._work = work
        self._limits = limits or BulkLimits()
        self._store_digest = hashlib.blake2b(store_url.encode(), digest_size=16).hexdigest()

    def run(self, spilled: TellSpilled | None = None, appended: TellAppended | None = None) -> Appended:
        """Spills what is not spilled yet, appends what is not appended yet, and removes the work directory.

        Args:
            spilled: told how the first stage gets on.
            appended: told how the second stage gets on, after each batch.

        Returns:
            What this call appended.

        Raises:
            InvalidInputError: a broken line. All before it is spilled, and nothing appended.
            IngestError: the work directory cannot be written or read.
            StoreError: the store failed.
        """
        with self._explained(), self._locked():
            manifest = self._load()
            if not manifest.complete:
                self._spill(manifest, spilled)
            count = sum(manifest.counts)
            tell = None if appended is None else lambda total, done: appended(total, done, count)
            total = append_batches(self._store, self._batches(manifest), tell)
            self._mark_logs(manifest)
            self._remove(manifest)
            (self._work / _LOCK).unlink()
            with contextlib.suppress(OSError):  # someone put a file there
                self._work.rmdir()
        return total

    # -- the first stage: logs into parts ------------------------------------------------------------------------

    def _spill(self, manifest: _Manifest, tell: TellSpilled | None) -> None:
        size = sum(size_of(entry.path) for entry in manifest.logs)
        with contextlib.closing(_Parts(self._work, manifest)) as parts:
            before = 0
            for entry in manifest.logs:
                log = BehaviorLog(entry.path, Place(entry.offset, entry.line))
                try:
                    for flush, _ in enumerate(self._flushed(log, parts), start=1):
                        if flush % self._limits.flushes == 0:
                            self._checkpoint(manifest, parts, entry, log)
                        if tell is not None:
                            tell(parts.behaviors, before + log.offset, size)
                except InvalidInputError as error:
                    if log.place == START:
                        raise
                    self._checkpoint(manifest, parts, entry, log)
                    raise going_on(error) from None
                self._checkpoint(manifest, parts, entry, log)
                before += log.offset
        manifest.complete = True
        self._save(manifest)

    def _flushed(self, log: BehaviorLog, parts: _Parts) -> Iterator[None]:
        """Brings a log into the parts; yields each time the buffers were written."""
        for count, behavior in enumerate(log, start=1):
            parts.add(behavior)
            if count % self._limits.buffered == 0:
                parts.flush()
                yield
        parts.flush()
        yield

    def _checkpoint(self, manifest: _Manifest, parts: _Parts, entry: _Spilled, log: BehaviorLog) -> None:
        """Makes durable what was spilled, and then that it was."""
        parts.flush()
        parts.sync()
        entry.offset, entry.line = log.place
        entry.digest = _digest(entry)
        manifest.sizes, manifest.counts = list(parts.sizes), list(parts.counts)
        self._save(manifest)

    # -- the second stage: parts into the store ------------------------------------------------------------------

    def _batches(self, manifest: _Manifest) -> Iterator[Batch]:
        before = 0
        for part, count in enumerate(manifest.counts):
            source = f"bulk:{manifest.job}:{part}"
            done = self._store.position(source)
            if done < count:
                path = self._work / _part_name(part)
                for position, behaviors in self._grouped(path, manifest.sizes[part], manifest.chunk_bytes, done):
                    yield Batch(behaviors, (Mark(source, position),), before + position)
            before += count

    def _grouped(self, path: Path, size: int, chunk_bytes: int, done: int) -> Iterator[tuple[int, list[Behavior]]]:
        """Yields batches of a part user by user, each with the number of behaviors up to its end; skips `done`."""
        position = 0
        batch: list[Behavior] = []
        for lines_of_user in _users_of(path, size, chunk_bytes):
            skipped = min(max(done - position, 0), len(lines_of_user))
            position += skipped
            for line in lines_of_user[skipped:]:
                batch.append(_parse(line))
                position += 1
                if len(batch) >= self._limits.batch:
                    yield position, batch
                    batch = []
        if batch:
            yield position, batch

    def _mark_logs(self, manifest: _Manifest) -> None:
        """Says in the store that the logs are kept, so that nobody reads them again."""
        for entry in manifest.logs:
            with contextlib.suppress(InvalidInputError):  # a log that is gone by now needs no mark
                if _digest(entry) != entry.digest:
                    continue
                log = LogFile(entry.path, self._store)
                if log.start.offset < entry.offset:
                    for mark in log.marks(Place(entry.offset, entry.line)):
                        self._store.append((), mark)

    # -- the work directory --------------------------------------------------------------------------------------

    def _load(self) -> _Manifest:
        """The manifest there is, if it is of these logs and they still begin as they did; a new one otherwise."""
        manifest = self._read()
        if manifest is None:
            return self._begin()
        if manifest.store != self._store_digest or [entry.path for entry in manifest.logs] != self._paths:
            raise ConfigurationError(
                f"{self._work} holds an unfinished bulk run of other files or another store "
                f"({', '.join(entry.path for entry in manifest.logs):.200}); finish that one first, delete the "
                "directory, or name another with --work"
            )
        if not manifest.complete and any(_digest(entry) != entry.digest for entry in manifest.logs):
            self._remove(manifest)
            return self._begin()
        return manifest

    def _begin(self) -> _Manifest:
        others = [entry.name for entry in self._work.iterdir() if not _is_ours(entry.name)]
        if others:
            raise ConfigurationError(
                f"{self._work} is not empty ({others[0]!r}); name a directory of its own with --work"
            )
        for stale in self._work.glob("part-*"):
            stale.unlink()
        logs, size = [], 0
        for path in self._paths:
            start = LogFile(path, self._store).start
            entry = _Spilled(path, start.offset, start.line, "")
            entry.digest = _digest(entry)
            logs.append(entry)
            size += (
                Path(path).stat().st_size * _PARQUET_IS_SMALLER if is_parquet(path) else size_of(path) - start.offset
            )
        parts = max(1, min(self._limits.parts, -(-size // self._limits.part_bytes)))
        manifest = _Manifest(
            secrets.token_hex(8), self._store_digest, self._limits.chunk_bytes, logs, [0] * parts, [0] * parts
        )
        self._save(manifest)
        return manifest

    def _read(self) -> _Manifest | None:
        try:
            fields: dict[str, Any] = json.loads((self._work / _MANIFEST).read_text())
            if fields["format"] != _FORMAT:
                raise ValueError(f"format {fields['format']}")
            fields["logs"] = [_Spilled(**entry) for entry in fields["logs"]]
            return _Manifest(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigurationError(
                f"{self._work / _MANIFEST} is not understood ({error}); delete the directory, or name another with "
                "--work"
            ) from None

    def _save(self, manifest: _Manifest) -> None:
        fresh = self._work / f"{_MANIFEST}.new"
        with fresh.open("w") as file:
            json.dump(dataclasses.asdict(manifest), file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._work / _MANIFEST)
        directory = os.open(self._work, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _remove(self, manifest: _Manifest) -> None:
        """Removes the parts, and the manifest last: without it nobody knows what they are."""
        for part in range(len(manifest.sizes)):
            (self._work / _part_name(part)).unlink(missing_ok=True)
        (self._work / f"{_MANIFEST}.new").unlink(missing_ok=True)
        (self._work / _MANIFEST).unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._work.mkdir(parents=True, exist_ok=True)
        with (self._work / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigurationError(
                    f"{self._work} is in use by another bulk run; wait for it, or name another directory with --work"
                ) from None
            yield

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise IngestError(
                f"work directory {self._work}: {error.strerror or error}; make room there or make it writable and run "
                "the same command to go on, or name another with --work"
            ) from None


class _Parts:
    """The files that a log is spilled into."""

    def __init__(self, work: Path, manifest: _Manifest) -> None:
        self.sizes = list(manifest.sizes)
        self.counts = list(manifest.counts)
        self._buffers: list[list[str]] = [[] for _ in self.sizes]
        self._files: list[int] = []
        try:
            for part, size in enumerate(self.sizes):
                file = os.open(work / _part_name(part), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                self._files.append(file)
                os.ftruncate(file, size)  # what was spilled behind the last checkpoint is spilled again
        except OSError:
            self.close()
            raise

    @property
    def behaviors(self) -> int:
        """In all parts."""
        return sum(self.counts)

    def add(self, behavior: Behavior) -> None:
        """Puts a behavior to those of its user. Ids hold no control characters (`check_id`), so those part fields."""
        part = zlib.crc32(behavior.user_id.encode()) % len(self._buffers)
        self._buffers[part].append(
            f"{behavior.user_id}\t{behavior.item_id}\t{behavior.feedback!r}\t{behavior.timestamp!r}\t"
            f"{behavior.event_id}\n"
        )

    def flush(self) -> None:
        """Writes what is buffered."""
        for part, buffer in enumerate(self._buffers):
            if buffer:
                data = memoryview("".join(buffer).encode())
                self.sizes[part] += len(data)
                self.counts[part] += len(buffer)
                buffer.clear()
                while data:
                    data = data[os.write(self._files[part], data) :]

    def sync(self) -> None:
        """Makes durable what was written."""
        for file in self._files:
            os.fsync(file)

    def close(self) -> None:
        """Closes the files."""
        while self._files:
            os.close(self._files.pop())


def _users_of(path: Path, size: int, chunk_bytes: int) -> Iterator[list[bytes]]:
    """Yields the lines of one user after the other; of a part that is larger than a chunk, chunk by chunk."""
    with path.open("rb") as file:
        while file.tell() < size:
            data = file.read(min(chunk_bytes, size - file.tell()))
            data += file.readline()
            lines: dict[bytes, list[bytes]] = {}
            for line in data.split(b"\n")[:-1]:
                lines.setdefault(line[: line.index(b"\t")], []).append(line)
            del data
            yield from lines.values()


def _parse(line: bytes) -> Behavior:
    user, item, feedback, timestamp, event = line.decode().split("\t")
    return Behavior(user, item, float(feedback), float(timestamp), event)


def _digest(entry: _Spilled) -> str:
    """Of what of the log was spilled, as it is now; of all of it if it is Parquet, which does not grow."""
    if is_parquet(entry.path):
        return digest_of(entry.path)
    prefix = Prefix(entry.path)
    return prefix.digest if prefix.extend(entry.offset) else ""


def _part_name(part: int) -> str:
    return f"part-{part:04}"


def _is_ours(name: str) -> bool:
    return name in (_LOCK, _MANIFEST, f"{_MANIFEST}.new") or re.fullmatch(r"part-\d{4}", name) is not None
