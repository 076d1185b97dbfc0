"""Runs that are independent of each other: what is missing is done by several processes, what is done is kept."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from bench.quality_table import Result
from liber_runtime.exceptions import ConfigurationError, LiberError
from liber_runtime.progress import console, progress


class Run(NamedTuple):
    """One run: a backbone (or the trees), a variant and a seed."""

    backbone: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.backbone} {self.variant} seed {self.seed}"


class ResultCache:
    """Results on disk, a file each, by the digest of everything that they depend on."""

    def __init__(self, directory: Path) -> None:
        """Names the directory; it is made with the first result."""
        self._directory = directory

    def get(self, key: str) -> Result | None:
        """The result with this key, if it is there and whole."""
        try:
            kept = json.loads(self.path(key).read_text())
            return Result(**kept) if kept.keys() == Result.__dataclass_fields__.keys() else None
        except (OSError, ValueError):
            return None

    def put(self, key: str, result: Result) -> None:
        """Keeps a result: wholly or not at all, whenever the process is killed."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_suffix(f".{os.getpid()}")
        building.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
        building.replace(path)

    def path(self, key: str) -> Path:
        """The file of the result with this key."""
        return self._directory / f"{key}.json"


def complete(
    keys: Mapping[Run, str],
    cache: ResultCache,
    work: Callable[[Run, str], Result],
    jobs: int,
    initializer: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> dict[Run, Result]:
    """The results of all runs; those that the cache lacks are run, and kept as each ends.

    Args:
        keys: of the runs that are wanted, in the order to run them in.
        cache: of results.
        work: makes one, given its key too; importable by its name, for it runs in processes that start afresh.
        jobs: processes.
        initializer: called in each process before its first run.
        arguments: of `initializer`.

    Raises:
        LiberError: what a run raised; the others under way are finished and kept, and no more are begun.
        ConfigurationError: a process died.
    """
    results = {run: kept for run, key in keys.items() if (kept := cache.get(key)) is not None}
    missing = [run for run in keys if run not in results]
    if not missing:
        return results
    failure: BaseException | None = None
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(jobs, len(missing)), context, initializer, arguments) as pool,
        progress(f"{len(missing)} of {len(keys)} runs", len(missing)) as advance,
    ):
        begun: dict[Future[Result], Run] = {pool.submit(work, run, keys[run]): run for run in missing}
        try:
            for future in as_completed(begun):
                run = begun[future]
                if future.cancelled():
                    continue
                error = future.exception()
                if error is not None:
                    failure = failure or _explain(run, error)
                    pool.shutdown(wait=False, cancel_futures=True)
                    continue
                results[run] = future.result()
                cache.put(keys[run], results[run])
                advance(1)
                console.print(f"{run}: AUC {results[run].auc:.4f}, {results[run].seconds:.0f} s", soft_wrap=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failure is not None:
        raise failure
    return {run: results[run] for run in keys}


def _explain(run: Run, error: BaseException) -> BaseException:
    if isinstance(error, BrokenProcessPool):
        return ConfigurationError(
            f"the process of {run}, or one beside it, was killed, perhaps for memory; lower --jobs and start again: "
            "what was finished is kept"
        )
    if isinstance(error, LiberError):
        return type(error)(f"{run}: {error}")
    return error
