"""What the write side counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from liber_runtime.behavior import Text
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import Statistics, Step

_WRITER_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters of one worker, in a registry of their own.

    Attributes:
        registry: what `serve` shows; other collectors may be registered with it.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._steps = Counter("liber_steps", "Steps made and kept.", ["step"], registry=self.registry)
        self._failures = Counter("liber_step_failures", "Steps that failed.", ["step"], registry=self.registry)
        self._dead = Counter("liber_steps_given_up", "Steps given up.", ["step"], registry=self.registry)
        self._discarded = Counter("liber_results_discarded", "Results whose claim was lost.", registry=self.registry)
        self._repeated = Counter(
            "liber_calls_repeated", "Writer calls that an earlier claim may have made.", registry=self.registry
        )
        self._renewed = Counter(
            "liber_claims_renewed", "Claims held longer because their call still ran.", registry=self.registry
        )
        self._lost = Counter("liber_claims_lost", "Claims found lost while their call ran.", registry=self.registry)
        self._store_failures = Counter(
            "liber_store_failures", "Calls of the store that failed and were tried again.", registry=self.registry
        )
        self._held = Gauge("liber_claims_held", "Claims held now.", ["kind"], registry=self.registry)
        self._queue = Gauge("liber_queue_steps", "Steps waiting or claimed.", ["step"], registry=self.registry)
        self._dead_letters = Gauge(
            "liber_dead_steps", "Steps in the dead-letter list.", ["step"], registry=self.registry
        )
        self._writer_seconds = Histogram(
            "liber_writer_seconds",
            "Time of a writer's call.",
            ["kind"],
            buckets=_WRITER_BUCKETS,
            registry=self.registry,
        )
        tokens = Counter("liber_writer_tokens", "Tokens of writers.", ["direction"], registry=self.registry)
        # Looked up once: a label costs as much as all else that is counted for a text.
        self._seconds_of = {kind: self._writer_seconds.labels(kind) for kind in ("summary", "shift")}
        self._prompt_tokens, self._response_tokens = tokens.labels("prompt"), tokens.labels("response")

    def written(self, text: Text) -> None:
        """Counts one answer of a writer."""
        self._seconds_of[text.kind].observe(text.seconds)
        self._prompt_tokens.inc(text.prompt_tokens or 0)
        self._response_tokens.inc(text.response_tokens or 0)

    def kept(self, step: Step, count: int) -> None:
        """Counts results that the store kept."""
        self._steps.labels(step).inc(count)

    def discarded(self, count: int) -> None:
        """Counts results that the store refused because their claim was lost."""
        self._discarded.inc(count)

    def failed(self, step: Step, dead: bool) -> None:
        """Counts a failed step, and whether it was given up."""
        self._failures.labels(step).inc()
        if dead:
            self._dead.labels(step).inc()

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

    def queue(self, statistics: Statistics) -> None:
        """Sets the sizes of the queue."""
        for step, count in statistics.pending.items():
            self._queue.labels(step).set(count)
        for step, count in statistics.dead.items():
            self._dead_letters.labels(step).set(count)

    def serve(self, port: int, address: str = "127.0.0.1") -> int:
        """Shows the registry over HTTP from a background thread, until the process ends.

        Args:
            port: 0 lets the system choose one.
            address: to listen on; ``0.0.0.0`` to be reached from other machines.

        Returns:
            The port.

        Raises:
            ConfigurationError: the port cannot be listened on.
        """
        try:
            server, _ = start_http_server(port, addr=address, registry=self.registry)
        except OSError as error:
            raise ConfigurationError(f"metrics port {port}: {error}; choose another, or 0 for any") from error
        return int(server.server_port)
