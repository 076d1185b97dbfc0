"""The processes of Python models: which there are, which there should be, and how to end those left behind.

Triton never restarts a dead stub (the process of one Python model instance): it goes on calling the model ready and
fails its requests. A stub that ended because its model was reloaded or unloaded leaves the same traces as one that
crashed: gone, or a zombie. Hence a model counts as broken only if Triton says it is ready while fewer of its stubs live
than its configuration asks for.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import psutil

from liber_runtime.server.installation import STUB_NAME

_INSTANCE_ARGUMENT = 8
_MEMORY_PREFIX = re.compile(r"liber_(?P<owner>\d+)_[0-9a-f]{8}_")


@dataclass(frozen=True, order=True)
class ModelVersion:
    """One version of one model; `version` as Triton names it, the name of its directory."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class Stub:
    """A stub's identity: which model version it runs, and as which instance (e.g. "ctr_backbone_0_1")."""

    model: ModelVersion
    instance: str


def parse_stub(command_line: Sequence[str]) -> Stub | None:
    """Reads a stub's identity off its command line; None for any other process, a zombie or one not yet started."""
    if len(command_line) <= _INSTANCE_ARGUMENT or PurePath(command_line[0]).name != STUB_NAME:
        return None
    version_directory = PurePath(command_line[1]).parent
    model = ModelVersion(version_directory.parent.name, version_directory.name)
    return Stub(model, command_line[_INSTANCE_ARGUMENT])


def expected_stubs(model: ModelVersion, configuration: Mapping[str, Any]) -> Counter[Stub]:
    """The stubs that a loaded model version has while healthy: none unless it is a Python model.

    Args:
        model: the version.
        configuration: its configuration as Triton completes it (`GET v2/models/<name>/versions/<version>/config`).
    """
    if configuration.get("backend") != "python":
        return Counter()
    expected: Counter[Stub] = Counter()
    for group in configuration["instance_group"]:
        for index in range(group["count"]):
            expected[Stub(model, f"{group['name']}_{index}")] += max(1, len(group["gpus"]))
    return expected


class StubWatch:
    """The stubs of one running server.

    Args:
        server: the server's process id.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self._living: dict[int, tuple[psutil.Process, Stub]] = {}
        self._retired: set[int] = set()

    def lost_one(self) -> bool:
        """Whether a stub seen alive by the last `scan` has ended since. Cheap: looks at these processes only."""
        return not all(_is_alive(process) for process, _ in self._living.values())

    def scan(self) -> dict[int, Stub]:
        """Looks at all of the server's children; returns the living stubs by process id, without the retired."""
        self._living = {}
        try:
            children = psutil.Process(self._server).children()
        except psutil.NoSuchProcess:
            children = []
        # The id of a process that has gone may come back as another's.
        self._retired &= {process.pid for process in children}
        for process in children:
            stub = _read_stub(process)
            if stub is not None and process.pid not in self._retired:
                self._living[process.pid] = (process, stub)
        return {pid: stub for pid, (_, stub) in self._living.items()}

    def retire(self, processes: Iterable[int]) -> None:
        """Forgets stubs that a reload has replaced; they take seconds to end and would pass for the new ones."""
        self._retired.update(processes)


def find_broken(expected: Counter[Stub], living: Collection[Stub]) -> Counter[ModelVersion]:
    """How many stubs each broken model version lacks; empty when all are well."""
    missing: Counter[ModelVersion] = Counter()
    for stub, count in (expected - Counter(living)).items():
        missing[stub.model] += count
    return missing


def end_stubs(shared_memory_prefix: str) -> None:
    """Kills the stubs of a server that is gone, known by the name of the shared memory they are given."""
    orphans = [p for p in psutil.process_iter() if _uses_shared_memory(p, shared_memory_prefix)]
    for process in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(orphans, timeout=5)


def abandoned_memory_prefixes() -> set[str]:
    """Shared memory prefixes of stubs whose owner, the process that started their server, is gone.

    A stub that was answering when its server was killed waits for ever, holding Python's lock, for that answer to be
    taken: Triton's own check for a lost parent cannot run. Only processes are looked at, not shared memory itself,
    which may be that of another container.
    """
    prefixes = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command_line = process.cmdline()
            if parse_stub(command_line) is None:
                continue
            owned = _MEMORY_PREFIX.match(command_line[2])
            if owned and not psutil.pid_exists(int(owned["owner"])):
                prefixes.add(owned.group())
    return prefixes


def memory_prefix(owner: int) -> str:
    """A new shared memory prefix for one server of the process `owner`."""
    return f"liber_{owner}_{secrets.token_hex(4)}_"


def _uses_shared_memory(process: psutil.Process, prefix: str) -> bool:
    try:
        command_line = process.cmdline()
    except psutil.Error:
        return False
    return parse_stub(command_line) is not None and command_line[2].startswith(prefix)


def _read_stub(process: psutil.Process) -> Stub | None:
    try:
        return parse_stub(process.cmdline()) if _is_alive(process) else None
    except psutil.Error:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
