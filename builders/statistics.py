"""What behaviors say of items and of the users who rated them: the tables behind `builders.models.numbers`.

A sample must not see tables that its own feedback is in: a model would learn to read the label back out of them, and
fall in service. So users are dealt into folds, and the numbers of a training sample come from tables of the other
folds' users. Samples of the validation slice see the tables of everything before that slice, test samples and served
requests those of the whole training part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse import linalg

from builders.models.features import Inputs
from builders.models.numbers import ItemStatistics, Numbers
from builders.replay import Samples, Split
from builders.vocabulary import Fit

FOLDS = 8
"""Of users. More make the tables of the training samples more like those that are served, and take longer to fit."""

FACTORS = 8
"""D, factors of an item; chosen on MovieLens-100K's validation slice among 8, 16 and 32."""

SIMILARITY_RANK = 64
"""R, of the vectors that say how alike items are rated; chosen among 32, 64 and all on MovieLens-100K's validation."""

SIMILAR_ITEMS = 20_000
"""Items, the most rated ones, that have such vectors: the matrix of their similarities is in memory once."""

_SUPPORT = 5.0
_SWEEPS = 12
_PENALTY = 9.0
_PRIOR_BEHAVIORS = 5.0
_LEAST_SPREAD = 1e-3
_ROWS_AT_ONCE = 8192

_Index = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FittedNumbers:
    """The numbers of every sample, and the module that makes those of served requests.

    Attributes:
        served: from the tables of the whole training part, standardised.
        values: float32[S, M], of all samples, each from tables it may see, standardised alike.
    """

    served: Numbers
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Ratings:
    """Behaviors as columns: user and vocabulary index of the item int64[B], feedback float64[B], row in the log."""

    user: _Index
    item: _Index
    feedback: _Floats
    row: _Index


@dataclass(frozen=True)
class Table:
    """What some behaviors say of the items, and who may see it.

    Attributes:
        statistics: of these behaviors.
        rows: int64[n], the samples that see them.
    """

    statistics: ItemStatistics
    rows: _Index


def fit_tables(samples: Samples, split: Split, vocabulary: Fit, seed: int) -> tuple[Table, ...]:
    """The tables of all samples; the last, of the whole training part, is for the test samples and for service.

    Args:
        samples: of a replay.
        split: of the samples.
        vocabulary: fitted on the training part.
        seed: of the folds and of the factors' first values.
    """
    generator = np.random.default_rng(seed)
    users = len(samples.user_ids)
    fold = generator.permutation(users) % min(FOLDS, users)
    ratings = _Ratings(
        np.repeat(np.arange(users), np.diff(samples.offsets)),
        samples.in_vocabulary(vocabulary.vocabulary).sequence_item.astype(np.int64),
        samples.sequence_feedback,
        samples.sequence_behavior,
    )

    def fit(kept: npt.NDArray[np.bool_], rows: _Index) -> Table:
        return Table(
            fit_statistics(
                ratings.user[kept], ratings.item[kept], ratings.feedback[kept], vocabulary, samples, generator
            ),
            rows,
        )

    known = ratings.row < samples.behavior[split.validation[0]]
    trained = fold[samples.user[split.train]]
    tables = [fit(known & (fold[ratings.user] != each), split.train[trained == each]) for each in np.unique(trained)]
    tables.append(fit(known, split.validation))
    tables.append(fit(ratings.row < samples.behavior[split.test[0]], split.test))
    return tuple(tables)


def fit_numbers(
    tables: Sequence[Table],
    samples: Samples,
    split: Split,
    vocabulary: Fit,
    *,
    history_length: int,
    lookback: int,
    knowledge: npt.NDArray[np.float32] | None = None,
) -> FittedNumbers:
    """Computes the numbers of all samples and standardises them by those of the training samples.

    Args:
        tables: of `fit_tables`.
        samples: as there.
        split: as there.
        vocabulary: as there.
        history_length: T, of what is recent.
        lookback: newest behaviors that feedback to similar items is looked up in.
        knowledge: float32[I+1, d], see `Numbers`.
    """
    width = len(Numbers.STATISTICAL) + (len(Numbers.KNOWING) if knowledge is not None else 0)
    values = np.zeros((len(samples), width), dtype=np.float32)
    for table in tables:
        numbers = Numbers(table.statistics, history_length, knowledge)
        values[table.rows] = compute_numbers(numbers, samples, table.rows, vocabulary, lookback)
    train = values[split.train].astype(np.float64)
    mean, scale = train.mean(0).astype(np.float32), train.std(0).astype(np.float32)
    # What does not vary in training may in service (users with a short history): it must not be blown up.
    scale[scale < _LEAST_SPREAD] = 1.0
    served = Numbers(tables[-1].statistics, history_length, knowledge, mean, scale)
    return FittedNumbers(served, (values - mean) / scale)


def compute_numbers(
    numbers: Numbers, samples: Samples, rows: _Index, vocabulary: Fit, lookback: int
) -> npt.NDArray[np.float32]:
    """float32[n, M]: what `numbers` gives for the samples `rows` int64[n]; arguments as of `fit_numbers`."""
    indexed = samples.in_vocabulary(vocabulary.vocabulary)
    values = np.zeros((len(rows), len(numbers.names)), dtype=np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        history = indexed.history(some, lookback)
        with torch.inference_mode():
            values[start : start + len(some)] = numbers(
                Inputs(
                    item_index=torch.from_numpy(indexed.item[some]),
                    user_index=None,
                    history_item=torch.from_numpy(history.item),
                    history_feedback=torch.from_numpy(history.feedback),
                    history_length=torch.from_numpy(history.length),
                    profile=torch.zeros((len(some), 0), dtype=torch.int32),
                )
            ).numpy()
    return values


def fit_statistics(
    user: _Index,
    item: _Index,
    feedback: _Floats,
    vocabulary: Fit,
    samples: Samples,
    generator: np.random.Generator,
) -> ItemStatistics:
    """Levels, counts and factors of the items.

    The factors minimise the squared error of feedback above the levels of item and user, with an equal penalty on both
    sides, by alternating least squares (https://dl.acm.org/doi/10.1109/MC.2009.263), and are then rotated and scaled so
    that the users' have mean square 1 each.

    Args:
        user: int64[B], of behaviors.
        item: int64[B], vocabulary indices; those of items out of vocabulary (0) are left out.
        feedback: float64[B].
        vocabulary: whose items the tables list.
        samples: whose users `user` counts.
        generator: of the first values.
    """
    named = item > 0
    user, item, feedback = user[named], item[named], feedback[named]
    items = len(vocabulary.item_table)
    buckets = vocabulary.vocabulary.feedback_indices(feedback.tolist()).astype(np.int64)
    level = float(feedback.mean()) if len(feedback) else 0.0
    count = np.bincount(item, minlength=items).astype(np.float64)
    mean = np.bincount(item, feedback - level, minlength=items) / (count + _PRIOR_BEHAVIORS)
    above = feedback - level - mean[item]
    given = np.bincount(user, minlength=len(samples.user_ids))
    own = np.bincount(user, above, minlength=len(samples.user_ids)) / (given + _PRIOR_BEHAVIORS)
    rest = above - own[user]
    noise = max(float(np.mean(rest**2)) if len(rest) else 0.0, 1e-6)
    shape = (len(samples.user_ids), items)
    factors = _factorise(sparse.csr_matrix((rest / noise**0.5, (user, item)), shape=shape), generator) * noise**0.5
    size = vocabulary.vocabulary.feedback.size
    per_bucket = np.bincount(buckets, minlength=size)
    value = np.bincount(buckets, feedback - level, minlength=size) / np.maximum(per_bucket, 1) + level
    return ItemStatistics(
        level=level,
        feedback=value.astype(np.float32),
        mean=mean.astype(np.float32),
        count=count.astype(np.float32),
        vectors=factors.astype(np.float32),
        similarity=_similarity(user, item, rest, shape, count).astype(np.float32),
        attributes=_attributes(vocabulary),
        noise=noise,
        bias=max(float(np.var(own)), 1e-6),
    )


def _similarity(user: _Index, item: _Index, rest: _Floats, shape: tuple[int, int], count: _Floats) -> _Floats:
    """float64[I, R]: vectors of the items whose products are nearest to their shrunk adjusted cosines.

    The cosine of two items runs over the users who rated both, and is shrunk the more the fewer they are.

    Args:
        user: int64[B], of behaviors.
        item: int64[B].
        rest: float64[B], feedback above the levels of item and user.
        shape: users, items.
        count: float64[I], behaviors with each item.
    """
    rated = np.flatnonzero(count >= 2)
    rated = rated[np.argsort(-count[rated], kind="stable")[:SIMILAR_ITEMS]]
    vectors = np.zeros((shape[1], SIMILARITY_RANK))
    rank = min(SIMILARITY_RANK, len(rated) - 1)
    if rank < 1:
        return vectors
    above = sparse.csr_matrix((rest, (user, item)), shape=shape)[:, rated]
    there = sparse.csr_matrix((np.ones(len(rest)), (user, item)), shape=shape)[:, rated]
    raters = (there.T @ there).tocoo()
    products = np.asarray((above.T @ above).tocsr()[raters.row, raters.col]).ravel()
    squares = (above.multiply(above).T @ there).tocsr()
    norms = np.asarray(squares[raters.row, raters.col]).ravel() * np.asarray(squares[raters.col, raters.row]).ravel()
    cosine = products / np.sqrt(norms + 1e-9) * raters.data / (raters.data + _SUPPORT)
    cosine[raters.row == raters.col] = 0.0
    values, directions = linalg.eigsh(
        sparse.csr_matrix((cosine, (raters.row, raters.col)), shape=raters.shape),
        k=rank,
        which="LA",
        v0=np.ones(len(rated)),
    )
    vectors[rated, :rank] = directions * np.sqrt(np.maximum(values, 0))
    return vectors


def _factorise(ratings: sparse.csr_matrix, generator: np.random.Generator) -> _Floats:
    """float64[I, D]: item factors of a sparse matrix users x items whose entries have variance 1."""
    there = ratings.copy()
    there.data = np.ones_like(there.data)
    by_item, there_by_item = ratings.T.tocsr(), there.T.tocsr()
    factors = generator.normal(0, 0.1, (ratings.shape[1], FACTORS))
    users = np.zeros((ratings.shape[0], FACTORS))
    for _ in range(_SWEEPS):
        users = _solve(there, ratings, factors)
        factors = _solve(there_by_item, by_item, users)
    values, directions = np.linalg.eigh(users.T @ users / max(len(users), 1))
    rotated: _Floats = factors @ (directions * np.sqrt(np.maximum(values, 0)))
    return rotated


def _solve(there: sparse.csr_matrix, ratings: sparse.csr_matrix, factors: _Floats) -> _Floats:
    """One half of a sweep: the ridge regression of every row of `ratings` on the factors of its entries."""
    squares = (factors[:, :, None] * factors[:, None, :]).reshape(len(factors), -1)
    gram = (there @ squares).reshape(-1, FACTORS, FACTORS) + _PENALTY * np.eye(FACTORS)
    return np.asarray(np.linalg.solve(gram, (ratings @ factors)[:, :, None])[:, :, 0])


def _attributes(vocabulary: Fit) -> npt.NDArray[np.float32]:
    """float32[I+1, A]: which values of its attributes an item has, of length 1; zeros for an item without any."""
    blocks = [np.zeros((len(vocabulary.item_table), 1))]
    column = 1
    for field in vocabulary.vocabulary.item_fields:
        block = np.zeros((len(vocabulary.item_table), field.size))
        for _ in range(field.width):
            np.put_along_axis(block, vocabulary.item_table[:, column, None].astype(np.int64), 1.0, axis=1)
            column += 1
        blocks.append(block[:, 1:])
    table = np.concatenate(blocks, axis=1)
    scaled: npt.NDArray[np.float32] = (table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)).astype(
        np.float32
    )
    return scaled
