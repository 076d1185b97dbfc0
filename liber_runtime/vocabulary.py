"""From raw ids and attributes to the indices a backbone was trained on; fitted by `builders.vocabulary`.

Index 0 is everywhere the out-of-vocabulary row: unknown, missing or padding.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pydantic

from liber_runtime.behavior import Attributes, AttributeValue
from liber_runtime.exceptions import ConfigurationError

_FEW = 16
"""Boundaries that are compared one by one, which is faster than a search for each value."""


class Field(pydantic.BaseModel, frozen=True):
    """One attribute of a user or an item and how it becomes indices.

    Attributes:
        name: of the attribute.
        kind: ``category`` (one of `values`), ``categories`` (several of them), ``number`` (bucketed by `boundaries`).
        values: known categories; `values[i]` has index i + 1.
        boundaries: ascending; a number has index 1 + (how many boundaries are <= it).
        width: indices per row: 1, or the most categories an item has.
    """

    name: str
    kind: Literal["category", "categories", "number"]
    values: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    width: int = 1

    @property
    def size(self) -> int:
        """Number of distinct indices, the out-of-vocabulary row included."""
        return len(self.boundaries) + 2 if self.kind == "number" else len(self.values) + 1

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {value: index for index, value in enumerate(self.values, start=1)}

    def indices(self, value: AttributeValue | None) -> list[int]:
        """`width` indices for one value; categories beyond the width are dropped, missing ones are 0.

        A value of the wrong type is an unknown one, and so is a number that is not finite.
        """
        if value is None:
            return [0] * self.width
        if self.kind == "number":
            try:
                number = float(value)  # type: ignore[arg-type]
            except (TypeError, ValueError, OverflowError):
                return [0]
            return [1 + bisect.bisect_right(self.boundaries, number)] if math.isfinite(number) else [0]
        values = value if isinstance(value, tuple) else (str(value),)
        if self.kind == "category":
            return [self._index.get(" ".join(values), 0)]
        known = [self._index[each] for each in values if each in self._index][: self.width]
        return known + [0] * (self.width - len(known))


class Vocabulary(pydantic.BaseModel, frozen=True):
    """Every mapping that training and serving must share.

    Attributes:
        items: ids of the catalogue; `items[i]` has item index i + 1.
        user_fields: profile attributes a backbone reads.
        item_fields: item attributes a backbone reads (the builder bakes them into the exported graph).
        feedback: buckets of the feedback of past behaviors.
    """

    items: tuple[str, ...]
    user_fields: tuple[Field, ...]
    item_fields: tuple[Field, ...]
    feedback: Field

    @functools.cached_property
    def _item_index(self) -> dict[str, int]:
        return {item: index for index, item in enumerate(self.items, start=1)}

    def item_indices(self, item_ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """int32[N]: item indices, 0 for ids outside the catalogue."""
        found = map(self._item_index.get, item_ids, itertools.repeat(0))
        return np.fromiter(found, dtype=np.int32, count=len(item_ids))

    def profile_indices(self, profile: Attributes) -> list[int]:
        """One index per user field."""
        return [field.indices(profile.get(field.name))[0] for field in self.user_fields]

    def profile_table(self, profiles: Sequence[Attributes]) -> npt.NDArray[np.int32]:
        """int32[U, P]: `profile_indices` of many users, each distinct value looked up once."""
        columns = []
        for field in self.user_fields:
            known: dict[tuple[type, object], int] = {}
            column = []
            for profile in profiles:
                value = profile.get(field.name)
                # 1, 1.0 and True are equal and not the same category.
                key = (value.__class__, value)
                if key not in known:
                    known[key] = field.indices(value)[0]
                column.append(known[key])
            columns.append(column)
        return np.array(columns, dtype=np.int32).reshape(len(columns), len(profiles)).T

    def feedback_indices(self, feedback: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
        """int32[N]: feedback buckets, from 1."""
        values = np.asarray(feedback, dtype=np.float64)
        if len(self.feedback.boundaries) > _FEW:
            return (1 + np.searchsorted(self.feedback.boundaries, values, side="right")).astype(np.int32)
        indices = np.ones(len(values), dtype=np.int32)
        for boundary in self.feedback.boundaries:
            indices += values >= boundary
        return indices

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Reads `vocabulary.json` of a bundle.

        Raises:
            ConfigurationError: missing or not a vocabulary.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, pydantic.ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(f"vocabulary {path} cannot be read ({reason}); build the bundle again") from None
