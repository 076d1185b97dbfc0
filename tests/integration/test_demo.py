"""The main job on a small data set of one's own: it runs, it resumes, and being killed changes none of its answers."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import share_encoder

from builders.build import BuildSettings
from builders.datasets import sample
from builders.demo import run_demo
from builders.hyperparameters import Hyperparameters
from builders.train import TrainingSettings
from liber_runtime.exceptions import ConfigurationError, LiberError
from liber_runtime.memory import open_store


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its data, its directory, its report."""

    data: Path
    directory: Path
    settings: BuildSettings
    report: dict[str, Any]

    def again(self, directory: Path) -> dict[str, Any]:
        return run_demo(self.data, directory, self.settings)


def write_data(directory: Path) -> Path:
    directory.mkdir()
    dataset = sample.generate(seed=3, users=60, items=80, behaviors=4_000)
    with (directory / "behaviors.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item", "timestamp", "feedback"])
        rows.writerows([each.user_id, each.item_id, each.timestamp, each.feedback] for each in dataset.behaviors)
    with (directory / "items.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item", "title", "genres", "year"])
        for item in dataset.items.values():
            genres, year = item.attributes["genres"], item.attributes["year"]
            assert isinstance(genres, tuple)
            rows.writerow([item.item_id, item.title, "|".join(genres), year])
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, exported_encoder: Path) -> Run:
    directory = tmp_path_factory.mktemp("demo")
    share_encoder(exported_encoder, directory / "run" / "knowledge")
    settings = BuildSettings(
        encoder=str(tiny_bert),
        dimension=8,
        history_length=10,
        hyperparameters=Hyperparameters(TrainingSettings(max_epochs=1, batch_sizes=(256,))),
    )
    data = write_data(directory / "films")
    return Run(data, directory / "run", settings, run_demo(data, directory / "run", settings))


class TestReport:
    def test_it_holds_what_was_promised(self, run: Run) -> None:
        report = json.loads((run.directory / "report.json").read_text())
        assert report == json.loads(json.dumps(run.report))
        promised = {
            "data": "name users items behaviors eligible_users samples train_samples test_samples",
            "memory": "partitions calls_per_user",
            "serving": "samples max_abs_diff_vs_offline auc seconds_per_1000",
        }
        for part, keys in promised.items():
            assert set(keys.split()) <= report[part].keys()
        for name in ("base", "liber"):
            assert {"auc", "logloss"} <= report["quality"][name].keys()
        for shape in ("one_user", "distinct_users"):
            figures = report["serving"]["seconds_per_1000"][shape]
            assert 0 < figures["p50"] <= figures["p99"]
        assert report["writer"] == "statistical"
        assert report["encoder"] == run.settings.encoder
        assert report["seed"] == run.settings.seed
        assert report["machine"]
        assert report["versions"]
        prepared = "load replay ingest texts encode features train_base train_liber export"
        served = "start_server serve latency evaluate"
        assert list(report["seconds"]) == f"{prepared} {served}".split()
        assert all(math.isfinite(seconds) and seconds >= 0 for seconds in report["seconds"].values())

    def test_its_counts_are_those_of_the_data(self, run: Run) -> None:
        with (run.data / "behaviors.csv").open() as file:
            users = [row["user"] for row in csv.DictReader(file)]
        counts = np.array([users.count(user) for user in set(users)])
        data, memory = run.report["data"], run.report["memory"]
        assert data["name"] == "films"
        assert data["users"] == len(counts)
        assert data["items"] == 80
        assert data["behaviors"] == len(users)
        assert data["eligible_users"] == (counts > 20).sum()
        assert data["samples"] == (counts - 20)[counts > 20].sum()
        assert data["train_samples"] + data["test_samples"] == data["samples"]
        assert memory["partitions"] == (counts // 20).sum()
        before_last = (counts[counts > 20] - 1) // 20
        assert memory["calls_per_user"] == pytest.approx((2 * before_last - 1).mean())

    def test_what_is_served_is_what_was_trained(self, run: Run) -> None:
        serving = run.report["serving"]
        assert serving["samples"] == run.report["data"]["test_samples"] > 100
        assert serving["max_abs_diff_vs_offline"] < 1e-4
        assert f"{serving['auc']:.4f}" == f"{run.report['quality']['liber']['auc']:.4f}"

    def test_the_page_needs_nothing_else(self, run: Run) -> None:
        page = (run.directory / "report.html").read_text()
        loaded = re.findall(r"""(?:src|xlink:href)\s*=\s*["']([^"']*)|url\(([^)]*)|<link\b[^>]*|@import[^;]*""", page)
        assert all(any(each.startswith(("data:", "#")) for each in found) for found in loaded)
        assert "<svg" in page or "data:image" in page
        assert run.report["illustration"]["partitions"][-1]["summary"][:40] in page


def test_a_rerun_does_nothing_again_and_says_the_same(run: Run, tmp_path: Path) -> None:
    # A copy, so that the other tests see a run that nothing followed.
    shutil.copytree(run.directory, tmp_path / "run")
    kept = ("knowledge", "models", "bundle", "model_repository", "served.csv")
    before = _written(tmp_path / "run", kept)
    assert {"encoder.onnx", "embeddings.db", "pca.onnx", "liber.pt", "base.pt"} <= {path.name for path in before}
    report = run.again(tmp_path / "run")
    assert _written(tmp_path / "run", kept) == before
    for part in ("data", "memory", "quality", "illustration"):
        assert report[part] == run.report[part]
    for figure in ("samples", "max_abs_diff_vs_offline", "auc"):
        assert report["serving"][figure] == run.report["serving"][figure]


DIE_AT = """
import os, signal, sys
from pathlib import Path
from liber_runtime.memory.sqlite import SQLiteStore
from builders.build import BuildSettings
from builders.demo import run_demo
from builders.hyperparameters import Hyperparameters
from builders.train import TrainingSettings

append, streamed = SQLiteStore.append, 0

def append_and_die(self, behaviors, mark=None):
    global streamed
    streamed += len(behaviors) == 1
    if {moment!r} == "noted" and streamed == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    appended = append(self, behaviors, mark)
    if {moment!r} == "cut" and streamed >= {nth} and len(behaviors) == 1 and appended.partitions:
        os.kill(os.getpid(), signal.SIGKILL)
    return appended

SQLiteStore.append = append_and_die
run_demo(Path(sys.argv[1]), Path(sys.argv[2]), {settings!r})
"""


class TestKilledWhileItServesAndLearns:
    def test_it_goes_on_to_the_same_answers(self, run: Run, tmp_path: Path) -> None:
        directory = tmp_path / "run"
        shutil.copytree(run.directory, directory, ignore=shutil.ignore_patterns("memory.db*", "served.csv", "report.*"))
        noted = 0
        # Between an answer and its behavior, then between a partition and its vector.
        for moment, nth in (("noted", 40), ("cut", 70)):
            script = DIE_AT.format(moment=moment, nth=nth, settings=run.settings)
            command = [sys.executable, "-c", script, str(run.data), str(directory)]
            ended = subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
            )
            assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
            answers = _answers(directory)
            assert noted < len(answers) < run.report["serving"]["samples"]
            noted = len(answers)
        # Killed while it wrote a line.
        with (directory / "served.csv").open("a") as file:
            file.write("2600,0.")
        report = run.again(directory)
        served, uninterrupted = _answers(directory), _answers(run.directory)
        assert served.keys() == uninterrupted.keys()
        np.testing.assert_allclose(list(served.values()), list(uninterrupted.values()), atol=1e-6)
        assert report["serving"]["max_abs_diff_vs_offline"] < 1e-4
        assert report["quality"] == run.report["quality"]
        assert report["memory"]["partitions"] == run.report["memory"]["partitions"]
        assert _memory(directory) == _memory(run.directory)


class TestAnotherJob:
    def test_answers_of_another_bundle_are_not_mixed_in(self, run: Run, tmp_path: Path) -> None:
        directory = tmp_path / "run"
        shutil.copytree(run.directory, directory)
        lines = (directory / "served.csv").read_text().splitlines()
        (directory / "served.csv").write_text("\n".join(["bundle,0123456789abcdef", *lines[1:5]]) + "\n")
        with pytest.raises(LiberError, match=r"holds answers of another bundle .* delete .* and run the demo again"):
            run.again(directory)

    def test_answers_that_were_lost_are_not_asked_for_again(self, run: Run, tmp_path: Path) -> None:
        directory = tmp_path / "run"
        shutil.copytree(run.directory, directory)
        lines = (directory / "served.csv").read_text().splitlines(keepends=True)
        (directory / "served.csv").write_text("".join(lines[:-3]))
        with pytest.raises(LiberError, match=r"lacks the answers to 3 samples that the store has moved past; delete"):
            run.again(directory)

    def test_a_store_that_is_no_demos_is_left_alone(self, run: Run, tmp_path: Path) -> None:
        open_store(f"sqlite:///{tmp_path / 'memory.db'}").close()
        with pytest.raises(ConfigurationError, match=r"memory\.db.*another --output"):
            run.again(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["memory.db"]


def _written(directory: Path, names: tuple[str, ...]) -> dict[Path, int]:
    roots = [directory / name for name in names]
    files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*")) if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def _answers(directory: Path) -> dict[str, float]:
    with (directory / "served.csv").open() as file:
        return {row: float(probability) for row, probability in list(csv.reader(file))[1:]}


def _memory(directory: Path) -> list[tuple[Any, ...]]:
    """Every user's partitions, texts and vectors' origin, and the cache."""
    store = open_store(f"sqlite:///{directory / 'memory.db'}")
    try:
        held = [store.timeline(user) for user in store.users()]
    finally:
        store.close()
    return [
        (
            timeline.user_id,
            [
                (
                    record.behaviors,
                    record.summary and record.summary.text,
                    record.shift and record.shift.text,
                    sorted(record.representations),
                )
                for record in timeline.partitions
            ],
            timeline.cache,
        )
        for timeline in held
        if timeline
    ]
