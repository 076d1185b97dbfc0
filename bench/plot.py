"""Lines and bars as SVG, small enough to lie in a JSON file."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 150, 40, 50
_LINE, _LABEL = 14, 44
"""Least distances between labels, so that none lies on another."""
_COLORS = ("#1f6fb4", "#c4521b", "#3a8f3a", "#7a4fa3")


def draw_lines(series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str, limit: float) -> str:
    """One line for each series of points (x, y) with x > 0, on a logarithmic x axis and a y axis from 0.

    Args:
        series: points by name, in order of x; at least one point.
        title: above the plot.
        x: name of the x axis.
        y: name of the y axis.
        limit: drawn as a dashed line, to stay below.

    Returns:
        An SVG element, with nothing to load.
    """
    points = [point for line in series.values() for point in line]
    low, high = math.log10(min(p[0] for p in points)), math.log10(max(p[0] for p in points))
    top = 1.1 * max(limit, *(p[1] for p in points))

    def at(value: float) -> float:
        share = (math.log10(value) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM)

    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 22, title, "start"),
        f'<path d="M{_LEFT} {_TOP}V{floor}H{right}" fill="none" stroke="black"/>',
        f'<path d="M{_LEFT} {up(limit):.1f}H{right}" stroke="gray" stroke-dasharray="4"/>',
        _text(_LEFT - 8, up(limit) + 4, f"{limit:g}", "end"),
        _text(_LEFT - 8, floor + 4, "0", "end"),
        _text((_LEFT + right) / 2, _HEIGHT - 10, x, "middle"),
        f'<g transform="rotate(-90 20 {floor})">{_text(20, floor, y, "start")}</g>',
    ]
    if floor - up(1) >= _LINE:
        parts.append(_text(_LEFT - 8, up(1) + 4, "1", "end"))
    labelled = -math.inf
    for value in sorted({p[0] for p in points}):
        if at(value) - labelled >= _LABEL:
            labelled = at(value)
            parts.append(_text(labelled, floor + 18, f"{value:,.0f}" if value >= 10 else f"{value:.2g}", "middle"))
    for number, (name, line) in enumerate(series.items()):
        color = _COLORS[number % len(_COLORS)]
        path = " ".join(f"{at(px):.1f},{up(py):.1f}" for px, py in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{at(px):.1f}" cy="{up(py):.1f}" r="3" fill="{color}"/>' for px, py in line]
        parts.append(f'<path d="M{right + 15} {_TOP + 20 * number}h20" stroke="{color}" stroke-width="2"/>')
        parts.append(_text(right + 40, _TOP + 4 + 20 * number, name, "start"))
    return "".join([*parts, "</svg>"])


def draw_bars(bars: Sequence[tuple[str, float]], *, title: str, limit: float, limit_name: str) -> str:
    """A horizontal bar for each value, with its number.

    Args:
        bars: name and value, from the top; at least one.
        title: above the plot.
        limit: drawn as a dashed line.
        limit_name: what that line is.

    Returns:
        An SVG element, with nothing to load.
    """
    left, row, top = 280, 26, 60
    height = top + row * len(bars) + 20
    most = max(limit, *(value for _, value in bars))

    def along(value: float) -> float:
        return left + value / most * (_WIDTH - left - 80)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(10, 22, title, "start"),
    ]
    for number, (name, value) in enumerate(bars):
        y = top + row * number
        parts += [
            _text(left - 8, y + 12, name, "end"),
            f'<rect x="{left}" y="{y}" width="{along(value) - left:.1f}" height="16" fill="{_COLORS[0]}"/>',
            _text(along(value) + 6, y + 12, f"{value:.3g}", "start"),
        ]
    line = f"M{along(limit):.1f} {top - 8}V{height - 12}"
    parts.append(f'<path d="{line}" stroke="{_COLORS[1]}" stroke-dasharray="4"/>')
    parts.append(_text(along(limit), top - 14, f"{limit_name} {limit:.3g}", "middle"))
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
