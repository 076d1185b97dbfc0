"""Point-in-time samples: the one replay of a behavior log through `liber_runtime.partition`.

A sample is one behavior of a user who has at least `minimum` earlier ones. It sees those earlier behaviors and the
partitions that were complete before it arrived, and nothing else: exactly what the memory store would have answered
at that moment. Everything is columnar, so that a batch is a few numpy gathers.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from builders.datasets import Dataset
from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.partition import PartitionCondition, PreviousPartition, stream
from liber_runtime.vocabulary import Vocabulary

_Int32 = npt.NDArray[np.int32]
_Int64 = npt.NDArray[np.int64]
_Float32 = npt.NDArray[np.float32]
_Float64 = npt.NDArray[np.float64]


MINIMUM_OF_LABEL = 10
"""Samples of each label that every part of a split needs: with fewer, one sample moves the AUC by more than a tenth."""


@dataclass(frozen=True)
class Boundaries:
    """All partitions of all users, ordered by user, then number.

    Attributes:
        user: int32[P], index into `Samples.user_ids`.
        number: int32[P], from 1.
        start: int32[P], position of the first behavior in the user's sequence.
        end: int32[P], position after the last one.
        completed: int64[P], row in `Dataset.behaviors` of the behavior whose arrival completed the partition. Under
            a time condition that is the one after the partition's last.
        offsets: int64[users + 1]; the partitions of user u are rows ``offsets[u]`` to ``offsets[u + 1]``.
    """

    user: _Int32
    number: _Int32
    start: _Int32
    end: _Int32
    completed: _Int64
    offsets: _Int64

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class Samples:
    """Samples in global time order, and the users' sequences that they are cut from.

    Attributes:
        user_ids: users in order of first appearance in the log.
        item_ids: the catalogue's items, then items that only the log knows; `user` and `item` columns index these
            two from 0. ``vocabulary.item_indices(samples.item_ids)`` translates, or `in_vocabulary` at once.
        user: int32[S].
        item: int32[S], the candidate.
        label: float32[S], 1 if the feedback is above the domain's `positive_above`, else 0.
        timestamp: float64[S], seconds since 1970.
        behavior: int64[S], row in `Dataset.behaviors`, ascending.
        position: int32[S], number of the user's earlier behaviors.
        partitions: int32[S], number of the user's partitions complete before the sample: rows
            ``boundaries.offsets[user]`` onwards.
        sequence_item: int32[N], items of all behaviors, users one after the other, each in time order.
        sequence_feedback: float64[N], as exact as the store answers it, so that both fall into the same bucket.
        sequence_behavior: int64[N], rows in `Dataset.behaviors`.
        offsets: int64[users + 1]; the behaviors of user u are rows ``offsets[u]`` to ``offsets[u + 1]``. A sample's
            history is ``sequence_*[offsets[user] : offsets[user] + position]``.
        boundaries: all partitions.
    """

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    user: _Int32
    item: _Int32
    label: _Float32
    timestamp: _Float64
    behavior: _Int64
    position: _Int32
    partitions: _Int32
    sequence_item: _Int32
    sequence_feedback: _Float64
    sequence_behavior: _Int64
    offsets: _Int64
    boundaries: Boundaries

    def __len__(self) -> int:
        return len(self.user)

    def partitions_before(self, sample: int) -> npt.NDArray[np.bool_]:
        """bool[P]: which partitions of any user were complete when `sample` arrived.

        With the first test sample this names the training partitions: what a PCA may be fitted on.
        """
        before: npt.NDArray[np.bool_] = self.boundaries.completed < self.behavior[sample]
        return before

    def in_vocabulary(self, vocabulary: Vocabulary) -> IndexedSamples:
        """The samples' items, histories and feedback as `vocabulary` indices."""
        item_index = vocabulary.item_indices(self.item_ids)
        return IndexedSamples(
            item=item_index[self.item],
            sequence_item=item_index[self.sequence_item],
            sequence_feedback=vocabulary.feedback_indices(self.sequence_feedback.tolist()),
            end=self.offsets[self.user] + self.position,
            position=self.position,
        )


@dataclass(frozen=True)
class HistoryBatch:
    """Short-term histories h, oldest first, padded with 0 after the newest.

    Attributes:
        item: int32[B, T], item indices of a vocabulary.
        feedback: int32[B, T], feedback buckets of a vocabulary.
        length: int32[B], how many of the T are there.
    """

    item: _Int32
    feedback: _Int32
    length: _Int32


@dataclass(frozen=True)
class IndexedSamples:
    """Samples in the indices of one vocabulary; made by `Samples.in_vocabulary`.

    Attributes:
        item: int32[S], the candidate.
        sequence_item: int32[N].
        sequence_feedback: int32[N], feedback buckets.
        end: int64[S], row of the sample's own behavior in the sequences; its history ends before.
        position: int32[S], number of the user's earlier behaviors.
    """

    item: _Int32
    sequence_item: _Int32
    sequence_feedback: _Int32
    end: _Int64
    position: _Int32

    def history(self, rows: npt.NDArray[np.int64], length: int) -> HistoryBatch:
        """The newest `length` behaviors before each of the samples `rows`.

        Args:
            rows: int64[B], sample indices.
            length: T, at least 1.
        """
        kept = np.minimum(self.position[rows], length)
        steps = np.arange(length)
        there = steps < kept[:, None]
        places = np.where(there, (self.end[rows] - kept)[:, None] + steps, 0)
        return HistoryBatch(
            item=np.where(there, self.sequence_item[places], 0).astype(np.int32),
            feedback=np.where(there, self.sequence_feedback[places], 0).astype(np.int32),
            length=kept.astype(np.int32),
        )


@dataclass(frozen=True)
class Split:
    """Sample indices by global time: int64 arrays, ascending, disjoint, together all samples.

    Attributes:
        train: to fit on.
        validation: the newest of the training part, to choose models by.
        test: the newest of all, to report on.
    """

    train: _Int64
    validation: _Int64
    test: _Int64

    @property
    def training_part(self) -> _Int64:
        """`train` and `validation`: everything before the test part."""
        return np.concatenate([self.train, self.validation])


def replay(dataset: Dataset, condition: PartitionCondition, minimum: int = 20) -> Samples:
    """Makes the samples of a data set.

    Args:
        dataset: its behaviors are replayed in their order.
        condition: when the cache is cut; as in the memory store. Users in `Dataset.cuts` are cut as that says, each
            partition complete with its last behavior.
        minimum: earlier behaviors that a sample needs.

    Raises:
        InvalidInputError: no user has more than `minimum` behaviors.
        ConfigurationError: the condition named a boundary outside the cache.
    """
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, behavior in enumerate(dataset.behaviors):
        rows_of[behavior.user_id].append(row)
    lengths = np.array([len(rows) for rows in rows_of.values()], dtype=np.int64)
    offsets = _offsets(lengths)
    order = np.fromiter((row for rows in rows_of.values() for row in rows), dtype=np.int64, count=int(offsets[-1]))
    position = np.arange(len(order)) - np.repeat(offsets[:-1], lengths)
    boundaries, complete = _partition(dataset, rows_of, condition, len(order))

    eligible = np.flatnonzero(position >= minimum)
    if not len(eligible):
        raise InvalidInputError(
            f"no user has more than {minimum} behaviors (the most is {lengths.max(initial=0)}), so there is no sample; "
            "bring a longer log"
        )
    eligible = eligible[np.argsort(order[eligible])]
    item_ids, item, feedback, timestamp = _columns(dataset)
    behavior_rows = order[eligible]
    return Samples(
        user_ids=tuple(rows_of),
        item_ids=item_ids,
        user=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[eligible],
        item=item[behavior_rows],
        label=(feedback[behavior_rows] > dataset.domain.positive_above).astype(np.float32),
        timestamp=timestamp[behavior_rows],
        behavior=behavior_rows,
        position=position[eligible].astype(np.int32),
        partitions=complete[eligible],
        sequence_item=item[order],
        sequence_feedback=feedback[order],
        sequence_behavior=order,
        offsets=offsets,
        boundaries=boundaries,
    )


def split(samples: Samples, test_fraction: float = 0.1, validation_fraction: float = 0.1) -> Split:
    """Cuts the samples by global time: the newest `test_fraction` is the test part.

    Args:
        samples: of `replay`.
        test_fraction: share of all samples.
        validation_fraction: share of the training part, taken from its end.

    Raises:
        InvalidInputError: a fraction is not in (0, 1), or a part would hold fewer than `MINIMUM_OF_LABEL` samples of a
            label.
    """
    count = len(samples)
    known = _floor_share(count, "test_fraction", test_fraction)
    fitted = _floor_share(known, "validation_fraction", validation_fraction)
    rows = np.arange(count, dtype=np.int64)
    parts = Split(rows[:fitted], rows[fitted:known], rows[known:])
    for name in ("train", "validation", "test"):
        labels = samples.label[getattr(parts, name)]
        ones = int(np.count_nonzero(labels))
        if min(ones, len(labels) - ones) < MINIMUM_OF_LABEL:
            raise InvalidInputError(
                f"the {name} part of {count} samples has {ones} of label 1 and {len(labels) - ones} of label 0, and "
                f"needs {MINIMUM_OF_LABEL} of each; bring a longer log or set positive_above in the middle of the "
                "feedback"
            )
    return parts


def calls_per_user(samples: Samples) -> float:
    """LLM calls per user, as the paper's Table 6 counts them.

    One summary per partition complete before the user's last behavior, and one shift for each of them but the first;
    the mean over the users that have a sample.
    """
    # A user's samples are in time order, so the last one seen per user is that of the last behavior.
    last: dict[int, int] = dict(zip(samples.user.tolist(), samples.partitions.tolist(), strict=True))
    return sum(partitions + max(partitions - 1, 0) for partitions in last.values()) / len(last)


class _Recorder:
    """A condition that notes, for one user, which arrival made which cut.

    `stream` tells the runs, not the arrivals that completed them; under a time condition these differ.
    """

    def __init__(self, condition: PartitionCondition) -> None:
        self._condition = condition
        self._arrived = 0
        self.arrivals: list[int] = []

    def boundary(self, cache: Sequence[Behavior], previous: PreviousPartition) -> int:
        cut = self._condition.boundary(cache, previous)
        if cut:
            self.arrivals.append(self._arrived)
        self._arrived += 1
        return cut

    def __str__(self) -> str:
        return str(self._condition)


def _partition(
    dataset: Dataset, rows_of: Mapping[str, Sequence[int]], condition: PartitionCondition, total: int
) -> tuple[Boundaries, _Int32]:
    """All partitions, and int32[N]: how many of the user's were complete before each behavior of the sequences."""
    ends: list[int] = []
    completed: list[int] = []
    counts: list[int] = []
    complete = np.zeros(total, dtype=np.int32)
    begin = 0
    for user_id, rows in rows_of.items():
        sizes, arrivals = _cut(dataset, user_id, rows, condition)
        ends.extend(itertools.accumulate(sizes))
        completed.extend(rows[arrival] for arrival in arrivals)
        counts.append(len(sizes))
        complete[begin : begin + len(rows)] = np.searchsorted(arrivals, np.arange(len(rows)), side="left")
        begin += len(rows)
    offsets = _offsets(np.array(counts, dtype=np.int64))
    first = np.repeat(offsets[:-1], counts)
    number = np.arange(len(ends)) - first + 1
    end = np.array(ends, dtype=np.int32)
    start = np.where(number == 1, 0, np.concatenate([[0], end[:-1]]) if len(end) else end)
    boundaries = Boundaries(
        user=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        number=number.astype(np.int32),
        start=start.astype(np.int32),
        end=end,
        completed=np.array(completed, dtype=np.int64),
        offsets=offsets,
    )
    return boundaries, complete


def _cut(
    dataset: Dataset, user_id: str, rows: Sequence[int], condition: PartitionCondition
) -> tuple[Sequence[int], list[int]]:
    """The sizes of a user's partitions, and for each the place, in the user's sequence, of what completed it."""
    if user_id in dataset.cuts:
        sizes = dataset.cuts[user_id]
        return sizes, [end - 1 for end in itertools.accumulate(sizes)]
    recorder = _Recorder(condition)
    streamed = stream(recorder, (), (dataset.behaviors[row] for row in rows))
    return [len(run) for run in streamed.partitions], recorder.arrivals


def _columns(dataset: Dataset) -> tuple[tuple[str, ...], _Int32, _Float64, _Float64]:
    """Item ids, and per behavior: item index, feedback, timestamp."""
    number: dict[str, int] = {item_id: index for index, item_id in enumerate(dataset.items)}
    behaviors, count = dataset.behaviors, len(dataset.behaviors)
    item = np.fromiter((number.setdefault(each.item_id, len(number)) for each in behaviors), np.int32, count)
    feedback = np.fromiter((each.feedback for each in behaviors), np.float64, count)
    timestamp = np.fromiter((each.timestamp for each in behaviors), np.float64, count)
    return tuple(number), item, feedback, timestamp


def _offsets(lengths: _Int64) -> _Int64:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def _floor_share(count: int, name: str, fraction: float) -> int:
    """How many of `count` remain without `fraction`, rounded down; robust to .9 not being a binary fraction."""
    if not 0 < fraction < 1:
        raise InvalidInputError(f"{name} {fraction!r} must lie between 0 and 1, e.g. 0.1")
    return math.floor(count * (1 - fraction) + 1e-9 * count)
