"""A user's memory as it is shown: what it is made from, what is open, and the three ways it is rendered."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from liber_runtime.behavior import Behavior, Domain, Item, Text, TextKind
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.memory import DeadStep, Forgotten, PartitionRecord, Representation, Timeline
from liber_runtime.timeline import UserView
from liber_runtime.timeline.census import count_texts, plan_rewrite
from liber_runtime.timeline.document import write_user
from liber_runtime.timeline.erasure import find_event, tell_event_erasure, tell_user_erasure
from liber_runtime.timeline.interests import MOST_GROUPS, MOST_PERIODS, trace_interests
from liber_runtime.timeline.page import render_user
from liber_runtime.timeline.terminal import Bounds, show_dead, show_tallies, show_user

ALL = Bounds(None, None)
OLD, NEW = "0" * 16, "f" * 16
EVIL = "\x1b]0;owned\x07<script>alert(1)</script>\u202e[bold]{{ 7*7 }}&\"'"

DOMAIN = Domain("films", "movie", "stars", (1.0, 5.0), 3.0, ("genre",), "genres", "year")


def text(kind: TextKind, said: str = "", **changes: Any) -> Text:
    made = Text(kind, said or f"a {kind}", "statistical", f"{kind}-1", 700, 90, 1.5, 1.7e9)
    return dataclasses.replace(made, **changes)


def behavior(number: int, feedback: float = 4.0) -> Behavior:
    return Behavior("u", f"m{number}", feedback, 1.6e9 + 86400 * number, f"e{number}")


def record(number: int, size: int = 3, *encodings: str, **changes: Any) -> PartitionRecord:
    vectors = {name: Representation(np.full(4, number / 10, np.float32), name) for name in encodings}
    behaviors = tuple(behavior(100 * number + at) for at in range(size))
    made = PartitionRecord(number, behaviors, text("summary"), text("shift") if number > 1 else None, vectors)
    return dataclasses.replace(made, **changes)


def view(
    *records: PartitionRecord,
    cache: Iterable[Behavior] = (),
    items: Iterable[Item] = (),
    dead: Iterable[DeadStep] = (),
    encodings: Iterable[str] = (),
    domain: Domain | None = DOMAIN,
) -> UserView:
    timeline = Timeline("u", {"age": 31, "tags": ("a", "b")}, records, tuple(cache))
    return UserView(timeline, domain, {item.item_id: item for item in items}, frozenset(encodings), tuple(dead))


def printed(shown: Iterable[RenderableType], width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
    for each in shown:
        console.print(each)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def parsed(shown: UserView, vectors: bool = True) -> dict[str, Any]:
    held = json.loads("".join(write_user(shown, vectors=vectors)))
    assert isinstance(held, dict)
    return held


def open_names(shown: UserView, number: int) -> list[str]:
    return [
        f"{step.name}{' dead' if step.dead else ''}" for step in shown.open_steps(shown.timeline.partitions[number - 1])
    ]


class TestOpenSteps:
    def test_a_complete_partition_needs_nothing(self) -> None:
        shown = view(record(1, 3, OLD), record(2, 3, OLD), encodings=[OLD])
        assert open_names(shown, 1) == open_names(shown, 2) == []

    def test_what_is_missing_is_pending(self) -> None:
        shown = view(record(1, 3, summary=None), record(2, 3, shift=None))
        assert open_names(shown, 1) == ["summary", "vector"]
        assert open_names(shown, 2) == ["shift", "vector"]

    def test_a_vector_of_each_wanted_encoding(self) -> None:
        shown = view(record(1, 3, OLD), encodings=[OLD, NEW])
        assert open_names(shown, 1) == [f"vector of {NEW}"]

    def test_an_empty_partition_needs_nothing_and_its_successor_no_shift(self) -> None:
        shown = view(record(1, 0, summary=None), record(2, 3, OLD, shift=None))
        assert open_names(shown, 1) == open_names(shown, 2) == []

    def test_what_was_given_up_is_told_apart(self) -> None:
        dead = [DeadStep("u", 1, "summary", 5, "no"), DeadStep("u", 1, "representation", 5, "no", NEW)]
        shown = view(record(1, 3, OLD, summary=None), record(2, 3, OLD), encodings=[OLD, NEW], dead=dead)
        assert open_names(shown, 1) == ["summary dead", f"vector of {NEW} dead"]
        assert open_names(shown, 2) == [f"vector of {NEW}"]

    def test_a_replacement_that_was_given_up_is_open_though_the_old_text_is_there(self) -> None:
        shown = view(record(1, 3, OLD), dead=[DeadStep("u", 1, "summary", 5, "no")])
        assert open_names(shown, 1) == ["summary dead"]


class TestDocument:
    def test_the_shape(self) -> None:
        shown = view(
            record(1, 1, OLD),
            record(2, 2, NEW, shift=None),
            cache=[behavior(9)],
            items=[Item("m9", "Nine")],
            dead=[DeadStep("u", 2, "shift", 5, "why")],
            encodings=[OLD],
        )
        held = parsed(shown)
        assert list(held) == [
            *("format", "version", "user_id", "profile", "domain", "encodings", "partitions", "cache", "dead"),
        ]
        assert (held["format"], held["version"], held["user_id"]) == ("liber.user", 1, "u")
        assert held["profile"] == {"age": 31, "tags": ["a", "b"]}
        assert held["domain"]["feedback_range"] == [1.0, 5.0]
        first, second = held["partitions"]
        assert first["summary"] == {
            "text": "a summary",
            "from_partitions": [1],
            "writer": "statistical",
            "prompt_version": "summary-1",
            "prompt_tokens": 700,
            "response_tokens": 90,
            "seconds": 1.5,
            "made_at": 1.7e9,
            "made": "2023-11-14T22:13:20+00:00",
            "note": "",
        }
        assert first["vectors"] == [{"encoding": OLD, "dimension": 4, "values": [0.1] * 4}]
        assert second["shift"] is None
        assert second["open"] == [
            {"step": "shift", "encoding": "", "dead": True},
            {"step": "representation", "encoding": OLD, "dead": False},
        ]
        assert held["cache"] == [
            {
                "event_id": "e9",
                "item_id": "m9",
                "title": "Nine",
                "feedback": 4.0,
                "timestamp": 1.6e9 + 9 * 86400,
                "time": "2020-09-22T12:26:40+00:00",
            }
        ]
        assert held["dead"] == [{"partition": 2, "step": "shift", "encoding": "", "attempts": 5, "error": "why"}]
        assert parsed(shown, vectors=False)["partitions"][0]["vectors"] == [{"encoding": OLD, "dimension": 4}]

    def test_a_shift_is_from_the_behaviors_of_two_partitions(self) -> None:
        assert parsed(view(record(1), record(2)))["partitions"][1]["shift"]["from_partitions"] == [1, 2]

    def test_a_user_with_a_profile_alone(self) -> None:
        held = parsed(view(domain=None))
        assert (held["partitions"], held["cache"], held["dead"], held["domain"]) == ([], [], [], None)

    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
    def test_vectors_read_back_as_the_same_float32(self, numbers: list[float]) -> None:
        vector = np.array(numbers, np.float32)
        held = parsed(view(record(1, representations={OLD: Representation(vector, OLD)})))
        assert np.array(held["partitions"][0]["vectors"][0]["values"], np.float32).tobytes() == vector.tobytes()

    @given(st.text(st.characters(), max_size=30))
    def test_any_text_comes_back_and_no_control_character_goes_out(self, said: str) -> None:
        shown = view(record(1, summary=text("summary", said or " ")), items=[Item("m100", said)])
        document = "".join(write_user(shown, vectors=False))
        assert document.isascii()
        assert document.replace("\n", "").isprintable()
        held = json.loads(document)
        assert held["partitions"][0]["summary"]["text"].encode(errors="surrogatepass") == (said or " ").encode(
            errors="surrogatepass"
        )

    def test_what_json_cannot_say_is_null(self) -> None:
        shown = view(cache=[Behavior("u", "m", 1.0, 1e300, "e")])
        odd = dataclasses.replace(shown, timeline=dataclasses.replace(shown.timeline, profile={"age": float("nan")}))
        held = parsed(odd)
        assert held["profile"] == {"age": None}
        assert (held["cache"][0]["timestamp"], held["cache"][0]["time"]) == (1e300, None)


class TestTerminal:
    def test_everything_is_told_with_its_origin(self) -> None:
        shown = view(
            record(1, 2, OLD),
            record(2, 3, OLD, NEW),
            record(3, 3, summary=None, shift=None),
            cache=[behavior(9)],
            items=[Item("m101", "One [b]")],
            encodings=[OLD, NEW],
            dead=[DeadStep("u", 3, "summary", 5, "the writer is away")],
        )
        told = printed(show_user(shown, ALL))
        assert "9 behaviors: 3 partitions and 1 in the cache" in told
        assert "age 31, tags a, b" in told
        assert "partition 2: 3 behaviors, 2021-04-01 to 2021-04-03" in told
        assert re.search(r"2020-12-23 \d\d:\d\d  4 stars  One \[b\]  m101\n", told)
        origin = "prompt summary-1 · 700 tokens read, 90 written · 1.5 s · made 2023-11-14 22:13"
        assert f"summary  from the 2 behaviors of partition 1 · by statistical, {origin}" in told
        assert "shift  from the 5 behaviors of partitions 1 and 2 · by statistical, prompt shift-1" in told
        assert f"vector  4 numbers by {OLD}, 4 numbers by {NEW}\n" in told
        assert f"pending  vector of {NEW}\n" in told
        assert f"pending  shift, vector of {OLD}, vector of {NEW}\n" in told
        assert "given up  summary, after 5 attempts: the writer is away\n" in told

    def test_what_is_wrong_with_a_text_is_told(self) -> None:
        shown = view(record(1, 3, OLD, summary=text("summary", note=f"the oldest 2 were left out{EVIL}")))
        told = printed(show_user(shown, ALL))
        assert "made 2023-11-14 22:13 · the oldest 2 were left out" in " ".join(told.split())
        assert "\x1b" not in told
        assert parsed(shown)["partitions"][0]["summary"]["note"].startswith("the oldest 2 were left out")

    def test_the_newest_are_listed_and_the_rest_counted(self) -> None:
        shown = view(*(record(number, 8) for number in range(1, 5)), cache=map(behavior, range(7)))
        told = printed(show_user(shown, Bounds(partitions=2, behaviors=3)))
        assert "2 older partitions not shown; --all" in told
        assert "partition 2:" not in told
        assert told.count("5 older behaviors; --all lists them") == 2
        assert "m404" not in told
        assert "m405" in told
        assert "4 older behaviors;" in told
        whole = printed(show_user(shown, ALL))
        assert "--all" not in whole
        assert all(f"  m{100 * number + at}\n" in re.sub(" +\n", "\n", whole) for number in (1, 4) for at in range(8))

    def test_a_user_with_a_profile_alone(self) -> None:
        told = printed(show_user(view(domain=None), Bounds()))
        assert "0 behaviors: 0 partitions and 0 in the cache" in told

    def test_erased_behaviors_are_said(self) -> None:
        assert "partition 1: no behaviors" in printed(show_user(view(record(1, 0, summary=None)), ALL))

    def test_nothing_from_outside_steers_it(self) -> None:
        told = printed(show_user(evil_view(), ALL), width=400)
        assert told.replace("\n", "").isprintable()
        assert r"\x1b]0;owned\x07<script>alert(1)</script>\u202e[bold]{{ 7*7 }}&" in told

    def test_the_dead(self) -> None:
        told = printed(show_dead([DeadStep("u\x1b", 3, "representation", 5, f"so {EVIL}", NEW)], 1), width=400)
        assert re.search(rf"u\\x1b +3  vector of {NEW} +5  so \\x1b", told)
        assert "liber worker --retry-dead" in told
        assert "--all" not in told
        assert "1 of 2,000 steps; --all" in printed(show_dead([DeadStep("u", 1, "summary", 5, "no")], 2000))
        assert printed(show_dead([], 0)) == "no step was given up\n"

    def test_tallies(self) -> None:
        uncounted = text("summary", prompt_tokens=None, response_tokens=None)
        timelines = [view(record(1), record(2)).timeline, view(record(1, summary=uncounted)).timeline]
        told = printed(show_tallies(count_texts(timelines)))
        assert re.search(
            r"summary +statistical +summary-1 +3 +2 +>= 1,400 +>= 180 +4.5  2023-11-14 to 2023-11-14", told
        )
        assert re.search(r"shift +statistical +shift-1 +1 +1 +700 +90 +1.5", told)
        assert printed(show_tallies([])) == "the store holds no texts\n"


class _Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.words = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def evil_view() -> UserView:
    """Every field that comes from outside tries to be something else."""
    told = text("summary", EVIL, writer=EVIL, prompt_version=EVIL)
    items = [Item(f"m{100 * number + at}", EVIL, {"genres": (EVIL, "Drama")}) for number in (1, 2) for at in range(3)]
    shown = view(
        record(1, 3, OLD, summary=told),
        record(2, 3, summary=None, representations={EVIL: Representation(np.zeros(4, np.float32), EVIL)}),
        cache=[behavior(9)],
        items=items,
        dead=[DeadStep("u", 2, "summary", 5, EVIL)],
        encodings=[OLD, EVIL],
        domain=dataclasses.replace(DOMAIN, item_noun=EVIL, feedback_noun=EVIL),
    )
    timeline = dataclasses.replace(shown.timeline, profile={EVIL: EVIL})
    return dataclasses.replace(shown, timeline=timeline)


class TestPage:
    def test_everything_is_there_and_the_markup_is_closed(self) -> None:
        shown = view(
            record(1, 2, OLD),
            record(2, 3, OLD),
            record(3, 3, summary=None, shift=None),
            cache=[behavior(9)],
            items=[Item(f"m{number}", f"Film {number}", {"genres": ("Drama",)}) for number in (100, 200)],
            dead=[DeadStep("u", 3, "summary", 5, "the writer is away")],
        )
        page = _Tags("".join(render_user(shown)))
        assert page.open == []
        assert page.tags["article"] == 4
        assert page.tags["circle"] == 2
        for told in (
            "Film 100",
            "Drama",
            "shift from the 5 behaviors of partitions 1 and 2 · by statistical",
            "Given up: summary, after 5 attempts: the writer is away",
            "Still to be made: shift, vector",
            "1 behavior not in a partition yet",
        ):
            assert told.lower() in page.words.lower()

    def test_it_runs_nothing_and_loads_nothing(self) -> None:
        page = "".join(render_user(evil_view()))
        seen = _Tags(page)
        assert not seen.tags.keys() & {"script", "img", "link", "iframe", "object", "form", "a", "bold"}
        assert not {name for name in seen.attributes if name.startswith("on")}
        assert not seen.attributes & {"src", "href", "xlink:href", "srcset"}
        assert "default-src 'none'" in page
        assert "://" not in page
        assert seen.words.count(r"\x1b]0;owned\x07<script>alert(1)</script>\u202e[bold]{{ 7*7 }}&") >= 8
        assert page.replace("\n", "").replace("\u00a0", "").isprintable()

    @settings(deadline=None, max_examples=30)
    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
    def test_no_text_breaks_the_markup(self, said: str) -> None:
        items = [Item(f"m{100 + at}", said, {"genres": (said,)}) for at in range(3)]
        shown = view(record(1, summary=text("summary", said, writer=said)), items=items)
        ordinary = [dataclasses.replace(item, title="x", attributes={"genres": ("x",)}) for item in items]
        plain = view(record(1, summary=text("summary", "x\n" * len(said.rstrip().split("\n")))), items=ordinary)
        assert _Tags("".join(render_user(shown))).tags == _Tags("".join(render_user(plain))).tags

    def test_a_user_with_a_profile_alone(self) -> None:
        assert "None yet" in _Tags("".join(render_user(view(domain=None)))).words

    def test_a_store_without_groups_shows_no_figure(self) -> None:
        bare = dataclasses.replace(DOMAIN, group_attribute="")
        assert "svg" not in _Tags("".join(render_user(view(record(1), domain=bare)))).tags
        assert "svg" not in _Tags("".join(render_user(view(record(1))))).tags

    def test_the_newest_are_listed_and_the_rest_counted(self) -> None:
        shown = view(*(record(number, 8) for number in range(1, 5)))
        words = _Tags("".join(render_user(shown, Bounds(partitions=2, behaviors=3)))).words
        assert "The newest 2 of 4 are shown." in words
        assert words.count("5 older behaviors not shown.") == 2
        assert "m404" not in words
        assert "m405" in words
        assert "not shown" not in _Tags("".join(render_user(shown, ALL))).words


class TestInterests:
    @staticmethod
    def films(*groups: tuple[str, ...]) -> list[Item]:
        return [
            Item(f"m{100 * number + at}", "film", {"genres": (group,) if group else ()})
            for number, run in enumerate(groups, 1)
            for at, group in enumerate(run)
        ]

    def test_shares_and_feedback_of_each_period(self) -> None:
        films = self.films(("Drama", "Drama", "Crime", ""), ("Crime", "Crime", "Crime", "Drama"))
        trace = trace_interests(view(record(1, 4), record(2, 4), items=films))
        assert trace is not None
        drama, crime = trace.rows["Drama"], trace.rows["Crime"]
        assert [cell and (cell.behaviors, cell.share, cell.feedback, cell.level) for cell in drama] == [
            (2, 0.5, 4.0, 0.75),
            (1, 0.25, 4.0, 0.75),
        ]
        assert [cell and cell.share for cell in crime] == [0.25, 0.75]
        assert list(trace.rows) == ["Crime", "Drama"]
        assert trace.grown == (("Crime", 0.25, 0.75),)
        assert trace.faded == (("Drama", 0.5, 0.25),)
        assert [(each.first, each.last, each.behaviors, each.feedback) for each in trace.periods] == [
            (1, 1, 4, 4.0),
            (2, 2, 4, 4.0),
        ]

    def test_a_single_period_moved_nowhere(self) -> None:
        trace = trace_interests(view(record(1, 2), items=self.films(("Drama", "Crime"))))
        assert trace is not None
        assert trace.grown == trace.faded == ()

    @given(st.integers(1, 40), st.integers(1, 20))
    def test_periods_cover_all_partitions_in_order_and_rows_are_bounded(self, partitions: int, groups: int) -> None:
        films = self.films(*(tuple(f"g{(number + at) % groups}" for at in range(3)) for number in range(partitions)))
        trace = trace_interests(view(*(record(number, 3) for number in range(1, partitions + 1)), items=films))
        assert trace is not None
        covered = [number for each in trace.periods for number in range(each.first, each.last + 1)]
        assert covered == list(range(1, partitions + 1))
        assert len(trace.periods) <= MOST_PERIODS
        assert sum(each.behaviors for each in trace.periods) == 3 * partitions
        assert 1 <= len(trace.rows) <= MOST_GROUPS
        for row in trace.rows.values():
            assert len(row) == len(trace.periods)
            assert all(cell is None or (0 < cell.share <= 1 and 0 <= cell.level <= 1) for cell in row)

    def test_erased_partitions_are_left_out(self) -> None:
        films = self.films((), ("Drama",))
        trace = trace_interests(view(record(1, 0, summary=None), record(2, 1), items=films))
        assert trace is not None
        assert [(each.first, each.last) for each in trace.periods] == [(2, 2)]


class TestCensus:
    def test_each_version_is_counted_once_for_each_user(self) -> None:
        other = text("summary", writer="openai:x", made_at=1.8e9, prompt_tokens=None)
        timelines = [view(record(1), record(2), record(3, summary=other)).timeline, view(record(1)).timeline]
        tallies = {(each.kind, each.writer): each for each in count_texts(timelines)}
        assert [(key, each.texts, each.users) for key, each in tallies.items()] == [
            (("summary", "statistical"), 3, 2),
            (("shift", "statistical"), 2, 1),
            (("summary", "openai:x"), 1, 1),
        ]
        odd = tallies["summary", "openai:x"]
        assert (odd.uncounted, odd.prompt_tokens, odd.response_tokens, odd.first, odd.last) == (1, 0, 90, 1.8e9, 1.8e9)

    def test_a_summary_brings_its_shift_and_the_next(self) -> None:
        other = text("summary", writer="openai:x")
        timeline = view(
            *(record(at, 3, OLD, NEW) for at in (1, 2)), record(3, 3, OLD, summary=other), record(4)
        ).timeline
        plan = plan_rewrite([timeline], writer="openai:x")
        assert (plan.users, plan.texts, plan.calls, plan.vectors) == (1, 1, 3, 1)
        assert (plan.prompt_tokens, plan.response_tokens, plan.seconds, plan.uncounted) == (2100, 270, 4.5, 0)
        shifts = plan_rewrite([timeline], prompt_version="shift-1")
        assert (shifts.texts, shifts.calls) == (3, 3)

    @given(st.integers(0, 8))
    def test_everything_is_every_text_once(self, partitions: int) -> None:
        timeline = view(*(record(number, 3, OLD) for number in range(1, partitions + 1))).timeline
        plan = plan_rewrite([timeline])
        # The summaries are queued; each brings its shift.
        assert plan.texts == plan.vectors == partitions
        assert plan.calls == sum(each.texts for each in count_texts([timeline]))
        assert plan_rewrite([timeline], writer="nobody") == plan_rewrite([])


class TestErasure:
    def test_exactly_what_was_removed_and_what_is_queued(self) -> None:
        before = view(*(record(number, 3, OLD) for number in (1, 2, 3, 4)), items=[Item("m201", f"Two{EVIL}")])
        place = find_event(before, "e201")
        assert place.partition == 2
        changed = dataclasses.replace
        second, third = before.timeline.partitions[1:3]
        left = (second.behaviors[0], second.behaviors[2])
        after = view(
            record(1, 3, OLD),
            changed(second, behaviors=left, summary=None, shift=None, representations={}),
            changed(third, shift=None, representations={}),
            record(4, 3, OLD),
        )
        told = tell_event_erasure(before, place, after)
        assert told[0].startswith(r"erased event 'e201' of user 'u': Two\x1b]0;owned\x07<script>")
        assert told[0].endswith(", in partition 2")
        assert told[1] == (
            f"removed with it: summary 2, shift 2, vector of partition 2 by {OLD}, shift 3, "
            f"vector of partition 3 by {OLD}"
        )
        assert told[2] == (
            "queued to be made from what remains: summary 2, shift 2, vector of partition 2, shift 3, "
            "vector of partition 3"
        )
        assert "backups" in told[3]

    def test_what_was_made_again_meanwhile_was_removed_and_is_not_queued(self) -> None:
        before = view(record(1, 3, OLD))
        again = text("summary", made_at=1.8e9)
        after = view(dataclasses.replace(before.timeline.partitions[0], summary=again))
        told = tell_event_erasure(before, find_event(before, "e100"), after)
        assert told[1:3] == ["removed with it: summary 1", "queued to be made from what remains: nothing"]

    def test_the_last_behavior_of_a_partition(self) -> None:
        before = view(record(1, 1, OLD), record(2, 3, OLD))
        after = view(record(1, 0, summary=None), record(2, 3, shift=None))
        told = tell_event_erasure(before, find_event(before, "e100"), after)
        assert told[2] == "partition 1 holds no behaviors any more, so nothing is made of it"
        assert told[3] == "queued to be made from what remains: vector of partition 2"

    def test_a_behavior_in_the_cache(self) -> None:
        before = view(record(1), cache=[behavior(9)])
        told = tell_event_erasure(before, find_event(before, "e9"), view(record(1)))
        assert told[0].endswith(": item m9 of 2020-09-22 12:26, in the cache")
        assert told[1] == "no text and no vector was made from it yet"
        assert len(told) == len(tell_event_erasure(before, find_event(before, "e9"), None)) == 3

    def test_an_unknown_event_is_named(self) -> None:
        with pytest.raises(InvalidInputError, match=r"user 'u' has no event 'e\\x1b'; `liber export`"):
            find_event(view(record(1)), "e\x1b")

    def test_a_user(self) -> None:
        told = tell_user_erasure(view(record(1, 3, OLD), record(2, 3, OLD, NEW)), Forgotten(6, 2))
        assert told[0] == (
            "erased of user 'u': 6 behaviors, 2 partitions, 2 summaries, 1 shift, 3 vectors, the profile and all "
            "pending work"
        )
        assert "backups" in told[1]
        assert "brings the user back" in told[1]


def test_the_template_lies_beside_its_module_and_nowhere_else() -> None:
    from liber_runtime.timeline import page

    assert [path.name for path in Path(page.__file__).parent.glob("*.j2")] == ["timeline.html.j2"]
