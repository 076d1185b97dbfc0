"""Texts counted over many users: which writer and prompt wrote how many, and what a rewrite would make again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from liber_runtime.behavior import Text, TextKind
from liber_runtime.memory import Timeline


@dataclass(slots=True)
class Tally:
    """Texts of one kind by one writer and prompt, added up.

    Attributes:
        kind: ``summary`` or ``shift``.
        writer: what wrote them.
        prompt_version: of the prompt.
        texts: how many.
        users: of how many users.
        prompt_tokens: read by the writer, as far as it counts them.
        response_tokens: written, as far as the writer counts them.
        uncounted: texts whose writer counted no tokens.
        seconds: of the calls, added up.
        first: when the first was made, seconds since 1970.
        last: when the newest was made, seconds since 1970.
    """

    kind: TextKind
    writer: str
    prompt_version: str
    texts: int = 0
    users: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    uncounted: int = 0
    seconds: float = 0.0
    first: float = math.inf
    last: float = -math.inf

    def add(self, text: Text) -> None:
        """Counts one text."""
        self.texts += 1
        self.prompt_tokens += text.prompt_tokens or 0
        self.response_tokens += text.response_tokens or 0
        self.uncounted += text.prompt_tokens is None or text.response_tokens is None
        self.seconds += text.seconds
        self.first = min(self.first, text.made_at)
        self.last = max(self.last, text.made_at)


def count_texts(timelines: Iterable[Timeline]) -> list[Tally]:
    """One tally for each kind, writer and prompt version, the most texts first."""
    tallies: dict[tuple[TextKind, str, str], Tally] = {}
    for timeline in timelines:
        seen = set()
        for record in timeline.partitions:
            for text in (record.summary, record.shift):
                if text is None:
                    continue
                key = (text.kind, text.writer, text.prompt_version)
                tallies.setdefault(key, Tally(*key)).add(text)
                seen.add(key)
        for key in seen:
            tallies[key].users += 1
    return sorted(tallies.values(), key=lambda tally: (-tally.texts, tally.kind, tally.writer, tally.prompt_version))


@dataclass(slots=True)
class Plan:
    """What a rewrite would make again.

    Attributes:
        users: with at least one selected text.
        texts: that are queued: the selected summaries, and the selected shifts that do not follow from one of them.
        calls: of the writer: these texts, and all shifts that follow from the summaries.
        vectors: that follow from those texts, for each encoding once.
        prompt_tokens: that the texts of these calls took when they were made, as far as they were counted.
        response_tokens: likewise.
        uncounted: texts of these calls whose tokens were not counted.
        seconds: that these calls took.
    """

    users: int = 0
    texts: int = 0
    calls: int = 0
    vectors: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    uncounted: int = 0
    seconds: float = 0.0


def plan_rewrite(timelines: Iterable[Timeline], *, writer: str = "", prompt_version: str = "") -> Plan:
    """Counts what `WorkQueue.rewrite` of the same selection would queue if nothing was pending, and what follows.

    Args:
        timelines: of the selected users.
        writer: only texts by this writer; empty for any.
        prompt_version: only texts by this prompt; empty for any.
    """
    plan = Plan()
    for timeline in timelines:
        texts = {
            (record.number, text.kind): text
            for record in timeline.partitions
            for text in (record.summary, record.shift)
            if text is not None
        }
        selected = {
            key
            for key, text in texts.items()
            if writer in ("", text.writer) and prompt_version in ("", text.prompt_version)
        }
        # A shift is made of the summaries of its partition and of the one before.
        following: set[tuple[int, TextKind]] = {
            (number + ahead, "shift") for number, kind in selected if kind == "summary" for ahead in (0, 1)
        }
        called = selected | (following & texts.keys())
        changed = {number for number, _ in called}
        plan.users += bool(selected)
        plan.texts += len(selected - following)
        plan.calls += len(called)
        plan.vectors += sum(len(each.representations) for each in timeline.partitions if each.number in changed)
        for key in called:
            text = texts[key]
            plan.prompt_tokens += text.prompt_tokens or 0
            plan.response_tokens += text.response_tokens or 0
            plan.uncounted += text.prompt_tokens is None or text.response_tokens is None
            plan.seconds += text.seconds
    return plan
