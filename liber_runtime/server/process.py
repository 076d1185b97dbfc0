"""One run of the tritonserver binary: launched, awaited, explained when it fails, ended with all it leaves behind."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from liber_runtime.exceptions import ConfigurationError, ServerError
from liber_runtime.server.control import ServerControl, explain_failure, find_taken_port
from liber_runtime.server.installation import LaunchPlan
from liber_runtime.server.stubs import end_stubs, memory_prefix

_SHARED_MEMORY = Path("/dev/shm")
_STUB_MEMORY_BYTES = 16 << 20
_POLL_SECONDS = 0.05

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


class PortLostError(ServerError):
    """A port that was free a moment ago is taken."""


class TritonProcess:
    """Launches tritonserver; it dies with the *thread* that made this object, and with this process.

    Args:
        plan: what to launch.
        arguments: the server's, without those about its processes and their end.
        log_file: where its output goes; appended to, its directory is made.
        stop_timeout: seconds that requests and models get to finish.
    """

    def __init__(self, plan: LaunchPlan, arguments: Sequence[str], log_file: Path, stop_timeout: float) -> None:
        self._log_file = log_file
        self._stop_timeout = stop_timeout
        self._memory_prefix = memory_prefix(os.getpid())
        command = [
            *(str(plan.python), "-I", "-S", "-c", _BIND_TO_PARENT, str(os.getpid()), str(plan.binary)),
            *arguments,
            f"--backend-directory={plan.backends}",
            f"--cache-directory={plan.caches}",
            f"--backend-config=python,shm-default-byte-size={_STUB_MEMORY_BYTES}",
            f"--backend-config=python,shm-growth-byte-size={_STUB_MEMORY_BYTES}",
            f"--backend-config=python,shm-region-prefix-name={self._memory_prefix}",
            f"--exit-timeout-secs={math.ceil(stop_timeout)}",
        ]
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own keeps a terminal's Ctrl-C from the server: ending it is `end`'s to do.
            self._process = subprocess.Popen(
                command,
                env=plan.environment,
                # A stub imports from its working directory first: it must not be where someone keeps a tokenizers.py.
                cwd=plan.backends,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def await_ready(self, control: ServerControl, timeout: float, stopping: threading.Event) -> None:
        """Returns once all models are loaded.

        Raises:
            PortLostError: one of its ports was taken.
            ServerError: it ended, took longer than `timeout` seconds, or `stopping` was set.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if stopping.wait(_POLL_SECONDS):
                raise ServerError("the server was stopped while it started")
            if self.exit_status is not None:
                raise self._explain_exit()
            if control.is_ready():
                return
        raise ServerError(
            f"tritonserver had not loaded its models after {timeout:g} s: see {self._log_file}, or give it a larger "
            "start_timeout"
        )

    def kill(self) -> None:
        """Ends the server at once; `end` is still to be called."""
        self._process.kill()

    def end(self) -> None:
        """Ends the server, by force after the timeout, and removes what it left; does no harm when it is dead."""
        self._process.terminate()
        try:
            # Triton counts its own timeout in whole seconds, from when the last request is done.
            self._process.wait(self._stop_timeout + 2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        sweep(self._memory_prefix)

    def _explain_exit(self) -> ServerError:
        log = self._log_file.read_bytes()[self._log_start :].decode(errors="replace")
        taken = find_taken_port(log)
        if taken is not None:
            return PortLostError(f"port {taken} was taken while the server started: start it again")
        reason = explain_failure(log) or f"tritonserver ended with exit status {self.exit_status}"
        return ServerError(f"{reason} (log: {self._log_file})")


def sweep(prefix: str) -> None:
    """Ends the stubs of a server that is gone and removes its shared memory."""
    end_stubs(prefix)
    for region in _SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def find_ports(hosts: Mapping[str, str], requested: Mapping[str, int]) -> dict[str, int]:
    """Checks that ports are free and replaces each 0 by a free one.

    Args:
        hosts: the address to listen on, by service name.
        requested: port by service name.

    Raises:
        ConfigurationError: a port is in use, or cannot be listened on.
    """
    found: dict[str, int] = {}
    with contextlib.ExitStack() as open_sockets:
        # All are held until the last is found, so that they differ.
        for service, port in requested.items():
            try:
                listener = open_sockets.enter_context(socket.create_server((hosts[service], port)))
            except OSError as error:
                reason = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
                raise ConfigurationError(
                    f"{service} port {port} on {hosts[service]} {reason}; choose another "
                    f"({service}_port, --{service}-port; 0: any free one)"
                ) from None
            found[service] = listener.getsockname()[1]
    return found
