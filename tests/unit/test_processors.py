from __future__ import annotations

import os
from pathlib import Path

import pytest

from liber_runtime.processors import available_processors
from liber_runtime.settings import Settings


@pytest.fixture(autouse=True)
def eight_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("group", "above", "expected"),
    [
        ("200000 100000", "max 100000", 2),
        ("150000 100000", "max 100000", 2),
        ("max 100000", "50000 100000", 1),
        ("max 100000", "max 100000", 8),
        ("1600000 100000", "400000 100000", 4),
        ("unreadable", "", 8),
    ],
)
def test_a_quota_of_the_group_or_of_one_above_is_kept_to(tmp_path: Path, group: str, above: str, expected: int) -> None:
    membership = write(tmp_path / "membership", "0::/a/b\n")
    write(tmp_path / "groups/a/b/cpu.max", f"{group}\n")
    write(tmp_path / "groups/a/cpu.max", f"{above}\n")
    assert available_processors(tmp_path / "groups", membership) == expected


def test_the_quota_of_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    membership = write(tmp_path / "membership", "0::/system.slice/docker-77.scope\n")
    write(tmp_path / "groups/cpu.max", "300000 100000\n")
    assert available_processors(tmp_path / "groups", membership) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("250000", 3)])
def test_a_quota_of_the_first_kind_of_control_groups(tmp_path: Path, quota: str, expected: int) -> None:
    membership = write(tmp_path / "membership", "5:cpu,cpuacct:/job\n4:memory:/job\n")
    write(tmp_path / "groups/cpu/job/cpu.cfs_quota_us", f"{quota}\n")
    write(tmp_path / "groups/cpu/job/cpu.cfs_period_us", "100000\n")
    assert available_processors(tmp_path / "groups", membership) == expected


def test_without_control_groups_the_processors_allowed_count(tmp_path: Path) -> None:
    assert available_processors(tmp_path, tmp_path / "membership") == 8


def test_threads_that_are_set_are_taken(tmp_path: Path) -> None:
    assert Settings(threads=3).session_threads == 3
    assert 1 <= Settings().session_threads <= 8
