"""What every engine checks before it keeps anything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from liber_runtime.behavior import Behavior, Text
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.memory import Failure, Representation, Result
from liber_runtime.partition import Count, PartitionCondition, parse_condition

MAX_AHEAD_SECONDS = 86_400.0
"""A timestamp further ahead of the clock than this is milliseconds or a broken clock: it would cut partitions wrongly
for as long as it lies ahead. A day leaves room for time zones and clocks that differ."""


def check_arrival(behaviors: Sequence[Behavior]) -> None:
    """Refuses what has not happened yet.

    Args:
        behaviors: about to be kept.

    Raises:
        InvalidInputError: a timestamp more than `MAX_AHEAD_SECONDS` ahead of this machine's clock.
    """
    newest = max(behaviors, key=attrgetter("timestamp"), default=None)
    if newest is not None and newest.timestamp > time.time() + MAX_AHEAD_SECONDS:
        raise InvalidInputError(
            f"timestamp {newest.timestamp!r} of user {newest.user_id!r} lies in the future; give seconds since 1970 "
            "(divide milliseconds by 1000) and check the clock of whoever sent it"
        )


def check_made(result: Result) -> Text | Representation | Failure:
    """What a worker made, if it can be kept; a vector as little-endian float32[d].

    Raises:
        InvalidInputError: of another kind than the task; a vector that is not finite float32[d] or of another
            encoding.
    """
    made, task = result.made, result.task
    if isinstance(made, Failure):
        return made
    kind = made.kind if isinstance(made, Text) else "representation"
    if kind != task.step:
        raise InvalidInputError(f"a {kind} was made for a {task.step} step of user {task.user_id!r}")
    if isinstance(made, Text):
        return made
    vector = np.asarray(made.vector, dtype="<f4")
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise InvalidInputError(
            f"representation {task.number} of user {task.user_id!r} has shape {vector.shape} or holds "
            "values that are not finite; it must be float32[d]"
        )
    if task.fingerprint not in ("", made.fingerprint):
        raise InvalidInputError(
            f"representation {task.number} of user {task.user_id!r} was made by {made.fingerprint} and is wanted of "
            f"{task.fingerprint}; claim with the fingerprint of the encoder in use"
        )
    return Representation(vector, made.fingerprint)


def name_condition(condition: PartitionCondition | None) -> str:
    """A condition as stores keep it; the paper's ``count(20)`` if None.

    Raises:
        ConfigurationError: it does not say what it is.
    """
    kind = type(condition)
    if condition is not None and (kind.__str__, kind.__repr__) == (object.__str__, object.__repr__):
        raise ConfigurationError(
            f"partition condition {kind.__name__} does not say what it is; give it a __str__ that names "
            "its settings, so that the store knows it again"
        )
    return str(condition or Count())


def require_condition(kept: str, condition: PartitionCondition | None, store: str) -> None:
    """Compares what a store keeps with what it is opened with.

    Raises:
        ConfigurationError: they differ.
    """
    if condition is not None and kept != name_condition(condition):
        raise ConfigurationError(
            f"store {store} cuts partitions by {kept}, not {name_condition(condition)}; leave the condition out to "
            "take the store's own, or make a new store"
        )


def read_condition(kept: str, store: str) -> PartitionCondition:
    """The condition that a store keeps.

    Raises:
        ConfigurationError: it cannot be read back from its text.
    """
    try:
        return parse_condition(kept)
    except ConfigurationError:
        raise ConfigurationError(
            f"store {store} cuts partitions by {kept}, which is made in Python only; open the store with that "
            "condition to append to it"
        ) from None
