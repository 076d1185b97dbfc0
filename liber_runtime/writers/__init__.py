"""Writers: what turns a prompt into text, LLM(.) in Eq. 2 and 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from liber_runtime.interest import Prompt


@dataclass(frozen=True, slots=True)
class Completion:
    """A writer's answer.

    Attributes:
        text: what it wrote; never empty.
        prompt_tokens: tokens it read, None where none are counted.
        response_tokens: tokens it wrote, None where none are counted.
        note: see `liber_runtime.behavior.Text.note`.
    """

    text: str
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    note: str = ""


class Writer(Protocol):
    """One protocol for an LLM anywhere and for the statistical writer."""

    @property
    def name(self) -> str:
        """What is recorded as the author of a text, e.g. ``statistical``."""
        ...

    async def write(self, prompt: Prompt) -> Completion:
        """Answers one prompt; many calls may be in flight, and any of them may be cancelled.

        Raises:
            WriterAwayError: certainly no call was made (the connection was refused, the name was not resolved): it
                costs the step no attempt, however often it happens. What breaks off after the prompt was sent is not
                that: the call may have been made, and paid for.
            PromptRefusedError: this prompt is refused each time; it is given up at once.
            UnusableAnswerError: what came back is no knowledge.
            LiberError: no usable answer; the worker decides whether to try again.
        """
        ...


@runtime_checkable
class Paced(Protocol):
    """A writer that cannot be called at any time. A worker claims no more steps than it can call for at once."""

    def free(self) -> tuple[int, float]:
        """How many calls would begin at once, and seconds until it is worth asking again if none would."""
        ...


@runtime_checkable
class Closing(Protocol):
    """A writer with connections, which belong to the event loop they were made in."""

    async def close(self) -> None:
        """Ends them; to be called before the loop ends. The next call, in any loop, makes new ones."""
        ...


async def close(writer: Writer) -> None:
    """Ends what a writer keeps open, if it keeps anything open."""
    if isinstance(writer, Closing):
        await writer.close()
