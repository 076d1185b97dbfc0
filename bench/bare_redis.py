"""The bare loop on Redis: the very commands that the store's functions carried out, pipelined.

What a function of the store writes inside Redis lies in the server's append-only file as plain commands (``SADD``,
``HSET``, ``XADD``, ``HINCRBY``...). So the loop need not know how the store works: after the store has written a round,
its commands are read from the files of the masters, bytes and all, and carried out on the keys of a second store with
a name of equal length, in the same slots of the same servers. While it is timed the loop only sends those bytes, for
each append everything to all servers at once, waits for the replicas as the store does, and takes in the replies. It
has no functions to call, so it sends more commands than the store; that is what a client without them has to do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from redis.connection import Connection
from redis.exceptions import ResponseError

from bench.bare import CONDITION, WARM, Bare, settle
from bench.redis_servers import RedisCluster, RedisServer
from bench.workload import Source, describe, fill
from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import LiberError
from liber_runtime.memory import MemoryStore, open_store

T = TypeVar("T")

_LIVE, _BARE = "live", "bare"
_PREFIX = f"{_LIVE}:{{".encode()  # of all keys of the store
_PATIENCE_SECONDS = 30.0
_WAIT = b"*3\r\n$4\r\nWAIT\r\n$1\r\n1\r\n$4\r\n5000\r\n"  # one replica, five seconds: what the store waits for

_LENGTHS = {b"hash": "HLEN", b"set": "SCARD", b"zset": "ZCARD", b"stream": "XLEN", b"string": "STRLEN"}


class RedisGround:
    """One cluster; a store at a time."""

    name = "redis"

    def __init__(self, cluster: RedisCluster) -> None:
        """Uses a cluster that runs, and empties it after each store."""
        self._cluster = cluster
        for server in cluster.servers:
            # A file that was rewritten holds no commands.
            server.command("CONFIG", "SET", "auto-aof-rewrite-percentage", "0")

    @contextlib.contextmanager
    def store(self) -> Iterator[MemoryStore]:
        """See `Ground.store`."""
        url = f"redis://{self._cluster.address}/0?name={_LIVE}"
        try:
            with contextlib.closing(open_store(url, CONDITION)) as store:
                yield store
        finally:
            for master in self._cluster.masters():
                master.command("FLUSHALL")

    @contextlib.contextmanager
    def twins(self, users: Sequence[str], source: Source) -> Iterator[tuple[MemoryStore, Bare]]:
        """See `Ground.twins`."""
        with contextlib.closing(BareRedis(self._cluster.masters())) as bare, self.store() as store:
            describe(store, users)
            fill(store, dict.fromkeys(users, WARM), source)
            bare.catch_up()
            yield store, bare


class _Write(NamedTuple):
    """What one function wrote: its append's token, empty for other functions, and its commands as they are sent."""

    token: bytes
    commands: tuple[bytes, ...]


class BareRedis:
    """Connections to the masters and nothing else."""

    def __init__(self, masters: Sequence[RedisServer]) -> None:
        """Follows the files of these masters from now on."""
        self._followed = [_Followed(master) for master in masters]

    def catch_up(self) -> None:
        """Writes all that the store has written so far."""
        for followed in self._followed:
            followed.send([command for write in followed.new_writes() for command in write.commands])
            followed.receive()

    def beside(
        self, appends: Sequence[Sequence[Behavior]], run: Callable[[], T], threads: int
    ) -> tuple[T, float | None]:
        """See `Bare.beside`. The store goes first. Appends of several threads lie mixed in the files: not timed."""
        settle()
        ran = run()
        if threads > 1:
            self.catch_up()
            return ran, None
        by_append: dict[bytes, list[list[bytes]]] = {}
        for number, followed in enumerate(self._followed):
            for write in followed.new_writes():
                sent = by_append.setdefault(write.token, [[] for _ in self._followed])
                sent[number].extend(write.commands)
        if len(by_append) != len(appends):
            raise LiberError(
                f"the files tell of {len(by_append)} appends and {len(appends)} were made; bring bench.bare_redis "
                "up to what the store writes"
            )
        settle()
        began = time.perf_counter()
        for append in by_append.values():
            sent_to = [followed for followed, commands in zip(self._followed, append, strict=True) if commands]
            for followed, commands in zip(self._followed, append, strict=True):
                if commands:
                    followed.send([*commands, _WAIT])
            for followed in sent_to:
                followed.receive()
        return ran, time.perf_counter() - began

    def check(self) -> None:
        """See `Bare.check`: keys, their kinds and their lengths."""
        for followed in self._followed:
            live, bare = (followed.lengths(name) for name in (_LIVE, _BARE))
            if live != bare:
                different = dict(live.items() ^ bare.items())
                raise LiberError(
                    f"{len(different)} keys of the bare loop differ from the store's, e.g. {next(iter(different))!r}; "
                    "bring bench.bare_redis up to what the store writes"
                )

    def close(self) -> None:
        """Closes the connections."""
        for followed in self._followed:
            followed.close()


class _Followed:
    """One master: its append-only file from now on, and a connection to it."""

    def __init__(self, server: RedisServer) -> None:
        self._connection: Any = Connection(host="127.0.0.1", port=server.port, protocol=2)
        self._connection.connect()
        self._file = _newest_file(server.directory).open("rb")
        self._file.seek(0, 2)
        self._rest = b""
        self._marks = 0
        self._mark_tag = next(tag for tag in range(1000) if self._has_slot(tag))
        self._awaited = 0

    def _has_slot(self, tag: int) -> bool:
        try:
            self._ask("SET", f"mark:{{{tag}}}", "0")
        except ResponseError:
            return False
        return True

    def new_writes(self) -> list[_Write]:
        """What the store has written since the last look, on the bare keys.

        A mark that is written now ends it: what lies before the mark in the file is all there is.
        """
        self._marks += 1
        mark = f"seen-{self._marks}".encode()
        self._ask("SET", f"mark:{{{self._mark_tag}}}", mark.decode())
        writes: list[_Write] = []
        commands: list[bytes] = []
        token = b""
        for words in self._commands_until(mark):
            kind = words[0].upper()
            if kind in (b"SELECT", b"MULTI") or (len(words) == 1 and kind != b"EXEC"):
                continue
            if kind != b"EXEC":
                if not words[2 if kind == b"XGROUP" else 1].startswith(_PREFIX):
                    continue
                commands.append(_pack([_renamed(word) for word in words]))
                if kind == b"HSET" and b"revision" in words[2::2]:
                    token = words[words.index(b"revision") + 1]
                continue
            writes.append(_Write(token, tuple(commands)))
            commands, token = [], b""
        return [*writes, _Write(b"", tuple(commands))] if commands else writes

    def _commands_until(self, mark: bytes) -> Iterator[list[bytes]]:
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            self._rest += self._file.read()
            at = 0
            while (parsed := _parse(self._rest, at)) is not None:
                words, at = parsed
                if words[0].upper() == b"SET" and words[2] == mark:
                    self._rest = self._rest[at:]
                    return
                yield words
            self._rest = self._rest[at:]
            if time.monotonic() > until:
                raise LiberError(f"the append-only file {self._file.name} does not grow; is appendonly on?")
            time.sleep(0.01)

    def send(self, commands: Sequence[bytes]) -> None:
        """Sends commands, for `receive` to take in their replies."""
        self._awaited = len(commands)
        self._connection.send_packed_command([b"".join(commands)])

    def receive(self) -> None:
        """Takes in the replies to what was sent; an error is raised."""
        read = self._connection.read_response
        for _ in range(self._awaited):
            read()

    def lengths(self, name: str) -> dict[bytes, tuple[bytes, int]]:
        """Kind and length of each key of a store, by the key without the store's name."""
        found: dict[bytes, tuple[bytes, int]] = {}
        cursor = b"0"
        while True:
            cursor, keys = self._ask("SCAN", cursor.decode(), "MATCH", f"{name}:*", "COUNT", "1000")
            for key in keys:
                kind = self._ask("TYPE", key)
                found[key[len(name) :]] = kind, self._ask(_LENGTHS[kind], key)
            if cursor == b"0":
                return found

    def _ask(self, *words: str | bytes) -> Any:
        self._connection.send_command(*words)
        return self._connection.read_response()

    def close(self) -> None:
        self._connection.disconnect()
        self._file.close()


def _newest_file(directory: Path) -> Path:
    files = sorted((directory / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise LiberError(f"{directory} holds no append-only file; start redis-server with --appendonly yes")
    return files[-1]


def _renamed(word: bytes) -> bytes:
    return _BARE.encode() + word[len(_LIVE) :] if word.startswith(_PREFIX) else word


def _pack(words: Sequence[bytes]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%s\r\n" % (len(word), word) for word in words])


def _parse(data: bytes, at: int) -> tuple[list[bytes], int] | None:
    """The command that begins at `at`, and where the next one does; None if it is not all there."""
    if data[at : at + 1] == b"#":  # a comment line: the time
        end = data.find(b"\r\n", at)
        return None if end < 0 else _parse(data, end + 2)
    end = data.find(b"\r\n", at)
    if end < 0:
        return None
    words, count, at = [], int(data[at + 1 : end]), end + 2
    for _ in range(count):
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        first = end + 2
        at = first + int(data[at + 1 : end]) + 2
        if at > len(data):
            return None
        words.append(data[first : at - 2])
    return words, at
