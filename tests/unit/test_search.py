from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import search as module
from bench.search import SPACE, Ledger, Task, draw, load_training_part, make_base, search, space_of
from builders.datasets import Dataset
from builders.hyperparameters import Hyperparameters
from builders.models.backbone import Ranker
from builders.replay import replay, split
from builders.train import TrainingSettings
from liber_runtime.behavior import Behavior, Domain, Item
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.partition import Count

START = Hyperparameters(training=TrainingSettings(max_epochs=1, batch_sizes=(64,)), embedding_dim=4)
SMALL: Mapping[str, Any] = {"training.learning_rate": (1e-2, 1e-3), "dropout": (0.0, 0.5)}


def make_dataset() -> Dataset:
    generator = np.random.default_rng(0)
    behaviors = [
        Behavior(
            user_id=f"u{generator.integers(30)}",
            item_id=f"i{generator.integers(25)}",
            feedback=float(generator.integers(1, 6)),
            timestamp=float(at),
            event_id=str(at),
        )
        for at in range(900)
    ]
    return Dataset(
        Domain("made", "movie", "stars", (1.0, 5.0), 3.0, ("genre",)),
        behaviors,
        {f"i{number}": Item(f"i{number}", f"Title {number}", {}) for number in range(25)},
        {},
    )


@pytest.fixture(scope="module")
def task() -> Task:
    data, parts, fitted = load_training_part(make_dataset(), 5, 6)
    return Task({"LR": Make("LR", fitted), "DNN": Make("DNN", fitted)}, data, parts.train, parts.validation)


@dataclasses.dataclass
class Make:
    backbone: str
    fitted: Any
    made: int = 0

    def __call__(self, chosen: Hyperparameters, seed: int) -> Ranker:
        self.made += 1
        return make_base(self.backbone, self.fitted, chosen, seed)


def test_the_test_part_leaves_no_trace_in_what_is_searched_with() -> None:
    dataset = make_dataset()
    samples = replay(dataset, Count(5), 5)
    parts = split(samples)
    first = int(samples.behavior[parts.test[0]])
    others = [
        dataclasses.replace(each, feedback=6 - each.feedback) if at >= first else each
        for at, each in enumerate(dataset.behaviors)
    ]
    changed = dataclasses.replace(dataset, behaviors=others)
    changed_samples = replay(changed, Count(5), 5)
    assert (samples.label[parts.test] != changed_samples.label[parts.test]).any()

    one, split_of_one, fitted = load_training_part(dataset, 5, 6)
    other, _, fitted_to_other = load_training_part(changed, 5, 6)
    assert len(one.label) == len(parts.training_part)
    np.testing.assert_array_equal(split_of_one.training_part, np.arange(len(one.label)))
    np.testing.assert_array_equal(one.label, samples.label[parts.training_part])
    for name in type(one).__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for mine, theirs in zip(fitted.numbers.served.buffers(), fitted_to_other.numbers.served.buffers(), strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


def test_configurations_are_distinct_begin_with_the_present_and_more_begin_with_the_same() -> None:
    drawn = draw(START, SPACE, 12, seed=1)
    assert drawn[0] == START
    assert len({repr(each) for each in drawn}) == 12
    assert draw(START, SPACE, 5, seed=1) == drawn[:5]
    assert draw(START, SPACE, 5, seed=2) != drawn[:5]
    assert all(each.training.max_epochs == 1 for each in drawn)
    assert {each.training.batch_sizes for each in draw(START, SPACE, 40, seed=1)[1:]} == {(512,), (1024,), (512, 1024)}
    # A space of four points, and where the search starts.
    assert len(draw(START, SMALL, 50, seed=1)) == 5


def test_options_are_searched_where_a_backbone_has_them() -> None:
    assert "options.dropout" in space_of("DNN")
    assert "options.dropout" not in space_of("LR")
    assert "options.dropout" not in space_of("mine:Model")


def test_a_search_is_cached_run_by_run(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, candidates = tmp_path / "search.json", {"LR": draw(START, SMALL, 2, seed=1)}
    trained: list[tuple[str, int]] = []
    run = Task.run

    def counted(self: Task, backbone: str, chosen: Hyperparameters, seed: int) -> dict[str, Any]:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((backbone, seed))
        return run(self, backbone, chosen, seed)

    monkeypatch.setattr(Task, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        search(task, candidates, (1, 2), Ledger(path))
    assert len(json.loads(path.read_text())["runs"]) == 3
    trained[:] = []
    trials = search(task, candidates, (1, 2), Ledger(path))
    assert trained == [("LR", 2)]
    trained[:] = []
    assert search(task, candidates, (1, 2), Ledger(path)) == trials
    assert trained == []

    assert [len(trial["runs"]) for trial in trials] == [2, 2]
    assert trials[0]["logloss_mean"] <= trials[1]["logloss_mean"]
    for trial in trials:
        losses = [each["logloss"] for each in trial["runs"]]
        assert trial["logloss_mean"] == pytest.approx(np.mean(losses))
        assert trial["logloss_std"] == pytest.approx(np.std(losses, ddof=1))
        assert losses[0] != losses[1]


def test_other_data_are_searched_anew(task: Task, tmp_path: Path) -> None:
    path, candidates = tmp_path / "search.json", {"LR": [START]}
    search(task, candidates, (1,), Ledger(path))
    other = dataclasses.replace(task, data=dataclasses.replace(task.data, label=1 - task.data.label))
    search(other, candidates, (1,), Ledger(path))
    assert len(json.loads(path.read_text())["runs"]) == 2


def test_a_run_that_diverges_is_kept_and_does_not_win(task: Task, tmp_path: Path) -> None:
    wild = dataclasses.replace(
        START, training=dataclasses.replace(START.training, learning_rate=1e30, weight_decay=0.0, max_epochs=2)
    )
    trials = search(task, {"LR": [wild, START]}, (1,), Ledger(tmp_path / "search.json"))
    assert trials[0]["hyperparameters"]["training"]["learning_rate"] == START.training.learning_rate
    assert "logloss_mean" not in trials[1]
    assert "learning_rate" in trials[1]["runs"][0]["error"]


def test_processes_find_what_one_finds(task: Task, tmp_path: Path) -> None:
    candidates = {"LR": [START], "DNN": [START]}
    alone = search(task, candidates, (1,), Ledger(tmp_path / "one.json"))
    together = search(task, candidates, (1,), Ledger(tmp_path / "two.json"), jobs=2)
    for one, other in zip(alone, together, strict=True):
        assert (one["backbone"], one["logloss_mean"], one["auc_mean"]) == (
            other["backbone"], other["logloss_mean"], other["auc_mean"],
        )  # fmt: skip


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="is not of bench"):
        Ledger(path)


def test_the_command_writes_trials_and_winners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "search.json"
    saved: dict[str, Hyperparameters] = {}
    monkeypatch.setattr(module, "load", lambda source: make_dataset())
    monkeypatch.setattr(module, "load_hyperparameters", lambda backbone: START)
    monkeypatch.setattr(module, "save_hyperparameters", lambda backbone, best: saved.update({backbone: best}))
    monkeypatch.setattr(
        sys, "argv",
        ["search", "--backbones", "LR", "--trials", "2", "--seeds", "1", "--minimum", "5", "--history-length", "6",
         "--json", str(path), "--write"],
    )  # fmt: skip
    assert module.main() == 0
    figures = json.loads(path.read_text())
    assert len(figures["trials"]) == len(figures["runs"]) == 2
    winner = figures["winners"]["LR"]
    assert winner["logloss_mean"] == min(trial["logloss_mean"] for trial in figures["trials"])
    assert json.loads(json.dumps(dataclasses.asdict(saved["LR"]))) == winner["hyperparameters"]


def test_a_wrong_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["search", "--trials", "0", "--json", "never.json"])
    with pytest.raises(ConfigurationError, match="--trials is 0; give at least 1"):
        module.main()
