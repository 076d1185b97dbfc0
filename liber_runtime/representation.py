"""Knowledge encoder, online half: (summary, shift) -> r_j (paper, section 3.4.1, Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors and what made them.

    Attributes:
        vectors: float32[B, d], row i for the i-th pair of texts.
        fingerprint: identifies encoder, pooling and PCA; vectors of different fingerprints never mix.
    """

    vectors: npt.NDArray[np.float32]
    fingerprint: str


class Encoder(Protocol):
    """Turns the two texts of partitions into representations."""

    async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
        """Encodes pairs of (summary, shift); the shift of a first partition is empty.

        Raises:
            ScoringError: the encoding server refused or did not answer.
        """
        ...
