"""``liber worker``: pending partitions into texts and vectors."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from liber_runtime.cli.application import StoreOption, TritonOption, application, opened, output
from liber_runtime.exceptions import LiberError
from liber_runtime.memory import MemoryStore
from liber_runtime.progress import console, progress
from liber_runtime.settings import load_settings

if TYPE_CHECKING:
    from liber_runtime.worker import WorkerProgress, WorkerReport


@application.command()
def worker(
    store: StoreOption = None,
    triton: TritonOption = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="Stop when nothing is left to do, instead of waiting for more.")
    ] = False,
    texts_only: Annotated[
        bool, typer.Option("--texts-only", help="Write texts and leave the encoding to another worker.")
    ] = False,
    metrics_port: Annotated[
        int, typer.Option(help="Serve Prometheus metrics on this port of 127.0.0.1; 0 for none.")
    ] = 0,
) -> None:
    """Turn pending partitions into texts and vectors, with the statistical writer, until SIGTERM or Ctrl-C."""
    from liber_runtime.metrics import Metrics
    from liber_runtime.representation import TritonEncoder
    from liber_runtime.worker import Worker
    from liber_runtime.writers.statistical import StatisticalWriter

    metrics = Metrics()
    if metrics_port:
        metrics.serve(metrics_port)

    async def work(memory: MemoryStore, tell: Callable[[WorkerProgress], None]) -> WorkerReport:
        encoder = None if texts_only else TritonEncoder(triton or load_settings().triton)
        working = Worker(memory, StatisticalWriter(), encoder, metrics=metrics)
        try:
            if drain:
                return await working.drain(tell)
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            return await working.run(stop, tell)
        finally:
            if encoder is not None:
                await encoder.close()

    with opened(store) as memory, _told(bar=drain) as tell:
        report = asyncio.run(work(memory, tell))
    output.print_json(json.dumps(dataclasses.asdict(report)))
    if report.dead:
        raise LiberError(f"{report.dead} steps were given up after repeated failures, the reason is above")


@contextmanager
def _told(bar: bool) -> Iterator[Callable[[WorkerProgress], None]]:
    """Shows how far a worker is, on a bar if it is to end, and every failure that is not the last one again."""
    with progress("write and encode", None) if bar else nullcontext(lambda done: None) as advance:
        done, error = 0, ""

        def tell(now: WorkerProgress) -> None:
            nonlocal done, error
            made = now.report.summaries + now.report.shifts + now.report.representations
            advance(made - done)
            done = made
            if now.error != error:
                console.print(f"a step failed: {now.error}", soft_wrap=True)
                error = now.error

        yield tell
