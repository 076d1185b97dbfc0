from __future__ import annotations

import struct

import pytest

from liber_runtime.memory.history import History

PAIRS = [("a", 1.0), ("b b", -2.5), ("映画", 0.1 + 0.2), ("", 4.0)]
HISTORY = History("a\nb b\n映画\n", struct.pack("<4d", *(feedback for _, feedback in PAIRS)))


def test_a_history_is_its_pairs() -> None:
    assert list(HISTORY) == PAIRS
    assert tuple(PAIRS) == HISTORY
    assert len(HISTORY) == 4
    assert HISTORY[-1] == PAIRS[-1]
    assert HISTORY[1:3] == PAIRS[1:3]
    assert PAIRS[:3] != HISTORY
    assert History() == ()


@pytest.mark.parametrize("limit", [-1, 0, 1, 3, 4, 9])
def test_the_newest_of_the_newest_are_the_newest(limit: int) -> None:
    newest = PAIRS[max(0, 4 - max(0, limit)) :]
    assert HISTORY.newest(limit) == newest
    assert HISTORY.newest(3).newest(limit) == newest[-3:]
    assert HISTORY.newest(limit).trimmed() == newest
    assert HISTORY.newest(limit).feedback.tolist() == [feedback for _, feedback in newest]
