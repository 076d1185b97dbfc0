"""What every process of a deployment counts, for Prometheus; docs/metrics.md is the same catalogue for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from liber_runtime.behavior import Text
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import STEPS, Appended, Statistics, Step

Outcome: TypeAlias = Literal["answered", "unusable", "failed", "away"]
"""Of a writer's call: a text; no knowledge, though paid for; an error or no answer in time; nobody was called."""

OUTCOMES: tuple[Outcome, ...] = ("answered", "unusable", "failed", "away")

_WRITER_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_ENCODE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of the catalogue.

    Attributes:
        name: as Prometheus shows it.
        type: of Prometheus.
        labels: their names. None has more values than steps, outcomes, currencies or models.
        process: whose port shows it: ``worker`` and ``ingest`` by --metrics-port, ``Triton`` by `liber serve`'s
            --metrics-port, ``serve`` by its --supervisor-metrics-port.
        meaning: in a sentence.
    """

    name: str
    type: Literal["counter", "gauge", "histogram", "summary"]
    labels: tuple[str, ...]
    process: Literal["worker", "ingest", "Triton", "serve"]
    meaning: str


CATALOGUE: tuple[Metric, ...] = (
    Metric("liber_users", "gauge", (), "worker", "Users with at least one behavior."),
    Metric("liber_behaviors", "gauge", (), "worker", "Behaviors that the store holds."),
    Metric("liber_items", "gauge", (), "worker", "Items in the catalogue."),
    Metric("liber_partitions", "gauge", (), "worker", "Partitions that the store holds."),
    Metric("liber_queue_steps", "gauge", ("step",), "worker", "Steps waiting or claimed."),
    Metric(
        "liber_queue_age_seconds",
        "gauge",
        ("step",),
        "worker",
        "Age of the oldest step waiting or claimed, from when all that it reads was there; 0 if there is none.",
    ),
    Metric("liber_dead_steps", "gauge", ("step",), "worker", "Steps in the dead-letter list."),
    Metric("liber_steps_total", "counter", ("step",), "worker", "Steps made and kept."),
    Metric("liber_step_failures_total", "counter", ("step",), "worker", "Steps that failed."),
    Metric("liber_steps_given_up_total", "counter", ("step",), "worker", "Steps given up."),
    Metric("liber_results_discarded_total", "counter", (), "worker", "Results whose claim was lost."),
    Metric("liber_claims_held", "gauge", ("kind",), "worker", "Claims held now, to write or to encode."),
    Metric("liber_claims_renewed_total", "counter", (), "worker", "Claims held longer because their call still ran."),
    Metric("liber_claims_lost_total", "counter", (), "worker", "Claims found lost while their call ran."),
    Metric(
        "liber_store_failures_total", "counter", (), "worker", "Calls of the store that failed and were tried again."
    ),
    Metric(
        "liber_writer_calls_total",
        "counter",
        ("outcome",),
        "worker",
        "Calls of the writer: answered; unusable, which is paid for and no knowledge; failed, with an error or without "
        "an answer in time; away, when nobody was called.",
    ),
    Metric("liber_calls_repeated_total", "counter", (), "worker", "Writer calls that an earlier claim may have made."),
    Metric("liber_writer_seconds", "histogram", ("kind",), "worker", "Time of a writer's call that was answered."),
    Metric(
        "liber_writer_tokens_total",
        "counter",
        ("direction",),
        "worker",
        "Tokens of prompts and of responses, those of unusable answers included.",
    ),
    Metric(
        "liber_writer_cost_total",
        "counter",
        ("currency",),
        "worker",
        "Price of the writer's tokens, those of unusable answers included.",
    ),
    Metric("liber_encode_seconds", "histogram", (), "worker", "Time of an encoder's call that was answered."),
    Metric("liber_ingested_behaviors_total", "counter", (), "ingest", "Behaviors appended."),
    Metric("liber_ingest_duplicates_total", "counter", (), "ingest", "Behaviors that were there already."),
    Metric("liber_scored_users_total", "counter", (), "Triton", "Users of scoring requests, each once in a request."),
    Metric("liber_unknown_users_total", "counter", (), "Triton", "Users scored of whom nothing is held."),
    Metric("liber_scored_candidates_total", "counter", (), "Triton", "Candidates scored."),
    Metric(
        "liber_unknown_candidates_total", "counter", (), "Triton", "Candidates scored that the bundle does not know."
    ),
    Metric(
        "liber_histories_truncated_total",
        "counter",
        (),
        "Triton",
        "Users read of whom more is held than is looked back.",
    ),
    Metric(
        "nv_inference_request_summary_us",
        "summary",
        ("model", "version", "quantile"),
        "Triton",
        "Summary of inference request duration in microseconds (includes cached requests)",
    ),
    Metric("liber_server_up", "gauge", (), "serve", "1 while tritonserver's process runs, else 0."),
    Metric("liber_server_restarts_total", "counter", (), "serve", "Times tritonserver died and was started again."),
    Metric("liber_stub_restarts_total", "counter", (), "serve", "Processes of models that died and were replaced."),
)

_BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in CATALOGUE}


def _counter(registry: CollectorRegistry, name: str) -> Counter:
    return Counter(name, _BY_NAME[name].meaning, _BY_NAME[name].labels, registry=registry)


def _gauge(registry: CollectorRegistry, name: str) -> Gauge:
    return Gauge(name, _BY_NAME[name].meaning, _BY_NAME[name].labels, registry=registry)


def _histogram(registry: CollectorRegistry, name: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, _BY_NAME[name].meaning, _BY_NAME[name].labels, registry=registry, buckets=buckets)


def serve_registry(registry: CollectorRegistry, port: int, address: str = "127.0.0.1") -> int:
    """Shows a registry over HTTP from a background thread, until the process ends.

    Args:
        registry: what is shown.
        port: 0 lets the system choose one.
        address: to listen on; ``0.0.0.0`` to be reached from other machines.

    Returns:
        The port.

    Raises:
        ConfigurationError: the address and port cannot be listened on.
    """
    try:
        server, _ = start_http_server(port, addr=address, registry=registry)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"metrics on {address}, port {port}: {error}; choose an address of this machine and a port that is free"
        ) from error
    return int(server.server_port)


class Metrics:
    """What one worker counts, in a registry of its own. Counters with known labels are there from the start.

    Attributes:
        registry: what `serve` shows; other collectors may be registered with it.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # Looked up once: a label costs as much as all else that is counted for a text.
        self._steps = _by_step(_counter(registry, "liber_steps_total"))
        self._failures = _by_step(_counter(registry, "liber_step_failures_total"))
        self._given_up = _by_step(_counter(registry, "liber_steps_given_up_total"))
        self._discarded = _counter(registry, "liber_results_discarded_total")
        self._repeated = _counter(registry, "liber_calls_repeated_total")
        self._renewed = _counter(registry, "liber_claims_renewed_total")
        self._lost = _counter(registry, "liber_claims_lost_total")
        self._store_failures = _counter(registry, "liber_store_failures_total")
        self._held = _gauge(registry, "liber_claims_held")
        self._users = _gauge(registry, "liber_users")
        self._behaviors = _gauge(registry, "liber_behaviors")
        self._items = _gauge(registry, "liber_items")
        self._partitions = _gauge(registry, "liber_partitions")
        self._queue = _gauge(registry, "liber_queue_steps")
        self._ages = _gauge(registry, "liber_queue_age_seconds")
        self._dead = _gauge(registry, "liber_dead_steps")
        calls = _counter(registry, "liber_writer_calls_total")
        self._calls = {outcome: calls.labels(outcome) for outcome in OUTCOMES}
        seconds = _histogram(registry, "liber_writer_seconds", _WRITER_BUCKETS)
        self._seconds = {kind: seconds.labels(kind) for kind in ("summary", "shift")}
        tokens = _counter(registry, "liber_writer_tokens_total")
        self._prompt_tokens, self._response_tokens = tokens.labels("prompt"), tokens.labels("response")
        self._cost = _counter(registry, "liber_writer_cost_total")
        self._encode_seconds = _histogram(registry, "liber_encode_seconds", _ENCODE_BUCKETS)

    def called(self, outcome: Outcome) -> None:
        """Counts one call of a writer by what came of it."""
        self._calls[outcome].inc()

    def written(self, text: Text) -> None:
        """Counts the time of one text of a writer."""
        self._seconds[text.kind].observe(text.seconds)

    def paid(self, prompt_tokens: int | None, response_tokens: int | None) -> None:
        """Counts the tokens of one call that was answered, well or not."""
        self._prompt_tokens.inc(prompt_tokens or 0)
        self._response_tokens.inc(response_tokens or 0)

    def spent(self, currency: str, amount: float) -> None:
        """Counts what such a call's tokens cost."""
        self._cost.labels(currency).inc(amount)

    def encoded(self, seconds: float) -> None:
        """Counts the time of one call of an encoder that was answered."""
        self._encode_seconds.observe(seconds)

    def kept(self, step: Step, count: int) -> None:
        """Counts results that the store kept."""
        self._steps[step].inc(count)

    def discarded(self, count: int) -> None:
        """Counts results that the store refused because their claim was lost."""
        self._discarded.inc(count)

    def failed(self, step: Step, dead: bool) -> None:
        """Counts a failed step, and whether it was given up."""
        self._failures[step].inc()
        if dead:
            self._given_up[step].inc()

    def repeated(self) -> None:
        """Counts a writer call that may have been made, and paid for, before."""
        self._repeated.inc()

    def renewed(self, count: int) -> None:
        """Counts claims whose lease was renewed."""
        self._renewed.inc(count)

    def lost(self, count: int) -> None:
        """Counts claims that were found lost while their call ran."""
        self._lost.inc(count)

    def store_failed(self) -> None:
        """Counts a call of the store that failed and is tried again."""
        self._store_failures.inc()

    def held(self, kind: str, count: int) -> None:
        """Sets how many claims a worker holds.

        Args:
            kind: ``write`` or ``encode``.
            count: claims.
        """
        self._held.labels(kind).set(count)

    def observed(self, statistics: Statistics) -> None:
        """Sets what the store holds and what waits in it."""
        self._users.set(statistics.users)
        self._behaviors.set(statistics.behaviors)
        self._items.set(statistics.items)
        self._partitions.set(statistics.partitions)
        for step in STEPS:
            self._queue.labels(step).set(statistics.pending[step])
            self._ages.labels(step).set(statistics.age_seconds[step])
            self._dead.labels(step).set(statistics.dead[step])

    def serve(self, port: int, address: str = "127.0.0.1") -> int:
        """Shows the registry; see `serve_registry`."""
        return serve_registry(self.registry, port, address)


def _by_step(counter: Counter) -> dict[Step, Counter]:
    return {step: counter.labels(step) for step in STEPS}


class IngestMetrics:
    """What a process counts that follows a topic.

    Attributes:
        registry: what `serve_registry` shows.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._behaviors = _counter(self.registry, "liber_ingested_behaviors_total")
        self._duplicates = _counter(self.registry, "liber_ingest_duplicates_total")
        self._total = Appended(0, 0, 0)

    def appended(self, total: Appended) -> None:
        """Takes what was appended since the start."""
        self._behaviors.inc(total.behaviors - self._total.behaviors)
        self._duplicates.inc(total.duplicates - self._total.duplicates)
        self._total = total


class Supervised(Protocol):
    """What `liber_runtime.server.TritonServer` tells of itself."""

    @property
    def is_alive(self) -> bool:
        """Whether the server's process runs."""
        ...

    @property
    def stub_restarts(self) -> int:
        """Processes of models that were replaced."""
        ...

    @property
    def server_restarts(self) -> int:
        """Times the server was started again."""
        ...


def registry_of(server: Supervised) -> CollectorRegistry:
    """A registry of what a supervised server tells of itself, read whenever Prometheus asks."""
    registry = CollectorRegistry()
    registry.register(_ServerCollector(server))
    return registry


class _ServerCollector(Collector):
    def __init__(self, server: Supervised) -> None:
        self._server = server

    def collect(self) -> Iterator[Family]:
        up, restarts, stubs = "liber_server_up", "liber_server_restarts_total", "liber_stub_restarts_total"
        yield GaugeMetricFamily(up, _BY_NAME[up].meaning, value=self._server.is_alive)
        yield CounterMetricFamily(restarts, _BY_NAME[restarts].meaning, value=self._server.server_restarts)
        yield CounterMetricFamily(stubs, _BY_NAME[stubs].meaning, value=self._server.stub_restarts)
