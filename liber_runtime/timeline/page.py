"""One user's memory as one HTML page: self-contained, without scripts, light and dark, for people who decide.

What comes from outside is escaped by the template, its control characters are made `visible`, and the page's policy
(``default-src 'none'``) lets a browser load and run nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2

from liber_runtime.interest import bounded
from liber_runtime.timeline import UserView
from liber_runtime.timeline.interests import Cell, InterestTrace, trace_interests
from liber_runtime.timeline.terminal import Bounds, tell_attributes, tell_origin, tell_vectors
from liber_runtime.wording import amount, day, moment, visible, visible_lines

PAGE_BOUNDS = Bounds(partitions=60, behaviors=50)
"""What a page holds unless all is asked for; a browser shows a few thousand behaviors well."""

_TEMPLATE = "timeline.html.j2"

_LABEL_WIDTH, _COLUMN_WIDTH, _ROW_HEIGHT, _TOP = 172, 56, 38, 40
"""In units of the drawing."""

_MOST_LABEL_CHARACTERS = 22


@dataclass(frozen=True, slots=True)
class _Dot:
    """A cell of the trace where it is drawn; its area is the share, its color the level (in percent)."""

    x: float
    y: float
    radius: float
    level: int
    told: str


@dataclass(frozen=True, slots=True)
class _Drawing:
    width: int
    height: int
    rows: list[tuple[float, str, str]]
    columns: list[tuple[float, str, str, str]]
    dots: list[_Dot]


def render_user(view: UserView, bounds: Bounds = PAGE_BOUNDS) -> Iterator[str]:
    """The page, piece by piece.

    Args:
        view: what is held.
        bounds: how much is listed. The figure is always over all partitions.
    """
    trace = trace_interests(view)
    records = view.timeline.partitions
    shown = records if bounds.partitions is None else records[max(len(records) - bounds.partitions, 0) :]
    stream = _template().stream(
        view=view,
        timeline=view.timeline,
        behaviors=view.behaviors_of(record.number for record in records) + len(view.timeline.cache),
        profile=tell_attributes(view.timeline.profile),
        trace=trace,
        drawing=_draw(view, trace) if trace else None,
        records=tuple(reversed(shown)),
        most_behaviors=bounds.behaviors,
        tell_origin=tell_origin,
        tell_vectors=tell_vectors,
    )
    stream.enable_buffering(256)
    return iter(stream)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("liber_runtime", "timeline"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, lines=visible_lines, day=day, moment=moment, amount=amount)
    return environment.get_template(_TEMPLATE)


def _draw(view: UserView, trace: InterestTrace) -> _Drawing:
    """Lays the trace out: a row for each group, a column for each period, a dot where something was chosen."""
    dots, rows = [], []
    largest = max(cell.share for row in trace.rows.values() for cell in row if cell)
    for at, (group, cells) in enumerate(trace.rows.items()):
        y = _TOP + (at + 0.5) * _ROW_HEIGHT
        rows.append((y, bounded(visible(group), _MOST_LABEL_CHARACTERS), visible(group)))
        for column, cell in enumerate(cells):
            if cell is not None:
                x = _LABEL_WIDTH + (column + 0.5) * _COLUMN_WIDTH
                radius = max(2.0, (_ROW_HEIGHT / 2 - 2) * (cell.share / largest) ** 0.5)
                told = _tell_cell(view, trace, column, cell)
                dots.append(_Dot(x, y, round(radius, 1), round(100 * cell.level), told))
    columns = []
    for column, period in enumerate(trace.periods):
        number = f"{period.first}" if period.first == period.last else f"{period.first}–{period.last}"
        x = _LABEL_WIDTH + (column + 0.5) * _COLUMN_WIDTH
        columns.append((x, number, day(period.start)[:7], f"{period.feedback:.3g}"))
    height = _TOP + len(rows) * _ROW_HEIGHT + 30
    return _Drawing(_LABEL_WIDTH + len(columns) * _COLUMN_WIDTH + 8, height, rows, columns, dots)


def _tell_cell(view: UserView, trace: InterestTrace, column: int, cell: Cell) -> str:
    period = trace.periods[column]
    mean = view.feedback(float(f"{cell.feedback:.3g}"))
    return f"{cell.behaviors} of {amount(period.behaviors, 'behavior')} ({cell.share:.0%}), {visible(mean)} on average"
