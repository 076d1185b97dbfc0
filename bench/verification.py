"""What is left of a run with kills: the notes of the processes against what the store holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.victims import DOMAIN, FINGERPRINT, Plan, catalogue, digest, last_acknowledged, nth_behavior, vector_of
from liber_runtime.behavior import Behavior
from liber_runtime.interest import ShiftPrompt, SummaryPrompt
from liber_runtime.memory import MemoryStore, PartitionRecord, Step, Timeline

_TITLES = {item.item_id: item for item in catalogue()}


class Outage(NamedTuple):
    """From a kill until the store served again, in seconds of the monotonic clock."""

    killed_at: float
    restored_at: float


@dataclass(slots=True)
class Findings:
    """What the store holds, counted against what it should.

    Attributes:
        acknowledged: behaviors whose append was acknowledged.
        lost: acknowledged behaviors that are not there.
        duplicated: behaviors that are there more often than once.
        unacknowledged: behaviors that are there though nobody was told; sent, but the answer was never heard.
        order_breaks: users whose behaviors are not in the order they were sent in.
        partition_breaks: partitions missing from 1..J or not of K behaviors, and caches of K or more.
        partitions: cut.
        effects: texts and vectors held.
        effects_expected: what the partitions need: a summary and a vector each, and a shift but for the first.
        effects_repeated: results that were acknowledged as kept more often than once.
        cascade_breaks: texts and vectors that were not made from the inputs there are.
    """

    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    unacknowledged: int = 0
    order_breaks: int = 0
    partition_breaks: int = 0
    partitions: int = 0
    effects: int = 0
    effects_expected: int = 0
    effects_repeated: int = 0
    cascade_breaks: int = 0


@dataclass(slots=True)
class Call:
    """One call of the writer: when it began, and when its text was kept or given up; never, if its worker was killed.

    A call is in flight until its text is kept: until then a kill means that it may have to be made again.
    """

    prompt: str
    began_at: float
    ended_at: float = math.inf


@dataclass(slots=True)
class Notes:
    """All notes of the workers: their calls, and how often each step's result was acknowledged as kept."""

    calls: list[Call] = field(default_factory=list)
    kept: Counter[tuple[str, int, Step]] = field(default_factory=Counter)

    @property
    def repeated_calls(self) -> int:
        """Calls beyond the first for the same prompt."""
        return len(self.calls) - len({call.prompt for call in self.calls})

    def in_flight(self, outages: Sequence[Outage]) -> int:
        """Calls that a kill interrupted: of a killed worker, or under way while the store was away."""
        return sum(
            math.isinf(call.ended_at)
            or any(call.began_at <= outage.restored_at and call.ended_at >= outage.killed_at for outage in outages)
            for call in self.calls
        )


def read_notes(paths: Iterable[Path]) -> Notes:
    """The notes of all lives of all workers."""
    notes = Notes()
    for path in paths:
        open_calls: dict[str, Call] = {}
        for line in path.read_text().splitlines():
            sign, at, *rest = line.split(" ")
            if sign == "S":
                call = open_calls[rest[0]] = Call(rest[0], float(at))
                notes.calls.append(call)
            elif sign == "X":
                for call in open_calls.values():
                    call.ended_at = float(at)
                open_calls.clear()
            else:
                prompt, step, number, user_id = rest
                if prompt in open_calls:
                    open_calls.pop(prompt).ended_at = float(at)
                if sign == "K":
                    notes.kept[user_id, int(number), step] += 1  # type: ignore[index]
    return notes


def verify(plan: Plan, senders: int, store: MemoryStore, notes: Notes) -> Findings:
    """Holds the store against the notes; nobody may be at work on it any more."""
    findings = Findings()
    findings.effects_repeated = sum(count - 1 for count in notes.kept.values())
    expected: dict[str, list[str]] = {}
    for sender in range(senders):
        for number in range(last_acknowledged(plan.acknowledged(sender))):
            behavior = nth_behavior(plan, sender, number)
            expected.setdefault(behavior.user_id, []).append(behavior.event_id)
    findings.acknowledged = sum(map(len, expected.values()))
    for user_id in sorted(expected.keys() | set(store.users())):
        timeline = store.timeline(user_id) or Timeline(user_id, {}, (), ())
        _verify_behaviors(timeline, expected.get(user_id, []), findings)
        _verify_partitions(timeline, plan.partition, findings)
        _verify_knowledge(timeline, findings)
    return findings


def _verify_behaviors(timeline: Timeline, expected: Sequence[str], findings: Findings) -> None:
    """Every acknowledged behavior once, in the order it was sent."""
    behaviors: list[Behavior] = [b for record in timeline.partitions for b in record.behaviors] + list(timeline.cache)
    held = [behavior.event_id for behavior in behaviors]
    times = Counter(held)
    known = set(expected)
    findings.lost += sum(event_id not in times for event_id in expected)
    findings.duplicated += sum(count - 1 for count in times.values())
    findings.unacknowledged += sum(event_id not in known for event_id in times)
    sent = [int(event_id.rpartition("-")[2]) for event_id in held]
    findings.order_breaks += sent != sorted(sent)


def _verify_partitions(timeline: Timeline, size: int, findings: Findings) -> None:
    """Numbered from 1 without a gap, K behaviors each, and less than K in the cache."""
    numbers = [record.number for record in timeline.partitions]
    findings.partitions += len(numbers)
    findings.partition_breaks += len(set(range(1, max(numbers, default=0) + 1)) ^ set(numbers))
    findings.partition_breaks += sum(len(record.behaviors) != size for record in timeline.partitions)
    findings.partition_breaks += len(timeline.cache) >= size


def _verify_knowledge(timeline: Timeline, findings: Findings) -> None:
    """Two texts and a vector for each partition, each made from what it is to be made from."""
    previous = ""
    for record in timeline.partitions:
        first = record.number == 1
        findings.effects_expected += 2 if first else 3
        made = [record.summary, record.shift, *record.representations.values()]
        findings.effects += sum(effect is not None for effect in made)
        summary = record.summary.text if record.summary else ""
        shift = record.shift.text if record.shift else ""
        right = [summary == _summary_of(timeline, record), shift == ("" if first else _shift_of(previous, summary))]
        vector = record.representations.get(FINGERPRINT)
        right.append(vector is not None and np.array_equal(vector.vector, vector_of(summary, shift)))
        findings.cascade_breaks += right.count(False)
        previous = summary


def _summary_of(timeline: Timeline, record: PartitionRecord) -> str:
    history = tuple((_TITLES[behavior.item_id], behavior.feedback) for behavior in record.behaviors)
    return f"summary {digest(SummaryPrompt(DOMAIN, timeline.profile, history).text)}"


def _shift_of(previous: str, current: str) -> str:
    return f"shift {digest(ShiftPrompt(DOMAIN, previous, current).text)}"
