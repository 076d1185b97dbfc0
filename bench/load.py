"""Latency against offered load, up to saturation, from an open-loop generator.

``python -m bench.load --json FILE [--markdown FILE --plot FILE]`` makes a store and a bundle, serves them on a Triton
of its own on 127.0.0.1 and raises the load step by step, for each mix of calls, until the server does not keep up.
With ``--triton HOST:PORT --users-file U --items-file I`` it asks a server that runs already. Arrivals are a Poisson
process that a seed fixes before the step begins; a latency counts from when the call was due, not from when it was
sent; a call without an answer by its deadline has failed, and is slower than any answer in every percentile.

The bound is that of the server scenario of MLPerf Inference's DLRM-v2 benchmark: the p99 is at most 60 ms. Which model
answers is another matter: the load that meets it here is no MLPerf result.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.calls import Mix, draw_requests, read_ids
from bench.environment import describe_machine, describe_versions, run_command, scratch, show_figures
from bench.open_loop import Calls, Generator, draw_schedule, summarize
from bench.plot import draw_lines
from bench.subject import Probe, Subject, own_subject
from liber_runtime.exceptions import InvalidInputError

BOUND_MS = 60.0
"""p99 of the server scenario of MLPerf Inference's DLRM-v2 (v3.1 and later)."""

REQUESTS = 64
"""Different requests of a mix."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How a sweep goes about it.

    Attributes:
        bound_ms: the p99 that a load has to meet.
        deadline: seconds after which a call has failed.
        step_seconds: length of a step.
        first: the first load, as a share of what one caller that waits for each answer gets.
        factor: from one load to the next.
        most_steps: after which a sweep ends, saturated or not.
        refinements: steps that go between the last load that meets the bound and the first that does not.
        seed: of requests and arrivals.
    """

    bound_ms: float = BOUND_MS
    deadline: float = 2.0
    step_seconds: float = 9.0
    first: float = 0.25
    factor: float = 1.5
    most_steps: int = 8
    refinements: int = 2
    seed: int = 1


QUICK = {"step_seconds": 1.0, "factor": 4.0, "most_steps": 3, "refinements": 0}
"""What a test changes of a plan."""

_BEYOND_BOUND = 4.0
_BEYOND_ALONE = 10.0
_KEPT_UP = 0.9


def measure(subject: Subject, mixes: Sequence[Mix], plan: Plan) -> list[Row]:
    """Sweeps each mix.

    Returns:
        A row for each step, in order of the offered load within a mix: ``mix``, ``users``, ``candidates``, what
        `summarize` gives, ``saturated`` (the server did not keep up) and ``meets_bound``.

    Raises:
        ScoringError: the server does not answer.
        InvalidInputError: a mix cannot be drawn from the ids there are.
    """
    rows: list[Row] = []
    drawn = [draw_requests(mix, subject.users, subject.items, REQUESTS, plan.seed) for mix in mixes]
    for mix, requests in zip(mixes, drawn, strict=True):
        probe = Probe(subject, mix, plan.seed)
        alone = 1.0 / probe.measure()
        with Generator(subject.url, requests) as generator:
            generator.run(draw_schedule(plan.first * alone, 1.0, REQUESTS, plan.seed, deadline=plan.deadline))

            def step(per_second: float, probe: Probe = probe, generator: Generator = generator, mix: Mix = mix) -> Row:
                settled = probe.settle()
                schedule = draw_schedule(
                    per_second, plan.step_seconds, generator.requests, plan.seed, deadline=plan.deadline
                )
                return {
                    "mix": mix.name,
                    "users": mix.users,
                    "candidates": mix.candidates,
                    **judge(generator.run(schedule), plan.bound_ms, probe.seconds, settled=settled),
                }

            rows += sweep(step, plan.first * alone, plan)
    return rows


def sweep(step: Callable[[float], Row], first: float, plan: Plan) -> list[Row]:
    """Raises the load until the server does not keep up, then looks closer at where it ceases to meet the bound.

    Args:
        step: runs a load (calls in a second) and returns its row.
        first: load.
        plan: factor, most steps, refinements.

    Returns:
        The rows in order of the offered load.
    """
    done: list[tuple[float, Row]] = []
    per_second = first
    for _ in range(plan.most_steps):
        done.append((per_second, step(per_second)))
        if done[-1][1]["saturated"]:
            break
        per_second *= plan.factor
    for _ in range(plan.refinements):
        meeting = [load for load, row in done if row["meets_bound"]]
        above = [load for load, row in done if not row["meets_bound"] and load > max(meeting, default=math.inf)]
        if not above:
            break
        between = math.sqrt(max(meeting) * min(above))
        done.append((between, step(between)))
    return [row for _, row in sorted(done, key=lambda each: each[0])]


def judge(calls: Calls, bound_ms: float, alone: float, *, settled: bool) -> Row:
    """A step's figures, and what they say: did the server keep up, does this load meet the bound.

    Args:
        calls: of the step.
        bound_ms: on the p99.
        alone: seconds of a call on the idle server.
        settled: whether the server had come to rest before the step.
    """
    row = summarize(calls)
    row["valid"] = row["valid"] and settled
    p99, p99_ms = row["p99_ms"], math.inf if row["p99_ms"] is None else row["p99_ms"]
    hopeless = max(_BEYOND_BOUND * bound_ms, 1000 * _BEYOND_ALONE * alone)
    row["saturated"] = p99_ms > hopeless or row["achieved"] < _KEPT_UP * row["offered"]
    row["meets_bound"] = bool(row["valid"] and p99 is not None and p99 <= bound_ms)
    return row


def largest(rows: Sequence[Row]) -> dict[str, Row | None]:
    """By mix, the row of the largest offered load that meets the bound; None if none does."""
    found: dict[str, Row | None] = {row["mix"]: None for row in rows}
    for row in rows:
        best = found[row["mix"]]
        if row["meets_bound"] and (best is None or row["offered"] > best["offered"]):
            found[row["mix"]] = row
    return found


def table(rows: Sequence[Row], bound_ms: float) -> str:
    """The rows as Markdown, the largest load that meets the bound in bold."""
    best = largest(rows)
    lines = [
        "| mix | U | N | offered/s | achieved/s | failed | p50 ms | p99 ms | sender late p99 ms | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        is_best = row is best[row["mix"]]
        notes = [
            f"largest with p99 <= {bound_ms:g} ms" if is_best else "",
            "saturated" if row["saturated"] else "",
            "" if row["valid"] else "not valid",
        ]
        offered = f"**{row['offered']:g}**" if is_best else f"{row['offered']:g}"
        cells = [
            *(row["mix"], row["users"], row["candidates"], offered, f"{row['achieved']:g}", row["failed"]),
            *(_shown(row["p50_ms"]), _shown(row["p99_ms"]), _shown(row["lag_p99_ms"])),
            ", ".join(note for note in notes if note),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _shown(milliseconds: float | None) -> str:
    return "failed" if milliseconds is None else f"{milliseconds:.1f}"


def plot(rows: Sequence[Row], bound_ms: float) -> str:
    """p50 and p99 of every mix against the offered load, as SVG, the bound dashed.

    What failed is drawn at the height of the slowest answer, and above the bound.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    told = [row[figure] for row in rows for figure in ("p50_ms", "p99_ms") if row[figure] is not None]
    top = max([2 * bound_ms, *told])
    for row in rows:
        for figure in ("p50", "p99"):
            milliseconds = row[f"{figure}_ms"]
            series.setdefault(f"{row['mix']} {figure}", []).append(
                (row["offered"], top if milliseconds is None else milliseconds)
            )
    return draw_lines(
        series, title="Latency against offered load", x="calls offered in a second", y="ms", limit=bound_ms
    )


@contextlib.contextmanager
def _open_subject(arguments: argparse.Namespace, parent: Path | None) -> Iterator[Subject]:
    if arguments.triton is None:
        with scratch(parent) as directory, own_subject(directory, arguments.backbone, arguments.seed) as own:
            yield own
        return
    if arguments.users_file is None or arguments.items_file is None:
        raise InvalidInputError("--triton needs --users-file and --items-file: whom and what is it to be asked about?")
    yield Subject(arguments.triton, read_ids(arguments.users_file, "user"), read_ids(arguments.items_file, "item"))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--triton", metavar="HOST:PORT", help="gRPC of a server that runs; default: one of its own")
    parser.add_argument("--users-file", type=Path, help="user ids: one in a line, or JSON lines with 'user'")
    parser.add_argument("--items-file", type=Path, help="item ids: one in a line, or JSON lines with 'item'")
    parser.add_argument("--backbone", default="DIEN", help="of the own server's bundle")
    parser.add_argument("--candidates", type=int, default=1000, help="N of a call")
    parser.add_argument("--folded-users", type=int, default=32, help="U of a folded call")
    parser.add_argument("--bound-ms", type=float, default=BOUND_MS, help="p99 that a load has to meet")
    parser.add_argument("--deadline", type=float, default=Plan.deadline, help="seconds until a call has failed")
    parser.add_argument("--step-seconds", type=float, default=Plan.step_seconds, help="length of a step")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; figures mean little")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where store and bundle are made; default: the system's /tmp")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="write the plot here, as SVG")
    arguments = parser.parse_args()
    for name in ("bound_ms", "deadline", "step_seconds"):
        if not getattr(arguments, name) > 0:
            raise InvalidInputError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it has to be above 0")
    changes: Mapping[str, Any] = QUICK if arguments.quick else {"step_seconds": arguments.step_seconds}
    plan = Plan(bound_ms=arguments.bound_ms, deadline=arguments.deadline, seed=arguments.seed, **changes)
    mixes = (
        Mix("ranking", 1, arguments.candidates),
        Mix("folded", arguments.folded_users, arguments.candidates),
    )
    with _open_subject(arguments, arguments.directory) as subject:
        rows = measure(subject, mixes, plan)
        served = subject.served
    drawn = plot(rows, plan.bound_ms)
    figures = {
        "rows": rows,
        "largest_load": {mix: row and row["offered"] for mix, row in largest(rows).items()},
        "bound_ms": plan.bound_ms,
        "deadline_s": plan.deadline,
        "step_s": plan.step_seconds,
        "served": served,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": plan.seed,
        "plot": {"svg": drawn},
    }
    for path, text in ((arguments.markdown, table(rows, plan.bound_ms)), (arguments.plot, drawn)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    show_figures(figures, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
