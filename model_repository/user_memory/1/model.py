"""user_memory: raw ids of a folded request -> what the fuser and the backbone read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liber_runtime.served.backend import Counter, answer, version_directory
from liber_runtime.served.user_memory import UserMemoryModel


class TritonPythonModel:
    """Triton's contract; all the work is in `UserMemoryModel`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle's part of this model version."""
        count = Counter("liber_histories_truncated_total", "Users read of whom more is held than is looked back.")
        self._model = UserMemoryModel.load(version_directory(args), count)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers the requests that Triton merged."""
        return answer(requests, self._model)

    def finalize(self) -> None:
        """Closes the store."""
        self._model.close()
