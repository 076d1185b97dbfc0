"""What is trained on: point-in-time samples as columns, what must hold of them, and batches of them as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from builders.models.backbone import Ranker
from builders.models.features import Inputs
from liber_runtime.exceptions import InvalidInputError

Index: TypeAlias = npt.NDArray[np.int64]
Batch: TypeAlias = tuple[Inputs, Tensor | None, Tensor | None]
"""The arguments of a `Ranker`: one user per candidate; no representations and no mask without a fuser."""

_COLUMNS = {
    "item": (np.int32, 1),
    "label": (np.float32, 1),
    "history_item": (np.int32, 2),
    "history_feedback": (np.int32, 2),
    "history_length": (np.int32, 1),
    "profile": (np.int32, 2),
    "numbers": (np.float32, 2),
    "partition_start": (np.int64, 1),
    "partition_count": (np.int32, 1),
    "representations": (np.float32, 2),
}


@dataclass(frozen=True)
class TrainingData:
    """Samples as columns, S of them, each as the world was just before it.

    Attributes:
        item: int32[S], the candidate's index.
        label: float32[S], 1.0 for a click.
        history_item: int32[S, T], item indices of the user's latest behaviors, oldest first, post-padded with 0.
        history_feedback: int32[S, T], their feedback buckets, post-padded with 0.
        history_length: int32[S].
        profile: int32[S, P].
        numbers: float32[S, M], what `Numbers` gives for each sample, from tables its own user had no part in.
        partition_start: int64[S], row of the user's first partition in `representations`.
        partition_count: int32[S], the user's partitions completed before the sample.
        representations: float32[R, d], the partitions' representations, each user's in a row, oldest first.

    Raises:
        InvalidInputError: a column of another type, shape or length, or a partition that is not there.
    """

    item: npt.NDArray[np.int32]
    label: npt.NDArray[np.float32]
    history_item: npt.NDArray[np.int32]
    history_feedback: npt.NDArray[np.int32]
    history_length: npt.NDArray[np.int32]
    profile: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.float32]
    partition_start: npt.NDArray[np.int64]
    partition_count: npt.NDArray[np.int32]
    representations: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, (dtype, dimensions) in _COLUMNS.items():
            column = getattr(self, name)
            if column.dtype != dtype or column.ndim != dimensions:
                raise InvalidInputError(
                    f"column {name} is {column.dtype} of {column.ndim} dimensions; "
                    f"give {np.dtype(dtype)} of {dimensions}"
                )
        rows = {name: len(getattr(self, name)) for name in _COLUMNS if name != "representations"}
        if len(set(rows.values())) != 1:
            raise InvalidInputError(f"columns of the samples differ in length: {rows}; give each one row per sample")
        if self.history_item.shape != self.history_feedback.shape:
            raise InvalidInputError(
                f"history_item has {self.history_item.shape[1]} steps and history_feedback "
                f"{self.history_feedback.shape[1]}; give both the same"
            )
        if len(self.item) and int((self.partition_start + self.partition_count).max()) > len(self.representations):
            raise InvalidInputError(
                f"a sample reads partition {int((self.partition_start + self.partition_count).max())} of "
                f"{len(self.representations)}; encode every partition before training"
            )


def check(model: Ranker, data: TrainingData) -> None:
    """Looks at everything that would otherwise fail, or teach nonsense, in the middle of a training.

    Raises:
        InvalidInputError: names the column, the row and the fix: NaN or infinity, an index outside the model's tables,
            a label that is neither 0 nor 1, or sizes that are not the model's.
    """
    features = model.features
    steps, numbers = features.schema.history_length, len(features.schema.numbers)
    _check_width("history_item", data.history_item, steps, "the model's history_length")
    _check_width("profile", data.profile, len(features.profile_sizes), "the model's profile fields")
    _check_width("numbers", data.numbers, numbers, f"one each for {', '.join(features.schema.numbers) or 'none'}")
    _check_finite("numbers", data.numbers, "recompute the statistics they come from")
    if model.fuser is not None:
        _check_width("representations", data.representations, model.fuser.size, "the fuser's size")
        _check_finite("representations", data.representations, "encode these partitions anew")
    _check_range("item", data.item, features.num_items, "use the vocabulary that the model was made from")
    _check_range("history_item", data.history_item, features.num_items, "use the vocabulary the model was made from")
    _check_range("history_feedback", data.history_feedback, features.feedback_size, "use the model's feedback buckets")
    _check_range("history_length", data.history_length, steps + 1, "cut the histories to the model's history_length")
    _check_range("partition_count", data.partition_count, None, "count the partitions before the sample")
    _check_range("partition_start", data.partition_start, None, "point at the user's first partition")
    for column, size in enumerate(features.profile_sizes):
        _check_range(f"profile[:, {column}]", data.profile[:, column], size, "use the model's vocabulary")
    wrong = np.flatnonzero((data.label != 0) & (data.label != 1))
    if len(wrong):
        raise InvalidInputError(
            f"column label is {data.label[wrong[0]]} in row {wrong[0]}; labels are 1.0 for a click and 0.0 for none"
        )


def gather_partitions(
    data: TrainingData, index: Index, max_partitions: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Representations of the samples' newest partitions, post-padded with zeros.

    Args:
        data: the samples.
        index: int64[n], which of them.
        max_partitions: older ones are left out.

    Returns:
        float32[n, J, d] and the mask bool[n, J]; J is the most partitions any of these samples has.
    """
    _, representations, mask = BatchMaker(data, torch.device("cpu"), max_partitions).make(torch.from_numpy(index))
    assert representations is not None
    assert mask is not None
    return representations.numpy(), mask.numpy()


class BatchMaker:
    """Samples as tensors, converted once, from which batches are gathered on the CPU and moved to the device.

    Args:
        data: the samples.
        device: where the model is.
        max_partitions: newest representations of a user that are given; None for a model without a fuser.
    """

    def __init__(self, data: TrainingData, device: torch.device, max_partitions: int | None) -> None:
        self.label = _tensor(data.label)
        self._device = device
        self._item = _tensor(data.item)
        self._history_item = _tensor(data.history_item)
        self._history_feedback = _tensor(data.history_feedback)
        self._history_length = _tensor(data.history_length)
        self._profile = _tensor(data.profile)
        self._numbers = _tensor(data.numbers)
        self._max_partitions = max_partitions
        if max_partitions is not None:
            size = data.representations.shape[1]
            self._count = _tensor(data.partition_count.astype(np.int64)).clamp(max=max_partitions)
            self._end = _tensor(data.partition_start + data.partition_count)
            # Masked steps read the row behind the last: zeros, without a multiplication per batch.
            self._representations = torch.cat((_tensor(data.representations), torch.zeros(1, size)))

    def make(self, rows: Tensor) -> Batch:
        """The arguments of the model for the samples `rows` int64[n]."""
        inputs = Inputs(
            item_index=self._take(self._item, rows),
            user_index=None,
            history_item=self._take(self._history_item, rows),
            history_feedback=self._take(self._history_feedback, rows),
            history_length=self._take(self._history_length, rows),
            profile=self._take(self._profile, rows),
            numbers=self._take(self._numbers, rows),
        )
        if self._max_partitions is None:
            return inputs, None, None
        count = self._count.index_select(0, rows)
        steps = torch.arange(int(count.max()) if len(count) else 0)
        mask = steps < count[:, None]
        places = (self._end.index_select(0, rows) - count)[:, None] + steps
        places = places.masked_fill_(~mask, len(self._representations) - 1)
        flat = self._representations.index_select(0, places.flatten())
        representations = flat.view(*mask.shape, flat.shape[1])
        return inputs, representations.to(self._device, non_blocking=True), mask.to(self._device, non_blocking=True)

    def labels(self, rows: Tensor) -> Tensor:
        """float32[n] of the samples `rows` int64[n]."""
        return self._take(self.label, rows)

    def _take(self, column: Tensor, rows: Tensor) -> Tensor:
        return column.index_select(0, rows).to(self._device, non_blocking=True)


def _tensor(column: npt.NDArray[Any]) -> Tensor:
    """Shares memory with `column`, unless that is read-only or not contiguous."""
    return torch.from_numpy(np.require(column, requirements=["C", "W"]))


def _check_width(name: str, column: npt.NDArray[Any], width: int, what: str) -> None:
    if column.shape[1] != width:
        raise InvalidInputError(f"column {name} has {column.shape[1]} entries a row; {width} are needed: {what}")


def _check_finite(name: str, column: npt.NDArray[np.float32], fix: str) -> None:
    bad = np.argwhere(~np.isfinite(column))
    if len(bad):
        row, entry = bad[0].tolist()
        raise InvalidInputError(
            f"column {name} is {column[row, entry]} in row {row}, entry {entry} ({len(np.unique(bad[:, 0]))} rows are "
            f"not finite); {fix}"
        )


def _check_range(name: str, column: npt.NDArray[Any], size: int | None, fix: str) -> None:
    """Raises unless all entries are in [0, `size`), or not negative if that is None."""
    wrong = column < 0 if size is None else (column < 0) | (column >= size)
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0].tolist())
        allowed = "may not be negative" if size is None else f"must lie in 0 to {size - 1}"
        raise InvalidInputError(f"column {name} is {column[place]} in row {place[0]} and {allowed}; {fix}")
