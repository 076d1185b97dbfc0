"""The lane that has texts written: summaries and shifts (paper, section 3.3)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from liber_runtime.behavior import Domain, Item, Text
from liber_runtime.exceptions import (
    ConfigurationError,
    PromptRefusedError,
    UnusableAnswerError,
    WriterAwayError,
)
from liber_runtime.interest import PartitionPrompt
from liber_runtime.memory import Result, Step, Task
from liber_runtime.metrics import Outcome
from liber_runtime.worker.answers import checked_text, prompt_of
from liber_runtime.worker.lane import OBSERVE_SECONDS, Job, Lane, explain
from liber_runtime.writers import Paced, Writer

if TYPE_CHECKING:
    from liber_runtime.worker.session import Session

_STEPS: tuple[Step, ...] = ("summary", "shift")

_ITEMS_SECONDS = 1.0
_ITEMS_KEPT = 10_000
"""Items read are used again for so long, and so many; a worker's memory has a bound."""


class WritingLane(Lane):
    """Has each text written by a call of its own."""

    kind = "write"

    def __init__(self, session: Session, writer: Writer) -> None:
        """Takes the writer; a `Paced` one says when it can be called."""
        concurrency = session.worker.concurrency
        super().__init__(session, concurrency, concurrency, concurrency - 1)
        self._writer = writer
        self._domain: Domain | None = None
        self._items: Mapping[str, Item] = {}
        self._known: dict[str, Item] = {}
        self._emptied_at = self._counted_at = float("-inf")

    def free(self) -> tuple[int, float]:
        """See `Lane.free`."""
        return self._writer.free() if isinstance(self._writer, Paced) else super().free()

    def expired(self) -> None:
        """See `Lane.expired`."""
        self.session.worker.metrics.called("failed")

    async def claim(self, room: int) -> list[Task]:
        """See `Lane.claim`.

        Raises:
            ConfigurationError: partitions wait, and there is no description of the data set.
        """
        return await self.session.ask(self._claim, room)

    def _claim(self, room: int) -> list[Task]:
        """Claims, and reads what the prompts will name, in one go of one thread."""
        store, seconds = self.session.worker.store, self.session.worker.lease_seconds
        self._domain = store.domain
        if self._domain is None:
            self._require_nothing_waits()
            return []
        tasks = store.claim(_STEPS, room, seconds)
        self._items = self._read_items({behavior.item_id for task in tasks for behavior in task.behaviors})
        return tasks

    def _require_nothing_waits(self) -> None:
        """Without a description nothing can be prompted; that is no matter as long as nothing waits."""
        now = time.monotonic()
        if now - self._counted_at < OBSERVE_SECONDS:
            return
        self._counted_at = now
        pending = self.session.worker.store.statistics().pending
        if any(pending[step] for step in _STEPS):
            raise ConfigurationError(
                "partitions wait to be summarised, but the store has no items; ingest the item table first"
            )

    def _read_items(self, item_ids: set[str]) -> Mapping[str, Item]:
        """Items as the catalogue has them, or had them a moment ago: popular ones are in every partition."""
        now = time.monotonic()
        if now - self._emptied_at > _ITEMS_SECONDS or len(self._known) > _ITEMS_KEPT:
            self._known, self._emptied_at = {}, now
        known = self._known
        missing = item_ids - known.keys()
        if missing:
            known.update(self.session.worker.store.items(missing))
        return {item_id: known[item_id] for item_id in item_ids if item_id in known}

    def jobs(self, tasks: list[Task]) -> Iterable[tuple[Sequence[Task], Job]]:
        """See `Lane.jobs`."""
        for task in tasks:
            assert self._domain is not None
            yield (task,), partial(self._write, task, self._domain, self._items)

    async def _write(self, task: Task, domain: Domain, items: Mapping[str, Item]) -> list[Result]:
        session, away = self.session, False
        try:
            text = await self._ask_writer(prompt_of(task, domain, items))
        except Exception as error:
            if isinstance(error, UnusableAnswerError):
                session.paid(error.prompt_tokens, error.response_tokens)
            session.worker.metrics.called(_outcome(error))
            # Unless the writer is sure that nobody was called, a call may have been paid for, so it counts.
            away, refused = isinstance(error, WriterAwayError), isinstance(error, PromptRefusedError)
            return [session.failed(task, explain(error), attempted=not away, hopeless=refused)]
        finally:
            # A call that reached nobody repeats none; one that was ended in the middle may.
            if task.attempts > 1 and not away:
                session.repeated()
        session.worker.metrics.called("answered")
        session.worker.metrics.written(text)
        return [Result(task, text)]

    async def _ask_writer(self, prompt: PartitionPrompt) -> Text:
        started = time.perf_counter()
        completion = await self._writer.write(prompt)
        self.session.paid(completion.prompt_tokens, completion.response_tokens)
        return Text(
            kind=prompt.kind,
            text=checked_text(completion.text, self._writer.name),
            writer=self._writer.name,
            prompt_version=prompt.version,
            prompt_tokens=completion.prompt_tokens,
            response_tokens=completion.response_tokens,
            seconds=time.perf_counter() - started,
            made_at=time.time(),
            note=completion.note,
        )


def _outcome(error: Exception) -> Outcome:
    if isinstance(error, WriterAwayError):
        return "away"
    return "unusable" if isinstance(error, UnusableAnswerError) else "failed"
