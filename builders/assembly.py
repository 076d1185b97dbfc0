"""Puts a ranker together: features, backbone and, with LIBER, a fuser and what r̂ meets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from builders.datasets import Dataset
from builders.hyperparameters import Hyperparameters
from builders.models import make_backbone
from builders.models.backbone import Ranker
from builders.models.features import FeatureEmbedding
from builders.models.fuser import AttentionFuser, Fuser, MeanFuser
from builders.models.kar import HybridExpertAdaptor
from builders.models.meeting import Meeting, ProductMeeting
from builders.replay import Samples, Split
from builders.statistics import FittedNumbers, Table, fit_numbers, fit_tables
from builders.vocabulary import Fit
from builders.vocabulary import fit as fit_vocabulary

Fusion: TypeAlias = Literal["none", "paper", "items", "matched", "mean", "kar"]
"""How a ranker takes knowledge: not at all; Eq. 5-7 as the paper has them, r̂ one more feature; the items' own knowledge
alone, which tells what of the history is like the candidate; both, and r̂ meets the candidate's; that with the mean in
place of attention; KAR's hybrid-expert adaptor."""

KNOWING: frozenset[Fusion] = frozenset({"items", "matched", "mean"})
"""Fusions whose features know the items' own texts, see `with_knowledge`."""

_FUSERS: Mapping[Fusion, type[Fuser]] = {
    "paper": AttentionFuser,
    "matched": AttentionFuser,
    "mean": MeanFuser,
    "kar": MeanFuser,
}
_MEETINGS: Mapping[Fusion, type[ProductMeeting] | type[HybridExpertAdaptor]] = {
    "matched": ProductMeeting,
    "mean": ProductMeeting,
    "kar": HybridExpertAdaptor,
}


@dataclass(frozen=True)
class FittedFeatures:
    """What the features of one data set are made from; fitted on the training part.

    Attributes:
        vocabulary: maps ids and attributes to indices.
        tables: behind the numbers.
        numbers: those of all samples, and the module that serves them.
        history_length: T, behaviors a backbone reads.
        lookback: behaviors the numbers look back, what is to be served with it.
    """

    vocabulary: Fit
    tables: tuple[Table, ...]
    numbers: FittedNumbers
    history_length: int
    lookback: int


def fit_features(
    dataset: Dataset, samples: Samples, split: Split, *, history_length: int, lookback: int, seed: int
) -> FittedFeatures:
    """Fits the vocabulary and the statistics on everything before the first test sample.

    Args:
        dataset: of the samples.
        samples: of its replay.
        split: of the samples.
        history_length: T.
        lookback: not less than T.
        seed: see `fit_tables`.
    """
    vocabulary = fit_vocabulary(dataset, dataset.behaviors[: samples.behavior[split.test[0]]])
    tables = fit_tables(samples, split, vocabulary, seed)
    numbers = fit_numbers(tables, samples, split, vocabulary, history_length=history_length, lookback=lookback)
    return FittedFeatures(vocabulary, tables, numbers, history_length, lookback)


def with_knowledge(
    fitted: FittedFeatures, samples: Samples, split: Split, item_knowledge: npt.NDArray[np.float32] | None
) -> FittedFeatures:
    """The features of a ranker in which r̂ meets the candidate; as they are if there is no `item_knowledge`.

    Args:
        fitted: of `fit_features`.
        samples: as there.
        split: as there.
        item_knowledge: float32[I+1, d].
    """
    if item_knowledge is None:
        return fitted
    numbers = fit_numbers(
        fitted.tables,
        samples,
        split,
        fitted.vocabulary,
        history_length=fitted.history_length,
        lookback=fitted.lookback,
        knowledge=item_knowledge,
    )
    return dataclasses.replace(fitted, numbers=numbers)


def make_ranker(
    backbone: str,
    fitted: FittedFeatures,
    hyperparameters: Hyperparameters,
    *,
    fusion: Fusion = "none",
    dimension: int = 0,
    item_knowledge: npt.NDArray[np.float32] | None = None,
    seed: int,
) -> Ranker:
    """A ranker with fresh weights.

    Args:
        backbone: see `make_backbone`.
        fitted: features of the data set.
        hyperparameters: of the model.
        fusion: see `Fusion`.
        dimension: d, where there is r̂.
        item_knowledge: float32[I+1, d], where r̂ meets the candidate.
        seed: of the weights.

    Raises:
        ConfigurationError: see `make_backbone`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        meeting: Meeting | None = None
        if fusion in _MEETINGS:
            meeting = _MEETINGS[fusion](dimension, hyperparameters.embedding_dim)
        features = FeatureEmbedding(
            fitted.vocabulary.vocabulary,
            fitted.vocabulary.item_table,
            fitted.numbers.served,
            history_length=fitted.history_length,
            lookback=fitted.lookback,
            embedding_dim=hyperparameters.embedding_dim,
            interest_size=dimension if fusion in _FUSERS else 0,
            meeting=meeting,
            item_knowledge=item_knowledge if meeting is not None else None,
            dropout=hyperparameters.dropout,
            id_dropout=hyperparameters.id_dropout,
        )
        fuser = _FUSERS[fusion](dimension) if fusion in _FUSERS else None
        return Ranker(features, make_backbone(backbone, features.schema, hyperparameters.options), fuser)
