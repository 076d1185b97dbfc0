from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from liber_runtime.behavior import Behavior, Domain, Item
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, LiberError, ScoringError, StoreError
from liber_runtime.interest import Prompt, ShiftPrompt, SummaryPrompt
from liber_runtime.memory.sqlite import SQLiteStore
from liber_runtime.metrics import Metrics
from liber_runtime.partition import Count
from liber_runtime.representation import Encoded
from liber_runtime.worker import MAX_TEXT_CHARACTERS, Worker, WorkerProgress, WorkerReport
from liber_runtime.writers import Completion

DOMAIN = Domain("films", "film", "stars", (1.0, 5.0), 3.0, ("genre",))


def behaviors(user: str, count: int) -> list[Behavior]:
    return [Behavior(user, f"item-{n % 3}", 4.0, 1e9 + n, str(n)) for n in range(count)]


class EchoWriter:
    """Writes which titles it was shown; `answer` may stand in for that."""

    name = "echo"

    def __init__(self, answer: Callable[[Prompt, int], str] | None = None, seconds: float = 0.0) -> None:
        self.prompts: list[Prompt] = []
        self.answer = answer
        self.seconds = seconds
        self.running = self.most_running = 0

    async def write(self, prompt: Prompt) -> Completion:
        self.prompts.append(prompt)
        number = len(self.prompts)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        if self.answer is not None:
            return Completion(self.answer(prompt, number))
        if isinstance(prompt, SummaryPrompt):
            return Completion(" likes " + ", ".join(item.title for item, _ in prompt.history) + "\n", 7, 3)
        return Completion(f"from {prompt.previous} to {prompt.current}", 5, 2)


class LengthEncoder:
    """A vector that tells the texts' lengths."""

    def __init__(self, poison: str = "\x00", fail_first: int = 0) -> None:
        self.makes = "lengths"
        self.batches: list[list[tuple[str, str]]] = []
        self.poison = poison
        self.fail_first = fail_first

    async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
        self.batches.append(list(texts))
        if len(self.batches) <= self.fail_first:
            raise ScoringError("liber_encode is away", "UNAVAILABLE")
        if any(self.poison in summary for summary, _ in texts):
            raise ScoringError("a text is not UTF-8", "INVALID_ARGUMENT")
        return Encoded(np.array([[len(s), len(c)] for s, c in texts], np.float32), self.makes)

    async def fingerprint(self) -> str:
        return self.makes


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(str(tmp_path / "memory.db"), Count(3))
    store.describe(DOMAIN, [Item("item-0", "Alpha"), Item("item-1", "Beta")])
    yield store
    store.close()


def worker(store: SQLiteStore, writer: EchoWriter | None, encoder: LengthEncoder | None, **options: float) -> Worker:
    defaults: dict[str, float] = {"backoff_seconds": 0.01, "idle_seconds": 0.01}
    return Worker(store, writer, encoder, **(defaults | options))  # type: ignore[arg-type]


def counts(report: WorkerReport) -> tuple[int, ...]:
    return (report.summaries, report.shifts, report.representations, report.failed, report.dead, report.repeated)


async def test_drain_makes_everything_there_is_to_make(store: SQLiteStore) -> None:
    store.describe(profiles={"ann": {"age": 31}})
    store.append([*behaviors("ann", 10), *behaviors("bo", 3), *behaviors("cy", 2)])
    writer, encoder = EchoWriter(), LengthEncoder()
    seen: list[WorkerProgress] = []
    report = await worker(store, writer, encoder).drain(seen.append)
    assert counts(report) == (4, 2, 4, 0, 0, 0)
    assert seen[-1].report.representations == 4
    assert set(seen[-1].pending.values()) == {0}
    timeline = store.timeline("ann")
    assert timeline is not None
    first, second, _ = timeline.partitions
    assert first.summary is not None
    assert first.summary.text == "likes Alpha, Beta, item-2"
    assert (first.summary.writer, first.summary.prompt_tokens, first.summary.response_tokens) == ("echo", 7, 3)
    assert first.summary.prompt_version == "summary-1"
    assert first.shift is None
    assert second.shift is not None
    assert second.shift.text == f"from {first.summary.text} to {first.summary.text}"
    assert second.representations["lengths"].vector.tolist() == [25.0, len(second.shift.text)]
    shown = [prompt for prompt in writer.prompts if isinstance(prompt, SummaryPrompt)]
    assert sorted(bool(prompt.profile) for prompt in shown) == [False, True, True, True]
    assert counts(await worker(store, writer, encoder).drain()) == (0, 0, 0, 0, 0, 0)


async def test_writer_and_encoder_may_be_different_workers(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 6))
    assert counts(await worker(store, None, LengthEncoder()).drain()) == (0, 0, 0, 0, 0, 0)
    assert counts(await worker(store, EchoWriter(), None).drain()) == (2, 1, 0, 0, 0, 0)
    assert counts(await worker(store, None, LengthEncoder()).drain()) == (0, 0, 2, 0, 0, 0)


async def test_two_workers_share_the_work(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 90))
    writers = EchoWriter(seconds=0.002), EchoWriter(seconds=0.002)
    reports = await asyncio.gather(*(worker(store, writer, None, concurrency=4).drain() for writer in writers))
    rest = await worker(store, writers[0], None).drain()
    assert sum(report.summaries for report in (*reports, rest)) == 30
    assert sum(report.shifts for report in (*reports, rest)) == 29
    assert all(writer.prompts for writer in writers)
    assert len(writers[0].prompts) + len(writers[1].prompts) == 59


async def test_no_more_calls_or_claims_than_allowed(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 90))
    writer = EchoWriter(seconds=0.001)
    await worker(store, writer, None, concurrency=5).drain()
    assert writer.most_running == 5


async def test_texts_of_like_length_are_encoded_together(store: SQLiteStore) -> None:
    store.append([b for n in range(40) for b in behaviors(f"user-{n}", 3)])
    writer = EchoWriter(lambda prompt, number: "x" * (1 + number * 7 % 40))
    encoder = LengthEncoder()
    await worker(store, writer, None).drain()
    await worker(store, None, encoder, encode_batch=10).drain()
    assert [len(batch) for batch in encoder.batches] == [10] * 4
    lengths = [len(summary) for batch in encoder.batches for summary, _ in batch]
    assert lengths == sorted(lengths)


async def test_a_failed_call_is_tried_again(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 3))

    def second_time(prompt: Prompt, number: int) -> str:
        if number == 1:
            raise ScoringError("busy", "UNAVAILABLE")
        return "fine"

    report = await worker(store, EchoWriter(second_time), LengthEncoder(fail_first=1)).drain()
    assert counts(report) == (1, 0, 1, 2, 0, 1)
    assert store.statistics().repeated == 1


@pytest.mark.parametrize(
    "answer", ["", " \n\t", "x" * (MAX_TEXT_CHARACTERS + 1), "half a pair \ud83d", "nul \x00"], ids=repr
)
async def test_an_unusable_answer_is_a_failure_and_in_the_end_dead(store: SQLiteStore, answer: str) -> None:
    store.append(behaviors("ann", 3))
    seen: list[WorkerProgress] = []
    report = await worker(store, EchoWriter(lambda *_: answer), None, max_attempts=2).drain(seen.append)
    assert counts(report) == (0, 0, 0, 2, 1, 1)
    assert "writer 'echo' answered with" in seen[-1].error
    assert store.statistics().dead == {"summary": 1, "shift": 0, "representation": 0}


async def test_any_error_of_a_writer_is_survived(store: SQLiteStore) -> None:
    store.append([*behaviors("ann", 3), *behaviors("bo", 3)])

    def one_is_broken(prompt: Prompt, number: int) -> str:
        assert isinstance(prompt, SummaryPrompt)
        if prompt.profile:
            raise ZeroDivisionError("division by zero")
        return "fine"

    store.describe(profiles={"ann": {"age": 31}})
    report = await worker(store, EchoWriter(one_is_broken), None, max_attempts=3).drain()
    assert counts(report) == (1, 0, 0, 3, 1, 2)


async def test_one_bad_text_does_not_take_its_batch_along(store: SQLiteStore) -> None:
    store.append([b for n in range(6) for b in behaviors(f"user-{n}", 3)])
    writer = EchoWriter(lambda prompt, number: "poison" if number == 3 else "fine")
    report = await worker(store, writer, LengthEncoder("poison"), max_attempts=3, max_backoff_seconds=0.02).drain()
    assert (report.representations, report.dead) == (5, 1)


@pytest.mark.parametrize("shape", [(1, 2), (3,), (3, 0)])
async def test_an_unusable_vector_is_a_failure(store: SQLiteStore, shape: tuple[int, ...]) -> None:
    class Broken(LengthEncoder):
        async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
            return Encoded(np.zeros(shape, np.float32), "broken")

    store.append([b for n in range(3) for b in behaviors(f"user-{n}", 3)])
    report = await worker(store, EchoWriter(), Broken(), max_attempts=1).drain()
    assert (report.summaries, report.representations, report.dead) == (3, 0, 3)


async def test_a_call_that_takes_too_long_is_given_up(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 3))
    seen: list[WorkerProgress] = []
    hands = worker(store, EchoWriter(seconds=60), None, call_seconds=0.1, max_attempts=1)
    report = await hands.drain(seen.append)
    assert counts(report) == (0, 0, 0, 1, 1, 0)
    assert hands.metrics.registry.get_sample_value("liber_writer_calls_total", {"outcome": "failed"}) == 1
    assert seen[-1].error.startswith("no answer within 0.1 s")


async def test_a_step_that_kills_its_workers_is_given_up(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 3))
    for _ in range(3):
        store.claim(["summary"], 1, -1.0)
    writer = EchoWriter()
    report = await worker(store, writer, None, max_attempts=3).drain()
    assert counts(report) == (0, 0, 0, 1, 1, 0)
    assert writer.prompts == []


async def test_a_result_for_a_forgotten_user_is_discarded(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 3))

    def forget(prompt: Prompt, number: int) -> str:
        store.forget("ann")
        return "too late"

    report = await worker(store, EchoWriter(forget), None).drain()
    assert (report.summaries, report.discarded) == (0, 1)
    assert store.users() == []


async def test_run_works_until_stopped_and_finishes_what_it_began(store: SQLiteStore) -> None:
    stop = asyncio.Event()
    writer = EchoWriter(seconds=0.05)
    running = asyncio.create_task(worker(store, writer, LengthEncoder()).run(stop))
    await asyncio.sleep(0.05)
    store.append(behaviors("ann", 3))
    while not writer.running:
        await asyncio.sleep(0.005)
    stop.set()
    report = await running
    assert report.summaries == 1
    assert store.statistics().pending == {"summary": 0, "shift": 0, "representation": 1}


async def test_run_gives_back_what_it_cannot_finish(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 6))
    stop = asyncio.Event()
    writer = EchoWriter(seconds=60)
    running = asyncio.create_task(worker(store, writer, None, stop_seconds=0.01).run(stop))
    while writer.running < 2:
        await asyncio.sleep(0.005)
    stop.set()
    report = await running
    assert counts(report) == (0, 0, 0, 0, 0, 0)
    assert [task.attempts for task in store.claim(["summary"], 9, 60.0)] == [2, 2]


async def test_a_cancelled_run_gives_back_too(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 6))
    writer = EchoWriter(seconds=60)
    running = asyncio.create_task(worker(store, writer, None).run(asyncio.Event()))
    while writer.running < 2:
        await asyncio.sleep(0.005)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(store.claim(["summary"], 9, 60.0)) == 2


async def test_an_outage_does_not_use_up_the_whole_queue(store: SQLiteStore) -> None:
    store.append([b for n in range(50) for b in behaviors(f"user-{n}", 3)])

    def away(prompt: Prompt, number: int) -> str:
        raise OSError("connection refused")

    stop = asyncio.Event()
    writer = EchoWriter(away)
    running = asyncio.create_task(
        worker(store, writer, None, concurrency=4, max_attempts=1, backoff_seconds=60.0).run(stop)
    )
    while len(writer.prompts) < 4:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    stop.set()
    report = await running
    assert (report.failed, len(writer.prompts)) == (4, 4)
    assert store.statistics().pending["summary"] == 46


async def test_a_worker_without_hands_is_refused(store: SQLiteStore) -> None:
    with pytest.raises(ConfigurationError, match="neither"):
        Worker(store, None, None)


async def test_a_store_without_items_is_refused(tmp_path: Path) -> None:
    store = SQLiteStore(str(tmp_path / "bare.db"), Count(3))
    assert counts(await worker(store, EchoWriter(), None).drain()) == (0, 0, 0, 0, 0, 0)
    store.append(behaviors("ann", 3))
    with pytest.raises(ConfigurationError, match="ingest the item table"):
        await worker(store, EchoWriter(), None).drain()
    store.close()


async def test_a_store_that_fails_ends_the_worker(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 3))

    def close(prompt: Prompt, number: int) -> str:
        store.close()
        return "fine"

    with pytest.raises(StoreError, match="closed"):
        await worker(store, EchoWriter(close), None, store_patience_seconds=0.1).drain()


async def test_metrics_tell_what_was_done(store: SQLiteStore) -> None:
    metrics = Metrics()
    store.append(behaviors("ann", 6))

    def first_shift_fails(prompt: Prompt, number: int) -> str:
        if isinstance(prompt, ShiftPrompt) and number < 4:
            raise InvalidInputError("no")
        return "fine"

    encoder = LengthEncoder()
    hands = Worker(store, EchoWriter(first_shift_fails), encoder, metrics=metrics, backoff_seconds=0.01)
    await hands.drain()
    port = metrics.serve(0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        shown = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    expected = {
        'liber_steps_total{step="summary"}': 2,
        'liber_steps_total{step="shift"}': 1,
        'liber_steps_total{step="representation"}': 2,
        'liber_step_failures_total{step="shift"}': 1,
        "liber_calls_repeated_total": 1,
        'liber_queue_steps{step="representation"}': 0,
        'liber_dead_steps{step="shift"}': 0,
        'liber_writer_seconds_count{kind="summary"}': 2,
        'liber_writer_calls_total{outcome="answered"}': 3,
        'liber_writer_calls_total{outcome="failed"}': 1,
        "liber_encode_seconds_count": len(encoder.batches),
        "liber_partitions": 2,
        'liber_queue_age_seconds{step="shift"}': 0,
    }
    assert {name: float(shown[name]) for name in expected} == expected
    with pytest.raises(ConfigurationError, match=f"port {port}: .* in use; choose"):
        Metrics().serve(port)


async def test_an_outage_costs_no_step_however_long(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 6))
    await worker(store, EchoWriter(), None).drain()
    encoder = LengthEncoder(fail_first=20)
    stop = asyncio.Event()

    def until_made(progress: WorkerProgress) -> None:
        if progress.report.representations == 2:
            stop.set()

    hands = worker(store, None, encoder, max_attempts=3, max_backoff_seconds=0.02)
    report = await asyncio.wait_for(hands.run(stop, until_made), 30)
    assert report.representations == 2
    assert report.dead == 0
    assert report.failed >= 20
    assert store.statistics().dead["representation"] == 0


async def test_a_drain_that_reaches_nobody_ends_and_leaves_its_steps_pending(store: SQLiteStore) -> None:
    store.append(behaviors("ann", 6))
    await worker(store, EchoWriter(), None).drain()
    with pytest.raises(LiberError, match="liber_encode is away"):
        await worker(store, None, LengthEncoder(fail_first=10**9), max_attempts=3).drain()
    assert store.statistics().pending["representation"] == 2
    assert store.statistics().dead["representation"] == 0
    report = await worker(store, None, LengthEncoder(), max_attempts=3).drain()
    assert report.representations == 2
