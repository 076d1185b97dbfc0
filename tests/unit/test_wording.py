"""What comes from outside is shown as it is, and cannot steer a terminal."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liber_runtime.wording import amount, day, iso_time, moment, visible, visible_lines

anything = st.text(st.characters(), max_size=60) | st.text(
    st.sampled_from("a\x1b\x07\x9b\r\n\t\x7f\u202e\u2066\u200b\ufeff\u2028\ud800 é猫"), max_size=20
)


@given(anything)
def test_nothing_that_steers_a_terminal_is_left(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\ufeff")
    assert visible(shown) == shown
    shown.encode()


@given(anything)
def test_lines_are_kept_and_each_is_visible(text: str) -> None:
    lines = visible_lines(text)
    assert len(lines) == text.rstrip().count("\n") + 1
    assert all(visible(line) == line for line in lines)


@pytest.mark.parametrize(
    "text", ["The Amber Anchor (1999)", "千と千尋の神隠し", "می‌خواهم", "👩‍🚀", "a\u3000b", "[bold]:smile:"]
)
def test_what_people_write_is_left_alone(text: str) -> None:
    assert visible(text) == text


def test_escapes_say_what_was_there() -> None:
    assert visible("a\x1b[31m\u202eb\x00") == r"a\x1b[31m\u202eb\x00"
    assert visible_lines("one\r\n\ttwo\n\n") == ["one", " two"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_time_can_be_shown(timestamp: float) -> None:
    told = iso_time(timestamp)
    if told is None:
        assert moment(timestamp) == day(timestamp) == f"{timestamp:g} s"
    else:
        assert told.startswith(day(timestamp))
        assert told.endswith("+00:00")
        assert moment(timestamp).startswith(day(timestamp))


def test_times_of_no_calendar() -> None:
    assert (day(0), moment(86399), iso_time(0.5)) == (
        "1970-01-01",
        "1970-01-01 23:59",
        "1970-01-01T00:00:00.500000+00:00",
    )
    assert [iso_time(value) for value in (1e300, -1e300, math.inf, -6e10 * 10)] == [None] * 4


def test_amounts() -> None:
    assert [amount(1, "summary"), amount(2, "summary"), amount(2000, "vector")] == [
        "1 summary",
        "2 summaries",
        "2,000 vectors",
    ]
