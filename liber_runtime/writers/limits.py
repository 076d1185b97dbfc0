"""Limits around a writer: what its server, or its price, allows."""

from __future__ import annotations

import asyncio

from aiolimiter import AsyncLimiter

from liber_runtime.exceptions import ConfigurationError
from liber_runtime.interest import Prompt
from liber_runtime.writers import Completion, Writer, close

_BURSTS_PER_MINUTE = 600
"""Calls of the same tenth of a second may begin together; below 1,200 calls a minute they are spaced evenly."""


class Limited:
    """A writer that begins at most so many calls in any minute and has at most so many in flight.

    A call beyond the limits waits for its turn. A worker does not let it come to that: it claims no more steps than
    `free` says, so that no claim is held for a call that has not begun. The limits are this object's: of several
    workers, each has its share.

    An instance belongs to one event loop.

    Args:
        writer: what is called.
        concurrency: most calls in flight; None for no limit.
        calls_per_minute: most calls begun in any 60 seconds; None for no limit.

    Raises:
        ConfigurationError: a limit below 1.
    """

    def __init__(self, writer: Writer, concurrency: int | None = None, calls_per_minute: int | None = None) -> None:
        for limit, name in ((concurrency, "concurrency"), (calls_per_minute, "calls per minute")):
            if limit is not None and limit < 1:
                raise ConfigurationError(f"{name} {limit} lets no call through; give at least 1, or none for no limit")
        self._writer = writer
        self._slots = concurrency
        self._in_flight = 0
        self._slot = asyncio.Semaphore(concurrency) if concurrency is not None else None
        self._rate: AsyncLimiter | None = None
        self._began = float("-inf")
        if calls_per_minute is not None:
            # A bucket of b calls that leaks r calls a second lets less than b + 60 r + 1 through in a minute.
            self._burst = max(1, calls_per_minute // _BURSTS_PER_MINUTE)
            self._interval = 60.0 / (calls_per_minute - self._burst + 1)
            self._rate = AsyncLimiter(self._burst, self._burst * self._interval)

    @property
    def name(self) -> str:
        """That of the writer."""
        return self._writer.name

    async def write(self, prompt: Prompt) -> Completion:
        """See `Writer.write`; waits until the limits allow the call."""
        if self._slot is None:
            return await self._write(prompt)
        async with self._slot:
            return await self._write(prompt)

    async def _write(self, prompt: Prompt) -> Completion:
        self._in_flight += 1
        try:
            if self._rate is not None:
                await self._rate.acquire()
                self._began = asyncio.get_running_loop().time()
            return await self._writer.write(prompt)
        finally:
            self._in_flight -= 1

    async def close(self) -> None:
        """Closes the writer."""
        await close(self._writer)

    def free(self) -> tuple[int, float]:
        """See `Paced.free`."""
        slots = self._slots - self._in_flight if self._slots is not None else _MANY
        if self._rate is None:
            return slots, 0.0
        turns = next((count for count in range(self._burst, 0, -1) if self._rate.has_capacity(count)), 0)
        if turns:
            return min(slots, turns), 0.0
        return 0, max(self._began + self._interval - asyncio.get_running_loop().time(), 0.001)


_MANY = 2**31
