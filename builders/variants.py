"""The ablations of LIBER (paper, Figure 4 and Table 6) and KAR: what each has written, and what of it a sample sees.

A variant is a plan over `Samples`: which behaviors each of its texts is made of, and which of the texts every sample
sees. The prompts are those of the worker, and writer, encoder and PCA those of LIBER, so that variants differ in what
is written and in nothing else. No store is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from builders.datasets import Dataset
from builders.embedding import Pair
from builders.replay import Samples
from builders.texts import encode_pairs, write_prompts
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.interest import Prompt
from liber_runtime.memory import Step, Task
from liber_runtime.representation import Encoder
from liber_runtime.worker.answers import prompt_of
from liber_runtime.writers import Writer

Index = npt.NDArray[np.int64]

REFRESH = 20
"""Behaviors after which a variant of one text is written anew: as often as LIBER writes under ``count(20)``."""


@dataclass(frozen=True)
class Variant:
    """What is written about a user.

    Attributes:
        is_partitioned: a text for each partition, and a sample sees those of all its partitions; else one text, and a
            sample sees the newest.
        has_shift: each text but a user's first is followed by the shift from the text before (Eq. 3).
        window: newest behaviors that one text is made of; None for all so far.
        is_renewed: one text is written anew as behaviors come; else only once, before the user's first sample.
        is_averaged: the vectors are fused by `builders.models.fuser.MeanFuser`; else by the attention of Eq. 6.
    """

    is_partitioned: bool = False
    has_shift: bool = False
    window: int | None = None
    is_renewed: bool = True
    is_averaged: bool = False


VARIANTS: Mapping[str, Variant] = {
    "liber": Variant(is_partitioned=True, has_shift=True),
    "no_shift": Variant(is_partitioned=True),
    "no_partition": Variant(),
    "length20": Variant(window=20),
    "length100": Variant(window=100),
    "mean_fusion": Variant(is_partitioned=True, has_shift=True, is_averaged=True),
    "kar": Variant(is_renewed=False, is_averaged=True),
}
"""LIBER; Figure 4's "w/o shift", "w/o partition" and "w/o attention fusion"; Table 6's two lengths; and KAR
(https://arxiv.org/abs/2306.10933): one text per user, which meets an item's in `models/kar.py`."""


@dataclass(frozen=True)
class Plan:
    """The texts of a variant, ordered by user, then time, and what samples see of them.

    Attributes:
        user: int32[R], index into `Samples.user_ids`.
        first: int32[R], position in the user's sequence of the first behavior that the text is made of.
        end: int32[R], position after the last one.
        has_shift: whether each text but a user's first is followed by a shift.
        start: int64[S], row of the first text that the sample sees.
        count: int32[S], how many it sees, in a row; 0 if nothing was written before it.
    """

    user: npt.NDArray[np.int32]
    first: npt.NDArray[np.int32]
    end: npt.NDArray[np.int32]
    has_shift: bool
    start: Index
    count: npt.NDArray[np.int32]

    @property
    def shifted(self) -> npt.NDArray[np.bool_]:
        """bool[R]: which texts are followed by a shift from the text before."""
        shifted = np.zeros(len(self.user), dtype=bool)
        if self.has_shift:
            shifted[1:] = self.user[1:] == self.user[:-1]
        return shifted

    @property
    def calls(self) -> int:
        """Writer calls."""
        return len(self.user) + int(self.shifted.sum())


@dataclass(frozen=True)
class SampleVectors:
    """The vectors that samples see: three columns of `builders.train.TrainingData`.

    Attributes:
        representations: float32[R, d].
        start: int64[S], row of the first vector that the sample sees.
        count: int32[S], how many it sees, in a row, oldest first.
    """

    representations: npt.NDArray[np.float32]
    start: Index
    count: npt.NDArray[np.int32]


def find_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in VARIANTS:
        raise ConfigurationError(f"variant {name!r} is unknown; there are {', '.join(VARIANTS)}")
    return VARIANTS[name]


def plan(variant: Variant, samples: Samples, rows: Index | None = None, refresh: int = REFRESH) -> Plan:
    """What `variant` has written before the samples `rows`, and nothing that none of them sees.

    A text of behaviors up to `end` is there for samples with at least `end` earlier behaviors: no sample sees a text of
    its own behavior or of a later one.

    Args:
        variant: see `VARIANTS`.
        samples: of the whole log.
        rows: int64[S], sample indices; None for all.
        refresh: a text that is renewed is written before a user's first sample and after every so many behaviors from
            there. 1 is the paper's: a text for every sample.

    Raises:
        ConfigurationError: `refresh` is below 1.
    """
    if refresh < 1:
        raise ConfigurationError(f"refresh {refresh} is not a number of behaviors; give at least 1")
    rows = np.arange(len(samples), dtype=np.int64) if rows is None else rows
    if variant.is_partitioned:
        return _plan_partitions(variant, samples, rows)
    return _plan_texts(variant, samples, rows, refresh)


def calls_per_user(variant: Variant, samples: Samples, refresh: int = REFRESH) -> float:
    """Writer calls per user, as the paper's Table 6 counts them: what samples see, a mean over the users that have any.

    KAR's calls for items come on top, one for each.
    """
    return plan(variant, samples, refresh=refresh).calls / len(np.unique(samples.user))


def write_pairs(plan: Plan, dataset: Dataset, samples: Samples, writer: Writer, directory: Path) -> list[Pair]:
    """Has the texts of a plan written, by the worker's prompts; shifts after the summaries they compare.

    Args:
        plan: of `samples`.
        dataset: that `samples` were made of.
        samples: of the whole log.
        writer: that of LIBER.
        directory: keeps the answers, see `builders.texts.write_prompts`.

    Returns:
        R pairs of (summary, shift); the shift is empty where there is none.

    Raises:
        LiberError: the writer gave no usable answer.
    """
    rows = range(len(plan.user))
    summaries = write_prompts(
        "write summaries",
        (_prompt(dataset, _summary_task(plan, row, dataset, samples)) for row in rows),
        len(rows),
        writer,
        directory,
    )
    shifted: list[int] = np.flatnonzero(plan.shifted).tolist()
    if not shifted:
        return [(summary, "") for summary in summaries]
    shifts = write_prompts(
        "write shifts",
        (_prompt(dataset, _shift_task(plan, row, samples, summaries)) for row in shifted),
        len(shifted),
        writer,
        directory,
    )
    shift_of = dict(zip(shifted, shifts, strict=True))
    return [(summary, shift_of.get(row, "")) for row, summary in enumerate(summaries)]


def sample_vectors(
    variant: Variant,
    dataset: Dataset,
    samples: Samples,
    rows: Index,
    writer: Writer,
    encoder: Encoder,
    directory: Path,
    refresh: int = REFRESH,
) -> SampleVectors:
    """The vectors of `variant` that the samples `rows` int64[S] see; arguments as of `plan` and `write_pairs`.

    Args:
        variant: see `VARIANTS`.
        dataset: that `samples` were made of.
        samples: of the whole log.
        rows: int64[S], sample indices.
        writer: that of LIBER.
        encoder: encoder and PCA of LIBER, see `builders.embedding.open_encoder`.
        directory: keeps the writer's answers.
        refresh: see `plan`.

    Raises:
        ConfigurationError: `refresh` is below 1, or no sample sees any text.
        LiberError: writer or encoder gave no usable answer.
    """
    planned = plan(variant, samples, rows, refresh)
    if not len(planned.user):
        raise ConfigurationError(
            f"none of {len(rows)} samples sees a text; bring a longer log, smaller partitions or a lower refresh"
            f" ({refresh} behaviors)"
        )
    pairs = write_pairs(planned, dataset, samples, writer, directory)
    return SampleVectors(encode_pairs("encode texts", pairs, encoder), planned.start, planned.count)


def _prompt(dataset: Dataset, task: Task) -> Prompt:
    """What a worker would ask for this task."""
    return prompt_of(task, dataset.domain, dataset.items)


def _summary_task(plan: Plan, row: int, dataset: Dataset, samples: Samples) -> Task:
    user = plan.user[row]
    begin = samples.offsets[user]
    places = samples.sequence_behavior[begin + plan.first[row] : begin + plan.end[row]]
    return replace(
        _task(plan, row, samples, "summary"),
        profile=dataset.profiles.get(samples.user_ids[user], {}),
        behaviors=tuple(dataset.behaviors[place] for place in places.tolist()),
    )


def _shift_task(plan: Plan, row: int, samples: Samples, summaries: Sequence[str]) -> Task:
    return replace(_task(plan, row, samples, "shift"), previous=summaries[row - 1], summary=summaries[row])


def _task(plan: Plan, row: int, samples: Samples, step: Step) -> Task:
    user = plan.user[row]
    number = row - int(np.searchsorted(plan.user, user)) + 1
    return Task(samples.user_ids[user], number, step, claim="", attempts=1)


def _plan_partitions(variant: Variant, samples: Samples, rows: Index) -> Plan:
    boundaries = samples.boundaries
    seen = np.zeros(len(samples.user_ids), dtype=np.int64)
    np.maximum.at(seen, samples.user[rows], samples.partitions[rows])
    kept = boundaries.number <= seen[boundaries.user]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(seen)])
    return Plan(
        user=boundaries.user[kept],
        first=boundaries.start[kept],
        end=boundaries.end[kept],
        has_shift=variant.has_shift,
        start=offsets[samples.user[rows]],
        count=samples.partitions[rows],
    )


def _plan_texts(variant: Variant, samples: Samples, rows: Index, refresh: int) -> Plan:
    """One text at a time, of what came before the user's first sample, or before every `refresh`-th one from there."""
    begin = int(samples.position.min())
    since = (samples.position[rows] - begin).astype(np.int64)
    end_seen = begin + (since // refresh * refresh if variant.is_renewed else 0 * since)
    # Of no behaviors there is no text: that is for samples which need no earlier behaviors.
    there = end_seen > 0
    wide = int(end_seen.max(initial=0)) + 1
    users = samples.user[rows][there].astype(np.int64)
    texts, seen = np.unique(users * wide + end_seen[there], return_inverse=True)
    user, end = np.divmod(texts, wide)
    start = np.zeros(len(rows), dtype=np.int64)
    start[there] = seen
    return Plan(
        user=user.astype(np.int32),
        first=(np.maximum(end - variant.window, 0) if variant.window is not None else 0 * end).astype(np.int32),
        end=end.astype(np.int32),
        has_shift=variant.has_shift,
        start=start,
        count=there.astype(np.int32),
    )
