"""``liber cost``: what writing takes for so many behaviors, by writer."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table

from liber_runtime.cli.application import application, output
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.writers.costing import (
    Estimate,
    Workload,
    estimate_endpoint,
    estimate_gpus,
    estimate_statistical,
)
from liber_runtime.writers.pricing import Price

_MILLION = 1e6


@application.command()
def cost(
    behaviors: Annotated[float, typer.Option("--behaviors", help="How many arrive, e.g. 1e9.")],
    days: Annotated[float, typer.Option("--days", help="In how many days they arrive.")] = 30.0,
    partition: Annotated[int, typer.Option("--partition", help="Behaviors in a partition.")] = 20,
    users: Annotated[
        float, typer.Option("--users", help="Users whose first partition is among them: it has no shift.")
    ] = 0.0,
    prompt_tokens: Annotated[
        float | None,
        typer.Option("--prompt-tokens", help="Of a prompt, a mean. [default: as measured on MovieLens-100K]"),
    ] = None,
    response_tokens: Annotated[float, typer.Option("--response-tokens", help="Of an answer, a mean.")] = 450.0,
    prompt_price: Annotated[
        float | None, typer.Option("--prompt-price", help="An endpoint's, for a million prompt tokens.")
    ] = None,
    response_price: Annotated[
        float | None, typer.Option("--response-price", help="An endpoint's, for a million response tokens.")
    ] = None,
    prefix_discount: Annotated[
        float,
        typer.Option("--prefix-discount", help="Share of the price not asked for prompt tokens it has read before."),
    ] = 0.0,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-second",
            help="Response tokens that one of your GPUs writes with many calls in flight, reading included.",
        ),
    ] = None,
    gpu_price: Annotated[float | None, typer.Option("--gpu-price", help="Of an hour of one GPU.")] = None,
    cpu_price: Annotated[float | None, typer.Option("--cpu-price", help="Of an hour of one processor.")] = None,
    currency: Annotated[str, typer.Option("--currency", help="Of all prices.")] = "USD",
    dimension: Annotated[int, typer.Option("--dimension", help="Size of a partition's vector.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate calls, tokens, cost, machines and space for so many behaviors, by writer.

    No price is known here: those of an endpoint's list, of a GPU or of a processor have to be given.
    """
    workload = Workload(behaviors, days, partition, users, response_tokens, prompt_tokens)
    estimates = [
        estimate_statistical(workload, cpu_price),
        estimate_endpoint(workload, _price(prompt_price, response_price, currency), prefix_discount),
        estimate_gpus(workload, tokens_per_second, gpu_price),
    ]
    if gpu_price is not None and tokens_per_second is None:
        raise InvalidInputError("--gpu-price alone says nothing; give --tokens-per-second of such a GPU too")
    described = describe(workload, estimates, currency, dimension)
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        _show(workload, estimates, currency, dimension)


def describe(workload: Workload, estimates: list[Estimate], currency: str, dimension: int) -> dict[str, object]:
    """The estimates as JSON."""
    return {
        "behaviors": workload.behaviors,
        "days": workload.days,
        "partition": workload.partition,
        "users": workload.users,
        "summaries": workload.summaries,
        "shifts": workload.shifts,
        "calls": workload.calls,
        "calls_per_second": workload.calls / workload.seconds,
        "prompt_tokens": workload.read,
        "reusable_prompt_tokens": workload.reusable,
        "response_tokens": workload.written,
        "text_bytes": workload.text_bytes,
        "vector_bytes": workload.vector_bytes(dimension),
        "currency": currency,
        "writers": [
            {**dataclasses.asdict(each), "cost_per_million_behaviors": _per_million(each.cost, workload)}
            for each in estimates
        ],
    }


def _price(prompt: float | None, response: float | None, currency: str) -> Price | None:
    if prompt is None and response is None:
        return None
    if prompt is None or response is None:
        given, needed = (
            ("--response-price", "--prompt-price") if prompt is None else ("--prompt-price", "--response-price")
        )
        raise InvalidInputError(f"{given} alone is half a price; give {needed} too, 0 if it is free")
    return Price(prompt, response, currency)


def _per_million(cost: float | None, workload: Workload) -> float | None:
    return None if cost is None else cost / workload.behaviors * _MILLION


_OPTIONS = {
    "statistical": ("", "--cpu-price"),
    "endpoint": ("--prompt-price and --response-price", ""),
    "gpu": ("--tokens-per-second", "--gpu-price"),
}
"""What has to be given for a writer's estimate, and then for its cost."""


def _show(workload: Workload, estimates: list[Estimate], currency: str, dimension: int) -> None:
    calls, per_second = workload.calls, workload.calls / workload.seconds
    lines = [
        f"{workload.behaviors:,.0f} behaviors in {workload.days:g} days, "
        f"{workload.behaviors / workload.seconds:,.3g} a second, {workload.partition} in a partition",
        f"calls: {calls:,.0f} ({workload.summaries:,.0f} summaries, {workload.shifts:,.0f} shifts), "
        f"{per_second:,.3g} a second",
        f"tokens: {workload.read:,.0f} read ({workload.read / calls:,.0f} a call, {workload.reusable / calls:,.0f} of "
        f"them the same each time), {workload.written:,.0f} written ({workload.response_tokens:,.0f} a call)",
        f"space: texts {_space(workload.text_bytes)}, vectors {_space(workload.vector_bytes(dimension))}",
    ]
    for line in lines:
        output.print(line, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("writer")
    for name in (f"{currency} per million behaviors", f"{currency} in all", "machines", "hours of them"):
        table.add_column(name, justify="right")
    table.add_column("")
    for each in estimates:
        table.add_row(
            each.writer,
            _money(_per_million(each.cost, workload)),
            _money(each.cost),
            "" if each.machines is None else f"{each.machines:,}",
            "" if each.machine_hours is None else f"{each.machine_hours:,.1f}",
            _note(each, currency),
        )
    output.print(table)


def _note(estimate: Estimate, currency: str) -> str:
    if estimate.cost_held is not None:
        return f"{_money(estimate.cost_held)} {currency} if held all the time"
    if not estimate.missing:
        return ""
    estimating, pricing = _OPTIONS[estimate.writer]
    option = pricing if estimate.machines is not None else estimating
    return f"give {option}: {estimate.missing}"


def _money(cost: float | None) -> str:
    return "" if cost is None else f"{cost:,.2f}"


def _space(size: float) -> str:
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= step:
            return f"{size / step:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"
