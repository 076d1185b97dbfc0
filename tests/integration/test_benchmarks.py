"""The benchmarks run as commands and write what they say they write."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Running

ROOT = Path(__file__).resolve().parents[2]


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_inference_latency(running: Running, tmp_path: Path) -> None:
    run = run_benchmark(
        *("bench.inference_latency", "--triton", running.url, "--store", running.built.store_url, "--calls", "3"),
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
        *("bench.inference_latency", "--triton", "127.0.0.1:1", "--store", running.built.store_url),
        *("--items", str(running.built.bundle / "vocabulary.json")),
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: no Triton answers at 127.0.0.1:1")
    assert len(run.stderr.splitlines()) == 1


def test_inference_latency_of_every_engine_in_one_run(tmp_path: Path) -> None:
    run = run_benchmark(
        *("bench.inference_latency", "--quick", "--only", "DIEN-20", "--directory", str(tmp_path / "scratch")),
        *("--json", str(tmp_path / "F"), "--markdown", str(tmp_path / "F.md"), "--plot", str(tmp_path / "F.svg")),
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "F").read_text())
    assert figures == json.loads(run.stdout)
    rows = figures["rows"]
    named = [(row["engine"], row["path"], row["liber"]) for row in rows if row["shape"] == "distinct_users"]
    assert len(set(named)) == len(named) == 11
    assert {engine for engine, _, _ in named} == {
        *("liber", "liber_graph", "liber_graph_int8"),
        *("torch_eager", "onnx_export", "deepctr_torch", "fastapi"),
    }
    assert {(row["shape"], row["users"], row["candidates"]) for row in rows} == {
        *(("one_user", 1, 100), ("distinct_users", 100, 100), ("folded", 8, 100), ("single", 1, 1)),
    }
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert (row["cpu_ms"] is None) == (row["path"] != "in_process")
        assert (row["rss_mib"] is None) == (row["path"] == "in_process")
        assert (row["floor_ms"] is None) == (row["engine"] == "deepctr_torch")
        if row["precision"] == "fp32" and row["engine"] != "deepctr_torch":
            assert row["max_difference"] <= 1e-5
    assert figures["gemm_gflops"] > 0
    assert any("LIBER / its backbone through gRPC" in each["figure"] for each in figures["ratios"])
    assert "## DIEN, T=20" in (tmp_path / "F.md").read_text()
    assert (tmp_path / "F.svg").read_text().startswith("<svg")
    assert list((tmp_path / "scratch").iterdir()) == []


ENGINES = [
    "sqlite",
    pytest.param("redis", marks=pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_ingest(engine: str, tmp_path: Path) -> None:
    run = run_benchmark(
        "bench.ingest", "--store", engine, "--quick", "--directory", str(tmp_path), "--json", str(tmp_path / "F")
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "F").read_text())
    assert figures == json.loads(run.stdout)
    rows = figures["rows"]
    assert {row["what"] for row in rows} == {"append_batch", "append_one", "score_read", "score_read_32", "worker_noop"}
    for row in rows:
        assert row["store"] == engine
        assert row["per_second"] > 0
        assert row["p50_ms"] > 0
        assert row.keys() >= {"history", "p99_ms", "ratio_to_bare"}
    assert [row["ratio_to_bare"] is not None for row in rows if row.get("batch") and row["threads"] == 1] == [True] * 3
    assert {row["history"] for row in rows if row.get("flat")} == {1000, 5000}
    assert figures["plot"]["svg"].startswith("<svg")
    assert [path.name for path in tmp_path.iterdir()] == ["F"]


@pytest.mark.parametrize("engine", ENGINES)
def test_faults(engine: str, tmp_path: Path) -> None:
    kills = {"sqlite": 20, "redis": 2}[engine]
    run = run_benchmark(
        *("bench.faults", "--store", engine, "--kills", str(kills), "--minutes", "1"),
        *("--directory", str(tmp_path), "--json", str(tmp_path / "F")),
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "F").read_text())
    assert figures["store"] == engine
    assert figures["kills"] >= kills
    assert figures["acknowledged"] > 0
    assert (figures["lost"], figures["duplicated"], figures["cascade_breaks"], figures["crashes"]) == (0, 0, 0, 0)
    assert figures["effects"] == figures["effects_expected"] > 0
    assert figures["effects_repeated"] == 0
    assert figures["repeated_calls"] <= figures["in_flight_at_kills"]
    assert [path.name for path in tmp_path.iterdir()] == ["F"]


@pytest.mark.parametrize("benchmark", ["ingest", "faults"])
def test_a_benchmark_of_an_unknown_store_says_which_there_are(benchmark: str) -> None:
    run = run_benchmark(f"bench.{benchmark}", "--store", "paper")
    assert run.returncode == 2
    assert "invalid choice: 'paper'" in run.stderr
