"""Kills, and what is left: nothing acknowledged may be lost, nothing counted twice, no effect made twice.

``python -m bench.faults --store sqlite --kills 2000 --json FILE`` lets ingesters and workers, real processes, work on
one store, SIGKILLs them at random moments, one by one and sometimes all at once, and starts them again. What was not
acknowledged is sent again with the same event ids. ``--store redis`` leaves the processes alone and SIGKILLs masters of
a cluster of three masters and three replicas: one, wait until its replica has taken over, start it again as a replica,
wait until it is in sync, the next. At the end the work is finished and everything is read back.

The figures:

- ``kills``; ``acknowledged`` behaviors, of those ``lost`` and ``duplicated``; ``effects``: texts and vectors held,
  as many as the partitions need (``effects_expected``) if nothing is missing; ``effects_repeated``: kept twice.
- ``repeated_calls``: calls of the writer beyond the first for the same prompt. ``in_flight_at_kills``: calls that had
  begun and whose text had not been kept when their worker was killed, or while the store was away; these are the
  calls that a kill may repeat.
- ``cascade_breaks``: texts and vectors that were not made from the behaviors, or the summaries, that lie beside them.

The processes are forked from this one, which has imported everything and opened no store: a start takes milliseconds,
so that hundreds of kills a minute hit processes that are at work. The seed fixes who is killed after how long and what
is sent; what the victim is doing then is the machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from bench.environment import describe_machine, describe_versions, run_command, scratch, show_figures
from bench.verification import Notes, Outage, read_notes, verify
from bench.victims import DOMAIN, Plan, catalogue, ingest, last_acknowledged, user_name, work
from liber_runtime.exceptions import LiberError
from liber_runtime.memory import MemoryStore, open_store
from liber_runtime.partition import Count

if TYPE_CHECKING:
    from bench.redis_servers import RedisCluster

Role: TypeAlias = Literal["ingester", "worker"]

INGESTERS = 3
WORKERS = 3

ALL_AT_ONCE = 0.01
"""How often everybody is killed in the same moment instead of one."""

DRAIN_SECONDS = 120.0
"""How long the work may take to finish once nobody is killed any more."""

_TELL_SECONDS = 5.0
_PLACES: tuple[tuple[Role, int], ...] = (("ingester", INGESTERS), ("worker", WORKERS))
_LIVES: dict[Role, Callable[[Plan, int, int], None]] = {"ingester": ingest, "worker": work}


class Process(NamedTuple):
    """One process of the crew: what it does, its place, and which life of that place this is."""

    role: Role
    slot: int
    life: int


class Crew:
    """Ingesters and workers at work on one store.

    Attributes:
        crashes: processes that ended without being told to.
    """

    def __init__(self, plan: Plan) -> None:
        """Starts nobody yet."""
        self._plan = plan
        self._alive: dict[int, Process] = {}
        self.crashes = 0

    def victims(self, draw: random.Random) -> list[int]:
        """Whose turn it is: mostly one, sometimes everybody."""
        pids = sorted(self._alive, key=lambda pid: self._alive[pid])
        return pids if draw.random() < ALL_AT_ONCE else [draw.choice(pids)]

    def kill(self, pids: Sequence[int]) -> Counter[str]:
        """SIGKILLs these, then lets each begin anew; returns how many of each role it was."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        killed: Counter[str] = Counter()
        for pid in pids:
            _, status = os.waitpid(pid, 0)
            process = self._alive.pop(pid)
            if os.WIFSIGNALED(status):
                killed[process.role] += 1
            else:
                self.crashes += 1
            self._begin(process._replace(life=process.life + 1))
        return killed

    def replace_crashed(self) -> None:
        """Lets those begin anew who ended by themselves, which nobody should."""
        for pid in list(self._alive):
            if os.waitpid(pid, os.WNOHANG)[0]:
                process = self._alive.pop(pid)
                self.crashes += 1
                self._begin(process._replace(life=process.life + 1))

    def stop(self, role: Role, patience: float = 30.0) -> None:
        """Tells all of a role to stop and waits until they have; who does not in time is killed and is a crash."""
        pids = [pid for pid, process in self._alive.items() if process.role == role]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + patience
        for pid in pids:
            ended, status = os.waitpid(pid, os.WNOHANG)
            while not ended and time.monotonic() < until:
                time.sleep(0.02)
                ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            self.crashes += status != 0
            del self._alive[pid]

    def __enter__(self) -> Crew:
        """Everybody begins."""
        for role, count in _PLACES:
            for slot in range(count):
                self._begin(Process(role, slot, 0))
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody is left, whatever happened."""
        for pid in self._alive:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._alive.clear()

    def _begin(self, process: Process) -> None:
        self._alive[_fork(lambda: _LIVES[process.role](self._plan, process.slot, process.life))] = process


def _fork(life: Callable[[], None]) -> int:
    """Runs `life` in a process of its own; returns its id."""
    # Whoever is told to stop before it listens is told again when it does.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return pid
    status = 1
    try:
        life()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def prepare(plan: Plan) -> None:
    """Makes the store, in a process that ends: nobody may be forked from one that has a store open."""

    def make() -> None:
        store = open_store(plan.url, Count(plan.partition))
        names = [user_name(sender, user) for sender in range(plan.senders * INGESTERS) for user in range(plan.users)]
        store.describe(DOMAIN, catalogue(), {name: {"name": name} for name in names})
        store.close()

    _, status = os.waitpid(_fork(make), 0)
    if status:
        raise LiberError(f"store {plan.url} could not be made; the reason is above")


class Progress:
    """Tells about every five seconds how far a run is."""

    def __init__(self, plan: Plan, kills: int) -> None:
        """Of a run that shall see so many kills."""
        self._plan = plan
        self._kills = kills
        self._began = self._told = time.monotonic()

    def __call__(self, killed: int, *, now: bool = False) -> None:
        """Tells if it is time, or `now`."""
        if not now and time.monotonic() - self._told < _TELL_SECONDS:
            return
        self._told = time.monotonic()
        seconds = self._told - self._began
        acknowledged = acknowledged_so_far(self._plan)
        print(
            f"{seconds:6.0f} s  {killed}/{self._kills} kills ({60 * killed / seconds:.0f}/min)  "
            f"{acknowledged} behaviors acknowledged ({acknowledged / seconds:.0f}/s)",
            file=sys.stderr,
            flush=True,
        )


def acknowledged_so_far(plan: Plan) -> int:
    """Behaviors of all senders."""
    return sum(last_acknowledged(plan.acknowledged(sender)) for sender in range(plan.senders * INGESTERS))


def kill_processes(
    crew: Crew, kills: int, per_minute: float, draw: random.Random, until: float, tell: Progress
) -> Counter[str]:
    """Kills and restarts processes of the crew at random moments; returns how many kills of each kind there were."""
    kinds: Counter[str] = Counter()
    while kinds["ingester"] + kinds["worker"] < kills and time.monotonic() < until:
        time.sleep(min(draw.expovariate(per_minute / 60), 2.0))
        crew.replace_crashed()
        pids = crew.victims(draw)
        kinds += crew.kill(pids)
        kinds["everybody at once"] += len(pids) > 1
        tell(kinds["ingester"] + kinds["worker"])
    return kinds


def finish(plan: Plan, crew: Crew) -> MemoryStore:
    """Ends the ingesters, waits until nothing is pending, ends the workers; opens the store to be verified."""
    crew.stop("ingester")
    store = open_store(plan.url, create=False)
    until = time.monotonic() + DRAIN_SECONDS
    while any(store.statistics().pending.values()) and time.monotonic() < until:
        time.sleep(0.2)
    crew.stop("worker")
    return store


def report(plan: Plan, store: MemoryStore, outages: Sequence[Outage]) -> dict[str, Any]:
    """Holds notes and store against each other."""
    notes: Notes = read_notes(plan.notes.glob("*.calls"))
    findings = verify(plan, plan.senders * INGESTERS, store, notes)
    statistics = store.statistics()
    return {
        **asdict(findings),
        "calls": len(notes.calls),
        "repeated_calls": notes.repeated_calls,
        "in_flight_at_kills": notes.in_flight(outages),
        "statistics": {
            "behaviors": statistics.behaviors,
            "partitions": statistics.partitions,
            "pending": dict(statistics.pending),
            "dead": dict(statistics.dead),
            "repeated": statistics.repeated,
        },
    }


def check_files(directory: Path) -> str:
    """What SQLite finds in the store's files: ``ok`` if nothing."""
    said = set()
    for path in sorted(directory.glob("*.db")):
        with contextlib.closing(sqlite3.connect(path)) as db:
            said |= {row[0] for row in db.execute("PRAGMA integrity_check")}
    return "; ".join(sorted(said))


def run_sqlite(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Kills ingesters and workers of one file."""
    plan = Plan(f"sqlite:///{directory / 'memory.db'}", directory, arguments.seed)
    prepare(plan)
    began = time.monotonic()
    tell = Progress(plan, arguments.kills)
    draw = random.Random(f"{arguments.seed} kills")
    with Crew(plan) as crew:
        until = began + 60 * arguments.minutes
        kinds = kill_processes(crew, arguments.kills, arguments.kills_per_minute, draw, until, tell)
        kills = kinds["ingester"] + kinds["worker"]
        seconds = time.monotonic() - began
        tell(kills, now=True)
        with contextlib.closing(finish(plan, crew)) as store:
            found = report(plan, store, [])
    return {
        "store": "sqlite",
        "kills": kills,
        **found,
        "integrity": check_files(directory),
        "kinds": dict(kinds),
        "crashes": crew.crashes,
        "seconds": round(seconds, 1),
        "processes": describe_crew(plan),
    }


def run_redis(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Kills masters of a cluster under ingesters and workers that go on."""
    from bench.redis_servers import redis_cluster

    draw = random.Random(f"{arguments.seed} kills")
    replicas = "" if arguments.replicas is None else f"&replicas={arguments.replicas}"
    with redis_cluster(node_timeout_milliseconds=arguments.node_timeout) as cluster:
        url = f"redis://{cluster.address}/0?name=faults{replicas}"
        # Senders stand still while a master is away: between the kills they hurry.
        plan = Plan(url, directory, arguments.seed, pause_seconds=0.005, lease_seconds=30.0)
        prepare(plan)
        began = time.monotonic()
        tell = Progress(plan, arguments.kills)
        outages: list[Outage] = []
        failovers: list[float] = []
        with Crew(plan) as crew:
            while len(outages) < arguments.kills and time.monotonic() < began + 60 * arguments.minutes:
                time.sleep(draw.uniform(0.2, 1.0))
                crew.replace_crashed()
                outage, failover = kill_master(cluster, draw)
                outages.append(outage)
                failovers.append(failover)
                tell(len(outages))
            seconds = time.monotonic() - began
            tell(len(outages), now=True)
            with contextlib.closing(finish(plan, crew)) as store:
                found = report(plan, store, outages)
    return {
        "store": "redis",
        "kills": len(outages),
        **found,
        "kinds": {"master": len(outages)},
        "failover_seconds": {
            "p50": round(float(np.percentile(failovers, 50)), 2) if failovers else None,
            "p99": round(float(np.percentile(failovers, 99)), 2) if failovers else None,
            "max": round(max(failovers), 2) if failovers else None,
        },
        "replicas_waited_for": 1 if arguments.replicas is None else arguments.replicas,
        "node_timeout_ms": arguments.node_timeout,
        "crashes": crew.crashes,
        "seconds": round(seconds, 1),
        "processes": describe_crew(plan),
    }


def kill_master(cluster: RedisCluster, draw: random.Random) -> tuple[Outage, float]:
    """SIGKILLs a random master and starts it again once its replica has taken over.

    Returns:
        From the kill until the replica served; and the seconds of that. The cluster is whole again then.
    """
    master = draw.choice(cluster.masters())
    killed_at = time.monotonic()
    master.kill()
    cluster.wait_for_failover(master)
    restored_at = time.monotonic()
    master.start()
    cluster.wait_until_whole()
    return Outage(killed_at, restored_at), restored_at - killed_at


def describe_crew(plan: Plan) -> dict[str, int]:
    """How many processes of each role there were."""
    return {"ingesters": INGESTERS, "senders": INGESTERS * plan.senders, "workers": WORKERS}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", choices=("sqlite", "redis"), required=True)
    parser.add_argument("--kills", type=int, help="default: 2000 on SQLite, 200 on Redis")
    parser.add_argument("--minutes", type=float, help="stop killing after so long (default: 10 on SQLite, 30 on Redis)")
    parser.add_argument("--kills-per-minute", type=float, default=400.0, help="on SQLite")
    parser.add_argument(
        "--replicas",
        type=int,
        help="replicas that must have a write before Redis acknowledges it (default: the store's 1)",
    )
    parser.add_argument("--node-timeout", type=int, default=1000, help="of the Redis Cluster, in milliseconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where the store lies meanwhile (default: the system's own)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    on_sqlite = arguments.store == "sqlite"
    arguments.kills = arguments.kills if arguments.kills is not None else 2000 if on_sqlite else 200
    arguments.minutes = arguments.minutes if arguments.minutes is not None else 10.0 if on_sqlite else 30.0
    with scratch(arguments.directory) as directory:
        figures = (run_sqlite if arguments.store == "sqlite" else run_redis)(arguments, directory)
        figures |= {"machine": describe_machine(directory), "versions": describe_versions(), "seed": arguments.seed}
    show_figures(figures, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
