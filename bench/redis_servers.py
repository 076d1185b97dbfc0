"""Real Redis servers for tests and benchmarks: one, or a cluster of three masters with a replica each.

All on 127.0.0.1, on ports that the operating system picks, in a directory that goes with them. Nothing is touched that
was not started here.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from liber_runtime.exceptions import ConfigurationError

MISSING = "there is no redis-server; install Redis 7.0 or newer (Debian: apt-get install redis-server)"

MASTERS = 3
_PATIENCE_SECONDS = 60.0
_LARGEST_PORT = 55_535  # a cluster's servers also talk to each other, at their port + 10000


def is_installed() -> bool:
    """Whether this machine has a redis-server."""
    return shutil.which("redis-server") is not None


class RedisServer:
    """One redis-server with an append-only file; killed and started again on the same port and data.

    Args:
        directory: of its data and its log.
        options: of redis-server beside those, e.g. ``("--requirepass", "secret")``.
        port: to listen on; None for any that is free.
    """

    def __init__(self, directory: Path, options: Sequence[str] = (), port: int | None = None) -> None:
        self.directory = directory
        self.port = port or _free_port()
        self.options = tuple(options)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it and waits until it listens.

        Raises:
            ConfigurationError: it is not installed, or does not start; the end of its log says why.
        """
        program = shutil.which("redis-server")
        if program is None:
            raise ConfigurationError(MISSING)
        self.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory / "redis.log"
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        command += ["--appendonly", "yes", "--save", "", "--logfile", str(log), "--daemonize", "no", *self.options]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
                self.kill()
                raise ConfigurationError(f"redis-server on port {self.port} did not start: {said}")
            time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to it, e.g. SIGSTOP to let it hang."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *words: str) -> str:
        """What the server answers to a command, as redis-cli prints it."""
        return _ask(self.port, *words)


class RedisCluster:
    """Three masters with a replica each.

    Args:
        directory: of the servers' data.
        node_timeout_milliseconds: how long a server may be away before its replica takes over.
    """

    def __init__(self, directory: Path, node_timeout_milliseconds: int = 1_000) -> None:
        options: tuple[str, ...] = ("--cluster-enabled", "yes")
        options += ("--cluster-node-timeout", str(node_timeout_milliseconds))
        # A replica that fell behind a little must still be let take over; with one replica there is nobody better.
        options += ("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0")
        self.servers = [RedisServer(directory / str(number), options) for number in range(2 * MASTERS)]

    @property
    def address(self) -> str:
        """``host:port,host:port...``."""
        return ",".join(server.address for server in self.servers)

    def start(self) -> None:
        """Starts all servers, joins them and waits until every master has its replica.

        Raises:
            ConfigurationError: it does not come about.
        """
        for server in self.servers:
            server.start()
        command = ["redis-cli", "--cluster", "create", *(server.address for server in self.servers)]
        command += ["--cluster-replicas", "1", "--cluster-yes"]
        made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS)
        if made.returncode:
            raise ConfigurationError(f"the cluster was not made: {made.stdout[-1000:]}{made.stderr[-1000:]}")
        self.wait_until_whole()

    def masters(self) -> list[RedisServer]:
        """The servers that take writes now."""
        return [server for server in self.servers if self._role(server) == "master"]

    def _role(self, server: RedisServer) -> str:
        with contextlib.suppress(OSError):
            return server.command("ROLE").split("\n")[0]
        return ""

    def wait_until_whole(self) -> None:
        """Waits until all slots are served and every master has a replica that keeps up."""

        def is_whole() -> bool:
            states = [server.command("CLUSTER", "INFO") for server in self.servers]
            masters = self.masters()
            return (
                all("cluster_state:ok" in state for state in states)
                and len(masters) == MASTERS
                and all("state=online" in master.command("INFO", "replication") for master in masters)
                and all(server.command("CLUSTER", "NODES").count("slave ") == MASTERS for server in self.servers)
            )

        _wait(is_whole, "the cluster is not whole")

    def wait_for_failover(self, killed: RedisServer) -> None:
        """Waits until a replica has taken over from a master that was killed."""
        alive = [server for server in self.servers if server is not killed]
        _wait(
            lambda: (
                sum(self._role(server) == "master" for server in alive) == MASTERS
                and all("cluster_state:ok" in server.command("CLUSTER", "INFO") for server in alive)
            ),
            f"nobody took over from {killed.address}",
        )


@contextlib.contextmanager
def single_redis(*options: str) -> Iterator[RedisServer]:
    """One server, running; `options` go to redis-server."""
    with tempfile.TemporaryDirectory(prefix="liber-redis-") as folder:
        server = RedisServer(Path(folder), options)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def redis_cluster(node_timeout_milliseconds: int = 1_000) -> Iterator[RedisCluster]:
    """A whole cluster, running."""
    with tempfile.TemporaryDirectory(prefix="liber-redis-") as folder:
        cluster = RedisCluster(Path(folder), node_timeout_milliseconds)
        try:
            cluster.start()
            yield cluster
        finally:
            for server in cluster.servers:
                server.kill()


def _free_port() -> int:
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port <= _LARGEST_PORT:
                with contextlib.suppress(OSError):
                    bus.bind(("127.0.0.1", port + 10_000))
                    return port


def _wait(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if is_so():
                return
        if time.monotonic() > deadline:
            raise ConfigurationError(f"{otherwise} after {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.02)


def _ask(port: int, *words: str) -> str:
    # By hand, and not through a client: what is tested should not look after itself.
    with socket.create_connection(("127.0.0.1", port), timeout=5.0) as wire, wire.makefile("rb") as replies:
        parts = [word.encode() for word in words]
        wire.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
        return _read(replies)


def _read(replies: BinaryIO) -> str:
    line = replies.readline()
    if not line:
        raise ConnectionError("the server closed the connection")
    kind, rest = line[:1], line[1:-2].decode()
    if kind == b"$":
        return "" if int(rest) < 0 else replies.read(int(rest) + 2)[:-2].decode(errors="replace")
    if kind == b"*":
        return "\n".join(_read(replies) for _ in range(max(int(rest), 0)))
    return rest
