"""From the results of single runs to the rows of the quality table, and the table beside the paper's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from builders import paper

BASE, LIBER, TREES = "base", "liber", "gbdt"

VARIANTS: Mapping[str, str] = {
    BASE: "base",
    LIBER: "LIBER",
    "liber_paper": "LIBER, the paper's form",
    "items_only": "w/o r̂, items' texts alone",
    "no_partition": "w/o partition",
    "no_shift": "w/o shift",
    "mean_fusion": "w/o attention fusion",
    "length20": "length=20",
    "length100": "length=100",
    "kar": "KAR",
}
"""The variants by what the paper calls them, in the order of the table."""

ABLATIONS = tuple(name for name in VARIANTS if name not in (BASE, LIBER))

SIGNIFICANT = 0.05

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Attributes:
        backbone: its name.
        variant: one of `VARIANTS`.
        seed: of weights, batches and dropout.
        auc: on the test part.
        logloss: on the test part, natural logarithm.
        validation_auc: on the validation part, by which the epoch was chosen.
        validation_logloss: on the validation part.
        epochs: that ran; 0 for the trees.
        best_epoch: whose weights were kept; 0 for the trees.
        seconds: of the training, wall clock.
    """

    backbone: str
    variant: str
    seed: int
    auc: float
    logloss: float
    validation_auc: float
    validation_logloss: float
    epochs: int
    best_epoch: int
    seconds: float


def make_rows(results: Iterable[Result], calls_per_user: Mapping[str, float], data: str) -> list[Row]:
    """One row per backbone and variant, in order of appearance of the backbones and that of `VARIANTS`.

    Args:
        results: of runs, any order; a repeated (backbone, variant, seed) counts once, the last.
        calls_per_user: writer calls per user by variant.
        data: name of the data set: only beside the paper's are there the paper's figures.
    """
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for result in results:
        found.setdefault(result.backbone, {}).setdefault(result.variant, {})[result.seed] = result
    rows = []
    for backbone, variants in found.items():
        for variant in VARIANTS:
            if variant in variants:
                rows.append(_row(variants[variant], variants, calls_per_user.get(variant), data == paper.DATA_NAME))
        assert all(variant in VARIANTS for variant in variants), backbone
    return rows


def paired_p_value(first: Mapping[int, float], second: Mapping[int, float]) -> float | None:
    """Two-sided p-value of a t-test paired by seed; None below two common seeds, or if all differ by the same."""
    seeds = sorted(first.keys() & second.keys())
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    if len(seeds) < 2 or np.ptp(differences) <= 1e-12:
        return None
    return float(stats.ttest_rel([first[seed] for seed in seeds], [second[seed] for seed in seeds]).pvalue)


def _row(
    runs: Mapping[int, Result],
    variants: Mapping[str, Mapping[int, Result]],
    calls: float | None,
    is_papers_data: bool,
) -> Row:
    one = next(iter(runs.values()))
    auc, logloss = _values(runs, "auc"), _values(runs, "logloss")
    base = variants.get(BASE, {}) if one.variant != BASE else {}
    row: Row = {
        "backbone": one.backbone,
        "variant": one.variant,
        "auc_mean": _mean(auc),
        "auc_std": _deviation(auc),
        "logloss_mean": _mean(logloss),
        "logloss_std": _deviation(logloss),
        "relative_improvement": _improvement(auc, _values(base, "auc")),
        "p_value": paired_p_value(auc, _values(base, "auc")),
        "logloss_relative_improvement": _reduction(logloss, _values(base, "logloss")),
        "logloss_p_value": paired_p_value(logloss, _values(base, "logloss")),
        "validation_auc_mean": _mean(_values(runs, "validation_auc")),
        "validation_logloss_mean": _mean(_values(runs, "validation_logloss")),
        "calls_per_user": calls,
    }
    if one.variant in ABLATIONS:
        liber = variants.get(LIBER, {})
        row["auc_minus_liber"] = _difference(auc, _values(liber, "auc"))
        row["p_value_liber"] = paired_p_value(auc, _values(liber, "auc"))
        row["logloss_p_value_liber"] = paired_p_value(logloss, _values(liber, "logloss"))
    quality = _paper_quality(one.backbone, one.variant) if is_papers_data else None
    row["paper_auc"] = quality.auc if quality else _paper_auc(one) if is_papers_data else None
    row["paper_logloss"] = quality.logloss if quality else None
    row["per_seed"] = [
        {
            "seed": seed,
            "auc": run.auc,
            "logloss": run.logloss,
            "epochs": run.epochs,
            "seconds": run.seconds,
            "best_epoch": run.best_epoch,
            "validation_auc": run.validation_auc,
            "validation_logloss": run.validation_logloss,
        }
        for seed, run in sorted(runs.items())
    ]
    return row


def _values(runs: Mapping[int, Result], metric: str) -> dict[int, float]:
    return {seed: getattr(run, metric) for seed, run in runs.items()}


def _mean(values: Mapping[int, float]) -> float:
    return float(np.mean(list(values.values())))


def _deviation(values: Mapping[int, float]) -> float | None:
    """The sample's standard deviation; None of one value."""
    return float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else None


def _common(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, float] | None:
    """The means over the seeds that both have."""
    seeds = first.keys() & second.keys()
    if not seeds:
        return None
    return float(np.mean([first[each] for each in seeds])), float(np.mean([second[each] for each in seeds]))


def _improvement(values: Mapping[int, float], base: Mapping[int, float]) -> float | None:
    """The paper's Rel.Impr. of AUC: by which part of the base's a row is above it."""
    both = _common(values, base)
    return (both[0] - both[1]) / both[1] if both else None


def _reduction(values: Mapping[int, float], base: Mapping[int, float]) -> float | None:
    """The paper's Rel.Impr. of log loss: by which part of the base's a row is below it."""
    improvement = _improvement(values, base)
    return None if improvement is None else -improvement


def _difference(values: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    both = _common(values, other)
    return both[0] - both[1] if both else None


def _paper_quality(backbone: str, variant: str) -> paper.Quality | None:
    if variant == "kar":
        return paper.KAR if backbone == paper.BACKBONE else None
    return {BASE: paper.BASE, LIBER: paper.LIBER, "liber_paper": paper.LIBER}.get(variant, {}).get(backbone)


def _paper_auc(result: Result) -> float | None:
    if result.backbone != paper.BACKBONE:
        return None
    return paper.ABLATION_AUC.get(VARIANTS[result.variant])


def to_markdown(figures: Mapping[str, Any]) -> str:
    """The document beside the JSON: Tables 1 and 2, and Figure 4 with Table 6, each beside the paper's figures.

    Args:
        figures: as `bench.quality` writes them: ``rows``, ``data``, ``split``, ``seeds``, ``machine``.
    """
    rows: Sequence[Row] = figures["rows"]
    table = {(row["backbone"], row["variant"]): row for row in rows}
    backbones = list(dict.fromkeys(row["backbone"] for row in rows if row["backbone"] != TREES))
    is_papers = figures["data"]["name"] == paper.DATA_NAME
    sizes = figures["split"]
    parts = [
        f"# Quality on {_plain(figures['data']['name'])}",
        f"{sizes['train']:,} samples to train on, {sizes['validation']:,} to choose by, {sizes['test']:,} of the test "
        f"part that is reported; seeds {', '.join(map(str, figures['seeds']))}. Mean ± standard deviation over the "
        "seeds. Rel. is relative to the same backbone's base. p is of a two-sided t-test paired by seed, on AUC; "
        f"* below {SIGNIFICANT}.",
    ]
    if any((each, BASE) in table or (each, LIBER) in table for each in backbones):
        parts += ["## Backbones, alone and with LIBER (Tables 1 and 2)", _compatibility(table, backbones, is_papers)]
    for backbone in backbones:
        if any((backbone, variant) in table for variant in ABLATIONS):
            parts += [f"## Variants of LIBER on {_plain(backbone)} (Figure 4, Table 6)"]
            parts += [_ablation(table, backbone, is_papers)]
    notes = [
        "The texts are the statistical writer's, not an LLM's; all variants have the same writer, encoder and PCA "
        "dimension.",
        f"{TREES}: gradient-boosted trees on point-in-time features (`bench/trees.py`), the anchor from outside.",
    ]
    if is_papers:
        notes.append(
            f"paper: {paper.SOURCE} with {paper.WRITER}. It does not say how its samples were chosen; its Figure 4 "
            "prints no figures, so those of the ablations are from its Table 6."
        )
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)]) + "\n"


def _compatibility(table: Mapping[tuple[str, str], Row], backbones: Sequence[str], is_papers: bool) -> str:
    header = ["backbone", "AUC base", "AUC LIBER", "Rel.", "p", "log loss base", "log loss LIBER", "Rel."]
    if is_papers:
        header += ["paper AUC", "paper Rel.", "paper log loss"]
    lines = []
    for backbone in [*backbones, *([TREES] if (TREES, BASE) in table else [])]:
        base, liber = table.get((backbone, BASE)), table.get((backbone, LIBER))
        if base is None and liber is None:
            continue
        line = [
            _plain(backbone),
            _metric(base, "auc"),
            _metric(liber, "auc", _star(liber)),
            _percent(liber, "relative_improvement"),
            _probability(liber, "p_value"),
            _metric(base, "logloss"),
            _metric(liber, "logloss"),
            _percent(liber, "logloss_relative_improvement"),
        ]
        if is_papers:
            alone, enhanced = paper.BASE.get(backbone), paper.LIBER.get(backbone)
            line += (
                [
                    f"{alone.auc:.4f} → {enhanced.auc:.4f}",
                    f"{(enhanced.auc - alone.auc) / alone.auc:+.2%}",
                    f"{alone.logloss:.4f} → {enhanced.logloss:.4f}",
                ]
                if alone and enhanced
                else [""] * 3
            )
        lines.append(line)
    return _grid(header, lines)


def _ablation(table: Mapping[tuple[str, str], Row], backbone: str, is_papers: bool) -> str:
    header = ["variant", "AUC", "log loss", "Rel.", "p", "AUC − LIBER", "p to LIBER", "calls per user"]
    if is_papers:
        header += ["paper AUC", "paper log loss"]
    lines = []
    for variant, name in VARIANTS.items():
        row = table.get((backbone, variant))
        if row is None:
            continue
        calls, gap = row["calls_per_user"], row.get("auc_minus_liber")
        line = [
            name,
            _metric(row, "auc", _star(row)),
            _metric(row, "logloss"),
            _percent(row, "relative_improvement"),
            _probability(row, "p_value"),
            "" if gap is None else f"{gap:+.4f}",
            _probability(row, "p_value_liber"),
            "" if calls is None else f"{calls:.2f}",
        ]
        if is_papers:
            line += ["" if row[key] is None else f"{row[key]:.4f}" for key in ("paper_auc", "paper_logloss")]
        lines.append(line)
    return _grid(header, lines)


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def _metric(row: Row | None, metric: str, mark: str = "") -> str:
    if row is None:
        return ""
    deviation = row[f"{metric}_std"]
    spread = "" if deviation is None else f" ± {deviation:.4f}"
    return f"{row[f'{metric}_mean']:.4f}{mark}{spread}"


def _star(row: Row | None) -> str:
    return "\\*" if row is not None and row["p_value"] is not None and row["p_value"] < SIGNIFICANT else ""


def _percent(row: Row | None, key: str) -> str:
    return "" if row is None or row[key] is None else f"{row[key]:+.2%}"


def _probability(row: Row | None, key: str) -> str:
    value = None if row is None else row.get(key)
    if value is None:
        return ""
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _plain(text: str) -> str:
    """A name from outside, as one cell's plain text."""
    return " ".join("".join(f"\\{each}" if each in "\\`*_|<>[]#" else each for each in text).split())
