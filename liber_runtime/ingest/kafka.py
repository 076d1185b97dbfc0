"""Behaviors from a Kafka topic, each counted once.

A message is one behavior as a JSON object, with the keys of a JSON line. Offsets are committed only when the store has
acknowledged the messages before them, so a consumer that dies anywhere loses nothing; what is delivered again has the
event id it had (its own, or one made of topic, partition and offset) and changes nothing. The next messages are fetched
when the last ones are kept: a slow store slows the consumer down, it does not fill the memory.

Behaviors of one user keep their order if the topic is keyed by user, as each partition of a topic is read in order.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from liber_runtime.behavior import Behavior
from liber_runtime.behavior_log import MAX_LINE_BYTES, parse_record, to_behavior
from liber_runtime.exceptions import ConfigurationError, IngestError, InvalidInputError, StoreError
from liber_runtime.ingest import NOTHING, plus
from liber_runtime.memory import Appended, MemoryStore

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

_OURS: Mapping[str, str | bool] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": False,
}
"""What acknowledging after the store depends on."""

_FETCHED_AT_ONCE = 500
_MAX_BATCH_BYTES = 32 << 20
_CONNECT_SECONDS = 15.0


@dataclass(frozen=True)
class KafkaSource:
    """Which messages to consume, and how many at a time.

    Attributes:
        brokers: ``host:port[,host:port]``.
        topic: one topic.
        group: consumers of one group share the topic's partitions, and go on where any of them ended.
        settings: further settings of librdkafka, e.g. for TLS and passwords. A group without committed offsets begins
            at the earliest message, unless ``auto.offset.reset`` says otherwise.
        batch: most behaviors in one append.
        wait_seconds: a batch that is not full is appended after so long.
        skip_broken: messages that are no behaviors are appended to this file, one JSON object a line; without it the
            first of them stops the consumer.
        retry_seconds: wait after a first failure of the store; doubled from failure to failure, up to 30 s.
    """

    brokers: str
    topic: str
    group: str
    settings: Mapping[str, str] = field(default_factory=dict)
    batch: int = 10_000
    wait_seconds: float = 0.2
    skip_broken: Path | None = None
    retry_seconds: float = 0.5


class _Place(NamedTuple):
    topic: str
    partition: int


class KafkaIngest:
    """One consumer on its way into one store.

    Args:
        source: which messages.
        store: where to.
        tell: called after each batch with what was appended so far.
        warn: called with one line when the store failed and is tried again, or a broker complains.

    Raises:
        ConfigurationError: the ``kafka`` extra is missing, or a setting is unusable.
    """

    def __init__(
        self,
        source: KafkaSource,
        store: MemoryStore,
        tell: Callable[[Appended], None] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._source = source
        self._store = store
        self._tell = tell or (lambda total: None)
        self._warn = warn or (lambda line: None)
        self._consumer = self._connect()
        self._assigned: set[_Place] = set()
        self._pending: list[Message] = []
        self._total = NOTHING

    def run(self, stopped: Callable[[], bool]) -> Appended:
        """Consumes until `stopped` says so; what was fetched by then is appended and committed.

        Raises:
            InvalidInputError: a message that is no behavior; what came before it is kept and committed.
            IngestError: the topic is missing, or the brokers refuse.
            StoreError: the store failed for another reason than being away when it was to stop.
        """
        try:
            self._require_topic()
            self._consumer.subscribe(
                [self._source.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            while not stopped():
                self._fetch(stopped)
                self._append_until_kept(stopped)
        finally:
            with _explained(self._source):
                self._consumer.close()
        return self._total

    # -- fetching ------------------------------------------------------------------------------------------------

    def _fetch(self, stopped: Callable[[], bool]) -> None:
        """Fetches until a batch is full or its time is up."""
        deadline = time.monotonic() + self._source.wait_seconds
        size = 0
        while not stopped() and len(self._pending) < self._source.batch and size < _MAX_BATCH_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 and self._pending:
                return
            wanted = min(_FETCHED_AT_ONCE, self._source.batch - len(self._pending))
            with _explained(self._source):
                messages = self._consumer.consume(wanted, max(left, 0.01))
            self._take(messages)
            size += sum(len(message.value() or b"") for message in messages)
            if left <= 0:
                return

    def _take(self, messages: list[Message]) -> None:
        for message in messages:
            problem = message.error()
            if problem is not None:
                raise self._refusal(problem)
            # A partition that was given up meanwhile is another consumer's, from the offset committed last.
            if _place(message) in self._assigned:
                self._pending.append(message)

    # -- appending -----------------------------------------------------------------------------------------------

    def _append_until_kept(self, stopped: Callable[[], bool]) -> None:
        """Appends what is pending; while the store fails nothing is committed, and the group is not left."""
        wait = self._source.retry_seconds
        while True:
            try:
                return self._append()
            except StoreError as error:
                if stopped():
                    raise
                self._warn(f"{error}; nothing is committed, trying again in {wait:g} s")
            self._idle(wait, stopped)
            wait = min(2 * wait, 30.0)

    def _append(self) -> None:
        """Appends what is pending, then commits it."""
        behaviors: list[Behavior] = []
        broken: list[tuple[Message, InvalidInputError]] = []
        taken = 0
        for message in self._pending:
            try:
                behaviors.append(_behavior(message))
            except InvalidInputError as error:
                broken.append((message, error))
                if self._source.skip_broken is None:
                    break
            taken += 1
        if behaviors:
            self._total = plus(self._total, self._store.append(behaviors))
        if self._source.skip_broken is not None and broken:
            _set_aside(self._source.skip_broken, broken)
        done, self._pending = self._pending[:taken], self._pending[taken:]
        self._commit(done)
        if done:
            self._tell(self._total)
        if self._source.skip_broken is None and broken:
            self._pending = []
            raise InvalidInputError(
                f"{broken[0][1]}; all before it is kept: skip such messages with --skip-broken FILE, or move the group "
                f"{self._source.group!r} behind it"
            )

    def _commit(self, messages: list[Message]) -> None:
        from confluent_kafka import KafkaException, TopicPartition

        behind = {_place(message): (message.offset() or 0) + 1 for message in messages}
        offsets = [TopicPartition(*place, offset) for place, offset in behind.items() if place in self._assigned]
        if not offsets:
            return
        try:
            for each in self._consumer.commit(offsets=offsets, asynchronous=False) or ():
                if each.error is not None:
                    self._warn(f"an offset is not committed ({each.error.str()}); its messages may come again")
        except KafkaException as error:
            # The behaviors are kept. Whoever gets these messages again finds them known.
            self._warn(f"offsets are not committed ({error.args[0].str()}); their messages may come again")

    def _idle(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """Waits as a living member of the group, without fetching more."""
        until = time.monotonic() + seconds
        with _explained(self._source):
            self._consumer.pause(self._consumer.assignment())
            while (left := until - time.monotonic()) > 0 and not stopped():
                message = self._consumer.poll(min(left, 0.1))
                self._take([message] if message is not None else [])
            self._consumer.resume(self._consumer.assignment())

    # -- what the group and the brokers say ----------------------------------------------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._assigned |= {_Place(each.topic, each.partition) for each in partitions}

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Finishes what was fetched before partitions go to another consumer."""
        try:
            self._append()
        except StoreError as error:
            self._warn(f"{error}; {len(partitions)} partitions are given up uncommitted, their messages come again")
        finally:
            self._on_lost(consumer, partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Drops what was fetched from partitions that belong to another consumer by now."""
        self._assigned -= {_Place(each.topic, each.partition) for each in partitions}
        self._pending = [message for message in self._pending if _place(message) in self._assigned]

    def _connect(self) -> Consumer:
        try:
            from confluent_kafka import Consumer, KafkaException
        except ImportError:
            raise ConfigurationError("reading from Kafka needs confluent-kafka; install liber-runtime[kafka]") from None
        for name in _OURS.keys() | {"bootstrap.servers", "group.id"}:
            if name in self._source.settings:
                raise ConfigurationError(f"setting {name} is liber's own; remove it from the Kafka settings")
        try:
            return Consumer(
                {
                    "auto.offset.reset": "earliest",
                    **self._source.settings,
                    **_OURS,
                    "bootstrap.servers": self._source.brokers,
                    "group.id": self._source.group,
                    "error_cb": self._on_error,
                }
            )
        except (KafkaException, TypeError, ValueError) as error:
            reason = error.args[0].str() if isinstance(error, KafkaException) else str(error)
            raise ConfigurationError(f"Kafka's client refuses its settings ({reason}); correct them") from None

    def _on_error(self, error: KafkaError) -> None:
        self._warn(f"Kafka: {error.str()}")

    def _require_topic(self) -> None:
        with _explained(self._source):
            found = self._consumer.list_topics(self._source.topic, timeout=_CONNECT_SECONDS)
        problem = found.topics[self._source.topic].error
        if problem is not None:
            raise self._refusal(problem)

    def _refusal(self, problem: KafkaError) -> IngestError:
        return IngestError(
            f"Kafka topic {self._source.topic!r} of {self._source.brokers}: {problem.str()}; check --topic, and that "
            "it may be read by this group and user"
        )


def read_settings(path: Path) -> dict[str, str]:
    """Settings of librdkafka from a properties file: ``name=value`` a line, ``#`` begins a comment line.

    Raises:
        InvalidInputError: the file cannot be read, or a line is no setting; values are not shown, they hold passwords.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidInputError(f"{path} cannot be read ({reason}); check the path and its permissions") from None
    settings = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith(("#", "!")):
            continue
        name, separator, value = line.partition("=")
        if not separator or not name.strip():
            raise InvalidInputError(f"{path}, line {number}: no setting; write name=value, as in sasl.username=liber")
        settings[name.strip()] = value.strip()
    return settings


def _behavior(message: Message) -> Behavior:
    """The behavior of a message.

    Raises:
        InvalidInputError: it is none; the message's place is named.
    """
    value = message.value()
    place = f"{message.topic()}-{message.partition()}-{message.offset()}"
    try:
        if not value:
            raise InvalidInputError("it is empty; send a JSON object")
        if len(value) > MAX_LINE_BYTES:
            raise InvalidInputError(f"{len(value)} bytes are no behavior; send at most {MAX_LINE_BYTES}")
        try:
            record = parse_record(value.decode())
        except UnicodeDecodeError:
            raise InvalidInputError(f"{value[:40]!r} is not UTF-8; send JSON in UTF-8") from None
        if record.get("event_id") in (None, ""):
            record["event_id"] = place
        return to_behavior(record)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"topic {message.topic()}, partition {message.partition()}, offset {message.offset()}: {error}"
        ) from None


def _set_aside(path: Path, broken: list[tuple[Message, InvalidInputError]]) -> None:
    """Appends messages that are no behaviors to a file, durably: their offsets are committed next."""
    try:
        with path.open("a") as file:
            for message, problem in broken:
                file.write(json.dumps(_aside(message, problem)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise IngestError(
            f"{path}: {error.strerror}; broken messages cannot be set aside there: make room, or name another file "
            "with --skip-broken"
        ) from None


def _aside(message: Message, problem: InvalidInputError) -> dict[str, object]:
    value = message.value() or b""
    entry: dict[str, object] = {
        "topic": message.topic(),
        "partition": message.partition(),
        "offset": message.offset(),
        "problem": str(problem),
    }
    try:
        entry["value"] = value.decode()
    except UnicodeDecodeError:
        entry["value_base64"] = base64.b64encode(value).decode()
    return entry


def _place(message: Message) -> _Place:
    return _Place(message.topic() or "", message.partition() or 0)


@contextmanager
def _explained(source: KafkaSource) -> Iterator[None]:
    from confluent_kafka import KafkaException

    try:
        yield
    except KafkaException as error:
        raise IngestError(
            f"Kafka at {source.brokers}: {error.args[0].str()}; check --kafka, and the settings in --kafka-config"
        ) from None
