"""pca_projection: embedding -> representation r_j, with the fingerprint of what made it (Eq. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liber_runtime.served.backend import answer, version_directory
from liber_runtime.served.encoding import ProjectionModel


class TritonPythonModel:
    """Triton's contract; all the work is in `ProjectionModel`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle's part of this model version."""
        self._model = ProjectionModel.load(version_directory(args))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers the requests that Triton merged."""
        return answer(requests, self._model)
