"""The benchmarks run as commands and write what they say they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import Running

ROOT = Path(__file__).resolve().parents[2]


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.inference_latency", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_inference_latency(running: Running, tmp_path: Path) -> None:
    run = run_benchmark(
        *("--triton", running.url, "--store", running.built.store_url, "--calls", "3"),
        *("--items", str(running.built.bundle / "vocabulary.json"), "--json", str(tmp_path / "figures.json")),
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == json.loads(run.stdout)
    shapes = figures["seconds_per_1000"]
    assert shapes["one_user"]["users"] == 1
    assert shapes["distinct_users"]["users"] == len({each.user_id for each in running.built.dataset.behaviors})
    for shape in shapes.values():
        assert 0 < shape["p50"] <= shape["p99"]
        assert shape["candidates"] == 1000
    assert figures["machine"]["cores"]
    assert figures["versions"]["torch"]
    assert figures["seed"] == 1


def test_inference_latency_without_a_server_says_so(running: Running) -> None:
    run = run_benchmark(
        *("--triton", "127.0.0.1:1", "--store", running.built.store_url),
        *("--items", str(running.built.bundle / "vocabulary.json")),
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: no Triton answers at 127.0.0.1:1")
    assert len(run.stderr.splitlines()) == 1
