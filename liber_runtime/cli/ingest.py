"""``liber ingest``: logs, and a Kafka topic, into the store."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liber_runtime.cli.application import (
    MetricsHostOption,
    MetricsPortOption,
    StoreOption,
    application,
    opened,
    output,
)
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.ingest import NOTHING
from liber_runtime.memory import Appended, MemoryStore, absolute_url
from liber_runtime.progress import console, reading_progress
from liber_runtime.settings import load_settings

if TYPE_CHECKING:
    from liber_runtime.behavior_log import BehaviorLog
    from liber_runtime.ingest.kafka import KafkaSource


@application.command()
def ingest(
    behaviors: Annotated[
        list[str] | None,
        typer.Argument(
            help="CSV, JSON lines or Parquet with user,item,timestamp,feedback[,event_id], oldest first; - reads "
            "standard input."
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
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Read whole files, whatever the store has of them.")
    ] = False,
    bulk: Annotated[
        bool, typer.Option("--bulk", help="Gather each user's behaviors on disk first: for months of logs at once.")
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(help="Directory for --bulk, as large as the logs, removed at the end. Default: beside the store."),
    ] = None,
    kafka: Annotated[
        str | None, typer.Option(help="Follow a topic of these brokers, host:port[,host:port], until SIGTERM.")
    ] = None,
    topic: Annotated[str | None, typer.Option(help="The topic of --kafka; a message is a JSON object.")] = None,
    group: Annotated[str, typer.Option(help="The consumer group of --kafka.")] = "liber",
    kafka_config: Annotated[
        Path | None, typer.Option(help="Properties file with further settings of librdkafka (TLS, passwords).")
    ] = None,
    skip_broken: Annotated[
        Path | None, typer.Option(help="Append messages that are no behaviors to this file, and go on.")
    ] = None,
    metrics_port: MetricsPortOption = 0,
    metrics_host: MetricsHostOption = "127.0.0.1",
    store: StoreOption = None,
) -> None:
    """Append behaviors to the store. Reading the same file again changes nothing, and goes on where it ended."""
    from liber_runtime.behavior_log import BehaviorLog, read_items, read_profiles
    from liber_runtime.domain import read_domain

    if not behaviors and items is None and users is None and kafka is None:
        raise InvalidInputError(
            "there is nothing to ingest; name a behaviors file, --users, --items with --domain, or --kafka"
        )
    if (items is None) != (domain is None):
        raise InvalidInputError("--items and --domain go together: prompts need both; give the two or neither")
    if work is not None and not bulk:
        raise InvalidInputError("--work is for --bulk; add --bulk, or leave --work out")
    if bulk and (from_start or not behaviors):
        raise InvalidInputError("--bulk takes behaviors files and no --from-start; name files, or leave one out")
    if metrics_port and kafka is None:
        raise InvalidInputError("--metrics-port is for --kafka: reading files ends by itself; leave it out")
    source = _kafka_source(kafka, topic, group, kafka_config, skip_broken, bool(behaviors))
    # All that is short is read before the store is touched, the logs as far as their first behavior.
    catalogue = (read_domain(domain), read_items(items)) if items is not None and domain is not None else None
    profiles = read_profiles(users) if users is not None else {}
    logs = [BehaviorLog(path) for path in behaviors or ()]
    for log in logs:
        log.check()
    with opened(store, condition, create=True) as memory:
        if catalogue is not None:
            memory.describe(*catalogue)
            output.print(f"{len(catalogue[1])} items of {catalogue[0].name!r} are in the catalogue")
        if profiles:
            memory.describe(profiles=profiles)
            output.print(f"{len(profiles)} profiles are kept")
        if source is not None:
            _follow(memory, source, metrics_port, metrics_host)
        elif bulk:
            _backfill(memory, store or load_settings().store, behaviors or [], work)
        else:
            for log in logs:
                _append_log(memory, log, from_start)


def _append_log(memory: MemoryStore, log: BehaviorLog, from_start: bool) -> None:
    """Appends what the store does not have of one log."""
    from liber_runtime.behavior_log import STANDARD_INPUT, is_parquet
    from liber_runtime.ingest import append_batches
    from liber_runtime.ingest.log import LogFile

    source = LogFile(log.path, memory, from_start=from_start)
    if source.start.offset:
        console.print(f"{log.path}: lines up to {source.start.line} are kept already, going on there", soft_wrap=True)
    size = "rows" if is_parquet(log.path) else "bytes"
    with _counted() as count, reading_progress("append behaviors", source.size, size=size) as show:

        def tell(total: Appended, offset: int) -> None:
            count(total)
            show(total.behaviors + total.duplicates, offset)

        show(0, source.start.offset)
        append_batches(memory, source.batches(log if str(log.path) == STANDARD_INPUT else None), tell)


def _backfill(memory: MemoryStore, url: str, paths: list[str], work: Path | None) -> None:
    """Appends logs user by user."""
    from liber_runtime.ingest.bulk import Backfill

    url = absolute_url(url)
    if work is None:
        work = Path(f"{url.removeprefix('sqlite:///')}-bulk") if url.startswith("sqlite:///") else Path("liber-bulk")
    with _counted() as count, ExitStack() as bar:
        bars: dict[str, Callable[[int, int], None]] = {}

        def show(stage: str, behaviors: int, done: int, size: int) -> None:
            if stage not in bars:
                bar.close()
                bars[stage] = bar.enter_context(reading_progress(stage, size))
            bars[stage](behaviors, done)

        def appended(total: Appended, done: int, behaviors: int) -> None:
            count(total)
            show("append behaviors", done, done, behaviors)

        backfill = Backfill(memory, url, paths, work)
        backfill.run(lambda behaviors, done, size: show("gather by user", behaviors, done, size), appended)


def _follow(memory: MemoryStore, source: KafkaSource, metrics_port: int, metrics_host: str) -> None:
    """Appends what a topic brings until SIGTERM or Ctrl-C."""
    from liber_runtime.ingest.kafka import KafkaIngest
    from liber_runtime.metrics import IngestMetrics, serve_registry

    metrics = IngestMetrics()
    if metrics_port:
        serve_registry(metrics.registry, metrics_port, metrics_host)
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    with _counted() as count, reading_progress("append behaviors", None) as show:

        def tell(total: Appended) -> None:
            count(total)
            metrics.appended(total)
            show(total.behaviors + total.duplicates, 0)

        consumer = KafkaIngest(source, memory, tell, lambda line: console.print(line, soft_wrap=True))
        consumer.run(lambda: bool(stopped))


@contextmanager
def _counted() -> Iterator[Callable[[Appended], None]]:
    """Says what was appended, also when a later line is broken: what came before it is kept."""
    newest = [NOTHING]
    try:
        yield lambda total: newest.append(total)
    finally:
        kept = newest[-1]
        output.print(
            f"kept {kept.behaviors} behaviors, {kept.duplicates} were there already; cut {kept.partitions} partitions"
        )


def _kafka_source(
    brokers: str | None, topic: str | None, group: str, config: Path | None, skip_broken: Path | None, files: bool
) -> KafkaSource | None:
    if brokers is None:
        if topic is not None or config is not None or skip_broken is not None:
            raise InvalidInputError("--topic, --kafka-config and --skip-broken are for --kafka; name the brokers")
        return None
    if topic is None:
        raise InvalidInputError("--kafka needs --topic; name the topic to follow")
    if files:
        raise InvalidInputError("--kafka follows a topic and reads no files; ingest the files first")
    from liber_runtime.ingest.kafka import KafkaSource, read_settings

    settings = read_settings(config) if config is not None else {}
    return KafkaSource(brokers, topic, group, settings, skip_broken=skip_broken)
