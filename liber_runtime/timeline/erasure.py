"""What an erasure removed and what is to be made again, told from what was held before and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from liber_runtime.exceptions import InvalidInputError
from liber_runtime.memory import Forgotten, PartitionRecord
from liber_runtime.timeline import UserView
from liber_runtime.wording import amount, moment, visible


@dataclass(frozen=True, slots=True)
class Place:
    """Where a behavior is held.

    Attributes:
        event_id: its event.
        partition: the number of its partition; 0 for the cache.
        told: what it is and where, for people.
    """

    event_id: str
    partition: int
    told: str


def find_event(view: UserView, event_id: str) -> Place:
    """Finds a user's behavior by its event id.

    Raises:
        InvalidInputError: the user has none of that id.
    """
    runs = [*((record.number, record.behaviors) for record in view.timeline.partitions), (0, view.timeline.cache)]
    for number, behaviors in runs:
        for behavior in behaviors:
            if behavior.event_id == event_id:
                name = view.title(behavior) or f"item {behavior.item_id}"
                where = f"in partition {number}" if number else "in the cache"
                return Place(event_id, number, f"{visible(name)} of {moment(behavior.timestamp)}, {where}")
    raise InvalidInputError(
        f"user {view.timeline.user_id!r} has no event {event_id!r}; "
        "`liber export` lists the event ids of all behaviors that are held"
    )


def tell_user_erasure(before: UserView, forgotten: Forgotten) -> list[str]:
    """What was removed of a user, and what an erasure does not reach."""
    records = before.timeline.partitions
    summaries = sum(record.summary is not None for record in records)
    shifts = sum(record.shift is not None for record in records)
    vectors = sum(len(record.representations) for record in records)
    removed = [
        amount(forgotten.behaviors, "behavior"),
        amount(forgotten.partitions, "partition"),
        amount(summaries, "summary"),
        amount(shifts, "shift"),
        amount(vectors, "vector"),
        *(["the profile"] if before.timeline.profile else []),
        "all pending work",
    ]
    return [
        f"erased of user {before.timeline.user_id!r}: {', '.join(removed[:-1])} and {removed[-1]}",
        "not reached: backups and copies of the store, exports and pages made from it, and the logs it was filled "
        "from; a log that is ingested again brings the user back",
    ]


def tell_event_erasure(before: UserView, place: Place, after: UserView | None) -> list[str]:
    """What was removed with one behavior, what is to be made again, and what an erasure does not reach.

    Args:
        before: what was held.
        place: of the behavior that was erased.
        after: what is held now, None for nothing. What a worker has made again meanwhile counts as removed, and no
            longer as queued.
    """
    lines = [f"erased event {place.event_id!r} of user {before.timeline.user_id!r}: {place.told}"]
    if place.partition == 0 or after is None:
        lines.append("no text and no vector was made from it yet")
    else:
        touched = before.timeline.partitions[place.partition - 1 : place.partition + 1]
        removed = [name for record in touched for name in _removed(record, after)]
        queued = [
            f"{step.name} of partition {record.number}" if step.step == "representation" else f"{step.name} {number}"
            for record in touched
            for number in [record.number]
            for step in after.open_steps(after.timeline.partitions[number - 1])
        ]
        lines.append(f"removed with it: {', '.join(removed) or 'nothing, for nothing was made from it yet'}")
        if not after.timeline.partitions[place.partition - 1].behaviors:
            lines.append(f"partition {place.partition} holds no behaviors any more, so nothing is made of it")
        lines.append(f"queued to be made from what remains: {', '.join(map(visible, queued)) or 'nothing'}")
    lines.append(
        "kept: a digest of the event id, so that a log that is read again does not bring it back; "
        "not reached: backups and copies of the store, exports and pages made from it, and the log itself"
    )
    return lines


def _removed(record: PartitionRecord, after: UserView) -> Iterator[str]:
    now = after.timeline.partitions[record.number - 1]
    for text, kept in ((record.summary, now.summary), (record.shift, now.shift)):
        if text is not None and text != kept:
            yield f"{text.kind} {record.number}"
    for name, made in sorted(record.representations.items()):
        kept_vector = now.representations.get(name)
        if kept_vector is None or kept_vector.vector.tobytes() != made.vector.tobytes():
            yield f"vector of partition {record.number} by {visible(name)}"
