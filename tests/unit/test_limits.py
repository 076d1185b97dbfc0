from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liber_runtime.behavior import Domain
from liber_runtime.exceptions import ConfigurationError, WriterAwayError
from liber_runtime.interest import Prompt, SummaryPrompt
from liber_runtime.writers import Completion, Paced
from liber_runtime.writers.limits import Limited

PROMPT = SummaryPrompt(Domain("films", "film", "stars", (1.0, 5.0), 3.0, ()), {}, ())


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = selectors.DefaultSelector()
        look = selector.select

        def select(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            self.now += (timeout or 0.0) + 1e-7  # no clock stands still
            return look(0)

        selector.select = select  # type: ignore[method-assign]
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def simulate(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop = SimulatedLoop()
    try:
        loop.run_until_complete(work())
    finally:
        loop.close()


class TimedWriter:
    name = "timed"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.began: list[float] = []
        self.running = self.most_running = 0

    async def write(self, prompt: Prompt) -> Completion:
        self.began.append(asyncio.get_running_loop().time())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        return Completion("fine")


@settings(max_examples=40, deadline=None)
@given(
    limit=st.one_of(st.integers(1, 40), st.integers(1150, 1900)),
    pauses=st.lists(st.floats(0.0, 90.0), max_size=30),
    together=st.integers(1, 100),
)
def test_no_minute_sees_more_calls_than_allowed(limit: int, pauses: list[float], together: int) -> None:
    writer = TimedWriter()

    async def work() -> None:
        limited = Limited(writer, calls_per_minute=limit)
        calls = [asyncio.ensure_future(limited.write(PROMPT)) for _ in range(together)]
        for pause in pauses:
            await asyncio.sleep(pause)
            calls += [asyncio.ensure_future(limited.write(PROMPT)) for _ in range(3)]
        await asyncio.gather(*calls)

    simulate(work)
    began = writer.began
    assert len(began) == together + 3 * len(pauses)
    assert all(later - sooner > 60.0 - 1e-6 for sooner, later in zip(began, began[limit:], strict=False))


@pytest.mark.parametrize("limit", [1, 60, 599, 6000])
def test_the_limit_is_used_up(limit: int) -> None:
    writer = TimedWriter()

    async def work() -> None:
        limited = Limited(writer, calls_per_minute=limit)
        await asyncio.gather(*(limited.write(PROMPT) for _ in range(3 * limit)))

    simulate(work)
    assert writer.began[-1] <= 3 * 60 * 1.01


@given(concurrency=st.integers(1, 9), calls=st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_no_more_calls_in_flight_than_allowed(concurrency: int, calls: int) -> None:
    writer = TimedWriter(seconds=1.0)

    async def work() -> None:
        limited = Limited(writer, concurrency)
        assert limited.free() == (concurrency, 0.0)
        running = [asyncio.ensure_future(limited.write(PROMPT)) for _ in range(calls)]
        await asyncio.sleep(0.5)
        assert limited.free()[0] == max(concurrency - calls, 0)
        await asyncio.gather(*running)
        assert limited.free() == (concurrency, 0.0)

    simulate(work)
    assert writer.most_running == min(concurrency, calls)


@pytest.mark.parametrize("limit", [7, 3000])
def test_it_says_how_many_calls_would_begin_at_once_and_when_the_next(limit: int) -> None:
    writer = TimedWriter()

    async def work() -> None:
        loop = asyncio.get_running_loop()
        limited = Limited(writer, calls_per_minute=limit)
        for _ in range(4):
            turns, pause = limited.free()
            assert turns >= 1
            assert pause == 0.0
            before = loop.time()
            await asyncio.gather(*(limited.write(PROMPT) for _ in range(turns)))
            assert loop.time() - before < 1e-3
            turns, pause = limited.free()
            assert turns == 0
            assert pause > 0.0
            await asyncio.sleep(pause * 1.001)

    simulate(work)


def test_a_call_that_fails_or_is_cancelled_gives_its_place_back() -> None:
    class Away(TimedWriter):
        async def write(self, prompt: Prompt) -> Completion:
            await asyncio.sleep(1)
            raise WriterAwayError("nobody listens")

    async def work() -> None:
        limited = Limited(Away(), 2)
        with pytest.raises(WriterAwayError):
            await limited.write(PROMPT)
        call = asyncio.ensure_future(limited.write(PROMPT))
        await asyncio.sleep(0.5)
        call.cancel()
        await asyncio.wait([call])
        assert limited.free() == (2, 0.0)

    simulate(work)


def test_it_is_called_what_its_writer_is_called() -> None:
    limited = Limited(TimedWriter())
    assert limited.name == "timed"
    assert isinstance(limited, Paced)
    assert not isinstance(TimedWriter(), Paced)


@pytest.mark.parametrize("limits", [{"concurrency": 0}, {"calls_per_minute": 0}, {"calls_per_minute": -5}])
def test_a_limit_that_lets_nothing_through_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="lets no call through"):
        Limited(TimedWriter(), **limits)
