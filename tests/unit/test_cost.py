"""The calculator of `liber cost`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liber_runtime.cli import main
from liber_runtime.cli.application import output
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.writers.costing import (
    STATISTICAL_SECONDS,
    Estimate,
    PromptSizes,
    Workload,
    estimate_endpoint,
    estimate_gpus,
    estimate_statistical,
)
from liber_runtime.writers.pricing import Price

amounts = st.floats(1.0, 1e12)
prices = st.floats(0.0, 1000.0)
workloads = st.builds(
    Workload,
    behaviors=amounts,
    days=st.floats(0.01, 1000),
    partition=st.integers(1, 1000),
    response_tokens=st.floats(1, 4096),
    prompt_tokens=st.none() | st.floats(1, 4096),
)


def test_figures_by_hand() -> None:
    sizes = PromptSizes(behavior=10, summary=100, shift=50, summary_prefix=60, shift_prefix=40)
    workload = Workload(
        behaviors=2e6, days=10, partition=20, users=2e4, response_tokens=400, prompt_tokens=None, sizes=sizes
    )
    assert (workload.summaries, workload.shifts, workload.calls) == (1e5, 8e4, 1.8e5)
    assert workload.read == 1e5 * (100 + 20 * 10) + 8e4 * (50 + 2 * 400)
    assert workload.reusable == 1e5 * 60 + 8e4 * 40
    assert workload.written == 1.8e5 * 400
    assert workload.vector_bytes(32) == 1e5 * 32 * 4
    endpoint = estimate_endpoint(workload, Price(1.0, 3.0), prefix_discount=0.5)
    assert endpoint.cost == pytest.approx((98e6 - 0.5 * 9.2e6) / 1e6 + 3 * 72)
    gpu = estimate_gpus(workload, tokens_per_second=50, hour_price=2.0)
    assert gpu.machine_hours == pytest.approx(7.2e7 / 50 / 3600)
    assert gpu.machines == 2  # 1.44 million GPU-seconds in 864,000 seconds
    assert gpu.cost == pytest.approx(800)
    assert gpu.cost_held == pytest.approx(2 * 10 * 24 * 2.0)
    statistical = estimate_statistical(workload, hour_price=0.1, seconds_per_call=0.001)
    assert (statistical.machines, statistical.machine_hours) == (1, pytest.approx(0.05))
    assert statistical.cost == pytest.approx(0.005)


def test_what_is_known_without_asking_is_what_was_measured() -> None:
    measured = json.loads((Path(__file__).parents[2] / "bench" / "results" / "llm_cost.json").read_text())
    sizes, workload = PromptSizes(), Workload(1e6)
    (stated,) = (row for row in measured["rows"] if (row["variant"], row["response"]) == ("no_shift", "stated"))
    assert workload.response_tokens == stated["response_tokens_per_call"]
    assert sizes.summary + 20 * sizes.behavior == pytest.approx(stated["prompt_tokens_per_call"], rel=0.005)
    assert sizes.shift + 2 * workload.response_tokens == pytest.approx(measured["shift_tokens"], rel=0.005)
    assert {"summary": sizes.summary_prefix, "shift": sizes.shift_prefix} == measured["prefix_tokens"]
    (written,) = (row for row in measured["rows"] if (row["variant"], row["response"]) == ("liber", "written"))
    seconds = written["cpu_seconds_per_user"] / written["calls_per_user"]
    assert 0.5 < STATISTICAL_SECONDS / seconds < 2


COSTS: tuple[Callable[[Workload], Estimate], ...] = (
    lambda workload: estimate_statistical(workload, 0.05),
    lambda workload: estimate_endpoint(workload, Price(0.2, 0.6), 0.5),
    lambda workload: estimate_gpus(workload, 2000.0, 3.0),
)


@given(workloads, st.floats(1.0, 1000.0), st.sampled_from(COSTS))
def test_costs_are_linear_in_behaviors(
    workload: Workload, times: float, estimate: Callable[[Workload], Estimate]
) -> None:
    more = dataclasses.replace(workload, behaviors=times * workload.behaviors)
    assert estimate(more).cost == pytest.approx(times * (estimate(workload).cost or 0.0))
    for name in ("calls", "read", "reusable", "written", "text_bytes"):
        assert getattr(more, name) == pytest.approx(times * getattr(workload, name))
    assert (estimate(more).machines or 0) >= (estimate(workload).machines or 0)


@given(workloads, prices, prices, prices, st.floats(0, 1), st.floats(0, 1))
def test_costs_grow_with_prices_and_fall_with_discounts(
    workload: Workload, prompt: float, response: float, more: float, discount: float, further: float
) -> None:
    def cost(prompt: float, response: float, discount: float) -> float:
        found = estimate_endpoint(workload, Price(prompt, response), discount).cost
        assert found is not None
        return found

    base = cost(prompt, response, discount)
    assert base >= 0
    assert cost(prompt + more, response, discount) >= base
    assert cost(prompt, response + more, discount) >= base
    low, high = sorted((discount, further))
    assert cost(prompt, response, high) <= cost(prompt, response, low) * (1 + 1e-12)
    dear, cheap = (estimate_gpus(workload, 100.0, price) for price in (prompt + more, prompt))
    assert (dear.cost or 0.0) >= (cheap.cost or 0.0)
    assert dear.machines == cheap.machines


@given(workloads, st.floats(0.01, 1e5), st.floats(1.0, 100.0))
def test_machines_hold_the_load_and_one_fewer_would_not(workload: Workload, speed: float, times: float) -> None:
    slow, fast = estimate_gpus(workload, speed), estimate_gpus(workload, times * speed)
    assert slow.machines is not None
    assert fast.machines is not None
    assert fast.machines <= slow.machines
    seconds = workload.written / speed
    assert seconds <= slow.machines * workload.seconds * (1 + 1e-9)
    assert slow.machines == 1 or seconds > (slow.machines - 1) * workload.seconds * (1 - 1e-9)
    assert slow.cost is slow.cost_held is None
    assert "price of a GPU's hour" in slow.missing


@given(workloads, st.floats(0.0, 1.0))
def test_first_partitions_have_no_shift(workload: Workload, share: float) -> None:
    users = share * workload.behaviors / workload.partition * (1 - 1e-9)
    fewer = dataclasses.replace(workload, users=users)
    assert fewer.calls == pytest.approx(workload.calls - users)
    assert fewer.read <= workload.read
    assert 0 <= fewer.reusable <= fewer.read


@given(workloads)
def test_larger_partitions_cost_fewer_calls(workload: Workload) -> None:
    larger = dataclasses.replace(workload, partition=workload.partition + 1)
    assert larger.calls < workload.calls
    assert larger.vector_bytes(32) < workload.vector_bytes(32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"behaviors": 0.0}, "behaviors 0 cannot be; give a number from 1e-09 to 1e\\+15"),
        ({"behaviors": float("nan")}, "behaviors nan cannot be"),
        ({"behaviors": 1e300}, "behaviors 1e\\+300 cannot be"),
        ({"days": -1.0}, "days -1 cannot be"),
        ({"partition": 0}, "partition 0 cannot be"),
        ({"response_tokens": 0.0}, "response tokens 0 cannot be"),
        ({"prompt_tokens": -5.0}, "prompt tokens -5 cannot be"),
        ({"users": -1.0}, "users -1 cannot be; give a number from 0"),
        ({"users": 6.0}, "6 users with a first partition of 20 have more than 100 behaviors"),
    ],
)
def test_workloads_that_cannot_be_are_named(change: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        Workload(**{"behaviors": 100.0, **change})  # type: ignore[arg-type]


def test_prices_that_cannot_be_are_named() -> None:
    workload = Workload(1e6)
    with pytest.raises(InvalidInputError, match=r"the discount of the prefix is 1.5; give a share from 0 to 1"):
        estimate_endpoint(workload, Price(1, 1), 1.5)
    with pytest.raises(InvalidInputError, match=r"response tokens per second 0 cannot be"):
        estimate_gpus(workload, 0.0)
    with pytest.raises(InvalidInputError, match=r"price of an hour -2 cannot be"):
        estimate_gpus(workload, 10.0, -2.0)
    with pytest.raises(InvalidInputError, match=r"dimension 0 cannot be"):
        workload.vector_bytes(0)
    with pytest.raises(ConfigurationError, match=r"the price of prompt tokens is -1"):
        Price(-1, 1)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["liber", "cost", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--behaviors", "1e9", "--prompt-price", "0.2", "--response-price", "0.6", "--tokens-per-second", "2000"]
    status, printed, _ = run(capsys, monkeypatch, *words, "--gpu-price", "3", "--json")
    told = json.loads(printed)
    assert status == 0
    assert (told["calls"], told["summaries"], told["shifts"]) == (1e8, 5e7, 5e7)
    assert told["calls_per_second"] == pytest.approx(1e8 / (30 * 86400))
    statistical, endpoint, gpu = told["writers"]
    assert [each["writer"] for each in told["writers"]] == ["statistical", "endpoint", "gpu"]
    assert statistical["cost"] is None
    assert statistical["missing"]
    assert endpoint["cost_per_million_behaviors"] == pytest.approx(endpoint["cost"] / 1000)
    assert endpoint["cost"] == pytest.approx((told["prompt_tokens"] * 0.2 + told["response_tokens"] * 0.6) / 1e6)
    assert gpu["machine_hours"] == pytest.approx(told["response_tokens"] / 2000 / 3600)


def test_the_command_hides_no_price(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "width", 200)
    status, printed, _ = run(capsys, monkeypatch, "--behaviors", "1e9")
    assert status == 0
    for option in ("--cpu-price", "--prompt-price and --response-price", "--tokens-per-second"):
        assert f"give {option}: " in printed
    assert "386 a second" in printed
    priced = run(capsys, monkeypatch, "--behaviors", "1e9", "--tokens-per-second", "1000")[1]
    assert "give --gpu-price: " in priced


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt-price", "1"], "--prompt-price alone is half a price; give --response-price too, 0 if it is free"),
        (["--response-price", "1"], "--response-price alone is half a price; give --prompt-price too"),
        (["--gpu-price", "2"], "--gpu-price alone says nothing; give --tokens-per-second"),
        (["--prompt-price", "nan", "--response-price", "1"], "the price of prompt tokens is nan"),
        (["--users", "1e9"], "1e+09 users with a first partition of 20 have more than 1e+06 behaviors"),
        (["--dimension", "-3"], "dimension -3 cannot be"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, printed, error = run(capsys, monkeypatch, "--behaviors", "1e6", *words)
    assert (status, printed) == (1, "")
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
