"""AUC and log loss by numpy alone: scikit-learn has them too, and takes every build a second to import."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_FloatArray = npt.NDArray[np.floating[Any]]


def area_under_curve(label: _FloatArray, probability: _FloatArray) -> float:
    """The chance that a click is given more than what was not clicked; a tie counts half.

    Args:
        label: [n], 1 for a click and 0 for none; both are there.
        probability: [n], or anything that ranks like it.
    """
    _, place, count = np.unique(probability, return_inverse=True, return_counts=True)
    # Ranks from 1, those of equal values their mean.
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    clicked = label > 0
    ones = np.count_nonzero(clicked)
    return float((rank[clicked].sum() - ones * (ones + 1) / 2) / (ones * (len(label) - ones)))


def log_loss(label: _FloatArray, probability: _FloatArray) -> float:
    """The mean of -log of what was given to what happened.

    Args:
        label: [n], 1 for a click and 0 for none.
        probability: [n]; 0 and 1 count as the nearest numbers between them.
    """
    given = np.where(label > 0, probability, 1 - probability).astype(np.float64)
    smallest = np.finfo(np.float64).eps
    return float(-np.log(np.clip(given, smallest, 1 - smallest)).mean())
