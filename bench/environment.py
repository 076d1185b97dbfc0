"""What a figure was measured on, and how a benchmark tells its figures."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil

from liber_runtime.exceptions import LiberError

PACKAGES = (
    "liber-runtime",
    "numpy",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "faiss-cpu",
    "tritonclient",
    "nvidia-pytriton",
    "scikit-learn",
    "redis",
    "hiredis",
)


def describe_machine(directory: Path | None = None) -> dict[str, Any]:
    """Processor, cores, memory, platform and kernel; with `directory`, the file system that it lies on."""
    machine: dict[str, Any] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform.platform(),
        "kernel": f"{platform.system()} {platform.release()}",
    }
    if directory is not None:
        machine["file_system"] = _file_system(directory)
    return machine


def describe_versions() -> dict[str, str]:
    """Versions of Python, of the engines and of the packages that make the figures; without those not installed."""
    versions = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    if (server := _redis_server()) is not None:
        versions["redis-server"] = server
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@contextlib.contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A directory below `parent`, or where the system has its temporary ones; gone afterwards."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="liber-bench-", dir=parent)).resolve()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _file_system(directory: Path) -> str:
    """Type and device of the mount that `directory` lies on: what an fsync costs is theirs."""
    where = directory.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if where.is_relative_to(mount.mountpoint)]
    if not mounts:
        return "unknown"
    mount = max(mounts, key=lambda mount: len(mount.mountpoint))
    return f"{mount.fstype} on {mount.device}"


def _redis_server() -> str | None:
    """Version of the redis-server on the path."""
    program = shutil.which("redis-server")
    if program is None:
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return next((word[2:] for word in said.split() if word.startswith("v=")), None)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def show_figures(figures: Mapping[str, Any], path: Path | None) -> None:
    """Prints what a benchmark measured as JSON, and writes it to `path` if there is one."""
    text = json.dumps(figures, indent=2)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def run_command(main: Callable[[], int]) -> NoReturn:
    """Ends the process with what `main` returns; an error of LIBER's own is one line and status 1."""
    try:
        sys.exit(main())
    except LiberError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
