"""A Kafka topic into a store, on librdkafka's own mock cluster: real consumers, a real protocol, nothing on a disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import ConfigurationError, IngestError, InvalidInputError, StoreError
from liber_runtime.ingest.kafka import KafkaIngest, KafkaSource, read_settings
from liber_runtime.memory import Appended, Mark, MemoryStore, open_store
from liber_runtime.server.process import find_ports

PATIENCE_SECONDS = 60
FAST = {"heartbeat.interval.ms": "100", "session.timeout.ms": "6000", "fetch.wait.max.ms": "20"}


class Cluster:
    """One broker in this process."""

    def __init__(self) -> None:
        self._producer = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "none", "log_level": 2})
        (broker,) = self._producer.list_topics(timeout=PATIENCE_SECONDS).brokers.values()
        self.brokers = f"{broker.host}:{broker.port}"

    def send(self, topic: str, values: Sequence[bytes | dict[str, Any]]) -> None:
        """Users keep to one of the topic's partitions."""
        for value in values:
            data, key = (value, "x") if isinstance(value, bytes) else (json.dumps(value).encode(), value["user"])
            self._producer.produce(topic, data, key=key)
        assert self._producer.flush(PATIENCE_SECONDS) == 0


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'memory.db'}"


@pytest.fixture
def store(url: str) -> Iterator[MemoryStore]:
    memory = open_store(url)
    yield memory
    memory.close()


def messages(count: int, start: int = 0, users: int = 8) -> list[dict[str, Any]]:
    return [
        {"user": f"u{n % users}", "item": f"i{n}", "timestamp": 1_600_000_000 + n, "feedback": n % 5}
        for n in range(start, start + count)
    ]


def items(store: MemoryStore) -> dict[str, list[str]]:
    """Each user's items, in the order of the memory."""
    found = {}
    for user in store.users():
        timeline = store.timeline(user)
        assert timeline is not None
        behaviors = [behavior for each in timeline.partitions for behavior in each.behaviors] + list(timeline.cache)
        found[user] = [behavior.item_id for behavior in behaviors]
    return found


def expected(sent: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in sent:
        found.setdefault(each["user"], []).append(each["item"])
    return found


def source(cluster: Cluster, topic: str, **options: Any) -> KafkaSource:
    return KafkaSource(cluster.brokers, topic, "readers", FAST, **options)


def until(condition: Callable[[], bool]) -> Callable[[], bool]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    return lambda: condition() or time.monotonic() > deadline


SCRIPT = """
import os, signal, sys
from liber_runtime.cli import main
from liber_runtime.memory.sqlite import SQLiteStore
if sys.argv[1] == "die":
    append = SQLiteStore.append
    def append_and_die(self, behaviors, mark=None):
        append(self, behaviors, mark)
        os.kill(os.getpid(), signal.SIGKILL)
    SQLiteStore.append = append_and_die
del sys.argv[1]
main()
"""


def consumer(
    cluster: Cluster, topic: str, url: str, directory: Path, how: str = "live", metrics_port: int = 0
) -> subprocess.Popen[str]:
    """`liber ingest --kafka` in a process of its own."""
    config = directory / "kafka.properties"
    config.write_text("# fast\n" + "".join(f"{name} = {value}\n" for name, value in FAST.items()))
    arguments = ["--kafka", cluster.brokers, "--topic", topic, "--group", "readers", "--kafka-config", str(config)]
    arguments += ["--metrics-port", str(metrics_port)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how, "ingest", *arguments, "--store", url],
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def scrape(port: int) -> tuple[float, float]:
    """What a consumer says that it has appended, and that was there already."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_SECONDS) as answer:
        shown = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines())
    return float(shown["liber_ingested_behaviors_total"]), float(shown["liber_ingest_duplicates_total"])


@contextlib.contextmanager
def killed_at_last(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive its test."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_a_consumer_killed_between_append_and_commit_loses_and_repeats_nothing(
    cluster: Cluster, store: MemoryStore, url: str, tmp_path: Path
) -> None:
    sent = messages(300)
    cluster.send("killed", sent)
    with killed_at_last(consumer(cluster, "killed", url, tmp_path, "die")) as dying:
        dying.communicate(timeout=PATIENCE_SECONDS)
    assert dying.returncode == -signal.SIGKILL
    kept = store.statistics().behaviors
    assert kept > 0
    cluster.send("killed", more := messages(100, start=300))
    port = find_ports({"metrics": "127.0.0.1"}, {"metrics": 0})["metrics"]
    with killed_at_last(consumer(cluster, "killed", url, tmp_path, metrics_port=port)) as living:
        finished = until(lambda: store.statistics().behaviors >= 400)
        while not finished():
            time.sleep(0.02)
        counted = until(lambda: scrape(port) == (400 - kept, kept))
        while not counted():
            time.sleep(0.02)
        assert scrape(port) == (400 - kept, kept)
        living.terminate()
        printed, told = living.communicate(timeout=PATIENCE_SECONDS)
    assert living.returncode == 0, told
    # All that the first consumer kept came again, as it had committed nothing, and was known.
    assert printed.startswith(f"kept {400 - kept} behaviors, {kept} were there already")
    assert items(store) == expected(sent + more)


def test_a_broken_message_is_named_and_can_be_set_aside(cluster: Cluster, store: MemoryStore, tmp_path: Path) -> None:
    sent = messages(60, users=1)
    wrong = {"user": "u0", "item": "i", "timestamp": "soon", "feedback": 1}
    cluster.send("broken", [*sent[:55], wrong, *sent[55:]])
    named = r"topic broken, partition \d, offset 55: timestamp 'soon' .*all before it is kept: skip such messages with"
    with pytest.raises(InvalidInputError, match=named):
        KafkaIngest(source(cluster, "broken", batch=20), store).run(until(lambda: False))
    assert store.statistics().behaviors == 55

    aside = tmp_path / "broken.jsonl"
    skipping = KafkaIngest(source(cluster, "broken", skip_broken=aside), store)
    # What came before the broken message was committed: none of it comes again.
    assert skipping.run(until(lambda: store.statistics().behaviors >= 60)) == Appended(5, 0, 1)
    (line,) = aside.read_text().splitlines()
    entry = json.loads(line)
    assert (entry["offset"], json.loads(entry["value"])) == (55, wrong)
    assert "timestamp 'soon'" in entry["problem"]
    assert items(store) == expected(sent)


def test_a_store_that_is_away_is_tried_again_and_nothing_is_committed_meanwhile(
    cluster: Cluster, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = {"user": "u", "item": "i", "timestamp": 1, "feedback": 1, "event_id": "e1"}
    # The sender's event ids count; what has none is told apart by its offset.
    cluster.send("away", [event, event, {**event, "event_id": ""}])
    append, failures, committed = type(store).append, [1, 1, 1], []
    group = Consumer({"bootstrap.servers": cluster.brokers, "group.id": "readers"})

    def fail_first(self: MemoryStore, behaviors: Sequence[Behavior], mark: Mark | None = None) -> Appended:
        partitions = [TopicPartition("away", number) for number in range(4)]
        committed.append(max(each.offset for each in group.committed(partitions, timeout=PATIENCE_SECONDS)))
        if failures:
            failures.pop()
            raise StoreError("store is away")
        return append(self, behaviors, mark)

    monkeypatch.setattr(type(store), "append", fail_first)
    warned: list[str] = []
    ingest = KafkaIngest(source(cluster, "away", retry_seconds=0.05), store, warn=warned.append)
    total = ingest.run(until(lambda: store.statistics().behaviors >= 2))
    committed.append(max(each.offset for each in group.committed([TopicPartition("away", n) for n in range(4)])))
    group.close()
    assert total == Appended(behaviors=2, duplicates=1, partitions=0)
    assert warned == [
        f"store is away; nothing is committed, trying again in {wait} s" for wait in ("0.05", "0.1", "0.2")
    ]
    assert (committed[:4], committed[-1]) == ([-1001] * 4, 3)
    timeline = store.timeline("u")
    assert timeline is not None
    assert [each.event_id[:5] for each in timeline.cache] == ["e1", "away-"]


def test_partitions_that_go_to_another_consumer_are_kept_once(
    cluster: Cluster, store: MemoryStore, url: str, tmp_path: Path
) -> None:
    sent = messages(16)
    cluster.send("shared", sent)
    ingest = KafkaIngest(source(cluster, "shared", batch=100, wait_seconds=0.05), store)
    others: list[subprocess.Popen[str]] = []

    with contextlib.ExitStack() as processes:

        def send() -> None:
            """Keeps messages coming before, while and after partitions change hands."""
            after, finished = 0, until(lambda: after > 50)
            while not finished():
                sent.extend(more := messages(16, start=len(sent)))
                cluster.send("shared", more)
                if len(ingest._assigned) == 4 and not others:
                    others.append(processes.enter_context(killed_at_last(consumer(cluster, "shared", url, tmp_path))))
                after += bool(others) and 0 < len(ingest._assigned) < 4
                time.sleep(0.005)

        sender = threading.Thread(target=send)
        sender.start()
        total = ingest.run(until(lambda: not sender.is_alive() and store.statistics().behaviors >= len(sent)))
        (other,) = others
        other.terminate()
        printed, told = other.communicate(timeout=PATIENCE_SECONDS)
    assert other.returncode == 0, told
    assert 0 < total.behaviors < len(sent)
    assert printed.startswith(f"kept {len(sent) - total.behaviors} behaviors, ")
    assert items(store) == expected(sent)


def test_settings_come_from_a_properties_file(tmp_path: Path) -> None:
    path = tmp_path / "kafka.properties"
    path.write_text("# a comment\n\nsecurity.protocol=SASL_SSL\nsasl.password = a=b#c \n")
    assert read_settings(path) == {"security.protocol": "SASL_SSL", "sasl.password": "a=b#c"}
    path.write_text("a=b\nsecret\n")
    with pytest.raises(InvalidInputError, match="line 2: no setting") as caught:
        read_settings(path)
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_settings(tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"enable.auto.commit": "true"}, "setting enable.auto.commit is liber's own"),
        ({"no.such.setting": "1"}, "No such configuration property"),
        ({"session.timeout.ms": "soon"}, "session.timeout.ms"),
    ],
)
def test_settings_that_are_none_are_refused(settings: dict[str, str], named: str, store: MemoryStore) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        KafkaIngest(KafkaSource("127.0.0.1:1", "t", "g", settings), store)
    assert "\n" not in str(caught.value)


def test_brokers_that_are_not_there_are_named(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liber_runtime.ingest.kafka._CONNECT_SECONDS", 0.5)
    with pytest.raises(IngestError, match=r"Kafka at 127.0.0.1:1: .*; check --kafka, and the settings in"):
        KafkaIngest(KafkaSource("127.0.0.1:1", "t", "g", {"log_level": "2"}), store).run(lambda: False)


def test_a_topic_that_is_not_there_is_named(cluster: Cluster, store: MemoryStore) -> None:
    with pytest.raises(IngestError, match=r"Kafka topic 'nothing' of .*: .*Unknown topic or partition; check --topic"):
        KafkaIngest(source(cluster, "nothing"), store).run(lambda: False)


def test_the_missing_extra_is_named(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(ConfigurationError, match=r"install liber-runtime\[kafka\]"):
        KafkaIngest(KafkaSource("127.0.0.1:1", "t", "g"), store)
