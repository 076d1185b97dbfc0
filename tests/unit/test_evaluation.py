"""AUC and log loss are those of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from builders.evaluation import area_under_curve, log_loss

PROBABILITIES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))


@settings(max_examples=50, deadline=None)
@given(st.lists(PROBABILITIES, min_size=2, max_size=30), st.integers(0, 2**30))
def test_both_are_those_of_scikit_learn(values: list[float], seed: int) -> None:
    probability = np.array(values)
    label = np.random.default_rng(seed).permutation(np.arange(len(values)) % 2).astype(np.float32)
    assert area_under_curve(label, probability) == pytest.approx(metrics.roc_auc_score(label, probability), abs=1e-12)
    assert log_loss(label, probability) == pytest.approx(metrics.log_loss(label, probability, labels=[0, 1]), rel=1e-9)


def test_ties_count_half() -> None:
    label = np.array([1, 0, 1, 0], dtype=np.float32)
    assert area_under_curve(label, np.full(4, 0.3)) == 0.5
    assert area_under_curve(label, np.array([0.9, 0.1, 0.5, 0.5])) == 0.875
    assert area_under_curve(1 - label, np.array([0.9, 0.1, 0.5, 0.5])) == 0.125
