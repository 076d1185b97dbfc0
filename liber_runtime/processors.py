"""How many processors this process may use: what a pool of threads should have."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_processors(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """The processors that this process may run on, or fewer where its control group has less time than they do.

    More threads than that wait for each other: what a group has used up it gets again only in the next period, 0.1 s
    later.

    Args:
        cgroups: where control groups are mounted.
        membership: says in which group this process is.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        allowed = os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(cgroups, membership))]))


def _quotas(cgroups: Path, membership: Path) -> list[float]:
    """Processors' worth of time that the group and those above it have; nothing where there is no limit."""
    found = []
    for line in _words(membership, "\n"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # In a container the path may be one that only the host has; the mount's root is then the container's group.
        places = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
        if not controllers:
            found += [_ratio(_words(cgroups / place / "cpu.max", " ")) for place in places]
        elif "cpu" in controllers.split(","):
            found += [
                _ratio(
                    [
                        *_words(cgroups / "cpu" / place / "cpu.cfs_quota_us", " "),
                        *_words(cgroups / "cpu" / place / "cpu.cfs_period_us", " "),
                    ]
                )
                for place in places
            ]
    return [quota for quota in found if quota > 0]


def _ratio(quota_and_period: list[str]) -> float:
    """0 where there is no limit."""
    if len(quota_and_period) != 2 or not all(word.isdecimal() for word in quota_and_period):
        return 0.0
    quota, period = map(int, quota_and_period)
    return quota / period if period else 0.0


def _words(path: Path, separator: str) -> list[str]:
    try:
        return path.read_text().strip().split(separator)
    except OSError:
        return []
