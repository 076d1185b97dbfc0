"""What the tests of ingestion share: logs, what a store holds, and the command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from liber_runtime.behavior import Behavior
from liber_runtime.memory import MemoryStore, open_store

HEADER = "user,item,timestamp,feedback\n"
PATIENCE_SECONDS = 60

SMALL = """
import functools
from liber_runtime.ingest import bulk, log
from liber_runtime.cli import main
log.BLOCK_BYTES = 2000
bulk.BulkLimits = functools.partial(
    bulk.BulkLimits, part_bytes=20_000, chunk_bytes=4_000, buffered=100, flushes=3, batch=50
)
"""


def lines(count: int, start: int = 0, users: int = 3) -> str:
    return "".join(f"u{n % users},i{n % 7},{1_600_000_000 + n},{n % 5}\n" for n in range(start, start + count))


def held(store: MemoryStore) -> dict[str, Any]:
    """All behaviors of a store as they lie."""
    found = {}
    for user in store.users():
        timeline = store.timeline(user)
        assert timeline is not None
        found[user] = ([each.behaviors for each in timeline.partitions], timeline.cache)
    return found


def streamed(behaviors: Iterable[Behavior], path: Path) -> dict[str, Any]:
    """What a store holds that was given all behaviors one after the other."""
    reference = open_store(f"sqlite:///{path}")
    try:
        reference.append(list(behaviors))
        return held(reference)
    finally:
        reference.close()


def start(*arguments: object, before: str = "") -> subprocess.Popen[str]:
    """The command in a process of its own, with small blocks."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LIBER_")}
    return subprocess.Popen(
        [sys.executable, "-c", f"{SMALL}\n{before}\nmain()", *map(str, arguments)],
        env=environment | {"COLUMNS": "200"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], given: str = "") -> tuple[int, str, str]:
    """Status, standard output and the last line of standard error."""
    printed, told = process.communicate(given, timeout=PATIENCE_SECONDS)
    assert "Traceback" not in told
    return process.returncode, printed, told.strip().splitlines()[-1] if told.strip() else ""
