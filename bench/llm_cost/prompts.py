"""The prompts of the ablation's variants: how many tokens each has, and some of them to have answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from builders.datasets import Dataset
from builders.replay import Samples
from builders.variants import Plan
from liber_runtime.behavior import Attributes, Item
from liber_runtime.interest import ShiftPrompt, SummaryPrompt
from liber_runtime.writers.tokens import TokenCount

Tokens = npt.NDArray[np.int64]

COMPARED = 200
"""Prompts whose tokens, counted by lines, are compared with those of the whole text."""


@dataclass(frozen=True)
class Counted:
    """Tokens of summary prompts.

    Attributes:
        tokens: int64[n], of each prompt that was counted.
        rows: int64[n], their rows in the plan.
        is_complete: all of the plan's were counted; else a sample, because the tokenizer joins what stands on two
            lines.
    """

    tokens: Tokens
    rows: Tokens
    is_complete: bool


class Prompts:
    """The prompts that a plan's texts are written from, as a worker would make them.

    A tokenizer that never joins two lines gives a prompt the tokens of its lines. Llama 2's is one: it has no piece
    with a line break in it. So each behavior's line is counted once, and a prompt is a sum; for thousands of prompts of
    a hundred lines that is seconds instead of minutes. `count_summaries` compares some of them with the whole texts.

    Args:
        dataset: that `samples` were made of.
        samples: of the whole log.
        count: the LLM's tokenizer.
        seed: of what is drawn.
    """

    def __init__(self, dataset: Dataset, samples: Samples, count: TokenCount, seed: int) -> None:
        self._dataset = dataset
        self._samples = samples
        self._count = count
        self._seed = seed
        lines, persons = self._count_lines()
        self._line_ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lines)])
        self._persons = persons
        self.tokens_per_behavior = float(lines.mean())
        """Of a line of the history."""

    def summary(self, plan: Plan, row: int) -> SummaryPrompt:
        """prompt_s of a text of the plan."""
        user = plan.user[row]
        begin = self._samples.offsets[user]
        places = self._samples.sequence_behavior[begin + plan.first[row] : begin + plan.end[row]]
        return self._prompt(self._samples.user_ids[user], [self._entry(place) for place in places.tolist()])

    def shift(self, earlier: str, later: str) -> ShiftPrompt:
        """prompt_c of two texts."""
        return ShiftPrompt(self._dataset.domain, earlier, later)

    def prefix_tokens(self) -> Mapping[str, int]:
        """By kind, of the fixed text that all prompts of the kind begin with."""
        return {
            "summary": self._count(SummaryPrompt(self._dataset.domain, {}, ()).prefix),
            "shift": self._count(ShiftPrompt(self._dataset.domain, "", "").prefix),
        }

    def count_summaries(self, plan: Plan, sample: int) -> Counted:
        """Tokens of all summary prompts of a plan, or of `sample` drawn ones if lines do not add up."""
        everything = np.arange(len(plan.user), dtype=np.int64)
        begin = self._samples.offsets[plan.user]
        lines = self._line_ends[begin + plan.end] - self._line_ends[begin + plan.first]
        tokens: Tokens = lines + self._persons[plan.user]
        compared = self.draw(everything, COMPARED)
        if self._count_whole(plan, compared) == tokens[compared].tolist():
            return Counted(tokens, everything, is_complete=True)
        drawn = self.draw(everything, sample)
        return Counted(np.array(self._count_whole(plan, drawn), dtype=np.int64), drawn, is_complete=False)

    def draw(self, rows: Tokens, most: int) -> Tokens:
        """int64[n]: at most so many of `rows` int64[R], in order, each once."""
        if len(rows) <= most:
            return rows
        return np.sort(np.random.default_rng(self._seed).choice(rows, most, replace=False))

    def _count_whole(self, plan: Plan, rows: Tokens) -> list[int]:
        return [self._count(self.summary(plan, row).text) for row in rows.tolist()]

    def _count_lines(self) -> tuple[Tokens, Tokens]:
        """int64[N], of the line of each behavior in the sequences; int64[users], of all else in a user's prompts."""
        known: dict[tuple[str, float], int] = {}
        lines: list[int] = []
        for place in self._samples.sequence_behavior.tolist():
            behavior = self._dataset.behaviors[place]
            key = behavior.item_id, behavior.feedback
            if key not in known:
                known[key] = self._count_line(self._entry(place))
            lines.append(known[key])
        any_entry = self._entry(0)
        of_entry = self._count_line(any_entry)
        persons = [
            self._count(self._prompt(user_id, [any_entry]).text) - of_entry for user_id in self._samples.user_ids
        ]
        return np.array(lines, dtype=np.int64), np.array(persons, dtype=np.int64)

    def _count_line(self, entry: tuple[Item, float]) -> int:
        # Not the line alone: where a text begins, tokenizers put a blank.
        once = SummaryPrompt(self._dataset.domain, {}, (entry,))
        return self._count(replace(once, history=(entry, entry)).text) - self._count(once.text)

    def _prompt(self, user_id: str, history: Sequence[tuple[Item, float]]) -> SummaryPrompt:
        profile: Attributes = self._dataset.profiles.get(user_id, {})
        return SummaryPrompt(self._dataset.domain, profile, tuple(history))

    def _entry(self, place: int) -> tuple[Item, float]:
        behavior = self._dataset.behaviors[place]
        item = self._dataset.items.get(behavior.item_id) or Item(behavior.item_id, behavior.item_id)
        return item, behavior.feedback


def stand_in(count: TokenCount, tokens: int) -> str:
    """A text of `tokens` tokens, or as few more as the tokenizer allows: what stands for an answer nobody wrote."""
    words = tokens
    while count(text := " ".join(["taste"] * words)) > tokens and words > 1:
        words -= 1
    while count(text) < tokens:
        text += " taste"
    return text
