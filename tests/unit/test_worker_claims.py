"""What a worker does with its claims: heartbeat, loss, switched encoders, failing stores, the stop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liber_runtime.behavior import Behavior, Domain, Item, Text
from liber_runtime.exceptions import InvalidInputError, LiberError, ScoringError, StoreError, WriterAwayError
from liber_runtime.interest import Prompt
from liber_runtime.memory import Committed, Failure, Result, Statistics, Step, Task
from liber_runtime.memory.sqlite import SQLiteStore
from liber_runtime.metrics import OUTCOMES
from liber_runtime.partition import Count
from liber_runtime.representation import Encoded
from liber_runtime.worker import Worker
from liber_runtime.worker.encoding import POOLED_BATCHES
from liber_runtime.writers import Completion
from liber_runtime.writers.limits import Limited

DOMAIN = Domain("films", "film", "stars", (1.0, 5.0), 3.0, ("genre",))
FAST: dict[str, Any] = {"backoff_seconds": 0.01, "idle_seconds": 0.01}


class HeldWriter:
    """Answers when it is let."""

    name = "held"

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.began = self.cancelled = 0

    async def write(self, prompt: Prompt) -> Completion:
        self.began += 1
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Completion("fine")


class PlainWriter:
    name = "plain"

    async def write(self, prompt: Prompt) -> Completion:
        return Completion("fine")


class OnesEncoder:
    """Vectors of ones, of the encoding that `answers` says, call by call, and then of `makes`."""

    def __init__(self, makes: str = "new", answers: Sequence[str | Exception] = ()) -> None:
        self.makes = makes
        self.answers = list(answers)
        self.calls = 0

    async def fingerprint(self) -> str:
        return self.makes

    async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else self.makes
        if isinstance(answer, Exception):
            raise answer
        self.makes = answer
        return Encoded(np.ones((len(texts), 2), np.float32), answer)


class WatchedStore(SQLiteStore):
    """Knows how many claims are held, and fails when told to."""

    def __init__(self, path: str) -> None:
        super().__init__(path, Count(3))
        self.held = self.most_held = 0
        self.failures: dict[str, list[str]] = {}
        self.looks = 0
        self.may_count = threading.Event()
        self.may_count.set()

    def claim(self, steps: Collection[Step], limit: int, lease_seconds: float, fingerprint: str = "") -> list[Task]:
        self._fail("claim")
        tasks = super().claim(steps, limit, lease_seconds, fingerprint)
        self.held += len(tasks)
        self.most_held = max(self.most_held, self.held)
        return tasks

    def commit(self, results: Sequence[Result]) -> Committed:
        if any(isinstance(result.made, Text) and result.made.text == "cursed" for result in results):
            raise InvalidInputError("this store takes no curses")
        if self.failures.get("commit") == ["after"]:
            super().commit(results)
        self._fail("commit")
        self.held -= len(results)
        return super().commit(results)

    def statistics(self) -> Statistics:
        self.looks += 1
        self.may_count.wait(20)
        return super().statistics()

    def _fail(self, method: str) -> None:
        if self.failures.get(method):
            raise StoreError(f"the master is away ({method} {self.failures[method].pop(0)})")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WatchedStore]:
    store = WatchedStore(str(tmp_path / "memory.db"))
    store.describe(DOMAIN, [Item("item-0", "Alpha")])
    yield store
    store.may_count.set()
    store.close()


def fill(store: SQLiteStore, users: int, partitions: int = 1) -> None:
    store.append(
        [Behavior(f"u{u}", "item-0", 4.0, 1e9 + n, str(n)) for u in range(users) for n in range(3 * partitions)]
    )


def calls(hands: Worker) -> dict[str, float]:
    """The writer's calls by outcome."""
    ask = hands.metrics.registry.get_sample_value
    shown = {outcome: ask("liber_writer_calls_total", {"outcome": outcome}) for outcome in OUTCOMES}
    return {outcome: count for outcome, count in shown.items() if count}


async def until(condition: Callable[[], bool]) -> None:
    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(look(), 20)


async def test_a_long_call_keeps_its_short_lease(store: WatchedStore) -> None:
    fill(store, 2)
    writer, rival = HeldWriter(), PlainWriter()
    working = asyncio.create_task(Worker(store, writer, None, lease_seconds=0.3, **FAST).drain())
    await until(lambda: writer.began == 2)
    await asyncio.sleep(0.8)
    report = await Worker(store, rival, None, **FAST).drain()
    assert report.summaries == 0
    writer.let.set()
    report = await working
    assert (report.summaries, report.repeated, report.lost, report.discarded) == (2, 0, 0, 0)


async def test_what_a_stalled_worker_held_is_taken_over_and_counted(store: WatchedStore) -> None:
    fill(store, 3)
    assert len(store.claim(["summary"], 2, 0.2)) == 2
    stop = asyncio.Event()
    running = asyncio.create_task(Worker(store, PlainWriter(), None, **FAST).run(stop))
    await until(lambda: store.statistics().pending["summary"] == 0)
    stop.set()
    report = await running
    assert (report.summaries, report.repeated) == (3, 2)
    assert store.statistics().repeated == 2


async def test_a_call_whose_claim_is_lost_is_ended(store: WatchedStore) -> None:
    fill(store, 2)
    writer = HeldWriter()
    working = asyncio.create_task(Worker(store, writer, None, lease_seconds=0.15, **FAST).drain())
    await until(lambda: writer.began == 2)
    store.forget("u0")
    await until(lambda: writer.cancelled == 1)
    writer.let.set()
    report = await working
    assert (report.summaries, report.lost, report.discarded) == (1, 1, 0)


@pytest.mark.parametrize(("concurrency", "batch"), [(1, 1), (3, 2), (8, 5)])
async def test_however_long_the_queue_few_claims_are_held(store: WatchedStore, concurrency: int, batch: int) -> None:
    fill(store, 30, 2)
    report = await Worker(store, PlainWriter(), None, concurrency=concurrency, **FAST).drain()
    assert report.summaries + report.shifts == 90
    assert store.most_held == concurrency
    assert store.held == 0
    store.most_held = 0
    report = await Worker(store, None, OnesEncoder(), encode_batch=batch, **FAST).drain()
    assert report.representations == 60
    assert store.most_held == POOLED_BATCHES * batch
    assert store.held == 0


async def test_no_claim_is_held_for_a_call_that_has_to_wait_for_its_turn(store: WatchedStore) -> None:
    fill(store, 6)
    writer = Limited(PlainWriter(), calls_per_minute=600)
    report = await Worker(store, writer, None, **FAST).drain()
    assert report.summaries == 6
    assert store.most_held == 1


async def test_a_server_that_is_switched_during_a_call_gets_its_steps_back_unattempted(store: WatchedStore) -> None:
    fill(store, 5)
    await Worker(store, PlainWriter(), None, **FAST).drain()
    store.encode_by({"old", "new"})
    encoder = OnesEncoder("old", answers=["new"])
    report = await Worker(store, None, encoder, **FAST).drain()
    assert (report.representations, report.dead) == (5, 0)
    assert store.statistics().vectors == {"new": 5}
    assert [task.attempts for task in store.claim(["representation"], 9, 60.0, "old")] == [1] * 5


async def test_only_what_the_encoder_makes_is_claimed(store: WatchedStore) -> None:
    fill(store, 3)
    await Worker(store, PlainWriter(), None, **FAST).drain()
    store.encode_by({"old"})
    encoder = OnesEncoder("new")
    assert (await Worker(store, None, encoder, **FAST).drain()).representations == 0
    assert encoder.calls == 0
    assert (await Worker(store, None, OnesEncoder("old"), **FAST).drain()).representations == 3


async def test_an_encoder_replaced_within_a_call_costs_no_attempt(store: WatchedStore) -> None:
    fill(store, 2)
    encoder = OnesEncoder(answers=[ScoringError("replaced", "ABORTED"), ScoringError("no", "INVALID_ARGUMENT")])
    report = await Worker(store, PlainWriter(), encoder, max_attempts=2, **FAST).drain()
    assert (report.representations, report.dead) == (2, 0)


async def test_a_drain_that_cannot_ask_for_the_fingerprint_makes_the_texts_and_then_says_so(
    store: WatchedStore,
) -> None:
    class Away(OnesEncoder):
        async def fingerprint(self) -> str:
            raise ScoringError("no Triton answers", "UNAVAILABLE")

    assert (await Worker(store, PlainWriter(), Away(), **FAST).drain()).failed == 0
    fill(store, 4)
    with pytest.raises(ScoringError, match="no Triton answers"):
        await Worker(store, PlainWriter(), Away(), max_attempts=2, **FAST).drain()
    assert store.statistics().pending == {"summary": 0, "shift": 0, "representation": 4}


async def test_a_writer_that_was_certainly_not_called_costs_no_attempt(store: WatchedStore) -> None:
    class Away(PlainWriter):
        async def write(self, prompt: Prompt) -> Completion:
            raise WriterAwayError("connection refused")

    fill(store, 3)
    with pytest.raises(LiberError, match="connection refused"):
        await (hands := Worker(store, Away(), None, max_attempts=3, **FAST)).drain()
    assert calls(hands) == {"away": 9.0}
    statistics = store.statistics()
    assert (statistics.pending["summary"], statistics.dead["summary"]) == (3, 0)
    assert [task.attempts for task in store.claim(["summary"], 9, 60.0)] == [1, 1, 1]


async def test_encoding_and_writing_do_not_wait_for_each_other(store: WatchedStore) -> None:
    class Stuck(OnesEncoder):
        async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
            self.calls += 1
            await asyncio.Event().wait()
            raise AssertionError

    fill(store, 20, 3)
    stop, encoder = asyncio.Event(), Stuck()
    hands = Worker(store, PlainWriter(), encoder, concurrency=4, encode_batch=1, stop_seconds=0.01, **FAST)
    running = asyncio.create_task(hands.run(stop))
    await until(lambda: store.statistics().pending["summary"] + store.statistics().pending["shift"] == 0)
    stop.set()
    report = await running
    assert (report.summaries, report.shifts, report.representations, encoder.calls) == (60, 40, 0, 2)
    attempts = [task.attempts for task in store.claim(["representation"], 99, 60.0)]
    assert sorted(attempts) == [1] * 58 + [2] * 2


async def test_statistics_that_take_for_ever_hold_nothing_up(store: WatchedStore) -> None:
    fill(store, 20)
    store.may_count.clear()
    stop = asyncio.Event()
    running = asyncio.create_task(Worker(store, PlainWriter(), OnesEncoder(), **FAST).run(stop, lambda _: None))
    await until(lambda: store.looks == 1)

    def is_encoded() -> bool:
        return all(memory is not None and len(memory.representations) for memory in store.read(["u0"], 1, 9, "new"))

    await until(is_encoded)
    store.may_count.set()
    stop.set()
    assert (await running).representations == 20


async def test_a_failover_of_the_store_repeats_no_call(store: WatchedStore) -> None:
    fill(store, 4)
    store.failures = {"claim": ["1", "2"], "commit": ["1", "2", "3"]}
    report = await Worker(store, PlainWriter(), OnesEncoder(), **FAST).drain()
    assert (report.summaries, report.representations, report.repeated, report.discarded) == (4, 4, 0, 0)


async def test_a_commit_that_was_made_but_not_answered_is_made_once(store: WatchedStore) -> None:
    fill(store, 4)
    store.failures = {"commit": ["after"]}
    report = await Worker(store, PlainWriter(), None, **FAST).drain()
    assert (report.discarded, report.repeated) == (4, 0)
    assert store.statistics().pending == {"summary": 0, "shift": 0, "representation": 4}


async def test_a_store_that_stays_away_ends_the_worker(store: WatchedStore) -> None:
    fill(store, 1)
    store.failures = {"commit": [str(n) for n in range(10**5)]}
    with pytest.raises(StoreError, match="the master is away"):
        await Worker(store, PlainWriter(), None, store_patience_seconds=0.1, **FAST).drain()
    assert len(store.failures["commit"]) < 10**5 - 2


async def test_a_text_that_the_store_refuses_does_not_take_the_others_along(store: WatchedStore) -> None:
    class Cursed(PlainWriter):
        async def write(self, prompt: Prompt) -> Completion:
            return Completion("cursed" if getattr(prompt, "profile", None) else "fine")

    fill(store, 4)
    store.describe(profiles={"u2": {"age": 31}})
    report = await Worker(store, Cursed(), None, max_attempts=2, **FAST).drain()
    assert (report.summaries, report.dead) == (3, 1)
    assert [(step.user_id, step.error) for step in store.dead()] == [("u2", "this store takes no curses")]


async def test_revived_steps_have_all_their_attempts_ahead(store: WatchedStore) -> None:
    fill(store, 1)
    store.commit([Result(task, Failure("no", None)) for task in store.claim(["summary"], 9, 60.0)])
    assert (await Worker(store, PlainWriter(), None, max_attempts=1, **FAST).drain()).summaries == 0
    assert store.revive() == 1
    assert (await Worker(store, PlainWriter(), None, max_attempts=1, **FAST).drain()).summaries == 1


async def test_a_call_that_will_not_be_cancelled_does_not_hold_up_the_stop(store: WatchedStore) -> None:
    class Stubborn(HeldWriter):
        async def write(self, prompt: Prompt) -> Completion:
            self.began += 1
            while not self.let.is_set():
                try:
                    await self.let.wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
            return Completion("too late")

    fill(store, 1)
    stop, writer = asyncio.Event(), Stubborn()
    running = asyncio.create_task(Worker(store, writer, None, stop_seconds=0.01, **FAST).run(stop))
    await until(lambda: writer.began == 1)
    stop.set()
    report = await asyncio.wait_for(running, 10)
    assert (report.summaries, writer.cancelled) == (0, 1)
    assert len(store.claim(["summary"], 9, 60.0)) == 1
    writer.let.set()
    await asyncio.sleep(0)


SLOW_WORKER = """
import asyncio, sys
from liber_runtime.cli.worker import _work
from liber_runtime.memory import open_store
from liber_runtime.worker import Worker
from liber_runtime.writers import Completion

class Slow:
    name = "slow"
    async def write(self, prompt):
        print("called", flush=True)
        await asyncio.sleep(float(prompt.history[-1][1]))
        return Completion("fine")

store = open_store(sys.argv[1])
report, number = asyncio.run(_work(Worker(store, Slow(), None, stop_seconds=1.0), None, drain=False))
print(report.summaries, number)
store.close()
"""


def slow_worker(path: Path, calls: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WORKER, f"sqlite:///{path}"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(calls):
        assert process.stdout.readline() == "called\n"
    return process


def test_a_signal_ends_a_worker_within_its_deadline_and_nothing_stays_claimed(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    store = SQLiteStore(str(path), Count(1))
    store.describe(DOMAIN, [Item("item-0", "Alpha")])
    # The feedback is the seconds that the call takes: one call ends within the deadline, one does not.
    store.append([Behavior("quick", "item-0", 0.5, 1e9, "a"), Behavior("slow", "item-0", 600.0, 1e9, "b")])
    process = slow_worker(path, calls=2)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert told == f"1 {int(signal.SIGTERM)}\n"
    (left,) = store.claim(["summary"], 9, 60.0)
    assert (left.user_id, left.attempts) == ("slow", 2)
    store.close()


def test_a_second_signal_ends_a_worker_at_once(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    store = SQLiteStore(str(path), Count(1))
    store.describe(DOMAIN, [Item("item-0", "Alpha")])
    store.append([Behavior("slow", "item-0", 600.0, 1e9, "b")])
    process = slow_worker(path, calls=1)
    process.send_signal(signal.SIGTERM)
    # Again, for the first may not be handled yet; with pauses, or the worker would do nothing but take signals.
    while process.poll() is None:
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM
    assert process.communicate()[0] == ""
    store.close()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "liber_runtime.cli", "worker", "--texts-only", "--drain", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        check=False,
    )


def test_the_command_says_how_to_see_and_retry_what_was_given_up(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    store = SQLiteStore(str(tmp_path / "memory.db"), Count(3))
    store.describe(DOMAIN, [Item("item-0", "Alpha")])
    fill(store, 1)
    for _ in range(6):
        store.claim(["summary"], 1, -1.0)
    given_up = command("--store", url)
    assert given_up.returncode == 1
    assert given_up.stderr.splitlines()[-1] == (
        "error: 1 steps were given up after repeated failures; see them with `liber inspect --dead`, "
        "try them again with `liber worker --retry-dead`"
    )
    assert store.statistics().dead["summary"] == 1
    retried = command("--store", url, "--retry-dead", "--concurrency", "4", "--calls-per-minute", "6000")
    assert retried.returncode == 0, retried.stderr
    assert "1 steps that were given up are ready again" in retried.stderr
    assert store.statistics().pending == {"summary": 0, "shift": 0, "representation": 1}
    store.close()
