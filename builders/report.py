"""The report of a run: `report.json` for machines, and one self-contained page, `report.html`, for people.

The page asks nothing of any other host. Ids, titles, profiles and texts come from outside and are escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from builders import paper, plots

SAMPLE = "sample"
"""The name of the generated data set."""

STATISTICAL = "statistical"
"""The name of the writer that is not an LLM."""

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True, slots=True)
class _Row:
    """One figure of this run beside the paper's."""

    name: str
    here: str
    there: str
    source: str


def render(report: Mapping[str, Any]) -> str:
    """Makes the page.

    Args:
        report: what ``report.json`` holds.

    Returns:
        A whole HTML document; the same report gives the same bytes.

    Raises:
        jinja2.UndefinedError: a key that the page shows is missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(utc=_format_time, duration=plots.format_seconds, signed=_format_difference)
    return environment.get_template(_TEMPLATE).render(
        report=report,
        paper=paper,
        paper_base=paper.BASE.get(report["backbone"]),
        paper_liber=paper.LIBER.get(report["backbone"]),
        notices=_notices(report),
        comparison=_compare(report),
        plots={name: Markup(svg) for name, svg in _draw(report).items()},
        most_partitions=plots.MOST_PARTITIONS,
    )


def write(report: Mapping[str, Any], directory: Path) -> None:
    """Writes ``report.json`` and ``report.html`` into `directory`, each whole or not at all.

    Args:
        report: what ``report.json`` holds; keys keep their order, for steps are told in the order they ran.
        directory: made if it is missing.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot say.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = render(report)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / "report.json", text)
    _replace(directory / "report.html", page)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _draw(report: Mapping[str, Any]) -> dict[str, str]:
    drawn = {
        "quality": plots.draw_quality(report["quality"], report["backbone"]),
        "training": plots.draw_training(report["quality"]),
        "latency": plots.draw_latency(report["serving"]["seconds_per_1000"]),
        "partitions": plots.draw_partitions_per_user(report["memory"]["partitions_per_user"]),
        "seconds": plots.draw_seconds(report["seconds"]),
    }
    illustration = report["illustration"]
    if illustration["partitions"]:
        drawn["timeline"] = plots.draw_timeline(illustration["partitions"])
    if illustration["attention"]:
        drawn["attention"] = plots.draw_attention(illustration["attention"])
    return drawn


def _notices(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before reading a figure."""
    notices = []
    if report["data"]["name"] == SAMPLE:
        notices.append(
            "The data are generated, with planted interests that drift. The figures show that the system works from "
            "end to end; they say nothing about real users and cannot be set beside the paper's."
        )
    elif report["data"]["name"] != paper.DATA_NAME:
        notices.append(
            f"The paper's figures are on {paper.DATA}, another data set than this run's: they are only a frame."
        )
    if STATISTICAL in report["writer"].split(", "):
        notices.append(
            "The statistical writer made the texts: counts, means and changes over item metadata. It is not an LLM, "
            f"and no LLM was called. The paper's texts are {paper.WRITER}'s."
        )
    elif report["writer"] != paper.WRITER:
        notices.append(f"The texts are {report['writer']}'s; the paper's are {paper.WRITER}'s.")
    if report["encoder"] != paper.ENCODER:
        notices.append(f"The texts were encoded by {report['encoder']}; the paper used {paper.ENCODER}.")
    notices.append(
        "Seconds are this machine's. The paper states no hardware, so they are not comparable across machines: "
        "compare the order of magnitude, no more."
    )
    return notices


def _compare(report: Mapping[str, Any]) -> list[_Row]:
    """The figures that the paper gives in one number, or that vouch for the others."""
    data, serving = report["data"], report["serving"]
    latency = serving["seconds_per_1000"]
    table_7 = ", ".join(f"{model} {plots.format_seconds(value)}" for model, value in paper.SECONDS_PER_1000.items())
    rows = [
        _Row("Users with samples", f"{data['eligible_users']:,}", f"{paper.USERS:,}", "section 4.1.1"),
        _Row(
            "Writer calls per user",
            f"{report['memory']['calls_per_user']:.4f}",
            f"{paper.LLM_COST['LIBER'].calls_per_user:.2f}",
            "Table 6",
        ),
    ]
    for key, name in (("one_user", "One user"), ("distinct_users", "Distinct users")):
        figures = latency[key]
        rows.append(
            _Row(
                f"{name}: time for 1000 samples (U = {figures['users']:,}, N = {figures['candidates']:,})",
                f"{plots.format_seconds(figures['p50'])} median, {plots.format_seconds(figures['p99'])} p99",
                table_7,
                "Table 7, other hardware",
            )
        )
    rows.append(_Row("Served AUC, over gRPC", f"{serving['auc']:.4f}", "—", f"{serving['samples']:,} samples"))
    difference = f"{serving['max_abs_diff_vs_offline']:.1e}"
    rows.append(_Row("Served against offline, largest difference", difference, "—", "probability"))
    return rows


def _format_difference(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")
