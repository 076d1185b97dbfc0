"""What is there to launch: the Triton server on this machine and the Python its model processes will run.

Triton's Python backend runs each model instance in a process of its own, a "stub", which embeds the interpreter it
finds as `python3` on the server's PATH. All that can be wrong with that interpreter is found here, before a launch,
because Triton itself reports it late, cryptically or (numpy 2) not at all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from liber_runtime.exceptions import ConfigurationError

STUB_NAME = "triton_python_backend_stub"

_SYSTEM_BINARY = Path("/opt/tritonserver/bin/tritonserver")
_PROBE_SECONDS = 60.0
_SECRETS = ("LIBER_CONTROL_KEY", "LIBER_WRITER_API_KEY")
# Runs in the interpreter under inspection, which may be any Python 3. numpy is looked up, not imported: importing it
# costs 0.1 s or more, and an installed numpy may be unable to load. It runs isolated (-I), as stubs do: PYTHON*
# variables and the user's own packages count for neither.
_PROBE = """
import sys
import ctypes, importlib.metadata, json, os, sysconfig
version = "%d.%d" % sys.version_info[:2]
library = "libpython%s.so.1.0" % version
directories = [sysconfig.get_config_var("LIBDIR") or "", os.path.join(sys.base_prefix, "lib")]
directory = next((d for d in directories if os.path.exists(os.path.join(d, library))), None)
if directory is None:
    try:
        ctypes.CDLL(library)
        directory = ""
    except OSError:
        pass
try:
    numpy = importlib.metadata.version("numpy")
except importlib.metadata.PackageNotFoundError:
    numpy = None
print(json.dumps({"version": version, "library_directory": directory, "numpy": numpy}))
"""


@dataclass(frozen=True)
class TritonInstallation:
    """A Triton server on disk.

    Attributes:
        binary: the `tritonserver` executable.
        backends: the directory of its backends; holds `python/`.
        caches: the directory of its response caches.
        stubs: stub executables for several Pythons, as `<version>/triton_python_backend_stub`; None where the
            installation has one stub in `backends/python`, built for one Python.
    """

    binary: Path
    backends: Path
    caches: Path
    stubs: Path | None = None


@dataclass(frozen=True)
class StubPython:
    """The interpreter the models' processes run.

    Attributes:
        executable: what `python3` means on the server's PATH.
        version: e.g. "3.11".
        library_directory: where its shared libpython lies; None if the loader finds it by itself.
    """

    executable: Path
    version: str
    library_directory: Path | None


def find_tritonserver() -> TritonInstallation:
    """Finds the system's Triton (PATH, then /opt/tritonserver), else the one in the `nvidia-pytriton` wheel.

    Raises:
        ConfigurationError: neither is there.
    """
    on_path = shutil.which("tritonserver")
    for binary in ([Path(on_path).resolve()] if on_path else []) + [_SYSTEM_BINARY]:
        root = binary.parent.parent
        if binary.is_file() and (root / "backends" / "python").is_dir():
            return TritonInstallation(binary, root / "backends", root / "caches")
    # find_spec locates the package without running it: importing pytriton pulls in and starts much we do not use.
    spec = importlib.util.find_spec("pytriton")
    for location in (spec.submodule_search_locations or []) if spec else []:
        root = Path(location) / "tritonserver"
        if (root / "bin" / "tritonserver").is_file():
            return TritonInstallation(
                root / "bin" / "tritonserver", root / "backends", root / "caches", root / "python_backend_stubs"
            )
    raise ConfigurationError(
        "no tritonserver on PATH, in /opt/tritonserver or in the nvidia-pytriton wheel: "
        "pip install 'liber-runtime[serve]' (Linux), or run in NVIDIA's Triton image"
    )


@dataclass(frozen=True)
class LaunchPlan:
    """All that a launch needs but its ports.

    Attributes:
        python: the interpreter of the models' processes.
        environment: the variables of the server and of these processes.
        binary: the server.
        backends: the directory of its backends, with a stub that fits `python`.
        caches: the directory of its response caches.
    """

    python: Path
    environment: Mapping[str, str]
    binary: Path
    backends: Path
    caches: Path


def plan_launch(python: Path, extra: Mapping[str, str], runtime: Path) -> LaunchPlan:
    """Finds a server and a Python for its models, and joins them.

    Args:
        python: an interpreter; its directory comes first on the server's PATH.
        extra: environment variables over this process's own.
        runtime: an empty directory of this launch's own, kept as long as the server runs.

    Raises:
        ConfigurationError: there is no server, or no Python that would do.
    """
    installation = find_tritonserver()
    environment = server_environment(python, extra)
    stub_python = inspect_python(environment)
    if stub_python.library_directory is not None:
        _prepend(environment, "LD_LIBRARY_PATH", stub_python.library_directory)
    backends = prepare_backends(installation, stub_python, runtime)
    return LaunchPlan(stub_python.executable, environment, installation.binary, backends, installation.caches)


def server_environment(python: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: this process's, `python`'s directory first on PATH, then `extra` over it.

    One OpenMP thread per process unless someone asked for more: every model instance is a process, and each would
    otherwise start as many threads as there are cores. Secrets that models have no use for stay here.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    environment = {"OMP_NUM_THREADS": "1", **inherited, **extra}
    _prepend(environment, "PATH", python.parent)
    return environment


def _prepend(environment: dict[str, str], variable: str, directory: Path) -> None:
    environment[variable] = os.pathsep.join(filter(None, [str(directory), environment.get(variable)]))


def inspect_python(environment: Mapping[str, str]) -> StubPython:
    """Finds the Python that stubs would run in `environment` and checks that they can.

    Raises:
        ConfigurationError: there is none, it has no shared libpython, no numpy, or numpy 2 or later.
    """
    executable = shutil.which("python3", path=environment.get("PATH"))
    if executable is None:
        raise ConfigurationError(
            f"no python3 on the server's PATH {environment.get('PATH')!r}: Triton's models need one"
        )
    probe = subprocess.run(
        [executable, "-I", "-c", _PROBE], env=dict(environment), capture_output=True, text=True, timeout=_PROBE_SECONDS
    )
    if probe.returncode != 0:
        last_line = (probe.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigurationError(f"{executable} does not run (exit status {probe.returncode}): {last_line}")
    found = json.loads(probe.stdout.splitlines()[-1])
    _require_old_numpy(found["numpy"], executable)
    version, directory = found["version"], found["library_directory"]
    if directory is None:
        raise ConfigurationError(
            f"{executable} comes without libpython{version}.so.1.0, which Triton's Python models need: install your "
            f"distribution's libpython{version} package, or use a Python built with --enable-shared"
        )
    return StubPython(Path(executable), version, Path(directory) if directory else None)


def _require_old_numpy(version: str | None, executable: str) -> None:
    if version is None:
        raise ConfigurationError(
            f"{executable} has no numpy, which Triton's models need: {executable} -m pip install 'numpy<2'"
        )
    if int(version.split(".")[0]) >= 2:
        raise ConfigurationError(
            f"numpy {version} in {executable}: Triton's Python backend turns its tensors into zeros; "
            f"{executable} -m pip install 'numpy<2'"
        )


def prepare_backends(installation: TritonInstallation, python: StubPython, runtime: Path) -> Path:
    """Returns the directory of backends whose Python stub fits `python`.

    Triton looks for the stub beside its Python backend, where the wheel has none: a private directory of links joins
    them. Links, not copies: the libraries' search paths are relative to where they really lie.

    Args:
        installation: the server.
        python: what its models' processes run.
        runtime: a directory of this launch's own.

    Raises:
        ConfigurationError: there is no stub for this Python.
    """
    if installation.stubs is None:
        _require_matching_stub(installation.backends / "python" / STUB_NAME, python)
        return installation.backends
    stub = installation.stubs / python.version / STUB_NAME
    if not stub.is_file():
        known = ", ".join(sorted(entry.name for entry in installation.stubs.iterdir()))
        raise ConfigurationError(
            f"{python.executable} is Python {python.version}, for which {installation.stubs} has no stub (it has "
            f"{known}): use one of these"
        )
    backend = runtime / "backends" / "python"
    backend.mkdir(parents=True)
    for file in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / file).symlink_to(installation.backends / "python" / file)
    (backend / STUB_NAME).symlink_to(stub)
    return backend.parent


def _require_matching_stub(stub: Path, python: StubPython) -> None:
    linked = re.search(rb"libpython(3\.\d+)", stub.read_bytes()) if stub.is_file() else None
    if linked is None:
        raise ConfigurationError(f"{stub} is missing or not linked to a Python 3: reinstall Triton's Python backend")
    if linked[1].decode() != python.version:
        raise ConfigurationError(
            f"{python.executable} is Python {python.version}, but {stub} runs Python {linked[1].decode()}: use that "
            "version, or build the stub for yours"
        )
