"""What the rows of `bench.llm_cost` say: the paper's figures, what was to be reached, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from builders.paper import DATA_NAME, LLM_COST, SOURCE, WRITER

Row = Mapping[str, Any]

NAMES: Mapping[str, str] = {
    "liber": "LIBER",
    "no_shift": "w/o shift",
    "length20": "length=20",
    "length100": "length=100",
}
"""Variants as the paper's table calls them."""

STATISTICAL, TORCH = "statistical", "torch-transformers"

LEAST_TIMES_PAPER = 20.0
"""How many times the paper's rate PyTorch alone was to reach."""

MOST_GPU_SECONDS = 2.5
"""For a user of LIBER, of a serving engine."""

_TOLERANCE = 0.01
"""The paper's calls per user have two decimals, some rounded and some cut."""


def paper_rows() -> dict[str, Any]:
    """The paper's Table 6."""
    return {
        "source": f"{SOURCE}, Table 6",
        "writer": WRITER,
        "hardware": "not stated",
        "rows": [
            {
                "variant": variant,
                "calls_per_user": LLM_COST[name].calls_per_user,
                "tokens_per_prompt": LLM_COST[name].tokens_per_prompt,
                "seconds_per_user": LLM_COST[name].seconds_per_user,
            }
            for variant, name in NAMES.items()
        ],
    }


def compare_with_targets(rows: Sequence[Row], data: str) -> list[dict[str, Any]]:
    """Each figure that was to be reached and that these rows tell: its value, its target, and whether it is met."""
    return [
        {"figure": name, "value": round(value, 4), "target": target, "met": met}
        for name, value, target, met in _figures(rows, data)
    ]


def _figures(rows: Sequence[Row], data: str) -> Iterator[tuple[str, float, str, bool]]:
    calls = {row["variant"]: row["calls_per_user"] for row in rows} if data == DATA_NAME else {}
    for variant, value in calls.items():
        paper = LLM_COST[NAMES[variant]].calls_per_user
        yield f"{NAMES[variant]}: calls per user", value, f"{paper:g}", abs(value - paper) < _TOLERANCE
    for row in rows:
        seconds = row["seconds_per_user"]
        if row["variant"] != "liber" or row["engine"] == STATISTICAL or seconds is None:
            continue
        if row["engine"] == TORCH:
            times = LLM_COST["LIBER"].seconds_per_user / seconds
            yield "LIBER, PyTorch alone: times the paper's rate", times, ">= 20", times >= LEAST_TIMES_PAPER
        else:
            met = seconds <= MOST_GPU_SECONDS
            yield f"LIBER, {row['engine']}: seconds per user, GPU-seconds if one GPU serves it", seconds, "<= 2.5", met


def write_markdown(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    machine, paper = figures["machine"], figures["paper"]
    lines = [
        "# What writing costs",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['platform']}. "
        f"Data: {figures['data']}. Tokens: {figures['tokenizer']['file']}, sha256 "
        f"{figures['tokenizer']['sha256'][:12]}. Seed {figures['seed']}.",
        "",
        "| variant | calls per user | prompt tokens | of them reusable | response tokens | seconds per user | engine | "
        "device |",
        "|---|---:|---:|---:|---:|---:|---|---|",
        *(_row(row) for row in figures["rows"]),
        "",
        "Tokens are means over the calls, without those that a server puts around a text. Reusable is the fixed text "
        "with which all prompts of a kind begin. "
        f"Response tokens of rows without a writer are stated, {figures['stated_response_tokens']}; those of the "
        "statistical writer, which is no LLM and reads no tokens, are counted in its texts. Its calls ran one after "
        "the other in one thread"
        + "".join(
            f"; {NAMES[row['variant']]} took {row['cpu_seconds_per_user']:.3g} processor seconds per user"
            for row in figures["rows"]
            if row["engine"] == STATISTICAL
        )
        + ".",
        "",
        *_told_of_counting(figures["prompts"]),
        "",
        f"## The paper ({paper['source']}; {paper['writer']}, hardware {paper['hardware']})",
        "",
        *_paper_table(figures),
        "",
        "The paper does not say whether its tokens per prompt hold the answer; the prompts of this run come near them "
        "only together with one. 81,140 samples of 911 users make 89.067 calls each; the paper's 89.06 is this, cut.",
    ]
    if figures["ratios"]:
        lines += ["", "## Figures", "", "| figure | value | target | |", "|---|---:|---:|---|"]
        lines += [
            f"| {each['figure']} | {each['value']:.4g} | {each['target']} | {'met' if each['met'] else 'missed'} |"
            for each in figures["ratios"]
        ]
    lines += [
        "",
        "## Computed, not measured",
        "",
        "Llama-2-13B, bf16 weights and cache, as many calls together as the memory holds, bandwidth and arithmetic of "
        "the data sheet used in full, nothing of a prompt reused. No engine is faster without quantization or reuse.",
        "",
        "| variant | seconds per user | GPU |",
        "|---|---:|---|",
        *(
            f"| {NAMES[row['variant']]} | {row['seconds_per_user']:.3g} | {row['device']} |"
            for row in figures["computed"]
        ),
    ]
    lines += _generation_table(figures["generation"])
    return "\n".join(lines) + "\n"


def _row(row: Row) -> str:
    seconds = row["seconds_per_user"]
    return (
        f"| {NAMES[row['variant']]} | {row['calls_per_user']:.2f} | {row['prompt_tokens_per_call']:.1f} | "
        f"{row['prefix_tokens_per_call']:.1f} | {row['response_tokens_per_call']:.1f} | "
        f"{'' if seconds is None else f'{seconds:.3g}'} | {row['engine']} | {row['device'] or ''} |"
    )


def _told_of_counting(prompts: Sequence[Row]) -> Iterator[str]:
    for row in prompts:
        counted = "all" if row["complete"] else f"{row['counted']:,} drawn"
        yield (
            f"- {NAMES[row['variant']]}: {row['summaries']:,} summaries and {row['shifts']:,} shifts of "
            f"{row['users']:,} users. Of {counted} summary prompts, the median is {row['p50']:.0f} tokens, 99% are "
            f"within {row['p99']:.0f}, the longest is {row['longest']:,}; {row['over_limit']:,} are over the limit of "
            f"{row['limit']:,}."
        )


def _paper_table(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "| variant | calls per user | tokens per prompt | here: prompt + stated response | seconds per user |"
    yield "|---|---:|---:|---:|---:|"
    here = {row["variant"]: row for row in figures["rows"] if row["response"] == "stated"}
    for row in figures["paper"]["rows"]:
        own = here.get(row["variant"])
        both = f"{own['prompt_tokens_per_call'] + own['response_tokens_per_call']:.1f}" if own else ""
        yield (
            f"| {NAMES[row['variant']]} | {row['calls_per_user']:.2f} | {row['tokens_per_prompt']:.1f} | {both} | "
            f"{row['seconds_per_user']:.1f} |"
        )


def _generation_table(generation: Mapping[str, Any] | None) -> Iterator[str]:
    yield ""
    yield "## Generation on a GPU"
    yield ""
    if generation is None:
        yield "Not measured: this run had no GPU (`--device cuda`)."
        return
    speed = generation["speed"]
    yield (
        f"{generation['device']}, {generation['engine']}, {generation['dtype']}, random weights of "
        f"{generation['weights_gib']:.1f} GiB. A copy moves {speed['copy_bytes_per_second'] / 1e12:.2f} TB/s, a matrix "
        f"product does {speed['gemm_flops'] / 1e12:.0f} TFLOP/s; the last column is the time as a multiple of the "
        "least that these two allow."
    )
    yield ""
    yield "| variant | batch | prompt tokens | seconds | of them reading | response tokens/s | GiB | times least |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in generation["rows"]:
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"
        yield (
            f"| {NAMES[row['variant']]} | {row['batch_size']} | {row['prompt_tokens']:,} | {row['seconds']:.2f} | "
            f"{row['reading_seconds']:.2f} | {row['response_tokens_per_second']:,.0f} | {memory} | "
            f"{row['times_least']:.2f} |"
        )
    for note in generation["notes"]:
        yield ""
        yield f"- {note}"
