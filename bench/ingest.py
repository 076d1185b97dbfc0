"""What the store costs: appends, reads, and the worker's own share, beside a bare loop that does the same writes.

``python -m bench.ingest --store sqlite|redis --json FILE`` fills a store of its own, in a scratch directory or on a
cluster of three masters and three replicas on 127.0.0.1 that it starts, measures, and removes all. ``--quick`` measures
less, to see that it works. Every figure is taken in this process, appends and reads as a caller sees them.

``rows[]``, one for each thing measured (null where a column means nothing):

- ``append_batch``: behaviors of many users in appends of ``batch``, ``threads`` at once. Durable: each append has been
  acknowledged. ``ratio_to_bare`` is the median over rounds of bare seconds / seconds; in each round both write the same
  behaviors, taking turns in who goes first. What the bare loop does is told in `bench.bare`.
- ``append_one``: one behavior in an append, ``threads`` at once.
- ``score_read``, ``score_read_32``: `MemoryStore.read` with history=20, partitions=40 of one user and of 32 drawn out
  of 2,000 with 100 to 300 behaviors each, vectors float32[32]. ``ratio_to_one`` is median over median.
- ``append_one`` and ``score_read`` with ``flat``: of one user with ``history`` behaviors, in the same store, the sizes
  in random order; all partitions have their texts and vectors. ``ratio_to_shortest`` is the median over the median of
  the shortest history. ``plot`` draws them (SVG).
- ``worker_noop``: a worker whose writer and encoder answer at once, from a queue of partitions to an empty one:
  ``p50_ms`` is milliseconds for each partition all told, with its summary, its shift and its vector.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bench.bare import WARM, Ground, SQLiteGround, settle
from bench.environment import describe_machine, describe_versions, run_command, scratch, show_figures
from bench.plot import draw_lines
from bench.workload import FINGERPRINT, NoopEncoder, NoopWriter, Source, describe, fill, make_knowledge, user_names
from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import LiberError
from liber_runtime.memory import MemoryStore
from liber_runtime.worker import Worker

HISTORY = 20
PARTITIONS = 40

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        users: that appends are of.
        rounds: in which the store and the bare loop take turns.
        behaviors: of one round, for each of the two.
        singles: appends of one behavior.
        readers: users of the store that is read.
        reads: calls of one user; a fifth as many of 32 users.
        histories: of the users whose costs are compared.
        trials: of each of those, both appends and reads.
        noop_partitions: in one round of the worker.
    """

    users: int = 1000
    rounds: int = 15
    behaviors: int = 20_000
    singles: int = 2000
    readers: int = 2000
    reads: int = 10_000
    histories: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    trials: int = 1500
    noop_partitions: int = 2000


QUICK = Sizes(
    users=100,
    rounds=3,
    behaviors=2000,
    singles=100,
    readers=50,
    reads=200,
    histories=(1000, 5000),
    trials=50,
    noop_partitions=100,
)


def row(what: str, seconds: Sequence[float] | None = None, **columns: Any) -> Row:
    """One row; from the seconds of single calls come its rate and its percentiles."""
    made: Row = {
        "what": what,
        "history": None,
        "per_second": None,
        "p50_ms": None,
        "p99_ms": None,
        "ratio_to_bare": None,
    }
    if seconds is not None:
        made["per_second"] = round(len(seconds) / sum(seconds), 1)
        made["p50_ms"] = round(1000 * float(np.percentile(seconds, 50)), 4)
        made["p99_ms"] = round(1000 * float(np.percentile(seconds, 99)), 4)
        made["calls"] = len(seconds)
    return made | columns


# -- appends, beside the bare loop -----------------------------------------------------------------------------


def measure_appends(ground: Ground, sizes: Sizes, seed: int, batch: int, threads: int = 1) -> Row:
    """Appends of `batch` behaviors by so many threads at once, beside the bare loop.

    Each thread appends the behaviors of users of its own, so that what is written does not depend on who comes first.
    The bare loop writes the same rows in as many transactions from one thread: it has no Python to overlap.
    """
    users = user_names(sizes.users)
    source = Source(seed)
    calls: list[float] = []
    rates: list[float] = []
    ratios: list[float] = []
    with ground.twins(users, source) as (store, bare):
        groups = [users[thread::threads] for thread in range(threads)]
        total = sizes.behaviors if batch > 1 else max(sizes.singles // sizes.rounds, 1)
        for _ in range(sizes.rounds):
            appends = max(total // (batch * threads), 1)
            work = [[source.batch(group, batch) for _ in range(appends)] for group in groups]
            in_order = [each for turns in zip(*work, strict=True) for each in turns]
            (seconds, each), plain = bare.beside(in_order, partial(append_all, store, work), threads)
            rates.append(appends * batch * threads / seconds)
            if plain is not None:
                ratios.append(plain / seconds)
            calls += each
        bare.check()
    made = row("append_batch" if batch > 1 else "append_one", calls)
    made["per_second"] = round(statistics.median(rates), 1)
    made["ratio_to_bare"] = round(statistics.median(ratios), 3) if ratios else None
    appended = sizes.rounds * max(total // (batch * threads), 1) * batch * threads
    history = WARM + appended // sizes.users  # at the end
    return made | {"history": history, "batch": batch, "threads": threads, "users": sizes.users}


def append_all(store: MemoryStore, work: Sequence[Sequence[Sequence[Behavior]]]) -> tuple[float, list[float]]:
    """Appends each thread's batches; returns the seconds from the first to the last, and those of each append."""
    calls: list[list[float]] = [[] for _ in work]
    start = threading.Barrier(len(work) + 1)

    def run(batches: Sequence[Sequence[Behavior]], seconds: list[float]) -> None:
        start.wait()
        for batch in batches:
            began = time.perf_counter()
            store.append(batch)
            seconds.append(time.perf_counter() - began)

    if len(work) == 1:
        start = threading.Barrier(1)
        began = time.perf_counter()
        run(work[0], calls[0])
        return time.perf_counter() - began, calls[0]
    threads = [threading.Thread(target=run, args=each) for each in zip(work, calls, strict=True)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, list(itertools.chain(*calls))


# -- reads -------------------------------------------------------------------------------------------------------


def measure_reads(store: MemoryStore, users: Sequence[str], sizes: Sizes, draw: random.Random) -> list[Row]:
    """What one score needs, of one user and of 32 in one call."""
    one: list[float] = []
    many: list[float] = []
    for call in range(sizes.reads + 100):
        seconds = timed(store.read, draw.choices(users, k=1), HISTORY, PARTITIONS, FINGERPRINT)
        if call >= 100:
            one.append(seconds)
        if call % 5 == 0:
            seconds = timed(store.read, draw.sample(users, 32), HISTORY, PARTITIONS, FINGERPRINT)
            if call >= 100:
                many.append(seconds)
    columns = {"history": 200, "users": len(users), "dimension": 32}
    ratio = statistics.median(many) / statistics.median(one)
    return [
        row("score_read", one, **columns),
        row("score_read_32", many, **columns, ratio_to_one=round(ratio, 2)),
    ]


def measure_flatness(store: MemoryStore, sizes: Sizes, source: Source, draw: random.Random) -> list[Row]:
    """Appends to and reads of users with short and with long histories, taking turns in random order."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for trial in range(sizes.trials + 20):
        kinds = [(what, history) for what in ("append_one", "score_read") for history in sizes.histories]
        for what, history in draw.sample(kinds, len(kinds)):
            user = long_user(history)
            if what == "append_one":
                took = timed(store.append, [source.behavior(user)])
            else:
                took = timed(store.read, [user], HISTORY, PARTITIONS, FINGERPRINT)
            if trial >= 20:
                seconds.setdefault((what, history), []).append(took)
    rows = []
    for (what, history), calls in sorted(seconds.items()):
        shortest = statistics.median(seconds[what, min(sizes.histories)])
        ratio = round(statistics.median(calls) / shortest, 3)
        rows.append(row(what, calls, history=history, flat=True, threads=1, ratio_to_shortest=ratio))
    return rows


def long_user(history: int) -> str:
    """Id of the user who has so many behaviors."""
    return f"history-{history}"


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def plot(rows: Sequence[Row]) -> dict[str, Any]:
    """Cost over history, as series and drawn."""
    series = {
        what: [(each["history"], each["ratio_to_shortest"]) for each in rows if each["what"] == what]
        for what in ("append_one", "score_read")
    }
    drawn = draw_lines(
        series, title="Cost of a user with a long history", x="behaviors of the user", y="median / shortest", limit=1.2
    )
    return {"x": "history", "y": "ratio_to_shortest", "series": series, "svg": drawn}


# -- the worker --------------------------------------------------------------------------------------------------


def measure_worker(store: MemoryStore, sizes: Sizes, source: Source, rounds: int = 5) -> Row:
    """Partitions from cut to vector with nothing to wait for but the store and the worker itself."""
    size = 20
    users = user_names(max(sizes.noop_partitions // 4, 1), "worked")
    describe(store, users)
    milliseconds = []
    for _ in range(rounds):
        before = store.statistics().partitions
        fill(store, dict.fromkeys(users, 4 * size), source)
        worker = Worker(store, NoopWriter(), NoopEncoder())
        settle()
        began = time.perf_counter()
        made = asyncio.run(worker.drain())
        seconds = time.perf_counter() - began
        partitions = store.statistics().partitions - before
        if made.representations != partitions:
            raise LiberError(f"the worker made {made.representations} vectors of {partitions} partitions")
        milliseconds.append(1000 * seconds / partitions)
    middle = statistics.median(milliseconds)
    return row("worker_noop") | {
        "per_second": round(1000 / middle, 1),
        "p50_ms": round(middle, 4),
        "history": 4 * size * rounds,
        "partitions": len(users) * 4 * rounds,
        "rounds_ms": [round(each, 4) for each in milliseconds],
    }


# -- the command -------------------------------------------------------------------------------------------------


def measure(ground: Ground, sizes: Sizes, seed: int) -> dict[str, Any]:
    """All rows and the plot."""
    rows: list[Row] = []
    for batch, threads in ((10_000, 1), (1000, 1), (100, 1), (100, 8), (1, 1), (1, 8)):
        if batch * threads <= sizes.behaviors:
            tell(f"appends of {batch} by {threads} threads beside the bare loop")
            rows.append(measure_appends(ground, sizes, seed, batch, threads))
            tell_row(rows[-1])
    draw, source = random.Random(seed), Source(seed)
    with ground.store() as store:
        users = user_names(sizes.readers)
        histories = {user_id: draw.randint(100, 300) for user_id in users}
        histories |= {long_user(history): history for history in sizes.histories}
        tell(f"filling a store with {sum(histories.values())} behaviors")
        describe(store, list(histories))
        fill(store, histories, source)
        tell("making up texts and vectors")
        make_knowledge(store, seed)
        settle()
        rows += measure_reads(store, users, sizes, draw)
        flat = measure_flatness(store, sizes, source, draw)
        rows += flat
        for each in rows[-len(flat) - 2 :]:
            tell_row(each)
    with ground.store() as store:
        tell("a worker with nothing to wait for")
        rows.append(measure_worker(store, sizes, source))
        tell_row(rows[-1])
    return {"rows": [{"store": ground.name, **each} for each in rows], "plot": plot(flat)}


@contextlib.contextmanager
def make_ground(engine: str, directory: Path) -> Iterator[Ground]:
    """Where stores of an engine are made; for Redis a cluster that ends with it."""
    if engine == "sqlite":
        yield SQLiteGround(directory)
        return
    from bench.bare_redis import RedisGround
    from bench.redis_servers import redis_cluster

    with redis_cluster(node_timeout_milliseconds=5000) as cluster:
        yield RedisGround(cluster)


def tell(line: str) -> None:
    """Says on standard error what is under way."""
    print(line, file=sys.stderr, flush=True)


def tell_row(made: Row) -> None:
    """Says what was measured."""
    tell("  " + "  ".join(f"{name} {value}" for name, value in made.items() if value is not None))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ingest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", choices=("sqlite", "redis"), required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="measure little, to see that it works")
    parser.add_argument("--directory", type=Path, help="where the store lies meanwhile (default: the system's own)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    with scratch(arguments.directory) as directory, make_ground(arguments.store, directory) as ground:
        figures = measure(ground, QUICK if arguments.quick else Sizes(), arguments.seed)
        figures |= {
            "machine": describe_machine(directory),
            "versions": describe_versions(),
            "seed": arguments.seed,
            "quick": arguments.quick,
        }
    show_figures(figures, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
