"""``attention_fuser`` and ``ctr_backbone``: requests merged into one folded batch, one graph run, answers split.

Merging is exact: users and candidates are concatenated and every request's `user_index` is shifted by the number of
users before it, so the graph computes for each row what it would have computed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from liber_runtime.bundle import BACKBONE, FUSER
from liber_runtime.served.backend import Outcome, Tensors
from liber_runtime.served.session import OnnxSession
from liber_runtime.settings import load_settings


class AttentionFuserModel:
    """representations float32[1,U,J,d], partition_mask bool[1,U,J] -> interest float32[1,U,d] (Eq. 5, 6)."""

    inputs = ("representations", "partition_mask")

    def __init__(self, session: OnnxSession) -> None:
        self._session = session

    @classmethod
    def load(cls, directory: Path) -> AttentionFuserModel:
        """Reads the bundle's part in `directory`."""
        return cls(OnnxSession(directory / FUSER, load_settings().session_threads))

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """See `ServedModel.run`."""
        longest = max(tensors["partition_mask"].shape[2] for tensors in batch)
        merged = {name: np.concatenate([_pad(tensors[name][0], longest) for tensors in batch]) for name in self.inputs}
        interest = self._session.run(merged)["interest"]
        sizes = [tensors["partition_mask"].shape[1] for tensors in batch]
        return [{"interest": part[np.newaxis]} for part in _split(interest, sizes)]


class BackboneModel:
    """The backbone's folded tensors, each with a leading 1 -> click_probability float32[1,N] (Eq. 7)."""

    inputs = (
        "item_index",
        "user_index",
        "history_item",
        "history_feedback",
        "history_length",
        "profile",
        "interest",
    )

    def __init__(self, session: OnnxSession) -> None:
        self._session = session

    @classmethod
    def load(cls, directory: Path) -> BackboneModel:
        """Reads the bundle's part in `directory`."""
        return cls(OnnxSession(directory / BACKBONE, load_settings().session_threads))

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """See `ServedModel.run`."""
        users = [tensors["history_length"].shape[1] for tensors in batch]
        candidates = [tensors["item_index"].shape[1] for tensors in batch]
        merged = {name: np.concatenate([tensors[name][0] for tensors in batch]) for name in self.inputs}
        first_user = np.concatenate([[0], np.cumsum(users)[:-1]])
        merged["user_index"] = merged["user_index"] + np.repeat(first_user, candidates).astype(np.int32)
        probability = self._session.run(merged)["click_probability"]
        return [{"click_probability": part[np.newaxis]} for part in _split(probability, candidates)]


def _pad(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """Fills axis 1 (the partitions) with zeros up to `length`."""
    missing = length - array.shape[1]
    if not missing:
        return array
    return np.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))


def _split(array: npt.NDArray[Any], sizes: Sequence[int]) -> list[npt.NDArray[Any]]:
    return np.split(array, np.cumsum(sizes)[:-1])
