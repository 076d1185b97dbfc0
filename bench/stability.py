"""What callers notice while a server is switched, broken and used for long.

``python -m bench.stability --json FILE [--what swap|stub|soak|all] [--minutes M]`` serves a made-up store and bundle on
a Triton of its own on 127.0.0.1, under a steady open-loop load (`bench/open_loop.py`), and

- ``swap``: deploys another bundle several times: failed requests, and the p99 around the switch beside that before it;
- ``stub``: kills the process of each model of ``liber_score``: what fails, how, and when all is served again;
- ``soak``: samples the resident memory of the server and of each of its processes every 10 s for M minutes. Before it
  come bursts of as many calls at once as Triton merges: a model's memory is that of the largest batch that it has seen,
  and what grows after that batch is a leak.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from bench.calls import Mix, Request, draw_requests
from bench.environment import describe_machine, describe_versions, run_command, scratch, show_figures
from bench.open_loop import Calls, Generator, Schedule, draw_schedule, join, summarize
from bench.subject import OwnSubject, Probe, own_subject
from builders.repository import deploy
from liber_runtime.exceptions import InvalidInputError, LiberError
from liber_runtime.scoring import ScoringClient
from liber_runtime.server.repository import read_config
from liber_runtime.server.stubs import Stub, StubWatch

SAMPLE_SECONDS = 10.0

FLAT = 0.05
"""How far the last fifth of a soak may lie from its first fifth."""

Row = dict[str, Any]

_REQUESTS = 64
"""Of each kind, and the most that Triton merges (`max_batch_size`)."""
_BURSTS = 3
_BURST_SECONDS = 30.0
_QUESTION = 20
_LONGEST_SECONDS = 600.0
_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.05
_MINUTE = 60.0
_FEWEST_SAMPLES = 10


@dataclass(frozen=True)
class Plan:
    """How long, how often, how much.

    Attributes:
        share: the load, as a share of what one caller that waits for each answer gets.
        deadline: seconds after which a call has failed.
        idle_seconds: before the first swap or kill, and after each.
        swaps: how many.
        kills: of each model.
        soak_minutes: the first of them warms up and is not looked at.
        candidates: N of each call.
        folded_users: U of every second call; the others have one user.
        seed: of requests and arrivals.
    """

    share: float = 0.25
    deadline: float = 5.0
    idle_seconds: float = 5.0
    swaps: int = 5
    kills: int = 2
    soak_minutes: float = 30.0
    candidates: int = 200
    folded_users: int = 16
    seed: int = 1


class Load:
    """A steady load on a subject, half ranking and half folded."""

    def __init__(self, subject: OwnSubject, plan: Plan) -> None:
        self._plan = plan
        mixes = (Mix("ranking", 1, plan.candidates), Mix("folded", plan.folded_users, plan.candidates))
        self._probes = [Probe(subject, mix, plan.seed) for mix in mixes]
        self.requests: list[Request] = [
            request
            for mix in mixes
            for request in draw_requests(mix, subject.users, subject.items, _REQUESTS, plan.seed)
        ]

    def measure(self) -> float:
        """Warms the server up; returns the calls in a second of the load."""
        return self._plan.share / statistics.mean(probe.measure() for probe in self._probes)

    def schedule(self, per_second: float, seconds: float) -> Schedule:
        """Arrivals of the load."""
        plan = self._plan
        return draw_schedule(per_second, seconds, len(self.requests), plan.seed, deadline=plan.deadline)

    def burst(self) -> Schedule:
        """All folded requests at once, twice: the first call keeps the server busy while it merges the others."""
        places = np.tile(np.arange(_REQUESTS, 2 * _REQUESTS), 2)
        return Schedule(np.zeros(len(places)), places, _BURST_SECONDS, _BURST_SECONDS)


def measure_swaps(subject: OwnSubject, bundles: Sequence[Path], plan: Plan) -> Row:
    """Deploys bundles in turns under load.

    Args:
        subject: the server; it serves the last of the bundles.
        bundles: that read the same vectors.
        plan: swaps and load.

    Returns:
        ``per_second``, ``failed`` (of all calls), ``errors``, ``idle`` and ``swap`` (figures of `summarize` of the
        calls due outside of deploys, and of those due from the beginning of a deploy until its end),
        ``p99_ratio`` (the latter over the former), and ``swaps``: for each its ``seconds`` and whether the answers
        changed, ``switched``.
    """
    load, spans, swaps = Load(subject, plan), [], []
    per_second = load.measure()
    with Generator(subject.url, load.requests) as generator, ScoringClient(subject.url) as client:
        generator.begin(load.schedule(per_second, _LONGEST_SECONDS))
        time.sleep(plan.idle_seconds)
        before = _ask(client, subject)
        for number in range(plan.swaps):
            begin = time.perf_counter()
            deploy(bundles[number % len(bundles)], subject.repository, subject.url)
            end = time.perf_counter()
            after = _ask(client, subject)
            swaps.append({"seconds": round(end - begin, 2), "switched": bool(np.abs(after - before).max() > 1e-6)})
            spans.append((begin, end))
            before = after
            time.sleep(plan.idle_seconds)
        calls = generator.stop()
    during = join([calls.between(*span) for span in spans])
    idle = join([calls.between(*span) for span in _gaps(calls, spans)])
    figures = {"idle": summarize(idle), "swap": summarize(during)}
    return {
        "per_second": round(per_second, 2),
        "failed": int((~calls.answered).sum()),
        "errors": errors(calls),
        **figures,
        "p99_ratio": _ratio(figures["swap"]["p99_ms"], figures["idle"]["p99_ms"]),
        "swaps": swaps,
    }


def measure_kills(subject: OwnSubject, models: Sequence[str], plan: Plan) -> list[Row]:
    """Kills the process of one model after the other under load, and waits until it is served again.

    Args:
        subject: the server.
        models: of ``liber_score``.
        plan: kills and load.

    Returns:
        A row for each kill: ``model``, ``restarted`` (the supervisor replaced it) and what `outage` says.
    """
    load, killed = Load(subject, plan), []
    per_second = load.measure()
    with Generator(subject.url, load.requests) as generator:
        generator.begin(load.schedule(per_second, _LONGEST_SECONDS))
        time.sleep(plan.idle_seconds)
        for _ in range(plan.kills):
            for model in models:
                restarts = subject.server.stub_restarts
                moment = kill_stub(subject, model)
                restarted = _wait_for(lambda before=restarts: subject.server.stub_restarts > before)  # type: ignore[misc]
                time.sleep(plan.deadline + plan.idle_seconds)
                killed.append((model, moment, restarted))
        calls = generator.stop()
    # A call that was on its way when a process was killed was due before that.
    begins = [moment - plan.idle_seconds / 2 for _, moment, _ in killed]
    return [
        {
            "model": model,
            "per_second": round(per_second, 2),
            "restarted": restarted,
            **outage(calls.between(begin, end), moment),
        }
        for (model, moment, restarted), begin, end in zip(killed, begins, [*begins[1:], calls.end], strict=True)
    ]


def outage(calls: Calls, killed: float) -> Row:
    """What callers saw of a process that was killed.

    Args:
        calls: due from some time before the kill until the next one.
        killed: when.

    Returns:
        ``requests`` due after the kill, ``failed``, ``errors``, ``clean`` (every failure was told with a status and in
        one line, none ran into its deadline). In seconds since the kill: ``first_failure_s`` and ``last_failure_s``
        (when they were told), ``last_failed_due_s`` (calls due later were answered), ``first_good_s`` (the first answer
        after the first failure). Further ``failing_s``, from the first failure to the last, and ``slowest_s``, the
        longest that a call took that was answered. None where nothing failed.
    """
    failed, ended = ~calls.answered, calls.ended
    told = ended[failed & ~np.isnan(ended)]
    row: Row = {
        "requests": int((calls.due >= killed).sum()),
        "failed": int(failed.sum()),
        "errors": errors(calls),
        "clean": all(is_clean(*each) for each in zip(calls.status, calls.message, strict=True)),
        "first_failure_s": None,
        "last_failure_s": None,
        "failing_s": None,
        "last_failed_due_s": None,
        "first_good_s": None,
        "slowest_s": _round(calls.latency[calls.answered].max(initial=0.0)),
    }
    if len(told):
        good = ended[calls.answered & (ended > told.min())]
        row["first_failure_s"], row["last_failure_s"] = _round(told.min() - killed), _round(told.max() - killed)
        row["last_failed_due_s"] = _round(calls.due[failed].max() - killed)
        row["failing_s"] = _round(told.max() - told.min())
        row["first_good_s"] = _round(good.min() - killed) if len(good) else None
    return row


def is_clean(status: str, message: str) -> bool:
    """Whether a caller could act on how a call ended: an answer, or an error of the server's own in one line."""
    return status == "OK" or (
        status in ("INTERNAL", "UNAVAILABLE", "INVALID_ARGUMENT") and bool(message) and "\n" not in message.strip()
    )


def errors(calls: Calls) -> dict[str, int]:
    """The failures by status and message, numbers in it aside."""
    found: dict[str, int] = {}
    for status, message in zip(calls.status, calls.message, strict=True):
        if status != "OK":
            key = f"{status}: {re.sub(r'[0-9]+', 'N', message.strip())[:200]}"
            found[key] = found.get(key, 0) + 1
    return found


def scoring_models(repository: Path) -> list[str]:
    """The Python models of ``liber_score``, in the order in which a request meets them."""
    steps = read_config(repository / "liber_score" / "config.pbtxt").ensemble_scheduling.step
    return [step.model_name for step in steps]


def kill_stub(subject: OwnSubject, model: str) -> float:
    """Kills the processes of the version of a model that serves; returns when.

    Raises:
        LiberError: there is none.
    """
    steps = read_config(subject.repository / "liber_score" / "config.pbtxt").ensemble_scheduling.step
    version = next(str(step.model_version) for step in steps if step.model_name == model)
    victims = [
        pid for pid, stub in _stubs(subject).items() if (stub.model.name, stub.model.version) == (model, version)
    ]
    if not victims:
        raise LiberError(f"no process of {model} version {version} is there to be killed")
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return time.perf_counter()


def measure_soak(subject: OwnSubject, plan: Plan, tell: Callable[[str], None]) -> Row:
    """Loads the server for long and samples the memory of its processes.

    Args:
        subject: the server.
        plan: minutes and load.
        tell: is told the memory once in a minute.

    Returns:
        ``minutes``, ``per_second``, ``failed``, ``failed_in_bursts``, ``errors``, ``processes`` (a row of `flatness`
        for each), ``flat``, ``restarts`` (of processes and of the server), and ``by_minute``: `summarize` of each
        minute.
    """
    load = Load(subject, plan)
    per_second = load.measure()
    seconds = plan.soak_minutes * _MINUTE
    interval = min(SAMPLE_SECONDS, seconds / _FEWEST_SAMPLES)
    samples: dict[str, list[tuple[float, int]]] = {}
    with Generator(subject.url, load.requests) as generator:
        bursts = [generator.run(load.burst()) for _ in range(_BURSTS)]
        begin = time.perf_counter()
        generator.begin(load.schedule(per_second, seconds))
        told = 0.0
        for number in range(math.ceil(seconds / interval)):
            time.sleep(max(0.0, begin + number * interval - time.perf_counter()))
            elapsed = time.perf_counter() - begin
            for name, resident in resident_memory(subject).items():
                samples.setdefault(name, []).append((elapsed, resident))
            if elapsed >= told:
                tell(f"{elapsed / _MINUTE:4.1f} min, MiB: {_mebibytes({n: s[-1][1] for n, s in samples.items()})}")
                told += _MINUTE
        calls = generator.finish()
    warm_up = min(_MINUTE, seconds / 5)
    processes = [{"process": name, **flatness(series, warm_up)} for name, series in sorted(samples.items())]
    minutes = np.arange(calls.begin, calls.begin + seconds, _MINUTE)
    return {
        "minutes": plan.soak_minutes,
        "per_second": round(per_second, 2),
        "failed": int((~calls.answered).sum()),
        "failed_in_bursts": sum(int((~burst.answered).sum()) for burst in bursts),
        "errors": errors(calls),
        "processes": processes,
        "flat": all(process["flat"] for process in processes),
        "restarts": subject.server.stub_restarts + subject.server.server_restarts,
        "by_minute": [
            summarize(calls.between(minute, min(minute + _MINUTE, calls.begin + seconds))) for minute in minutes
        ],
    }


def flatness(series: Sequence[tuple[float, int]], warm_up: float) -> Row:
    """How a process' memory went.

    Args:
        series: seconds since the beginning, and bytes resident.
        warm_up: seconds that do not count.

    Returns:
        ``first_fifth_mib`` and ``last_fifth_mib`` (medians), ``change`` (the latter over the former, less 1), ``flat``
        (`FLAT`), ``smallest_mib``, ``largest_mib``, ``samples``, and ``mib``: all of them, the warm-up included.
    """
    resident = [value / 2**20 for elapsed, value in series if elapsed >= warm_up]
    fifth = max(1, len(resident) // 5)
    first, last = statistics.median(resident[:fifth]), statistics.median(resident[-fifth:])
    return {
        "first_fifth_mib": round(first, 1),
        "last_fifth_mib": round(last, 1),
        "change": round(last / first - 1, 4),
        "flat": abs(last / first - 1) <= FLAT,
        "smallest_mib": round(min(resident), 1),
        "largest_mib": round(max(resident), 1),
        "samples": len(resident),
        "mib": [round(value / 2**20, 1) for _, value in series],
    }


def resident_memory(subject: OwnSubject) -> dict[str, int]:
    """Bytes resident, of ``tritonserver`` and of each of its models' processes by its instance."""
    server = subject.server.process_id
    if server is None:
        return {}
    found = {"tritonserver": psutil.Process(server).memory_info().rss}
    for pid, stub in _stubs(subject).items():
        found[stub.instance] = psutil.Process(pid).memory_info().rss
    return found


def _stubs(subject: OwnSubject) -> dict[int, Stub]:
    server = subject.server.process_id
    return StubWatch(server).scan() if server is not None else {}


def _gaps(calls: Calls, spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """What lies before, between and after the spans."""
    begins = [calls.begin, *(end for _, end in spans)]
    ends = [*(begin for begin, _ in spans), calls.end]
    return list(zip(begins, ends, strict=True))


def _bundles(subject: OwnSubject) -> list[Path]:
    """A bundle that differs from the one that serves, and that one."""
    backbone, history = subject.served["backbone"], subject.served["history"]
    other = subject.workshop.bundle("other", backbone, history_length=history - 1)
    return [other.directory, subject.workshop.directory / "bundle"]


def _ask(client: ScoringClient, subject: OwnSubject) -> npt.NDArray[np.float32]:
    """Always the same question."""
    return client.score(subject.users[0], subject.items[:_QUESTION]).probability


def _wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _ratio(value: float | None, other: float | None) -> float | None:
    return round(value / other, 2) if value is not None and other else None


def _round(seconds: float) -> float:
    return round(float(seconds), 3)


def _mebibytes(resident: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value / 2**20:.0f}" for name, value in resident.items())


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.stability", description=__doc__)
    parser.add_argument("--what", choices=("swap", "stub", "soak", "all"), default="all")
    parser.add_argument("--minutes", type=float, default=Plan.soak_minutes, help="length of the soak")
    parser.add_argument("--share", type=float, default=Plan.share, help="load, of what one waiting caller gets")
    parser.add_argument("--backbone", default="DIEN", help="of the bundle")
    parser.add_argument("--quick", action="store_true", help="a swap and a kill each, to see that it runs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where store and bundles are made; default: the system's /tmp")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    for name in ("minutes", "share"):
        if not getattr(arguments, name) > 0:
            raise InvalidInputError(f"--{name} is {getattr(arguments, name)}; it has to be above 0")
    plan = Plan(share=arguments.share, soak_minutes=arguments.minutes, seed=arguments.seed)
    if arguments.quick:
        plan = dataclasses.replace(plan, idle_seconds=1.0, swaps=1, kills=1, deadline=3.0)
    measures: Mapping[str, Callable[[OwnSubject], Any]] = {
        "swap": lambda subject: measure_swaps(subject, _bundles(subject), plan),
        "stub": lambda subject: measure_kills(subject, scoring_models(subject.repository), plan),
        "soak": lambda subject: measure_soak(subject, plan, lambda line: print(line, file=sys.stderr, flush=True)),
    }
    figures: dict[str, Any] = {}
    for name, measure in measures.items():
        if arguments.what in (name, "all"):
            # A server for each, so that none starts with what another left loaded.
            with (
                scratch(arguments.directory) as directory,
                own_subject(directory, arguments.backbone, plan.seed) as own,
            ):
                figures[name] = measure(own)
                figures["served"] = own.served
    figures |= {
        "load": {"share": plan.share, "candidates": plan.candidates, "users": [1, plan.folded_users]},
        "deadline_s": plan.deadline,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": plan.seed,
    }
    show_figures(figures, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
