"""Calls in flight, gathered into batches that a thread of its own runs one after another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from liber_runtime.exceptions import LiberError

Tokens: TypeAlias = list[int]


_CLOSED = "the language model was closed while calls waited for it"


@dataclass(eq=False, slots=True)
class Call:
    """One text to continue.

    Attributes:
        tokens: of the prompt.
        response_tokens: most tokens to write.
        abandoned: nobody waits for it any more; set while it runs, from another thread.
    """

    tokens: Tokens
    response_tokens: int
    abandoned: bool = False


class BatchTooLargeError(LiberError):
    """A batch did not fit into memory; a smaller one may."""


_Waiting: TypeAlias = tuple[Call, "asyncio.Future[Tokens]"]

Run: TypeAlias = Callable[[Sequence[Call]], Sequence[Tokens]]
"""Continues a batch, in the thread: what each call wrote. Raises BatchTooLargeError, or any other error."""


class Batches:
    """Gathers calls into batches of like length; blocks no event loop, and belongs to one until it is closed.

    A batch that does not fit into memory is halved, and no later one is larger.

    Args:
        run: continues one batch.
        batch_size: most calls of a batch.
        gather_seconds: how long a batch waits for more calls: a worker's come one by one.
    """

    def __init__(self, run: Run, batch_size: int, gather_seconds: float = 0.02) -> None:
        self.batch_size = batch_size
        self._run = run
        self._gather_seconds = gather_seconds
        self._waiting: list[_Waiting] = []
        self._running: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="liber-llm")

    async def put(self, tokens: Tokens, response_tokens: int) -> Tokens:
        """What was written; a call that is cancelled leaves its batch at the next token.

        Raises:
            LiberError: its batch failed, or was ended by `close`.
        """
        call = Call(tokens, response_tokens)
        answer: asyncio.Future[Tokens] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await answer
        finally:
            call.abandoned = True

    async def in_thread(self, function: Callable[[], object]) -> None:
        """Runs something else in the thread, between two batches."""
        await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def close(self) -> None:
        """Ends all calls; later ones, in any event loop, are taken as before."""
        _fail(self._waiting + self._running, _CLOSED)
        for call, _ in self._running:
            call.abandoned = True
        if self._worker is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
            self._worker = None

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(self._gather_seconds)
            self._waiting = [each for each in self._waiting if not each[1].done()]
            if not self._waiting:
                return
            chosen = set(choose([call for call, _ in self._waiting], self.batch_size))
            batch = [each for place, each in enumerate(self._waiting) if place in chosen]
            self._waiting = [each for place, each in enumerate(self._waiting) if place not in chosen]
            await self._continue(batch)

    async def _continue(self, batch: list[_Waiting]) -> None:
        self._running = batch
        calls = [call for call, _ in batch]
        try:
            written = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, calls)
        except BatchTooLargeError as error:
            if len(batch) == 1:
                _fail(batch, str(error))
                return
            self.batch_size = (len(batch) + 1) // 2
            self._waiting = batch + self._waiting
            return
        except LiberError as error:
            _fail(batch, str(error))
            return
        except Exception as error:  # of a library, of any kind; the next batch may do
            said = (str(error).strip().splitlines() or [""])[0]
            _fail(batch, f"the language model failed: {type(error).__name__}: {said:.300}")
            return
        finally:
            self._running = []
        for (_, answer), tokens in zip(batch, written, strict=True):
            if not answer.done():
                answer.set_result(list(tokens))


def choose(calls: Sequence[Call], size: int) -> list[int]:
    """Which calls run together: the one that waits longest, the first, and those with which the least is padding.

    Returns:
        At most `size` places in `calls`, by length.
    """
    by_length = sorted(range(len(calls)), key=lambda place: len(calls[place].tokens))
    lengths = [len(calls[place].tokens) for place in by_length]
    size, oldest = min(size, len(calls)), by_length.index(0)

    def padding(start: int) -> int:
        return size * lengths[start + size - 1] - sum(lengths[start : start + size])

    start = min(range(max(0, oldest - size + 1), min(oldest, len(calls) - size) + 1), key=padding)
    return by_length[start : start + size]


def _fail(batch: Sequence[_Waiting], reason: str) -> None:
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(LiberError(reason))
