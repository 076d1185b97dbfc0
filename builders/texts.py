"""Texts written and encoded beside a memory store, once each: those of items and of the variants of the ablation."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from builders.embedding import Pair
from liber_runtime.exceptions import ConfigurationError, LiberError, PromptRefusedError
from liber_runtime.interest import Prompt
from liber_runtime.progress import Advance, progress
from liber_runtime.representation import Encoder
from liber_runtime.worker.answers import checked_text, checked_vectors
from liber_runtime.writers import Writer, close

CALLS_IN_FLIGHT = 64
"""Of a writer without limits of its own; wrap one with a price in `liber_runtime.writers.limits.Limited`."""

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Before each further attempt at a prompt. Then its error ends the run; what was answered by then is kept."""

PAIRS_AT_ONCE = 1024
"""Pairs of texts that are encoded between two reports of progress."""


class AnswerCache:
    """A writer's answers on disk by writer, prompt version and prompt, so that none is paid for twice."""

    def __init__(self, path: Path) -> None:
        """Opens, or makes, the cache file; it belongs to the thread that opened it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path)
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS answers "
            "(writer TEXT, version TEXT, prompt BLOB, text TEXT NOT NULL, PRIMARY KEY (writer, version, prompt)) STRICT"
        )

    def get(self, writer: str, version: str, prompt: bytes) -> str | None:
        """What `writer` answered to the prompt with this digest (see `digest`), if it did."""
        read = "SELECT text FROM answers WHERE writer = ? AND version = ? AND prompt = ?"
        found = self._database.execute(read, (writer, version, prompt)).fetchone()
        return None if found is None else str(found[0])

    def put(self, writer: str, answers: Iterable[tuple[str, bytes, str]]) -> None:
        """Keeps answers, as (prompt version, prompt digest, text), durably."""
        rows = [(writer, *answer) for answer in answers]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()


def digest(prompt: Prompt) -> bytes:
    """What a prompt is known by: what an LLM reads, and what a writer may look at beside it (an item's attributes)."""
    return hashlib.blake2b(f"{prompt.text}\x1e{prompt!r}".encode(), digest_size=20).digest()


def write_prompts(title: str, prompts: Iterable[Prompt], total: int, writer: Writer, directory: Path) -> list[str]:
    """Has every prompt answered, equal ones once, and none that an earlier run had answered.

    Args:
        title: for the progress bar.
        prompts: made when they are needed and not held: thousands of long histories do not fit into memory.
        total: how many there are.
        writer: any; called from an event loop of this call's own.
        directory: keeps the answers in ``texts.db``, each as soon as it is there.

    Returns:
        The answers, one per prompt.

    Raises:
        LiberError: a prompt was not answered, or with something that is not text, and `RETRY_SECONDS` are over.
    """
    cache = AnswerCache(directory / "texts.db")
    try:
        with progress(title, total) as advance:
            return asyncio.run(_write(prompts, writer, cache, advance))
    finally:
        cache.close()


async def _write(prompts: Iterable[Prompt], writer: Writer, cache: AnswerCache, advance: Advance) -> list[str]:
    keys: list[bytes] = []
    answers: dict[bytes, str] = {}
    unanswered = _unanswered(prompts, writer.name, cache, keys, answers, advance)
    in_flight: dict[asyncio.Task[str], tuple[str, bytes]] = {}
    failure: BaseException | None = None
    try:
        while True:
            if failure is None:
                for key, prompt in itertools.islice(unanswered, CALLS_IN_FLIGHT - len(in_flight)):
                    in_flight[asyncio.ensure_future(_ask(writer, prompt))] = prompt.version, key
            if not in_flight:
                break
            done, _ = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
            asked = {task: in_flight.pop(task) for task in done}
            made = [(*asked[task], task.result()) for task in done if task.exception() is None]
            cache.put(writer.name, made)
            answers |= {key: text for _, key, text in made}
            advance(len(made))
            # The calls in flight may be paid for, so they are awaited and kept; only then does the error end the run.
            failure = failure or next((error for task in done if (error := task.exception()) is not None), None)
    finally:
        for task in in_flight:
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)
        await close(writer)
    if failure is not None:
        raise failure
    return [answers[key] for key in keys]


def _unanswered(
    prompts: Iterable[Prompt],
    writer: str,
    cache: AnswerCache,
    keys: list[bytes],
    answers: dict[bytes, str],
    advance: Advance,
) -> Iterator[tuple[bytes, Prompt]]:
    """The prompts to ask, with their digests; notes all digests in `keys`, and in `answers` what is known already."""
    met: set[bytes] = set()
    for prompt in prompts:
        key = digest(prompt)
        keys.append(key)
        if key not in met:
            met.add(key)
            found = cache.get(writer, prompt.version, key)
            if found is None:
                yield key, prompt
                continue
            answers[key] = found
        advance(1)


async def _ask(writer: Writer, prompt: Prompt) -> str:
    for seconds in (*RETRY_SECONDS, None):
        try:
            return checked_text((await writer.write(prompt)).text, writer.name)
        except (ConfigurationError, PromptRefusedError):
            raise
        except LiberError:
            if seconds is None:
                raise
            await asyncio.sleep(seconds)
    raise AssertionError("the last attempt returns or raises")


def encode_pairs(title: str, pairs: Sequence[Pair], encoder: Encoder) -> npt.NDArray[np.float32]:
    """float32[n, d], at least one pair: the vectors of (summary, shift) pairs, equal ones encoded once.

    Args:
        title: for the progress bar.
        pairs: a text without shift is ``(text, "")``.
        encoder: a `builders.embedding.CachedEncoder` of the one PCA that all variants and items share.

    Raises:
        ScoringError: the encoding server refused.
        InvalidInputError: what came back are no finite vectors of one size.
    """
    distinct = list(dict.fromkeys(pairs))
    rows: list[npt.NDArray[np.float32]] = []
    with progress(title, len(distinct)) as advance:
        for start in range(0, len(distinct), PAIRS_AT_ONCE):
            some = distinct[start : start + PAIRS_AT_ONCE]
            rows.append(checked_vectors(asyncio.run(encoder.encode(some)).vectors, len(some)))
            advance(len(some))
    row_of = {pair: row for row, pair in enumerate(distinct)}
    vectors: npt.NDArray[np.float32] = np.concatenate(rows)[[row_of[pair] for pair in pairs]]
    return vectors
