"""The ``liber`` command."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from liber_runtime import __version__
from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, LiberError
from liber_runtime.memory import MemoryStore, Timeline, absolute_url, open_store
from liber_runtime.partition import parse_condition
from liber_runtime.progress import console, progress
from liber_runtime.settings import load_settings

if TYPE_CHECKING:
    from liber_runtime.worker import WorkerProgress, WorkerReport

APPEND_BATCH = 10_000
"""Behaviors in one transaction of `ingest`."""

application = typer.Typer(
    name="liber",
    help="Lifelong user interest, written by an LLM or the statistical writer, served on Triton.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

output = Console(markup=False, emoji=False, highlight=False)

StoreOption = Annotated[
    str | None, typer.Option("--store", help="Memory store, e.g. sqlite:///runs/memory.db. (env var: LIBER_STORE)")
]
TritonOption = Annotated[
    str | None, typer.Option("--triton", help="host:port of Triton's gRPC endpoint. (env var: LIBER_TRITON)")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="LIBER_DATA",
        help="MovieLens-100K's directory, a directory with behaviors.* and items.*, or a behaviors file. "
        "Without it: the generated sample.",
    ),
]


def main() -> None:
    """Runs the command; an error of LIBER's own is one line on standard error and exit status 1."""
    # As Ctrl-C does, SIGTERM unwinds the stack, so that servers are stopped and files closed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        application()
    except LiberError as error:
        _fail(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}; check that the path is right and can be written")


def _fail(reason: str) -> NoReturn:
    line = " ".join(reason.split("\n"))
    console.print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True)
    sys.exit(1)


@application.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@application.command()
def demo(
    data: DataOption = None,
    output_directory: Annotated[
        Path, typer.Option("--output", help="Where the run is kept; a rerun goes on from there.")
    ] = Path("runs/demo"),
    encoder: Annotated[
        str | None, typer.Option(help="BERT checkpoint: a directory or a hub name. Default: the embedded MiniLM.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.")] = 1,
) -> None:
    """Run all of LIBER on real behaviors: store, texts, encoding, training, serving on Triton, report.

    Writes report.json and report.html into --output. Needs a checkout and the extras build and serve.
    """
    with _needs_builders():
        from builders.build import BuildSettings
        from builders.demo import run_demo
    settings = BuildSettings(seed=seed) if encoder is None else BuildSettings(seed=seed, encoder=encoder)
    report = run_demo(data, output_directory, settings)
    output.print(_report_table(report))
    output.print(f"report: {output_directory / 'report.html'}", soft_wrap=True)


@application.command()
def data(
    name: Annotated[str, typer.Argument(help="ml-100k is the one there is.")],
    to: Annotated[Path, typer.Option(help="Directory to put it in.")] = Path("data"),
) -> None:
    """Download a public data set, its checksum verified."""
    if name != "ml-100k":
        raise InvalidInputError(f"no data set is called {name!r}; there is ml-100k")
    with _needs_builders():
        from builders.datasets.download import download_movielens
    output.print(f"{download_movielens(to)}", soft_wrap=True)


@application.command()
def ingest(
    behaviors: Annotated[
        str | None,
        typer.Argument(
            help="CSV, JSON lines or Parquet with user,item,timestamp,feedback[,event_id]; - reads standard input."
        ),
    ] = None,
    items: Annotated[
        Path | None, typer.Option(help="Item table: item,title and any attributes. Needs --domain.")
    ] = None,
    users: Annotated[Path | None, typer.Option(help="Profiles: user and any attributes.")] = None,
    domain: Annotated[Path | None, typer.Option(help="JSON description of the data set, see the README.")] = None,
    condition: Annotated[
        str | None,
        typer.Option(help="When the cache is cut, fixed at the first call: e.g. 'any_of(count(20), time_gap(86400))'."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Append behaviors to the store. Reading the same file again changes nothing."""
    from liber_runtime.behavior_log import read_behaviors, read_items, read_profiles
    from liber_runtime.domain import read_domain

    if behaviors is None and items is None and users is None:
        raise InvalidInputError("there is nothing to ingest; name a behaviors file, --users, or --items with --domain")
    if (items is None) != (domain is None):
        raise InvalidInputError("--items and --domain go together: prompts need both; give the two or neither")
    # All that is short is read before the store is touched, the log as far as its first behavior.
    catalogue = (read_domain(domain), read_items(items)) if items is not None and domain is not None else None
    profiles = read_profiles(users) if users is not None else {}
    log = read_behaviors(behaviors) if behaviors is not None else iter(())
    first = list(itertools.islice(log, 1))
    with _open(store, condition, create=True) as memory:
        if catalogue is not None:
            memory.put_items(*catalogue)
            output.print(f"{len(catalogue[1])} items of {catalogue[0].name!r} are in the catalogue")
        if profiles:
            memory.put_profiles(profiles)
            output.print(f"{len(profiles)} profiles are kept")
        if first:
            _append_all(memory, itertools.chain(first, log))


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

    with _open(store) as memory, _told(bar=drain) as tell:
        report = asyncio.run(work(memory, tell))
    output.print_json(json.dumps(dataclasses.asdict(report)))
    if report.dead:
        raise LiberError(f"{report.dead} steps were given up after repeated failures, the reason is above")


@application.command()
def serve(
    repository: Annotated[Path, typer.Option(help="Model repository that `liber build --repository` published into.")],
    store: StoreOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="0 lets the system choose.")] = 8001,
    http_port: Annotated[int, typer.Option(help="0 lets the system choose.")] = 8000,
    metrics_port: Annotated[int, typer.Option(help="0 lets the system choose.")] = 8002,
    log_file: Annotated[Path, typer.Option(help="Triton's own log.")] = Path("runs/triton.log"),
) -> None:
    """Start tritonserver, watch and heal it, until SIGTERM or Ctrl-C."""
    from liber_runtime.server import TritonServer, run_until_signalled

    # Triton's models run elsewhere than here, and a store that is not there is better told of before they load.
    url = absolute_url(store or load_settings().store)
    open_store(url, create=False).close()
    server = TritonServer(
        repository,
        log_file=log_file,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        environment={"LIBER_STORE": url},
    )

    def announce(ready: TritonServer) -> None:
        output.print(
            f"ready: gRPC {ready.grpc_url}, HTTP {ready.http_url}, metrics {ready.metrics_url}", soft_wrap=True
        )

    run_until_signalled(server, announce)


@application.command()
def score(
    user: Annotated[str, typer.Argument(help="User id.")],
    items: Annotated[list[str], typer.Argument(help="Item ids, the candidates.")],
    triton: TritonOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score candidates for a user, best first."""
    from liber_runtime.scoring import ScoringClient

    with ScoringClient(triton) as client:
        scores = client.score(user, items)
    order = np.argsort(-scores.probability, kind="stable")
    if as_json:
        ranked = [{"item": items[place], "click_probability": float(scores.probability[place])} for place in order]
        typer.echo(
            json.dumps(
                {
                    "user": user,
                    "ranking": ranked,
                    "unknown_users": scores.unknown_users,
                    "unknown_items": scores.unknown_items,
                }
            )
        )
        return
    table = Table(
        "item", "click probability", title=f"user {user}" + (" (nothing known)" if scores.unknown_users else "")
    )
    for place in order:
        unknown = " (not in the catalogue)" if items[place] in scores.unknown_items else ""
        table.add_row(f"{items[place]}{unknown}", f"{scores.probability[place]:.4f}")
    output.print(table)


@application.command()
def inspect(
    user: Annotated[str | None, typer.Argument(help="User id; without one, counts over the whole store.")] = None,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what the store holds: partitions, texts with their origin, the cache."""
    with _open(store) as memory:
        if user is None:
            typer.echo(json.dumps(dataclasses.asdict(memory.statistics()), indent=2))
            return
        timeline = memory.timeline(user)
    if timeline is None:
        raise InvalidInputError(f"the store holds nothing of user {user!r}; `liber inspect` alone counts what it holds")
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(timeline), indent=2, default=_plain))
    else:
        _print_timeline(timeline)


@application.command()
def forget(
    user: Annotated[str, typer.Argument(help="User id.")],
    store: StoreOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase everything held of a user: behaviors, partitions, texts, vectors, pending work."""
    with _open(store) as memory:
        if memory.timeline(user) is None:
            output.print(f"nothing was held of user {user!r}", soft_wrap=True)
            return
        if not yes:
            typer.confirm(f"Erase everything held of user {user!r}?", abort=True)
        forgotten = memory.forget(user)
    output.print(
        f"erased {forgotten.behaviors} behaviors and {forgotten.partitions} partitions of user {user!r}", soft_wrap=True
    )


@application.command()
def build(
    data: DataOption = None,
    store: StoreOption = None,
    output_directory: Annotated[Path, typer.Option("--output", help="Receives the bundle.")] = Path("runs/build"),
    repository: Annotated[
        Path | None, typer.Option(help="Publish the bundle into this model repository as its next version.")
    ] = None,
    triton: Annotated[
        str | None,
        typer.Option(help="host:port of a running Triton on that repository: it switches to the new version."),
    ] = None,
    condition: Annotated[
        str | None, typer.Option(help="When the cache is cut, for a new store. Default count(20).")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="BERT checkpoint: a directory or a hub name. Default: the embedded MiniLM.")
    ] = None,
    dimension: Annotated[int, typer.Option(help="d: size of representations and interest.", min=1)] = 32,
    history: Annotated[int, typer.Option(help="T: newest behaviors the backbone reads.", min=1)] = 20,
    refit_pca: Annotated[
        bool,
        typer.Option(
            "--refit-pca", help="Fit the PCA anew, not keep that of the last build in --output: every vector is remade."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.")] = 1,
) -> None:
    """Make a bundle: fill the store, write texts, fit encoder, PCA, fuser and backbone, export, publish.

    Needs a checkout and the extras build and serve.
    """
    if triton is not None and repository is None:
        raise InvalidInputError("--triton needs --repository, the model repository that this Triton serves")
    with _needs_builders():
        from builders.datasets import load

        dataset = load(data)
        # Later, for it takes seconds: a mistyped path is told at once.
        from builders.build import BuildSettings
        from builders.build import build as build_bundle
        from builders.repository import deploy, publish
    from liber_runtime.writers.statistical import StatisticalWriter

    settings = BuildSettings(dimension=dimension, history_length=history, seed=seed, refit_pca=refit_pca)
    if encoder is not None:
        settings = dataclasses.replace(settings, encoder=encoder)
    with _open(store, condition, create=True) as memory:
        manifest, result = build_bundle(memory, dataset, StatisticalWriter(), output_directory, settings)
        output.print(
            f"bundle {manifest.bundle_id} in {output_directory / 'bundle'}: validation AUC {result.auc:.4f}, "
            f"log loss {result.logloss:.4f}",
            soft_wrap=True,
        )
        if repository is None:
            return
        if triton is None:
            version = publish(output_directory / "bundle", repository)
            output.print(f"published as version {version} of {repository}", soft_wrap=True)
            return
        version = deploy(output_directory / "bundle", repository, triton)
        output.print(f"published as version {version} of {repository}; Triton at {triton} serves it", soft_wrap=True)
        # While this build trained, workers encoded with the bundle that served; its vectors would be refused now.
        late = memory.reencode(manifest.fingerprint)
        if late:
            output.print(f"{late} vectors that the bundle before made meanwhile wait for a worker to encode them again")


@contextmanager
def _needs_builders() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"this command needs {error.name}, which is not installed; run it in a checkout of LIBER after: "
            "pip install -e '.[build,serve]'"
        ) from None


@contextmanager
def _open(url: str | None, condition: str | None = None, create: bool = False) -> Iterator[MemoryStore]:
    wanted = parse_condition(condition) if condition else None
    memory = open_store(url or load_settings().store, wanted, create=create)
    try:
        yield memory
    finally:
        memory.close()


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


def _append_all(memory: MemoryStore, behaviors: Iterator[Behavior]) -> None:
    kept = duplicates = partitions = 0
    try:
        with progress("append behaviors", None) as advance:
            while batch := list(itertools.islice(behaviors, APPEND_BATCH)):
                appended = memory.append(batch)
                kept += appended.behaviors
                duplicates += appended.duplicates
                partitions += appended.partitions
                advance(len(batch))
    finally:
        # Also when a later line is broken: what came before it is kept.
        if kept or duplicates:
            output.print(f"kept {kept} behaviors, {duplicates} were there already; cut {partitions} partitions")


def _print_timeline(timeline: Timeline) -> None:
    profile = ", ".join(f"{name} {value}" for name, value in timeline.profile.items()) or "no profile"
    output.print(f"user {timeline.user_id}: {profile}", soft_wrap=True)
    for record in timeline.partitions:
        first, last = (_day(record.behaviors[end].timestamp) for end in (0, -1))
        output.print(f"\npartition {record.number}: {len(record.behaviors)} behaviors, {first} to {last}", style="bold")
        for text in (record.summary, record.shift):
            if text is not None:
                output.print(f"{text.kind} ({text.writer}, {text.prompt_version}):", style="cyan")
                output.print(text.text, soft_wrap=True)
        made = record.representation
        output.print(
            f"vector: {f'{len(made.vector)} numbers by {made.fingerprint}' if made else 'pending'}", style="dim"
        )
    output.print(f"\ncache: {len(timeline.cache)} behaviors", style="bold")


def _day(timestamp: float) -> str:
    return datetime.datetime.fromtimestamp(timestamp, datetime.timezone.utc).strftime("%Y-%m-%d")


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def _report_table(report: dict[str, Any]) -> Table:
    table = Table("figure", "here", title=f"LIBER on {report['data']['name']}, writer: {report['writer']}")
    quality, serving = report["quality"], report["serving"]
    for name in ("base", "liber"):
        table.add_row(f"{report['backbone']} {name}: AUC", f"{quality[name]['auc']:.4f}")
        table.add_row(f"{report['backbone']} {name}: log loss", f"{quality[name]['logloss']:.4f}")
    table.add_row("writer calls per user", f"{report['memory']['calls_per_user']:.4f}")
    table.add_row(f"served AUC over {serving['samples']} samples", f"{serving['auc']:.4f}")
    table.add_row("largest difference to offline", f"{serving['max_abs_diff_vs_offline']:.1e}")
    for shape, figures in serving["seconds_per_1000"].items():
        table.add_row(f"seconds per 1000, {shape}: p50 / p99", f"{figures['p50']:.4f} / {figures['p99']:.4f}")
    return table


if __name__ == "__main__":
    main()
