"""Arrivals, and what is counted of calls that were answered, failed, or never ended."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from bench.calls import Mix, Request, draw_requests, read_ids
from bench.load import Plan, Row, judge, largest, plot, sweep, table
from bench.open_loop import Calls, Generator, draw_schedule, join, summarize
from bench.stability import FLAT, errors, flatness, outage
from liber_runtime.exceptions import InvalidInputError

RATES = st.floats(0.1, 500.0)
SECONDS = st.floats(0.1, 20.0)
SEEDS = st.integers(0, 2**32 - 1)


def made(ended: list[float], status: list[str], *, late: float = 0.0, end: float = 10.0) -> Calls:
    """Calls due every second from 0, each sent `late`."""
    due = np.arange(float(len(ended)))
    message = tuple("" if each == "OK" else f"call {place} failed" for place, each in enumerate(status))
    return Calls(0.0, end, end, due, due + late, np.array(ended), tuple(status), message)


class TestArrivals:
    @hypothesis.given(RATES, SECONDS, SEEDS)
    def test_are_sorted_lie_within_the_time_and_follow_from_the_seed(
        self, rate: float, seconds: float, seed: int
    ) -> None:
        schedule = draw_schedule(rate, seconds, 7, seed, deadline=1.0)
        assert (np.diff(schedule.due) >= 0).all()
        assert ((schedule.due > 0) & (schedule.due < seconds)).all()
        assert ((schedule.request >= 0) & (schedule.request < 7)).all()
        again = draw_schedule(rate, seconds, 7, seed, deadline=1.0)
        np.testing.assert_array_equal(schedule.due, again.due)
        np.testing.assert_array_equal(schedule.request, again.request)

    @hypothesis.given(RATES, SECONDS, SEEDS)
    def test_of_twice_the_load_are_the_same_twice_as_fast(self, rate: float, seconds: float, seed: int) -> None:
        once = draw_schedule(rate, 2 * seconds, 1, seed, deadline=1.0).due
        twice = draw_schedule(2 * rate, seconds, 1, seed, deadline=1.0).due
        shared = min(len(once), len(twice))
        assert abs(len(once) - len(twice)) <= 1
        np.testing.assert_allclose(once[:shared], 2 * twice[:shared])

    def test_come_at_the_rate_and_as_irregularly_as_a_poisson_process(self) -> None:
        counts = np.array([len(draw_schedule(50.0, 4.0, 1, seed, deadline=1.0).due) for seed in range(400)])
        # 200 expected; the mean of 400 draws strays by 0.7.
        assert abs(counts.mean() - 200) < 4
        assert 0.8 < counts.var() / 200 < 1.25
        pauses = np.diff(draw_schedule(50.0, 200.0, 1, 1, deadline=1.0).due)
        assert pauses.std() / pauses.mean() == pytest.approx(1.0, abs=0.05)

    def test_may_be_none(self) -> None:
        schedule = draw_schedule(1e-6, 1.0, 1, 1, deadline=1.0)
        assert len(schedule.due) == 0


class TestFigures:
    def test_a_latency_counts_from_when_the_call_was_due(self) -> None:
        row = summarize(made([0.25, 1.25, 2.25, 3.5], ["OK"] * 4, late=0.2))
        assert (row["p50_ms"], row["p99_ms"]) == (250.0, 500.0)
        assert row["lag_p99_ms"] == row["lag_max_ms"] == 200.0
        assert not row["valid"]

    def test_a_call_that_failed_is_slower_than_any_answer(self) -> None:
        row = summarize(made([0.1, 1.1, 2.001, 3.1], ["OK", "OK", "INTERNAL", "OK"]))
        assert (row["requests"], row["failed"], row["failures"]) == (4, 1, {"INTERNAL": 1})
        assert (row["p50_ms"], row["p99_ms"]) == (100.0, None)
        assert row["valid"]

    def test_a_call_that_never_ended_has_failed(self) -> None:
        row = summarize(made([math.nan, 1.1, math.nan], ["UNFINISHED", "OK", "UNFINISHED"]))
        assert (row["failed"], row["p50_ms"]) == (2, None)

    def test_an_answer_after_the_time_in_which_calls_are_due_is_not_achieved(self) -> None:
        row = summarize(made([0.5, 1.5, 4.5, 6.5], ["OK"] * 4, end=4.0))
        assert (row["offered"], row["achieved"], row["failed"]) == (1.0, 0.5, 0)

    def test_of_no_calls_there_is_no_percentile(self) -> None:
        row = summarize(made([], []))
        assert (row["requests"], row["failed"], row["p50_ms"], row["valid"]) == (0, 0, None, False)

    @hypothesis.given(st.lists(st.sampled_from(["OK", "INTERNAL", "UNFINISHED"]), max_size=20), st.integers(0, 20))
    def test_parts_add_up_to_the_whole(self, status: list[str], cut: int) -> None:
        calls = made([place + 0.5 for place in range(len(status))], status, end=20.0)
        parts = [calls.between(0.0, float(cut)), calls.between(float(cut), 20.0)]
        assert summarize(join(parts)) == summarize(calls) if 0 < cut < 20 else True
        assert sum(len(part.due) for part in parts) == len(status)


class TestSweep:
    @staticmethod
    def server(capacity: float, bound: float) -> tuple[list[float], Plan, list[Row]]:
        """A sweep over a server that keeps up to `capacity` and meets the bound up to `bound`."""
        asked: list[float] = []

        def step(load: float) -> Row:
            asked.append(load)
            return {"mix": "m", "offered": load, "saturated": load > capacity, "meets_bound": load <= bound}

        plan = Plan()
        return asked, plan, sweep(step, 1.0, plan)

    @hypothesis.given(st.floats(0.5, 40.0), st.floats(0.01, 1.0))
    def test_ends_at_saturation_and_looks_closer_at_the_bound(self, capacity: float, share: float) -> None:
        asked, plan, rows = self.server(capacity, capacity * share)
        loads = [row["offered"] for row in rows]
        assert loads == sorted(asked)
        coarse = asked[: len(asked) - plan.refinements]
        assert len(asked) <= plan.most_steps + plan.refinements
        assert sum(row["saturated"] for row in rows) <= 1 + plan.refinements
        best = largest(rows)["m"]
        if best is not None and best["offered"] < coarse[-1]:
            above = min(row["offered"] for row in rows if row["offered"] > best["offered"])
            assert above / best["offered"] < plan.factor**0.5
        assert best is None or best["offered"] <= capacity * share

    def test_the_largest_load_that_meets_the_bound_is_marked(self) -> None:
        rows = [
            {
                **{"mix": "ranking", "users": 1, "candidates": 10, "lag_p99_ms": 0.1, "failed": 0, "valid": True},
                **{"offered": load, "achieved": load, "p50_ms": 1.0, "p99_ms": p99},
                **{"saturated": p99 is None, "meets_bound": p99 is not None and p99 <= 60},
            }
            for load, p99 in ((10.0, 5.0), (20.0, 55.0), (30.0, 90.0), (40.0, None))
        ]
        assert [line for line in table(rows, 60).splitlines() if "largest" in line] == [
            "| ranking | 1 | 10 | **20** | 20 | 0 | 1.0 | 55.0 | 0.1 | largest with p99 <= 60 ms |"
        ]
        assert "| 40 | 40 | 0 | 1.0 | failed | 0.1 | saturated |" in table(rows, 60)
        assert plot(rows, 60).startswith("<svg")

    @pytest.mark.parametrize(("late", "settled", "valid"), [(0.0, True, True), (0.1, True, False), (0.0, False, False)])
    def test_a_step_that_was_not_sent_as_planned_meets_no_bound(self, late: float, settled: bool, valid: bool) -> None:
        row = judge(made([0.01, 1.01, 2.01], ["OK"] * 3, late=late, end=3.0), 60.0, 0.01, settled=settled)
        assert (row["valid"], row["meets_bound"], row["saturated"]) == (valid, valid, False)

    def test_a_server_that_falls_behind_is_saturated(self) -> None:
        assert judge(made([0.1, 1.1, 9.0], ["OK"] * 3, end=3.0), 60.0, 0.01, settled=True)["saturated"]
        assert judge(made([0.1, 1.3, 2.1], ["OK"] * 3, end=3.0), 60.0, 0.01, settled=True)["saturated"]
        assert not judge(made([0.1, 1.1, 2.1], ["OK"] * 3, end=3.0), 60.0, 0.01, settled=True)["saturated"]


class TestOutage:
    def test_is_told_from_the_kill(self) -> None:
        calls = made([0.1, 1.1, 3.5, 4.0, 4.2, 5.1], ["OK", "OK", "INTERNAL", "INTERNAL", "OK", "OK"])
        row = outage(calls, 1.5)
        assert (row["requests"], row["failed"], row["clean"]) == (4, 2, True)
        assert (row["first_failure_s"], row["last_failure_s"], row["failing_s"]) == (2.0, 2.5, 0.5)
        assert (row["last_failed_due_s"], row["first_good_s"]) == (1.5, 2.7)
        assert row["errors"] == {"INTERNAL: call N failed": 2}

    def test_without_a_failure_has_no_times(self) -> None:
        row = outage(made([0.1, 1.4], ["OK", "OK"]), 0.5)
        assert (row["failed"], row["first_failure_s"], row["first_good_s"], row["slowest_s"]) == (0, None, None, 0.4)

    @pytest.mark.parametrize("status", ["DEADLINE_EXCEEDED", "UNFINISHED"])
    def test_that_leaves_callers_waiting_is_not_clean(self, status: str) -> None:
        assert not outage(made([1.0, math.nan], ["OK", status]), 0.5)["clean"]

    def test_errors_are_grouped_without_their_numbers(self) -> None:
        assert errors(made([0.1, 1.0, 2.0], ["OK", "UNAVAILABLE", "UNAVAILABLE"])) == {"UNAVAILABLE: call N failed": 2}


class TestFlatness:
    @staticmethod
    def series(values: list[int]) -> list[tuple[float, int]]:
        return [(10.0 * place, value << 20) for place, value in enumerate(values)]

    def test_a_warm_up_does_not_count(self) -> None:
        row = flatness(self.series([10, 20, 40, 60, 80, 90] + [100] * 30), 60.0)
        assert (row["flat"], row["change"], row["smallest_mib"], row["samples"]) == (True, 0.0, 100.0, 30)
        assert len(row["mib"]) == 36

    @pytest.mark.parametrize(("last", "flat"), [(99 + int(100 * FLAT), True), (107, False), (93, False)])
    def test_the_last_fifth_is_compared_with_the_first(self, last: int, flat: bool) -> None:
        row = flatness(self.series([100] * 10 + [150] + [last] * 9), 0.0)
        assert row["flat"] is flat
        assert row["change"] == pytest.approx(last / 100 - 1)
        assert row["largest_mib"] == 150


class TestRequests:
    def test_are_drawn_by_the_seed_and_differ(self) -> None:
        mix, users, items = Mix("folded", 3, 10), [f"u{n}" for n in range(20)], [f"i{n}" for n in range(20)]
        first = draw_requests(mix, users, items, 5, seed=1)
        assert first == draw_requests(mix, users, items, 5, seed=1)
        assert len({each.payload for each in first}) == 5
        assert first != draw_requests(mix, users, items, 5, seed=2)

    @pytest.mark.parametrize("users", [0, 4, 11])
    def test_that_cannot_be_drawn_are_refused(self, users: int) -> None:
        with pytest.raises(InvalidInputError, match=f"a call of {users} users and 10 candidates cannot be drawn"):
            draw_requests(Mix("folded", users, 10), ["a", "b", "c"], ["i"], 1, seed=1)

    def test_ids_are_read_once_each_from_lines_or_json_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "ids"
        path.write_text('a\n{"user": "b", "item": "x"}\n\na\n{"user": 7}\n')
        assert read_ids(path, "user") == ["a", "b", "7"]


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_calls_to_a_server_that_says_nothing_fail_by_their_deadline_and_a_stopped_run_forgets_the_rest(
    silent: str,
) -> None:
    with Generator(silent, [Request(b"", 1)]) as generator:
        calls = generator.run(draw_schedule(100.0, 0.2, 1, 1, deadline=0.3))
        assert len(calls.due) > 5
        assert set(calls.status) <= {"DEADLINE_EXCEEDED", "UNAVAILABLE", "UNFINISHED"}
        assert not calls.answered.any()
        assert summarize(calls)["p50_ms"] is None
        generator.begin(draw_schedule(100.0, 60.0, 1, 1, deadline=0.1))
        time.sleep(0.3)
        stopped = generator.stop()
        assert 0 < len(stopped.due) < 6000
        assert stopped.seconds < 60
