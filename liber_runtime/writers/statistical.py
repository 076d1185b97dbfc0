"""The statistical writer: every text from counts and means over item metadata, no model at all.

The embedded default, and the baseline that every LLM has to beat. Results made with it say so; it is not an LLM.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from liber_runtime.behavior import Domain, Item
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.interest import ItemPrompt, Prompt, ShiftPrompt, SummaryPrompt, bounded, clean
from liber_runtime.writers import Completion

MAX_TASTES_PER_FACET = 6
MAX_NAMED_ITEMS = 3
MAX_CHANGES_PER_KIND = 4

LEAST_SUPPORT = 2
"""A taste told by fewer behaviors than this is not called new, gone, grown or faded."""

CHANGE_SHARE = 0.125
"""A mean has moved when it moved by this share of the feedback range (half a star of five)."""

_VERDICTS = ((0.85, "loved"), (0.65, "liked"), (0.45, "mixed"), (float("-inf"), "disliked"))
_WORDS = "|".join(word for _, word in _VERDICTS)

_LEVEL = re.compile(r"^Level: (?P<count>\d+) [^,]*, average (?P<mean>-?\d+\.\d+) ")
_LINE = re.compile(rf"^(?P<facet>.+) (?:{_WORDS}): (?P<tastes>.+)\.$", re.MULTILINE)
_TASTE = re.compile(r"(?P<name>.*) (?P<count>\d+) \((?P<mean>-?\d+\.\d+)\)")


class StatisticalWriter:
    """Writes summaries (Eq. 2), shifts (Eq. 3) and items deterministically and within bounds.

    A shift is made of the two summaries alone, as Eq. 3 has it: the figures are read back out of their text.
    """

    @property
    def name(self) -> str:
        """``statistical``."""
        return "statistical"

    async def write(self, prompt: Prompt) -> Completion:
        """Answers one prompt; counts no tokens, for none are read.

        Raises:
            InvalidInputError: a shift is asked of a summary that another writer wrote.
        """
        if isinstance(prompt, ItemPrompt):
            return Completion(present(prompt))
        return Completion(summarize(prompt) if isinstance(prompt, SummaryPrompt) else compare(prompt))


_Key: TypeAlias = tuple[str, str]
"""(facet, name), e.g. ("genres", "Drama")."""


@dataclass(frozen=True, slots=True)
class _Taste:
    count: int
    mean: float


def summarize(prompt: SummaryPrompt) -> str:
    """klg^s_j: level, taste per group and period with support and mean feedback, and the extremes by title."""
    domain, history = prompt.domain, prompt.history
    level = _taste(feedback for _, feedback in history)
    lines = [
        f"Level: {level.count} {domain.item_noun}s, average {level.mean:.2f} {domain.feedback_noun}, "
        f"{_verdict(domain, level.mean)} on the whole."
    ]
    for facet, tastes in _facets(domain, history):
        ranked = sorted(tastes.items(), key=lambda entry: (-entry[1].count, entry[0]))[:MAX_TASTES_PER_FACET]
        for _, word in _VERDICTS:
            told = [
                f"{name} {taste.count} ({taste.mean:.2f})"
                for name, taste in ranked
                if _verdict(domain, taste.mean) == word
            ]
            if told:
                lines.append(f"{facet} {word}: {'; '.join(told)}.")
    best = [entry for entry in history if entry[1] > domain.positive_above]
    worst = [entry for entry in history if entry[1] <= domain.positive_above]
    lines += _extremes("Favorites", sorted(best, key=lambda entry: -entry[1]))
    lines += _extremes("Disliked", sorted(worst, key=lambda entry: entry[1]))
    return "\n".join(lines)


def compare(prompt: ShiftPrompt) -> str:
    """klg^c_j: what is new, what rose, what faded and what is gone between two of this writer's summaries."""
    domain = prompt.domain
    level_before, before = _read_back(prompt.previous)
    level_now, now = _read_back(prompt.current)
    low, high = domain.feedback_range
    step = CHANGE_SHARE * (high - low)
    unit = domain.feedback_noun

    new = [key for key in now if key not in before and now[key].count >= LEAST_SUPPORT]
    gone = [key for key in before if key not in now and before[key].count >= LEAST_SUPPORT]
    shared = [key for key in now if key in before and min(now[key].count, before[key].count) >= LEAST_SUPPORT]
    change = {key: now[key].mean - before[key].mean for key in shared}
    risen = sorted((key for key in shared if change[key] >= step), key=lambda key: (-change[key], key))
    faded = sorted((key for key in shared if change[key] <= -step), key=lambda key: (change[key], key))

    def moved(keys: Sequence[_Key]) -> list[str]:
        return [f"{key[1]} {before[key].mean:.2f} to {now[key].mean:.2f}" for key in keys]

    def held(keys: Sequence[_Key], tastes: Mapping[_Key, _Taste]) -> list[str]:
        ranked = sorted(keys, key=lambda key: (-tastes[key].count, key))
        return [f"{key[1]} {tastes[key].count} ({_verdict(domain, tastes[key].mean)})" for key in ranked]

    lines = []
    if abs(level_now.mean - level_before.mean) >= step:
        direction = "rose" if level_now.mean > level_before.mean else "fell"
        lines.append(f"Level {direction} from {level_before.mean:.2f} to {level_now.mean:.2f} {unit}.")
    for title, entries in (
        ("New", held(new, now)),
        ("Risen", moved(risen)),
        ("Faded", moved(faded)),
        ("Gone", held(gone, before)),
    ):
        if entries:
            lines.append(f"{title}: {'; '.join(entries[:MAX_CHANGES_PER_KIND])}.")
    return "\n".join(lines) or "No change of taste."


def present(prompt: ItemPrompt) -> str:
    """An item in the words of the summaries: its groups, its period, its title; an item without a title by its id."""
    domain, item = prompt.domain, prompt.item
    facets = _facets(domain, [(item, domain.feedback_range[1])])
    named = [(facet, [name for name in tastes if name][:MAX_TASTES_PER_FACET]) for facet, tastes in facets]
    told = [f"{facet}: {'; '.join(names)}." for facet, names in named if names]
    return "\n".join([*told, f"{domain.item_noun}: {_label(item.title) or _label(item.item_id)}."])


def _facets(domain: Domain, history: Sequence[tuple[Item, float]]) -> Iterable[tuple[str, dict[str, _Taste]]]:
    if domain.group_attribute:
        groups: dict[str, list[float]] = defaultdict(list)
        for item, feedback in history:
            value = item.attributes.get(domain.group_attribute, ())
            for name in value if isinstance(value, tuple) else (str(value),):
                groups[_label(name)].append(feedback)
        yield domain.group_attribute, {name: _taste(values) for name, values in groups.items()}
    if domain.period_attribute:
        periods: dict[str, list[float]] = defaultdict(list)
        for item, feedback in history:
            year = item.attributes.get(domain.period_attribute)
            if isinstance(year, int | float):
                periods[f"{int(year) // 10 * 10}s"].append(feedback)
        yield "period", {name: _taste(values) for name, values in periods.items()}


def _extremes(title: str, ranked: Sequence[tuple[Item, float]]) -> list[str]:
    if not ranked:
        return []
    names = "; ".join(_label(item.title) for item, _ in ranked[:MAX_NAMED_ITEMS])
    return [f"{title}: {names}."]


def _label(name: str) -> str:
    """A name as one entry of a line: it cannot end the entry or the line."""
    return bounded(clean(name), 80).replace(";", ",")


def _taste(values: Iterable[float]) -> _Taste:
    held = list(values)
    return _Taste(len(held), sum(held) / len(held) if held else 0.0)


def _verdict(domain: Domain, mean: float) -> str:
    low, high = domain.feedback_range
    share = (mean - low) / (high - low)
    return next(word for bound, word in _VERDICTS if share >= bound)


def _read_back(summary: str) -> tuple[_Taste, dict[_Key, _Taste]]:
    level = _LEVEL.match(summary)
    if level is None:
        raise InvalidInputError(
            f"the summary {summary[:60]!r} was not written by the statistical writer; a shift is written by the "
            "writer of its summaries: use that writer, or fill a new store"
        )
    tastes = {
        (line["facet"], found["name"]): _Taste(int(found["count"]), float(found["mean"]))
        for line in _LINE.finditer(summary)
        for entry in line["tastes"].split("; ")
        if (found := _TASTE.fullmatch(entry))
    }
    return _Taste(int(level["count"]), float(level["mean"])), tastes
