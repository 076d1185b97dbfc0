"""Runs the steps to an engine that are not done yet, and keeps what each has made.

A step works in a ``.partial`` directory, which is renamed when all its files are there and listed in ``manifest.json``.
So a directory with a manifest is whole: it is skipped the next time, and after an interruption only the step that was
interrupted is run again. One build works in an output directory at a time; a command that outlives a killed build still
holds the lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builders.llm.checkpoint import identity
from builders.llm.engines import TOKENIZER, Step
from builders.llm.plan import MANIFEST, EnginePlan, due_steps, read_manifest
from liber_runtime import __version__
from liber_runtime.bundle import digest_of
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.progress import console
from liber_runtime.wording import visible

FORMAT = 1

_TOLD_LINES = 5
_PATIENCE_SECONDS = 20.0


def build_engine(plan: EnginePlan) -> Path:
    """Runs the steps that are not done yet; returns the engine's directory.

    Raises:
        ConfigurationError: a command fails, or another build is at work in the same directory. What was done before is
            kept, and the log of the command.
    """
    output = plan.engine.parent
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output) as lock:
        due = due_steps(plan)
        before: list[dict[str, Any]] = []
        for step in plan.steps:
            if step not in due:
                console.print(f"{step.name}: done already, {step.directory}", soft_wrap=True)
            elif step.directory.exists():
                console.print(f"{step.name}: {step.directory} is damaged; it is made anew", soft_wrap=True)
            manifest = _make(step, plan, before, lock) if step in due else read_manifest(step)
            if manifest is not None:
                before.append({name: manifest[name] for name in ("step", "key", "command", "seconds")})
    return plan.engine


def _make(step: Step, plan: EnginePlan, before: list[dict[str, Any]], lock: int) -> dict[str, Any]:
    shutil.rmtree(step.partial, ignore_errors=True)
    step.partial.mkdir()
    began = time.monotonic()
    _run(step, lock)
    seconds = time.monotonic() - began
    missing = [name for name in step.files if not (step.partial / name).is_file()]
    if missing:
        raise ConfigurationError(
            f"{Path(step.command[0]).name} ended without an error and left no {missing[0]}; see {step.log}"
        )
    for source in step.tokenizer:
        (step.partial / TOKENIZER).mkdir(exist_ok=True)
        shutil.copyfile(source, step.partial / TOKENIZER / source.name)
    files = [path for path in step.partial.rglob("*") if path.is_file()]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step.name,
        "key": step.key,
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "model": {"name": plan.model, "identity": identity(plan.digests), "files": plan.digests},
        "settings": dataclasses.asdict(plan.settings),
        "command": list(step.command),
        "before": before,
        "versions": {"liber": __version__, **plan.versions},
        "gpu": plan.gpu,
        "files": {
            str(path.relative_to(step.partial)): {"bytes": path.stat().st_size, "sha256": digest_of(path)}
            for path in sorted(files)
        },
    }
    (step.partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    shutil.rmtree(step.directory, ignore_errors=True)
    step.partial.rename(step.directory)
    console.print(f"{step.name}: {step.directory} in {seconds:,.0f} s", soft_wrap=True)
    return manifest


def _run(step: Step, lock: int) -> None:
    """Runs a command; all it prints goes to its log and to standard error."""
    console.print(f"$ {shlex.join(step.command)}", soft_wrap=True)
    last: deque[str] = deque(maxlen=_TOLD_LINES)
    with step.log.open("w", encoding="utf-8") as log:
        try:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            raise ConfigurationError(f"{step.command[0]} cannot be run: {error.strerror}") from None
        with process, _ended(process):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                console.print(visible(line.rstrip("\n")), soft_wrap=True)
                if line.strip():
                    last.append(visible(line.strip()))
            status = process.wait()
    if status:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        short_of_memory = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
        told = " | ".join(last) or "nothing"
        program = " ".join(itertools.takewhile(lambda part: not part.startswith("--"), step.command))
        raise ConfigurationError(
            f"{step.name}: {program} {how}{short_of_memory}; it said: {told}; all of it is in "
            f"{step.log}, and what was done before is kept"
        )


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Ends a command with all it has started when the block is left early."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[int]:
    """Holds the output directory; commands inherit the lock."""
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another build is at work in {output}, or a command that it left; wait, or name another --output"
            ) from None
        yield lock.fileno()
