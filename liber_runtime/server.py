"""Starts a real tritonserver on a model repository, watches it, heals it and stops it, leaving nothing behind.

The server is a child process bound to this one: it ends with the `with` block, with `stop`, or when this process dies,
however it dies. A thread supervises it: a model whose Python process died is loaded anew (see
`liber_runtime.supervisor`), a server that died is started again on the same ports.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from liber_runtime.control import ServerControl, explain_failure, find_taken_port
from liber_runtime.exceptions import ConfigurationError, ServerError
from liber_runtime.installation import LaunchPlan, plan_launch
from liber_runtime.supervisor import Backoff, ModelVersion, Stub, StubWatch, end_stubs, expected_stubs, find_broken

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")

_PORT_ATTEMPTS = 5
_STUB_MEMORY_BYTES = 16 << 20
_STARTING_POLL_SECONDS = 0.05
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 2.0
_FAILURE_WINDOW_SECONDS = 60.0
_MOST_SERVER_DEATHS = 5

# Runs before the server does, in its process: has the kernel send SIGTERM when the parent dies. Not subprocess's
# preexec_fn, which is unsafe in a process with threads and upsets gRPC's fork handlers.
_BIND_TO_PARENT = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGTERM = 1, 15
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class _PortLostError(ServerError):
    """A port that was free a moment ago is taken."""


class TritonServer:
    """One tritonserver process and its supervisor.

    Example:
        >>> with TritonServer(Path("model_repository"), log_file=Path("runs/triton.log")) as server:
        ...     client = tritonclient.grpc.InferenceServerClient(server.grpc_url)

    Close clients before the block ends: Triton waits up to `stop_timeout` for connections that are kept open.

    Args:
        repository: the model repository; `config.pbtxt` per model.
        log_file: where the server's output goes; appended to, its directory is made.
        models: the models to load at the start; all in the repository if empty. Others can be loaded later.
        host: the address to listen on, for HTTP, gRPC and metrics.
        http_port: 0 for any free port, which then stays the same for the life of this object; so for the next two.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.
        environment: variables for the server and its models' processes, over this process's own.
        python: an interpreter whose directory holds the `python3` that models run; numpy < 2 must be in it.
        start_timeout: seconds until all models must be loaded; also the limit of a later load.
        stop_timeout: seconds that requests and models get to finish. A model instance takes about one second to end,
            and the instances of one model end one after another.

    Attributes:
        stub_restarts: model processes that died and were replaced.
        server_restarts: times the server died and was started again.
    """

    def __init__(
        self,
        repository: Path,
        *,
        log_file: Path,
        models: Sequence[str] = (),
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        environment: Mapping[str, str] | None = None,
        python: Path = Path(sys.executable),
        start_timeout: float = 120.0,
        stop_timeout: float = 5.0,
    ) -> None:
        self.repository = repository.absolute()
        self.log_file = log_file.absolute()
        self.host = host
        self.stub_restarts = 0
        self.server_restarts = 0
        self._models = tuple(models)
        self._requested_ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._ports = dict(self._requested_ports)
        self._environment = dict(environment or {})
        self._python = python
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._shared_memory_prefix = f"liber_{os.getpid()}_{secrets.token_hex(4)}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._failure: Exception | None = None
        self._server_backoff = Backoff(_FAILURE_WINDOW_SECONDS, longest=8.0)
        self._model_backoff = defaultdict[str, Backoff](lambda: Backoff(_FAILURE_WINDOW_SECONDS, longest=30.0))
        self._next_heal: dict[str, float] = {}

    @property
    def http_url(self) -> str:
        """`host:port` of HTTP, as `tritonclient.http` takes it."""
        return f"{self.host}:{self._ports['http']}"

    @property
    def grpc_url(self) -> str:
        """`host:port` of gRPC, as `tritonclient.grpc` takes it."""
        return f"{self.host}:{self._ports['grpc']}"

    @property
    def metrics_url(self) -> str:
        """The address of the Prometheus metrics."""
        return f"http://{self.host}:{self._ports['metrics']}/metrics"

    @property
    def process_id(self) -> int | None:
        """The running server's process id; changes when it is restarted, None when there is none."""
        return self._process.pid if self._process is not None and self.is_alive else None

    @property
    def is_alive(self) -> bool:
        """Whether the server process runs at this moment."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and returns once every model is loaded.

        Raises:
            ConfigurationError: there is no Triton, its Python would not do, the repository holds no models, or a
                port is in use.
            ServerError: a model did not load, or the server did not start.
        """
        if self._thread is not None:
            raise ServerError(f"the server on {self.repository} is already started: stop() it first")
        self._check_repository()
        started: Future[None] = Future()
        self._stopping.clear()
        self._ended.clear()
        self._failure = None
        # The kernel signals the server when the *thread* that launched it ends: all launches are this thread's, which
        # lives as long as the server may.
        self._thread = threading.Thread(target=self._run, args=(started,), name="triton-supervisor", daemon=True)
        try:
            self._thread.start()
            started.result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server, by force after `stop_timeout`; no process, shared memory or temporary file stays."""
        self._stopping.set()
        if self._thread is None:
            return
        self._thread.join(2 * self._stop_timeout)
        if self._thread.is_alive() and self._process is not None:
            # It waits for an answer (a long load) that the server need not give any more.
            self._process.kill()
        self._thread.join()
        self._thread = None

    def wait(self) -> None:
        """Blocks until the server has been stopped.

        Raises:
            ServerError: it died too often and the supervisor gave up.
        """
        self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def load_model(self, name: str) -> None:
        """Loads a model, or what changed of it on disk; does nothing if nothing did.

        Raises:
            ServerError: it did not load; a version that was served goes on being served.
        """
        self._control.load(name, self._start_timeout)

    def reload_model(self, name: str, versions: Collection[str] | None = None) -> None:
        """Loads a model anew even if nothing changed; ensembles that use it go on being served.

        Args:
            name: the model.
            versions: those to load anew; every loaded one if None.

        Raises:
            ServerError: it did not load; what was served goes on being served.
        """
        if versions is None:
            versions = [model.version for model in self._control.loaded_versions() if model.name == name]
        try:
            for version in versions:
                configuration = self._control.configuration(ModelVersion(name, version))
                os.utime(self.repository / name / version / (configuration["default_model_filename"] or "model.py"))
        except OSError:
            # The repository is read-only. Unloading works too, but takes the ensembles away until the load is done.
            self._control.unload(name)
        self.load_model(name)

    def _check_repository(self) -> None:
        if not self.repository.is_dir():
            raise ConfigurationError(f"no model repository at {self.repository}: run `liber build`, or name another")
        there = {entry.parent.name for entry in self.repository.glob("*/config.pbtxt")}
        if not there:
            raise ConfigurationError(f"{self.repository} holds no models (no */config.pbtxt): run `liber build`")
        for name in self._models:
            if name not in there:
                raise ConfigurationError(f"no model {name!r} in {self.repository}; it has {', '.join(sorted(there))}")

    @property
    def _control(self) -> ServerControl:
        return ServerControl(self.host, self._ports["http"])

    def _run(self, started: Future[None]) -> None:
        with tempfile.TemporaryDirectory(prefix="liber-triton-") as runtime:
            try:
                plan = plan_launch(self._python, self._environment, Path(runtime))
                self._launch_on_free_ports(plan)
                started.set_result(None)
                self._supervise(plan)
            except Exception as error:
                if started.done():
                    logger.error("%s", error)
                    self._failure = error
                else:
                    started.set_exception(error)
            finally:
                self._end_process()
        self._ended.set()

    def _launch_on_free_ports(self, plan: LaunchPlan) -> None:
        for remaining in reversed(range(_PORT_ATTEMPTS)):
            self._ports = find_ports(self.host, self._requested_ports)
            try:
                return self._launch(plan)
            except _PortLostError:
                if not remaining:
                    raise
        return None

    def _launch(self, plan: LaunchPlan) -> None:
        launcher = [str(plan.python), "-I", "-S", "-c", _BIND_TO_PARENT, str(os.getpid())]
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            log_start = log.tell()
            # A session of its own keeps a terminal's Ctrl-C from the server: ending it is `stop`'s to do.
            self._process = subprocess.Popen(
                [*launcher, str(plan.binary), *self._arguments(plan)],
                env=plan.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._await_ready(self._process, log_start)
        except ServerError:
            self._end_process()
            raise

    def _arguments(self, plan: LaunchPlan) -> list[str]:
        return [
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self._models or ("*",)),
            # It would start every model's process a second time, to ask for what config.pbtxt already says.
            "--disable-auto-complete-config",
            f"--backend-directory={plan.backends}",
            f"--cache-directory={plan.caches}",
            f"--backend-config=python,shm-default-byte-size={_STUB_MEMORY_BYTES}",
            f"--backend-config=python,shm-growth-byte-size={_STUB_MEMORY_BYTES}",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory_prefix}",
            *(f"--{service}-address={self.host}" for service in self._ports),
            *(f"--{service}-port={port}" for service, port in self._ports.items()),
            f"--exit-timeout-secs={math.ceil(self._stop_timeout)}",
        ]

    def _await_ready(self, process: subprocess.Popen[bytes], log_start: int) -> None:
        deadline = time.monotonic() + self._start_timeout
        while time.monotonic() < deadline:
            if self._stopping.wait(_STARTING_POLL_SECONDS):
                raise ServerError("the server was stopped while it started")
            if process.poll() is not None:
                raise self._explain_exit(process.returncode, log_start)
            if self._control.is_ready():
                return
        raise ServerError(
            f"tritonserver had not loaded its models after {self._start_timeout:g} s: see {self.log_file}, "
            "or give it a larger start_timeout"
        )

    def _explain_exit(self, code: int, log_start: int) -> ServerError:
        log = self.log_file.read_bytes()[log_start:].decode(errors="replace")
        taken = find_taken_port(log)
        if taken is not None:
            return _PortLostError(f"port {taken} on {self.host} was taken while the server started: start it again")
        reason = explain_failure(log) or f"tritonserver ended with exit status {code}"
        return ServerError(f"{reason} (log: {self.log_file})")

    def _supervise(self, plan: LaunchPlan) -> None:
        watch, next_look = self._new_watch(), 0.0
        while not self._stopping.wait(_POLL_SECONDS):
            if not self.is_alive:
                self._restart(plan)
                watch, next_look = self._new_watch(), 0.0
            elif watch.lost_one() or time.monotonic() >= next_look:
                # Asking Triton even when no loss was seen finds a stub that died before it was first seen alive.
                self._heal_models(watch)
                next_look = time.monotonic() + _LOOK_SECONDS

    def _new_watch(self) -> StubWatch:
        assert self._process is not None
        return StubWatch(self._process.pid)

    def _heal_models(self, watch: StubWatch) -> None:
        # A stub counts as living if it does before or after Triton was asked: one that an unload ends in between was
        # not lost, and one that was lost in between is found at the next look.
        living = watch.scan()
        try:
            expected = self._expected_stubs()
        except ServerError:
            return
        living |= watch.scan()
        broken = find_broken(expected, living.values())
        for name in sorted({model.name for model in broken}):
            if time.monotonic() >= self._next_heal.get(name, 0.0):
                lost = {model.version: count for model, count in broken.items() if model.name == name}
                replaced = [pid for pid, stub in living.items() if stub.model in broken and stub.model.name == name]
                if self._heal(name, lost):
                    watch.retire(replaced)

    def _expected_stubs(self) -> Counter[Stub]:
        control = self._control
        loaded = control.loaded_versions()
        return sum((expected_stubs(model, control.configuration(model)) for model in loaded), Counter[Stub]())

    def _heal(self, name: str, lost: Mapping[str, int]) -> bool:
        begin = time.monotonic()
        backoff = self._model_backoff[name]
        backoff.record(begin)
        count, versions = sum(lost.values()), ", ".join(sorted(lost))
        try:
            self.reload_model(name, lost)
        except ServerError as error:
            logger.error("model %s version %s: %d of its processes died, and: %s", name, versions, count, error)
            return False
        finally:
            self._next_heal[name] = time.monotonic() + backoff.delay
        self.stub_restarts += count
        seconds = time.monotonic() - begin
        logger.warning(
            "model %s version %s: %d of its processes died; replaced in %.2f s", name, versions, count, seconds
        )
        return True

    def _restart(self, plan: LaunchPlan) -> None:
        assert self._process is not None
        code = self._process.returncode
        deaths = self._server_backoff.record(time.monotonic())
        if deaths > _MOST_SERVER_DEATHS:
            raise ServerError(
                f"tritonserver ended {deaths} times within {_FAILURE_WINDOW_SECONDS:g} s, last with status {code}; "
                f"giving up: see {self.log_file}"
            )
        logger.warning("tritonserver ended with exit status %d; starting it again", code)
        self._end_process()
        if self._stopping.wait(self._server_backoff.delay):
            return
        try:
            self._launch(plan)
        except ServerError as error:
            logger.error("%s", error)
        else:
            self.server_restarts += 1

    def _end_process(self) -> None:
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            # Triton counts its own timeout in whole seconds, from when the last request is done.
            process.wait(self._stop_timeout + 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        end_stubs(self._shared_memory_prefix)
        for region in SHARED_MEMORY.glob(f"{self._shared_memory_prefix}*"):
            region.unlink(missing_ok=True)


def find_ports(host: str, requested: Mapping[str, int]) -> dict[str, int]:
    """Checks that ports are free and replaces each 0 by a free one.

    Args:
        host: the address to listen on.
        requested: port by service name.

    Raises:
        ConfigurationError: a port is in use, or cannot be listened on.
    """
    found: dict[str, int] = {}
    with contextlib.ExitStack() as open_sockets:
        # All are held until the last is found, so that they differ.
        for service, port in requested.items():
            try:
                listener = open_sockets.enter_context(socket.create_server((host, port)))
            except OSError as error:
                reason = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
                raise ConfigurationError(
                    f"{service} port {port} on {host} {reason}; choose another with {service}_port (0: any free one)"
                ) from None
            found[service] = listener.getsockname()[1]
    return found


def run_until_signalled(server: TritonServer, when_ready: Callable[[TritonServer], None]) -> None:
    """Starts a server, runs it until SIGTERM or SIGINT, and stops it; for a main thread.

    Args:
        server: one that is not started yet.
        when_ready: called once it serves, e.g. to print its addresses.

    Raises:
        ConfigurationError: see `TritonServer.start`.
        ServerError: it did not start, or died too often.
    """
    signals = (signal.SIGTERM, signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise _SignalledError

    previous = {each: signal.signal(each, interrupt) for each in signals}
    try:
        with server:
            when_ready(server)
            server.wait()
    except _SignalledError:
        pass
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


class _SignalledError(BaseException):
    """Not an Exception, so that nothing between the signal and `run_until_signalled` takes it for its own."""
