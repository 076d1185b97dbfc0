"""Turns pending partitions into knowledge and representations (paper, sections 3.3 and 3.4.1), off the scoring path.

A worker claims steps, asks the writer or the encoder, and commits. It holds no more claims than calls it has in
flight, so a killed worker repeats at most those. Any number of workers, in any number of processes, share a store.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from liber_runtime.behavior import Domain, Item, Text
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, LiberError, ScoringError
from liber_runtime.interest import Prompt, ShiftPrompt, SummaryPrompt
from liber_runtime.memory import STEPS, MemoryStore, Representation, Result, Step, Task
from liber_runtime.metrics import Metrics
from liber_runtime.representation import Encoded, Encoder
from liber_runtime.writers import Writer

MAX_TEXT_CHARACTERS = 20_000
"""A longer answer is a writer that does not stop, not knowledge."""

_WRITE_STEPS: tuple[Step, ...] = ("summary", "shift")
_ENCODE_STEPS: tuple[Step, ...] = ("representation",)
_OBSERVE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker did.

    Attributes:
        summaries: made and kept.
        shifts: made and kept.
        representations: made and kept.
        failed: calls that gave nothing usable; each is tried again or given up.
        dead: steps given up.
        discarded: results that came too late (lease expired, user forgotten).
        repeated: writer calls that an earlier claim may have made already.
        seconds: wall time.
    """

    summaries: int
    shifts: int
    representations: int
    failed: int
    dead: int
    discarded: int
    repeated: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """How far the work is.

    Attributes:
        report: what was done so far.
        pending: steps waiting or claimed, by step; finished texts add steps of later kinds.
        error: the newest failure; empty if there was none.
    """

    report: WorkerReport
    pending: Mapping[Step, int]
    error: str


class Worker:
    """Claims steps of `store`, makes what they need, commits it.

    A failed step is tried again after `backoff_seconds`, doubled with every attempt, and given up after
    `max_attempts` claims. A call of the encoder that reached nobody (gRPC's UNAVAILABLE) does not count: an outage of
    Triton, however long, costs no step. While every call fails (the writer is away) no more than `concurrency` steps
    are tried per pause, so that an outage does not use up the attempts of the whole queue.

    Args:
        store: where steps come from and go to.
        writer: makes summaries and shifts; None leaves them to other workers.
        encoder: makes representations; None leaves them to other workers.
        metrics: counts; its own if None.
        concurrency: most writer calls in flight. High for an instant writer (one transaction takes that many), for
            an LLM what its server can batch.
        encode_batch: most pairs of texts in one call of the encoder.
        lease_seconds: how long a claim is held; a call that takes longer than 4/5 of it is given up.
        max_attempts: claims of one step before it is given up.
        backoff_seconds: pause before the second attempt.
        max_backoff_seconds: longest pause.
        idle_seconds: pause between looks at an empty queue.
        stop_seconds: how long `run` waits for calls in flight once it is told to stop; later ones are given back.

    Raises:
        ConfigurationError: neither a writer nor an encoder.
    """

    def __init__(
        self,
        store: MemoryStore,
        writer: Writer | None,
        encoder: Encoder | None,
        *,
        metrics: Metrics | None = None,
        concurrency: int = 32,
        encode_batch: int = 64,
        lease_seconds: float = 600.0,
        max_attempts: int = 6,
        backoff_seconds: float = 1.0,
        max_backoff_seconds: float = 300.0,
        idle_seconds: float = 0.5,
        stop_seconds: float = 30.0,
    ) -> None:
        if writer is None and encoder is None:
            raise ConfigurationError("a worker needs a writer, an encoder or both; it was given neither")
        self.store = store
        self.writer = writer
        self.encoder = encoder
        self.metrics = metrics or Metrics()
        self.concurrency = concurrency
        self.encode_batch = encode_batch
        self.lease_seconds = lease_seconds
        self.max_attempts = max_attempts
        self.backoff_seconds = backoff_seconds
        self.max_backoff_seconds = max_backoff_seconds
        self.idle_seconds = idle_seconds
        self.stop_seconds = stop_seconds

    async def run(self, stop: asyncio.Event, progress: Callable[[WorkerProgress], None] | None = None) -> WorkerReport:
        """Works until `stop` is set, then finishes the calls in flight or gives their steps back.

        Args:
            stop: ends the work.
            progress: see `drain`.

        Raises:
            StoreError: the store failed.
            ConfigurationError: partitions wait to be summarised, and the store has no description of the data set.
        """
        return await _Session(self, stop, progress).work(forever=True)

    async def drain(self, progress: Callable[[WorkerProgress], None] | None = None) -> WorkerReport:
        """Works until nothing is ready, its own retries included; steps that other workers hold are left to them.

        Args:
            progress: called about twice a second, and at the end.

        Raises:
            StoreError: the store failed.
            ConfigurationError: partitions wait to be summarised, and the store has no description of the data set.
            ScoringError: nobody was reached in `max_attempts` rounds; the steps stay pending.
        """
        return await _Session(self, asyncio.Event(), progress).work(forever=False)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A call's end: what was made, or why not; `away` if the call reached nobody."""

    task: Task
    made: Text | Representation | None = None
    error: str = ""
    away: bool = False


@dataclass(slots=True)
class _Lane:
    """One kind of calls: how many at once, which are in flight, and the pause while all of them fail.

    Attributes:
        steps: what it claims.
        capacity: most claims at a time.
        refill_at: claims are made when no more than this many are held; the encoder gains from a large pool to sort.
    """

    steps: tuple[Step, ...]
    capacity: int
    refill_at: int
    jobs: dict[asyncio.Task[list[_Outcome]], Sequence[Task]] = field(default_factory=dict)
    failing: int = 0
    away: bool = False
    resume_at: float = 0.0

    @property
    def room(self) -> int:
        held = sum(map(len, self.jobs.values()))
        return self.capacity - held if held <= self.refill_at else 0


class _Session:
    """One run or drain of a worker: its calls in flight and its counts."""

    def __init__(
        self, worker: Worker, stop: asyncio.Event, progress: Callable[[WorkerProgress], None] | None = None
    ) -> None:
        self._worker = worker
        self._store = worker.store
        self._metrics = worker.metrics
        self._stop = stop
        self._progress = progress
        self._started = time.monotonic()
        self._observed = 0.0
        self._counts: Counter[str] = Counter()
        self._retries: list[float] = []
        self._error = ""
        self._encoding = asyncio.Semaphore(2)  # one call on its way while another is computed
        # Less than the lease, so that a failed step is released while the claim on it still stands.
        self._call_seconds = 0.8 * worker.lease_seconds
        self._lanes = []
        if worker.writer is not None:
            self._lanes.append(_Lane(_WRITE_STEPS, worker.concurrency, worker.concurrency - 1))
        if worker.encoder is not None:
            self._lanes.append(_Lane(_ENCODE_STEPS, 8 * worker.encode_batch, worker.encode_batch))

    async def work(self, forever: bool) -> WorkerReport:
        patience = 0.0
        try:
            while not self._stop.is_set():
                looked_at = time.monotonic()
                for lane in self._lanes:
                    await self._fill(lane)
                if any(lane.jobs for lane in self._lanes):
                    await self._wait_for_a_job()
                    await self._settle_finished()
                    if not forever:
                        self._require_company()
                elif (pause := self._pause(looked_at, forever)) is not None:
                    await self._wait_for_stop(pause)
                else:
                    break
                await self._observe()
            patience = self._worker.stop_seconds
        finally:
            await self._wind_down(patience)
        await self._observe(last=True)
        return self._report()

    def _require_company(self) -> None:
        """Ends a drain that has waited long enough for the encoder; its steps stay pending."""
        if any(lane.away and lane.failing >= self._worker.max_attempts for lane in self._lanes):
            raise ScoringError(self._error, "UNAVAILABLE")

    # -- claiming ------------------------------------------------------------------------------------------------

    async def _fill(self, lane: _Lane) -> None:
        """Claims as many steps as the lane has room for and starts their calls."""
        if lane.room < 1 or time.monotonic() < lane.resume_at:
            return
        domain = self._store.domain
        if lane.steps is _WRITE_STEPS and domain is None:
            if any(self._store.statistics().pending[step] for step in lane.steps):
                raise ConfigurationError(
                    "partitions wait to be summarised, but the store has no items; ingest the item table first"
                )
            return
        # In a thread: a write waits for other processes' writes, and calls in flight must not wait with it.
        tasks = await asyncio.to_thread(self._store.claim, lane.steps, lane.room, self._worker.lease_seconds)
        worn_out = [task for task in tasks if task.attempts > self._worker.max_attempts]
        if worn_out:
            await self._give_back([_Outcome(task, error="claimed too often without an end") for task in worn_out])
            tasks = [task for task in tasks if task.attempts <= self._worker.max_attempts]
        if lane.steps is _ENCODE_STEPS:
            for batch in self._batches(tasks):
                lane.jobs[asyncio.create_task(self._encode(batch))] = batch
        elif tasks:
            assert domain is not None
            items = self._store.items({behavior.item_id for task in tasks for behavior in task.behaviors})
            for task in tasks:
                self._count_repeated(task)
                lane.jobs[asyncio.create_task(self._write(task, domain, items))] = (task,)

    def _batches(self, tasks: Iterable[Task]) -> Iterable[Sequence[Task]]:
        """Texts of like length together, which spares padding; what failed before alone, so that it fails alone."""
        first = sorted((task for task in tasks if task.attempts == 1), key=lambda t: len(t.summary) + len(t.shift))
        size = self._worker.encode_batch
        yield from (first[start : start + size] for start in range(0, len(first), size))
        yield from ([task] for task in tasks if task.attempts > 1)

    def _count_repeated(self, task: Task) -> None:
        if task.attempts > 1:
            self._counts["repeated"] += 1
            self._metrics.repeated()

    # -- calls ---------------------------------------------------------------------------------------------------

    async def _write(self, task: Task, domain: Domain, items: Mapping[str, Item]) -> list[_Outcome]:
        writer = self._worker.writer
        assert writer is not None
        started = time.perf_counter()
        try:
            prompt = _prompt(task, domain, items)
            completion = await asyncio.wait_for(writer.write(prompt), self._call_seconds)
            text = Text(
                kind=prompt.kind,
                text=_checked_text(completion.text, writer.name),
                writer=writer.name,
                prompt_version=prompt.version,
                prompt_tokens=completion.prompt_tokens,
                response_tokens=completion.response_tokens,
                seconds=time.perf_counter() - started,
                made_at=time.time(),
            )
        except Exception as error:
            # Even a call that seems to have reached nobody may have been paid for, so it counts.
            return [_Outcome(task, error=self._explain(error))]
        self._metrics.written(text)
        return [_Outcome(task, text)]

    async def _encode(self, tasks: Sequence[Task]) -> list[_Outcome]:
        encoder = self._worker.encoder
        assert encoder is not None
        try:
            encoded = await asyncio.wait_for(self._call_encoder(encoder, tasks), self._call_seconds)
            vectors = _checked_vectors(encoded.vectors, len(tasks))
        except Exception as error:
            return [_Outcome(task, error=self._explain(error), away=_is_away(error)) for task in tasks]
        return [
            _Outcome(task, Representation(vector, encoded.fingerprint))
            for task, vector in zip(tasks, vectors, strict=True)
        ]

    async def _call_encoder(self, encoder: Encoder, tasks: Sequence[Task]) -> Encoded:
        async with self._encoding:
            return await encoder.encode([(task.summary, task.shift) for task in tasks])

    def _explain(self, error: Exception) -> str:
        if isinstance(error, LiberError):
            return str(error)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return f"no answer within {self._call_seconds:g} s; give the worker a longer lease if calls take that long"
        return f"{type(error).__name__}: {error}"

    # -- keeping -------------------------------------------------------------------------------------------------

    async def _settle_finished(self) -> None:
        """Commits, in one transaction for each step, whatever has come in, and gives back what failed."""
        outcomes: list[_Outcome] = []
        stopped: list[Task] = []
        for lane in self._lanes:
            ended = [job for job in lane.jobs if job.done()]
            stopped += [task for job in ended if job.cancelled() for task in lane.jobs[job]]
            came = [outcome for job in ended if not job.cancelled() for outcome in job.result()]
            for job in ended:
                del lane.jobs[job]
            self._pace(lane, came)
            outcomes += came
        await self._commit(outcomes)
        await self._give_back([outcome for outcome in outcomes if outcome.made is None])
        if stopped:
            await asyncio.to_thread(self._store.release, stopped, "the worker stopped", 0.0)

    def _pace(self, lane: _Lane, outcomes: Sequence[_Outcome]) -> None:
        """Slows a lane down while nothing succeeds in it."""
        if any(outcome.made is not None for outcome in outcomes):
            lane.failing, lane.resume_at = 0, 0.0
        elif outcomes:
            lane.failing += 1
            lane.away = all(outcome.away for outcome in outcomes)
            lane.resume_at = time.monotonic() + self._delay(lane.failing)

    async def _commit(self, outcomes: Sequence[_Outcome]) -> None:
        for step in STEPS:
            results = [
                Result(outcome.task, outcome.made)
                for outcome in outcomes
                if outcome.made is not None and outcome.task.step == step
            ]
            if results:
                committed = await asyncio.to_thread(self._store.commit, results)
                self._counts[step] += committed.kept
                self._counts["discarded"] += committed.discarded
                self._metrics.kept(step, committed.kept)
                self._metrics.discarded(committed.discarded)

    async def _give_back(self, outcomes: Iterable[_Outcome]) -> None:
        """Releases failed steps, those of the same fate together."""
        fates: dict[tuple[str, float | None, bool], list[Task]] = defaultdict(list)
        for outcome in outcomes:
            dead = outcome.task.attempts >= self._worker.max_attempts and not outcome.away
            # The lane's own pause is enough while nobody is reached; then the step is for whoever comes first.
            delay = None if dead else 0.0 if outcome.away else self._delay(outcome.task.attempts)
            fates[outcome.error, delay, not outcome.away].append(outcome.task)
            self._counts["failed"] += 1
            self._counts["dead"] += dead
            self._metrics.failed(outcome.task.step, dead)
            self._error = outcome.error
        for (error, delay, attempted), tasks in fates.items():
            await asyncio.to_thread(self._store.release, tasks, error, delay, attempted=attempted)
            if delay is not None:
                self._retries.append(time.monotonic() + delay)

    def _delay(self, attempts: int) -> float:
        # The exponent is bounded because a float is not.
        return min(self._worker.backoff_seconds * 2.0 ** min(attempts - 1, 30), self._worker.max_backoff_seconds)

    # -- waiting -------------------------------------------------------------------------------------------------

    async def _wait_for_a_job(self) -> None:
        stopping = asyncio.ensure_future(self._stop.wait())
        jobs = [job for lane in self._lanes for job in lane.jobs]
        # The timeout lets free slots look for new work while long calls run.
        await asyncio.wait([*jobs, stopping], timeout=self._worker.idle_seconds, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    async def _wait_for_stop(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _pause(self, looked_at: float, forever: bool) -> float | None:
        """How long to wait for work when there is none; None when a drain is done."""
        if forever:
            return self._worker.idle_seconds
        # A retry that was due before the last look and was not there has been taken by another worker.
        self._retries = [due for due in self._retries if due > looked_at]
        waits = self._retries + [lane.resume_at for lane in self._lanes if lane.resume_at > looked_at]
        return max(min(waits) - time.monotonic(), 0.001) if waits else None

    async def _wind_down(self, patience: float) -> None:
        """Waits for the calls in flight, keeps what they made, and gives back the steps of those that did not end."""
        jobs = [job for lane in self._lanes for job in lane.jobs]
        if not jobs:
            return
        _, late = await asyncio.wait(jobs, timeout=patience)
        for job in late:
            job.cancel()
        if late:
            await asyncio.wait(late)
        await self._settle_finished()

    # -- telling -------------------------------------------------------------------------------------------------

    async def _observe(self, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._observed < _OBSERVE_SECONDS:
            return
        self._observed = now
        statistics = await asyncio.to_thread(self._store.statistics)
        self._metrics.queue(statistics)
        if self._progress is not None:
            self._progress(WorkerProgress(self._report(), statistics.pending, self._error))

    def _report(self) -> WorkerReport:
        return WorkerReport(
            summaries=self._counts["summary"],
            shifts=self._counts["shift"],
            representations=self._counts["representation"],
            failed=self._counts["failed"],
            dead=self._counts["dead"],
            discarded=self._counts["discarded"],
            repeated=self._counts["repeated"],
            seconds=time.monotonic() - self._started,
        )


def _prompt(task: Task, domain: Domain, items: Mapping[str, Item]) -> Prompt:
    """prompt_s or prompt_c of a task (Eq. 2, 3); an unknown item is called by its id."""
    if task.step == "shift":
        return ShiftPrompt(domain, task.previous, task.summary)
    history = tuple(
        (items.get(behavior.item_id) or Item(behavior.item_id, behavior.item_id), behavior.feedback)
        for behavior in task.behaviors
    )
    return SummaryPrompt(domain, task.profile, history)


def _checked_text(text: str, writer: str) -> str:
    """A writer's answer, if it can be kept.

    Raises:
        InvalidInputError: it is empty, too long, or not text.
    """
    text = text.strip()
    if not text:
        raise InvalidInputError(f"writer {writer!r} answered with nothing")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise InvalidInputError(
            f"writer {writer!r} answered with {len(text)} characters; bound its answers to {MAX_TEXT_CHARACTERS}"
        )
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidInputError(f"writer {writer!r} answered with characters that are not text: {text!r:.80}")
    return text


def _checked_vectors(vectors: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """An encoder's answer, if it is float32[count, d] and finite.

    Raises:
        InvalidInputError: it is not.
    """
    checked = np.asarray(vectors, dtype=np.float32)
    if checked.ndim != 2 or checked.shape[0] != count or not checked.shape[1] or not np.isfinite(checked).all():
        raise InvalidInputError(
            f"the encoder answered {count} pairs of texts with shape {checked.shape} or values that are not finite; "
            f"float32[{count}, d] is needed"
        )
    return checked


def _is_away(error: Exception) -> bool:
    return isinstance(error, ScoringError) and error.status == "UNAVAILABLE"
