"""Searches how each backbone is best trained, on the validation slice alone.

``python -m bench.search --data D --backbones DIEN DCN --trials 20 --seeds 2 --json F`` draws configurations from
`SPACE`, trains each with every seed and keeps every run in F, which is also the cache: started again, it does only what
is missing. ``--write`` puts the winners, by mean log loss on validation, into ``builders/hyperparameters.json``. The
log is cut where the test part begins before anything else is done with it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from bench.environment import describe_machine, describe_versions, run_command, show_figures
from builders.assembly import FittedFeatures, fit_features, make_ranker
from builders.build import BuildSettings, StoredVectors, prepare
from builders.checkpoint import training_key
from builders.datasets import Dataset, load
from builders.hyperparameters import Hyperparameters, load_hyperparameters, save_hyperparameters
from builders.models import BACKBONES
from builders.models.backbone import Ranker
from builders.replay import Split, replay
from builders.replay import split as split_samples
from builders.train import Index, TrainingData, train
from builders.training_data import check
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.partition import Count
from liber_runtime.progress import console, progress

Make: TypeAlias = Callable[[Hyperparameters, int], Ranker]
"""A ranker with fresh weights from a configuration and a seed; can be pickled."""

Space: TypeAlias = Mapping[str, Sequence[Any]]

SPACE: Space = {
    "training.learning_rate": (2e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4),
    "training.batch_sizes": ((512,), (1024,), (512, 1024)),
    "training.weight_decay": (1e-2, 1e-1, 1.0),
    "training.embedding_decay": (1e-2, 1.0, 3.0),
    "training.average_decay": (0.97, 0.99),
    "dropout": (0.2, 0.3, 0.4, 0.5),
    "id_dropout": (0.0, 0.1, 0.3),
    "options.dropout": (0.3, 0.4, 0.5),
}
"""What is drawn from, by attribute of `Hyperparameters`; the paper searches the learning rates from 1e-3 down and the
batch sizes (section 4.1.3). ``options`` that a backbone does not have are left out."""


@dataclass(frozen=True)
class Task:
    """What all runs of a search have in common.

    Attributes:
        makes: by backbone.
        data: samples of the training part, no others.
        train: int64[n], rows to learn from.
        validation: int64[m], rows to choose by.
    """

    makes: Mapping[str, Make]
    data: TrainingData
    train: Index
    validation: Index

    def key(self, backbone: str, chosen: Hyperparameters, seed: int) -> str:
        """Identifies a run: weights, data, settings and seed."""
        model = self.makes[backbone](chosen, seed)
        return training_key(model, self.data, self.train, self.validation, chosen.training, seed)

    def run(self, backbone: str, chosen: Hyperparameters, seed: int) -> dict[str, Any]:
        """Trains once on one thread; its figures on validation, or the error that ended it."""
        started = time.perf_counter()
        try:
            with _single_thread():
                result = train(
                    self.makes[backbone](chosen, seed),
                    self.data,
                    self.train,
                    self.validation,
                    seed=seed,
                    settings=chosen.training,
                )
        except InvalidInputError as error:
            return {"error": str(error)}
        return {
            "auc": result.auc,
            "logloss": result.logloss,
            "best_epoch": result.best_epoch,
            "epochs": len(result.epochs),
            "seconds": round(time.perf_counter() - started, 2),
        }


class Ledger:
    """Every run there has been, in one file that is whole at any time.

    Args:
        path: of the file; None keeps nothing.

    Raises:
        ConfigurationError: `path` holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._runs: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            try:
                self._runs = {run["key"]: run for run in json.loads(path.read_text())["runs"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigurationError(f"{path} is not of bench.search ({error!r}); name another file") from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The run under this key."""
        return self._runs.get(key)

    def add(self, run: dict[str, Any]) -> None:
        """Keeps a run, which has its ``key``."""
        self._runs[run["key"]] = run
        self.write({})

    def write(self, figures: Mapping[str, Any]) -> None:
        """Replaces the file by `figures` and all runs."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        building = self._path.with_name(f"{self._path.name}.building")
        building.write_text(json.dumps({**figures, "runs": list(self._runs.values())}, indent=2) + "\n")
        building.replace(self._path)


def draw(start: Hyperparameters, space: Space, count: int, seed: int) -> list[Hyperparameters]:
    """Distinct configurations: `start`, then random ones; more of them begin with the same.

    Args:
        start: the first, whose values hold for what is not in the space.
        space: values by attribute, see `SPACE`.
        count: at most this many.
        seed: of the draw.
    """
    generator, drawn = random.Random(seed), [start]
    # Of a space with fewer points than `count` this finds nearly all, and ends.
    for _ in range(100 * count):
        if len(drawn) >= count:
            break
        one = _with_values(start, {name: generator.choice(list(values)) for name, values in space.items()})
        if one not in drawn:
            drawn.append(one)
    return drawn[:count]


def space_of(backbone: str, space: Space = SPACE) -> Space:
    """The part of a space that a backbone has: of ``options`` those that its class takes."""
    options = inspect.signature(BACKBONES[backbone]).parameters if backbone in BACKBONES else {}
    return {
        name: values
        for name, values in space.items()
        if not name.startswith("options.") or name.removeprefix("options.") in options
    }


def search(
    task: Task, candidates: Mapping[str, Sequence[Hyperparameters]], seeds: Sequence[int], ledger: Ledger, jobs: int = 1
) -> list[dict[str, Any]]:
    """Trains every candidate with every seed, unless the ledger has it.

    Args:
        task: data and models.
        candidates: by backbone.
        seeds: of weights, batches and dropout.
        ledger: receives each run as it ends.
        jobs: processes, of one thread each; 1 for this process.

    Returns:
        A trial per candidate, the best of each backbone first: backbone, hyperparameters, means and standard deviations
        of AUC and log loss over the seeds, and its runs; without means if one of its runs failed.

    Raises:
        InvalidInputError: the data do not fit a model, see `builders.training_data.check`.
    """
    planned = [
        (backbone, chosen, seed)
        for backbone, some in candidates.items()
        for chosen, seed in itertools.product(some, seeds)
    ]
    for backbone, some in candidates.items():
        check(task.makes[backbone](some[0], seeds[0]), task.data)
    keys = {(backbone, repr(chosen), seed): task.key(backbone, chosen, seed) for backbone, chosen, seed in planned}
    missing = [one for one in planned if ledger.get(keys[one[0], repr(one[1]), one[2]]) is None]
    if len(missing) < len(planned):
        console.print(f"{len(planned) - len(missing)} of {len(planned)} runs are there from an earlier search")
    with progress("search", len(missing)) as advance:
        for (backbone, chosen, seed), figures in _run_all(task, missing, jobs):
            kept = {"backbone": backbone, "seed": seed, "hyperparameters": _as_json(chosen), **figures}
            ledger.add({"key": keys[backbone, repr(chosen), seed], **kept})
            advance(1)
    trials = []
    for backbone, some in candidates.items():
        found = [
            _sum_up(backbone, chosen, [ledger.get(keys[backbone, repr(chosen), seed]) for seed in seeds])
            for chosen in some
        ]
        trials += sorted(found, key=lambda trial: trial.get("logloss_mean", math.inf))
    return trials


def load_training_part(
    dataset: Dataset, minimum: int, history_length: int
) -> tuple[TrainingData, Split, FittedFeatures]:
    """The samples before the test part, without what memory holds of their users; nothing behind them is used.

    Args:
        dataset: the whole log.
        minimum: earlier behaviors a sample needs.
        history_length: T.

    Returns:
        The data; the split, whose training part are its rows; and what the features were fitted to.

    Raises:
        InvalidInputError: the log cannot be split.
    """
    condition = Count(minimum)
    whole = replay(dataset, condition, minimum)
    first = split_samples(whole).test[0]
    # The first test sample stays as the mark where the training part ends; what it was answered does not.
    mark = dataclasses.replace(dataset.behaviors[whole.behavior[first]], feedback=dataset.domain.feedback_range[0])
    known = dataclasses.replace(
        dataset, behaviors=[*dataset.behaviors[: whole.behavior[first]], mark], ordered=True, cuts={}
    )
    samples = replay(known, condition, minimum)
    samples = dataclasses.replace(samples, partitions=np.zeros_like(samples.partitions))
    parts = split_samples(whole)
    split = Split(parts.train, parts.validation, np.array([len(samples) - 1], dtype=np.int64))
    fitted = fit_features(known, samples, split, history_length=history_length, lookback=BuildSettings.lookback, seed=0)
    nothing = StoredVectors(np.zeros((0, 1), dtype=np.float32), np.zeros(len(samples.user_ids) + 1, dtype=np.int64))
    return prepare(nothing, known, samples, split.training_part, fitted), split, fitted


def make_base(backbone: str, fitted: FittedFeatures, chosen: Hyperparameters, seed: int) -> Ranker:
    """A `Make` once the first two arguments are given."""
    return make_ranker(backbone, fitted, chosen, seed=seed)


def _with_values(start: Hyperparameters, values: Mapping[str, Any]) -> Hyperparameters:
    sections: dict[str, dict[str, Any]] = {"training": {}, "options": {}, "": {}}
    for name, value in values.items():
        section, _, attribute = name.rpartition(".")
        sections[section][attribute] = value
    return dataclasses.replace(
        start,
        training=dataclasses.replace(start.training, **sections["training"]),
        options={**start.options, **sections["options"]},
        **sections[""],
    )


def _as_json(chosen: Hyperparameters) -> dict[str, Any]:
    """As it is read back from a file: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(chosen)))
    return plain


def _sum_up(backbone: str, chosen: Hyperparameters, runs: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    trial: dict[str, Any] = {"backbone": backbone, "hyperparameters": _as_json(chosen), "runs": runs}
    if all(run is not None and "logloss" in run for run in runs):
        for name in ("auc", "logloss"):
            values = [run[name] for run in runs if run is not None]
            trial[f"{name}_mean"] = float(np.mean(values))
            trial[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return trial


_Planned: TypeAlias = tuple[str, Hyperparameters, int]


def _run_all(task: Task, planned: Sequence[_Planned], jobs: int) -> Iterator[tuple[_Planned, dict[str, Any]]]:
    """Runs as they end."""
    if jobs == 1 or not planned:
        for one in planned:
            yield one, task.run(*one)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(planned)), context, _begin_worker, (pickle.dumps(task),)) as pool:
        running = {pool.submit(_run_in_worker, one): one for one in planned}
        try:
            while running:
                for ended in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(ended), ended.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_task: Task | None = None


def _begin_worker(task: bytes) -> None:
    global _task
    # As bytes: torch would send its tensors through shared memory, which a container may have little of.
    _task = pickle.loads(task)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A search that is killed leaves no process that trains on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(planned: _Planned) -> dict[str, Any]:
    assert _task is not None
    return _task.run(*planned)


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    """The same figures in a process of several: sums of several threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.search", description=__doc__)
    parser.add_argument("--data", help="a data set's directory or file; the generated sample if it is left out")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), help="which; all if it is left out")
    parser.add_argument("--trials", type=int, default=20, help="configurations of each backbone, the present included")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each configuration")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minimum", type=int, default=20, help="earlier behaviors a sample needs")
    parser.add_argument("--history-length", type=int, default=20, help="newest behaviors a backbone reads")
    parser.add_argument("--json", type=Path, required=True, help="keeps every run; what is in it is not done again")
    parser.add_argument("--write", action="store_true", help="put the winners into builders/hyperparameters.json")
    arguments = parser.parse_args()
    for name in ("trials", "seeds", "jobs", "minimum", "history_length"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; give at least 1")
    ledger = Ledger(arguments.json)
    data, split, fitted = load_training_part(load(arguments.data), arguments.minimum, arguments.history_length)
    makes = {backbone: functools.partial(make_base, backbone, fitted) for backbone in arguments.backbones}
    candidates = {
        backbone: draw(load_hyperparameters(backbone), space_of(backbone), arguments.trials, seed=1)
        for backbone in arguments.backbones
    }
    task = Task(makes, data, split.train, split.validation)
    trials = search(task, candidates, range(1, arguments.seeds + 1), ledger, arguments.jobs)
    winners = _find_winners(trials)
    figures = {
        "trials": trials,
        "winners": winners,
        "space": SPACE,
        "samples": {"train": len(split.train), "validation": len(split.validation)},
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    ledger.write(figures)
    show_figures({**figures, "trials": [trial for trial in trials if trial in winners.values()]}, None)
    if arguments.write:
        for backbone in winners:
            best = next(each for each in candidates[backbone] if _as_json(each) == winners[backbone]["hyperparameters"])
            save_hyperparameters(backbone, best)
            console.print(f"{backbone}: written to builders/hyperparameters.json")
    return 0


def _find_winners(trials: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The trial of the lowest mean log loss of each backbone that has one."""
    winners: dict[str, dict[str, Any]] = {}
    for trial in trials:
        if "logloss_mean" in trial:
            winners.setdefault(trial["backbone"], trial)
    return winners


if __name__ == "__main__":
    run_command(main)
