"""What a user chose and how they liked it, over time: counts from behaviors and item attributes, no text and no model.

Told by the domain's group attribute (e.g. genres), so it shows whatever writer made the texts, and can be held against
them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from liber_runtime.behavior import Behavior, Domain
from liber_runtime.memory import PartitionRecord
from liber_runtime.timeline import UserView

MOST_PERIODS = 12
"""Columns of a trace; of a longer memory, consecutive partitions share one."""

MOST_GROUPS = 12
"""Rows of a trace."""

MOVED_SHARE = 0.1
"""An interest has moved if its share of the behaviors changed by so much."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One group in one period.

    Attributes:
        behaviors: with an item of the group.
        share: of the period's behaviors, in [0, 1]; an item can be of several groups.
        feedback: their mean, in the domain's unit.
        level: the mean's place in the feedback range, in [0, 1].
    """

    behaviors: int
    share: float
    feedback: float
    level: float


@dataclass(frozen=True, slots=True)
class Period:
    """Consecutive partitions that share a column.

    Attributes:
        first: number of the oldest partition.
        last: number of the newest.
        start: timestamp of the first behavior.
        behaviors: how many.
        feedback: their mean.
    """

    first: int
    last: int
    start: float
    behaviors: int
    feedback: float


@dataclass(frozen=True, slots=True)
class InterestTrace:
    """Interests over time.

    Attributes:
        attribute: what the groups are of, e.g. ``genres``.
        periods: oldest first.
        rows: for each group, the strongest first, a cell for each period; None where nothing was chosen.
        grown: groups with a larger share in the newest period than before it, with both shares.
        faded: groups with a smaller one.
    """

    attribute: str
    periods: tuple[Period, ...]
    rows: dict[str, tuple[Cell | None, ...]]
    grown: tuple[tuple[str, float, float], ...]
    faded: tuple[tuple[str, float, float], ...]


def trace_interests(view: UserView) -> InterestTrace | None:
    """Traces the groups that partitions were about; None if there are no partitions, or no item's group is known."""
    domain = view.domain
    held = [record for record in view.timeline.partitions if record.behaviors]
    if not held or domain is None or not domain.group_attribute:
        return None
    runs = _share_out(held)
    chosen = [[behavior for record in run for behavior in record.behaviors] for run in runs]
    counted = [_count_groups(view, domain.group_attribute, behaviors) for behaviors in chosen]
    groups = {group for column in counted for group in column}
    if not groups:
        return None

    def cell(group: str, at: int) -> Cell | None:
        feedback = counted[at].get(group)
        if not feedback:
            return None
        mean = sum(feedback) / len(feedback)
        return Cell(len(feedback), len(feedback) / len(chosen[at]), mean, _level(domain, mean))

    rows = {group: tuple(cell(group, at) for at in range(len(runs))) for group in groups}
    now = {group: _share(row[-1]) for group, row in rows.items()}
    total = sum(map(len, chosen[:-1]))
    before = {
        group: sum(each.behaviors for each in row[:-1] if each) / total if total else now[group]
        for group, row in rows.items()
    }
    # A new interest is as worth a row as one that was always there.
    strength = {group: max(now[group], before[group]) for group in groups}
    ranked = sorted(groups, key=lambda group: (-strength[group], group))
    moves = sorted(((group, before[group], now[group]) for group in groups), key=lambda move: (move[1] - move[2], move))
    return InterestTrace(
        attribute=domain.group_attribute,
        periods=tuple(_period(run, behaviors) for run, behaviors in zip(runs, chosen, strict=True)),
        rows={group: rows[group] for group in ranked[:MOST_GROUPS]},
        grown=tuple(move for move in moves if move[2] - move[1] >= MOVED_SHARE),
        faded=tuple(move for move in reversed(moves) if move[1] - move[2] >= MOVED_SHARE),
    )


def _share_out(records: Sequence[PartitionRecord]) -> list[Sequence[PartitionRecord]]:
    """At most `MOST_PERIODS` runs of nearly equal length; of the shorter ones the newest."""
    count = min(len(records), MOST_PERIODS)
    bounds = [len(records) * at // count for at in range(count + 1)]
    return [records[start:end] for start, end in itertools.pairwise(bounds)]


def _count_groups(view: UserView, attribute: str, behaviors: Sequence[Behavior]) -> dict[str, list[float]]:
    """The feedbacks of each group's behaviors."""
    counted: dict[str, list[float]] = {}
    for behavior in behaviors:
        item = view.items.get(behavior.item_id)
        value = item.attributes.get(attribute, ()) if item else ()
        for group in dict.fromkeys(value if isinstance(value, tuple) else (str(value),)):
            counted.setdefault(group, []).append(behavior.feedback)
    return counted


def _period(run: Sequence[PartitionRecord], behaviors: Sequence[Behavior]) -> Period:
    mean = sum(behavior.feedback for behavior in behaviors) / len(behaviors)
    return Period(run[0].number, run[-1].number, behaviors[0].timestamp, len(behaviors), mean)


def _share(cell: Cell | None) -> float:
    return cell.share if cell else 0.0


def _level(domain: Domain, mean: float) -> float:
    low, high = domain.feedback_range
    return min(max((mean - low) / (high - low), 0.0), 1.0)
