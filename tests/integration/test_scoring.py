"""Scoring over gRPC on a real Triton: right answers, folded and merged, and clear errors for bad requests."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import sqlite3
import urllib.request
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from conftest import Built, Running, await_true, predict_offline
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from builders.repository import BUNDLE_ENSEMBLES
from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import InvalidInputError, ScoringError
from liber_runtime.memory import MemoryStore
from liber_runtime.metrics import CATALOGUE
from liber_runtime.model_control import load_models
from liber_runtime.scoring import AsyncScoringClient, ScoringClient
from liber_runtime.served.user_memory import COUNTERS
from liber_runtime.settings import Settings


def users_of(built: Built) -> list[str]:
    return list(dict.fromkeys(behavior.user_id for behavior in built.dataset.behaviors))


def items_of(built: Built) -> list[str]:
    return list(built.dataset.items)


class TestAnswers:
    def test_served_probabilities_are_those_of_the_trained_model(
        self, client: ScoringClient, built: Built, store: MemoryStore
    ) -> None:
        users, items, offline = predict_offline(built, store)
        assert len(users) > 20
        np.testing.assert_allclose(client.score(users, items).probability, offline, atol=1e-5)

    def test_one_user_with_many_candidates_and_many_users_are_the_same_call(
        self, client: ScoringClient, built: Built
    ) -> None:
        users, items = users_of(built)[:7], items_of(built)[:20]
        grid = client.score([user for user in users for _ in items], items * len(users)).probability
        each = [client.score(user, items).probability for user in users]
        np.testing.assert_allclose(grid.reshape(len(users), -1), np.stack(each), atol=1e-6)

    def test_calls_over_the_limit_go_out_in_parts(self, running: Running, built: Built) -> None:
        random = np.random.default_rng(0)
        users = random.choice(users_of(built), 300).tolist()
        items = random.choice(items_of(built), 300).tolist()
        with ScoringClient(running.url, Settings(max_users=16, max_candidates=40)) as small:
            parts = small.score(users, items)
        with ScoringClient(running.url) as large:
            whole = large.score(users, items)
        np.testing.assert_allclose(parts.probability, whole.probability, atol=1e-6)

    async def test_concurrent_requests_are_merged_and_answered_as_if_alone(
        self, running: Running, built: Built
    ) -> None:
        random = np.random.default_rng(1)
        calls = [
            (
                random.choice(users_of(built), size).tolist(),
                random.choice(items_of(built), size).tolist(),
            )
            for size in random.integers(1, 60, size=200)
        ]
        async with AsyncScoringClient(running.url) as client:
            together = await asyncio.gather(*(client.score(*call) for call in calls))
            for call, answer in zip(calls[::20], together[::20], strict=True):
                alone = await client.score(*call)
                np.testing.assert_allclose(answer.probability, alone.probability, atol=1e-6)
        assert _executions(running.url, "ctr_backbone") < _requests(running.url, "ctr_backbone")

    def test_unknown_users_and_items_are_scored_and_named(self, client: ScoringClient, built: Built) -> None:
        known = items_of(built)[0]
        scores = client.score(["nobody", users_of(built)[0], "nobody"], [known, "nothing", "nothing"])
        assert np.isfinite(scores.probability).all()
        assert ((scores.probability > 0) & (scores.probability < 1)).all()
        assert scores.unknown_users == ("nobody",)
        assert scores.unknown_items == ("nothing",)

    def test_ids_may_come_one_by_one_as_other_clients_send_them(
        self, running: Running, client: ScoringClient, built: Built
    ) -> None:
        users, items = users_of(built)[:2], items_of(built)[:3]
        inputs = [
            _tensor("user_id", [user.encode() for user in users]),
            _tensor("item_id", [item.encode() for item in items]),
            _index([0, 1, 0]),
        ]
        raw = tritonclient.grpc.InferenceServerClient(running.url)
        answer = raw.infer("liber_score", inputs, client_timeout=10).as_numpy("click_probability")[0]
        raw.close()
        expected = client.score([users[0], users[1], users[0]], items).probability
        np.testing.assert_allclose(answer, expected, atol=1e-6)

    def test_of_a_long_history_the_newest_are_read_and_that_is_counted(
        self, running: Running, client: ScoringClient, built: Built, store: MemoryStore, fresh_user: str
    ) -> None:
        lookback, items = built.manifest.lookback, items_of(built)
        older = [Behavior(fresh_user, items[n % 7], 1.0, 1e9 + n) for n in range(3)]
        newer = [Behavior(fresh_user, items[n % 7], 1.0 + n % 5, 1.1e9 + n) for n in range(lookback)]
        before = _counted(running, client)
        store.append([*older, *newer])
        longer = client.score(fresh_user, items).probability
        store.forget(fresh_user)
        store.append(newer)
        np.testing.assert_allclose(client.score(fresh_user, items).probability, longer, atol=1e-6)
        store.forget(fresh_user)
        client.score(fresh_user, [items[0], "unheard of"])
        after = _counted(running, client)
        # What `_counted` asks itself is 2 unknown users with NOISE unknown candidates each.
        assert {name: after[name] - before[name] for name in COUNTERS} == {
            "liber_scored_users_total": 3 + 2,
            "liber_unknown_users_total": 1 + 2,
            "liber_scored_candidates_total": 2 * len(items) + 2 + 2 * NOISE,
            "liber_unknown_candidates_total": 1 + 2 * NOISE,
            "liber_histories_truncated_total": 1,
        }

    def test_ids_of_any_script_travel(self, client: ScoringClient) -> None:
        scores = client.score("пользователь-7 ✓", ["映画", "película"])
        assert scores.unknown_users == ("пользователь-7 ✓",)
        assert scores.unknown_items == ("映画", "película")


class TestClientRefuses:
    @pytest.mark.parametrize(
        ("users", "items", "message"),
        [
            ("u", [], "item_ids is empty"),
            (["u", "v"], ["i"], "2 user ids for 1 item ids"),
            ("u", "i1", "item_ids is the string 'i1'; pass a list"),
            ("", ["i"], "user id is empty"),
            ("u", ["i", 7], "item id 7 is a int; ids are strings"),
            ("u", ["\ud800"], "not valid UTF-8"),
            ("u" * 600, ["i"], "has 600 bytes; at most 512"),
            ("a\x00b", ["i"], "holds a control character"),
        ],
    )
    def test_what_cannot_be_sent(self, client: ScoringClient, users: Any, items: Any, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            client.score(users, items)

    def test_a_server_that_is_not_there(self) -> None:
        with ScoringClient("127.0.0.1:1") as nowhere, pytest.raises(ScoringError, match="liber serve") as raised:
            nowhere.score("u", ["i"])
        assert raised.value.status == "UNAVAILABLE"

    def test_a_deadline_that_passes(self, running: Running, built: Built) -> None:
        settings = Settings(deadline_seconds=0.0005)
        with (
            ScoringClient(running.url, settings) as hasty,
            pytest.raises(ScoringError, match=r"within 0\.0005 s") as raised,
        ):
            hasty.score(users_of(built) * 20, items_of(built)[:1] * len(users_of(built)) * 20)
        assert raised.value.status == "DEADLINE_EXCEEDED"


def _tensor(name: str, values: list[Any], kind: str = "BYTES", shape: list[int] | None = None) -> Any:
    array = np.array(values, dtype={"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64}[kind])
    tensor = tritonclient.grpc.InferInput(name, shape or [1, len(values)], kind)
    tensor.set_data_from_numpy(array.reshape(shape or (1, len(values))))
    return tensor


def _index(values: list[int]) -> Any:
    return _tensor("user_index", values, "INT32")


class TestServerRefuses:
    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (
                [_tensor("user_id", [b"u"]), _tensor("item_id", []), _index([])],
                "1 users and 0 candidates; send at least one of each",
            ),
            (
                [_tensor("user_id", [b"u"]), _tensor("item_id", [b"i"]), _tensor("user_index", [0], "INT64")],
                "data-type is 'INT64', but .* expects 'INT32'",
            ),
            (
                [_tensor("user_id", [b"u"]), _tensor("item_id", [b"i"]), _index([1])],
                r"user_index\[0\] is 1; with 1 users it must lie in 0..0",
            ),
            (
                [_tensor("user_id", [b"u"]), _tensor("item_id", [b"i"] * 16385), _index([0] * 16385)],
                "16385 candidates in one request; the limit is 16384",
            ),
            (
                [_tensor("user_id", [b"u"] * 4097), _tensor("item_id", [b"i"]), _index([0])],
                "4097 users in one request; the limit is 4096",
            ),
            (
                [_tensor("user_id", [b"u"]), _tensor("item_id", [b"\xff\xfe"]), _index([0])],
                r"item_id\[0\] is b'\\xff\\xfe', which is not UTF-8",
            ),
            (
                [_tensor("user_id", [b"u"]), _tensor("item_id", [b"i", b"j"]), _index([0])],
                "user_index has 1 entries for 2 candidates",
            ),
            (
                [_tensor("user_id", [b"u"], shape=[1]), _tensor("item_id", [b"i"]), _index([0])],
                "unexpected shape|has shape",
            ),
            ([_tensor("user_id", [b"u"]), _index([0])], "expected 3 inputs but got 2|item_id"),
        ],
    )
    def test_bad_requests_name_the_value_and_the_server_goes_on(
        self, running: Running, client: ScoringClient, built: Built, inputs: list[Any], message: str
    ) -> None:
        raw = tritonclient.grpc.InferenceServerClient(running.url)
        with pytest.raises(InferenceServerException, match=message) as raised:
            raw.infer("liber_score", inputs, client_timeout=10)
        raw.close()
        assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert "Traceback" not in str(raised.value)
        assert "model.py" not in str(raised.value)
        assert len(client.score(users_of(built)[0], items_of(built)[:3]).probability) == 3

    def test_a_user_with_a_vector_that_is_no_number(
        self, running: Running, client: ScoringClient, built: Built, store: MemoryStore, fresh_user: str
    ) -> None:
        """No store takes such a vector: it is written behind its back."""
        store.append([Behavior(fresh_user, items_of(built)[0], 3.0, 1e9 + n) for n in range(40)])
        vector = np.full(built.manifest.dimension, np.nan, "<f4").tobytes()
        with contextlib.closing(sqlite3.connect(built.store_url.removeprefix("sqlite:///"))) as db, db:
            db.execute(
                "INSERT INTO representations SELECT user, encoding, 1, ? FROM users, encodings"
                " WHERE user_id = ? AND fingerprint = ?",
                (vector, fresh_user, built.manifest.fingerprint),
            )
        with pytest.raises(ScoringError, match=f"a vector of user '{fresh_user}' .* NaN or infinity; make") as raised:
            client.score([fresh_user, users_of(built)[0]], items_of(built)[:2])
        assert raised.value.status == "UNAVAILABLE"
        assert len(client.score(users_of(built)[0], items_of(built)[:3]).probability) == 3
        store.forget(fresh_user)
        assert client.score(fresh_user, items_of(built)[:1]).unknown_users == (fresh_user,)

    def test_an_unknown_model(self, running: Running) -> None:
        with pytest.raises(ScoringError, match="liber build") as raised:
            load_models(running.url, ("liber_scores",))
        assert "liber_scores" in str(raised.value)


def test_many_clients_at_once(running: Running, built: Built) -> None:
    expected = {}
    with ScoringClient(running.url) as client:
        for user in users_of(built)[:10]:
            expected[user] = client.score(user, items_of(built)).probability

        def work(user: str) -> bool:
            return all(
                np.allclose(client.score(user, items_of(built)).probability, expected[user], atol=1e-6)
                for _ in range(5)
            )

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            assert all(pool.map(work, expected))


def test_both_ensembles_are_served(running: Running) -> None:
    raw = tritonclient.grpc.InferenceServerClient(running.url)
    assert all(raw.is_model_ready(name) for name in BUNDLE_ENSEMBLES)
    raw.close()


def test_tritons_port_shows_what_the_catalogue_says(running: Running, client: ScoringClient, built: Built) -> None:
    client.score(users_of(built)[0], items_of(built))
    families = {each.name: each for each in text_string_to_metric_families(_scrape(running))}
    for metric in CATALOGUE:
        if metric.process == "Triton":
            family = families[metric.name.removesuffix("_total")]
            assert (family.type, family.documentation) == (metric.type, metric.meaning)
            assert {name for sample in family.samples for name in sample.labels} == set(metric.labels)
    quantiles = {
        (sample.labels["model"], sample.labels["quantile"]): sample.value
        for sample in families["nv_inference_request_summary_us"].samples
        if "quantile" in sample.labels
    }
    assert {quantile for _, quantile in quantiles} == {"0.5", "0.9", "0.95", "0.99", "0.999"}
    assert 0 < quantiles["user_memory", "0.5"] <= quantiles["liber_score", "0.5"] <= quantiles["liber_score", "0.99"]


NOISE = 3_000


def _scrape(running: Running) -> str:
    with urllib.request.urlopen(running.server.metrics_url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def _counted(running: Running, client: ScoringClient) -> dict[str, float]:
    """What the models have counted up to now; they hand it on later, so something is asked that is seen to arrive.

    The first question arrives after or with all that was asked before; the second after all of that has arrived.
    """

    def shown() -> dict[str, float]:
        lines = [line.split() for line in _scrape(running).splitlines() if line.startswith("liber_")]
        return {line[0]: float(line[-1]) for line in lines}

    for _ in range(2):
        before = shown()["liber_unknown_candidates_total"]
        client.score("nobody", [f"nothing {number}" for number in range(NOISE)])
        await_true(lambda before=before: shown()["liber_unknown_candidates_total"] >= before + NOISE)  # type: ignore[misc]
    return shown()


def _statistics(url: str, model: str) -> Any:
    raw = tritonclient.grpc.InferenceServerClient(url)
    (statistics,) = raw.get_inference_statistics(model).model_stats
    raw.close()
    return statistics


def _executions(url: str, model: str) -> int:
    return int(_statistics(url, model).execution_count)


def _requests(url: str, model: str) -> int:
    return int(_statistics(url, model).inference_count)
