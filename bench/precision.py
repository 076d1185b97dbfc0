"""What int8 weights cost in AUC and in time, beside fp32 with the compiled kernels and without them.

``python -m bench.precision --data D --json F`` trains a backbone without LIBER on a log, exports it in both precisions,
scores the whole test part with both graphs as they are served, and times them in turns. A backbone with LIBER has the
same products and a few more. Training takes a minute or two on an idle core.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import log_loss, roc_auc_score

from bench.engines import Engine, Probabilities, ServedGraph, Tensors
from bench.environment import describe_machine, describe_versions, run_command, scratch, show_figures
from bench.quality_runs import QualitySettings, prepare_runs
from bench.quality_table import BASE
from bench.race import Limits, race
from builders.assembly import FittedFeatures, make_ranker
from builders.datasets import Dataset, load
from builders.export import export_backbone
from builders.hyperparameters import load_hyperparameters
from builders.models.backbone import Ranker
from builders.replay import Samples, replay, split
from builders.train import Index, predict, train
from builders.training_data import TrainingData
from liber_runtime.bundle import BACKBONE, TABLES, Precision
from liber_runtime.native import load_kernels
from liber_runtime.partition import Count
from liber_runtime.progress import console, progress
from liber_runtime.writers.statistical import StatisticalWriter

TOGETHER = 1000
"""Samples of one run of a graph."""

RESAMPLES = 200
"""Of the test part, for the interval of a difference."""

PRECISIONS: Sequence[Precision] = ("fp32", "int8")


@dataclass(frozen=True)
class Trained:
    """A ranker without LIBER and what it is measured on.

    Attributes:
        ranker: trained.
        fitted: its features.
        data: all samples as columns.
        samples: of the replay.
        test: int64[n], rows of the test part.
    """

    ranker: Ranker
    fitted: FittedFeatures
    data: TrainingData
    samples: Samples
    test: Index

    def tensors(self, rows: Index) -> Tensors:
        """Samples `rows` int64[n] as the backbone's graph is asked for them, each as a user of its own."""
        history = self.samples.in_vocabulary(self.fitted.vocabulary.vocabulary).history(rows, self.fitted.lookback)
        tensors = {
            "item_index": self.data.item[rows],
            "user_index": np.arange(len(rows), dtype=np.int32),
            "history_item": history.item,
            "history_feedback": history.feedback,
            "history_length": history.length,
            "profile": self.data.profile[rows],
        }
        return {name: array[np.newaxis] for name, array in tensors.items()}

    def one_user(self, row: int, items: npt.NDArray[np.int32]) -> Tensors:
        """The user of sample `row` as of then, with other candidates int32[n]."""
        tensors = self.tensors(np.array([row]))
        return {**tensors, "item_index": items[np.newaxis], "user_index": np.zeros((1, len(items)), dtype=np.int32)}


def fit(dataset: Dataset, backbone: str, seed: int, directory: Path, settings: QualitySettings) -> Trained:
    """Trains as the base runs of `bench.quality` do.

    Raises:
        LiberError: the log cannot be split or learned from, or there is no such backbone.
    """
    samples = replay(dataset, Count(settings.partition), settings.partition)
    parts = split(samples)
    prepared = prepare_runs(dataset, samples, parts, [BASE], StatisticalWriter(), directory, settings)
    chosen = load_hyperparameters(backbone)
    ranker = make_ranker(backbone, prepared.fitted, chosen, seed=seed)
    # Its numbers are those of no knowledge of the items, as the ranker's.
    data = dataclasses.replace(prepared.data, numbers=prepared.fitted.numbers.values)
    with progress(f"train {backbone}", None) as advance:
        train(
            ranker,
            data,
            parts.train,
            parts.validation,
            seed=seed,
            settings=chosen.training,
            progress=lambda _epoch, _done, _total: advance(1),
        )
    return Trained(ranker.eval(), prepared.fitted, data, samples, parts.test)


def measure(trained: Trained, directory: Path, limits: Limits, seed: int) -> dict[str, Any]:
    """Exports, scores and times.

    Args:
        trained: what.
        directory: scratch.
        limits: of each of the two races.
        seed: of candidates and resamples.

    Raises:
        ConfigurationError: the model cannot be exported in int8, or it does not compute the same.
    """
    paths: dict[Precision, Path] = {}
    for precision in PRECISIONS:
        (directory / precision).mkdir()
        paths[precision] = directory / precision / BACKBONE
        export_backbone(trained.ranker, paths[precision], precision=precision)
    return {
        "quality": compare_quality(trained, paths, seed),
        "bytes": {
            precision: {name: path.with_name(name).stat().st_size for name in (BACKBONE, TABLES)}
            for precision, path in paths.items()
        },
        "milliseconds": time_graphs(trained, paths, limits, seed),
    }


def compare_quality(trained: Trained, paths: Mapping[Precision, Path], seed: int) -> dict[str, Any]:
    """AUC and log loss of PyTorch and of both graphs on the test part, and how far apart they are.

    int8 graphs quantize what is multiplied with one scale for a whole batch, so that a score depends on what else is
    scored with it: ``other_batches`` says how much, between batches of 1000 samples and of 10.
    """
    label = trained.data.label[trained.test]
    scores = {"pytorch": predict(trained.ranker, trained.data, trained.test)}
    for precision in PRECISIONS:
        scores[precision] = score(ServedGraph(paths[precision]), trained, TOGETHER)
    alone = score(ServedGraph(paths["int8"]), trained, 10)
    reference = scores["fp32"]
    figures: dict[str, Any] = {"samples": len(label)}
    for name, found in scores.items():
        auc, loss = _figures(label, found)
        figures[name] = {"auc": auc, "logloss": loss}
    rounding = float(np.abs(reference - scores["pytorch"]).max())
    low, high = resample(label, reference, scores["int8"], seed)
    figures["fp32"]["largest_difference_to_pytorch"] = rounding
    figures["int8"] |= {
        "auc_less_fp32": figures["int8"]["auc"] - figures["fp32"]["auc"],
        "auc_less_fp32_95_percent": [low, high],
        "logloss_less_fp32": figures["int8"]["logloss"] - figures["fp32"]["logloss"],
        "largest_difference_to_fp32": float(np.abs(scores["int8"] - reference).max()),
        "mean_difference_to_fp32": float(np.abs(scores["int8"] - reference).mean()),
        "largest_difference_other_batches": float(np.abs(scores["int8"] - alone).max()),
        "auc_other_batches": _figures(label, alone)[0],
    }
    return figures


def score(graph: ServedGraph, trained: Trained, together: int) -> Probabilities:
    """float32[n]: the test part, `together` samples at a time."""
    starts = range(0, len(trained.test), together)
    return np.concatenate(
        [graph.answering(trained.tensors(trained.test[start : start + together]))() for start in starts]
    )


def resample(
    label: npt.NDArray[np.float32], reference: Probabilities, other: Probabilities, seed: int
) -> tuple[float, float]:
    """What 95% of resamples of the samples float32[n] say of the AUC of `other` less that of `reference`."""
    draw = np.random.default_rng(seed)
    differences = []
    for _ in range(RESAMPLES):
        rows = draw.integers(len(label), size=len(label))
        if 0 < label[rows].sum() < len(rows):
            differences.append(roc_auc_score(label[rows], other[rows]) - roc_auc_score(label[rows], reference[rows]))
    low, high = np.percentile(differences, (2.5, 97.5))
    return float(low), float(high)


def time_graphs(trained: Trained, paths: Mapping[Precision, Path], limits: Limits, seed: int) -> dict[str, Any]:
    """p50 and p99 of 1000 samples of as many users and of one, the graphs taking turns."""
    draw = np.random.default_rng(seed)
    rows = np.resize(trained.test, TOGETHER)
    longest = int(rows[np.argmax(trained.samples.position[rows])])
    items = len(trained.fitted.vocabulary.vocabulary.items)
    asked = {
        "distinct_users": trained.tensors(rows),
        "one_user": trained.one_user(longest, draw.integers(1, items + 1, size=TOGETHER, dtype=np.int32)),
    }
    graphs = {
        (precision, kernels): ServedGraph(path, kernels=kernels)
        for precision, path in paths.items()
        for kernels in ("auto", "none")
    }
    figures: dict[str, Any] = {}
    for shape, tensors in asked.items():
        engines = [
            Engine(name_engine(*kind), "in_process", graph.answering(tensors), False, precision=kind[0])
            for kind, graph in graphs.items()
        ]
        timings = race(engines, limits)
        figures[shape] = {
            timing.engine.name: {
                "p50": round(timing.milliseconds(50), 3),
                "p99": round(timing.milliseconds(99), 3),
                "calls": len(timing.seconds),
            }
            for timing in timings
        }
    return figures


def name_engine(precision: Precision, kernels: str) -> str:
    """As the figures have it."""
    return f"{precision}_{'kernels' if kernels != 'none' else 'onnxruntime'}"


def compare_times(milliseconds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """By shape, how many times as long as fp32 the int8 graph takes: with the kernels, and in ONNX Runtime alone."""
    return {
        shape: {
            name: round(figures[f"int8_{name}"]["p50"] / figures[f"fp32_{name}"]["p50"], 3)
            for name in ("kernels", "onnxruntime")
        }
        for shape, figures in milliseconds.items()
    }


def _figures(label: npt.NDArray[np.float32], found: Probabilities) -> tuple[float, float]:
    probability = found.astype(np.float64)
    return float(roc_auc_score(label, probability)), float(log_loss(label, probability, labels=[0, 1]))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory of a data set (default: the generated sample)")
    parser.add_argument("--backbone", default="DIEN")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each shape is timed")
    parser.add_argument(
        "--partition", type=int, default=QualitySettings.partition, help="earlier behaviors of a sample"
    )
    parser.add_argument("--directory", type=Path, help="where all is made meanwhile (default: the system's own)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    settings = QualitySettings(partition=arguments.partition)
    dataset = load(arguments.data)
    with scratch(arguments.directory) as directory:
        trained = fit(dataset, arguments.backbone, arguments.seed, directory, settings)
        measured = measure(trained, directory, Limits(arguments.seconds, 20, 400), arguments.seed)
    ratios = compare_times(measured["milliseconds"])
    kernels = load_kernels("auto", 1)
    figures = {
        "data": dataset.domain.name,
        "backbone": arguments.backbone,
        **measured,
        "int8_over_fp32": ratios,
        "kernels": kernels.target if kernels is not None else None,
        "threads": os.cpu_count(),
        "settings": dataclasses.asdict(settings),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": arguments.seed,
    }
    show_figures(figures, arguments.json)
    for shape, times in ratios.items():
        for where, ratio in times.items():
            console.print(f"{shape}, {where}: int8 takes {ratio:.2f} times as long as fp32", soft_wrap=True)
    return 0


if __name__ == "__main__":
    run_command(main)
