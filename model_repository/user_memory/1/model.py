"""user_memory: raw ids of a folded request -> what the fuser and the backbone read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liber_runtime.served.backend import Counters, answer, version_directory
from liber_runtime.served.user_memory import COUNTERS, UserMemoryModel


class TritonPythonModel:
    """Triton's contract; all the work is in `UserMemoryModel`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle's part of this model version."""
        self._counters = Counters(COUNTERS)
        self._model = UserMemoryModel.load(version_directory(args), self._counters.add)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers the requests that Triton merged."""
        return answer(requests, self._model)

    def finalize(self) -> None:
        """Closes the store, and hands on what was counted."""
        self._model.close()
        self._counters.close()
