"""The paper's counter-example, TALLRec: an LLM that scores each candidate itself; its AUC, and what a score takes.

    python -m bench.tallrec --data D --checkpoint C --shots 64 --output DIR --json F

trains LoRA adapters on a few samples of the training part, writes them to DIR, and measures the AUC of a sample of the
test part without them and with them. ``--adapters DIR`` measures adapters that are there.

``python -m bench.inference_latency --tallrec`` adds `measure_latency`: on the CPU a tiny random Llama, to see that it
computes what it should and for no other reason; with ``--device cuda`` Llama 2 13B's true shape with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from bench.environment import describe_machine, describe_versions, run_command, show_figures
from builders.datasets import load
from builders.replay import replay, split
from builders.tallrec import (
    HISTORY,
    TokenRow,
    TuningSettings,
    YesNo,
    draw_shots,
    find_answers,
    fine_tune,
    load_adapters,
    make_questions,
    tokenize,
)
from liber_runtime.exceptions import ConfigurationError, LiberError
from liber_runtime.partition import Count
from liber_runtime.progress import console
from liber_runtime.writers.transformers.checkpoint import Checkpoint, find_device, free_memory, import_transformers

ENGINE = "tallrec"

TOLERANCE = 1e-5
"""Largest difference between scores of a batch and of each question alone, in float32."""

TINY, LLAMA2_13B = "tiny random Llama (shows that it works, not how long an LLM takes)", "Llama 2 13B, random weights"

TUNING = TuningSettings()

_CHECKED = 8


@dataclass(frozen=True)
class LatencyPlan:
    """How much `measure_latency` measures.

    Attributes:
        model: what rows call it.
        shape: of transformers' LlamaConfig.
        dtype: of weights and arithmetic.
        samples: N.
        instruction: tokens that all prompts begin with.
        context: tokens after that of each user; with the instruction what MovieLens-100K's prompts have, by Llama 2's
            tokenizer: 176.
        candidate: tokens of a candidate; likewise, 19.
        batch_size: prompts of one forward pass.
        rounds: timed calls of each shape.
    """

    model: str = LLAMA2_13B
    shape: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "vocab_size": 32000,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "max_position_embeddings": 4096,
        }
    )
    dtype: str = "bfloat16"
    samples: int = 1000
    instruction: int = 44
    context: int = 132
    candidate: int = 19
    batch_size: int = 64
    rounds: int = 3


TINY_PLAN = LatencyPlan(
    model=TINY,
    shape={
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    },
    dtype="float32",
    samples=100,
    batch_size=16,
    rounds=2,
)


def measure_latency(*, device: str = "cuda", plan: LatencyPlan | None = None, seed: int = 1) -> dict[str, Any]:
    """Times whole calls: for one user with N candidates, and for N users with one each.

    Args:
        device: ``cuda``, or ``cpu`` to see that it works.
        plan: how much; Llama 2 13B's shape on CUDA, a tiny one on the CPU.
        seed: of weights and tokens.

    Returns:
        ``rows`` as `bench.inference_latency` has them, with ``seconds_per_1000``, ``gpu_memory_gib`` and
        ``max_difference`` from scores computed one by one; ``notes``.

    Raises:
        ConfigurationError: there is no such device, or too little memory on it.
        LiberError: a batch does not give what its questions give alone.
    """
    place = find_device(device)
    plan = plan or (LatencyPlan() if place.type == "cuda" else TINY_PLAN)
    model = _make_model(plan, place, seed)
    rows = []
    for shape, users in (("one_user", 1), ("distinct_users", plan.samples)):
        questions = draw_rows(plan, users, seed)
        scorer = YesNo(model, (5, 6), plan.batch_size)
        checked = questions[:_CHECKED]
        alone = YesNo(model, (5, 6), batch_size=1, shares=False).score(checked)
        difference = float(np.abs(scorer.score(checked) - alone).max())
        if plan.dtype == "float32" and not difference <= TOLERANCE:
            raise LiberError(f"{shape}: a batch differs from its questions alone by {difference:.2g}; nothing is timed")
        seconds = _time(scorer, questions, place, plan.rounds)
        p50 = float(np.percentile(seconds, 50))
        rows.append(
            {
                "model": plan.model,
                "engine": ENGINE,
                "path": "in_process",
                "shape": shape,
                "users": users,
                "candidates": plan.samples,
                "history": HISTORY,
                "liber": False,
                "precision": plan.dtype,
                "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
                "p50_ms": round(1e3 * p50, 4),
                "p99_ms": round(1e3 * float(np.percentile(seconds, 99)), 4),
                "seconds_per_1000": round(p50 * 1000 / plan.samples, 4),
                "tokens_per_prompt": plan.instruction + plan.context + plan.candidate,
                "calls": len(seconds),
                "gpu_memory_gib": _memory(place),
                "max_difference": difference,
            }
        )
    return {"rows": rows, "notes": [] if place.type == "cuda" else [f"{ENGINE} on the CPU is a {TINY}"]}


def draw_rows(plan: LatencyPlan, users: int, seed: int) -> list[TokenRow]:
    """Prompts of random tokens, as many as samples, the users' in turn."""
    random = np.random.default_rng(seed)

    def draw(count: int) -> list[int]:
        drawn: list[int] = random.integers(7, plan.shape["vocab_size"], count).tolist()
        return drawn

    instruction = draw(plan.instruction)
    contexts = [instruction + draw(plan.context) for _ in range(users)]
    return [
        TokenRow(contexts[number % users] + draw(plan.candidate), plan.instruction + plan.context)
        for number in range(plan.samples)
    ]


def _make_model(plan: LatencyPlan, place: torch.device, seed: int) -> Any:
    transformers = import_transformers()
    config, dtype = transformers.LlamaConfig(**plan.shape), getattr(torch, plan.dtype)
    with torch.device("meta"):
        weights = sum(each.numel() for each in transformers.LlamaForCausalLM(config).parameters()) * dtype.itemsize
    free = free_memory(place)
    if weights > free:
        raise ConfigurationError(
            f"{plan.model} in {plan.dtype} needs {weights / 2**30:.1f} GiB for its weights, and {place} has "
            f"{free / 2**30:.1f} GiB free; measure on a larger device"
        )
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), torch.device(place):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _time(scorer: YesNo, rows: Sequence[TokenRow], place: torch.device, rounds: int) -> list[float]:
    seconds = []
    # The last batch is of another size than the others, so all of it is run once before.
    for call in range(1 + rounds):
        started = time.perf_counter()
        scorer.score(rows)  # its answer is on the CPU, so the device is done
        if call:
            seconds.append(time.perf_counter() - started)
        elif place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
    return seconds


def _memory(place: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(place) / 2**30, 2) if place.type == "cuda" else None


def measure_quality(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains adapters, or reads them, and compares the AUC with that of the checkpoint as it is.

    Args:
        arguments: of the command.

    Returns:
        The figures.
    """
    dataset = load(arguments.data)
    samples = replay(dataset, Count(arguments.partition), arguments.partition)
    parts = split(samples)
    checkpoint = Checkpoint(
        arguments.checkpoint,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    answers = find_answers(checkpoint.tokenizer)
    shots = draw_shots(samples, parts.training_part, arguments.shots, arguments.seed)
    tested = draw_shots(samples, parts.test, arguments.samples, arguments.seed)

    def read(rows: npt.NDArray[np.int64]) -> list[TokenRow]:
        return tokenize(checkpoint.tokenizer, make_questions(dataset, samples, rows, arguments.history))

    questions = read(tested)
    longest = max(len(row.tokens) for row in questions)
    checkpoint.require_memory(arguments.batch_size, longest)
    model = checkpoint.load()

    def measure(scored: Any) -> dict[str, float]:
        started = time.perf_counter()
        probability = YesNo(scored, answers, arguments.batch_size).score(questions)
        seconds = time.perf_counter() - started
        auc = float(roc_auc_score(samples.label[tested], probability))
        return {"auc": round(auc, 4), "seconds_per_1000": round(1000 * seconds / len(questions), 3)}

    figures: dict[str, Any] = {"checkpoint": checkpoint.name, "data": dataset.domain.name, "zero_shot": measure(model)}
    settings = TuningSettings(
        epochs=arguments.epochs, learning_rate=arguments.learning_rate, batch_size=arguments.batch_size
    )
    if arguments.adapters is not None:
        tuned = load_adapters(model, arguments.adapters)
    else:

        def tell(epoch: int, loss: float) -> None:
            console.print(f"epoch {epoch} of {settings.epochs}: loss {loss:.4f}", soft_wrap=True)

        tuned, figures["losses"] = fine_tune(
            model, answers, read(shots), samples.label[shots], settings, arguments.seed, tell
        )
        figures["settings"] = dataclasses.asdict(settings)
        figures["shots"] = len(shots)
        if arguments.output is not None:
            tuned.save_pretrained(str(arguments.output))
    return {
        **figures,
        "tuned": measure(tuned),
        "tested": len(tested),
        "tokens_per_prompt": round(float(np.mean([len(row.tokens) for row in questions])), 1),
        "precision": str(checkpoint.dtype).removeprefix("torch."),
        "device": str(checkpoint.device),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": arguments.seed,
    }


def parse_arguments() -> argparse.Namespace:
    """Of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tallrec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="as for `liber build`; the generated sample if not given")
    parser.add_argument("--checkpoint", required=True, help="a causal language model: a directory or a name on the Hub")
    parser.add_argument("--adapters", type=Path, help="measure these instead of training")
    parser.add_argument("--output", type=Path, help="write the trained adapters here")
    parser.add_argument("--shots", type=int, default=64, help="samples of the training part to train on")
    parser.add_argument("--samples", type=int, default=1000, help="samples of the test part to measure on")
    parser.add_argument("--history", type=int, default=HISTORY, help="newest behaviors that a prompt tells")
    parser.add_argument("--epochs", type=int, default=TUNING.epochs)
    parser.add_argument("--learning-rate", type=float, default=TUNING.learning_rate)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--partition", type=int, default=20, help="earlier behaviors that a sample needs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    for name in ("shots", "samples", "history", "epochs", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main() -> int:
    """The command."""
    arguments = parse_arguments()
    show_figures(measure_quality(arguments), arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
