"""bert_tokenizer: summaries and shifts -> chunks of tokens, each owned by one pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liber_runtime.steps.backend import answer, version_directory
from liber_runtime.steps.encoding import TokenizerStep


class TritonPythonModel:
    """Triton's contract; all the work is in `TokenizerStep`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle's part of this model version."""
        self._step = TokenizerStep.load(version_directory(args))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers the requests that Triton merged."""
        return answer(requests, self._step)
