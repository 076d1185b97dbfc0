from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from conftest import Running

ROOT = Path(__file__).parents[2]


def start(*options: str | Path) -> subprocess.Popen[str]:
    """Locust patches the standard library, so it gets a process of its own."""
    command = [sys.executable, "-m", "locust", "-f", "bench/locustfile.py", "--headless", "--json", *map(str, options)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: int
    output: str
    errors: str

    @property
    def calls(self) -> dict[str, dict[str, Any]]:
        return {entry["name"]: entry for entry in json.loads(self.output)}


def finish(process: subprocess.Popen[str]) -> Outcome:
    with process:
        try:
            output, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Outcome(process.returncode, output, errors)


def count_connections(process: subprocess.Popen[str], url: str) -> int:
    port = int(url.rpartition(":")[2])
    try:
        connections = psutil.Process(process.pid).net_connections("tcp")
    except psutil.NoSuchProcess:
        return 0
    return sum(1 for connection in connections if connection.raddr and connection.raddr.port == port)


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def test_scores_under_load_with_a_connection_for_each_user(running: Running, tmp_path: Path) -> None:
    users, items = tmp_path / "behaviors.jsonl", tmp_path / "items.txt"
    users.write_text("".join(json.dumps({"user": user, "item": "x"}) + "\n" for user in running.built.dataset.profiles))
    items.write_text("\n".join(running.built.dataset.items))
    files = ("--users-file", users, "--items-file", items)
    shape = ("--candidates", "40", "--folded-users", "7")
    process = start("--host", running.url, "-u", "3", "-r", "3", "-t", "6s", *files, *shape)
    connections = 0
    while process.poll() is None and connections < 3:
        connections = max(connections, count_connections(process, running.url))
        time.sleep(0.1)
    outcome = finish(process)
    assert outcome.status == 0, outcome.errors
    assert connections == 3
    assert set(outcome.calls) == {"liber_score U=1 N=40", "liber_score U=7 N=40"}
    for call in outcome.calls.values():
        assert call["method"] == "gRPC"
        assert call["num_requests"] > 0
        assert call["num_failures"] == 0
        assert call["min_response_time"] > 0
        assert call["total_content_length"] == 4 * 40 * call["num_requests"]


def test_generated_ids_are_scored(running: Running) -> None:
    outcome = finish(start("--host", running.url, "-u", "1", "-t", "4s", "--candidates", "5"))
    assert outcome.status == 0, outcome.errors
    assert set(outcome.calls) == {"liber_score U=1 N=5", "liber_score U=5 N=5"}


def test_calls_without_a_server_are_failures(bound: socket.socket) -> None:
    url = f"127.0.0.1:{bound.getsockname()[1]}"
    outcome = finish(start("--host", url, "-u", "1", "-t", "4s", "--candidates", "2"))
    assert outcome.status == 1
    assert outcome.calls
    assert all(call["num_failures"] == call["num_requests"] > 0 for call in outcome.calls.values())
    assert f"no Triton answers at {url}" in outcome.errors


def test_calls_past_their_deadline_are_failures(bound: socket.socket) -> None:
    bound.listen()
    url = f"127.0.0.1:{bound.getsockname()[1]}"
    outcome = finish(start("--host", url, "-u", "2", "-r", "2", "-t", "3s", "--candidates", "2", "--deadline", "0.2"))
    assert outcome.status == 1
    failed = sum(call["num_failures"] for call in outcome.calls.values())
    assert failed == sum(call["num_requests"] for call in outcome.calls.values()) > 2
    assert f"Triton at {url} did not answer within 0.2 s" in outcome.errors


def test_a_headless_run_has_an_end(bound: socket.socket) -> None:
    with start("--host", f"127.0.0.1:{bound.getsockname()[1]}", "-u", "1") as process:
        assert process.stderr is not None
        told = next(line for line in process.stderr if "Run time limit" in line)
        process.kill()
    assert "set to 60 seconds" in told


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--candidates", "0"), "--candidates is 0; it has to be above 0"),
        (("--deadline", "-1"), "--deadline is -1.0; it has to be above 0"),
        (("--users-file", "nowhere.txt"), "cannot read the user ids of nowhere.txt"),
        (("--items-file", "{file}"), """line 2: no 'item' in {"movie": 3}"""),
        (("--users-file", "{file}"), """line 2: no 'user' in {"movie": 3}"""),
    ],
)
def test_bad_options_are_told_in_one_line(tmp_path: Path, options: tuple[str, str], complaint: str) -> None:
    file = tmp_path / "ids.txt"
    file.write_text('first\n{"movie": 3}\n')
    outcome = finish(start("-u", "1", "-t", "1s", options[0], options[1].replace("{file}", str(file))))
    assert outcome.status == 1
    assert "Traceback" not in outcome.errors
    told = [line for line in outcome.errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert complaint in told[0]
