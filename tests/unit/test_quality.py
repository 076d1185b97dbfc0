"""The quality table: statistics by hand, what is kept and what is made again, the documents."""

from __future__ import annotations

import dataclasses
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from quality_harness import note_in, result, work_noting

from bench.quality import choose_runs, draw, write_documents
from bench.quality_cache import ResultCache, Run, complete
from bench.quality_runs import QualitySettings, digest_data, make_key, without_words
from bench.quality_table import Result, make_rows, paired_p_value, to_markdown
from builders import paper
from builders.datasets import sample
from builders.models import BACKBONES
from liber_runtime.exceptions import ConfigurationError, InvalidInputError

ROW_KEYS = {
    "backbone",
    "variant",
    "auc_mean",
    "auc_std",
    "logloss_mean",
    "logloss_std",
    "relative_improvement",
    "p_value",
    "per_seed",
}


RESULTS = [
    *(result("DIEN", "base", seed, auc) for seed, auc in enumerate((0.79, 0.80, 0.78), start=1)),
    *(result("DIEN", "liber", seed, auc, 0.48) for seed, auc in enumerate((0.80, 0.82, 0.81), start=1)),
    *(result("DIEN", "no_shift", seed, auc) for seed, auc in enumerate((0.80, 0.81, 0.79), start=1)),
    result("gbdt", "base", 1, 0.795),
]


def rows_by_name(results: list[Result], data: str = "books") -> dict[tuple[str, str], dict[str, object]]:
    return {(row["backbone"], row["variant"]): row for row in make_rows(results, {"liber": 8.96}, data)}


def figures(data: str = "books") -> dict[str, object]:
    return {
        "data": {"name": data},
        "split": {"train": 1000, "validation": 100, "test": 110},
        "seeds": [1, 2, 3],
        "rows": make_rows(RESULTS, {"liber": 8.96}, data),
    }


def test_the_paired_t_test_by_hand() -> None:
    # Differences .01, .02, .03: mean .02, standard error .01 / sqrt(3), so t = 2 sqrt(3) with two degrees of freedom,
    # of which the distribution function is 1/2 + t / (2 sqrt(2 + t^2)).
    first = {1: 0.80, 2: 0.82, 3: 0.81}
    second = {1: 0.79, 2: 0.80, 3: 0.78}
    t = 2 * math.sqrt(3)
    assert paired_p_value(first, second) == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert paired_p_value(second, first) == paired_p_value(first, second)


def test_seeds_are_paired_by_number_and_only_common_ones_count() -> None:
    first = {3: 0.81, 1: 0.80, 2: 0.82, 9: 0.1}
    second = {1: 0.79, 2: 0.80, 3: 0.78, 8: 0.9}
    assert paired_p_value(first, second) == pytest.approx(
        paired_p_value({1: 0.80, 2: 0.82, 3: 0.81}, {1: 0.79, 2: 0.80, 3: 0.78})
    )


@pytest.mark.parametrize("second", [{1: 0.7}, {}, {1: 0.7, 2: 0.8}], ids=["one", "none", "the same difference"])
def test_where_there_is_no_spread_there_is_no_p_value(second: dict[int, float]) -> None:
    assert paired_p_value({1: 0.8, 2: 0.9}, second) is None


def test_a_row_says_what_the_runs_came_to() -> None:
    rows = rows_by_name(RESULTS)
    liber, base = rows["DIEN", "liber"], rows["DIEN", "base"]
    assert all(row.keys() >= ROW_KEYS for row in rows.values())
    assert liber["auc_mean"] == pytest.approx(0.81)
    assert liber["auc_std"] == pytest.approx(0.01)
    assert liber["relative_improvement"] == pytest.approx((0.81 - 0.79) / 0.79)
    assert liber["logloss_relative_improvement"] == pytest.approx((0.5 - 0.48) / 0.5)
    assert liber["p_value"] == pytest.approx(0.0742, abs=1e-4)
    assert liber["calls_per_user"] == 8.96
    assert (
        liber["per_seed"][1].items() >= {"seed": 2, "auc": 0.82, "logloss": 0.48, "epochs": 5, "seconds": 1.5}.items()
    )  # type: ignore[index]
    assert (base["relative_improvement"], base["p_value"]) == (None, None)
    assert "p_value_liber" not in liber
    assert rows["DIEN", "no_shift"]["auc_minus_liber"] == pytest.approx(-0.01)
    assert rows["DIEN", "no_shift"]["p_value_liber"] == pytest.approx(
        paired_p_value({1: 0.80, 2: 0.81, 3: 0.79}, {1: 0.80, 2: 0.82, 3: 0.81})
    )
    assert rows["gbdt", "base"]["auc_std"] is None


def test_a_repeated_run_counts_once() -> None:
    rows = rows_by_name([*RESULTS, result("DIEN", "base", 1, 0.79)])
    assert [each["seed"] for each in rows["DIEN", "base"]["per_seed"]] == [1, 2, 3]  # type: ignore[attr-defined]


def test_the_papers_figures_stand_beside_those_of_its_data_alone() -> None:
    theirs = rows_by_name(RESULTS, paper.DATA_NAME)
    assert theirs["DIEN", "liber"]["paper_auc"] == paper.LIBER["DIEN"].auc
    assert theirs["DIEN", "base"]["paper_logloss"] == paper.BASE["DIEN"].logloss
    assert theirs["DIEN", "no_shift"]["paper_auc"] == paper.ABLATION_AUC["w/o shift"]
    assert theirs["DIEN", "no_shift"]["paper_logloss"] is None
    assert theirs["gbdt", "base"]["paper_auc"] is None
    assert {row["paper_auc"] for row in rows_by_name(RESULTS).values()} == {None}
    assert "0.7988 → 0.8225" in to_markdown(figures(paper.DATA_NAME))
    assert "paper AUC" not in to_markdown(figures())


def test_markdown_has_a_line_for_each_row_and_equal_columns() -> None:
    text = to_markdown(figures())
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| DIEN | 0.7900 ± 0.0100 | 0.8100 ± 0.0100 | +2.53% | 0.074 |" in text
    assert any(line.startswith("| gbdt | 0.7950 |") for line in lines)
    assert any(line.startswith("| w/o shift | 0.8000 ± 0.0100 |") for line in lines)
    assert {line.count("|") for line in lines} == {9}
    hostile = {**figures("a|b<img>"), "rows": make_rows([result("m|:C", "base", 1, 0.7)], {}, "a")}
    assert "a\\|b\\<img\\>" in to_markdown(hostile)
    assert "| m\\|:C |" in to_markdown(hostile)


def test_plots_are_svg_with_a_mark_for_every_row(tmp_path: Path) -> None:
    plots = draw(figures(paper.DATA_NAME))
    assert plots.keys() == {"backbones", "variants-DIEN"}
    for svg in plots.values():
        texts = "".join(ElementTree.fromstring(svg).itertext())
        assert "AUC (higher is better)" in texts
        assert "--liber:" in svg
    assert "w/o shift" in "".join(ElementTree.fromstring(plots["variants-DIEN"]).itertext())
    write_documents(figures(), tmp_path / "table" / "quality.md")
    assert "![backbones](quality-backbones.svg)" in (tmp_path / "table" / "quality.md").read_text()
    assert (tmp_path / "table" / "quality-backbones.svg").read_text().startswith("<svg")


def test_only_what_is_missing_runs_and_what_ended_is_kept(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "results")
    keys = {Run("DIEN", "base", seed): f"{seed}" for seed in (1, 2)}
    first = {run: result(*run, 0.7) for run in keys}
    cache.put("1", first[Run("DIEN", "base", 1)])
    found = complete(keys, cache, work_noting, 1, note_in, (tmp_path,))
    assert found[Run("DIEN", "base", 1)].auc == 0.7
    assert found[Run("DIEN", "base", 2)].auc == pytest.approx(0.82)
    assert [path.name for path in tmp_path.glob("*.asked")] == ["DIEN base seed 2.asked"]
    again = complete(keys, cache, work_noting, 1, note_in, (tmp_path,))
    assert again == found
    assert (tmp_path / "DIEN base seed 2.asked").read_text() == "x"


def test_a_run_that_fails_says_which_and_loses_no_other(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "results")
    keys = {Run("DIEN", "base", seed): f"{seed}" for seed in (1, 13)}
    with pytest.raises(InvalidInputError, match=r"^DIEN base seed 13: thirteen is no seed$"):
        complete(keys, cache, work_noting, 1, note_in, (tmp_path,))
    assert cache.get("1") is not None
    assert cache.get("13") is None


def test_a_file_that_was_torn_is_no_result(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path)
    kept = result("DIEN", "base", 1, 0.8)
    cache.put("k", kept)
    assert cache.get("k") == kept
    cache.path("k").write_text(cache.path("k").read_text()[:40])
    assert cache.get("k") is None
    cache.path("k").write_text('{"backbone": "DIEN"}')
    assert cache.get("k") is None


def test_a_key_is_of_all_that_a_result_depends_on_and_of_nothing_else() -> None:
    dataset = sample.generate(users=5, items=10, behaviors=50)
    data = digest_data(dataset)
    usual = QualitySettings()
    run = Run("DIEN", "liber", 1)

    def key(run: Run = run, data: str = data, writer: str = "w", **changed: object) -> str:
        return make_key(run, data, writer, dataclasses.replace(usual, **changed))  # type: ignore[arg-type]

    others = [
        key(Run("DIN", "liber", 1)),
        key(Run("DIEN", "base", 1)),
        key(Run("DIEN", "liber_paper", 1)),
        key(Run("DIEN", "liber", 2)),
        key(data=digest_data(dataclasses.replace(dataset, items={}))),
        key(data=digest_data(dataclasses.replace(dataset, behaviors=dataset.behaviors[1:]))),
        key(writer="v"),
        key(dimension=16),
        key(history_length=10),
        key(partition=10),
    ]
    assert key() == key()
    assert len({key(), *others}) == 1 + len(others)
    # One text for each partition is never renewed; a base has no texts; the trees read none of this.
    assert key(refresh=1) == key()
    kar, whole, base, trees = (
        Run("DIEN", "kar", 1),
        Run("DIEN", "no_partition", 1),
        Run("DIEN", "base", 1),
        Run("gbdt", "base", 1),
    )
    assert key(whole, refresh=1) != key(whole)
    assert key(kar, writer="v") != key(kar)
    assert key(base, dimension=16, writer="v", refresh=1) == key(base)
    assert key(trees, dimension=16, history_length=3) == key(trees)


def test_code_is_known_by_what_it_does() -> None:
    source = '"""Words."""\n\ndef f(x):\n    """More."""\n    return x + 1  # why\n'
    same = "def f(x):\n    return (x\n    + 1)\n"
    other = "def f(x):\n    return x + 2\n"
    assert without_words(source) == without_words(same)
    assert without_words(source) != without_words(other)


def test_runs_are_seed_by_seed_and_ablations_are_on_the_papers_backbone() -> None:
    runs = choose_runs([], [], (1, 2))
    assert runs[0] == Run("gbdt", "base", 1)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.backbone for run in runs} == {"gbdt", *BACKBONES}
    assert {run.backbone for run in runs if run.variant == "kar"} == {"DIEN"}
    assert choose_runs(["DCN"], ["liber"], (1,)) == [
        Run("gbdt", "base", 1),
        Run("DCN", "base", 1),
        Run("DCN", "liber", 1),
    ]
    assert Run("DCN", "kar", 1) in choose_runs(["DCN"], [], (1,))


@pytest.mark.parametrize(("backbones", "variants", "named"), [(["DCM"], [], "DCM"), ([], ["lieber"], "lieber")])
def test_an_unknown_name_is_refused_before_anything_runs(backbones: list[str], variants: list[str], named: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{named}.* is unknown; there are"):
        choose_runs(backbones, variants, (1,))
