"""How long scoring takes, beside what it could take and what else it could be done with (the paper's Table 7).

``python -m bench.inference_latency --json FILE`` makes a store and untrained bundles (`bench.serving`), starts real
Tritons, and times this runtime and the engines of others in one run: calls take turns, on the same weights and the same
inputs, and engines with the same weights must give the same probabilities or nothing is timed. It takes about fifteen
minutes on two cores; ``--quick`` takes less than one and says nothing of speed. ``--only`` measures some parts.

``--tallrec`` adds an LLM that scores each candidate itself (`bench.tallrec`), on the CPU a tiny one that says nothing
of speed. ``--device cuda`` measures the model on a GPU instead. ``--triton HOST:PORT --store URL --items FILE``
measures a server that is running, as ``make demo`` does with its own (`measure`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.environment import describe_machine, describe_versions, run_command, scratch, show_figures
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.memory import open_store
from liber_runtime.scoring import ScoringClient
from liber_runtime.settings import Settings, load_settings

if TYPE_CHECKING:
    from bench.latency_runs import Plan

SAMPLES = 1000


def measure(
    url: str,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
    *,
    seed: int,
    calls: int = 50,
    warm_up: int = 5,
    settings: Settings | None = None,
) -> dict[str, dict[str, Any]]:
    """Times whole scoring calls of 1000 samples as a client sees them, the two shapes taking turns.

    Args:
        url: host:port of Triton's gRPC endpoint.
        user_ids: users with memory; as many of them as there are, up to 1000, make ``distinct_users``.
        item_ids: the catalogue to draw candidates from.
        seed: of the draw.
        calls: timed calls of each shape.
        warm_up: calls of each shape before those.
        settings: deadline and TLS; default from the environment.

    Returns:
        Per shape, ``one_user`` (one user, 1000 candidates) and ``distinct_users`` (every candidate another user's):
        ``p50`` and ``p99`` in seconds per 1000 samples, ``users``, ``candidates``, ``calls``.
    """
    random = np.random.default_rng(seed)
    distinct = list(user_ids[:SAMPLES])
    shapes = {
        "one_user": [distinct[0]] * SAMPLES,
        "distinct_users": list(itertools.islice(itertools.cycle(distinct), SAMPLES)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in shapes}
    with ScoringClient(url, settings) as client:
        for call in range(warm_up + calls):
            for name, users in shapes.items():
                items = [item_ids[index] for index in random.integers(len(item_ids), size=SAMPLES)]
                started = time.perf_counter()
                client.score(users, items)
                if call >= warm_up:
                    seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "p50": float(np.percentile(seconds[name], 50)),
            "p99": float(np.percentile(seconds[name], 99)),
            "users": len(set(users)),
            "candidates": SAMPLES,
            "calls": calls,
        }
        for name, users in shapes.items()
    }


def main() -> int:
    """The command."""
    arguments = parse_arguments()
    if arguments.triton is not None:
        figures = _measure_running(arguments)
    elif arguments.device == "cuda":
        figures = _measure_cuda(arguments)
    else:
        figures = _measure_all(arguments)
    show_figures(figures, arguments.json)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.inference_latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--markdown", type=Path, help="write them here as tables")
    parser.add_argument("--plot", type=Path, help="write a plot of the engines here, as SVG")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="measure little and small, to see that it works")
    parser.add_argument("--only", default="*", help="shell pattern of the parts to measure, e.g. 'DIEN-20' or 'cat*'")
    parser.add_argument("--seconds", type=float, default=1.0, help="multiplies how long engines are timed")
    parser.add_argument("--directory", type=Path, help="where all is made meanwhile (default: the system's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tallrec", action="store_true", help="also an LLM that scores each candidate")
    parser.add_argument("--price", type=float, help="US dollars for an hour of such a machine (default 0.0893)")
    parser.add_argument("--backbones", help="comma-separated (default: all ten)")
    parser.add_argument("--histories", help="comma-separated lengths T of DIEN (default: 20,50,100)")
    parser.add_argument("--catalogues", help="comma-separated sizes (default: 10000,100000,1000000)")
    parser.add_argument("--embedding", type=int, help="size of an embedding (default 32)")
    parser.add_argument("--hidden", type=int, help="size of DIEN's states (default 64)")
    parser.add_argument("--attention", type=int, help="hidden units of the attention (default 64)")
    parser.add_argument("--mlp", help="comma-separated sizes of the MLP (default: 200,80)")
    parser.add_argument("--dimension", type=int, help="size of a representation (default 32)")
    running = parser.add_argument_group("a server that is running")
    running.add_argument("--triton", help="host:port of Triton's gRPC endpoint")
    running.add_argument("--store", default=load_settings().store, help="the store whose users are scored")
    running.add_argument("--items", type=Path, help="the bundle's vocabulary.json: candidates are drawn from it")
    running.add_argument("--calls", type=int, default=50, help="timed calls of each shape")
    arguments = parser.parse_args()
    if arguments.triton is not None and arguments.items is None:
        parser.error("--triton needs --items, the bundle's vocabulary.json")
    return arguments


def _measure_running(arguments: argparse.Namespace) -> dict[str, Any]:
    store = open_store(arguments.store, create=False)
    users = store.users()
    store.close()
    if not users:
        raise InvalidInputError(f"the store {arguments.store} holds no user; fill it with `liber ingest`")
    items = json.loads(arguments.items.read_text())["items"]
    return {
        "seconds_per_1000": measure(arguments.triton, users, items, seed=arguments.seed, calls=arguments.calls),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": arguments.seed,
    }


def _measure_cuda(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise ConfigurationError("this machine has no CUDA device that PyTorch can use; measure with --device cpu")
    measured: dict[str, Any] = importlib.import_module("bench.cuda").measure_cuda(seed=arguments.seed)
    if arguments.tallrec:
        llm = _measure_tallrec(arguments)
        measured["rows"] += llm["rows"]
        measured["notes"] += llm["notes"]
    return {
        **measured,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": arguments.seed,
    }


def _measure_tallrec(arguments: argparse.Namespace) -> dict[str, Any]:
    measured: dict[str, Any] = importlib.import_module("bench.tallrec").measure_latency(
        device=arguments.device, seed=arguments.seed
    )
    return measured


def _measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    # Imported here: to measure a running server takes neither torch nor the engines of others.
    from bench.floor import measure_gemm
    from bench.latency_runs import Bench
    from bench.latency_table import compare_with_targets, draw, paper_row, write_markdown
    from liber_runtime.native import load_kernels

    plan = make_plan(arguments)
    parts = plan.parts()
    kernels = load_kernels(load_settings().kernels, 1)
    threads = os.cpu_count() or 1
    began = time.perf_counter()
    with scratch(arguments.directory) as directory:
        bench = Bench(plan, directory)
        seconds = 0.2 if arguments.quick else 2.0
        peak = measure_gemm(threads, seconds)
        bench.run()
        # The fastest of both: no figure shall look better because something else ran while the peak was taken.
        peak = max(peak, measure_gemm(threads, seconds))
        bench.set_floors(peak)
    figures = {
        "rows": bench.rows,
        "ratios": compare_with_targets(bench.rows),
        "paper": paper_row(),
        "gemm_gflops": round(peak, 1),
        "kernels": kernels.target if kernels is not None else None,
        "usd_per_hour": plan.price,
        "sizes": dataclasses.asdict(plan.sizes),
        "parts": parts,
        "notes": bench.notes,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": plan.seed,
    }
    if arguments.tallrec:
        # Apart from the others' rows: a tiny LLM on a CPU is no rival.
        figures["tallrec"] = _measure_tallrec(arguments)
    for path, text in ((arguments.markdown, write_markdown(figures)), (arguments.plot, draw(bench.rows))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return figures


def make_plan(arguments: argparse.Namespace) -> Plan:
    """What the arguments ask for.

    Raises:
        ConfigurationError: a backbone there is not, or a value that is no list of numbers.
    """
    from bench.latency_runs import QUICK, Plan
    from builders.models import find_backbone

    plan = QUICK if arguments.quick else Plan()
    sizes = {
        "embedding_dim": arguments.embedding,
        "hidden_size": arguments.hidden,
        "attention_size": arguments.attention,
        "mlp_sizes": _numbers("--mlp", arguments.mlp),
        "dimension": arguments.dimension,
    }
    backbones = tuple(arguments.backbones.split(",")) if arguments.backbones else None
    for name in backbones or ():
        find_backbone(name)
    given = {
        "backbones": backbones,
        "histories": _numbers("--histories", arguments.histories),
        "catalogues": _numbers("--catalogues", arguments.catalogues),
        "price": arguments.price,
        "only": arguments.only,
        "seconds": arguments.seconds,
        "seed": arguments.seed,
        "sizes": dataclasses.replace(plan.sizes, **{name: value for name, value in sizes.items() if value}),
    }
    return dataclasses.replace(plan, **{name: value for name, value in given.items() if value is not None})


def _numbers(option: str, given: str | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        numbers = tuple(int(number) for number in given.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigurationError(f"{option} {given!r} is not understood; write positive numbers, e.g. 20,50")
    return numbers


if __name__ == "__main__":
    run_command(main)
