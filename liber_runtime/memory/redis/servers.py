"""The servers behind a store: one Redis, or the masters of a cluster. Calls are sent to each in one go.

redis-py gives the connections (RESP, TLS, passwords). Which server has a slot is kept here, and not by its
``RedisCluster``, because ``WAIT`` must follow a write on the same connection and because one call of the store is one
round trip to each server, whatever slots it touches.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from redis import exceptions
from redis.connection import Connection, SSLConnection

from liber_runtime.exceptions import StoreError
from liber_runtime.memory.redis.address import Address
from liber_runtime.memory.redis.failures import explain, is_passing, is_refusal, redirection_of
from liber_runtime.memory.redis.keys import SLOTS
from liber_runtime.memory.redis.library import SOURCE, function_name

_pack: Callable[[tuple[Any, ...]], bytes] | None = None
with contextlib.suppress(ImportError):  # the package redis works without it, more slowly
    from hiredis import pack_command as _pack

CALLS_PER_ROUND = 2_000
"""Most calls on their way at once: bounds the memory that replies take."""

Node = tuple[str, int]
_LOST = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)
_LEAST_VERSION = (7, 0)


class Call(NamedTuple):
    """A command and the slot of its keys; bytes are a command as it goes over the wire."""

    slot: int
    command: tuple[str | bytes | int | float, ...] | bytes


def function(slot: int, verb: str, keys: Sequence[str], *arguments: str | bytes | int | float) -> Call:
    """A call of a function of the Lua library. All keys are named, so that a slot that moves is never half-seen."""
    return Call(slot, ("FCALL", function_name(verb), len(keys), *keys, *arguments))


@dataclass
class _Topology:
    """Which server has which slots; a single Redis has all."""

    ranges: list[tuple[int, int, Node]]
    nodes: list[Node]
    replicated: bool
    by_slot: list[Node | None] = field(init=False)

    def __post_init__(self) -> None:
        self.by_slot = [None] * SLOTS
        for first, last, node in self.ranges:
            self.by_slot[first : last + 1] = [node] * (last + 1 - first)


class Servers:
    """Connections to all servers of a store. Safe to share between threads.

    Args:
        address: where they are.

    Raises:
        StoreError: none can be reached, or they refuse us.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._options = address.connection_options()
        self._idle: dict[Node, list[Connection]] = {}
        self._closed = False
        self.is_cluster = self._detect_cluster()
        self._topology = self._look_around()

    @property
    def replicas(self) -> int:
        """How many must have a write before it is acknowledged."""
        wanted = self.address.replicas
        return int(self._topology.replicated) if wanted is None else wanted

    # -- where things are ----------------------------------------------------------------------------------------

    def _detect_cluster(self) -> bool:
        def ask(connection: Connection) -> bool:
            server = _parse_info(_ask(connection, "INFO", "server"))
            version = tuple(int(part) for part in server["redis_version"].split(".")[:2])
            if version < _LEAST_VERSION:
                raise StoreError(
                    f"store {self.address}: Redis {server['redis_version']} is too old; LIBER needs 7.0 or newer"
                )
            return _parse_info(_ask(connection, "INFO", "cluster"))["cluster_enabled"] == "1"

        return bool(self._ask_any(self.address.nodes, ask))

    def _look_around(self) -> _Topology:
        if not self.is_cluster:
            node = self._ask_any(self.address.nodes, lambda connection: (connection.host, connection.port))
            return _Topology([(0, SLOTS - 1, node)], [node], replicated=False)

        def ask(connection: Connection) -> _Topology:
            ranges, nodes = [], []
            # Slots name no replica that is away; what a cluster is meant to have must not depend on the moment.
            replicated = b"slave" in _ask(connection, "CLUSTER", "NODES")
            for first, last, *servers in _ask(connection, "CLUSTER", "SLOTS"):
                # A server that does not know its own address leaves it out: it is the one we asked.
                found = [(_text(server[0]) or connection.host, int(server[1])) for server in servers]
                ranges.append((int(first), int(last), found[0]))
                nodes += found
            if not ranges:
                raise exceptions.ConnectionError("CLUSTERDOWN the cluster has no slots")
            return _Topology(ranges, list(dict.fromkeys(nodes)), replicated)

        known = list(self._topology.nodes) if hasattr(self, "_topology") else []
        random.shuffle(known)  # lest we go on asking one that was left behind
        topology: _Topology = self._ask_any(dict.fromkeys([*known, *self.address.nodes]), ask)
        return topology

    def _ask_any(self, nodes: Iterable[Node], ask: Any) -> Any:
        """The answer of the first server that gives one."""
        failure: BaseException | None = None
        for node in nodes:
            try:
                connection = self._borrow(node)
                answer = ask(connection)
            except (exceptions.RedisError, OSError) as error:
                failure = error
                if is_refusal(error):
                    break
            else:
                self._give_back(node, connection)
                return answer
        assert failure is not None
        raise explain(self.address, failure) from failure

    # -- calls ---------------------------------------------------------------------------------------------------

    def run(self, calls: Sequence[Call], *, durable: bool = False) -> list[Any]:
        """The replies to all calls, in their order. Every call may be carried out more than once.

        Args:
            calls: sent to each server in one go.
            durable: return only when enough replicas have what was written.

        Raises:
            StoreError: a server refuses a call; servers stay away for longer than ``timeout_seconds``; too few
                replicas answered in time.
        """
        replies: list[Any] = []
        for start in range(0, len(calls), CALLS_PER_ROUND):
            replies += self._run(calls[start : start + CALLS_PER_ROUND], durable)
        return replies

    def run_one(self, call: Call, *, durable: bool = False) -> Any:
        """The reply to one call; see `run`."""
        return self._run([call], durable)[0]

    def stream(self, rounds: Iterable[Sequence[Call]], *, durable: bool = False) -> Iterator[list[Any]]:
        """The replies to each round of calls; a round is made and sent while the servers work on the one before.

        Rounds are carried out side by side, so none may build on another.

        Raises:
            StoreError: see `run`; what was sent by then may or may not be kept.
        """
        waiting: list[_Round] = []
        try:
            for calls in rounds:
                waiting.append(self._send(calls, dict.fromkeys(range(len(calls))), durable))
                if len(waiting) > 1:
                    yield self._finish(waiting.pop(0))
            while waiting:
                yield self._finish(waiting.pop(0))
        finally:
            for left in waiting:
                _drop(left)

    def _run(self, calls: Sequence[Call], durable: bool) -> list[Any]:
        return self._finish(self._send(calls, dict.fromkeys(range(len(calls))), durable))

    def _finish(self, sent: _Round) -> list[Any]:
        """Takes in the replies to a round, and sends again what has to be."""
        calls, replies = sent.calls, [None] * len(sent.calls)
        deadline, pause = 0.0, 0.01
        while True:
            failed = self._take_in(sent, replies)
            if not failed:
                return replies
            now = time.monotonic()
            deadline = deadline or now + self.address.timeout_seconds
            error = next(iter(failed.values()))
            if now > deadline:
                raise explain(self.address, error) from error
            left: dict[int, Node | None] = {}
            if self._adapt(calls, failed, left):
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, 0.25)
            sent = self._send(calls, left, sent.durable)

    def _adapt(self, calls: Sequence[Call], failed: Mapping[int, BaseException], left: dict[int, Node | None]) -> bool:
        """Learns from what failed where to send it next; returns whether to wait before that."""
        left.clear()
        redirections = {index: redirection_of(error) for index, error in failed.items()}
        moved = {calls[index].slot: to[1] for index, to in redirections.items() if to and to[0] == "MOVED"}
        away = any(not redirections[index] and not isinstance(error, _Unloaded) for index, error in failed.items())
        if moved or away:
            try:
                self._topology = self._look_around()
            except StoreError as error:
                if error.__cause__ is not None and is_refusal(error.__cause__):
                    raise
        for slot, node in moved.items():
            self._topology.by_slot[slot] = node
        for index, to in redirections.items():
            left[index] = to[1] if to and to[0] == "ASK" else None
        return away

    def _send(self, calls: Sequence[Call], left: Mapping[int, Node | None], durable: bool) -> _Round:
        """Sends what is left of some calls, to each server in one go."""
        sent = _Round(calls, left, durable, self.replicas if durable else 0)
        by_node: dict[Node, list[int]] = {}
        by_slot = self._topology.by_slot
        for index, asked in left.items():
            node = asked or by_slot[calls[index].slot]
            if node is None:
                sent.failed[index] = exceptions.ConnectionError("CLUSTERDOWN Hash slot not served")
            else:
                by_node.setdefault(node, []).append(index)
        for node, indices in by_node.items():
            commands: list[tuple[Any, ...] | bytes] = []
            for index in indices:
                if left[index]:
                    commands.append(("ASKING",))
                commands.append(calls[index].command)
            if sent.replicas:
                commands.append(("WAIT", sent.replicas, self.address.wait_milliseconds))
            try:
                connection = self._borrow(node)
                connection.send_packed_command(_pack_all(connection, commands))
            except _LOST as error:
                if is_refusal(error):
                    _drop(sent)
                    raise explain(self.address, error) from error
                sent.failed.update(dict.fromkeys(indices, error))
            except BaseException:
                _drop(sent)
                raise
            else:
                sent.on_their_way.append((node, indices, connection))
        return sent

    def _take_in(self, sent: _Round, replies: list[Any]) -> dict[int, BaseException]:
        """Fills in the replies; returns the calls to be sent again, with the reason."""
        fatal: BaseException | None = None
        while sent.on_their_way:
            node, indices, connection = sent.on_their_way.pop()
            try:
                fatal = self._receive(node, indices, connection, sent, replies) or fatal
            except BaseException:
                _drop(sent)
                raise
        if fatal is not None:
            raise fatal if isinstance(fatal, StoreError) else explain(self.address, fatal) from fatal
        return sent.failed

    def _receive(
        self,
        node: Node,
        indices: Sequence[int],
        connection: Connection,
        sent: _Round,
        replies: list[Any],
    ) -> BaseException | None:
        """Reads one server's replies; returns an error that no repetition would cure."""
        failed, left = sent.failed, sent.left
        fatal: BaseException | None = None
        unloaded = False
        try:
            for index in indices:
                try:
                    if left[index]:
                        connection.read_response()
                    replies[index] = connection.read_response()
                except exceptions.ResponseError as error:
                    if "Function not found" in str(error):
                        unloaded = True
                        failed[index] = _Unloaded(str(error))
                    elif is_passing(error) or redirection_of(error):
                        failed[index] = error
                    else:
                        fatal = error
            if sent.replicas:
                fatal = self._check_replicas(connection, sent, indices) or fatal
            if unloaded:
                _ask(connection, "FUNCTION", "LOAD", "REPLACE", SOURCE)
        except _LOST as error:
            # What was answered and not yet replicated may be lost with its server: all of it goes again.
            connection.disconnect()
            failed.update(dict.fromkeys(indices, error))
        except exceptions.ResponseError as error:
            self._give_back(node, connection)
            return error
        except BaseException:
            connection.disconnect()
            raise
        else:
            self._give_back(node, connection)
        return fatal

    def _check_replicas(self, connection: Connection, sent: _Round, indices: Sequence[int]) -> StoreError | None:
        try:
            acknowledged = connection.read_response()
        except exceptions.ResponseError as error:
            # The server has become a replica itself.
            sent.failed.update(dict.fromkeys(indices, error))
            return None
        if acknowledged >= sent.replicas:
            return None
        return StoreError(
            f"store {self.address}: kept on the master, not yet replicated: {acknowledged} of {sent.replicas} "
            f"replicas had it after {self.address.wait_milliseconds} ms; repeat the call, it is safe"
        )

    # -- connections ---------------------------------------------------------------------------------------------

    def _borrow(self, node: Node) -> Connection:
        idle = self._idle.setdefault(node, [])
        while True:
            try:
                connection = idle.pop()
            except IndexError:
                break
            if _is_alive(connection):
                return connection
            connection.disconnect()
        kind = SSLConnection if self.address.tls else Connection
        connection = kind(host=node[0], port=node[1], **self._options)
        connection.connect()
        return connection

    def _give_back(self, node: Node, connection: Connection) -> None:
        self._idle.setdefault(node, []).append(connection)
        if self._closed:
            self.close()

    def close(self) -> None:
        """Closes all connections; those in use when they are given back."""
        self._closed = True
        for idle in list(self._idle.values()):
            while idle:
                idle.pop().disconnect()


@dataclass
class _Round:
    """Calls that were sent together; see `Servers.stream`.

    Attributes:
        calls: all of them.
        left: those that were sent now, with the server where another one said they are to be asked for.
        durable: whether replicas must have what was written.
        replicas: how many each server was asked to wait for.
        failed: what has to be sent again, with the reason.
        on_their_way: what waits for replies, by server.
    """

    calls: Sequence[Call]
    left: Mapping[int, Node | None]
    durable: bool
    replicas: int
    failed: dict[int, BaseException] = field(default_factory=dict)
    on_their_way: list[tuple[Node, list[int], Connection]] = field(default_factory=list)


def _drop(sent: _Round) -> None:
    """Gives up replies that nobody waits for any more."""
    for _, _, connection in sent.on_their_way:
        connection.disconnect()


class _Unloaded(Exception):
    """The server has not our functions yet, or lost them."""


def _pack_all(connection: Connection, commands: Sequence[tuple[Any, ...] | bytes]) -> list[bytes]:
    """All commands as they go over the wire."""
    pack = _pack or (lambda command: b"".join(connection.pack_command(*command)))
    return [b"".join([command if isinstance(command, bytes) else pack(command) for command in commands])]


def _is_alive(connection: Connection) -> bool:
    """Whether the server has not closed the connection while it lay idle."""
    try:
        return not connection.can_read(timeout=0)
    except (exceptions.RedisError, OSError):
        return False


def _ask(connection: Connection, *command: str) -> Any:
    connection.send_command(*command)
    return connection.read_response()


def _parse_info(reply: bytes) -> dict[str, str]:
    return dict(line.split(":", 1) for line in _text(reply).splitlines() if ":" in line)


def _text(reply: bytes | str) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply
