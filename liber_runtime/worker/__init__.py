"""Turns pending partitions into knowledge and representations (paper, sections 3.3 and 3.4.1), off the scoring path.

A worker claims steps, asks the writer or the encoder, and commits. It holds no more claims than it may have calls in
flight, so a killed worker repeats at most those. Any number of workers, in any number of processes and on any number of
machines, share a store: a claim is a short lease that is renewed while its call runs, so what a killed worker held is
taken over within `lease_seconds`, and a long call is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import MemoryStore, Step
from liber_runtime.metrics import Metrics
from liber_runtime.representation import Encoder
from liber_runtime.worker.answers import MAX_TEXT_CHARACTERS
from liber_runtime.worker.session import Session
from liber_runtime.writers import Writer, close
from liber_runtime.writers.pricing import Price

__all__ = ["MAX_TEXT_CHARACTERS", "Worker", "WorkerProgress", "WorkerReport"]


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
        lost: claims that were found lost while their call ran; the call was ended.
        repeated: writer calls that an earlier claim may have made already.
        prompt_tokens: read by the writer, as far as it counts them; those of unusable answers too.
        response_tokens: written, likewise.
        cost: of these tokens, in the currency of the worker's price; 0 without one.
        seconds: wall time.
    """

    summaries: int
    shifts: int
    representations: int
    failed: int
    dead: int
    discarded: int
    lost: int
    repeated: int
    prompt_tokens: int
    response_tokens: int
    cost: float
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """How far the work is.

    Attributes:
        report: what was done so far.
        pending: steps waiting or claimed, by step, a few seconds old at most; empty until they were first counted.
            Finished texts add steps of later kinds.
        error: the newest failure; empty if there was none.
    """

    report: WorkerReport
    pending: Mapping[Step, int]
    error: str


class Worker:
    """Claims steps of `store`, makes what they need, commits it.

    A failed step is tried again after `backoff_seconds`, doubled with every attempt, and given up after
    `max_attempts` claims. A call that certainly reached nobody (gRPC's UNAVAILABLE, `WriterAwayError`) does not count:
    an outage, however long, costs no step. While every call fails no more steps are tried per pause than calls may be
    in flight, so that an outage does not use up the attempts of the whole queue.

    Writing and encoding do not wait for each other. Memory is bounded: at most `concurrency` partitions or pairs of
    summaries, and `POOLED_BATCHES` times `encode_batch` pairs of texts of at most `MAX_TEXT_CHARACTERS` each, are held
    at a time, however long the queue is.

    Args:
        store: where steps come from and go to.
        writer: makes summaries and shifts; None leaves them to other workers.
        encoder: makes representations; None leaves them to other workers.
        metrics: counts; its own if None.
        price: of the writer's tokens; None where nobody asks.
        concurrency: most writer calls in flight. High for an instant writer (one transaction takes that many), for
            an LLM what its server can batch.
        encode_batch: most pairs of texts in one call of the encoder.
        lease_seconds: how long a claim is held without being renewed; it is renewed at a third of that.
        call_seconds: a call that takes longer is given up.
        max_attempts: claims of one step before it is given up.
        backoff_seconds: pause before the second attempt.
        max_backoff_seconds: longest pause.
        idle_seconds: pause between looks at an empty queue.
        stop_seconds: how long calls in flight are waited for once the worker is told to stop; later ones are given
            back.
        store_patience_seconds: how long a failing store (a failover, a full disk) is tried again before its error ends
            the worker. What was made is committed as soon as the store is back.

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
        price: Price | None = None,
        concurrency: int = 32,
        encode_batch: int = 64,
        lease_seconds: float = 60.0,
        call_seconds: float = 600.0,
        max_attempts: int = 6,
        backoff_seconds: float = 1.0,
        max_backoff_seconds: float = 300.0,
        idle_seconds: float = 0.5,
        stop_seconds: float = 30.0,
        store_patience_seconds: float = 60.0,
    ) -> None:
        if writer is None and encoder is None:
            raise ConfigurationError("a worker needs a writer, an encoder or both; it was given neither")
        self.store = store
        self.writer = writer
        self.encoder = encoder
        self.metrics = metrics or Metrics()
        self.price = price
        self.concurrency = concurrency
        self.encode_batch = encode_batch
        self.lease_seconds = lease_seconds
        self.call_seconds = call_seconds
        self.max_attempts = max_attempts
        self.backoff_seconds = backoff_seconds
        self.max_backoff_seconds = max_backoff_seconds
        self.idle_seconds = idle_seconds
        self.stop_seconds = stop_seconds
        self.store_patience_seconds = store_patience_seconds

    async def run(self, stop: asyncio.Event, progress: Callable[[WorkerProgress], None] | None = None) -> WorkerReport:
        """Works until `stop` is set, then finishes the calls in flight or gives their steps back.

        Args:
            stop: ends the work.
            progress: see `drain`.

        Raises:
            StoreError: the store failed for longer than `store_patience_seconds`.
            ConfigurationError: partitions wait to be summarised, and the store has no description of the data set.
        """
        return await self._work(stop, progress, forever=True)

    async def drain(
        self, progress: Callable[[WorkerProgress], None] | None = None, stop: asyncio.Event | None = None
    ) -> WorkerReport:
        """Works until nothing is ready, its own retries included; steps that other workers hold are left to them.

        Args:
            progress: called about twice a second, and at the end.
            stop: ends the work before, as that of `run`.

        Raises:
            StoreError: the store failed for longer than `store_patience_seconds`.
            ConfigurationError: partitions wait to be summarised, and the store has no description of the data set.
            LiberError: nobody was reached in `max_attempts` rounds, as the writer or the encoder says it; the steps
                stay pending.
        """
        return await self._work(stop or asyncio.Event(), progress, forever=False)

    async def _work(
        self, stop: asyncio.Event, progress: Callable[[WorkerProgress], None] | None, forever: bool
    ) -> WorkerReport:
        session = Session(self, forever)

        def report() -> WorkerReport:
            counts = session.counts
            return WorkerReport(
                summaries=counts["summary"],
                shifts=counts["shift"],
                representations=counts["representation"],
                failed=counts["failed"],
                dead=counts["dead"],
                discarded=counts["discarded"],
                lost=counts["lost"],
                repeated=counts["repeated"],
                prompt_tokens=counts["prompt_tokens"],
                response_tokens=counts["response_tokens"],
                cost=session.cost,
                seconds=session.seconds,
            )

        def tell() -> None:
            if progress is not None:
                progress(WorkerProgress(report(), session.pending, session.error))

        try:
            await session.work(stop, tell)
        finally:
            if self.writer is not None:
                await close(self.writer)
        return report()
