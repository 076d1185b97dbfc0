"""What Triton's settings cost and bring on this machine: the measurements that the defaults were chosen by.

``python -m bench.tuning --json bench/results/tuning.json`` serves one bundle in every way of `make_variants`, a server
after the other and all of them again in every round, and puts the same load on each: 1, 4 and 16 callers that wait for
their answers, one user with 100 or 1000 candidates in a call. It takes some four minutes.

Beside the rates it tells what a first request costs more than a later one, and where the time of a lone request goes:
Triton's own figures of each model, in which ``input_ms`` and ``output_ms`` are the copies into and out of the memory
that the Python backend shares with its processes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from bench.environment import describe_machine, describe_versions, run_command, scratch, show_figures
from bench.serving import Workshop, make_store
from builders.repository import publish
from liber_runtime.channel import open_client
from liber_runtime.processors import available_processors
from liber_runtime.scoring import ScoringClient
from liber_runtime.server import TritonServer
from liber_runtime.server.repository import read_config
from liber_runtime.settings import load_settings

USERS, ITEMS = 1000, 2000
CALLERS = (1, 4, 16)
CANDIDATES = (100, 1000)
FIRST_CALLS = 5

_SPINNING = """import onnxruntime


class _Spinning(onnxruntime.SessionOptions):
    def add_session_config_entry(self, key, value):
        super().add_session_config_entry(key, "1" if key == "session.intra_op.allow_spinning" else value)


onnxruntime.SessionOptions = _Spinning
"""
"""Runs in a model's process before anything else. There is no setting for it: it was never worth one."""


@dataclass(frozen=True)
class Variant:
    """One way to serve a bundle.

    Attributes:
        name: in the results.
        threads: of every session and kernel; 0 for one per processor.
        instances: of ``ctr_backbone``: processes that score at the same time.
        memory_instances: of ``user_memory``.
        merged: whether requests that wait are answered as one batch.
        spinning: whether threads without work keep their processor for a while.
    """

    name: str
    threads: int = 0
    instances: int = 1
    memory_instances: int = 1
    merged: bool = True
    spinning: bool = False


def make_variants(processors: int) -> tuple[Variant, ...]:
    """The ways that are compared on a machine of so many processors; the first is the default."""
    return (
        Variant("default"),
        Variant("one_thread", threads=1),
        Variant("an_instance_per_processor", threads=1, instances=processors),
        Variant("two_memories", memory_instances=2),
        Variant("not_merged", merged=False),
        Variant("spinning", spinning=True),
    )


def arrange(repository: Path, variant: Variant) -> None:
    """Changes a published repository to `variant`."""
    for name, instances in (("ctr_backbone", variant.instances), ("user_memory", variant.memory_instances)):
        path = repository / name / "config.pbtxt"
        config = read_config(path)
        config.instance_group[0].count = instances
        _write(path, config)
    for model in repository.iterdir():
        path = model / "config.pbtxt"
        config = read_config(path)
        if not variant.merged and config.HasField("dynamic_batching"):
            config.ClearField("dynamic_batching")
            _write(path, config)
    if variant.spinning:
        for shell in repository.glob("*/*/model.py"):
            head, future, rest = shell.read_text().partition("from __future__ import annotations\n")
            shell.write_text(head + future + _SPINNING + rest)


def _write(path: Path, config: model_config_pb2.ModelConfig) -> None:
    path.write_text(text_format.MessageToString(config))


def measure(
    variants: Sequence[Variant],
    bundle: Path,
    store_url: str,
    users: Sequence[str],
    directory: Path,
    *,
    rounds: int,
    seconds: float,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Serves and loads every variant in every round.

    Args:
        variants: see `make_variants`.
        bundle: its directory.
        store_url: of a store with `users`.
        users: whose candidates are scored, drawn anew for every call.
        directory: for the repositories.
        rounds: how often.
        seconds: of load for each number of callers and of candidates.
        seed: of the draws.

    Returns:
        By variant: ``rows`` (``callers``, ``candidates``, ``p50_ms``, ``p99_ms``, ``requests_per_second``, over all
        rounds), ``first_ms`` and ``next_ms`` (the first request after the start, and the median of those after it), and
        ``models``, what Triton says of a lone request (milliseconds).
    """
    latencies: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    first: dict[str, list[list[float]]] = defaultdict(list)
    models: dict[str, dict[str, dict[str, float]]] = {}
    for turn in range(rounds):
        for variant in variants:
            repository = directory / f"{variant.name}-{turn}" / "model_repository"
            publish(bundle, repository)
            arrange(repository, variant)
            environment = {"LIBER_STORE": store_url, "LIBER_THREADS": str(variant.threads)}
            log_file = repository.parent / "triton.log"
            with TritonServer(repository, log_file=log_file, environment=environment) as server:
                first[variant.name].append(_first_calls(server.grpc_url, users[0]))
                for candidates in CANDIDATES:
                    for callers in CALLERS:
                        load = functools.partial(_call, server.grpc_url, users, candidates, seconds)
                        with concurrent.futures.ThreadPoolExecutor(callers) as pool:
                            seeds = [seed + turn * 100 + caller for caller in range(callers)]
                            for told in pool.map(load, seeds):
                                latencies[variant.name, candidates, callers] += told
                models[variant.name] = _lone_request(server.grpc_url, users)
    return {
        variant.name: {
            "first_ms": _median([calls[0] for calls in first[variant.name]]),
            "next_ms": _median([call for calls in first[variant.name] for call in calls[1:]]),
            "models": models[variant.name],
            "rows": [
                _row(latencies[variant.name, candidates, callers], candidates, callers, rounds * seconds)
                for candidates in CANDIDATES
                for callers in CALLERS
            ],
        }
        for variant in variants
    }


def _row(latencies: Sequence[float], candidates: int, callers: int, seconds: float) -> dict[str, Any]:
    return {
        "candidates": candidates,
        "callers": callers,
        "p50_ms": round(1e3 * float(np.percentile(latencies, 50)), 3),
        "p99_ms": round(1e3 * float(np.percentile(latencies, 99)), 3),
        "requests_per_second": round(len(latencies) / seconds, 1),
    }


def _median(seconds: Sequence[float]) -> float:
    return round(1e3 * float(np.median(seconds)), 3)


def _call(url: str, users: Sequence[str], candidates: int, seconds: float, seed: int) -> list[float]:
    """Calls one after another for so long; returns how long each took."""
    random = np.random.default_rng(seed)
    latencies: list[float] = []
    with ScoringClient(url, own_connection=True) as client:
        ends = time.perf_counter() + seconds
        for user, items in _draws(random, users, candidates):
            started = time.perf_counter()
            if started >= ends:
                return latencies
            client.score(user, items)
            latencies.append(time.perf_counter() - started)
    return latencies


def _draws(random: np.random.Generator, users: Sequence[str], candidates: int) -> Iterator[tuple[str, list[str]]]:
    while True:
        user = users[int(random.integers(len(users)))]
        yield user, [f"item-{item}" for item in random.integers(ITEMS, size=candidates).tolist()]


def _first_calls(url: str, user: str) -> list[float]:
    seconds = []
    with ScoringClient(url) as client:
        for _ in range(FIRST_CALLS):
            started = time.perf_counter()
            client.score(user, [f"item-{item}" for item in range(1000)])
            seconds.append(time.perf_counter() - started)
    return seconds


def _lone_request(url: str, users: Sequence[str], calls: int = 100) -> dict[str, dict[str, float]]:
    """Milliseconds of each model for one user with 1000 candidates and nobody else: waiting, copies, work."""
    raw = open_client(url, load_settings())
    before = _statistics(raw)
    with ScoringClient(url) as client:
        for _, (user, items) in zip(range(calls), _draws(np.random.default_rng(0), users, 1000), strict=False):
            client.score(user, items)
    after = _statistics(raw)
    raw.close()
    return {
        model: {name: round((value - before[model][name]) / calls / 1e6, 3) for name, value in told.items()}
        for model, told in after.items()
        if told["compute_ms"] > before[model]["compute_ms"]
    }


def _statistics(raw: tritonclient.grpc.InferenceServerClient) -> Mapping[str, Mapping[str, int]]:
    return {
        model.name: {
            "waiting_ms": model.inference_stats.queue.ns,
            "input_ms": model.inference_stats.compute_input.ns,
            "compute_ms": model.inference_stats.compute_infer.ns,
            "output_ms": model.inference_stats.compute_output.ns,
        }
        for model in raw.get_inference_statistics("").model_stats
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.tuning", description=__doc__)
    parser.add_argument("--backbone", default="DIEN")
    parser.add_argument("--rounds", type=int, default=2, help="how often every variant has its turn")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load for each number of callers and candidates")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="make store, bundle and repositories below this directory")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    processors = available_processors()
    with scratch(arguments.work) as directory:
        workshop = Workshop(directory, items=ITEMS, seed=arguments.seed)
        bundle = workshop.bundle("bundle", arguments.backbone)
        url = f"sqlite:///{directory / 'memory.db'}"
        users = make_store(url, workshop.encoding.fingerprint, users=USERS, items=ITEMS, seed=arguments.seed)
        variants = measure(
            make_variants(processors),
            bundle.directory,
            url,
            users,
            directory,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            seed=arguments.seed,
        )
    figures = {
        "variants": variants,
        "backbone": arguments.backbone,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "processors": processors,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": arguments.seed,
    }
    show_figures(figures, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
