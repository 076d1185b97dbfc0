"""The lane that has texts encoded: representations (paper, section 3.4.1)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from liber_runtime.exceptions import LiberError, ScoringError
from liber_runtime.memory import Representation, Result, Step, Task
from liber_runtime.representation import Encoder
from liber_runtime.worker.answers import checked_vectors
from liber_runtime.worker.lane import Job, Lane, explain

if TYPE_CHECKING:
    from liber_runtime.worker.session import Session

_STEPS: tuple[Step, ...] = ("representation",)

CALLS_IN_FLIGHT = 2
"""One call is on its way while another is computed."""

POOLED_BATCHES = 4
"""Batches claimed at a time, those in flight included: texts of like length are found among more than one batch."""

_ATTEMPTS_TOGETHER = 2
"""A step that failed so often is encoded alone, so that it fails alone."""

_FREE_OF_CHARGE = ("UNAVAILABLE", "ABORTED")
"""Nobody was reached, or the encoder was replaced in between: neither says anything about the texts."""


class EncodingLane(Lane):
    """Has vectors made in batches, and only those that the encoder of the moment can make.

    The encoder's fingerprint is asked for before every claim that is made while no call is in flight; while calls are,
    their answers tell it. An answer of another encoding than a step wants (the server was switched in between) is not
    kept: the step is given back, unattempted, and the next claim is for what the encoder makes now.
    """

    kind = "encode"

    def __init__(self, session: Session, encoder: Encoder) -> None:
        """Takes the encoder."""
        batch = session.worker.encode_batch
        super().__init__(session, CALLS_IN_FLIGHT, POOLED_BATCHES * batch, CALLS_IN_FLIGHT * batch)
        self._encoder = encoder
        self._fingerprint = ""

    async def claim(self, room: int) -> list[Task] | None:
        """See `Lane.claim`."""
        worker = self.session.worker
        if not self._calls or not self._fingerprint:
            try:
                self._fingerprint = await self.session.unless_closing(self._encoder.fingerprint())
            except Exception as error:
                return await self._miss(error)
        if self.session.closing.is_set():
            return []
        return await self.session.ask(worker.store.claim, _STEPS, room, worker.lease_seconds, self._fingerprint)

    async def _miss(self, error: Exception) -> list[Task] | None:
        """Without a fingerprint nothing can be claimed, which is a failure if anything waits."""
        statistics = await self.session.ask(self.session.worker.store.statistics)
        if not any(statistics.pending[step] for step in _STEPS):
            return []
        self.session.failed_to_reach(explain(error))
        self.slow_down(error if isinstance(error, LiberError) else LiberError(explain(error)))
        return None

    def jobs(self, tasks: list[Task]) -> Iterable[tuple[Sequence[Task], Job]]:
        """See `Lane.jobs`. Texts of like length together, which spares padding."""
        most = min(_ATTEMPTS_TOGETHER, self.session.worker.max_attempts - 1)
        together = sorted((task for task in tasks if task.attempts <= max(most, 1)), key=_length)
        size = self.session.worker.encode_batch
        batches = [together[start : start + size] for start in range(0, len(together), size)]
        batches += [[task] for task in tasks if task.attempts > max(most, 1)]
        for batch in batches:
            yield batch, partial(self._encode, batch)

    async def _encode(self, tasks: Sequence[Task]) -> list[Result]:
        started = time.perf_counter()
        try:
            encoded = await self._encoder.encode([(task.summary, task.shift) for task in tasks])
            vectors = checked_vectors(encoded.vectors, len(tasks))
        except Exception as error:
            attempted = not (isinstance(error, ScoringError) and error.status in _FREE_OF_CHARGE)
            return [self.session.failed(task, explain(error), attempted) for task in tasks]
        self.session.worker.metrics.encoded(time.perf_counter() - started)
        self._fingerprint = encoded.fingerprint
        return [
            Result(task, Representation(vector, encoded.fingerprint))
            if task.fingerprint in ("", encoded.fingerprint)
            else self._switched(task, encoded.fingerprint)
            for task, vector in zip(tasks, vectors, strict=True)
        ]

    def _switched(self, task: Task, fingerprint: str) -> Result:
        error = (
            f"the encoder makes vectors of {fingerprint} now, not of {task.fingerprint}; they are left to one that does"
        )
        return self.session.failed(task, error, attempted=False)


def _length(task: Task) -> int:
    return len(task.summary) + len(task.shift)
