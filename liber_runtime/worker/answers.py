"""What goes to a writer, and whether what comes back from a writer or an encoder can be kept; pure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from liber_runtime.behavior import Domain, Item
from liber_runtime.exceptions import InvalidInputError, UnusableAnswerError
from liber_runtime.interest import PartitionPrompt, ShiftPrompt, SummaryPrompt
from liber_runtime.memory import Task

MAX_TEXT_CHARACTERS = 20_000
"""A longer answer is a writer that does not stop, not knowledge."""


def prompt_of(task: Task, domain: Domain, items: Mapping[str, Item]) -> PartitionPrompt:
    """prompt_s or prompt_c of a task (Eq. 2, 3); an unknown item is called by its id."""
    if task.step == "shift":
        return ShiftPrompt(domain, task.previous, task.summary)
    history = tuple(
        (items.get(behavior.item_id) or Item(behavior.item_id, behavior.item_id), behavior.feedback)
        for behavior in task.behaviors
    )
    return SummaryPrompt(domain, task.profile, history)


def checked_text(text: str, writer: str) -> str:
    """A writer's answer, if it can be kept.

    Raises:
        UnusableAnswerError: it is empty, too long, or not text.
    """
    text = text.strip()
    if not text:
        raise UnusableAnswerError(f"writer {writer!r} answered with nothing")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise UnusableAnswerError(
            f"writer {writer!r} answered with {len(text)} characters; bound its answers to {MAX_TEXT_CHARACTERS}"
        )
    if "\x00" in text or not _is_unicode(text):
        raise UnusableAnswerError(f"writer {writer!r} answered with characters that are not text: {text!r:.80}")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def checked_vectors(vectors: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """An encoder's answer, if it is float32[count, d] and finite.

    Raises:
        InvalidInputError: it is not.
    """
    checked = np.asarray(vectors, dtype=np.float32)
    if checked.ndim != 2 or checked.shape[0] != count or not checked.shape[1] or not np.isfinite(checked).all():
        raise InvalidInputError(
            f"the encoder answered {count} pairs of texts with shape {checked.shape} or values that are not finite; "
            f"float32[{count}, d] is needed"
        )
    return checked
