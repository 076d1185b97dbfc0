from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from builders import texts
from builders.catalogue import embed_items, write_items
from builders.datasets import Dataset, sample, stored
from builders.texts import CALLS_IN_FLIGHT, encode_pairs, write_prompts
from liber_runtime.behavior import Item
from liber_runtime.exceptions import (
    ConfigurationError,
    InvalidInputError,
    LiberError,
    UnusableAnswerError,
    WriterAwayError,
)
from liber_runtime.interest import ItemPrompt, Prompt, SummaryPrompt
from liber_runtime.memory.sqlite import SQLiteStore
from liber_runtime.partition import Count
from liber_runtime.representation import Encoded
from liber_runtime.vocabulary import Field, Vocabulary
from liber_runtime.writers import Completion
from liber_runtime.writers.statistical import StatisticalWriter

ITEMS = {f"i{number}": Item(f"i{number}", f"Film {number}", {"genres": ("Drama",)}) for number in range(100)}
CATALOGUE = Dataset(sample.DOMAIN, [], ITEMS, {})


def vocabulary_of(*items: str) -> Vocabulary:
    return Vocabulary(items=items, user_fields=(), item_fields=(), feedback=Field(name="feedback", kind="number"))


class TitleWriter:
    """Answers with the item's title; some titles bring errors, each once for every time they are in `errors`."""

    def __init__(self, name: str = "title", errors: Sequence[tuple[str, Exception]] = ()) -> None:
        self.name = name
        self.errors = list(errors)
        self.asked: list[str] = []
        self.running = self.most_running = 0

    async def write(self, prompt: Prompt) -> Completion:
        assert isinstance(prompt, ItemPrompt)
        title = prompt.item.title
        self.asked.append(title)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        for entry in self.errors:
            if entry[0] == title:
                self.errors.remove(entry)
                raise entry[1]
        return Completion(f" about {title}\n")


class HashEncoder:
    """Three numbers that tell pairs of texts apart."""

    def __init__(self) -> None:
        self.encoded: list[tuple[str, str]] = []

    async def fingerprint(self) -> str:
        return "hash"

    async def encode(self, pairs: Sequence[tuple[str, str]]) -> Encoded:
        self.encoded += pairs
        rows = [hashlib.blake2b(repr(pair).encode(), digest_size=3).digest() for pair in pairs]
        return Encoded(np.array([list(row) for row in rows], dtype=np.float32), "hash")


def item_prompts(*items: Item) -> list[Prompt]:
    return [ItemPrompt(sample.DOMAIN, item) for item in items]


def ask(writer: TitleWriter, directory: Path, *items: Item) -> list[str]:
    return write_prompts("write", item_prompts(*items), len(items), writer, directory)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "RETRY_SECONDS", (0.0, 0.0))


def test_equal_prompts_are_answered_once_and_never_again(tmp_path: Path) -> None:
    ran, heat = Item("1", "Ran"), Item("2", "Heat")
    first, second = TitleWriter(), TitleWriter()
    assert ask(first, tmp_path, ran, heat, ran) == ["about Ran", "about Heat", "about Ran"]
    assert sorted(first.asked) == ["Heat", "Ran"]
    assert ask(second, tmp_path, heat, Item("3", "Big"), ran) == ["about Heat", "about Big", "about Ran"]
    assert second.asked == ["Big"]


def test_writers_do_not_read_each_others_answers(tmp_path: Path) -> None:
    ask(TitleWriter(), tmp_path, Item("1", "Ran"))
    other = TitleWriter("other")
    ask(other, tmp_path, Item("1", "Ran"))
    assert other.asked == ["Ran"]


def test_prompts_that_read_alike_but_tell_a_writer_more_are_two(tmp_path: Path) -> None:
    prompts = [
        SummaryPrompt(sample.DOMAIN, {}, ((Item("1", "Ran", {"genres": (genre,)}), 5.0),)) for genre in ("War", "Drama")
    ]
    assert prompts[0].text == prompts[1].text
    war, drama = write_prompts("write", prompts, 2, StatisticalWriter(), tmp_path)
    assert "War" in war
    assert "Drama" in drama


def test_calls_in_flight_are_bounded(tmp_path: Path) -> None:
    writer = TitleWriter()
    ask(writer, tmp_path, *ITEMS.values())
    assert 1 < writer.most_running <= CALLS_IN_FLIGHT < len(ITEMS)


def test_what_was_answered_before_an_error_is_kept(tmp_path: Path) -> None:
    broken = TitleWriter(errors=[("Film 5", ConfigurationError("no key"))])
    with pytest.raises(ConfigurationError, match="no key"):
        ask(broken, tmp_path, *ITEMS.values())
    # The error stops further calls, and those in flight are awaited.
    assert broken.asked == [f"Film {number}" for number in range(CALLS_IN_FLIGHT)]
    again = TitleWriter()
    ask(again, tmp_path, *ITEMS.values())
    assert set(again.asked) == {f"Film {number}" for number in range(100)} - set(broken.asked) | {"Film 5"}


@pytest.mark.usefixtures("patient")
def test_a_call_that_failed_is_tried_again_but_not_for_ever(tmp_path: Path) -> None:
    twice = TitleWriter(errors=[("Ran", WriterAwayError("away")), ("Ran", LiberError("busy"))])
    assert ask(twice, tmp_path, Item("1", "Ran")) == ["about Ran"]
    assert len(twice.asked) == 3
    thrice = TitleWriter("thrice", [("Ran", LiberError("busy"))] * 3)
    with pytest.raises(LiberError, match="busy"):
        ask(thrice, tmp_path, Item("1", "Ran"))


@pytest.mark.usefixtures("patient")
def test_an_answer_that_is_no_text_is_refused(tmp_path: Path) -> None:
    class Mute(TitleWriter):
        async def write(self, prompt: Prompt) -> Completion:
            return Completion("  ")

    with pytest.raises(UnusableAnswerError, match="'mute' answered with nothing"):
        ask(Mute("mute"), tmp_path, Item("1", "Ran"))


def test_every_item_has_its_text_and_is_paid_for_once(tmp_path: Path) -> None:
    writer = TitleWriter()
    assert write_items(CATALOGUE, writer, tmp_path)["i7"] == "about Film 7"
    assert write_items(CATALOGUE, writer, tmp_path).keys() == ITEMS.keys()
    assert len(writer.asked) == len(ITEMS)


def test_items_read_back_from_a_store_need_no_text_of_their_own(tmp_path: Path) -> None:
    generated = sample.generate(seed=5, users=4, items=30, behaviors=80)
    store = SQLiteStore(tmp_path / "memory.db", Count(20))
    store.describe(generated.domain, generated.items.values(), generated.profiles)
    store.append(generated.behaviors)
    write_items(generated, TitleWriter(), tmp_path)
    again = TitleWriter()
    assert len(write_items(stored.load(store, tuple(generated.items)), again, tmp_path)) == 30
    assert again.asked == []
    store.close()


def test_item_vectors_are_in_the_order_of_the_vocabulary() -> None:
    encoder = HashEncoder()
    table = embed_items({"a": "one", "b": "two", "c": "one", "x": "no row"}, vocabulary_of("c", "?", "b", "a"), encoder)
    one, two = (asyncio.run(HashEncoder().encode([(text, "")])).vectors[0] for text in ("one", "two"))
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, [[0, 0, 0], one, [0, 0, 0], two, one])
    assert encoder.encoded == [("one", ""), ("two", "")]


def test_a_vocabulary_without_any_text_is_named() -> None:
    with pytest.raises(InvalidInputError, match="none of the vocabulary's 2 items has a text"):
        embed_items({"x": "one"}, vocabulary_of("a", "b"), HashEncoder())


def test_pairs_are_encoded_in_parts_and_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PAIRS_AT_ONCE", 4)
    pairs = [(f"summary {number % 6}", "") for number in range(9)]
    vectors = encode_pairs("encode", pairs, HashEncoder())
    np.testing.assert_array_equal(vectors, asyncio.run(HashEncoder().encode(pairs)).vectors)


def test_vectors_that_are_not_finite_are_refused() -> None:
    class Broken(HashEncoder):
        async def encode(self, pairs: Sequence[tuple[str, str]]) -> Encoded:
            return Encoded(np.full((len(pairs), 3), np.nan, dtype=np.float32), "hash")

    with pytest.raises(InvalidInputError, match="not finite"):
        encode_pairs("encode", [("summary", "")], Broken())
