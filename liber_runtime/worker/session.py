"""One run or drain of a worker: its lanes, its claims kept alive, its dealings with the store, its counts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from liber_runtime.exceptions import InvalidInputError, StoreError
from liber_runtime.memory import Committed, Failure, Result, Step, Task
from liber_runtime.worker.encoding import EncodingLane
from liber_runtime.worker.lane import OBSERVE_SECONDS, Lane
from liber_runtime.worker.writing import WritingLane

if TYPE_CHECKING:
    from liber_runtime.worker import Worker

TELL_SECONDS = 0.5

_LONGEST_STORE_PAUSE_SECONDS = 5.0
_THREADS = 6
"""Each lane has one store call at a time, the heartbeat and the statistics one each; the rest is room."""

P = ParamSpec("P")
R = TypeVar("R")


class Session:
    """What the lanes of a running worker share.

    Attributes:
        worker: its settings.
        counts: kept results by step, ``failed``, ``dead``, ``discarded``, ``lost``, ``repeated``, ``prompt_tokens`` and
            ``response_tokens``.
        cost: of these tokens.
        error: the newest failure, in one line.
        pending: the queue when it was last looked at.
        forever: True for a run, False for a drain.
        texts_kept: how often texts were committed: each may have made other steps ready.
        closing: set once no more steps are to be claimed.
    """

    def __init__(self, worker: Worker, forever: bool) -> None:
        self.worker = worker
        self.forever = forever
        self.counts: Counter[str] = Counter()
        self.cost = 0.0
        self.error = ""
        self.pending: Mapping[Step, int] = {}
        self.texts_kept = 0
        self.closing = asyncio.Event()
        self._started = time.monotonic()
        self._ended = asyncio.Event()
        self._patience_ends = float("inf")
        # Threads of its own: a writer that fills the loop's default ones shall not hold up the heartbeat.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="liber-store")
        self._lanes: list[Lane] = []
        if worker.writer is not None:
            self._lanes.append(WritingLane(self, worker.writer))
        if worker.encoder is not None:
            self._lanes.append(EncodingLane(self, worker.encoder))

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    async def work(self, stop: asyncio.Event, tell: Callable[[], None]) -> None:
        """Works until stopped, or drained. Nothing is left claimed, whatever ends it, if the store can be reached.

        Args:
            stop: ends the work within the worker's `stop_seconds`.
            tell: called about twice a second, and at the end.
        """
        lanes = [asyncio.ensure_future(lane.work()) for lane in self._lanes]
        working = asyncio.gather(*lanes)
        stopping = asyncio.ensure_future(self._await(stop))
        background = [asyncio.ensure_future(self._keep_claims()), asyncio.ensure_future(self._observe(tell))]
        try:
            parts: list[asyncio.Future[Any]] = [working, *background]
            ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in ended:
                part.result()
        finally:
            self.close(0.0)
            stopping.cancel()
            # A lane that failed with the store leaves its claims to expire; the others give theirs back.
            await asyncio.wait(lanes)
            self._ended.set()
            await asyncio.gather(working, *background, return_exceptions=True)
            await self._look_at_queue()
            self._threads.shutdown()
        tell()
        for lane in self._lanes:
            if lane.gave_up is not None:
                raise lane.gave_up

    def close(self, seconds: float) -> None:
        """Lets no lane claim any more, and ends the calls that are still in flight after so long."""
        self.closing.set()
        self._patience_ends = min(self._patience_ends, time.monotonic() + seconds)
        for lane in self._lanes:
            lane.wake.set()
            lane.stop_calls_in(seconds)

    async def unless_closing(self, answer: Coroutine[Any, Any, str]) -> str:
        """Awaits an answer for as long as a call may take and the session is open.

        Raises:
            asyncio.TimeoutError: the call takes too long.
        """
        asked, closing = asyncio.ensure_future(answer), asyncio.ensure_future(self.closing.wait())
        await asyncio.wait([asked, closing], timeout=self.worker.call_seconds, return_when=asyncio.FIRST_COMPLETED)
        closing.cancel()
        if asked.done():
            return asked.result()
        asked.cancel()
        if self.closing.is_set():
            return ""
        raise asyncio.TimeoutError

    def drained(self) -> bool:
        """Whether a drain has come to its end; tells the other lanes if so."""
        if self.forever or not all(lane.at_rest for lane in self._lanes):
            return False
        self.close(0.0)
        return True

    async def _await(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.close(self.worker.stop_seconds)

    # -- the store -----------------------------------------------------------------------------------------------

    async def ask(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the store in a thread, again and again while it fails, as long as the worker's patience lasts.

        Every method that a worker calls may be repeated: a claim that was made but not answered expires, and a commit
        that was made but not answered finds its claims gone.

        Raises:
            StoreError: the store failed for too long.
        """
        loop = asyncio.get_running_loop()
        ends, pause = 0.0, self.worker.backoff_seconds / 4
        while True:
            try:
                return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))
            except StoreError as error:
                now = time.monotonic()
                ends = ends or now + self.worker.store_patience_seconds
                if now + pause >= min(ends, self._patience_ends):
                    raise
                self.error = f"the store failed and is tried again: {error}"
                self.worker.metrics.store_failed()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_STORE_PAUSE_SECONDS)

    async def commit(self, results: Sequence[Result], returned: Sequence[Result] = ()) -> Sequence[Result]:
        """Commits what calls gave, failures included, at once.

        Args:
            results: of calls; counted.
            returned: of steps that are given back for no fault of theirs; not counted.

        Returns:
            `results`, with failures in the place of those that the store cannot take.
        """
        together = [*results, *returned]
        if not together:
            return results
        try:
            committed = await self.ask(self.worker.store.commit, together)
        except InvalidInputError as error:
            return await self._commit_apart(results, returned, error)
        self._count(results, committed)
        return results

    async def _commit_apart(
        self, results: Sequence[Result], returned: Sequence[Result], error: Exception
    ) -> Sequence[Result]:
        """One result that the store cannot take shall not take the others along."""
        if all(isinstance(result.made, Failure) for result in results):
            raise error
        await self.commit((), returned)
        if len(results) > 1:
            return [taken for result in results for taken in await self.commit([result])]
        return await self.commit([self.failed(results[0].task, str(error))])

    def failed(self, task: Task, error: str, attempted: bool = True, hopeless: bool = False) -> Result:
        """A failure as the store takes it: tried again later, or given up."""
        if not attempted:
            retry: float | None = 0.0  # the lane's own pause is enough; the step is for whoever comes first
        elif hopeless or task.attempts >= self.worker.max_attempts:
            retry = None
        else:
            retry = self.delay(task.attempts)
        return Result(task, Failure(error, retry, attempted))

    def delay(self, attempts: int) -> float:
        """Seconds before a step is tried again."""
        # The exponent is bounded because a float is not.
        return min(self.worker.backoff_seconds * 2.0 ** min(attempts - 1, 30), self.worker.max_backoff_seconds)

    def repeated(self) -> None:
        """Counts a writer's call that an earlier claim may have made already."""
        self.counts["repeated"] += 1
        self.worker.metrics.repeated()

    def paid(self, prompt_tokens: int | None, response_tokens: int | None) -> None:
        """Counts the tokens of one call that was answered, well or not."""
        read, written = prompt_tokens or 0, response_tokens or 0
        self.counts["prompt_tokens"] += read
        self.counts["response_tokens"] += written
        self.worker.metrics.paid(read, written)
        price = self.worker.price
        if price is not None:
            cost = price.of(read, written)
            self.cost += cost
            self.worker.metrics.spent(price.currency, cost)

    def failed_to_reach(self, error: str) -> None:
        """Counts a failure that is of no step."""
        self.counts["failed"] += 1
        self.error = error

    def _count(self, results: Sequence[Result], committed: Committed) -> None:
        metrics = self.worker.metrics
        made: Counter[Step] = Counter()
        for result in results:
            if isinstance(result.made, Failure):
                dead = result.made.retry_seconds is None
                self.counts["failed"] += 1
                self.counts["dead"] += dead
                self.error = result.made.error
                metrics.failed(result.task.step, dead)
            else:
                made[result.task.step] += 1
        # The store says how many were late, not which: with steps of two kinds in one commit the division is a guess.
        late = committed.discarded
        self.counts["discarded"] += late
        metrics.discarded(late)
        for step, count in made.items():
            kept = max(count - late, 0)
            late -= count - kept
            self.counts[step] += kept
            metrics.kept(step, kept)
            if step != "representation":
                self.texts_kept += 1
                for lane in self._lanes:
                    lane.wake.set()

    # -- beside the lanes ----------------------------------------------------------------------------------------

    async def _keep_claims(self) -> None:
        """The heartbeat: renews the claims held, and ends the calls of those found lost."""
        store, seconds = self.worker.store, self.worker.lease_seconds
        while not await self._has_ended(seconds / 3):
            held = [task for lane in self._lanes for task in lane.held()]
            if held:
                lost = await self.ask(store.renew, held, seconds)
                self.worker.metrics.renewed(len(held) - len(lost))
                ended = sum(lane.lose(lost) for lane in self._lanes) if lost else 0
                self.counts["lost"] += ended
                self.worker.metrics.lost(ended)

    async def _observe(self, tell: Callable[[], None]) -> None:
        observed = -OBSERVE_SECONDS
        while not await self._has_ended(TELL_SECONDS):
            for lane in self._lanes:
                self.worker.metrics.held(lane.kind, len(lane.held()))
            if self.seconds - observed >= OBSERVE_SECONDS:
                await self._look_at_queue()
                observed = self.seconds
            tell()

    async def _look_at_queue(self) -> None:
        """Refreshes `pending`; a store that fails just now is no reason to stop."""
        try:
            statistics = await asyncio.get_running_loop().run_in_executor(self._threads, self.worker.store.statistics)
        except StoreError as error:
            self.error = str(error)
            return
        self.pending = statistics.pending
        self.worker.metrics.observed(statistics)

    async def _has_ended(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._ended.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True
