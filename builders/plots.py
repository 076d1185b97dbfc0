"""The report's plots: inline SVG that takes its colors, light or dark, and its font from the page around it.

Deterministic, and free of pyplot's global state: the same report gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from builders import paper

MOST_PARTITIONS = 60
"""Partitions of one user that a plot shows; of a longer memory, the newest."""

# Matplotlib knows no CSS, so it draws in colors that stand for the page's own and are swapped afterwards.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--surface)",
    "#050505": "var(--base)",
    "#060606": "var(--liber)",
    "#070707": "var(--paper)",
}
_INK, _MUTED, _LINE, _SURFACE, _BASE, _LIBER, _PAPER = _VARIABLES

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.titlecolor": _INK,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "figure.constrained_layout.wspace": 0.05,
    "grid.color": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}

_WIDTH = 12.5
"""Inches at 72 units each: about the page's width in CSS pixels, so that plot text is as large as page text."""

_SECONDS_PER_DAY = 86400.0
_LEAST_SPAN_SECONDS = 60.0
_SHADES = 21
_LEAST_LIFT_AT_FULL_SHADE = 2.0


def draw_timeline(partitions: Sequence[Mapping[str, Any]]) -> str:
    """One user's partitions, a row each: when they ran, and their mean feedback.

    Args:
        partitions: with ``number``, ``start`` and ``end`` (seconds, UTC) and ``mean_feedback``; at least one.
    """
    shown = partitions[-MOST_PARTITIONS:]
    with _style("timeline"):
        figure = Figure(figsize=(_WIDTH, min(9.0, 1.3 + 0.28 * len(shown))), layout="constrained")
        when, level = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        numbers = [partition["number"] for partition in shown]
        starts = np.array([partition["start"] for partition in shown]) / _SECONDS_PER_DAY
        ends = np.array([partition["end"] for partition in shown]) / _SECONDS_PER_DAY
        span = max(ends.max() - starts.min(), _LEAST_SPAN_SECONDS / _SECONDS_PER_DAY)
        # The caps keep a partition of a few minutes visible beside one of months.
        when.hlines(numbers, starts, ends, color=_LIBER, linewidth=9, capstyle="round")
        when.set(title="When its behaviors happened (UTC)", ylabel="partition")
        when.set_xlim(starts.min() - 0.03 * span, ends.max() + 0.03 * span)
        locator = AutoDateLocator(tz="UTC")  # type: ignore[no-untyped-call]
        when.xaxis.set_major_locator(locator)
        when.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz="UTC"))  # type: ignore[no-untyped-call]
        when.xaxis.get_offset_text().set_color(_MUTED)
        level.plot([partition["mean_feedback"] for partition in shown], numbers, "o-", color=_LIBER, linewidth=1.5)
        level.set(title="Mean feedback")
        level.margins(x=0.15)
        when.set_ylim(numbers[-1] + 0.7, numbers[0] - 0.7)
        when.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
        return _to_svg(figure, "timeline")


def draw_attention(attention: Sequence[Sequence[float]]) -> str:
    """Heat map of the fuser's weights (Eq. 6) as the memory grew, as multiples of an even share.

    Args:
        attention: row j holds the weights over partitions 1..j when j of them were complete; at least one row.
    """
    first = max(0, len(attention) - MOST_PARTITIONS)
    size = len(attention) - first
    lift = np.full((size, size), np.nan)
    for row, weights in enumerate(attention[first:]):
        lift[row, : row + 1] = np.asarray(weights[first:]) * len(weights)
    top = max(_LEAST_LIFT_AT_FULL_SHADE, float(np.nanmax(lift)))
    edges = np.arange(size + 1) + first + 0.5
    with _style("attention"):
        figure = Figure(figsize=(_WIDTH, min(9.0, 2.2 + 0.32 * size)), layout="constrained")
        axes: Axes = figure.subplots()
        shades = ListedColormap([(6 / 255, 6 / 255, 6 / 255, alpha) for alpha in np.linspace(0, 1, _SHADES)])
        cells = axes.pcolor(edges, edges, lift, cmap=shades, vmin=0, vmax=top, edgecolors=_LINE, linewidth=0.5)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set(xlabel="weight on partition", ylabel="partitions complete", title="Attention over time")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
        times = FuncFormatter(lambda value, _: f"{value:g}×")
        bar = figure.colorbar(cells, ax=axes, fraction=0.03, pad=0.02, format=times)
        bar.set_label("times an even share")
        return _to_svg(figure, "attention")


def draw_quality(quality: Mapping[str, Any], backbone: str) -> str:
    """AUC and log loss on the test part: base, LIBER and the paper's; the paper's only for a backbone it has."""
    theirs = {"paper, base": paper.BASE.get(backbone), "paper, LIBER": paper.LIBER.get(backbone)}
    with _style("quality"):
        figure = Figure(figsize=(_WIDTH, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        titles = {"auc": "AUC (higher is better)", "logloss": "Log loss (lower is better)"}
        for axes, (metric, title) in zip((left, right), titles.items(), strict=True):
            rows = [
                ("base", quality["base"][metric], _BASE, "o", True),
                ("LIBER", quality["liber"][metric], _LIBER, "o", True),
            ]
            for name, figures in theirs.items():
                if figures is not None:
                    rows.append((name, getattr(figures, metric), _PAPER, "D", name.endswith("LIBER")))
            _draw_dots(axes, rows)
            axes.set_title(title)
        return _to_svg(figure, "quality")


def draw_training(quality: Mapping[str, Any]) -> str:
    """Training curves of both models by epoch, on the validation slice; a ring marks the epoch that was kept."""
    with _style("training"):
        figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
        panels = figure.subplots(1, 3)
        titles = {"auc": "Validation AUC", "logloss": "Validation log loss", "loss": "Training loss"}
        for axes, (metric, title) in zip(panels, titles.items(), strict=True):
            for name, color, marker in (("base", _BASE, "s"), ("liber", _LIBER, "o")):
                result = quality[name]
                values = [epoch[metric] for epoch in result["epochs"]]
                epochs = range(1, len(values) + 1)
                label = "LIBER" if name == "liber" else name
                axes.plot(epochs, values, color=color, marker=marker, markersize=5, linewidth=1.8, label=label)
                best = result["best_epoch"]
                axes.plot([best], [values[best - 1]], "o", markersize=12, fillstyle="none", color=color)
            axes.set(title=title, xlabel="epoch")
            axes.margins(0.12)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panels[0].legend(loc="best")
        return _to_svg(figure, "training")


def draw_latency(seconds_per_1000: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds per 1000 samples, median to 99th percentile, against Table 7 on a log axis."""
    names = {"one_user": "here: one user", "distinct_users": "here: distinct users"}
    with _style("latency"):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        axes: Axes = figure.subplots()
        labels = [*names.values(), *(f"paper: {model}" for model in paper.SECONDS_PER_1000)]
        for row, (key, _) in enumerate(names.items()):
            p50, p99 = seconds_per_1000[key]["p50"], seconds_per_1000[key]["p99"]
            axes.plot([p50, p99], [row, row], color=_LIBER, linewidth=2)
            axes.plot([p50], [row], "o", color=_LIBER, markersize=9)
            axes.plot([p99], [row], "|", color=_LIBER, markersize=14, markeredgewidth=2)
            _annotate(axes, p99, row, f"{format_seconds(p50)} median, {format_seconds(p99)} p99")
        for row, seconds in enumerate(paper.SECONDS_PER_1000.values(), start=len(names)):
            axes.plot([seconds], [row], "D", color=_PAPER, markersize=8)
            _annotate(axes, seconds, row, format_seconds(seconds))
        _list_rows(axes, labels)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * 4)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("seconds per 1000 samples, log axis")
        return _to_svg(figure, "latency")


def draw_partitions_per_user(users_by_count: Mapping[str, int]) -> str:
    """Histogram: how many users have how many partitions, with the mean.

    Args:
        users_by_count: number of partitions (as text, JSON's keys) -> users that have as many.
    """
    counts = np.array([int(count) for count in users_by_count])
    users = np.array(list(users_by_count.values()))
    with _style("partitions"):
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        axes: Axes = figure.subplots()
        axes.bar(counts, users, width=0.85, color=_LIBER)
        mean = float(counts @ users / users.sum())
        axes.axvline(mean, color=_INK, linestyle="--", linewidth=1.2)
        top = ("data", "axes fraction")
        axes.annotate(f"mean {mean:.2f}", (mean, 0.92), (6, 0), xycoords=top, textcoords="offset points")
        axes.set(xlabel="partitions of a user", ylabel="users")
        axes.grid(False, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
        return _to_svg(figure, "partitions")


def draw_seconds(seconds: Mapping[str, float]) -> str:
    """Bars: wall seconds of each step, in the order in which they ran."""
    with _style("seconds"):
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.32 * len(seconds)), layout="constrained")
        axes: Axes = figure.subplots()
        values = list(seconds.values())
        axes.barh(range(len(values)), values, height=0.62, color=_LIBER)
        for row, value in enumerate(values):
            _annotate(axes, value, row, f"{value:.1f}")
        _list_rows(axes, [name.replace("_", " ") for name in seconds])
        axes.margins(x=0.08)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds")
        return _to_svg(figure, "seconds")


def draw_backbones(rows: Sequence[Mapping[str, Any]]) -> str:
    """AUC and log loss of every backbone alone and with LIBER: means, standard deviations, and the paper's.

    Dots, not bars: the axes do not begin at 0.

    Args:
        rows: of `bench.quality`, with ``backbone``, ``variant``, ``auc_mean``, ``auc_std``, ``paper_auc`` and the same
            of ``logloss``; those of other variants than ``base`` and ``liber`` are left out.
    """
    shown = [row for row in rows if row["variant"] in ("base", "liber")]
    names = list(dict.fromkeys(row["backbone"] for row in shown))
    with _style("backbones"):
        figure = Figure(figsize=(_WIDTH, 1.6 + 0.45 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        titles = {"auc": "AUC (higher is better)", "logloss": "Log loss (lower is better)"}
        for axes, (metric, title) in zip(panels, titles.items(), strict=True):
            for row in shown:
                is_base = row["variant"] == "base"
                place = names.index(row["backbone"]) + (-0.14 if is_base else 0.14)
                _draw_spread(axes, row, metric, place, _BASE if is_base else _LIBER)
            _list_rows(axes, names)
            axes.margins(x=0.08)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.set_title(title)
        for label, color, marker in (("base", _BASE, "o"), ("LIBER", _LIBER, "o"), ("paper", _PAPER, "D")):
            if marker == "o" or any(row["paper_auc"] is not None for row in shown):
                panels[0].plot([], [], marker, color=color, label=label)
        figure.legend(loc="outside lower center", ncols=3)
        return _to_svg(figure, "backbones")


def draw_variants(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Figure 4: AUC and log loss of one backbone's variants, means and standard deviations, and the paper's.

    Args:
        rows: as for `draw_backbones`, of one backbone, in the order to show them in.
        names: of the variants.
    """
    with _style("variants"):
        figure = Figure(figsize=(_WIDTH, 1.3 + 0.4 * len(rows)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        titles = {"auc": "AUC (higher is better)", "logloss": "Log loss (lower is better)"}
        for axes, (metric, title) in zip(panels, titles.items(), strict=True):
            for place, row in enumerate(rows):
                color = {"base": _BASE, "liber": _LIBER}.get(row["variant"], _MUTED)
                _draw_spread(axes, row, metric, place, color)
            _list_rows(axes, [names[row["variant"]] for row in rows])
            axes.margins(x=0.08)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.set_title(title)
        return _to_svg(figure, "variants")


def standalone(svg: str) -> str:
    """A plot as a file of its own: with the colors that it would take from the page, and the page's ground."""
    style = (
        "<style>svg{--ink:#1a2027;--muted:#57636f;--line:#d9dfe5;--surface:#ffffff;--base:#75828f;--liber:#0a62c4;"
        "--paper:#b25f00;background:var(--surface);font-family:sans-serif}@media (prefers-color-scheme:dark){svg{"
        "--ink:#e7ebef;--muted:#9faab6;--line:#333c46;--surface:#171c22;--base:#97a4b1;--liber:#62adff;"
        "--paper:#f2ad5c}}</style>"
    )
    end = svg.index(">", svg.index("<svg")) + 1
    return svg[:end] + style + svg[end:]


def format_seconds(seconds: float) -> str:
    """Three digits, in milliseconds below a second."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _draw_dots(axes: Axes, rows: Sequence[tuple[str, float, str, str, bool]]) -> None:
    for position, (_, value, color, marker, filled) in enumerate(rows):
        fill = color if filled else _SURFACE
        axes.plot([value], [position], marker, color=color, markerfacecolor=fill, markersize=9, markeredgewidth=2)
        _annotate(axes, value, position, f"{value:.4f}")
    _list_rows(axes, [row[0] for row in rows])
    axes.margins(x=0.28)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def _draw_spread(axes: Axes, row: Mapping[str, Any], metric: str, place: float, color: str) -> None:
    mean, deviation = row[f"{metric}_mean"], row[f"{metric}_std"] or 0.0
    axes.plot([mean - deviation, mean + deviation], [place, place], color=color, linewidth=2)
    axes.plot([mean], [place], "o", color=color, markersize=8)
    if row[f"paper_{metric}"] is not None:
        axes.plot([row[f"paper_{metric}"]], [place], "D", color=_PAPER, markersize=6, fillstyle="none")


def _annotate(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), (9, 0), textcoords="offset points", va="center")


def _list_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=_INK)


def _style(name: str) -> Any:
    # A salt per plot: its generated ids differ from those of the other plots on the page.
    return matplotlib.rc_context({**_STYLE, "svg.hashsalt": name})  # type: ignore[dict-item]


def _to_svg(figure: Figure, name: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    document = file.getvalue()
    svg = document[document.index("<svg") :]
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
