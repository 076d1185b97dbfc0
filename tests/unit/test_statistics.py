from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.datasets import Dataset, sample
from builders.models.features import Inputs
from builders.models.numbers import ItemStatistics, Numbers
from builders.replay import Samples, Split, replay, split
from builders.statistics import FittedNumbers, fit_numbers, fit_statistics, fit_tables
from builders.vocabulary import fit
from liber_runtime.behavior import Behavior
from liber_runtime.partition import Count

T, MINIMUM = 6, 5


def fitted(dataset: Dataset) -> tuple[Samples, Split, FittedNumbers]:
    samples = replay(dataset, Count(MINIMUM), MINIMUM)
    parts = split(samples)
    vocabulary = fit(dataset, dataset.behaviors[: samples.behavior[parts.test[0]]])
    return (
        samples,
        parts,
        fit_numbers(
            fit_tables(samples, parts, vocabulary, seed=1),
            samples,
            parts,
            vocabulary,
            history_length=T,
            lookback=2 * T,
        ),
    )


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return sample.generate(users=40, items=80, behaviors=1500)


def with_feedback(dataset: Dataset, row: int, feedback: float) -> Dataset:
    changed = list(dataset.behaviors)
    changed[row] = dataclasses.replace(changed[row], feedback=feedback)
    return dataclasses.replace(dataset, behaviors=changed)


def other_feedback(behavior: Behavior) -> float:
    return 1.0 if behavior.feedback > 3 else 5.0


def random_statistics(items: int, factors: int, seed: int) -> ItemStatistics:
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    vectors, similarity, attributes = draw(items + 1, factors), draw(items + 1, 4), abs(draw(items + 1, 3))
    vectors[0] = similarity[0] = 0
    attributes /= np.linalg.norm(attributes, axis=1, keepdims=True)
    count = generator.integers(0, 50, items + 1).astype(np.float32)
    stars = np.array([3.0, 1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
    return ItemStatistics(3.0, stars, draw(items + 1), count, vectors, similarity, attributes, noise=0.7, bias=0.3)


def random_inputs(items: int, users: int, candidates: int, seed: int, lengths: tuple[int, ...] | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    length = draw(T + 1, users) if lengths is None else torch.tensor(lengths).int()
    real = torch.arange(T) < length[:, None]
    history, feedback = draw(items + 1, users, T) * real, (1 + draw(5, users, T)) * real
    index = draw(users, candidates)
    return Inputs(draw(items + 1, candidates), index, history, feedback, length, torch.zeros(users, 0).int())


def column(numbers: torch.Tensor, name: str) -> torch.Tensor:
    return numbers[:, Numbers.STATISTICAL.index(name)]


# the numbers


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), factors=st.integers(1, 8))
def test_taste_is_the_ridge_regression_of_the_history_on_the_factors(seed: int, factors: int) -> None:
    statistics, inputs = random_statistics(20, factors, seed), random_inputs(20, 3, 4, seed)
    numbers = Numbers(statistics, T)(inputs)
    design = np.concatenate([np.full((21, 1), statistics.bias**0.5), statistics.vectors], axis=1)
    for candidate, user in enumerate(inputs.user_index.tolist() if inputs.user_index is not None else []):
        steps = inputs.history_item[user, : inputs.history_length[user]].numpy()
        stars = statistics.feedback[inputs.history_feedback[user, : inputs.history_length[user]].numpy()]
        x, residual = design[steps], stars - statistics.level - statistics.mean[steps]
        taste = np.linalg.solve(x.T @ x + statistics.noise * np.eye(factors + 1), x.T @ residual)
        expected = design[inputs.item_index[candidate]] * taste
        assert column(numbers, "bias of the user")[candidate] == pytest.approx(expected[0], abs=2e-3)
        assert column(numbers, "taste for the item")[candidate] == pytest.approx(expected[1:].sum(), abs=2e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_what_is_padded_does_not_matter(seed: int) -> None:
    module, inputs = Numbers(random_statistics(20, 4, seed), T), random_inputs(20, 3, 4, seed)
    padded = torch.arange(T) >= inputs.history_length[:, None]
    noisy = inputs._replace(
        history_item=torch.where(padded, 7, inputs.history_item).int(),
        history_feedback=torch.where(padded, 5, inputs.history_feedback).int(),
    )
    torch.testing.assert_close(module(noisy), module(inputs))


def test_only_similar_items_are_looked_for_beyond_what_is_recent() -> None:
    module, long = Numbers(random_statistics(20, 4, 0), T), random_inputs(20, 3, 6, 0, (T, 2, T))
    older = torch.randint(1, 6, (3, 4), generator=torch.Generator().manual_seed(1)).int()
    full = long.history_length == T
    # Four more behaviors before a history that is full; one that is not just has more padding.
    item, feedback = (
        torch.where(full[:, None], torch.cat((older, rows), 1), torch.cat((rows, 0 * older), 1))
        for rows in (long.history_item, long.history_feedback)
    )
    longer = long._replace(
        history_item=item, history_feedback=feedback, history_length=torch.where(full, T + 4, long.history_length).int()
    )
    before, after = module(long), module(longer)
    similar = ["feedback to similar items", "similar items", "feedback times similarity"]
    recent = [number for number, name in enumerate(module.names) if name not in similar]
    torch.testing.assert_close(after[:, recent], before[:, recent])
    assert long.user_index is not None
    same = torch.isclose(column(after, "similar items"), column(before, "similar items"))
    assert same.tolist() == (~full[long.user_index]).tolist()


def test_folded_and_repeated_users_give_the_same() -> None:
    module, inputs = Numbers(random_statistics(20, 4, 0), T), random_inputs(20, 3, 6, 0)
    assert inputs.user_index is not None
    repeated = Inputs(inputs.item_index, None, *(each[inputs.user_index] for each in inputs[2:6]))
    torch.testing.assert_close(module(repeated), module(inputs))


def test_an_empty_history_and_an_unknown_item_give_finite_numbers() -> None:
    statistics = random_statistics(20, 4, 0)
    zeros = torch.zeros(1, T, dtype=torch.int32)
    inputs = Inputs(torch.zeros(1).int(), None, zeros, zeros, torch.zeros(1).int(), torch.zeros(1, 0).int())
    assert torch.isfinite(Numbers(statistics, T)(inputs)).all()


def test_knowledge_adds_its_numbers_and_leaves_the_others() -> None:
    statistics, inputs = random_statistics(20, 4, 0), random_inputs(20, 3, 6, 0)
    knowledge = np.random.default_rng(1).normal(size=(21, 5)).astype(np.float32)
    plain, knowing = Numbers(statistics, T), Numbers(statistics, T, knowledge)
    assert knowing.names == plain.names + Numbers.KNOWING
    torch.testing.assert_close(knowing(inputs)[:, : len(plain.names)], plain(inputs))
    # An item like one that was rated well is expected to do better than one like what was rated badly.
    twins = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0)
    knowing = Numbers(
        dataclasses.replace(statistics, mean=np.zeros(21, np.float32)), T, np.vstack([twins[:1] * 0, twins])
    )
    history, stars = torch.tensor([[1, 11, 0, 0, 0, 0]]).int(), torch.tensor([[5, 1, 0, 0, 0, 0]]).int()
    asked = Inputs(
        torch.tensor([2, 12]).int(), torch.zeros(2).int(), history, stars, torch.tensor([2]).int(), history[:, :0]
    )
    liked, disliked = knowing(asked)[:, len(plain.names)].tolist()
    assert liked > 0.5 > -0.5 > disliked


# the tables


def test_factors_find_the_groups_that_items_are_liked_in() -> None:
    # Half of the users like the even items and half the odd ones; the item's mean says nothing.
    generator = np.random.default_rng(0)
    user = np.repeat(np.arange(60), 20)
    item = generator.integers(1, 31, len(user))
    feedback = np.where((user + item) % 2 == 0, 5.0, 1.0)
    behaviors = [
        Behavior(f"u{u}", f"i{i}", float(f), 1e9 + n, f"e{n}")
        for n, (u, i, f) in enumerate(zip(user, item, feedback, strict=True))
    ]
    made = sample.generate(users=5, items=5, behaviors=60)
    dataset = Dataset(made.domain, behaviors, {}, {})
    samples = replay(dataset, Count(MINIMUM), MINIMUM)
    vocabulary = fit(dataset, dataset.behaviors)
    index = vocabulary.vocabulary.item_indices([f"i{i}" for i in item]).astype(np.int64)
    found = fit_statistics(user, index, feedback, vocabulary, samples, generator)
    alike = found.vectors[index] @ found.vectors[index[0]]
    same = (item - item[0]) % 2 == 0
    assert alike[same].min() > 0 > alike[~same].max()
    assert found.count[index[0]] == np.count_nonzero(item == item[0])


def test_items_out_of_vocabulary_leave_no_trace(dataset: Dataset) -> None:
    samples = replay(dataset, Count(MINIMUM), MINIMUM)
    vocabulary = fit(dataset, dataset.behaviors)
    user, item = np.array([0, 0, 1]), np.array([0, 3, 3])
    found = fit_statistics(user, item, np.array([5.0, 1.0, 2.0]), vocabulary, samples, np.random.default_rng(0))
    assert found.count[0] == 0
    assert not found.vectors[0].any()
    assert found.level == 1.5


# what a sample may see


def test_numbers_are_standardised_and_finite(dataset: Dataset) -> None:
    _, parts, numbers = fitted(dataset)
    assert np.isfinite(numbers.values).all()
    train = numbers.values[parts.train]
    assert np.abs(train.mean(0)).max() < 1e-4
    spread = train.std(0)
    assert (np.isclose(spread, 1, atol=1e-3) | (spread < 1e-3)).all()


def test_a_label_is_in_no_table_that_its_sample_sees(dataset: Dataset) -> None:
    samples, parts, numbers = fitted(dataset)
    for which in (parts.train[len(parts.train) // 2], parts.validation[3], parts.test[3]):
        row = int(samples.behavior[which])
        changed = with_feedback(dataset, row, other_feedback(dataset.behaviors[row]))
        _, _, after = fitted(changed)
        module_scale = numbers.served.scale.numpy() / after.served.scale.numpy()
        shift = (numbers.served.mean.numpy() - after.served.mean.numpy()) / after.served.scale.numpy()
        np.testing.assert_allclose(
            after.values[which], numbers.values[which] * module_scale + shift, atol=1e-3, err_msg=f"sample {which}"
        )


def test_nobody_sees_what_came_later(dataset: Dataset) -> None:
    samples, parts, numbers = fitted(dataset)
    last = int(samples.behavior[parts.test[-1]])
    changed = with_feedback(dataset, last, other_feedback(dataset.behaviors[last]))
    _, _, after = fitted(changed)
    np.testing.assert_array_equal(after.values[:-1], numbers.values[:-1])


def test_served_numbers_are_those_of_the_test_samples(dataset: Dataset) -> None:
    samples, parts, numbers = fitted(dataset)
    vocabulary = fit(dataset, dataset.behaviors[: samples.behavior[parts.test[0]]])
    indexed = samples.in_vocabulary(vocabulary.vocabulary)
    history = indexed.history(parts.test, 2 * T)
    with torch.inference_mode():
        found = numbers.served(
            Inputs(
                torch.from_numpy(indexed.item[parts.test]),
                None,
                torch.from_numpy(history.item),
                torch.from_numpy(history.feedback),
                torch.from_numpy(history.length),
                torch.zeros((len(parts.test), 0), dtype=torch.int32),
            )
        )
    np.testing.assert_allclose(found.numpy(), numbers.values[parts.test], atol=1e-4)
