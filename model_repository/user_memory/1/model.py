"""user_memory: raw ids of a folded request -> what the fuser and the backbone read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liber_runtime.steps.backend import answer, version_directory
from liber_runtime.steps.user_memory import UserMemoryStep


class TritonPythonModel:
    """Triton's contract; all the work is in `UserMemoryStep`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle's part of this model version."""
        self._step = UserMemoryStep.load(version_directory(args))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers the requests that Triton merged."""
        return answer(requests, self._step)

    def finalize(self) -> None:
        """Closes the store."""
        self._step.close()
