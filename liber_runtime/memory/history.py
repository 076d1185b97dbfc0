"""A user's newest behaviors as scoring reads them: columns, without an object for each behavior."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt


class History(Sequence[tuple[str, float]]):
    """(item id, feedback) of behaviors, oldest first; equal to any sequence of the same pairs.

    Pairs are made when someone looks at them. Scoring looks at the columns.

    Args:
        joined_ids: item ids, parted by line feeds, which no id can hold (`check_id`).
        packed_feedback: as many little-endian float64.
        skipped: how many of them, from the first, are not part of the history.
    """

    __slots__ = ("_length", "joined_ids", "packed_feedback", "skipped")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, joined_ids: str = "", packed_feedback: bytes = b"", skipped: int = 0) -> None:
        self.joined_ids = joined_ids
        self.packed_feedback = packed_feedback
        self.skipped = skipped
        self._length = len(packed_feedback) // 8 - skipped

    @property
    def item_ids(self) -> list[str]:
        """One for each behavior."""
        return self.joined_ids.split("\n")[self.skipped :] if self._length else []

    @property
    def feedback(self) -> npt.NDArray[np.float64]:
        """float64[n], not to be written to."""
        return np.frombuffer(self.packed_feedback, "<f8")[self.skipped :]

    def newest(self, limit: int) -> History:
        """At most `limit` newest behaviors; nothing is copied."""
        excess = self._length - max(limit, 0)
        return self if excess <= 0 else History(self.joined_ids, self.packed_feedback, self.skipped + excess)

    def trimmed(self) -> History:
        """The same, without the columns' entries that are not part of it."""
        return History("\n".join(self.item_ids), self.packed_feedback[8 * self.skipped :]) if self.skipped else self

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> tuple[str, float]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, float]]: ...

    def __getitem__(self, index: int | slice) -> tuple[str, float] | list[tuple[str, float]]:
        return list(self)[index]

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return zip(self.item_ids, self.feedback.tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __repr__(self) -> str:
        return f"History({list(self)!r})"
