"""One user's memory as it is shown: partitions with their texts, where each came from, and what is still to be made.

`UserView` joins what a store holds of one user with what makes it readable (titles, the domain). `document` renders it
as JSON, `terminal` for a terminal, `page` as one HTML page; `interests` traces what the user chose over time, `census`
counts texts over many users.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from liber_runtime.behavior import Behavior, Domain, Item, Text
from liber_runtime.memory import DeadStep, MemoryStore, PartitionRecord, Step, Timeline


@dataclass(frozen=True, slots=True)
class OpenStep:
    """A step that a partition still needs.

    Attributes:
        step: what is to be made.
        fingerprint: of the encoding that a representation is wanted of; empty if any will do.
        dead: why it was given up; None while it is pending.
    """

    step: Step
    fingerprint: str
    dead: DeadStep | None

    @property
    def name(self) -> str:
        """``summary``, ``shift``, or ``vector of`` an encoding."""
        if self.step != "representation":
            return self.step
        return f"vector of {self.fingerprint}" if self.fingerprint else "vector"


@dataclass(frozen=True, slots=True)
class UserView:
    """All that is held of one user, with what makes it readable.

    Attributes:
        timeline: what the store holds.
        domain: the data set's description; None if the store has none.
        items: of the items in the timeline those that the store knows, by id.
        encodings: fingerprints of the encodings that every partition shall have a vector of; empty if any will do.
        dead: the user's steps that were given up.
    """

    timeline: Timeline
    domain: Domain | None
    items: Mapping[str, Item]
    encodings: frozenset[str]
    dead: tuple[DeadStep, ...]

    def title(self, behavior: Behavior) -> str:
        """The title of a behavior's item; empty if it is not known."""
        item = self.items.get(behavior.item_id)
        return item.title if item else ""

    def feedback(self, value: float) -> str:
        """A feedback with its unit, e.g. ``4 stars``."""
        return f"{value:g} {self.domain.feedback_noun}" if self.domain else f"{value:g}"

    def sources(self, record: PartitionRecord, text: Text) -> tuple[int, ...]:
        """Numbers of the partitions whose behaviors a text was made from (Eq. 2 and 3)."""
        return (record.number,) if text.kind == "summary" else (record.number - 1, record.number)

    def behaviors_of(self, numbers: Iterable[int]) -> int:
        """How many behaviors the partitions of these numbers hold."""
        return sum(len(self.timeline.partitions[number - 1].behaviors) for number in numbers)

    def open_steps(self, record: PartitionRecord) -> list[OpenStep]:
        """What a partition still needs, in the order of the steps.

        A contract of stores tells which steps are dead, and a step whose text or vector is missing is pending. A text
        that is there and about to be replaced is not among them unless its replacement was given up.
        """
        dead = {(step.step, step.fingerprint): step for step in self.dead if step.number == record.number}
        wanted = [*dead, *self._missing(record)]
        order: tuple[Step, ...] = ("summary", "shift", "representation")
        wanted = sorted(dict.fromkeys(wanted), key=lambda key: (order.index(key[0]), key[1]))
        return [OpenStep(step, fingerprint, dead.get((step, fingerprint))) for step, fingerprint in wanted]

    def _missing(self, record: PartitionRecord) -> Iterable[tuple[Step, str]]:
        if not record.behaviors:
            return
        if record.summary is None:
            yield "summary", ""
        if record.shift is None and record.number > 1 and self.timeline.partitions[record.number - 2].behaviors:
            yield "shift", ""
        if self.encodings:
            yield from (("representation", each) for each in self.encodings - record.representations.keys())
        elif not record.representations:
            yield "representation", ""


def view_user(store: MemoryStore, user_id: str) -> UserView | None:
    """Reads all that is held of a user; None if nothing is.

    Costs one pass over the user's memory, one over the store's counts, and one over its dead steps.

    Raises:
        StoreError: the store cannot be read.
    """
    timeline = store.timeline(user_id)
    if timeline is None:
        return None
    statistics = store.statistics()
    dead = sum(statistics.dead.values())
    behaviors = [*timeline.cache, *(behavior for record in timeline.partitions for behavior in record.behaviors)]
    return UserView(
        timeline=timeline,
        domain=store.domain,
        items=store.items({behavior.item_id for behavior in behaviors}),
        encodings=statistics.encodings,
        dead=tuple(step for step in store.dead(dead) if step.user_id == user_id) if dead else (),
    )
