"""What writing costs per user (the paper's Table 6): calls, tokens and seconds, of LIBER and three of its ablations.

``python -m bench.llm_cost --data D --tokenizer T --json F`` replays a log, counts the prompts of every call with the
LLM's own tokenizer, and has the statistical writer answer them on this machine. With ``--writer`` an LLM answers a
sample of them (options and variables as of ``liber worker``), with ``--device cuda`` a GPU generates with Llama-2-13B's
shape and random weights. Each figure stands beside the engine that made it; what nobody
measured is empty, and what was computed is kept apart.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import describe_machine, describe_versions, show_figures
from bench.llm_cost.answers import Answers, ask_variant
from bench.llm_cost.floor import H200, LLAMA2_13B, Shape, least_seconds_per_call
from bench.llm_cost.prompts import Counted, Prompts, Tokens, stand_in
from bench.llm_cost.table import compare_with_targets, paper_rows, write_markdown
from builders.datasets import Dataset, load
from builders.replay import Samples, replay
from builders.variants import Plan, find_variant, plan
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.partition import Count
from liber_runtime.settings import load_writer_settings
from liber_runtime.writers import Writer
from liber_runtime.writers.opening import open_writer
from liber_runtime.writers.prompting import Budget
from liber_runtime.writers.statistical import StatisticalWriter
from liber_runtime.writers.tokens import TokenCount, counted_by

VARIANTS = ("liber", "no_shift", "length20", "length100")

RESPONSE_TOKENS = 450
"""What an answer is taken to have where no LLM wrote any.

The paper gives one figure of tokens for each variant. That of its summaries of 20 behaviors, 967.1, less the prompt's
own tokens here, about 520, leaves so many for the answer.
"""

NOT_MEASURED = "not measured"

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What one variant asks of a writer.

    Attributes:
        variant: its name.
        plan: its texts.
        users: who have any.
        counted: tokens of the summary prompts.
    """

    variant: str
    plan: Plan
    users: int
    counted: Counted

    @property
    def summaries(self) -> int:
        """Calls."""
        return len(self.plan.user)

    @property
    def shifts(self) -> int:
        """Calls."""
        return self.plan.calls - self.summaries

    def per_call(self, summary: float, shift: float) -> float:
        """The mean over all calls of what a summary and a shift take."""
        return (self.summaries * summary + self.shifts * shift) / self.plan.calls


class Costs:
    """The rows of one log and one tokenizer.

    Args:
        dataset: the log.
        count: the LLM's tokenizer.
        partition: behaviors in a partition, and those that a sample needs before it.
        response_tokens: of an answer that no LLM wrote.
        seed: of what is drawn.
    """

    def __init__(self, dataset: Dataset, count: TokenCount, partition: int, response_tokens: int, seed: int) -> None:
        samples = replay(dataset, Count(partition), partition)
        self._count = count
        self._response_tokens = response_tokens
        self.prompts = Prompts(dataset, samples, count, seed)
        self.prefix = self.prompts.prefix_tokens()
        note = stand_in(count, response_tokens)
        self.shift_tokens = count(self.prompts.shift(note, note).text)
        self.works = [self._work(name, samples) for name in VARIANTS]

    def _work(self, name: str, samples: Samples) -> Work:
        planned = plan(find_variant(name), samples, refresh=1)
        counted = self.prompts.count_summaries(planned, sample=5000)
        return Work(name, planned, len(np.unique(samples.user)), counted)

    def lengths(self, work: Work) -> Tokens:
        """int64[n]: tokens of the prompts of all calls, shifts of answers of the stated length included."""
        return np.concatenate([work.counted.tokens, np.full(work.shifts, self.shift_tokens, dtype=np.int64)])

    def stated(self, work: Work, seconds_per_call: float | None, engine: str, device: str | None) -> Row:
        """A row with answers of the stated length."""
        return self._row(
            work,
            work.per_call(work.counted.tokens.mean(), self.shift_tokens),
            self._response_tokens,
            seconds_per_call,
            engine,
            device,
            "stated",
        )

    def written(self, work: Work, writer: Writer, device: str, most: int, in_flight: int) -> Row:
        """A row of answers that a writer gives to at most about `most` of the summaries and to the shifts of these."""
        answers = ask_variant(work.plan, self.prompts, writer, self._count, most, in_flight)
        summary, shift = answers["summary"], answers.get("shift", Answers())
        read = _mean(summary.prompt_tokens)
        if isinstance(writer, StatisticalWriter):
            read = float(work.counted.tokens.mean())  # of all its prompts; nobody else counted them
        row = self._row(
            work,
            work.per_call(read, _mean(shift.prompt_tokens)),
            work.per_call(_mean(summary.response_tokens), _mean(shift.response_tokens)),
            work.per_call(_per_answer(summary), _per_answer(shift)),
            writer.name,
            device,
            "written",
        )
        return {
            **row,
            "in_flight": in_flight,
            "asked": {kind: len(each) for kind, each in answers.items()},
            "unusable": sum(each.unusable for each in answers.values()),
            "cpu_seconds_per_user": round(_cpu(work, summary, shift) * work.plan.calls / work.users, 5),
        }

    def _row(
        self,
        work: Work,
        prompt_tokens: float,
        response_tokens: float,
        seconds_per_call: float | None,
        engine: str,
        device: str | None,
        response: str,
    ) -> Row:
        calls = work.plan.calls / work.users
        return {
            "variant": work.variant,
            "calls_per_user": round(calls, 4),
            "prompt_tokens_per_call": round(prompt_tokens, 2),
            "prefix_tokens_per_call": round(work.per_call(self.prefix["summary"], self.prefix["shift"]), 2),
            "response_tokens_per_call": round(response_tokens, 2),
            "response": response,
            "seconds_per_call": None if seconds_per_call is None else round(seconds_per_call, 7),
            "seconds_per_user": None if seconds_per_call is None else round(calls * seconds_per_call, 5),
            "engine": engine,
            "device": device,
        }

    def describe_prompts(self, budget: Budget) -> list[Row]:
        """How long the summary prompts of each variant are, and how many are over an LLM's context."""
        return [
            {
                "variant": work.variant,
                "users": work.users,
                "summaries": work.summaries,
                "shifts": work.shifts,
                "counted": len(work.counted.rows),
                "complete": work.counted.is_complete,
                "p50": float(np.percentile(work.counted.tokens, 50)),
                "p99": float(np.percentile(work.counted.tokens, 99)),
                "longest": int(work.counted.tokens.max()),
                "limit": budget.prompt_tokens,
                "over_limit": int((work.counted.tokens > budget.prompt_tokens).sum()),
            }
            for work in self.works
        ]

    def compute(self) -> list[Row]:
        """The least seconds per user on a GPU as its data sheet has it: computed, not measured."""
        rows = []
        for work in self.works:
            seconds = least_seconds_per_call(self.lengths(work), self._response_tokens)
            row = self.stated(work, seconds, "computed from bandwidth and arithmetic, bf16", H200.name)
            rows.append(
                {key: row[key] for key in ("variant", "seconds_per_call", "seconds_per_user", "engine", "device")}
            )
        return rows


def measure_device(
    costs: Costs,
    response_tokens: int,
    *,
    device: str,
    seed: int,
    batch_sizes: Sequence[int],
    shape: Shape = LLAMA2_13B,
    **sizes: int,
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of what a device generates, and all batch sizes that were tried; see `bench.llm_cost.generation`.

    Raises:
        ConfigurationError: there is no such device, or the weights do not fit.
    """
    from bench.llm_cost.generation import fastest, measure_generation

    lengths = {work.variant: costs.lengths(work) for work in costs.works}
    made = measure_generation(
        lengths, response_tokens, device=device, shape=shape, batch_sizes=batch_sizes, seed=seed, **sizes
    )
    rows = []
    for work in costs.works:
        best = fastest(made["rows"], work.variant)
        if best is not None:
            row = costs.stated(work, best["seconds_per_call"], made["engine"], made["device"])
            rows.append({**row, **{key: best[key] for key in _OF_BEST}})
    return rows, made


_OF_BEST = ("batch_size", "response_tokens_per_second", "memory_gib", "times_least")


def describe_tokenizer(path: Path) -> Mapping[str, str]:
    """The file that tokens are counted with, and its digest."""
    names = ("tokenizer.json", "tokenizer.model")
    file = next((path / name for name in names if (path / name).is_file()), path) if path.is_dir() else path
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _cpu(work: Work, summary: Answers, shift: Answers) -> float:
    """Processor seconds of this process for a call: all of a writer that runs in it, next to nothing of others."""
    return work.per_call(summary.cpu_seconds / max(1, len(summary)), shift.cpu_seconds / max(1, len(shift)))


def _mean(values: Sequence[int]) -> float:
    return float(np.mean(values)) if values else 0.0


def _per_answer(answers: Answers) -> float:
    return answers.seconds / max(1, len(answers))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.llm_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory of a data set (default: the generated sample)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the LLM's tokenizer, or the directory it is in")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--markdown", type=Path, help="write them here as tables")
    parser.add_argument(
        "--response-tokens", type=int, default=RESPONSE_TOKENS, help="of an answer that no LLM wrote (default 450)"
    )
    parser.add_argument("--partition", type=int, default=20, help="behaviors in a partition")
    parser.add_argument("--sample", type=int, default=5000, help="most summaries of each variant that are written")
    parser.add_argument(
        "--writer", choices=("openai", "triton", "transformers"), help="have an LLM answer a sample too"
    )
    parser.add_argument("--writer-url", help="its endpoint, or host:port of its Triton")
    parser.add_argument("--writer-model", help="what it is called there, or its checkpoint")
    parser.add_argument("--asked", type=int, default=200, help="most summaries of each variant that it writes")
    parser.add_argument("--in-flight", type=int, default=64, help="its calls at a time")
    parser.add_argument("--device", choices=("cuda",), help="measure generation there too, on random weights")
    parser.add_argument("--batch-sizes", help="comma-separated, ascending (default: up to 256, until memory is full)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(words)
    for name in ("response_tokens", "partition", "sample", "asked", "in_flight"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is not positive")
    if arguments.batch_sizes is not None and arguments.device is None:
        raise ConfigurationError("--batch-sizes are those of --device cuda; give both or neither")
    return arguments


def _ask_llm(costs: Costs, arguments: argparse.Namespace) -> list[Row]:
    chosen = load_writer_settings(
        writer=arguments.writer, url=arguments.writer_url, model=arguments.writer_model, tokenizer=arguments.tokenizer
    )
    place = arguments.writer_url or chosen.url or "this process"
    return [
        costs.written(work, open_writer(chosen), place, arguments.asked, arguments.in_flight) for work in costs.works
    ]


def main() -> int:
    """The command."""
    arguments = parse_arguments()
    sizes: Sequence[int] = ()
    if arguments.device is not None:
        from bench.llm_cost.generation import BATCH_SIZES, find_device, parse_sizes

        find_device(arguments.device)  # Before minutes of counting.
        sizes = BATCH_SIZES if arguments.batch_sizes is None else parse_sizes(arguments.batch_sizes)
    budget = Budget(response_tokens=max(arguments.response_tokens, Budget().response_tokens))
    count = counted_by(arguments.tokenizer)
    dataset = load(arguments.data)
    costs = Costs(dataset, count, arguments.partition, arguments.response_tokens, arguments.seed)
    rows = [costs.written(work, StatisticalWriter(), "cpu", arguments.sample, in_flight=1) for work in costs.works]
    if arguments.writer is not None:
        rows += _ask_llm(costs, arguments)
    generation = None
    if arguments.device is None:
        rows += [costs.stated(work, None, NOT_MEASURED, None) for work in costs.works]
    else:
        measured, generation = measure_device(
            costs,
            arguments.response_tokens,
            device=arguments.device,
            seed=arguments.seed,
            batch_sizes=sizes,
        )
        rows += measured
    figures = {
        "data": dataset.domain.name,
        "tokenizer": describe_tokenizer(arguments.tokenizer),
        "stated_response_tokens": arguments.response_tokens,
        "rows": rows,
        "computed": costs.compute(),
        "prompts": costs.describe_prompts(budget),
        "prefix_tokens": costs.prefix,
        "shift_tokens": costs.shift_tokens,
        "tokens_per_behavior": round(costs.prompts.tokens_per_behavior, 3),
        "generation": generation,
        "ratios": compare_with_targets(rows, dataset.domain.name),
        "paper": paper_rows(),
        "settings": {"partition": arguments.partition, "sample": arguments.sample},
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seed": arguments.seed,
    }
    show_figures(figures, arguments.json)
    if arguments.markdown is not None:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(write_markdown(figures))
    return 0
