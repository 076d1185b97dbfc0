"""``attention_fuser`` and ``ctr_backbone``: requests merged into one folded batch, one graph run, answers split.

Merging is exact: users and candidates are concatenated and every request's `user_index` is shifted by the number of
users before it, so the graph computes for each row what it would have computed alone. Only a graph with int8 weights
has one scale for all rows of a run, and scores a row a little differently in other company.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from liber_runtime.bundle import BACKBONE, FUSER
from liber_runtime.native import load_kernels
from liber_runtime.served.backend import Outcome, Tensors
from liber_runtime.served.session import OnnxSession
from liber_runtime.settings import load_settings

USERS_TOGETHER = 64
"""Users whose partitions the fuser's graph pads to the same number. Fewer cost calls, more cost padding: measured."""


WARM_USERS, WARM_CANDIDATES = 64, 1024
"""Of the batch that a backbone scores before its first request."""


class AttentionFuserModel:
    """representations float32[1,R,d], partition_count int32[1,U] -> interest float32[1,U,d] (Eq. 5, 6).

    The graph pads the users it is given to the largest count among them. So users of like count are given to it
    together, and one with 40 partitions does not make a thousand others pay for 40.
    """

    inputs = ("representations", "partition_count")

    def __init__(self, session: OnnxSession) -> None:
        self._session = session

    @classmethod
    def load(cls, directory: Path) -> AttentionFuserModel:
        """Reads the bundle's part in `directory`; it runs as a kernel where there is one, see `Settings`."""
        settings = load_settings()
        threads = settings.session_threads
        model = cls(OnnxSession(directory / FUSER, threads, load_kernels(settings.kernels, threads)))
        model.warm_up()
        return model

    def warm_up(self) -> None:
        """Fuses a batch of nobody's vectors, so that the first request finds memory and threads at hand."""
        count = np.full((1, USERS_TOGETHER), 1, dtype=np.int32)
        size = self._session.shapes["representations"][1]
        vectors = np.zeros((1, USERS_TOGETHER, size), dtype=np.float32)
        self.run([{"representations": vectors, "partition_count": count}])

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """See `ServedModel.run`."""
        counts = [tensors["partition_count"][0] for tensors in batch]
        held = [tensors["representations"][0][: count.sum()] for tensors, count in zip(batch, counts, strict=True)]
        count = _joined(counts)
        # A row beyond the users' own: the graph wants one, also where nobody has any.
        representations = _joined(held) if count.any() else batch[0]["representations"][0][:1]
        interest = self._fuse(representations, count)
        return [{"interest": part[np.newaxis]} for part in _split(interest, [len(each) for each in counts])]

    def _fuse(self, representations: npt.NDArray[Any], count: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # A kernel pads nothing.
        if len(count) <= USERS_TOGETHER or self._session.kernels:
            return self._session.run({"representations": representations, "partition_count": count})["interest"]
        first = np.cumsum(count) - count
        order = np.argsort(count, kind="stable")
        interest = np.zeros((len(count), representations.shape[1]), dtype=np.float32)
        # Users without partitions come first and have their zeros already.
        for start in range(int(np.searchsorted(count[order], 1)), len(order), USERS_TOGETHER):
            users = order[start : start + USERS_TOGETHER]
            some = count[users]
            rows = np.repeat(first[users] - (np.cumsum(some) - some), some) + np.arange(some.sum())
            tensors = {"representations": representations[rows], "partition_count": some}
            interest[users] = self._session.run(tensors)["interest"]
        return interest


class BackboneModel:
    """The backbone's folded tensors, each with a leading 1 -> click_probability float32[1,N] (Eq. 7).

    The interest is one of them if the graph reads it.
    """

    def __init__(self, session: OnnxSession) -> None:
        self._session = session
        tensors = ("item_index", "user_index", "history_item", "history_feedback", "history_length", "profile")
        self.inputs = (*tensors, "interest") if "interest" in session.inputs else tensors

    @classmethod
    def load(cls, directory: Path) -> BackboneModel:
        """Reads the bundle's part in `directory`; heavy parts run as kernels where there are any, see `Settings`."""
        settings = load_settings()
        threads = settings.session_threads
        model = cls(OnnxSession(directory / BACKBONE, threads, load_kernels(settings.kernels, threads)))
        model.warm_up()
        return model

    def warm_up(self) -> None:
        """Scores a batch of nobody's candidates, so that the first request finds memory and threads at hand."""
        shapes = self._session.shapes
        rows = dict.fromkeys(self.inputs, WARM_USERS) | {"item_index": WARM_CANDIDATES, "user_index": WARM_CANDIDATES}
        sizes = {name: (1, rows[name], *shapes.get(name, (0,))[1:]) for name in self.inputs}
        batch = {
            name: np.zeros(size, dtype=np.float32 if name == "interest" else np.int32) for name, size in sizes.items()
        }
        batch["history_length"][:] = batch["history_item"].shape[2]
        self.run([batch])

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """See `ServedModel.run`."""
        users = [tensors["history_length"].shape[1] for tensors in batch]
        candidates = [tensors["item_index"].shape[1] for tensors in batch]
        merged = {name: _joined([tensors[name][0] for tensors in batch]) for name in self.inputs}
        if len(batch) > 1:
            first_user = np.cumsum(users) - users
            merged["user_index"] = merged["user_index"] + np.repeat(first_user, candidates).astype(np.int32)
        probability = self._session.run(merged)["click_probability"]
        return [{"click_probability": part[np.newaxis]} for part in _split(probability, candidates)]


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _split(array: npt.NDArray[Any], sizes: Sequence[int]) -> list[npt.NDArray[Any]]:
    return [array] if len(sizes) == 1 else np.split(array, np.cumsum(sizes)[:-1])
