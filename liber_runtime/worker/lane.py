"""A lane: one kind of calls of a worker, from the claim to the commit."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from liber_runtime.exceptions import LiberError
from liber_runtime.memory import Failure, Result, Task

if TYPE_CHECKING:
    from liber_runtime.worker.session import Session

OBSERVE_SECONDS = 2.0
"""The store is not asked for its statistics more often: on a cluster they are a walk over all nodes."""

_LONGEST_AWAY_SECONDS = 10.0
"""Longest pause before it is tried again to reach somebody: an attempt costs nothing."""

Job: TypeAlias = Callable[[], Coroutine[Any, Any, list[Result]]]
"""Makes one call; its results, failures included. Raises nothing."""


@dataclass(eq=False, slots=True)
class _Call:
    """A call in flight.

    Attributes:
        tasks: what it is about, as far as their claims are still held.
        job: the call itself.
        timer: ends it if it takes too long.
    """

    tasks: Sequence[Task]
    job: asyncio.Task[list[Result]]
    timer: asyncio.TimerHandle | None = None


class Lane:
    """Claims steps of its kind, starts their calls, commits what comes back; one task of the event loop.

    Claims are held for the calls in flight, for those about to start (`most_claims` in all), and for results about to
    be committed. All of them are renewed by the session.

    Attributes:
        kind: ``write`` or ``encode``, for metrics.
        wake: set when there may be something to do.
        gave_up: why a drain leaves the lane's steps pending: nobody was reached for too long.
    """

    kind: str

    def __init__(self, session: Session, most_calls: int, most_claims: int, refill_at: int) -> None:
        """Sets the bounds.

        Args:
            session: what the lanes share.
            most_calls: in flight.
            most_claims: held.
            refill_at: claims are made when no more than this many are held.
        """
        self.session = session
        self.wake = asyncio.Event()
        self.gave_up: LiberError | None = None
        self._most_calls = most_calls
        self._most_claims = most_claims
        self._refill_at = refill_at
        self._queue: deque[tuple[Sequence[Task], Job]] = deque()
        self._calls: dict[_Call, None] = {}  # in the order they began
        self._results: list[Result] = []
        self._answers: list[Result] = []
        self._settling: list[Result] = []
        self._returned: list[Result] = []
        self._retries: list[float] = []
        self._failing = 0
        self._resume_at = 0.0
        self._looked_at = 0.0
        self._empty_at = -1
        self._claiming = False
        self._stopping: asyncio.TimerHandle | None = None

    # -- what the two kinds of lanes do in their own way ---------------------------------------------------------

    async def claim(self, room: int) -> list[Task] | None:
        """Claims up to `room` steps; None if it could not be found out whether there are any."""
        raise NotImplementedError

    def jobs(self, tasks: list[Task]) -> Iterable[tuple[Sequence[Task], Job]]:
        """Divides claimed tasks into calls."""
        raise NotImplementedError

    def free(self) -> tuple[int, float]:
        """How many steps may be claimed as far as the callee is concerned, and seconds to wait where none may."""
        return self._most_claims, 0.0

    def expired(self) -> None:
        """Told of a call that was ended because it took too long."""

    # -- the loop ------------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Works until the session closes, or is drained."""
        while True:
            self.wake.clear()
            await self._settle()
            pause = self.session.worker.idle_seconds
            if self.session.closing.is_set() or self.gave_up is not None:
                self._return_queue()
                if not (self._calls or self._results or self._returned):
                    return
            else:
                pause = min(pause, await self._fill())
                self._start()
            if not (self.session.drained() or self._results or self._returned):
                await self._wait(pause)

    async def _wait(self, seconds: float) -> None:
        due = [*self._retries, self._resume_at]
        now = time.monotonic()
        seconds = min([seconds, *(max(at - now, 0.001) for at in due if at > self._looked_at)])
        timer = asyncio.get_running_loop().call_later(seconds, self.wake.set)
        await self.wake.wait()
        timer.cancel()

    @property
    def at_rest(self) -> bool:
        """Whether there is nothing to do until another lane or another worker commits."""
        if self._claiming or self._calls or self._queue or self._results or self._settling or self._returned:
            return False
        if self.gave_up is not None:
            return True
        # A retry that was due before the last look and was not there has been taken by another worker.
        self._retries = [due for due in self._retries if due > self._looked_at]
        waiting = self._retries or self._resume_at > self._looked_at
        return not waiting and self._empty_at == self.session.texts_kept

    async def _fill(self) -> float:
        """Claims what there is room for; returns seconds until it makes sense to look again."""
        session, now = self.session, time.monotonic()
        held = len(self.held())
        if now < self._resume_at or held > self._refill_at:
            return session.worker.idle_seconds
        allowed, pause = self.free()
        room = min(self._most_claims - held, allowed)
        if room < 1:
            return pause or session.worker.idle_seconds
        texts_kept = session.texts_kept
        self._claiming = True
        try:
            tasks = await self.claim(room)
        finally:
            self._claiming = False
        if tasks is not None:
            self._looked_at = now
            self._empty_at = self._empty_at if tasks else texts_kept
            self._accept(tasks)
        return session.worker.idle_seconds

    def _accept(self, tasks: list[Task]) -> None:
        most = self.session.worker.max_attempts
        self._results += [
            self.session.failed(task, "claimed too often without an end") for task in tasks if task.attempts > most
        ]
        self._queue.extend(self.jobs([task for task in tasks if task.attempts <= most]))

    # -- calls ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Starts calls as far as there are tasks and room for more calls."""
        loop = asyncio.get_running_loop()
        while self._queue and len(self._calls) < self._most_calls and not self.session.closing.is_set():
            tasks, job = self._queue.popleft()
            call = _Call(tasks, asyncio.ensure_future(job()))
            call.timer = loop.call_later(self.session.worker.call_seconds, self._expire, call)
            call.job.add_done_callback(lambda _, call=call: self._take(call))  # type: ignore[misc]
            self._calls[call] = None

    def _take(self, call: _Call) -> None:
        """Takes the answer of a call that was not ended before."""
        if call not in self._calls:
            return
        self._end(call)
        if call.job.cancelled():
            self._returned += _given_back(call.tasks, attempted=True)
            return
        held = set(map(_key, call.tasks))
        answers = [result for result in call.job.result() if _key(result.task) in held]
        self._answers += answers
        self._results += answers

    def _expire(self, call: _Call) -> None:
        self._end(call)
        self.expired()
        error = f"no answer within {self.session.worker.call_seconds:g} s; allow more if calls take that long"
        late = [self.session.failed(task, error) for task in call.tasks]
        self._answers += late
        self._results += late

    def _end(self, call: _Call) -> None:
        """Forgets a call. One that ignores being cancelled is not waited for."""
        del self._calls[call]
        if call.timer is not None:
            call.timer.cancel()
        if not call.job.done():
            call.job.cancel()
        self.wake.set()

    def stop_calls_in(self, seconds: float) -> None:
        """Ends the calls that are still in flight after so long; 0 ends them now."""
        if self._stopping is not None:
            self._stopping.cancel()
        if seconds > 0.0:
            self._stopping = asyncio.get_running_loop().call_later(seconds, self._stop_calls)
        else:
            self._stop_calls()

    def _stop_calls(self) -> None:
        for call in list(self._calls):
            self._end(call)
            # The call may have been answered, and paid for, so it counts as an attempt.
            self._returned += _given_back(call.tasks, attempted=True)

    def held(self) -> list[Task]:
        """The tasks whose claims the lane holds."""
        tasks = [task for waiting, _ in self._queue for task in waiting]
        tasks += [task for call in self._calls for task in call.tasks]
        return tasks + [result.task for results in (self._results, self._settling) for result in results]

    def lose(self, lost: Sequence[Task]) -> int:
        """Ends the calls none of whose claims is held any more; returns how many claims of calls were lost."""
        gone, count = set(map(_key, lost)), 0
        for call in list(self._calls):
            held = [task for task in call.tasks if _key(task) not in gone]
            count += len(call.tasks) - len(held)
            call.tasks = held
            if not held:
                self._end(call)
        return count

    # -- keeping -------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Commits, in one transaction, whatever has come in."""
        answers, self._answers = self._answers, []
        self._pace(answers)
        self._settling, self._results = self._results, []
        returned, self._returned = self._returned, []
        for result in await self.session.commit(self._settling, returned):
            if isinstance(result.made, Failure) and result.made.retry_seconds is not None:
                self._retries.append(time.monotonic() + result.made.retry_seconds)
        self._settling = []

    def _pace(self, answers: Sequence[Result]) -> None:
        """Slows the lane down while nothing succeeds in it."""
        failures = [result.made for result in answers if isinstance(result.made, Failure)]
        if len(failures) < len(answers):
            self._failing, self._resume_at = 0, 0.0
        elif failures:
            away = not any(failure.attempted for failure in failures)
            self.slow_down(LiberError(failures[-1].error) if away else None)

    def slow_down(self, away: LiberError | None) -> None:
        """Pauses the lane after a round in which nothing succeeded, longer each time.

        Args:
            away: why nobody was reached, if that is why. A drain does not wait for that for ever.
        """
        self._failing += 1
        pause = self.session.delay(self._failing)
        self._resume_at = time.monotonic() + (min(pause, _LONGEST_AWAY_SECONDS) if away is not None else pause)
        if away is not None and not self.session.forever and self._failing >= self.session.worker.max_attempts:
            self.gave_up = away

    def _return_queue(self) -> None:
        """Gives back what was claimed and never called."""
        for tasks, _ in self._queue:
            self._returned += _given_back(tasks, attempted=False)
        self._queue.clear()


def explain(error: Exception) -> str:
    """Why a call failed, in one line."""
    return str(error) if isinstance(error, LiberError) else f"{type(error).__name__}: {error}"


def _given_back(tasks: Sequence[Task], attempted: bool) -> list[Result]:
    return [Result(task, Failure("the worker stopped", 0.0, attempted)) for task in tasks]


def _key(task: Task) -> tuple[str, int, str, str]:
    return task.user_id, task.number, task.step, task.claim
