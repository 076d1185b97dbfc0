"""The anchor beside the networks: gradient-boosted trees on point-in-time features of the same replay.

    python -m bench.trees --data D

No network is worth serving that a few counts and means in a boosted forest beat. The trees are not tuned: 200 rounds, a
learning rate of .05, 15 leaves. How sharply neighbours are weighed was chosen on MovieLens-100K's validation part.

What a feature of a sample knows:

- of the sample's user: the behaviors before the sample, and the profile;
- of all users: the behaviors before the sample, in counts and means of items;
- which items are rated alike: the behaviors before the part that figures are reported on, without the sample's own
  user. With them a similarity would hold the very feedback that is to be foretold, and hold it in training only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss, roc_auc_score
from threadpoolctl import threadpool_limits

from bench.environment import describe_machine, describe_versions, run_command, show_figures
from builders.datasets import Dataset, load
from builders.replay import Samples, Split, replay, split
from builders.vocabulary import fit
from liber_runtime.behavior import Attributes
from liber_runtime.partition import Count
from liber_runtime.vocabulary import Field

ITERATIONS = 200
LEARNING_RATE = 0.05
LEAVES = 15

RECENT = 20
"""Newest behaviors whose mean is a feature."""

ALIKE = 100
"""Newest behaviors that are weighed by the likeness of their attributes to the candidate's."""

MOST_HISTORY = 1000
"""Newest behaviors that are compared with a candidate."""

MOST_ITEMS = 4096
"""Items that have neighbours, those with the most behaviors: two dense matrices of 67 MB at most."""

MOST_CATEGORIES = 128
"""Categories of items that tastes are told by, the most common ones."""

_PRIOR = 5.0
"""Behaviors that a mean is shrunk by."""

_SUPPORT = 5.0
"""Users that a similarity is shrunk by."""

_BLOCK = 256

_Float32 = npt.NDArray[np.float32]
_Float64 = npt.NDArray[np.float64]
_Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeatureTable:
    """What the trees read.

    Attributes:
        names: of the M columns.
        values: float32[S, M], a row per sample; NaN where nothing is known.
    """

    names: tuple[str, ...]
    values: _Float32


@dataclass(frozen=True)
class TreesResult:
    """AUC and log loss (natural logarithm) on the samples they were measured on, and the seconds of the fit."""

    auc: float
    logloss: float
    seconds: float


def validate_trees(dataset: Dataset, samples: Samples, parts: Split, seed: int = 1) -> TreesResult:
    """Fitted on the train part, measured on the validation part: where the networks are chosen by.

    Args:
        dataset: whose log was replayed.
        samples: of the replay.
        parts: of the samples.
        seed: of the boosting. It chooses what bins are made from above 200,000 samples, and nothing below.
    """
    table = make_features(dataset, samples, int(samples.behavior[parts.validation[0]]))
    return fit_and_measure(table, samples.label, parts.train, parts.validation, seed)


def measure_trees(dataset: Dataset, samples: Samples, parts: Split, seed: int = 1) -> TreesResult:
    """Fitted on the whole training part, measured on the test part; arguments as in `validate_trees`."""
    table = make_features(dataset, samples, int(samples.behavior[parts.test[0]]))
    return fit_and_measure(table, samples.label, parts.training_part, parts.test, seed)


def fit_and_measure(table: FeatureTable, label: _Float32, fitted: _Int64, measured: _Int64, seed: int) -> TreesResult:
    """Fits on the samples `fitted` int64[n] and measures on `measured` int64[m]; `label` float32[S]."""
    started = time.perf_counter()
    trees = HistGradientBoostingClassifier(
        learning_rate=LEARNING_RATE,
        max_iter=ITERATIONS,
        max_leaf_nodes=LEAVES,
        early_stopping=False,
        random_state=seed,
    )
    # One thread, as the networks have: on a busy machine several wait for each other at every split.
    with threadpool_limits(1):
        trees.fit(table.values[fitted], label[fitted])
        probability = trees.predict_proba(table.values[measured])[:, 1]
    seconds = time.perf_counter() - started
    target = label[measured]
    return TreesResult(
        float(roc_auc_score(target, probability)), float(log_loss(target, probability, labels=[0, 1])), seconds
    )


def make_features(dataset: Dataset, samples: Samples, known: int) -> FeatureTable:
    """The features of all samples.

    Args:
        dataset: whose log was replayed.
        samples: of the replay.
        known: rows of the log, from its beginning, that say which items are rated alike and which categories there
            are: all before the part that is measured on.
    """
    vocabulary = fit(dataset, dataset.behaviors[:known]).vocabulary
    attributes = [item.attributes if (item := dataset.items.get(each)) else {} for each in samples.item_ids]
    profiles = [dataset.profiles.get(each, {}) for each in samples.user_ids]
    members = _categories(vocabulary.item_fields, attributes)
    log = _Log.of(dataset, samples)
    columns: dict[str, npt.NDArray[Any]] = dict(_levels(samples, log))
    columns |= _tastes(samples, log, members)
    columns |= _neighbours(samples, log, members, known)
    for field in vocabulary.user_fields:
        columns[f"user: {field.name}"] = _column(field, profiles)[samples.user]
    for field in vocabulary.item_fields:
        if field.kind == "number":
            columns[f"item: {field.name}"] = _column(field, attributes)[samples.item]
    return FeatureTable(tuple(columns), np.stack([each.astype(np.float32) for each in columns.values()], axis=1))


@dataclass(frozen=True)
class _Log:
    """The users' sequences, N behaviors, with what was known just before each.

    Attributes:
        user: int64[N].
        item: int64[N].
        feedback: float64[N], from 0 to 1 over the domain's range.
        item_mean: float64[N], of the item before this behavior, shrunk to the mean of the log before it.
        item_count: float64[N], behaviors with the item before this one.
        residual: float64[N], feedback above `item_mean`.
        own: int64[S], each sample's own place in the sequences.
        begin: int64[S], where its user's behaviors begin.
    """

    user: _Int64
    item: _Int64
    feedback: _Float64
    item_mean: _Float64
    item_count: _Float64
    residual: _Float64
    own: _Int64
    begin: _Int64

    @classmethod
    def of(cls, dataset: Dataset, samples: Samples) -> _Log:
        low, high = dataset.domain.feedback_range
        feedback = (samples.sequence_feedback - low) / ((high - low) or 1.0)
        item, row = samples.sequence_item.astype(np.int64), samples.sequence_behavior
        by_row = np.argsort(row)
        total = np.empty(len(row))
        total[by_row] = (0.5 + _before(feedback[by_row])) / (1 + np.arange(len(row)))
        by_item = np.lexsort((row, item))
        first = _firsts(item[by_item])
        count, above = np.empty(len(row)), np.empty(len(row))
        count[by_item] = np.arange(len(row)) - first
        summed = _before(feedback[by_item])
        above[by_item] = summed - summed[first]
        item_mean = (above + _PRIOR * total) / (count + _PRIOR)
        begin = samples.offsets[samples.user]
        return cls(
            user=np.repeat(np.arange(len(samples.user_ids)), np.diff(samples.offsets)),
            item=item,
            feedback=feedback,
            item_mean=item_mean,
            item_count=count,
            residual=feedback - item_mean,
            own=begin + samples.position,
            begin=begin,
        )


def _levels(samples: Samples, log: _Log) -> Iterator[tuple[str, _Float64]]:
    """How the user rates and how the item is rated, so far."""
    feedback, residual = _running(log.feedback), _running(log.residual)
    count = samples.position.astype(np.float64)
    recent = np.maximum(log.own - RECENT, log.begin)
    with np.errstate(invalid="ignore", divide="ignore"):
        yield "user mean", (feedback[log.own] - feedback[log.begin]) / count
        yield "user mean, recent", (feedback[log.own] - feedback[recent]) / (log.own - recent)
    yield "user residual", (residual[log.own] - residual[log.begin]) / (count + _PRIOR)
    yield "user count", count
    yield "item mean", log.item_mean[log.own]
    yield "item count", log.item_count[log.own]


def _tastes(samples: Samples, log: _Log, members: _Float32) -> dict[str, _Float64]:
    """By how much the user's feedback is above the items' in the candidate's categories, so far."""
    above, count = np.zeros(len(samples)), np.zeros(len(samples))
    for category in members.T:
        rows = np.flatnonzero(category[samples.item])
        inside = category[log.item].astype(np.float64)
        own, begin = log.own[rows], log.begin[rows]
        summed, counted = _running(inside * log.residual), _running(inside)
        above[rows] += summed[own] - summed[begin]
        count[rows] += counted[own] - counted[begin]
    return {"taste": above / (count + _PRIOR), "taste count": count} if members.shape[1] else {}


def _neighbours(samples: Samples, log: _Log, members: _Float32, known: int) -> dict[str, _Float64]:
    """The user's residuals so far, weighed by how alike the items are: in who rated them how, and in categories."""
    similar = _Similarities.of(samples, log, known)
    norm = np.linalg.norm(members, axis=1, keepdims=True)
    directions = members / np.where(norm > 0, norm, 1)
    names = ("neighbours", "weight of neighbours", "like attributes")
    columns = {name: np.full(len(samples), np.nan) for name in names}
    order = np.argsort(log.own, kind="stable")
    edges = np.searchsorted(log.own[order], samples.offsets)
    for user in range(len(samples.user_ids)):
        for start in range(int(edges[user]), int(edges[user + 1]), _BLOCK):
            rows = order[start : min(start + _BLOCK, int(edges[user + 1]))]
            own = log.own[rows]
            low = max(int(samples.offsets[user]), int(own[0]) - MOST_HISTORY)
            steps = np.arange(low, int(own[-1]))
            if not len(steps):
                continue
            age = own[:, None] - steps
            items, candidates = log.item[steps], log.item[own]
            # The user's own level, as far as it was known, is not what this is about.
            level = _means_before(log.residual[steps], own - low)
            residual = log.residual[steps] - level[:, None]
            weight = similar.compare(user, candidates, items) * ((age > 0) & (age <= MOST_HISTORY))
            total = weight.sum(axis=1)
            columns["neighbours"][rows] = (weight * residual).sum(axis=1) / (total + similar.prior)
            columns["weight of neighbours"][rows] = total
            likeness = (directions[candidates] @ directions[items].T) * ((age > 0) & (age <= ALIKE))
            columns["like attributes"][rows] = (likeness * residual).sum(axis=1) / (likeness.sum(axis=1) + 1)
    return columns


@dataclass(frozen=True)
class _Similarities:
    """Adjusted cosines between the items with the most behaviors (https://dl.acm.org/doi/10.1145/371920.372071).

    Attributes:
        place: int64[I], row of an item among the compared ones; their number if it is not one.
        products: float32[n+1, n+1], sums over users of the products of their residuals; row and column n are zero.
        both: float32[n+1, n+1], users with both items.
        residuals: users in rows, float32[users, n+1], sparse: what a user added to all of these.
        variance: float64[users], of the residuals of all users but this one.
        prior: weight of no neighbours.
    """

    place: _Int64
    products: _Float32
    both: _Float32
    residuals: Any
    variance: _Float64
    prior: float = 0.1

    @classmethod
    def of(cls, samples: Samples, log: _Log, known: int) -> _Similarities:
        there = samples.sequence_behavior < known
        user, item, feedback = log.user[there], log.item[there], log.feedback[there]
        users, items = len(samples.user_ids), len(samples.item_ids)
        mean = np.bincount(user, feedback, users) / np.maximum(np.bincount(user, minlength=users), 1)
        often = np.argsort(-np.bincount(item, minlength=items), kind="stable")[:MOST_ITEMS]
        place = np.full(items, len(often), dtype=np.int64)
        place[often] = np.arange(len(often))
        kept = place[item] < len(often)
        residual = (feedback - mean[user])[kept].astype(np.float32)
        # The index of an entry, so that the last of a user's behaviors with an item is the one that counts.
        pair = user[kept] * (len(often) + 1) + place[item][kept]
        _, last = np.unique(pair[::-1], return_index=True)
        last = len(pair) - 1 - last
        where = np.divmod(pair[last], len(often) + 1)
        squares = np.bincount(user[kept], residual.astype(np.float64) ** 2, users)
        others = len(residual) - np.bincount(user[kept], minlength=users)
        shape = (users, len(often) + 1)
        residuals = coo_array((residual[last], where), shape=shape).tocsr()
        rated = coo_array((np.ones(len(last), dtype=np.float32), where), shape=shape).tocsr()
        return cls(
            place=place,
            products=(residuals.T @ residuals).toarray(),
            both=(rated.T @ rated).toarray(),
            residuals=residuals,
            variance=(squares.sum() - squares) / np.maximum(others, 1) + 1e-6,
        )

    def compare(self, user: int, candidates: _Int64, items: _Int64) -> _Float32:
        """float32[n, m], from 0 to 1: how alike candidates and items are rated by all users but `user`.

        The shrunk cosine squared: the nearest few say more than the many.
        """
        rows, columns = self.place[candidates], self.place[items]
        begin, end = self.residuals.indptr[user], self.residuals.indptr[user + 1]
        own = np.zeros(self.residuals.shape[1], dtype=np.float32)
        rated = np.zeros_like(own)
        own[self.residuals.indices[begin:end]] = self.residuals.data[begin:end]
        rated[self.residuals.indices[begin:end]] = 1
        products = self.products[np.ix_(rows, columns)] - np.outer(own[rows], own[columns])
        both = self.both[np.ix_(rows, columns)] - np.outer(rated[rows], rated[columns])
        # The variance keeps what rounding leaves of an item that only this user has rated from becoming a cosine.
        squares = np.maximum(self.products.diagonal() - own**2, 0) + self.variance[user]
        cosine = products / np.sqrt(np.outer(squares[rows], squares[columns]))
        alike: _Float32 = (np.maximum(cosine, 0) * (both / (both + _SUPPORT))) ** 2
        return alike


def _categories(fields: tuple[Field, ...], attributes: list[Attributes]) -> _Float32:
    """float32[I, G]: which categories each item has, the most common ones."""
    blocks = [np.zeros((len(attributes), 0), dtype=np.float32)]
    for field in fields:
        if field.kind == "number":
            continue
        block = np.zeros((len(attributes), field.size), dtype=np.float32)
        for row, each in enumerate(attributes):
            block[row, field.indices(each.get(field.name))] = 1
        blocks.append(block[:, 1:])
    members = np.concatenate(blocks, axis=1)
    return members[:, np.sort(np.argsort(-members.sum(axis=0), kind="stable")[:MOST_CATEGORIES])]


def _column(field: Field, rows: list[Attributes]) -> _Float64:
    """An attribute as a number: itself, or the index of its category; NaN if missing or unknown."""
    column = np.full(len(rows), np.nan)
    for row, each in enumerate(rows):
        (index, *_) = field.indices(each.get(field.name))
        if index:
            column[row] = float(each[field.name]) if field.kind == "number" else index  # type: ignore[arg-type]
    return np.where(np.isfinite(column), column, np.nan)


def _running(values: _Float64) -> _Float64:
    """float64[N + 1]: sums of the first 0, 1, ..., N values."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _before(values: _Float64) -> _Float64:
    """float64[N]: sums of the values before each."""
    return _running(values)[:-1]


def _firsts(groups: _Int64) -> _Int64:
    """int64[N]: where the group of each begins; equal ones lie together."""
    begins = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    return np.repeat(begins, np.diff(begins, append=len(groups)))


def _means_before(values: _Float64, ends: _Int64) -> _Float64:
    """The shrunk means of the first `ends` int64[n] values."""
    return _running(values)[ends] / (ends + _PRIOR)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.trees", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="as for `liber build`; the generated sample if not given")
    parser.add_argument("--partition", type=int, default=20, help="earlier behaviors that a sample needs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    dataset = load(arguments.data)
    samples = replay(dataset, Count(arguments.partition), arguments.partition)
    parts = split(samples)
    figures = {
        "data": dataset.domain.name,
        "samples": {name: len(getattr(parts, name)) for name in ("train", "validation", "test")},
        "validation": vars(validate_trees(dataset, samples, parts, arguments.seed)),
        "test": vars(measure_trees(dataset, samples, parts, arguments.seed)),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": arguments.seed,
    }
    show_figures(figures, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
