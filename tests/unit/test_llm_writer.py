"""What every LLM has in common as a writer, on a language model that does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from liber_runtime.behavior import Behavior, Domain, Item
from liber_runtime.exceptions import (
    ConfigurationError,
    LiberError,
    PromptRefusedError,
    UnusableAnswerError,
    WriterAwayError,
)
from liber_runtime.interest import ShiftPrompt, SummaryPrompt
from liber_runtime.memory import open_store
from liber_runtime.partition import parse_condition
from liber_runtime.worker import Worker, WorkerReport
from liber_runtime.writers.limits import Limited
from liber_runtime.writers.llm import BusyError, Generation, LLMWriter, Patience
from liber_runtime.writers.pricing import Price
from liber_runtime.writers.prompting import Budget, Prompting

DOMAIN = Domain("films", "movie", "stars", (1, 5), 3, ("genre", "mood"))
SUMMARY = SummaryPrompt(DOMAIN, {}, tuple((Item(f"i{n}", f"film {n}"), 4.0) for n in range(5)))
SHIFT = ShiftPrompt(DOMAIN, "likes war films", "likes comedies")

Script = Callable[[str, int], "Generation | Exception"]


def say(text: str, number: int) -> Generation:
    return Generation(f"Prefers film number {number}.", False, 100, 7)


@dataclass
class ScriptedModel:
    """Answers by a script of the prompt and the number of the call; notes what is asked of it, and when."""

    script: Script = say
    seconds: float = 0.0
    asked: list[tuple[str, int]] = field(default_factory=list)
    most: int = 0
    in_flight: int = 0
    closed: int = 0
    name: str = "scripted:model"

    async def generate(self, text: str, response_tokens: int) -> Generation:
        self.asked.append((text, response_tokens))
        number = len(self.asked)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(self.seconds)
            made = self.script(text, number)
        finally:
            self.in_flight -= 1
        if isinstance(made, Exception):
            raise made
        return made

    async def check(self) -> None:
        """There is nothing to find out."""

    async def close(self) -> None:
        self.closed += 1


async def test_the_prefix_is_warmed_up_once_before_the_fan_out() -> None:
    model = ScriptedModel(seconds=0.01)
    writer = LLMWriter(model, Prompting(Budget(4096, 300)))
    await asyncio.gather(*(writer.write(SUMMARY) for _ in range(5)))
    assert model.asked[0] == (SUMMARY.prefix, 1)
    assert model.asked[1:] == [(SUMMARY.text, 300)] * 5
    assert model.most == 5  # and all of them at once then
    await writer.write(SHIFT)
    assert model.asked[6:] == [(SHIFT.prefix, 1), (SHIFT.text, 300)]


async def test_a_warm_up_that_fails_is_no_matter_and_one_that_reached_nobody_is_made_again() -> None:
    failing = ScriptedModel(lambda text, number: LiberError("broke off") if number == 1 else say(text, number))
    assert (await LLMWriter(failing).write(SUMMARY)).text

    away = ScriptedModel(lambda text, number: WriterAwayError("refused") if number == 1 else say(text, number))
    writer = LLMWriter(away)
    first, second = await asyncio.gather(writer.write(SUMMARY), writer.write(SUMMARY), return_exceptions=True)
    assert isinstance(first, WriterAwayError)
    assert not isinstance(second, BaseException)
    await writer.write(SUMMARY)
    assert away.asked[2] == (SUMMARY.prefix, 1)


async def test_without_warm_up_each_call_is_for_an_answer() -> None:
    model = ScriptedModel()
    assert (await LLMWriter(model, warms_up=False).write(SUMMARY)).text == "Prefers film number 1."
    assert len(model.asked) == 1


async def test_an_answer_comes_with_tokens_and_what_is_wrong_with_it() -> None:
    model = ScriptedModel(lambda text, number: Generation("Likes war. Likes dra", True, 90, 30))
    many = SummaryPrompt(DOMAIN, {}, tuple((Item(f"i{n}", f"a film with number {n:04d}"), 4.0) for n in range(90)))
    made = await LLMWriter(model, Prompting(Budget(1024, 30)), warms_up=False).write(many)
    assert (made.text, made.prompt_tokens, made.response_tokens) == ("Likes war.", 90, 30)
    assert made.note.startswith("the oldest ")
    assert made.note.endswith("; the answer was cut off at the most tokens allowed")


@pytest.mark.parametrize("answer", ["", "</s>", "so " * 80])
async def test_no_knowledge_is_an_error_that_says_what_it_cost(answer: str) -> None:
    model = ScriptedModel(lambda text, number: Generation(answer, False, 90, 80))
    with pytest.raises(UnusableAnswerError, match="writer 'scripted:model' answered with") as caught:
        await LLMWriter(model).write(SUMMARY)
    assert (caught.value.prompt_tokens, caught.value.response_tokens) == (90, 80)


async def test_a_busy_server_is_asked_again_when_it_says() -> None:
    loop, times = asyncio.get_running_loop(), []

    def busy(text: str, number: int) -> Generation | Exception:
        times.append(loop.time())
        return BusyError("429", 0.3) if number == 1 else BusyError("429") if number == 2 else say(text, number)

    writer = LLMWriter(ScriptedModel(busy), patience=Patience(10.0, 0.01), warms_up=False)
    assert (await writer.write(SUMMARY)).text == "Prefers film number 3."
    assert times[1] - times[0] >= 0.3
    assert writer.retried == 2


async def test_patience_with_a_busy_server_ends_and_nothing_was_paid() -> None:
    model = ScriptedModel(lambda text, number: BusyError("the endpoint is busy (429: slow down)", 5.0))
    with pytest.raises(WriterAwayError, match="slow down"):
        await LLMWriter(model, patience=Patience(1.0, 0.01)).write(SUMMARY)
    assert len(model.asked) == 1  # five seconds are longer than one


async def test_what_broke_off_is_not_repeated_behind_the_workers_back() -> None:
    model = ScriptedModel(lambda text, number: LiberError("broke off in the middle"))
    with pytest.raises(LiberError, match="broke off"):
        await LLMWriter(model, warms_up=False).write(SUMMARY)
    assert len(model.asked) == 1


async def test_tokens_per_minute_hold_calls_back() -> None:
    model = ScriptedModel()
    writer = LLMWriter(model, Prompting(Budget(1024, 512)), tokens_per_minute=2048, warms_up=False)
    calls = [asyncio.ensure_future(writer.write(SUMMARY)) for _ in range(4)]
    await asyncio.sleep(0.2)
    assert len(model.asked) == 1  # 512 and the prompt's, of a thousand that may be begun at once
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def test_too_few_tokens_per_minute_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="4096 tokens per minute are too few for calls of up to 4096"):
        LLMWriter(ScriptedModel(), tokens_per_minute=4096)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_is_a_number(price: float) -> None:
    with pytest.raises(ConfigurationError, match="the price of response tokens is"):
        Price(1.0, price)


def drain(tmp_path: Path, script: Script, price: Price | None = None) -> tuple[WorkerReport, ScriptedModel]:
    """Two partitions of five behaviors through a worker: two summaries and a shift."""
    model = ScriptedModel(script)
    store = open_store(f"sqlite:///{tmp_path}/memory.db", parse_condition("count(5)"), create=True)
    try:
        store.describe(DOMAIN)
        store.append([Behavior("u", f"i{n}", 4.0, float(n), f"e{n}") for n in range(10)])
        writer = Limited(LLMWriter(model), 4)
        worker = Worker(store, writer, None, price=price, backoff_seconds=0.01, max_attempts=3, idle_seconds=0.01)
        return asyncio.run(worker.drain()), model
    finally:
        store.close()


def test_a_worker_adds_up_what_its_writer_cost_and_closes_it(tmp_path: Path) -> None:
    report, model = drain(tmp_path, say, Price(10.0, 1000.0, "EUR"))
    assert (report.summaries, report.shifts, report.dead) == (2, 1, 0)
    assert (report.prompt_tokens, report.response_tokens) == (300, 21)
    assert report.cost == pytest.approx((300 * 10 + 21 * 1000) / 1e6)
    assert model.closed == 1


def test_unusable_answers_are_paid_for_and_tried_again(tmp_path: Path) -> None:
    def moody(text: str, number: int) -> Generation:
        return Generation("", False, 100, 0) if number in (2, 3) else say(text, number)

    report, _ = drain(tmp_path, moody, Price(10.0, 0.0))
    assert (report.summaries, report.shifts, report.failed, report.dead) == (2, 1, 2, 0)
    assert report.prompt_tokens == 500


def test_a_prompt_that_is_refused_is_given_up_at_once(tmp_path: Path) -> None:
    report, model = drain(tmp_path, lambda text, number: PromptRefusedError("context length exceeded"))
    assert (report.summaries, report.dead, report.prompt_tokens) == (0, 2, 0)
    assert len([text for text, _ in model.asked if text.endswith("Preferences:")]) == 2
