"""The whole command of the quality table on a small log, with texts and vectors by the real Triton."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from conftest import share_encoder

from bench import quality, quality_runs
from builders.datasets import sample
from builders.encoder import export_encoder
from liber_runtime.bundle import EncoderSpec


def test_the_table_of_a_log_of_ratings_without_attributes(
    tmp_path: Path,
    tiny_bert: Path,
    exported_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def find_exported(source: str, directory: Path) -> EncoderSpec:
        if not directory.exists():
            share_encoder(exported_encoder, directory)
        return export_encoder(source, directory)

    monkeypatch.setattr(quality_runs, "export_encoder", find_exported)
    dataset = sample.generate(seed=2, users=25, items=40, behaviors=1000)
    films = tmp_path / "films"
    films.mkdir()
    with (films / "behaviors.csv").open("w", newline="") as file:
        log = ([each.user_id, each.item_id, each.feedback, each.timestamp] for each in dataset.behaviors)
        csv.writer(file).writerows([["user", "item", "rating", "timestamp"], *log])
    with (films / "items.csv").open("w", newline="") as file:
        titles = ([each.item_id, each.title] for each in dataset.items.values())
        csv.writer(file).writerows([["item", "title"], *titles])
    command = f"quality --data {films} --seeds 1 --backbones LR --variants liber --jobs 1 --partition 5 --dimension 4"
    command += f" --encoder {tiny_bert} --cache {tmp_path / 'cache'} --json {tmp_path / 'quality.json'}"
    monkeypatch.setattr(sys, "argv", command.split())
    assert quality.main() == 0
    first = json.loads((tmp_path / "quality.json").read_text())
    names = [(row["backbone"], row["variant"]) for row in first["rows"]]
    assert names == [("gbdt", "base"), ("LR", "base"), ("LR", "liber")]
    assert all(0 < row["auc_mean"] < 1 and 0 < row["logloss_mean"] < 5 for row in first["rows"])
    assert first["rows"][1]["auc_mean"] != first["rows"][2]["auc_mean"]
    assert first["rows"][2]["p_value"] is None
    assert first["rows"][2]["calls_per_user"] > 1
    assert first["rows"][2]["per_seed"][0]["epochs"] >= 1
    assert sum(first["split"].values()) == first["data"]["samples"]
    assert {"machine", "versions", "seeds", "settings"} <= first.keys()
    assert "| LR |" in (tmp_path / "quality.md").read_text()
    assert not list((tmp_path / "cache").glob("*/prepared-*"))
    capsys.readouterr()
    # Nothing is missing the second time.
    assert quality.main() == 0
    assert "3 of 3 runs are kept from before" in capsys.readouterr().err
    assert json.loads((tmp_path / "quality.json").read_text())["rows"] == first["rows"]
