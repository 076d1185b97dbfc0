"""The nouns of LIBER as immutable values (paper, sections 3.2 and 3.3)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from liber_runtime.exceptions import InvalidInputError

MAX_ID_BYTES = 512
"""Longest user, item or event id, in UTF-8 bytes: ids are keys, and keys are copied everywhere."""

AttributeValue: TypeAlias = str | int | float | tuple[str, ...]
Attributes: TypeAlias = Mapping[str, AttributeValue]
"""What is known of a user or an item beside its id. A tuple is a multi-valued field, e.g. genres."""

TextKind: TypeAlias = Literal["summary", "shift"]


def check_id(noun: str, value: object) -> str:
    """Returns `value` if it can serve as an id.

    Args:
        noun: what the id names, for the message ("user id").
        value: the id as it came in.

    Raises:
        InvalidInputError: not a string, empty, longer than `MAX_ID_BYTES`, or with control characters.
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"{noun} {value!r:.80} is a {type(value).__name__}; ids are strings")
    if value.isascii() and value.isprintable() and 0 < len(value) <= MAX_ID_BYTES:
        return value
    if not value:
        raise InvalidInputError(f"{noun} is empty; give every {noun.split()[0]} a non-empty id")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidInputError(f"{noun} {value!r:.80} is not valid UTF-8; re-encode the source as UTF-8") from None
    if size > MAX_ID_BYTES:
        raise InvalidInputError(f"{noun} {value[:40]!r}... has {size} bytes; at most {MAX_ID_BYTES} are allowed")
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise InvalidInputError(f"{noun} {value!r:.80} holds a control character; remove it")
    return value


@dataclass(frozen=True, slots=True)
class Behavior:
    """One event of one user, b_i.

    Attributes:
        user_id: whose it is.
        item_id: what it was about.
        feedback: rating in the domain's unit, 1.0/0.0 for a click, or seconds played.
        timestamp: seconds since 1970-01-01 UTC.
        event_id: the key that makes a repeated delivery count once. Left empty, it is derived from the other
            fields, so that re-reading a log changes nothing.
    """

    user_id: str
    item_id: str
    feedback: float
    timestamp: float
    event_id: str = ""

    def __post_init__(self) -> None:
        check_id("user id", self.user_id)
        check_id("item id", self.item_id)
        for name in ("feedback", "timestamp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InvalidInputError(
                    f"{name} {value!r:.80} of user {self.user_id!r} is not a finite number; correct or drop the event"
                )
        if self.event_id:
            check_id("event id", self.event_id)
        else:
            key = f"{self.item_id}\x1f{float(self.timestamp)!r}\x1f{float(self.feedback)!r}"
            object.__setattr__(self, "event_id", hashlib.blake2b(key.encode(), digest_size=12).hexdigest())


@dataclass(frozen=True, slots=True)
class Item:
    """One thing a behavior can be about.

    Attributes:
        item_id: its id in the behavior log.
        title: what a person (and the writer) calls it.
        attributes: the domain's fields, e.g. ``{"genres": ("Drama",), "year": 1994}``.
    """

    item_id: str
    title: str
    attributes: Attributes = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_id("item id", self.item_id)


@dataclass(frozen=True, slots=True)
class Domain:
    """The data set's description: what the prompts and the statistical writer must know beside the behaviors.

    Attributes:
        name: of the data set, e.g. ``ml-100k``.
        item_noun: singular, e.g. ``movie``.
        feedback_noun: unit of the feedback, e.g. ``stars``.
        feedback_range: lowest and highest feedback there is.
        positive_above: a behavior is positive (a click, label 1) if its feedback is above this value.
        factors: the dataset-specific factors of Figure 3, e.g. ``("genre", "director/actors")``.
        group_attribute: the multi-valued item attribute that tastes are told by, e.g. ``genres``; empty for none.
        period_attribute: the numeric item attribute that means a year; empty for none.
    """

    name: str
    item_noun: str
    feedback_noun: str
    feedback_range: tuple[float, float]
    positive_above: float
    factors: tuple[str, ...]
    group_attribute: str = ""
    period_attribute: str = ""

    def __post_init__(self) -> None:
        low, high = self.feedback_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InvalidInputError(
                f"feedback_range [{low}, {high}] of domain {self.name!r} must be two finite numbers, the lower first"
            )
        if not low <= self.positive_above < high:
            raise InvalidInputError(
                f"positive_above {self.positive_above} of domain {self.name!r} must lie in "
                f"[{low}, {high}), the feedback range, or every label is the same"
            )


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a partition's knowledge and where it came from.

    Attributes:
        kind: ``summary`` (Eq. 2) or ``shift`` (Eq. 3).
        text: klg^s_j or klg^c_j.
        writer: name of what wrote it, e.g. ``statistical`` or ``openai:llama-2-13b-chat``.
        prompt_version: version of the prompt template.
        prompt_tokens: tokens read by the writer; None if it counts none.
        response_tokens: tokens written; None if it counts none.
        seconds: wall time of the call.
        made_at: seconds since 1970-01-01 UTC.
        note: what is not as it should be, in words: behaviors left out of the prompt, an answer cut off; else empty.
    """

    kind: TextKind
    text: str
    writer: str
    prompt_version: str
    prompt_tokens: int | None
    response_tokens: int | None
    seconds: float
    made_at: float
    note: str = ""
