"""The catalogue of metrics: what processes show is what it says, and what docs/metrics.md says."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from liber_runtime.behavior import Text
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import STEPS, Appended, Statistics
from liber_runtime.metrics import CATALOGUE, OUTCOMES, IngestMetrics, Metrics, registry_of, serve_registry
from liber_runtime.served.user_memory import COUNTERS

PAGE = (Path(__file__).parents[2] / "docs/metrics.md").read_text("utf-8")


class Server:
    """What a supervisor would tell."""

    def __init__(self) -> None:
        self.is_alive = True
        self.stub_restarts, self.server_restarts = 3, 1


def shown(registry: CollectorRegistry) -> dict[str, float]:
    """Every sample as a scrape over HTTP has it."""
    port = serve_registry(registry, 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_the_page_has_the_catalogue() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (\w+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert [(name, kind, tuple(re.findall(r"`(\w+)`", labels)), *rest) for name, kind, labels, *rest in rows] == [
        (each.name, each.type, each.labels, each.process, each.meaning) for each in CATALOGUE
    ]


def test_names_follow_the_conventions_and_labels_stay_few() -> None:
    assert len({each.name for each in CATALOGUE}) == len(CATALOGUE)
    for each in CATALOGUE:
        if each.name.startswith("liber_"):
            assert re.fullmatch(r"liber_[a-z]+(_[a-z]+)*", each.name)
            assert each.name.endswith("_total") == (each.type == "counter")
            assert set(each.labels) <= {"step", "kind", "outcome", "direction", "currency"}
        assert each.meaning[-1] in ".)"


@pytest.mark.parametrize(
    ("process", "registry"),
    [("worker", Metrics().registry), ("ingest", IngestMetrics().registry), ("serve", registry_of(Server()))],
)
def test_a_process_shows_what_the_catalogue_says_and_nothing_else(process: str, registry: CollectorRegistry) -> None:
    port = serve_registry(registry, 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    families = {each.name: each for each in text_string_to_metric_families(text)}
    expected = [each for each in CATALOGUE if each.process == process]
    # How many were made of what has a `_created` of its own is Prometheus' own business.
    ours = {name for name in families if not name.endswith("_created")}
    assert ours == {each.name.removesuffix("_total") for each in expected}
    for each in expected:
        family = families[each.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (each.type, each.meaning)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(each.labels)


def test_tritons_models_count_what_the_catalogue_says() -> None:
    ours = {each.name: each.meaning for each in CATALOGUE if each.process == "Triton" and each.name[:5] == "liber"}
    assert ours == COUNTERS


def test_a_worker_counts_calls_tokens_and_cost() -> None:
    metrics = Metrics()
    before = shown(metrics.registry)
    # Rates of failures need the series to be there before the first failure.
    assert all(before[f'liber_writer_calls_total{{outcome="{each}"}}'] == 0 for each in OUTCOMES)
    assert all(before[f'liber_step_failures_total{{step="{each}"}}'] == 0 for each in STEPS)
    for outcome in ("answered", "answered", "away"):
        metrics.called(outcome)
    metrics.written(Text("shift", "text", "w", "v", 100, 10, 0.2, 5.0))
    metrics.paid(100, 10)
    metrics.paid(7, None)
    metrics.spent("USD", 0.25)
    metrics.spent("USD", 0.5)
    metrics.encoded(0.03)
    after = shown(metrics.registry)
    expected = {
        'liber_writer_calls_total{outcome="answered"}': 2,
        'liber_writer_calls_total{outcome="away"}': 1,
        'liber_writer_calls_total{outcome="unusable"}': 0,
        'liber_writer_tokens_total{direction="prompt"}': 107,
        'liber_writer_tokens_total{direction="response"}': 10,
        'liber_writer_cost_total{currency="USD"}': 0.75,
        'liber_writer_seconds_count{kind="shift"}': 1,
        'liber_writer_seconds_count{kind="summary"}': 0,
        'liber_encode_seconds_bucket{le="0.025"}': 0,
        'liber_encode_seconds_bucket{le="0.05"}': 1,
    }
    assert {name: after[name] for name in expected} == expected


def test_a_worker_shows_what_the_store_holds() -> None:
    metrics = Metrics()
    statistics = Statistics(
        users=4,
        behaviors=300,
        items=20,
        partitions=15,
        pending={"summary": 2, "shift": 0, "representation": 7},
        age_seconds={"summary": 61.5, "shift": 0.0, "representation": 3.0},
        dead={"summary": 0, "shift": 1, "representation": 0},
        repeated=0,
        vectors={},
        encodings=frozenset(),
    )
    metrics.observed(statistics)
    found = shown(metrics.registry)
    assert [found[f"liber_{noun}"] for noun in ("users", "behaviors", "items", "partitions")] == [4, 300, 20, 15]
    assert [found[f'liber_queue_steps{{step="{step}"}}'] for step in STEPS] == [2, 0, 7]
    assert [found[f'liber_queue_age_seconds{{step="{step}"}}'] for step in STEPS] == [61.5, 0, 3]
    assert [found[f'liber_dead_steps{{step="{step}"}}'] for step in STEPS] == [0, 1, 0]


def test_ingest_counts_what_came_since_it_was_last_told() -> None:
    metrics = IngestMetrics()
    for behaviors, duplicates in ((5, 0), (5, 3), (12, 4)):
        metrics.appended(Appended(behaviors, duplicates, 1))
    found = shown(metrics.registry)
    assert found["liber_ingested_behaviors_total"] == 12
    assert found["liber_ingest_duplicates_total"] == 4


def test_a_supervised_server_is_asked_when_prometheus_asks() -> None:
    server = Server()
    registry = registry_of(server)
    assert registry.get_sample_value("liber_stub_restarts_total") == 3
    server.stub_restarts, server.is_alive = 4, False
    assert registry.get_sample_value("liber_stub_restarts_total") == 4
    assert registry.get_sample_value("liber_server_up") == 0
    assert registry.get_sample_value("liber_server_restarts_total") == 1


def test_an_address_that_cannot_be_listened_on_is_named() -> None:
    port = serve_registry(CollectorRegistry(), 0)
    for address, taken in (("127.0.0.1", port), ("192.0.2.1", 0), ("127.0.0.1", 70_000), ("no such host", 0)):
        with pytest.raises(ConfigurationError, match=f"metrics on {address}, port {taken}: .*; choose"):
            serve_registry(CollectorRegistry(), taken, address)
