"""Load and faults on the real server, as the benchmarks put them there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Running
from test_benchmarks import run_benchmark

from bench import load
from bench.serving import Workshop
from bench.stability import Plan, measure_kills, measure_soak
from bench.subject import OwnSubject
from liber_runtime.exceptions import LiberError


@pytest.fixture
def subject(running: Running, tmp_path: Path) -> OwnSubject:
    return OwnSubject(
        running.url,
        list(running.built.dataset.profiles),
        list(running.built.dataset.items),
        server=running.server,
        repository=running.repository,
        workshop=Workshop(tmp_path),
    )


def test_a_load_is_offered_and_drawn(running: Running, tmp_path: Path) -> None:
    users, items = tmp_path / "behaviors.jsonl", tmp_path / "items.txt"
    users.write_text("".join(json.dumps({"user": user}) + "\n" for user in running.built.dataset.profiles))
    items.write_text("\n".join(running.built.dataset.items))
    run = run_benchmark(
        *("bench.load", "--quick", "--triton", running.url, "--users-file", str(users), "--items-file", str(items)),
        *("--candidates", "40", "--folded-users", "7", "--json", str(tmp_path / "load.json")),
        *("--markdown", str(tmp_path / "load.md"), "--plot", str(tmp_path / "load.svg")),
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "load.json").read_text())
    assert figures == json.loads(run.stdout)
    rows = figures["rows"]
    assert {(row["mix"], row["users"], row["candidates"]) for row in rows} == {("ranking", 1, 40), ("folded", 7, 40)}
    for row in rows:
        assert row["requests"] > 0
        assert row["failed"] == 0 or row["saturated"] or row["failures"] == {"DEADLINE_EXCEEDED": row["failed"]}
        assert row["lag_p99_ms"] >= 0
    assert figures["largest_load"].keys() == {"ranking", "folded"}
    assert figures.keys() >= {"bound_ms", "machine", "versions", "seed"}
    assert len((tmp_path / "load.md").read_text().splitlines()) == 2 + len(rows)
    assert (tmp_path / "load.svg").read_text() == figures["plot"]["svg"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--triton 127.0.0.1:1", "--triton needs --users-file and --items-file"),
        ("--bound-ms 0", r"--bound-ms is 0\.0; it has to be above 0"),
        ("--triton 127.0.0.1:1 --users-file {ids} --items-file {ids}", "32 users and .* cannot be drawn from 1 users"),
        (
            "--triton 127.0.0.1:1 --users-file {ids} --items-file {ids} --folded-users 1",
            "no Triton answers at 127.0.0.1:1",
        ),
    ],
)
def test_a_load_that_cannot_be_offered_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, told: str
) -> None:
    (tmp_path / "ids").write_text("one\n")
    monkeypatch.setattr(sys, "argv", ["load", "--quick", *options.format(ids=tmp_path / "ids").split()])
    with pytest.raises(LiberError, match=told) as refused:
        load.main()
    assert "\n" not in str(refused.value)


def test_a_model_that_is_killed_under_load_fails_cleanly_and_is_served_again(subject: OwnSubject) -> None:
    # A deadline that no queue behind other tests' work reaches.
    plan = Plan(share=0.2, deadline=20.0, idle_seconds=0.5, kills=1, candidates=20, folded_users=5)
    (row,) = measure_kills(subject, ["attention_fuser"], plan)
    assert row["model"] == "attention_fuser"
    assert row["restarted"]
    assert row["failed"] > 0
    assert row["clean"], row["errors"]
    assert all("is not healthy" in error for error in row["errors"])
    assert row["first_failure_s"] <= row["last_failure_s"]
    assert row["first_good_s"] >= row["first_failure_s"]  # both to a millisecond
    assert row["requests"] > row["failed"]


def test_a_soak_samples_every_process(subject: OwnSubject) -> None:
    told: list[str] = []
    figures = measure_soak(subject, Plan(share=0.2, soak_minutes=0.05, candidates=20, folded_users=5), told.append)
    names = {process["process"] for process in figures["processes"]}
    assert names >= {"tritonserver", "user_memory_0_0", "attention_fuser_0_0", "ctr_backbone_0_0"}
    assert all(process["samples"] == 8 and process["smallest_mib"] > 10 for process in figures["processes"])
    assert (figures["failed"], figures["restarts"]) == (0, subject.server.stub_restarts)
    assert len(figures["by_minute"]) == 1
    assert told[0].lstrip().startswith("0.0 min, MiB: tritonserver ")
