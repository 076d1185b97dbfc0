"""What of an LLM's answer is knowledge: cleaned, bounded, no loop."""

from __future__ import annotations

import re
from dataclasses import dataclass

LOOP_WORDS = 40
"""Shorter answers are not looked at for loops: few words repeat by themselves."""

LOOP_SHARE = 0.4
"""A text whose distinct runs of four words are a smaller share is a loop; lists of preferences have 0.8 or so."""

_RUN_WORDS = 4
_LONGEST_PERIOD = 200
_PERIODS = 8
_REASONING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>", re.IGNORECASE)
_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<!^\d)(?<!^\d\d)[.!?。！？]['\")\]]?(?=\s)|\n", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class Answer:
    """A usable answer.

    Attributes:
        text: the knowledge.
        note: what is wrong with it; empty if nothing is.
    """

    text: str
    note: str = ""


def read_answer(text: str, cut_off: bool) -> Answer | str:
    """An answer cleaned of what is no knowledge, or why there is none in it.

    Args:
        text: what the LLM wrote.
        cut_off: it had more to say and was not allowed to; the unfinished sentence at the end is dropped.

    Returns:
        The answer, or in words what is wrong: it is empty, or goes round in a loop.
    """
    cleaned = _clean(text)
    if not cleaned:
        return "with nothing" if not text.strip() else f"with nothing but markup: {text.strip()!r:.80}"
    loop = find_loop(cleaned)
    if loop:
        return f"with a loop: {loop!r:.80} again and again"
    if not cut_off:
        return Answer(cleaned)
    return Answer(_whole_sentences(cleaned), "the answer was cut off at the most tokens allowed")


def find_loop(text: str) -> str:
    """What a text repeats without end, as models do that lost their thread; empty if it does not."""
    for period in range(1, min(_LONGEST_PERIOD, len(text) // _PERIODS) + 1):
        if text.endswith(text[-period:] * _PERIODS) and len(set(text[-period:])) > 1:
            return text[-period:].strip()
    words = _WORD.findall(text)  # without numbers, which count on while the rest repeats
    if len(words) < LOOP_WORDS:
        return ""
    runs = [" ".join(words[start : start + _RUN_WORDS]) for start in range(len(words) - _RUN_WORDS + 1)]
    if len(set(runs)) >= LOOP_SHARE * len(runs):
        return ""
    return max(set(runs), key=runs.count)


def _clean(text: str) -> str:
    text = _SPECIAL.sub("", _REASONING.sub("", text)).strip()
    fenced = _FENCE.match(text)
    if fenced is not None:
        text = fenced[1]
    text = text.replace("\t", " ")
    text = "".join(character for character in text if character == "\n" or character.isprintable())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


def _whole_sentences(text: str) -> str:
    """`text` up to its last whole sentence or line, or word if it would lose more than half."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if ends and ends[-1] >= len(text) / 2:
        return text[: ends[-1]].strip()
    return (text.rsplit(maxsplit=1)[0] if " " in text else text).strip()
