"""Load on `liber_score`: real gRPC calls from as many concurrent users as locust is told to start.

``locust -f bench/locustfile.py --headless --host 127.0.0.1:8001 -u 16 -t 60s --users-file U.txt --items-file I.txt``

Two kinds of calls, equally often, each named with its U and N in the results: ranking (candidates of one user) and
folded (candidates of many users in one request); users and candidates are drawn anew for every call. The load is
closed: each user waits for its answer before it sends again, so a slow server is asked less. Read the figures as
throughput and latency at this concurrency, not as latency at a given rate of arrivals: those are `bench/load.py`'s. A
headless run ends after a minute where ``-t`` says nothing else.

Locust patches the standard library for gevent when it is imported, so this runs in a process of its own.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.experimental.gevent
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

# Before any channel exists: a call would otherwise block every user of this process.
grpc.experimental.gevent.init_gevent()

from bench.calls import read_ids  # noqa: E402
from liber_runtime.exceptions import InvalidInputError, LiberError  # noqa: E402
from liber_runtime.scoring import ScoringClient  # noqa: E402
from liber_runtime.settings import load_settings  # noqa: E402

GENERATED_USERS = 1_000
GENERATED_ITEMS = 2_000

RUN_SECONDS = 60
"""Length of a headless run that is given none; locust's own default is for ever."""

_BYTES_PER_PROBABILITY = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """What the calls are made of.

    Attributes:
        user_ids: drawn from for every call.
        item_ids: the same, for candidates.
        candidates: N, candidates of one call.
        folded_users: U of a folded call, no more than there are users and candidates.
        deadline_seconds: of every call.
    """

    user_ids: Sequence[str]
    item_ids: Sequence[str]
    candidates: int
    folded_users: int
    deadline_seconds: float


class ScoringUser(User):
    """One concurrent caller with a channel and a connection of its own, as callers on other machines have."""

    host = load_settings().triton
    workload: Workload
    """Set for all users when locust starts."""

    def on_start(self) -> None:
        """Opens the channel."""
        settings = load_settings().model_copy(update={"deadline_seconds": self.workload.deadline_seconds})
        self._client = ScoringClient(self.host, settings, own_connection=True)

    def on_stop(self) -> None:
        """Closes the channel."""
        self._client.close()

    @task
    def rank(self) -> None:
        """One user, N candidates."""
        self._score(random.sample(self.workload.user_ids, 1))

    @task
    def fold(self) -> None:
        """U users, N candidates in one request, shared out evenly."""
        self._score(random.sample(self.workload.user_ids, self.workload.folded_users))

    def _score(self, user_ids: Sequence[str]) -> None:
        count = self.workload.candidates
        owners = [user_ids[position % len(user_ids)] for position in range(count)]
        items = random.choices(self.workload.item_ids, k=count)
        length, failure = 0, None
        started = time.perf_counter()
        try:
            length = len(self._client.score(owners, items).probability) * _BYTES_PER_PROBABILITY
        except Exception as error:
            failure = error
        self.environment.events.request.fire(
            request_type="gRPC",
            name=f"liber_score U={len(user_ids)} N={count}",
            response_time=(time.perf_counter() - started) * 1000,
            response_length=length,
            context={},
            exception=failure,
        )


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: LocustArgumentParser) -> None:
    """Adds this file's own options to locust's."""
    group = parser.add_argument_group("LIBER", "Scoring calls; --host is host:port of Triton's gRPC endpoint")
    group.add_argument("--users-file", type=Path, help="user ids: one in a line, or JSON lines with 'user'")
    group.add_argument("--items-file", type=Path, help="item ids: one in a line, or JSON lines with 'item'")
    group.add_argument("--candidates", type=int, default=1000, help="candidates of one call, N (default 1000)")
    group.add_argument(
        "--folded-users",
        type=int,
        default=1000,
        help="users of one folded call, U, at most N (default 1000, the shape of the paper's Table 7)",
    )
    group.add_argument(
        "--deadline",
        type=float,
        default=load_settings().deadline_seconds,
        help="seconds until a call counts as failed (default LIBER_DEADLINE_SECONDS)",
    )


@events.init.add_listener  # type: ignore[untyped-decorator]
def prepare(environment: Environment, **_: Any) -> None:
    """Reads the ids before the first user starts; ends the process with one line if they are unusable."""
    options = environment.parsed_options
    if options is None:
        return
    if options.headless and not options.run_time:
        options.run_time = RUN_SECONDS
    try:
        ScoringUser.workload = plan_workload(options)
    except LiberError as error:
        sys.exit(f"error: {error}")


@events.quit.add_listener  # type: ignore[untyped-decorator]
def leave(exit_code: int, **_: Any) -> None:
    """Ends the process once locust has written all it has to.

    Python would collect gRPC's channels then, and under gevent that waits now and then for a lock for ever.
    """

    def end() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    atexit.register(end)


def plan_workload(options: Namespace) -> Workload:
    """Turns the options into a workload; ids that no file gives are generated, and unknown to the server.

    Raises:
        InvalidInputError: a file or an option is unusable.
    """
    for name in ("candidates", "folded_users", "deadline"):
        value = getattr(options, name)
        if value <= 0:
            raise InvalidInputError(f"--{name.replace('_', '-')} is {value}; it has to be above 0")
    user_ids = read_ids(options.users_file, "user") if options.users_file else _generate("user", GENERATED_USERS)
    item_ids = read_ids(options.items_file, "item") if options.items_file else _generate("item", GENERATED_ITEMS)
    folded_users = min(options.folded_users, options.candidates, len(user_ids))
    return Workload(user_ids, item_ids, options.candidates, folded_users, options.deadline)


def _generate(kind: str, count: int) -> list[str]:
    return [f"{kind}-{number}" for number in range(count)]
