"""What of an answer is knowledge."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liber_runtime.writers.answering import Answer, find_loop, read_answer

KNOWLEDGE = """1. Genre: prefers war films and dramas (Ran, Platoon: 5 stars), avoids horror (Alien: 1 star).
2. Director/actors: two films by Oliver Stone were liked; nothing is known of others.
3. Mood/tone: serious and slow films are preferred over light ones; comedies got two and three stars.
4. Period: mostly the nineteen eighties, without a clear preference for earlier or later years."""


def test_knowledge_is_left_as_it_is() -> None:
    assert read_answer(f"\n {KNOWLEDGE}\n\n", cut_off=False) == Answer(KNOWLEDGE)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"<think>The user liked...\nhmm</think>\n{KNOWLEDGE}", KNOWLEDGE),
        (f"```text\n{KNOWLEDGE}\n```", KNOWLEDGE),
        (f"{KNOWLEDGE}</s>", KNOWLEDGE),
        (f"<|assistant|>{KNOWLEDGE}<|im_end|>", KNOWLEDGE),
        ("likes\x1b[31m war\x00 films\u202e", "likes[31m war films"),
        ("one\n\n\n\n\ntwo   \n", "one\n\ntwo"),
        ("genre:\twar", "genre: war"),
    ],
)
def test_what_is_no_knowledge_is_taken_out(text: str, kept: str) -> None:
    assert read_answer(text, cut_off=False) == Answer(kept)


@pytest.mark.parametrize("text", ["", " \n\t", "</s>", "<think>I wonder", "<|im_end|>", "\x00\x01"])
def test_nothing_is_no_knowledge(text: str) -> None:
    reason = read_answer(text, cut_off=False)
    assert isinstance(reason, str)
    assert reason.startswith("with nothing")


@pytest.mark.parametrize(
    "text",
    [
        KNOWLEDGE + "\nThe user likes war films." * 12,
        "and " * 60,
        "likes drama. " * 9,
        "\n".join(f"{n}. likes dramas and war films a lot" for n in range(40)),
    ],
)
def test_a_loop_is_no_knowledge(text: str) -> None:
    reason = read_answer(text, cut_off=True)
    assert isinstance(reason, str)
    assert reason.startswith("with a loop: ")


@pytest.mark.parametrize(
    "text", [KNOWLEDGE, "Prefers dramas.\n----------------------------------", "no no no", "a" * 50]
)
def test_what_repeats_a_little_is_no_loop(text: str) -> None:
    assert find_loop(text) == ""


@given(st.lists(st.text("abcdefgh", min_size=2, max_size=9), min_size=40, max_size=200, unique=True))
def test_a_text_of_different_words_is_no_loop(words: list[str]) -> None:
    assert find_loop(" ".join(words)) == ""


@given(st.text(st.characters(categories=("Ll", "Lu")), min_size=2, max_size=60).filter(lambda t: len(set(t)) > 1))
def test_any_unit_without_end_is_a_loop(unit: str) -> None:
    assert find_loop(KNOWLEDGE + f" {unit}" * 30)


def test_an_answer_that_was_cut_off_ends_with_a_whole_sentence_and_says_so() -> None:
    answer = read_answer(KNOWLEDGE + "\n5. Price: the person would rather", cut_off=True)
    assert isinstance(answer, Answer)
    assert answer.text == KNOWLEDGE
    assert "cut off" in answer.note


def test_one_long_unfinished_sentence_keeps_its_whole_words() -> None:
    answer = read_answer("Likes films that are slow and seri", cut_off=True)
    assert isinstance(answer, Answer)
    assert answer.text == "Likes films that are slow and"


@given(st.text(max_size=400), st.booleans())
def test_an_answer_is_never_longer_and_always_printable(text: str, cut_off: bool) -> None:
    answer = read_answer(text, cut_off)
    if isinstance(answer, Answer):
        assert 0 < len(answer.text) <= len(text)
        assert all(character == "\n" or character.isprintable() for character in answer.text)
