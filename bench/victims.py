"""The processes that `bench.faults` kills: ingesters and workers, each noting what it was told in a file of its own.

A note is one `os.write` to a file opened for appending, so a SIGKILL loses no note and leaves no half of one. An
ingester notes a batch after the store has acknowledged it. A worker's writer notes each call before it begins, and the
worker's store notes each result after it was kept. Times are those of the monotonic clock, which all processes of a
machine share.

What the processes make tells what it was made from: a text holds a digest of its whole prompt, a vector is made of a
digest of its two texts. So `bench.verification` can tell from the store alone whether each was made from the right
inputs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from liber_runtime.behavior import Behavior, Domain, Item
from liber_runtime.exceptions import StoreError
from liber_runtime.interest import Prompt
from liber_runtime.memory import Committed, Failure, MemoryStore, Result, open_store
from liber_runtime.representation import Encoded
from liber_runtime.worker import Worker
from liber_runtime.writers import Completion

FINGERPRINT = "of-made-up-vectors"

ITEMS = 500

DOMAIN = Domain("made-up", "thing", "points", (0.0, 1_000_000.0), 500_000.0, ("kind",))


@dataclass(frozen=True, slots=True)
class Plan:
    """What all processes of a run know.

    Attributes:
        url: of the store.
        notes: directory of the notes.
        seed: of what is sent, and of pauses.
        senders: threads of one ingester; each sends the behaviors of users of its own, because only one sender's
            order is an order.
        users: of one sender.
        partition: K.
        batch: most behaviors in one append; how many is drawn for each.
        pause_seconds: mean pause of a sender between appends.
        call_seconds: longest call of the writer; how long is drawn for each.
        concurrency: most calls in flight of one worker.
        lease_seconds: how long the steps of a killed worker wait for another.
    """

    url: str
    notes: Path
    seed: int
    senders: int = 2
    users: int = 15
    partition: int = 10
    batch: int = 8
    pause_seconds: float = 0.02
    call_seconds: float = 0.05
    concurrency: int = 8
    lease_seconds: float = 10.0

    def acknowledged(self, sender: int) -> Path:
        """Where a sender notes how many behaviors were acknowledged, one number a line."""
        return self.notes / f"sender-{sender}.acknowledged"

    def calls(self, slot: int, incarnation: int) -> Path:
        """Where one life of a worker notes its calls and what was kept of them."""
        return self.notes / f"worker-{slot}-{incarnation}.calls"


def catalogue() -> list[Item]:
    """The made-up items."""
    return [Item(f"item-{number}", f"Thing {number}") for number in range(ITEMS)]


def user_name(sender: int, number: int) -> str:
    """Id of a sender's user."""
    return f"user-{sender}-{number}"


def nth_behavior(plan: Plan, sender: int, number: int) -> Behavior:
    """What a sender sends as its `number`-th behavior, however often it begins again."""
    drawn = zlib.crc32(f"{plan.seed} {sender} {number}".encode())
    return Behavior(
        user_name(sender, drawn % plan.users),
        f"item-{drawn // 1000 % ITEMS}",
        # No two behaviors of a user are alike, so no two prompts are: a second call is told from another's first.
        float(number % 1_000_000),
        1_700_000_000.0 + number,
        f"event-{sender}-{number}",
    )


def last_acknowledged(path: Path) -> int:
    """How many of its behaviors a sender knows to be kept."""
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1]) if lines else 0


def digest(text: str) -> str:
    """Of a prompt."""
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def vector_of(summary: str, shift: str) -> npt.NDArray[np.float32]:
    """The made-up r_j: float32[8] in [0, 1), told by its two texts."""
    hashed = hashlib.blake2b(f"{summary}\n{shift}".encode(), digest_size=16).digest()
    return np.frombuffer(hashed, "<u2").astype(np.float32) / 65536


# -- ingesters ---------------------------------------------------------------------------------------------------


def ingest(plan: Plan, slot: int, incarnation: int) -> None:
    """One life of an ingester: its senders append until they are told to stop or the parent is gone."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    parent = os.getppid()
    store = _open_patiently(plan, stop)
    if store is None:
        return
    threads = [
        threading.Thread(target=_send, args=(plan, slot * plan.senders + sender, incarnation, store, stop))
        for sender in range(plan.senders)
    ]
    for thread in threads:
        thread.start()
    while not stop.wait(0.1):
        if os.getppid() != parent:
            stop.set()
    for thread in threads:
        thread.join()
    store.close()


def _send(plan: Plan, sender: int, incarnation: int, store: MemoryStore, stop: threading.Event) -> None:
    """Sends from what was not acknowledged on, and a little of what was: a sender that is not sure sends again."""
    draw = random.Random(f"{plan.seed} sender {sender} {incarnation}")
    acknowledged = last_acknowledged(plan.acknowledged(sender))
    at = max(0, acknowledged - draw.randrange(4))
    with _notes(plan.acknowledged(sender)) as notes:
        while not stop.is_set():
            size = draw.randint(1, plan.batch)
            batch = [nth_behavior(plan, sender, number) for number in range(at, at + size)]
            if _append_patiently(store, batch, stop):
                at += size
                acknowledged = max(acknowledged, at)
                _note(notes, str(acknowledged))
            stop.wait(draw.expovariate(1 / plan.pause_seconds))


def _append_patiently(store: MemoryStore, batch: Sequence[Behavior], stop: threading.Event) -> bool:
    """Repeats the same append until it is acknowledged; False if that did not come to be."""
    while True:
        try:
            store.append(batch)
        except StoreError:
            if stop.wait(0.05):
                return False
        else:
            return True


# -- workers -----------------------------------------------------------------------------------------------------


def work(plan: Plan, slot: int, incarnation: int) -> None:
    """One life of a worker: works until it is told to stop or the parent is gone; a store's failure is survived."""
    asyncio.run(_work(plan, slot, incarnation))


async def _work(plan: Plan, slot: int, incarnation: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    watching = asyncio.create_task(_watch_parent(os.getppid(), stop))
    with _notes(plan.calls(slot, incarnation)) as notes:
        while not stop.is_set():
            store: MemoryStore | None = None
            try:
                store = open_store(plan.url, create=False)
                worker = Worker(
                    cast(MemoryStore, _NotingStore(store, notes)),
                    NotingWriter(notes, plan.call_seconds, random.Random(f"{plan.seed} worker {slot} {incarnation}")),
                    DigestEncoder(),
                    concurrency=plan.concurrency,
                    lease_seconds=plan.lease_seconds,
                    idle_seconds=0.05,
                    backoff_seconds=0.1,
                    max_backoff_seconds=1.0,
                )
                await worker.run(stop)
            except StoreError:
                # The calls in flight are given up with the run: whoever claims their steps next repeats them.
                _note(notes, f"X {time.monotonic():.6f}")
                await asyncio.sleep(0.1)
            finally:
                if store is not None:
                    with contextlib.suppress(StoreError):
                        store.close()
    watching.cancel()


async def _watch_parent(parent: int, stop: asyncio.Event) -> None:
    while os.getppid() == parent:
        await asyncio.sleep(0.2)
    stop.set()


class NotingWriter:
    """A `Writer` whose text tells its prompt, and who notes each call before it begins."""

    name = "noting"

    def __init__(self, notes: int, call_seconds: float, draw: random.Random) -> None:
        """Notes into the file descriptor `notes`; a call takes up to `call_seconds`."""
        self._notes = notes
        self._call_seconds = call_seconds
        self._draw = draw

    async def write(self, prompt: Prompt) -> Completion:
        """See `Writer.write`."""
        told = digest(prompt.text)
        _note(self._notes, f"S {time.monotonic():.6f} {told}")
        await asyncio.sleep(self._draw.uniform(0.0, self._call_seconds))
        return Completion(f"{prompt.kind} {told}")


class DigestEncoder:
    """An `Encoder` whose vectors tell their texts."""

    async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
        """See `Encoder.encode`."""
        return Encoded(np.stack([vector_of(*pair) for pair in texts]), FINGERPRINT)

    async def fingerprint(self) -> str:
        """See `Encoder.fingerprint`."""
        return FINGERPRINT


class _NotingStore:
    """A store that notes each result after it was kept; all else is the store's own."""

    def __init__(self, store: MemoryStore, notes: int) -> None:
        self._store = store
        self._notes = notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, results: Sequence[Result]) -> Committed:
        committed = self._store.commit(results)
        # Of a commit that discarded some, nobody can tell which: those are noted as ended, not as kept.
        sign = "D" if committed.discarded else "K"
        now = time.monotonic()
        for result in results:
            if not isinstance(result.made, Failure):
                told = "-" if result.task.step == "representation" else str(getattr(result.made, "text", "")).split()[1]
                _note(
                    self._notes,
                    f"{sign} {now:.6f} {told} {result.task.step} {result.task.number} {result.task.user_id}",
                )
        return committed


# -- notes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _notes(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _note(descriptor: int, line: str) -> None:
    os.write(descriptor, f"{line}\n".encode())


def _open_patiently(plan: Plan, stop: threading.Event) -> MemoryStore | None:
    """Opens the store, however long that takes; None if told to stop before."""
    while True:
        try:
            return open_store(plan.url, create=False)
        except StoreError:
            if stop.wait(0.1):
                return None
