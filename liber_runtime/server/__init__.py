"""Starts a real tritonserver on a model repository, watches it, heals it and stops it, leaving nothing behind.

The server is a child process bound to this one: it ends with the `with` block, with `stop`, or when this process dies,
however it dies. A thread supervises it: a model whose Python process died is loaded anew, a server that died is started
again on the same ports.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from liber_runtime.exceptions import ConfigurationError, ServerError
from liber_runtime.server.control import ServerControl
from liber_runtime.server.installation import LaunchPlan, TritonInstallation, find_tritonserver, plan_launch
from liber_runtime.server.process import PortLostError, TritonProcess, find_ports, sweep
from liber_runtime.server.repository import ModelConfig, models_to_load, read_configs, require_backends
from liber_runtime.server.security import Security
from liber_runtime.server.stubs import ModelVersion, abandoned_memory_prefixes
from liber_runtime.server.supervisor import Supervisor

__all__ = ["Security", "TritonInstallation", "TritonServer", "find_tritonserver", "run_until_signalled"]

logger = logging.getLogger(__name__)

_PORT_ATTEMPTS = 5


class TritonServer:
    """One tritonserver process and its supervisor.

    Example:
        >>> with TritonServer(Path("model_repository"), log_file=Path("runs/triton.log")) as server:
        ...     client = tritonclient.grpc.InferenceServerClient(server.grpc_url)

    Close clients before the block ends: Triton waits up to `stop_timeout` for connections that are kept open.

    Args:
        repository: the model repository; `config.pbtxt` per model.
        log_file: where the server's output goes; appended to, its directory is made.
        models: the models to load at the start, with their steps. If empty, the repository's ensembles, or all models
            where there is none. Others can be loaded later.
        host: the address to listen on, for HTTP, gRPC and metrics; with TLS, HTTP stays on this machine.
        http_port: 0 for any free port, which then stays the same for the life of this object; so for the next two.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.
        security: TLS and the control key; without it nothing is asked of callers.
        environment: variables for the server and its models' processes, over this process's own.
        python: an interpreter whose directory holds the `python3` that models run; numpy < 2 must be in it.
        start_timeout: seconds until all models must be loaded; also the limit of a later load.
        stop_timeout: seconds that requests and models get to finish. A model instance takes about one second to end,
            and the instances of one model end one after another.
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
        security: Security | None = None,
        environment: Mapping[str, str] | None = None,
        python: Path = Path(sys.executable),
        start_timeout: float = 120.0,
        stop_timeout: float = 5.0,
    ) -> None:
        self.repository = repository.absolute()
        self.log_file = log_file.absolute()
        self.host = host
        self._models = tuple(models)
        self._security = security or Security()
        # Triton's HTTP has no TLS, and serves all that its gRPC does.
        http_host = "127.0.0.1" if self._security.certificate is not None and not _is_loopback(host) else host
        self._hosts = {"http": http_host, "grpc": host, "metrics": host}
        self._requested_ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._ports = dict(self._requested_ports)
        self._environment = dict(environment or {})
        self._python = python
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._supervisor: Supervisor | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._ended.set()
        self._failure: Exception | None = None

    @property
    def http_url(self) -> str:
        """`host:port` of HTTP, as `tritonclient.http` takes it."""
        return f"{self._hosts['http']}:{self._ports['http']}"

    @property
    def grpc_url(self) -> str:
        """`host:port` of gRPC, as `tritonclient.grpc` takes it."""
        return f"{self.host}:{self._ports['grpc']}"

    @property
    def metrics_url(self) -> str:
        """The address of the Prometheus metrics."""
        return f"http://{self.host}:{self._ports['metrics']}/metrics"

    @property
    def is_alive(self) -> bool:
        """Whether the server process runs at this moment."""
        return self._supervisor is not None and self._supervisor.process.exit_status is None

    @property
    def process_id(self) -> int | None:
        """The running server's process id; changes when it is restarted, None while there is none."""
        return self._supervisor.process.pid if self._supervisor is not None and self.is_alive else None

    @property
    def stub_restarts(self) -> int:
        """How many model processes died and were replaced since `start`."""
        return self._supervisor.stub_restarts if self._supervisor is not None else 0

    @property
    def server_restarts(self) -> int:
        """How many times the server died and was started again since `start`."""
        return self._supervisor.server_restarts if self._supervisor is not None else 0

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
            ConfigurationError: there is no Triton, its Python would not do, the repository holds no models, or ones
                for another Triton, the certificates or the control key will not do, or a port is in use.
            ServerError: a model did not load, or the server did not start.
        """
        if self._thread is not None:
            raise ServerError(f"the server on {self.repository} is already started: stop() it first")
        self._check_repository()
        self._check_security()
        for prefix in abandoned_memory_prefixes():
            logger.warning("ending what a killed server left behind (%s)", prefix)
            sweep(prefix)
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
        if self._thread.is_alive() and self._supervisor is not None:
            # It waits for an answer (a long load) that the server need not give any more.
            self._supervisor.process.kill()
        self._thread.join()
        self._thread = None

    def wait(self) -> None:
        """Blocks until the server has ended for good.

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
        self._reload(name, versions, self._start_timeout)

    def _reload(self, name: str, versions: Collection[str], timeout: float) -> None:
        try:
            for version in versions:
                configuration = self._control.configuration(ModelVersion(name, version))
                os.utime(self.repository / name / version / (configuration["default_model_filename"] or "model.py"))
        except OSError:
            # The repository is read-only. Unloading works too, but takes the ensembles away until the load is done.
            self._control.unload(name)
        self._control.load(name, timeout)

    def _check_repository(self) -> None:
        if not self.repository.is_dir():
            raise ConfigurationError(f"no model repository at {self.repository}: run `liber build`, or name another")
        there = {entry.parent.name for entry in self.repository.glob("*/config.pbtxt")}
        if not there:
            raise ConfigurationError(f"{self.repository} holds no models (no */config.pbtxt): run `liber build`")
        for name in self._models:
            if name not in there:
                raise ConfigurationError(f"no model {name!r} in {self.repository}; it has {', '.join(sorted(there))}")

    def _check_security(self) -> None:
        self._security.check()
        if self._security.control_key and self._security.certificate is None and not _is_loopback(self.host):
            logger.warning(
                "the control key travels to %s in plain text; use --tls-certificate and --tls-key outside of a network "
                "that you trust",
                self.host,
            )

    @property
    def _control(self) -> ServerControl:
        return ServerControl(self._hosts["http"], self._ports["http"], self._security.headers)

    def _run(self, started: Future[None]) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix=f"liber-triton-{os.getpid()}-") as runtime:
                plan = plan_launch(self._python, self._environment, Path(runtime))
                configs = read_configs(self.repository)
                require_backends(self.repository, configs, self._loaded(configs), plan.backends, plan.binary)
                self._supervisor = self._launch_on_free_ports(plan)
                started.set_result(None)
                try:
                    self._supervisor.run(self._stopping)
                finally:
                    self._supervisor.process.end()
        except Exception as error:
            if started.done():
                logger.error("%s", error)
                self._failure = error
            else:
                started.set_exception(error)
        finally:
            self._ended.set()

    def _launch_on_free_ports(self, plan: LaunchPlan) -> Supervisor:
        for _ in range(_PORT_ATTEMPTS - 1):
            try:
                return self._launch_supervised(plan)
            except PortLostError:
                logger.info("a port was lost to another process before the server had it; trying again")
        return self._launch_supervised(plan)

    def _launch_supervised(self, plan: LaunchPlan) -> Supervisor:
        self._ports = find_ports(self._hosts, self._requested_ports)
        return Supervisor(lambda: self._launch(plan), self._control, self._reload)

    def _launch(self, plan: LaunchPlan) -> TritonProcess:
        process = TritonProcess(plan, self._arguments(), self.log_file, self._stop_timeout)
        try:
            process.await_ready(self._control, self._start_timeout, self._stopping)
        except ServerError:
            process.end()
            raise
        return process

    def _loaded(self, configs: Mapping[str, ModelConfig | None]) -> tuple[str, ...]:
        return self._models or models_to_load(configs)

    def _arguments(self) -> list[str]:
        # Read at every launch: what was published since the last one may have other models.
        models = self._loaded(read_configs(self.repository))
        return [
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in models),
            # It would start every model's process a second time, to ask for what config.pbtxt already says.
            "--disable-auto-complete-config",
            # Quantiles of latency beside the sums; they cost nothing that could be measured.
            "--metrics-config=summary_latencies=true",
            *(f"--{service}-address={host}" for service, host in self._hosts.items()),
            *(f"--{service}-port={port}" for service, port in self._ports.items()),
            *self._security.arguments(),
        ]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
