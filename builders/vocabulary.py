"""Fits a `liber_runtime.vocabulary.Vocabulary` on the training part, and the item table that a backbone gathers from.

Only training behaviors, the profiles of their users and the catalogue are looked at; nothing depends on the order of
a dict or a set, so the same data give the same vocabulary.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from builders.datasets import Dataset
from liber_runtime.behavior import Attributes, AttributeValue, Behavior
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.vocabulary import Field, Vocabulary

MAX_BUCKETS = 10
"""Buckets of a numeric attribute, and of feedback with many distinct values."""

MAX_DISTINCT_FEEDBACK = 20
"""Up to this many distinct feedback values each get a bucket of their own."""

MAX_WIDTH = 8
"""Known categories kept of a multi-valued attribute: an item's first ones, in its own order."""


@dataclass(frozen=True)
class Fit:
    """A vocabulary and what the backbone needs beside it.

    Attributes:
        vocabulary: to be saved in the bundle.
        item_table: int32[items + 1, 1 + sum of the item fields' widths], one row per item index, row 0 (out of
            vocabulary) all zeros. Column 0 is the row of the id embedding: 0 for items too rare to have their own,
            which so share the out-of-vocabulary row. The other columns are the item fields' indices, in order.
    """

    vocabulary: Vocabulary
    item_table: npt.NDArray[np.int32]


def fit(dataset: Dataset, training: Sequence[Behavior], minimum_count: int = 5, minimum_category: int = 5) -> Fit:
    """Fits the vocabulary.

    Args:
        dataset: its catalogue and profiles.
        training: the behaviors of the training part, e.g. ``dataset.behaviors[: samples.behavior[split.test[0]]]``.
        minimum_count: training behaviors an item needs for an id embedding of its own.
        minimum_category: items (or users) that must share a text value for it to have an index of its own.

    Raises:
        InvalidInputError: no training behaviors, or all their feedback is the same.
    """
    feedback = sorted({behavior.feedback for behavior in training})
    if len(feedback) < 2:
        held = f"only the value {feedback[0]:g}" if feedback else "no behavior"
        raise InvalidInputError(f"the feedback of the training part holds {held}; bring a longer or more varied log")
    counts = Counter(behavior.item_id for behavior in training)
    items = tuple(dict.fromkeys([*dataset.items, *(behavior.item_id for behavior in training)]))
    known_users = sorted({behavior.user_id for behavior in training} & dataset.profiles.keys())
    vocabulary = Vocabulary(
        items=items,
        user_fields=_fields([dataset.profiles[user] for user in known_users], minimum_category, multiple=False),
        item_fields=_fields([item.attributes for item in dataset.items.values()], minimum_category, multiple=True),
        feedback=Field(name="feedback", kind="number", boundaries=_feedback_boundaries(feedback, training)),
    )
    frequent = np.array([counts[item_id] >= minimum_count for item_id in items], dtype=bool)
    return Fit(vocabulary, _item_table(dataset, vocabulary, frequent))


def _fields(rows: Sequence[Attributes], minimum_category: int, multiple: bool) -> tuple[Field, ...]:
    """One field per attribute that tells rows apart, in the order of their names.

    `multiple`: whether a tuple is several categories; a user field has one index, so there it is one category.
    """
    columns: dict[str, list[AttributeValue]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    fields = (_field(name, columns[name], minimum_category, multiple) for name in sorted(columns))
    return tuple(field for field in fields if field.values or field.boundaries)


def _field(name: str, values: Sequence[AttributeValue], minimum_category: int, multiple: bool) -> Field:
    if all(isinstance(value, int | float) for value in values):
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        return Field(name=name, kind="number", boundaries=_bucket_boundaries(numbers))
    texts = [value if isinstance(value, tuple) else (str(value),) for value in values]
    if not (multiple and any(isinstance(value, tuple) for value in values)):
        joined = [(" ".join(each),) for each in texts]
        return Field(name=name, kind="category", values=_categories(joined, minimum_category))
    known = _categories(texts, minimum_category)
    width = max((sum(part in known for part in each) for each in texts), default=0)
    return Field(name=name, kind="categories", values=known, width=min(max(width, 1), MAX_WIDTH))


def _categories(rows: Iterable[tuple[str, ...]], minimum: int) -> tuple[str, ...]:
    counts = Counter(value for row in rows for value in set(row))
    return tuple(sorted(value for value, count in counts.items() if count >= minimum))


def _feedback_boundaries(distinct: Sequence[float], training: Sequence[Behavior]) -> tuple[float, ...]:
    if len(distinct) <= MAX_DISTINCT_FEEDBACK:
        return _between(distinct)
    return _bucket_boundaries([behavior.feedback for behavior in training])


def _bucket_boundaries(numbers: Sequence[float]) -> tuple[float, ...]:
    """At most `MAX_BUCKETS` buckets: one per value while there are so few, else of about the same weight."""
    distinct = sorted(set(numbers))
    if len(distinct) <= MAX_BUCKETS:
        return _between(distinct)
    cuts = np.quantile(numbers, np.arange(1, MAX_BUCKETS) / MAX_BUCKETS, method="higher")
    # A number on a boundary belongs above it, so a boundary at the smallest one would leave its lower bucket empty.
    return tuple(sorted({float(cut) for cut in cuts if cut > distinct[0]}))


def _between(distinct: Sequence[float]) -> tuple[float, ...]:
    return tuple(_middle(low, high) for low, high in itertools.pairwise(distinct))


def _middle(low: float, high: float) -> float:
    middle = low + (high - low) / 2
    # Between neighbouring floats there is nothing; a number on a boundary belongs above it, so `high` still parts them.
    return middle if middle > low else high


def _item_table(dataset: Dataset, vocabulary: Vocabulary, frequent: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    fields = vocabulary.item_fields
    table = np.zeros((len(vocabulary.items) + 1, 1 + sum(field.width for field in fields)), dtype=np.int32)
    table[1:, 0] = np.where(frequent, np.cumsum(frequent), 0)
    for row, item_id in enumerate(vocabulary.items, start=1):
        item = dataset.items.get(item_id)
        if item is not None:
            table[row, 1:] = [index for field in fields for index in field.indices(item.attributes.get(field.name))]
    return table
