"""Seconds per 1000 samples through Triton's gRPC, the figure of the paper's Table 7.

``python -m bench.inference_latency --triton HOST:PORT --store URL --json FILE`` measures a server that is running;
``make demo`` measures its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import describe_machine, describe_versions, run_command, show_figures
from liber_runtime.memory import open_store
from liber_runtime.scoring import ScoringClient
from liber_runtime.settings import load_settings

SAMPLES = 1000


def measure(
    url: str, user_ids: Sequence[str], item_ids: Sequence[str], *, seed: int, calls: int = 50, warm_up: int = 5
) -> dict[str, dict[str, Any]]:
    """Times whole scoring calls of 1000 samples as a client sees them, the two shapes taking turns.

    Args:
        url: host:port of Triton's gRPC endpoint.
        user_ids: users with memory; as many of them as there are, up to 1000, make ``distinct_users``.
        item_ids: the catalogue to draw candidates from.
        seed: of the draw.
        calls: timed calls of each shape.
        warm_up: calls of each shape before those.

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
    with ScoringClient(url) as client:
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
    settings = load_settings()
    parser = argparse.ArgumentParser(prog="python -m bench.inference_latency", description=__doc__)
    parser.add_argument("--triton", default=settings.triton, help="host:port of Triton's gRPC endpoint")
    parser.add_argument("--store", default=settings.store, help="the store whose users are scored")
    parser.add_argument(
        "--items", type=Path, required=True, help="the bundle's vocabulary.json: candidates are drawn from it"
    )
    parser.add_argument("--calls", type=int, default=50, help="timed calls of each shape")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    store = open_store(arguments.store)
    users = store.users()
    store.close()
    if not users:
        print(f"the store {arguments.store} holds no user; fill it with `liber ingest`", file=sys.stderr)
        return 1
    items = json.loads(arguments.items.read_text())["items"]
    figures = {
        "seconds_per_1000": measure(arguments.triton, users, items, seed=arguments.seed, calls=arguments.calls),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": arguments.seed,
    }
    show_figures(figures, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
