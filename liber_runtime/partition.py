"""User behavior streaming partition (paper, section 3.2, Algorithm 1 and Eq. 1).

Pure: no clock, no I/O. The store calls it while it appends, `builders.replay` calls it while it makes training
samples, so what is trained on is what is served.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, overload, runtime_checkable

import numpy as np
import numpy.typing as npt

from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import ConfigurationError

PreviousPartition: TypeAlias = Callable[[], Sequence[Behavior]]
"""Returns the behaviors of the user's last partition (empty if there is none). Called only by conditions that look."""


@runtime_checkable
class PartitionCondition(Protocol):
    """When the cache is cut, and where (Eq. 1; "time-related, number of behaviors related, or ... model-based")."""

    def boundary(self, cache: Sequence[Behavior], previous: PreviousPartition) -> int:
        """Returns how many of the cache's oldest behaviors become the next partition; 0 for none yet.

        Called after every single behavior that enters the cache, with that behavior last, so only the newest
        one can have changed the answer.

        Args:
            cache: the user's behaviors in arrival order, the new one last; never empty.
            previous: the last partition's behaviors, fetched on call.
        """
        ...


@dataclass(frozen=True)
class Count:
    """Eq. 1: cut the whole cache as soon as it holds K behaviors."""

    size: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ConfigurationError(f"count({self.size!r}): K must be a whole number of at least 1")

    def boundary(self, cache: Sequence[Behavior], previous: PreviousPartition) -> int:
        """See `PartitionCondition.boundary`."""
        size = len(cache)
        return size if size >= self.size else 0

    def __str__(self) -> str:
        return f"count({self.size})"


@dataclass(frozen=True)
class TimeGap:
    """Cut when the newest behavior comes more than `seconds` after the one before it.

    The behavior after the gap begins the next session and stays in the cache.
    """

    seconds: float

    def __post_init__(self) -> None:
        _require_positive("time_gap", self.seconds)

    def boundary(self, cache: Sequence[Behavior], previous: PreviousPartition) -> int:
        """See `PartitionCondition.boundary`."""
        if len(cache) >= 2 and cache[-1].timestamp - cache[-2].timestamp > self.seconds:
            return len(cache) - 1
        return 0

    def __str__(self) -> str:
        return f"time_gap({_exact(self.seconds)})"


@dataclass(frozen=True)
class TimeWindow:
    """Cut when the newest behavior lies more than `seconds` after the cache's first one; it stays in the cache."""

    seconds: float

    def __post_init__(self) -> None:
        _require_positive("time_window", self.seconds)

    def boundary(self, cache: Sequence[Behavior], previous: PreviousPartition) -> int:
        """See `PartitionCondition.boundary`."""
        if len(cache) >= 2 and cache[-1].timestamp - cache[0].timestamp > self.seconds:
            return len(cache) - 1
        return 0

    def __str__(self) -> str:
        return f"time_window({_exact(self.seconds)})"


@dataclass(frozen=True)
class InterestDrift:
    """A model-based condition: cut when the cache has moved away from the last partition.

    Moved away means: the cosine distance between the mean item vector of the cache and that of the last partition
    is above `distance`. A user without partitions is cut at `first` behaviors, so that there is something to drift
    from.

    Attributes:
        vectors: float32[n] for every known item, all of one length; behaviors with other items do not count.
        distance: in (0, 2].
        least: the cache holds at least this many behaviors before its mean is trusted.
        first: size of the first partition.
    """

    vectors: Mapping[str, npt.NDArray[np.float32]]
    distance: float = 0.3
    least: int = 5
    first: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.distance <= 2:
            raise ConfigurationError(
                f"interest drift: distance {self.distance!r} must lie in (0, 2], a cosine distance"
            )
        if self.least < 1 or self.first < 1:
            raise ConfigurationError(f"interest drift: least={self.least}, first={self.first} must be at least 1")

    def boundary(self, cache: Sequence[Behavior], previous: PreviousPartition) -> int:
        """See `PartitionCondition.boundary`."""
        if len(cache) < self.least:
            return 0
        last = previous()
        if not last:
            return len(cache) if len(cache) >= self.first else 0
        now, before = self._direction(cache), self._direction(last)
        if now is None or before is None:
            return 0
        return len(cache) if 1.0 - float(now @ before) > self.distance else 0

    def _direction(self, behaviors: Sequence[Behavior]) -> npt.NDArray[np.float64] | None:
        known = [self.vectors[behavior.item_id] for behavior in behaviors if behavior.item_id in self.vectors]
        if not known:
            return None
        mean = np.mean(np.asarray(known, dtype=np.float64), axis=0)
        norm = float(np.linalg.norm(mean))
        return mean / norm if norm > 0 else None

    def __str__(self) -> str:
        return f"interest_drift({self.distance:g}, least={self.least}, first={self.first})"


@dataclass(frozen=True, init=False)
class AnyOf:
    """Cut at the earliest boundary that any of the conditions names."""

    conditions: tuple[PartitionCondition, ...]

    def __init__(self, *conditions: PartitionCondition) -> None:
        _require_conditions("any_of", conditions)
        object.__setattr__(self, "conditions", conditions)

    def boundary(self, cache: Sequence[Behavior], previous: PreviousPartition) -> int:
        """See `PartitionCondition.boundary`."""
        found = [cut for condition in self.conditions if (cut := condition.boundary(cache, previous))]
        return min(found, default=0)

    def __str__(self) -> str:
        return f"any_of({', '.join(map(str, self.conditions))})"


@dataclass(frozen=True, init=False)
class AllOf:
    """Cut, at the earliest boundary named, once every condition names one for the same cache."""

    conditions: tuple[PartitionCondition, ...]

    def __init__(self, *conditions: PartitionCondition) -> None:
        _require_conditions("all_of", conditions)
        object.__setattr__(self, "conditions", conditions)

    def boundary(self, cache: Sequence[Behavior], previous: PreviousPartition) -> int:
        """See `PartitionCondition.boundary`."""
        smallest = len(cache)
        for condition in self.conditions:
            cut = condition.boundary(cache, previous)
            if not cut:
                return 0
            smallest = min(smallest, cut)
        return smallest

    def __str__(self) -> str:
        return f"all_of({', '.join(map(str, self.conditions))})"


class Run(Sequence[Behavior]):
    """Behaviors that were there, followed by some that came; equal to any sequence of the same behaviors.

    What was there is not copied and not looked at unless someone asks for it: a store that keeps it packed need not
    unpack it to learn that a count of 20 is not reached.

    Attributes:
        head: what was there.
        tail: what came.
    """

    __slots__ = ("_first", "head", "tail")

    def __init__(self, head: Sequence[Behavior] = (), tail: Iterable[Behavior] = ()) -> None:
        self.head = head
        self.tail = list(tail)
        self._first = len(head)

    def __len__(self) -> int:
        return self._first + len(self.tail)

    @overload
    def __getitem__(self, index: int) -> Behavior: ...

    @overload
    def __getitem__(self, index: slice) -> list[Behavior]: ...

    def __getitem__(self, index: int | slice) -> Behavior | list[Behavior]:
        if isinstance(index, slice):
            return list(self)[index]
        place = index if index >= 0 else index + len(self)
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self.head[place] if place < self._first else self.tail[place - self._first]

    def __iter__(self) -> Iterator[Behavior]:
        return itertools.chain(self.head, self.tail)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Run({list(self)!r})"


@dataclass(frozen=True)
class Streamed:
    """What `stream` made of one user's new behaviors.

    Attributes:
        partitions: the runs that were cut, oldest first; each non-empty.
        cache: what is left for the next partition.
    """

    partitions: tuple[Run, ...]
    cache: Run


def stream(
    condition: PartitionCondition,
    cache: Sequence[Behavior],
    arriving: Iterable[Behavior],
    previous: PreviousPartition = tuple,
) -> Streamed:
    """Algorithm 1 for one user: puts behaviors into the cache one by one and cuts partitions off it.

    Args:
        condition: when to cut.
        cache: the user's cache so far, in arrival order.
        arriving: new behaviors in arrival order.
        previous: the user's last partition before these behaviors.

    Returns:
        The partitions that were cut and the cache that remains; together they hold every behavior once, in order.

    Raises:
        ConfigurationError: a condition named a boundary outside the cache.
    """
    pending = Run(cache)
    partitions: list[Run] = []

    def last_partition() -> Sequence[Behavior]:
        return partitions[-1] if partitions else previous()

    for behavior in arriving:
        pending.tail.append(behavior)
        cut = condition.boundary(pending, last_partition)
        if not cut:
            continue
        if not 0 < cut <= len(pending):
            raise ConfigurationError(
                f"partition condition {condition} cut {cut} behaviors of a cache of {len(pending)}; "
                "it must return a number from 0 to the cache's length"
            )
        if cut == len(pending):
            partitions.append(pending)
            pending = Run()
        else:
            behaviors = list(pending)
            partitions.append(Run(tail=behaviors[:cut]))
            pending = Run(tail=behaviors[cut:])
    return Streamed(tuple(partitions), pending)


def parse_condition(text: str) -> PartitionCondition:
    """Reads a condition as it prints: ``any_of(count(20), time_gap(1800))``.

    `InterestDrift` needs item vectors and is made in Python only.

    Raises:
        ConfigurationError: anything but nested calls of count, time_gap, time_window (seconds), any_of, all_of.
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise ConfigurationError(
            f"partition condition {text!r:.200} is not understood ({error}); write for example "
            "'count(20)' or 'any_of(count(20), time_gap(1800))' with seconds"
        ) from None


_LEAVES: Mapping[str, Callable[[float], PartitionCondition]] = {
    "count": lambda size: Count(int(size) if size == int(size) else size),  # type: ignore[arg-type]
    "time_gap": TimeGap,
    "time_window": TimeWindow,
}
_COMBINATIONS: Mapping[str, Callable[..., PartitionCondition]] = {"any_of": AnyOf, "all_of": AllOf}


def _build(node: ast.expr) -> PartitionCondition:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
        raise ValueError("expected a call such as count(20)")
    name = node.func.id
    if name in _COMBINATIONS:
        return _COMBINATIONS[name](*(_build(argument) for argument in node.args))
    if name in _LEAVES:
        if len(node.args) != 1 or not isinstance(node.args[0], ast.Constant):
            raise ValueError(f"{name} takes one number")
        return _LEAVES[name](node.args[0].value)  # type: ignore[arg-type]
    known = ", ".join(itertools.chain(_LEAVES, _COMBINATIONS))
    raise ValueError(f"no condition is called {name!r}; there are {known}")


def _exact(seconds: float) -> str:
    """Shortest text that reads back as the same number: stores keep conditions as text."""
    return repr(float(seconds)).removesuffix(".0")


def _require_positive(name: str, seconds: float) -> None:
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not (seconds > 0 and math.isfinite(seconds))
    ):
        raise ConfigurationError(f"{name}({seconds!r}): seconds must be a positive number")


def _require_conditions(name: str, conditions: Sequence[PartitionCondition]) -> None:
    if not conditions:
        raise ConfigurationError(f"{name}() needs at least one condition")
