"""The boosted trees' features know nothing that came after the sample, and find what there is to find."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.trees import FeatureTable, fit_and_measure, make_features, measure_trees, validate_trees
from builders.datasets import Dataset, sample
from builders.replay import Samples, replay, split
from liber_runtime.behavior import Behavior, Domain, Item
from liber_runtime.partition import Count

DATASET = sample.generate(seed=3, users=30, items=50, behaviors=1500)
MINIMUM = 5


def make_samples(dataset: Dataset) -> Samples:
    return replay(dataset, Count(MINIMUM), MINIMUM)


SAMPLES = make_samples(DATASET)
KNOWN = int(SAMPLES.behavior[len(SAMPLES) * 9 // 10])
FEATURES = make_features(DATASET, SAMPLES, KNOWN)


def rate_anew(rows: set[int], seed: int) -> Dataset:
    """The same log with other feedback in these rows."""
    random = np.random.default_rng(seed)
    behaviors = [
        dataclasses.replace(each, feedback=float(random.integers(1, 6))) if row in rows else each
        for row, each in enumerate(DATASET.behaviors)
    ]
    return dataclasses.replace(DATASET, behaviors=behaviors)


def column(features: FeatureTable, name: str) -> np.ndarray:
    return features.values[:, features.names.index(name)]


@settings(max_examples=8, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_what_is_rated_later_changes_no_feature(share: float, seed: int) -> None:
    cut = KNOWN + int(share * (len(DATASET.behaviors) - 1 - KNOWN))
    altered = rate_anew(set(range(cut, len(DATASET.behaviors))), seed)
    features = make_features(altered, make_samples(altered), KNOWN)
    # The sample at the cut is among them: its own feedback is another now.
    earlier = SAMPLES.behavior <= cut
    assert earlier.sum() > len(SAMPLES) // 2
    np.testing.assert_array_equal(features.values[earlier], FEATURES.values[earlier])


@settings(max_examples=8, deadline=None)
@given(user=st.integers(0, len(SAMPLES.user_ids) - 1), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_what_a_user_rates_later_changes_none_of_the_users_features(user: int, share: float, seed: int) -> None:
    begin, end = SAMPLES.offsets[user], SAMPLES.offsets[user + 1]
    later = SAMPLES.sequence_behavior[begin + int(share * (end - 1 - begin)) : end]
    altered = rate_anew(set(later.tolist()), seed)
    features = make_features(altered, make_samples(altered), KNOWN)
    earlier = (SAMPLES.user == user) & (SAMPLES.behavior <= later[0])
    np.testing.assert_allclose(features.values[earlier], FEATURES.values[earlier], rtol=1e-4, atol=1e-5)


def test_behaviors_that_are_gone_change_no_feature_of_earlier_samples() -> None:
    shorter = dataclasses.replace(DATASET, behaviors=DATASET.behaviors[: KNOWN + 1])
    samples = make_samples(shorter)
    features = make_features(shorter, samples, KNOWN)
    np.testing.assert_allclose(features.values, FEATURES.values[: len(samples)], rtol=1e-5, atol=1e-6)


def test_the_users_own_rating_of_the_candidate_is_in_no_similarity() -> None:
    trained = np.flatnonzero(SAMPLES.behavior < KNOWN)
    for row in trained[:: len(trained) // 8]:
        altered = rate_anew({int(SAMPLES.behavior[row])}, seed=int(row))
        features = make_features(altered, make_samples(altered), KNOWN)
        mine, before = column(features, "neighbours")[row], column(FEATURES, "neighbours")[row]
        assert mine == pytest.approx(before, rel=1e-4, abs=1e-6)


def test_others_who_rated_both_alike_make_two_items_neighbours() -> None:
    # Everybody likes a and b together or not at all; c goes its own way. The last user has liked a.
    behaviors, time = [], 0.0
    for number in range(40):
        for item, liked in (("a", number % 2), ("b", number % 2), ("c", number // 2 % 2)):
            behaviors.append(Behavior(f"u{number}", item, 5.0 if liked else 1.0, time := time + 1))
    behaviors += [Behavior("me", "a", 5.0, 1000.0), Behavior("me", "x", 3.0, 1001.0)]
    both = [[*behaviors, Behavior("me", item, 1.0, 1002.0)] for item in ("b", "c")]
    domain = Domain("d", "item", "points", (1.0, 5.0), 3.0, ("kind",), "", "")
    found = []
    for log in both:
        dataset = Dataset(domain, log, {each: Item(each, each) for each in "abcx"}, {})
        samples = replay(dataset, Count(2), 2)
        features = make_features(dataset, samples, len(behaviors))
        found.append(column(features, "neighbours")[-1])
    assert found[0] > 0.2
    assert found[0] > 5 * abs(found[1])


def test_means_are_those_of_the_past_by_hand() -> None:
    row = len(SAMPLES) - 1
    own = DATASET.behaviors[SAMPLES.behavior[row]]
    past = DATASET.behaviors[: SAMPLES.behavior[row]]
    mine = [(each.feedback - 1) / 4 for each in past if each.user_id == own.user_id]
    of_item = [(each.feedback - 1) / 4 for each in past if each.item_id == own.item_id]
    total = (0.5 + sum((each.feedback - 1) / 4 for each in past)) / (1 + len(past))
    expected = {
        "user mean": np.mean(mine),
        "user mean, recent": np.mean(mine[-20:]),
        "user count": len(mine),
        "item mean": (sum(of_item) + 5 * total) / (len(of_item) + 5),
        "item count": len(of_item),
    }
    assert {name: column(FEATURES, name)[row] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_trees_find_what_the_sample_has_planted_and_repeat_it() -> None:
    parts = split(SAMPLES)
    first = measure_trees(DATASET, SAMPLES, parts)
    again = measure_trees(DATASET, SAMPLES, parts, seed=2)
    chosen = validate_trees(DATASET, SAMPLES, parts)
    assert first.auc > 0.6
    assert (first.auc, first.logloss) == (again.auc, again.logloss)
    assert chosen.auc > 0.6
    assert chosen.auc != first.auc


def test_a_log_of_bare_ids_and_another_scale_works() -> None:
    behaviors = [dataclasses.replace(each, feedback=each.feedback * 100 - 300) for each in DATASET.behaviors]
    domain = dataclasses.replace(
        DATASET.domain, feedback_range=(-200.0, 200.0), positive_above=0.0, group_attribute="", period_attribute=""
    )
    bare = Dataset(domain, behaviors, {}, {})
    samples = make_samples(bare)
    features = make_features(bare, samples, KNOWN)
    assert "taste" not in features.names
    np.testing.assert_allclose(column(features, "neighbours"), column(FEATURES, "neighbours"), atol=1e-5)
    parts = split(samples)
    result = fit_and_measure(features, samples.label, parts.training_part, parts.test, seed=1)
    assert 0.5 < result.auc < 1
