"""Tables 1 and 2 and Figure 4 of the paper: AUC and log loss of every backbone, alone and with LIBER and its variants.

    python -m bench.quality --data D --seeds 5 --json quality.json

Writes the figures as JSON, as Markdown beside the paper's, and as plots. Every run is chosen by the validation part and
measured on the test part once. What was finished is kept under ``--cache``: a rerun does only what is missing, a run
that was killed loses those under way at most.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.environment import describe_machine, describe_versions, run_command, show_figures
from bench.quality_cache import ResultCache, Run, complete
from bench.quality_runs import (
    FUSIONS,
    QualitySettings,
    Trees,
    digest_data,
    make_key,
    prepare_runs,
    share,
    work,
)
from bench.quality_table import ABLATIONS, BASE, LIBER, TREES, VARIANTS, Result, make_rows, to_markdown
from builders import paper
from builders.datasets import Dataset, load
from builders.models import BACKBONES
from builders.plots import draw_backbones, draw_variants, standalone
from builders.replay import Samples, Split, replay, split
from builders.variants import REFRESH, calls_per_user, find_variant
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.partition import Count
from liber_runtime.progress import console, progress
from liber_runtime.writers import Writer
from liber_runtime.writers.statistical import StatisticalWriter


def choose_runs(backbones: Sequence[str], variants: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs in order: seed by seed, so that an unfinished table has all its rows first.

    Args:
        backbones: names; none for all there are. The trees are always among them.
        variants: names; none for base and LIBER on every backbone, and the others on the paper's backbone or, if that
            is not chosen, on the last.
        seeds: one or more.

    Raises:
        ConfigurationError: an unknown name.
    """
    chosen = [each for each in dict.fromkeys(backbones or BACKBONES) if each != TREES]
    for backbone in chosen:
        if backbone not in BACKBONES and ":" not in backbone:
            raise ConfigurationError(
                f"backbone {backbone!r} is unknown; there are {', '.join(BACKBONES)} and {TREES}, or name your own as "
                "package.module:Class"
            )
    for variant in variants:
        if variant not in VARIANTS:
            raise ConfigurationError(f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}")
    ablated = paper.BACKBONE if paper.BACKBONE in chosen else (chosen or [""])[-1]
    pairs = [(TREES, BASE)]
    for backbone in chosen:
        default = [*(BASE, LIBER), *(ABLATIONS if backbone == ablated else ())]
        # Without its base there is nothing that a variant improves on.
        wanted = {BASE, *variants} if variants else set(default)
        pairs += [(backbone, variant) for variant in VARIANTS if variant in wanted]
    return [Run(backbone, variant, seed) for seed in seeds for backbone, variant in pairs]


def measure(
    dataset: Dataset,
    samples: Samples,
    parts: Split,
    runs: Sequence[Run],
    writer: Writer,
    cache: Path,
    jobs: int,
    settings: QualitySettings,
    digest: str,
    only_kept: bool = False,
) -> dict[Run, Result]:
    """The results of all runs, kept or made now; see `prepare_runs` and `complete`.

    Args:
        dataset: whose log was replayed.
        samples: of the replay.
        parts: of the samples.
        runs: of `choose_runs`.
        writer: of all texts.
        cache: keeps results, texts and vectors.
        jobs: processes.
        settings: see `QualitySettings`.
        digest: of the data, see `digest_data`.
        only_kept: leave out the runs that are not kept.
    """
    keys = {run: make_key(run, digest, writer.name, settings) for run in runs}
    results = ResultCache(cache / "runs")
    if only_kept:
        kept = {run: results.get(key) for run, key in keys.items()}
        return {run: result for run, result in kept.items() if result is not None}
    _grow_trees([run for run in runs if run.backbone == TREES], keys, results, Trees(dataset, samples, parts))
    missing = [run for run in runs if results.get(keys[run]) is None]
    console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are kept from before", soft_wrap=True)
    if not missing:
        return complete(keys, results, work, jobs)
    shared = cache / digest[:16]
    shared.mkdir(parents=True, exist_ok=True)
    prepared = prepare_runs(
        dataset, samples, parts, {run.variant for run in missing}, writer, shared / "knowledge", settings
    )
    with tempfile.TemporaryDirectory(prefix="prepared-", dir=shared) as directory:
        prepared.save(Path(directory))
        checkpoints = cache / "checkpoints"
        return complete(keys, results, work, jobs, share, (Path(directory), settings, checkpoints))


def _grow_trees(runs: Sequence[Run], keys: Mapping[Run, str], results: ResultCache, trees: Trees) -> None:
    missing = [run for run in runs if results.get(keys[run]) is None]
    if missing:
        with progress("trees", len(missing)) as advance:
            for run in missing:
                results.put(keys[run], trees.run(run))
                advance(1)


def describe(
    dataset: Dataset,
    samples: Samples,
    parts: Split,
    results: Mapping[Run, Result],
    writer: str,
    settings: QualitySettings,
    digest: str,
) -> dict[str, Any]:
    """The figures as they are written."""
    texts = {variant: FUSIONS[variant][0] for variant in dict.fromkeys(run.variant for run in results)}
    calls = {
        variant: calls_per_user(find_variant(name), samples, settings.refresh)
        for variant, name in texts.items()
        if name and FUSIONS[variant][1] != "items"
    }
    return {
        "data": {
            "name": dataset.domain.name,
            "origin": dataset.origin,
            "users": len(samples.user_ids),
            "items": len(samples.item_ids),
            "behaviors": len(dataset.behaviors),
            "samples": len(samples),
            "digest": digest,
        },
        "split": {name: len(getattr(parts, name)) for name in ("train", "validation", "test")},
        "seeds": sorted({run.seed for run in results}),
        "settings": {**dataclasses.asdict(settings), "writer": writer},
        "machine": describe_machine(),
        "versions": describe_versions(),
        "rows": make_rows(results.values(), calls, dataset.domain.name),
    }


def draw(figures: Mapping[str, Any]) -> dict[str, str]:
    """The plots as SVG files by name: all backbones, and the variants of each that has some."""
    rows = figures["rows"]
    plots = {"backbones": standalone(draw_backbones(rows))}
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        of_one = [row for row in rows if row["backbone"] == backbone]
        if any(row["variant"] in ABLATIONS for row in of_one):
            name = "".join(each if each.isalnum() else "-" for each in backbone)
            plots[f"variants-{name}"] = standalone(draw_variants(of_one, VARIANTS))
    return plots


def write_documents(figures: Mapping[str, Any], markdown: Path) -> None:
    """Writes the Markdown table with its plots beside it, named after it."""
    markdown.parent.mkdir(parents=True, exist_ok=True)
    images = []
    for name, svg in draw(figures).items():
        path = markdown.with_name(f"{markdown.stem}-{name}.svg")
        path.write_text(svg)
        images.append(f"![{name}]({path.name})")
    markdown.write_text(to_markdown(figures) + "\n" + "\n\n".join(images) + "\n")


def _names(values: Sequence[str] | None) -> list[str]:
    """Names given apart or with commas."""
    return [name for value in values or () for name in value.split(",") if name]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main() -> int:
    """The command."""
    usual = QualitySettings()
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="as for `liber build`; the generated sample if not given")
    parser.add_argument("--seeds", type=_positive, default=5, help="how many; they are 1, 2, ...")
    parser.add_argument("--backbones", nargs="+", help=f"of {', '.join(BACKBONES)}, or package.module:Class; all")
    parser.add_argument(
        "--variants",
        nargs="+",
        help=f"of {', '.join(VARIANTS)}; base and liber on every backbone, the others on {paper.BACKBONE}",
    )
    parser.add_argument("--jobs", type=_positive, default=2, help="runs at once, one thread each")
    parser.add_argument("--kept", action="store_true", help="the table of the runs that are kept; nothing is trained")
    parser.add_argument("--cache", type=Path, default=Path("runs/quality"), help="keeps texts, vectors and results")
    parser.add_argument(
        "--refresh",
        type=_positive,
        default=REFRESH,
        help="behaviors after which the variants of one text are written anew; 1 as in the paper, at its price",
    )
    parser.add_argument("--partition", type=_positive, default=usual.partition, help="K, behaviors of a partition")
    parser.add_argument("--history", type=_positive, default=usual.history_length, help="T, behaviors a backbone reads")
    parser.add_argument("--dimension", type=_positive, default=usual.dimension, help="d, of a vector")
    parser.add_argument("--encoder", default=usual.encoder, help="BERT checkpoint")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--markdown", type=Path, help="the table and, beside it, the plots; beside --json if not given")
    arguments = parser.parse_args()
    settings = QualitySettings(
        partition=arguments.partition,
        history_length=arguments.history,
        dimension=arguments.dimension,
        encoder=arguments.encoder,
        refresh=arguments.refresh,
    )
    runs = choose_runs(_names(arguments.backbones), _names(arguments.variants), tuple(range(1, arguments.seeds + 1)))
    dataset = load(arguments.data)
    samples = replay(dataset, Count(settings.partition), settings.partition)
    parts = split(samples)
    digest = digest_data(dataset)
    writer = StatisticalWriter()
    results = measure(
        dataset, samples, parts, runs, writer, arguments.cache, arguments.jobs, settings, digest, arguments.kept
    )
    figures = describe(dataset, samples, parts, results, writer.name, settings, digest)
    markdown = arguments.markdown or (arguments.json.with_suffix(".md") if arguments.json else None)
    if markdown is not None:
        write_documents(figures, markdown)
    show_figures(figures, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
