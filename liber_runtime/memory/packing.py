"""How behaviors and attributes lie in a row of a store: compact, and read back exactly."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from liber_runtime.behavior import Attributes, Behavior
from liber_runtime.partition import Run

Packed: TypeAlias = tuple[str, bytes, bytes, str]
"""A run of behaviors as it lies in a row: item ids, feedback, timestamps, event ids."""


class PackedRun(Sequence[Behavior]):
    """A user's behaviors as they lie in a row, made when someone looks at them."""

    __slots__ = ("_made", "columns", "user_id")

    def __init__(self, user_id: str, columns: Packed) -> None:
        self.user_id = user_id
        self.columns = columns
        self._made: list[Behavior] | None = None

    def __len__(self) -> int:
        return len(self.columns[1]) // 8

    @overload
    def __getitem__(self, index: int) -> Behavior: ...

    @overload
    def __getitem__(self, index: slice) -> list[Behavior]: ...

    def __getitem__(self, index: int | slice) -> Behavior | list[Behavior]:
        if self._made is None:
            self._made = unpack(self.user_id, *self.columns)
        return self._made[index]


def pack(behaviors: Sequence[Behavior]) -> Packed:
    """One row of a user's behaviors; ids hold no line breaks (`check_id`), so a line break parts them."""
    if isinstance(behaviors, Run) and isinstance(behaviors.head, PackedRun):
        return _joined(behaviors.head.columns, pack(behaviors.tail))
    return (
        "\n".join([behavior.item_id for behavior in behaviors]),
        struct.pack(f"<{len(behaviors)}d", *[behavior.feedback for behavior in behaviors]),
        struct.pack(f"<{len(behaviors)}d", *[behavior.timestamp for behavior in behaviors]),
        "\n".join([behavior.event_id for behavior in behaviors]),
    )


def _joined(first: Packed, second: Packed) -> Packed:
    if not (first[1] and second[1]):
        return first if first[1] else second
    return (
        f"{first[0]}\n{second[0]}",
        first[1] + second[1],
        first[2] + second[2],
        f"{first[3]}\n{second[3]}",
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


NO_VECTORS: npt.NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)
"""Of a user who has none."""


def stack_vectors(vectors: Sequence[bytes]) -> npt.NDArray[np.float32]:
    """float32[J, d]; [J, 0], of which nothing can be made, if they are not of one length."""
    if not vectors:
        return NO_VECTORS
    if len(set(map(len, vectors))) > 1:
        return np.zeros((len(vectors), 0), dtype=np.float32)
    return np.frombuffer(b"".join(vectors), "<f4").reshape(len(vectors), -1)


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
    values, _ = _DECODER.raw_decode(text)
    if "[" not in text:
        return dict(values)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


_DECODER = json.JSONDecoder()
