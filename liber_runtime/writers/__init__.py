"""Writers: what turns a prompt into text, LLM(.) in Eq. 2 and 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from liber_runtime.interest import Prompt


@dataclass(frozen=True, slots=True)
class Completion:
    """A writer's answer.

    Attributes:
        text: what it wrote; never empty.
        prompt_tokens: tokens it read, None where none are counted.
        response_tokens: tokens it wrote, None where none are counted.
    """

    text: str
    prompt_tokens: int | None = None
    response_tokens: int | None = None


class Writer(Protocol):
    """One protocol for an LLM anywhere and for the statistical writer."""

    @property
    def name(self) -> str:
        """What is recorded as the author of a text, e.g. ``statistical``."""
        ...

    async def write(self, prompt: Prompt) -> Completion:
        """Answers one prompt; many calls may be in flight.

        Raises:
            LiberError: no usable answer; the worker decides whether to try again.
        """
        ...
