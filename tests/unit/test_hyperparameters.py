from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_harness import make_features_module

from builders.hyperparameters import CHOSEN, Hyperparameters, load_hyperparameters, save_hyperparameters
from builders.models import BACKBONES, make_backbone
from builders.train import TrainingSettings
from liber_runtime.exceptions import ConfigurationError


def write(path: Path, chosen: dict[str, Any]) -> Path:
    path.write_text(json.dumps(chosen))
    return path


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_what_is_checked_in_makes_every_backbone(backbone: str) -> None:
    chosen = load_hyperparameters(backbone)
    features = make_features_module(embedding_dim=chosen.embedding_dim)
    assert make_backbone(backbone, features.schema, chosen.options).training


def test_every_backbone_that_is_checked_in_is_one() -> None:
    assert json.loads(CHOSEN.read_text())["backbones"].keys() <= BACKBONES.keys()


def test_a_backbone_of_your_own_has_the_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path / "h.json",
        {
            "default": {"dropout": 0.4, "training": {"patience": 5, "batch_sizes": [256]}},
            "backbones": {"DIN": {"training": {"patience": 7}, "options": {"dropout": 0.1}, "id_dropout": 0.3}},
        },
    )
    defaults = load_hyperparameters("mine:Model", path)
    assert defaults == Hyperparameters(training=TrainingSettings(patience=5, batch_sizes=(256,)), dropout=0.4)
    assert load_hyperparameters("DIN", path) == Hyperparameters(
        training=TrainingSettings(patience=7, batch_sizes=(256,)),
        dropout=0.4,
        id_dropout=0.3,
        options={"dropout": 0.1},
    )


def test_what_is_saved_is_loaded_and_leaves_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "h.json", {"default": {"dropout": 0.4}, "backbones": {"DIN": {"dropout": 0.3}}})
    chosen = Hyperparameters(
        training=TrainingSettings(batch_sizes=(512, 1024), learning_rate=7.5e-4),
        embedding_dim=16,
        options={"mlp_sizes": [64, 32], "softmax": True},
    )
    save_hyperparameters("DNN", chosen, path)
    assert load_hyperparameters("DNN", path) == chosen
    assert load_hyperparameters("DIN", path).dropout == 0.3
    assert load_hyperparameters("LR", path).dropout == 0.4
    assert [each.name for each in tmp_path.iterdir()] == ["h.json"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dropot": 0.1}, "DIN: dropot: Unexpected keyword"),
        ({"training": {"lr": 0.1}}, "DIN: training.lr: Unexpected keyword"),
        ({"training": {"learning_rate": -1.0}}, "DIN: training.learning_rate is -1.0"),
        ({"training": {"learning_rate": "fast"}}, "DIN: training.learning_rate: .*'fast'"),
        ({"training": {"batch_sizes": 512}}, "DIN: training.batch_sizes: .*512"),
        ({"training": 3}, "training is 3; give an object"),
        ({"dropout": 1.0}, "DIN: dropout: .*less than 1"),
        ({"embedding_dim": 1.5}, "DIN: embedding_dim: .*1.5"),
        (3, "DIN is 3; give an object"),
    ],
)
def test_what_cannot_be_is_named_by_its_key(given: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "h.json", {"backbones": {"DIN": given}})
    with pytest.raises(ConfigurationError, match=message):
        load_hyperparameters("DIN", path)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "h.json", {"backbone": {}})
    with pytest.raises(ConfigurationError, match="'default' and 'backbones'"):
        load_hyperparameters("DIN", path)
    path.write_text("{")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_hyperparameters("DIN", path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_hyperparameters("DIN", tmp_path / "none.json")
