"""``liber worker``: pending partitions into texts and vectors."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from liber_runtime.cli.application import (
    MetricsHostOption,
    MetricsPortOption,
    StoreOption,
    TritonOption,
    WriterModelOption,
    WriterOption,
    WriterUrlOption,
    application,
    opened,
    output,
    quiet_grpc,
)
from liber_runtime.exceptions import LiberError, WriterAwayError
from liber_runtime.progress import console, progress
from liber_runtime.settings import load_settings, load_writer_settings
from liber_runtime.wording import visible
from liber_runtime.writers.llm import LLMWriter

if TYPE_CHECKING:
    from liber_runtime.representation import TritonEncoder
    from liber_runtime.worker import Worker, WorkerProgress, WorkerReport
    from liber_runtime.writers import Writer


@application.command()
def worker(
    store: StoreOption = None,
    triton: TritonOption = None,
    writer: WriterOption = None,
    writer_url: WriterUrlOption = None,
    writer_model: WriterModelOption = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="Stop when nothing is left to do, instead of waiting for more.")
    ] = False,
    texts_only: Annotated[
        bool, typer.Option("--texts-only", help="Write texts and leave the encoding to another worker.")
    ] = False,
    retry_dead: Annotated[
        bool, typer.Option("--retry-dead", help="Try the steps again that were given up, with all attempts ahead.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Most calls of the writer in flight.")] = 32,
    calls_per_minute: Annotated[
        int | None,
        typer.Option(min=1, help="Most calls of the writer begun in any minute, by this worker. [default: no limit]"),
    ] = None,
    call_seconds: Annotated[float, typer.Option(min=0.1, help="A call that takes longer is given up.")] = 600.0,
    stop_seconds: Annotated[
        float,
        typer.Option(min=0.0, help="How long calls in flight are waited for on SIGTERM; later ones are given back."),
    ] = 30.0,
    metrics_port: MetricsPortOption = 0,
    metrics_host: MetricsHostOption = "127.0.0.1",
) -> None:
    """Turn pending partitions into texts and vectors until SIGTERM or Ctrl-C.

    A second signal ends at once; what was in flight is then taken over when its lease ends.
    """
    quiet_grpc()
    from liber_runtime.metrics import Metrics
    from liber_runtime.representation import TritonEncoder
    from liber_runtime.worker import Worker
    from liber_runtime.writers.limits import Limited
    from liber_runtime.writers.opening import open_writer, price_of

    chosen = load_writer_settings(writer=writer, url=writer_url, model=writer_model)
    author = open_writer(chosen)
    asyncio.run(_check(author))
    metrics = Metrics()
    if metrics_port:
        metrics.serve(metrics_port, metrics_host)
    with opened(store) as memory:
        if retry_dead:
            console.print(f"{memory.revive()} steps that were given up are ready again")
        encoder = None if texts_only else TritonEncoder(triton or load_settings().triton)
        hands = Worker(
            memory,
            Limited(author, concurrency, calls_per_minute),
            encoder,
            metrics=metrics,
            price=price_of(chosen),
            concurrency=concurrency,
            call_seconds=call_seconds,
            stop_seconds=stop_seconds,
        )
        report, signalled = asyncio.run(_work(hands, encoder, drain))
    output.print_json(json.dumps(dataclasses.asdict(report)))
    if report.dead:
        raise LiberError(
            f"{report.dead} steps were given up after repeated failures; see them with `liber inspect --dead`, "
            "try them again with `liber worker --retry-dead`"
        )
    if drain and signalled:
        sys.exit(128 + signalled)  # what was to be drained is not


async def _work(hands: Worker, encoder: TritonEncoder | None, drain: bool) -> tuple[WorkerReport, int]:
    """Runs or drains a worker; says also which signal stopped it, 0 for none."""
    stop, signalled = asyncio.Event(), 0

    def stop_by(number: int) -> None:
        nonlocal signalled
        signalled = number
        stop.set()
        for again in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(again)
            signal.signal(again, signal.SIG_DFL)
        console.print(f"stopping: calls in flight have {hands.stop_seconds:g} s to end; a second signal ends at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop_by, number)
    if not drain:
        console.print("waiting for work; SIGTERM or Ctrl-C ends it")
    try:
        with _told(bar=drain) as tell:
            return (await hands.drain(tell, stop) if drain else await hands.run(stop, tell)), signalled
    finally:
        if encoder is not None:
            await encoder.close()


async def _check(writer: Writer) -> None:
    """A setting that can never work ends the worker before it takes anything; an endpoint that is away does not."""
    if isinstance(writer, LLMWriter):
        try:
            await writer.check()
        except WriterAwayError as error:
            console.print(f"{visible(str(error))}; the work waits for it", soft_wrap=True)
        finally:
            await writer.close()


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
                console.print(f"a step failed: {visible(now.error)}", soft_wrap=True)
                error = now.error

        yield tell
