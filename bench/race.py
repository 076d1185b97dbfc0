"""Calls of several engines taking turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psutil

from bench.engines import TOLERANCE, Engine, Probabilities
from liber_runtime.exceptions import LiberError

PAUSE = 0.002
"""Seconds between two calls: an engine whose threads spin after a call would take the processors from the next one."""

_WARM_UP = 2
_SINGLE_CALLS = 3


@dataclass(frozen=True)
class Limits:
    """How long engines are timed.

    Attributes:
        seconds: after so long no further round begins.
        least: rounds that there are in any case.
        most: rounds that there are at most.
    """

    seconds: float
    least: int
    most: int


@dataclass(frozen=True)
class Timing:
    """What one engine took.

    Attributes:
        engine: which.
        seconds: float64[rounds], of each call; call r of every engine of a race was in the same round.
        cpu_seconds: median processor time of a call in one thread; None if it answers in another process.
        difference: largest difference from the probabilities of the first engine with its weights; None if it has
            weights of its own.
        rss_bytes: of the processes that hold the model; None if that is the process of the benchmark.
    """

    engine: Engine
    seconds: npt.NDArray[np.float64]
    cpu_seconds: float | None
    difference: float | None
    rss_bytes: int | None

    def milliseconds(self, percent: float) -> float:
        """A percentile of the calls."""
        return 1e3 * float(np.percentile(self.seconds, percent))


def race(engines: Sequence[Engine], limits: Limits) -> list[Timing]:
    """Times the engines, in each round one call of each, in an order that moves on by one from round to round.

    Args:
        engines: those that are comparable and read the interest alike must give the same probabilities.
        limits: how long.

    Raises:
        LiberError: probabilities differ by more than `TOLERANCE`, or are no probabilities.
    """
    answers = [engine.call() for engine in engines]
    differences = compare(engines, answers)
    for _ in range(_WARM_UP - 1):
        for engine in engines:
            engine.call()
    seconds: list[list[float]] = [[] for _ in engines]
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        done = 0
        while done < limits.least or (done < limits.most and time.perf_counter() - began < limits.seconds):
            for turn in range(len(engines)):
                number = (turn + done) % len(engines)
                time.sleep(PAUSE)
                started = time.perf_counter()
                engines[number].call()
                seconds[number].append(time.perf_counter() - started)
            done += 1
    finally:
        gc.enable()
    return [
        Timing(engine, np.array(each), _cpu_seconds(engine), difference, _memory(engine))
        for engine, each, difference in zip(engines, seconds, differences, strict=True)
    ]


def compare(engines: Sequence[Engine], answers: Sequence[Probabilities]) -> list[float | None]:
    """How far each answer is from that of the first engine of its kind: with the interest, or without it.

    Raises:
        LiberError: see `race`.
    """
    references: dict[bool, Probabilities] = {}
    differences: list[float | None] = []
    for engine, answer in zip(engines, answers, strict=True):
        if not (np.isfinite(answer).all() and (answer >= 0).all() and (answer <= 1).all()):
            raise LiberError(f"{engine.name} ({engine.path}) gave what is no probability; nothing is timed")
        if not engine.comparable:
            differences.append(None)
            continue
        reference = references.setdefault(engine.liber, answer)
        difference = float(np.abs(answer - reference).max())
        if engine.precision == "fp32" and not difference <= TOLERANCE:
            raise LiberError(
                f"{engine.name} ({engine.path}) differs by {difference:.2g} from the engines with the same weights "
                f"(at most {TOLERANCE:g} is allowed); nothing is timed"
            )
        differences.append(difference)
    return differences


def _cpu_seconds(engine: Engine) -> float | None:
    if engine.single is None:
        return None
    engine.single()
    taken = []
    for _ in range(_SINGLE_CALLS):
        started = time.process_time()
        engine.single()
        taken.append(time.process_time() - started)
    return float(np.median(taken))


def _memory(engine: Engine) -> int | None:
    if engine.processes is None:
        return None
    return sum(int(psutil.Process(number).memory_info().rss) for number in engine.processes())
