"""How behaviors and attributes lie in a row of a store: compact, and read back exactly."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

from liber_runtime.behavior import Attributes, Behavior

Packed: TypeAlias = tuple[str, bytes, bytes, str]
"""A run of behaviors as it lies in a row: item ids, feedback, timestamps, event ids."""


def pack(behaviors: Sequence[Behavior]) -> Packed:
    """One row of a user's behaviors; ids hold no line breaks (`check_id`), so a line break parts them."""
    return (
        "\n".join([behavior.item_id for behavior in behaviors]),
        struct.pack(f"<{len(behaviors)}d", *[behavior.feedback for behavior in behaviors]),
        struct.pack(f"<{len(behaviors)}d", *[behavior.timestamp for behavior in behaviors]),
        "\n".join([behavior.event_id for behavior in behaviors]),
    )


def unpack(user_id: str, item_ids: str, feedback: bytes, timestamps: bytes, event_ids: str) -> list[Behavior]:
    """The behaviors of a row of one user."""
    if not item_ids:
        return []
    return [
        _restored(user_id, *values)
        for values in zip(
            item_ids.split("\n"), _floats(feedback), _floats(timestamps), event_ids.split("\n"), strict=True
        )
    ]


def _restored(user_id: str, item_id: str, feedback: float, timestamp: float, event_id: str) -> Behavior:
    # What was checked when it came in is not checked again: appending would spend most of its time on that.
    behavior = object.__new__(Behavior)
    _set_user_id(behavior, user_id)
    _set_item_id(behavior, item_id)
    _set_feedback(behavior, feedback)
    _set_timestamp(behavior, timestamp)
    _set_event_id(behavior, event_id)
    return behavior


_set_user_id, _set_item_id, _set_feedback, _set_timestamp, _set_event_id = (
    vars(Behavior)[name].__set__ for name in ("user_id", "item_id", "feedback", "timestamp", "event_id")
)


def newest(item_ids: str, feedback: bytes, limit: int) -> tuple[tuple[str, float], ...]:
    """At most `limit` newest (item id, feedback) of a row, oldest first, without making behaviors of the rest."""
    if not item_ids or limit < 1:
        return ()
    return tuple(zip(item_ids.rsplit("\n", limit)[-limit:], _floats(feedback[-8 * limit :]), strict=True))


def _floats(packed: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(packed) // 8}d", packed)


def event_digest(event_id: str) -> bytes:
    """What a store knows an event id by, 16 bytes: of equal length, and telling nothing of an erased event."""
    return hashlib.blake2b(event_id.encode(), digest_size=16).digest()


def dump_attributes(attributes: Attributes) -> str:
    """Attributes as JSON; nothing for none."""
    return json.dumps(dict(attributes)) if attributes else ""


def load_attributes(text: str) -> dict[str, Any]:
    """Attributes as they were, tuples as tuples."""
    if not text:
        return {}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()}
