from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liber_runtime.behavior import MAX_ID_BYTES, Behavior, Domain, Item, check_id
from liber_runtime.exceptions import InvalidInputError

identifiers = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=MAX_ID_BYTES // 4)


@given(identifiers)
def test_any_printable_text_within_the_limit_is_an_id(value: str) -> None:
    assert check_id("user id", value) == value


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("", "is empty"),
        (7, "is a int"),
        (None, "NoneType"),
        (b"7", "bytes"),
        ("a\nb", "control character"),
        ("a\x00", "control character"),
        ("\x7f", "control character"),
        ("\udcff", "not valid UTF-8"),
        ("x" * (MAX_ID_BYTES + 1), f"{MAX_ID_BYTES + 1} bytes"),
        ("ü" * (MAX_ID_BYTES // 2 + 1), f"{MAX_ID_BYTES + 2} bytes"),
    ],
)
def test_unusable_ids_are_named_in_one_line(value: object, named: str) -> None:
    with pytest.raises(InvalidInputError, match="user id") as caught:
        check_id("user id", value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["feedback", "timestamp"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "4", None, True])
def test_feedback_and_timestamp_are_finite_numbers(name: str, value: object) -> None:
    fields: dict[str, object] = {"feedback": 4.0, "timestamp": 1.0, name: value}
    with pytest.raises(InvalidInputError, match=name):
        Behavior("u", "i", **fields)  # type: ignore[arg-type]


def test_event_id_is_derived_from_what_happened() -> None:
    first = Behavior("u", "i", 4.0, 100.0)
    assert first.event_id
    assert first.event_id == Behavior("u", "i", 4, 100).event_id
    others = [Behavior("u", "j", 4.0, 100.0), Behavior("u", "i", 3.0, 100.0), Behavior("u", "i", 4.0, 101.0)]
    assert len({first.event_id, *(other.event_id for other in others)}) == 4
    assert Behavior("u", "i", 4.0, 100.0, "e1").event_id == "e1"


def test_items_and_events_check_their_ids() -> None:
    with pytest.raises(InvalidInputError, match="item id"):
        Item("", "title")
    with pytest.raises(InvalidInputError, match="event id"):
        Behavior("u", "i", 4.0, 100.0, "e\n1")


@pytest.mark.parametrize("positive_above", [0.5, 5.0, 6.0])
def test_a_domain_without_two_labels_is_refused(positive_above: float) -> None:
    with pytest.raises(InvalidInputError, match="positive_above"):
        Domain("d", "item", "stars", (1.0, 5.0), positive_above, ("genre",))
