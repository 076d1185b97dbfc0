"""Made-up behaviors and knowledge to measure a store with."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from liber_runtime.behavior import Behavior, Domain, Item, Text
from liber_runtime.interest import Prompt
from liber_runtime.memory import STEPS, MemoryStore, Representation, Result, Task
from liber_runtime.representation import Encoded
from liber_runtime.writers import Completion

DOMAIN = Domain("made-up", "thing", "points", (1.0, 5.0), 3.0, ("kind",))

ITEMS = 2000

DIMENSION = 32
"""d of the made-up vectors."""

FINGERPRINT = "of-made-up-vectors"

SUMMARY = "Made up in place of a writer's answer, and about as long as one. " * 8
SHIFT = "Made up in place of a writer's answer. " * 6

_CHUNK = 10_000
_YEAR = 31_536_000.0


class Source:
    """Behaviors of made-up users, each event once; times go on from user to user as in a log."""

    def __init__(self, seed: int) -> None:
        """Draws by `seed`."""
        self._draw = random.Random(seed)
        self._made = 0
        self._began = time.time() - _YEAR

    def behavior(self, user_id: str) -> Behavior:
        """The next behavior of a user."""
        self._made += 1
        return Behavior(
            user_id,
            f"item-{self._draw.randrange(ITEMS)}",
            float(self._draw.randint(1, 5)),
            self._began + self._made,
            f"{self._made:012d}{self._draw.getrandbits(48):012x}",
        )

    def batch(self, users: Sequence[str], size: int) -> list[Behavior]:
        """Behaviors of users drawn at random."""
        return [self.behavior(user_id) for user_id in self._draw.choices(users, k=size)]


def user_names(count: int, kind: str = "user") -> list[str]:
    """Ids of made-up users."""
    return [f"{kind}-{number}" for number in range(count)]


def catalogue() -> Iterator[Item]:
    """The made-up items."""
    return (Item(f"item-{number}", f"Thing {number}", {"kind": f"kind {number % 7}"}) for number in range(ITEMS))


def describe(store: MemoryStore, users: Sequence[str]) -> None:
    """Puts the catalogue and a short profile of each user into a store."""
    store.describe(DOMAIN, catalogue(), {user_id: {"age": 18 + len(user_id), "city": "Utrecht"} for user_id in users})


def fill(store: MemoryStore, histories: Mapping[str, int], source: Source) -> None:
    """Appends as many behaviors of each user as `histories` says, in large appends."""
    waiting: list[Behavior] = []
    for user_id, count in histories.items():
        for _ in range(count):
            waiting.append(source.behavior(user_id))
            if len(waiting) >= _CHUNK:
                store.append(waiting)
                waiting = []
    if waiting:
        store.append(waiting)


def make_knowledge(store: MemoryStore, seed: int) -> int:
    """Gives every partition made-up texts and a vector; returns how many results were kept."""
    draw = np.random.default_rng(seed)
    kept = 0
    while tasks := store.claim(STEPS, 2000, 600.0, FINGERPRINT):
        kept += store.commit([Result(task, _made(task, draw)) for task in tasks]).kept
    return kept


def _made(task: Task, draw: np.random.Generator) -> Text | Representation:
    if task.step == "representation":
        return Representation(draw.standard_normal(DIMENSION, dtype=np.float32), FINGERPRINT)
    text = SUMMARY if task.step == "summary" else SHIFT
    return Text(task.step, text, "made-up", "made-up-1", 800, 120, 0.0, time.time())


class NoopWriter:
    """A `Writer` that answers at once."""

    name = "no-op"

    async def write(self, prompt: Prompt) -> Completion:
        """See `Writer.write`."""
        return Completion(SUMMARY if prompt.kind == "summary" else SHIFT)


class NoopEncoder:
    """An `Encoder` that answers at once."""

    async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
        """See `Encoder.encode`."""
        return Encoded(np.zeros((len(texts), DIMENSION), dtype=np.float32), FINGERPRINT)

    async def fingerprint(self) -> str:
        """See `Encoder.fingerprint`."""
        return FINGERPRINT
