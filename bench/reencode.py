"""What scorers notice of a re-encode: latency on an idle server against latency while every vector is made anew.

``python -m bench.reencode --json FILE`` builds a small bundle, serves it on a real Triton, and has scorers send
requests at a steady pace, first alone and then during whole re-encodes (encode, train, switch), in turns:
at low priority, as ``liber build re-encode`` runs, and at normal priority, to show what that gives. The seconds in
which the server loads the new bundle are part of these, and have a row of their own: they are the server's work.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import describe_machine, describe_versions, run_command, show_figures
from builders.build import BuildSettings, build, reencode, switch
from builders.datasets import sample
from builders.hyperparameters import Hyperparameters
from builders.priority import lower_priority
from builders.repository import deploy, publish
from builders.train import TrainingSettings
from liber_runtime.exceptions import LiberError
from liber_runtime.memory import open_store
from liber_runtime.scoring import ScoringClient
from liber_runtime.server import TritonServer
from liber_runtime.writers.statistical import StatisticalWriter

CANDIDATES = 100
WARM_UP_SECONDS = 3.0
IDLE, LOW, NORMAL, SWITCH = "idle", "reencode", "reencode_normal_priority", "switch"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the bundle that serves is, and what it serves from."""

    directory: Path
    store: str
    repository: Path


class Scorers:
    """Threads that score one user's candidates each, at times fixed beforehand.

    A latency counts from the time a request was due, so that a late one is not hidden by the request before it.
    """

    def __init__(
        self, url: str, users: Sequence[str], items: Sequence[str], count: int, per_second: float, seed: int
    ) -> None:
        self._url = url
        self._users = users
        self._items = items
        self._interval = 1.0 / per_second
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._score, args=(number, seed)) for number in range(count)]
        self._answered: list[tuple[float, float]] = []
        self._failed: list[float] = []
        self.errors: list[str] = []

    @contextmanager
    def running(self) -> Iterator[Scorers]:
        """Scores while the block runs."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _score(self, number: int, seed: int) -> None:
        random = np.random.default_rng((seed, number))
        due = time.perf_counter() + random.uniform(0, self._interval)
        with ScoringClient(self._url, own_connection=True) as client:
            while not self._stop.wait(max(0.0, due - time.perf_counter())):
                user = self._users[random.integers(len(self._users))]
                candidates = [self._items[place] for place in random.integers(len(self._items), size=CANDIDATES)]
                try:
                    client.score(user, candidates)
                    self._answered.append((due, time.perf_counter() - due))
                except LiberError as error:
                    self._failed.append(due)
                    self.errors.append(str(error))
                due += self._interval

    def latencies(self, spans: Sequence[tuple[float, float]]) -> tuple[np.ndarray[Any, np.dtype[np.float64]], int]:
        """Seconds of the requests that were due in one of the spans, float64[n], and how many failed."""

        def lies_within(due: float) -> bool:
            return any(begin <= due < end for begin, end in spans)

        answered = [seconds for due, seconds in list(self._answered) if lies_within(due)]
        return np.array(answered), sum(lies_within(due) for due in list(self._failed))


def measure(
    directory: Path, *, scorers: int, per_second: float, idle_seconds: float, rounds: int, seed: int
) -> list[dict[str, Any]]:
    """Measures in an empty directory.

    Args:
        directory: receives store, bundles and model repository.
        scorers: concurrent ones.
        per_second: requests of each.
        idle_seconds: length of each idle turn.
        rounds: turns of each kind.
        seed: of data, weights and requests.

    Returns:
        A row for each of ``idle``, ``reencode``, ``reencode_normal_priority``, and ``switch``, the last part of these
        two: requests, failed, seconds, per_second, p50_ms, p99_ms, and ratio, the p99 over that of ``idle``.
    """
    place = Place(directory, f"sqlite:///{directory / 'memory.db'}", directory / "model_repository")
    dataset = sample.generate(seed=seed, users=60, items=120, behaviors=4_000)
    store = open_store(place.store)
    try:
        build(store, dataset, StatisticalWriter(), directory / "build", _settings(seed))
        users = store.users()
    finally:
        store.close()
    publish(directory / "build" / "bundle", place.repository)
    spans: dict[str, list[tuple[float, float]]] = {IDLE: [], LOW: [], NORMAL: [], SWITCH: []}
    server = TritonServer(place.repository, log_file=directory / "triton.log", environment={"LIBER_STORE": place.store})
    with server:
        load = Scorers(server.grpc_url, users, list(dataset.items), scorers, per_second, seed)
        with load.running():
            time.sleep(WARM_UP_SECONDS)
            for turn in range(rounds):
                for kind in (LOW, NORMAL):
                    spans[IDLE].append(_wait(idle_seconds))
                    begin, switched, end = _reencode(place, server.grpc_url, kind, turn, seed)
                    spans[kind].append((begin, end))
                    spans[SWITCH].append((switched, end))
            spans[IDLE].append(_wait(idle_seconds))
    for error in sorted(set(load.errors)):
        print(f"a request failed: {error}", file=sys.stderr)
    return _rows(load, spans)


def _settings(seed: int) -> BuildSettings:
    return BuildSettings(seed=seed, hyperparameters=Hyperparameters(TrainingSettings(max_epochs=4)))


def _wait(seconds: float) -> tuple[float, float]:
    begin = time.perf_counter()
    time.sleep(seconds)
    return begin, time.perf_counter()


def _reencode(place: Place, url: str, kind: str, turn: int, seed: int) -> tuple[float, float, float]:
    """One re-encode in a process of its own, with no embedding known beforehand.

    Returns:
        When it began, when the new bundle was ready to be served, and when it was.
    """
    begin = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    ready = context.Value("d", 0.0)
    process = context.Process(
        target=_reencode_here, args=(place, url, kind == LOW, place.directory / f"{kind}-{turn}", seed, ready)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise LiberError(f"the re-encode ended with exit status {process.exitcode}; what it said is above")
    return begin, ready.value, time.perf_counter()


def _reencode_here(place: Place, url: str, lowered: bool, directory: Path, seed: int, ready: Any) -> None:
    # A session of its own, as a command has that a service manager or nohup's like started.
    os.setsid()
    if lowered:
        lower_priority()
    store = open_store(place.store)
    try:
        manifest, _ = reencode(store, StatisticalWriter(), directory, _settings(seed))
        ready.value = time.perf_counter()  # one clock for all processes
        deploy(directory / "bundle", place.repository, url)
        switch(store, manifest.fingerprint)
    finally:
        store.close()


def _rows(load: Scorers, spans: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind, when in spans.items():
        latencies, failed = load.latencies(when)
        seconds = sum(end - begin for begin, end in when)
        rows.append(
            {
                "what": kind,
                "requests": len(latencies) + failed,
                "failed": failed,
                "seconds": round(seconds, 1),
                "per_second": round(len(latencies) / seconds, 1),
                "p50_ms": round(1000 * float(np.percentile(latencies, 50)), 2),
                "p99_ms": round(1000 * float(np.percentile(latencies, 99)), 2),
            }
        )
    return [{**row, "ratio": round(row["p99_ms"] / rows[0]["p99_ms"], 2)} for row in rows]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.reencode", description=__doc__)
    parser.add_argument("--scorers", type=int, default=24, help="concurrent ones")
    parser.add_argument("--per-second", type=float, default=1.0, help="requests of each scorer")
    parser.add_argument("--idle-seconds", type=float, default=15.0, help="length of each idle turn")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="liber-reencode-") as directory:
        rows = measure(
            Path(directory),
            scorers=arguments.scorers,
            per_second=arguments.per_second,
            idle_seconds=arguments.idle_seconds,
            rounds=arguments.rounds,
            seed=arguments.seed,
        )
    figures = {
        "rows": rows,
        "scorers": arguments.scorers,
        "candidates": CANDIDATES,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": arguments.seed,
    }
    show_figures(figures, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
