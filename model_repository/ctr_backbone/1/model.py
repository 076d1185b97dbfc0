"""ctr_backbone: x, h and the interest -> click probability (Eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liber_runtime.served.backend import answer, version_directory
from liber_runtime.served.folding import BackboneModel


class TritonPythonModel:
    """Triton's contract; all the work is in `BackboneModel`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle's part of this model version."""
        self._model = BackboneModel.load(version_directory(args))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers the requests that Triton merged."""
        return answer(requests, self._model)
