from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_harness import make_features_module
from torch import nn

from builders.models.backbone import Ranker
from builders.models.dien import DIEN
from builders.models.dnn import DNN
from builders.models.fuser import AttentionFuser
from builders.models.numbers import Numbers
from builders.train import TrainingData, TrainingSettings, evaluate, gather_partitions, predict, train
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.progress import console
from liber_runtime.vocabulary import Field

T, D, ITEMS, SAMPLES = 5, 4, 40, 3000
WIDTH = len(Numbers.STATISTICAL)
AGE = Field(name="age", kind="number", boundaries=(40.0,))
TRAIN, VALIDATION, TEST = np.arange(2000), np.arange(2000, 2400), np.arange(2400, SAMPLES)
SETTINGS = TrainingSettings(max_epochs=6, batch_sizes=(100,), learning_rate=1e-2, average_decay=0.9)
SHORT = dataclasses.replace(SETTINGS, max_epochs=4, patience=4, batch_sizes=(200, 300))


def make_data() -> TrainingData:
    """Clicks hang on the user's partitions alone: on the first number of their mean."""
    generator = np.random.default_rng(0)
    count = generator.integers(0, 4, SAMPLES).astype(np.int32)
    start = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int64)
    representations = generator.normal(size=(int(count.sum()), D)).astype(np.float32)
    taste = np.array([representations[s : s + c, 0].mean() if c else 0.0 for s, c in zip(start, count, strict=True)])
    length = generator.integers(0, T + 1, SAMPLES).astype(np.int32)
    real = np.arange(T) < length[:, None]
    return TrainingData(
        item=generator.integers(1, ITEMS + 1, SAMPLES).astype(np.int32),
        label=(taste + 0.1 * generator.normal(size=SAMPLES) > 0).astype(np.float32),
        history_item=(generator.integers(1, ITEMS + 1, (SAMPLES, T)) * real).astype(np.int32),
        history_feedback=(generator.integers(1, 3, (SAMPLES, T)) * real).astype(np.int32),
        history_length=length,
        profile=generator.integers(0, 3, (SAMPLES, 1)).astype(np.int32),
        numbers=generator.normal(size=(SAMPLES, WIDTH)).astype(np.float32),
        partition_start=start,
        partition_count=count,
        representations=representations,
    )


def make_ranker(interest_size: int, kind: type[nn.Module] = DIEN, **options: Any) -> Ranker:
    features = make_features_module(
        item_fields=(), user_fields=(AGE,), interest_size=interest_size, items=ITEMS, history_length=T,
        embedding_dim=8, embedding_scale=0.05, dropout=0.2,
    )  # fmt: skip
    backbone = kind(features.schema, mlp_sizes=(32, 16), **options)
    return Ranker(features, backbone, AttentionFuser(D) if interest_size else None)


def make_dien(interest_size: int) -> Ranker:
    return make_ranker(interest_size, hidden_size=8)


def make_liber() -> Ranker:
    return make_dien(D)


def test_it_learns_what_only_the_partitions_tell_bit_for_bit_by_seed() -> None:
    data, models, seen = make_data(), [make_liber(), make_liber(), make_liber()], []
    results = [
        train(models[0], data, TRAIN, VALIDATION, seed=7, settings=SETTINGS, progress=lambda *at: seen.append(at)),
        train(models[1], data, TRAIN, VALIDATION, seed=7, settings=SETTINGS),
        train(models[2], data, TRAIN, VALIDATION, seed=8, settings=dataclasses.replace(SETTINGS, max_epochs=1)),
    ]
    assert evaluate(models[0], data, TEST)[0] > 0.8
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
    assert [(each.loss, each.auc) for each in results[0].epochs] == [
        (each.loss, each.auc) for each in results[1].epochs
    ]
    assert results[0].epochs[0].loss != results[2].epochs[0].loss
    assert seen[:20] == [(1, done, 2000) for done in range(100, 2001, 100)]

    best = results[0]
    assert (best.auc, best.logloss) == evaluate(models[0], data, VALIDATION), "the weights of the best epoch are kept"
    assert best.logloss == min(each.logloss for each in best.epochs)


def test_without_partitions_nothing_can_be_learned_and_training_stops_early() -> None:
    data, model = make_data(), make_dien(0)
    result = train(model, data, TRAIN, VALIDATION, seed=7, settings=dataclasses.replace(SETTINGS, max_epochs=30))
    assert evaluate(model, data, TEST)[0] < 0.6
    assert len(result.epochs) == result.best_epoch + SETTINGS.patience < 30


def test_training_leaves_the_callers_random_state() -> None:
    model, before = make_dien(0), torch.get_rng_state()
    train(model, make_data(), TRAIN, VALIDATION, seed=7, settings=dataclasses.replace(SETTINGS, max_epochs=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


def test_predictions_do_not_depend_on_the_company() -> None:
    data, model = make_data(), make_liber()
    together = predict(model, data, TEST[:50])
    alone = np.concatenate([predict(model, data, TEST[each : each + 1]) for each in range(50)])
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert predict(model, data, TEST[:0]).shape == (0,)


def test_the_newest_partitions_are_gathered_in_order() -> None:
    data = dataclasses.replace(
        make_data(),
        partition_start=np.zeros(SAMPLES, np.int64),
        partition_count=(np.arange(SAMPLES) % 4).astype(np.int32),
        representations=np.repeat(np.arange(1, 4, dtype=np.float32), D).reshape(3, D),
    )
    representations, mask = gather_partitions(data, np.array([0, 1, 2, 3]), max_partitions=2)
    assert mask.tolist() == [[False, False], [True, False], [True, True], [True, True]]
    assert representations[:, :, 0].tolist() == [[0, 0], [1, 0], [1, 2], [2, 3]]
    representations, mask = gather_partitions(data, np.array([0, 4]), max_partitions=2)
    assert representations.shape == (2, 0, D)
    assert mask.shape == (2, 0)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="differ in length"):
        dataclasses.replace(make_data(), item=np.zeros(3, np.int32))


def test_partitions_that_were_not_encoded_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="encode every partition"):
        dataclasses.replace(make_data(), representations=np.zeros((5, D), np.float32))


def test_a_slice_with_one_label_is_refused() -> None:
    data = make_data()
    with pytest.raises(InvalidInputError, match="the 1 validation samples do not hold both labels"):
        train(make_dien(0), data, TRAIN, VALIDATION[:1], seed=0, settings=SETTINGS)


def test_a_diverging_loss_is_named() -> None:
    model = make_liber()
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(np.nan)
    with pytest.raises(InvalidInputError, match="training loss became nan"):
        train(model, make_data(), TRAIN, VALIDATION, seed=0, settings=SETTINGS)


def with_entry(name: str, place: tuple[int, ...], value: float) -> TrainingData:
    data = make_data()
    getattr(data, name)[place] = value
    return data


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("numbers", (7, 3), np.nan, "column numbers is nan in row 7, entry 3 .*recompute"),
        ("representations", (9, 1), np.inf, "column representations is inf in row 9, entry 1 .*encode"),
        ("item", (11,), ITEMS + 1, "column item is 41 in row 11 and must lie in 0 to 40"),
        ("item", (11,), -1, "column item is -1 in row 11"),
        ("history_item", (12, 2), 99, "column history_item is 99 in row 12"),
        ("history_feedback", (13, 0), 6, "column history_feedback is 6 in row 13 and must lie in 0 to 5"),
        ("history_length", (14,), T + 1, "column history_length is 6 in row 14 and must lie in 0 to 5"),
        ("profile", (15, 0), 3, r"column profile\[:, 0\] is 3 in row 15 and must lie in 0 to 2"),
        ("partition_start", (16,), -1, "column partition_start is -1 in row 16 and may not be negative"),
        ("label", (17,), 0.5, "column label is 0.5 in row 17"),
    ],
)
def test_unusable_data_are_named_before_training(name: str, place: tuple[int, ...], value: float, message: str) -> None:
    model, seen = make_liber(), []
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(InvalidInputError, match=message):
        train(
            model, with_entry(name, place, value), TRAIN, VALIDATION, seed=0, settings=SETTINGS,
            progress=lambda *at: seen.append(at),
        )  # fmt: skip
    assert not seen
    assert all(torch.equal(first, second) for first, second in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"numbers": np.zeros((SAMPLES, 2), np.float32)}, f"column numbers has 2 entries a row; {WIDTH} are needed"),
        ({"profile": np.zeros((SAMPLES, 2), np.int32)}, "column profile has 2 entries a row; 1 are needed"),
        ({"representations": np.zeros((9000, 5), np.float32)}, "column representations has 5 entries a row; 4 are"),
        (
            {name: np.zeros((SAMPLES, 4), np.int32) for name in ("history_item", "history_feedback")},
            "column history_item has 4 entries a row; 5 are needed",
        ),
    ],
)
def test_columns_of_another_size_than_the_models_are_refused(column: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        train(make_liber(), dataclasses.replace(make_data(), **column), TRAIN, VALIDATION, seed=0, settings=SETTINGS)


def test_columns_of_another_type_are_refused() -> None:
    data = make_data()
    with pytest.raises(InvalidInputError, match="column numbers is float64 of 2 dimensions; give float32 of 2"):
        dataclasses.replace(data, numbers=data.numbers.astype(np.float64))
    with pytest.raises(InvalidInputError, match="column label is float32 of 2 dimensions; give float32 of 1"):
        dataclasses.replace(data, label=data.label[:, None])
    with pytest.raises(InvalidInputError, match="history_item has 5 steps and history_feedback 4"):
        dataclasses.replace(data, history_feedback=data.history_feedback[:, :4])


def test_the_numbers_given_are_what_the_backbone_reads() -> None:
    data = make_data()
    data = dataclasses.replace(data, label=(data.numbers[:, 4] > 0).astype(np.float32))
    model = make_ranker(0, DNN)
    train(model, data, TRAIN, VALIDATION, seed=7, settings=SETTINGS)
    assert evaluate(model, data, TEST)[0] > 0.95


def sizes_of_batches(settings: TrainingSettings, seed: int = 7) -> list[int]:
    seen: list[int] = []
    train(
        make_ranker(0, DNN), make_data(), TRAIN, VALIDATION, seed=seed, settings=settings,
        progress=lambda epoch, done, total: seen.append((epoch - 1) * total + done),
    )  # fmt: skip
    return np.diff([0, *seen]).tolist()


def test_sizes_of_batches_are_mixed_within_an_epoch_by_seed() -> None:
    settings = dataclasses.replace(SETTINGS, max_epochs=2, batch_sizes=(50, 100))
    sizes = sizes_of_batches(settings)
    assert sum(sizes) == 4000
    assert sizes == sizes_of_batches(settings)
    assert sizes != sizes_of_batches(settings, seed=8)
    # Only an epoch's last batch may be smaller.
    assert sum(size not in (50, 100) for size in sizes) <= 2
    first = sizes[: np.flatnonzero(np.cumsum(sizes) == 2000)[0] + 1]
    assert first.count(50) >= 5
    assert first.count(100) >= 5


def test_no_batch_has_one_sample_alone() -> None:
    sizes = sizes_of_batches(dataclasses.replace(SETTINGS, max_epochs=1, batch_sizes=(1999,)))
    assert sizes == [2000]


def test_each_kind_of_weights_has_its_own_decay() -> None:
    def change(**decays: float) -> dict[str, float]:
        model = make_ranker(0, DNN)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        settings = dataclasses.replace(SETTINGS, max_epochs=1, batch_sizes=(1000,), **decays)
        train(model, make_data(), TRAIN, VALIDATION, seed=7, settings=settings)
        norms = {name: float(parameter.detach().norm()) for name, parameter in model.named_parameters()}
        return {name: norm / max(float(before[name].norm()), 1e-9) for name, norm in norms.items()}

    none = change(weight_decay=0.0, embedding_decay=0.0)
    matrices = change(weight_decay=10.0, embedding_decay=0.0)
    tables = change(weight_decay=0.0, embedding_decay=10.0)
    table, matrix = "features.item_embedding.id.table.weight", "backbone.mlp.rest.5.weight"
    assert {table, matrix} <= none.keys()
    assert tables[table] < none[table] - 0.02
    assert tables[matrix] == pytest.approx(none[matrix], abs=0.01)
    assert matrices[matrix] < none[matrix] - 0.005
    assert matrices[table] == pytest.approx(none[table], abs=0.01)


class Killed(Exception):
    pass


def kill_in(epoch: int) -> Any:
    def report(now: int, done: int, total: int) -> None:
        if now == epoch and done > total // 2:
            raise Killed

    return report


@pytest.fixture(scope="module")
def unbroken() -> tuple[list[torch.Tensor], list[tuple[float, float]]]:
    model = make_liber()
    result = train(model, make_data(), TRAIN, VALIDATION, seed=7, settings=SHORT)
    return list(model.parameters()), [(each.loss, each.logloss) for each in result.epochs]


@pytest.mark.parametrize("killed", [1, 2, 4])
def test_a_killed_training_goes_on_to_bit_identical_weights(killed: int, unbroken: Any, tmp_path: Path) -> None:
    data, checkpoint = make_data(), tmp_path / "models" / "liber.checkpoint"
    with pytest.raises(Killed):
        train(
            make_liber(), data, TRAIN, VALIDATION, seed=7, settings=SHORT, progress=kill_in(killed),
            checkpoint=checkpoint,
        )  # fmt: skip
    assert checkpoint.is_file() == (killed > 1)
    model, seen = make_liber(), []
    result = train(
        model, data, TRAIN, VALIDATION, seed=7, settings=SHORT, progress=lambda *at: seen.append(at),
        checkpoint=checkpoint,
    )  # fmt: skip
    assert seen[0][0] == killed, "epochs that were done are not done again"
    weights, epochs = unbroken
    assert all(torch.equal(first, second) for first, second in zip(weights, model.parameters(), strict=True))
    assert [(each.loss, each.logloss) for each in result.epochs] == epochs
    assert list(checkpoint.parent.iterdir()) == []


def test_a_checkpoint_of_another_training_or_a_broken_one_is_not_used(tmp_path: Path) -> None:
    data, checkpoint = make_data(), tmp_path / "base.checkpoint"
    settings = dataclasses.replace(SHORT, max_epochs=2)

    def leave(model: Ranker) -> None:
        with pytest.raises(Killed):
            train(model, data, TRAIN, VALIDATION, seed=7, settings=settings, progress=kill_in(2), checkpoint=checkpoint)

    def run() -> tuple[list[tuple[int, int, int]], str]:
        seen: list[tuple[int, int, int]] = []
        with console.capture() as capture:
            train(
                make_ranker(0, DNN), data, TRAIN, VALIDATION, seed=7, settings=settings,
                progress=lambda *at: seen.append(at), checkpoint=checkpoint,
            )  # fmt: skip
        return seen, capture.get()

    # Equal weights; only the dropout differs.
    leave(make_ranker(0, DNN, dropout=0.5))
    seen, said = run()
    assert seen[0][0] == 1
    assert "is of another training" in said
    assert not checkpoint.exists()

    checkpoint.write_bytes(b"not a checkpoint")
    seen, said = run()
    assert seen[0][0] == 1
    assert "cannot be read" in said

    leave(make_ranker(0, DNN))
    seen, said = run()
    assert seen[0][0] == 2
    assert "training goes on after epoch 1" in said


def test_a_device_that_is_not_there_is_named() -> None:
    data, model = make_data(), make_ranker(0, DNN)
    for device in ("cuda:99", "gpu", "meta"):
        with pytest.raises(ConfigurationError, match=f"device '{device}' is"):
            predict(model, data, TEST, device=device)
    automatic = predict(model, data, TEST, device="auto")
    np.testing.assert_allclose(automatic, predict(model, data, TEST), atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_cuda_ends_on_the_cpu() -> None:
    data, model = make_data(), make_liber()
    train(model, data, TRAIN, VALIDATION, seed=7, settings=SETTINGS, device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert evaluate(model, data, TEST)[0] > 0.8


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("batch_sizes", ()), ("batch_sizes", (0,)), ("embedding_decay", -1.0), ("patience", 0),
     ("average_decay", 1.5)],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        TrainingSettings(**{name: value})
