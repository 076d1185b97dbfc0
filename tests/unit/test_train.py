from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from builders.models.backbone import LiberModel
from builders.models.dien import DIEN
from builders.models.fuser import AttentionFuser
from builders.train import TrainingData, TrainingSettings, evaluate, gather_partitions, predict, train
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.vocabulary import Field

T, D, ITEMS, SAMPLES = 5, 4, 40, 3000
STARS = Field(name="stars", kind="number", boundaries=(2.5,))
AGE = Field(name="age", kind="number", boundaries=(40.0,))
TRAIN, VALIDATION, TEST = np.arange(2000), np.arange(2000, 2400), np.arange(2400, SAMPLES)
SETTINGS = TrainingSettings(max_epochs=6, batch_size=100, learning_rate=1e-2, average_decay=0.9)


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
        partition_start=start,
        partition_count=count,
        representations=representations,
    )


def make_dien(interest_size: int) -> DIEN:
    torch.manual_seed(0)
    table = np.arange(ITEMS + 1, dtype=np.int32)[:, None]
    return DIEN(
        table, (), (AGE,), STARS, history_size=T, interest_size=interest_size, embedding_dim=8, hidden_size=8,
        mlp_sizes=(32, 16),
    )  # fmt: skip


def make_liber() -> LiberModel:
    backbone = make_dien(D)
    return LiberModel(AttentionFuser(D), backbone)


def test_it_learns_what_only_the_partitions_tell_bit_for_bit_by_seed() -> None:
    data, models, seen = make_data(), [make_liber(), make_liber(), make_liber()], []
    results = [
        train(models[0], data, TRAIN, VALIDATION, seed=7, settings=SETTINGS, progress=lambda *at: seen.append(at)),
        train(models[1], data, TRAIN, VALIDATION, seed=7, settings=SETTINGS),
        train(models[2], data, TRAIN, VALIDATION, seed=8, settings=SETTINGS),
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
    data = make_data()
    data.representations[:] = np.nan
    with pytest.raises(InvalidInputError, match="training loss became nan"):
        train(make_liber(), data, TRAIN, VALIDATION, seed=0, settings=SETTINGS)
