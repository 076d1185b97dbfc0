"""What writing for many behaviors takes: calls, tokens, money, machines, space. Arithmetic alone, nothing is called."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from liber_runtime.exceptions import InvalidInputError
from liber_runtime.writers.pricing import Price

BYTES_PER_TOKEN = 4.0
"""Of the English of the prompts' fixed text, by Llama 2's tokenizer; answers are taken to be alike."""

STATISTICAL_SECONDS = 0.0002
"""Processor seconds of the statistical writer for a call under ``count(20)``, as `bench.llm_cost` measured them."""

LEAST, MOST = 1e-9, 1e15
"""Of any number that is given: beyond, nothing would be a figure."""

_HOUR = 3600.0
_VECTOR_BYTES = 4


@dataclass(frozen=True, slots=True)
class PromptSizes:
    """Tokens of the prompts of `liber_runtime.interest`, as `bench.llm_cost` counted them; means.

    Attributes:
        behavior: one line of a summary's history.
        summary: all else of a summary's prompt.
        shift: all of a shift's prompt but the two summaries.
        summary_prefix: what all summary prompts begin with, so that a server need not read it again.
        shift_prefix: the same of shifts.
    """

    behavior: float = 18.2
    summary: float = 153.0
    shift: float = 140.0
    summary_prefix: float = 125.0
    shift_prefix: float = 109.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What there is to write.

    A partition is worth one summary, and one shift if it is not its user's first. Behaviors that are still in a cache
    cost nothing yet, so with many users the true figures are lower.

    Attributes:
        behaviors: that arrive.
        days: in which they arrive, evenly.
        partition: behaviors in a partition.
        users: whose first partition is among them; 0 if they have one already.
        response_tokens: of an answer.
        prompt_tokens: of a prompt, a mean; None for what `sizes` say.
        sizes: of the prompts.

    Raises:
        InvalidInputError: a number that cannot be.
    """

    behaviors: float
    days: float = 30.0
    partition: int = 20
    users: float = 0.0
    response_tokens: float = 450.0
    prompt_tokens: float | None = None
    sizes: PromptSizes = PromptSizes()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                _check(field.name.replace("_", " "), value, 0.0 if field.name == "users" else LEAST)
        if self.users * self.partition > self.behaviors:
            raise InvalidInputError(
                f"{self.users:g} users with a first partition of {self.partition} have more than {self.behaviors:g} "
                "behaviors; count those users alone who fill one"
            )

    @property
    def seconds(self) -> float:
        """In which the behaviors arrive."""
        return self.days * 24 * _HOUR

    @property
    def summaries(self) -> float:
        """Calls."""
        return self.behaviors / self.partition

    @property
    def shifts(self) -> float:
        """Calls."""
        return self.summaries - self.users

    @property
    def calls(self) -> float:
        """Of both kinds."""
        return self.summaries + self.shifts

    @property
    def read(self) -> float:
        """Prompt tokens, all of them."""
        if self.prompt_tokens is not None:
            return self.calls * self.prompt_tokens
        summary = self.sizes.summary + self.partition * self.sizes.behavior
        return self.summaries * summary + self.shifts * (self.sizes.shift + 2 * self.response_tokens)

    @property
    def reusable(self) -> float:
        """Those prompt tokens that a server with a prefix cache has read before."""
        known = self.summaries * self.sizes.summary_prefix + self.shifts * self.sizes.shift_prefix
        return min(known, self.read)

    @property
    def written(self) -> float:
        """Response tokens, all of them."""
        return self.calls * self.response_tokens

    @property
    def text_bytes(self) -> float:
        """Of all answers, without what a store adds."""
        return self.written * BYTES_PER_TOKEN

    def vector_bytes(self, dimension: int) -> float:
        """Of all representations, float32[dimension] for a partition, without what a store adds.

        Raises:
            InvalidInputError: no size of a vector.
        """
        _check("dimension", dimension)
        return self.summaries * dimension * _VECTOR_BYTES


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one writer takes for a workload.

    Attributes:
        writer: statistical, endpoint or gpu.
        cost: of what is used; None if no price was given.
        machines: processors or GPUs that must run all the time; None for an endpoint.
        machine_hours: of them that are used; None for an endpoint.
        cost_held: of so many whole machines all the time; None if there is none or no price was given.
        missing: what has to be given for a cost; empty if nothing.
    """

    writer: str
    cost: float | None = None
    machines: int | None = None
    machine_hours: float | None = None
    cost_held: float | None = None
    missing: str = ""


def estimate_statistical(
    workload: Workload, hour_price: float | None = None, seconds_per_call: float = STATISTICAL_SECONDS
) -> Estimate:
    """The statistical writer, on processors at `hour_price` each."""
    busy = workload.calls * seconds_per_call
    return _estimate_machines("statistical", workload, busy, hour_price, "the price of a processor's hour")


def estimate_endpoint(workload: Workload, price: Price | None, prefix_discount: float = 0.0) -> Estimate:
    """An endpoint that is paid by the token.

    Args:
        workload: what there is to write.
        price: for a million tokens.
        prefix_discount: share of the price that is not asked for prompt tokens that it has read before.

    Raises:
        InvalidInputError: the discount is no share.
    """
    if not 0.0 <= prefix_discount <= 1.0:
        raise InvalidInputError(f"the discount of the prefix is {prefix_discount:g}; give a share from 0 to 1")
    if price is None:
        return Estimate("endpoint", missing="the prices of a million prompt and response tokens")
    return Estimate("endpoint", price.of(workload.read - prefix_discount * workload.reusable, workload.written))


def estimate_gpus(workload: Workload, tokens_per_second: float | None, hour_price: float | None = None) -> Estimate:
    """Own GPUs.

    Args:
        workload: what there is to write.
        tokens_per_second: response tokens that one GPU writes, with many calls in flight, the reading of their prompts
            included; None if nobody measured it.
        hour_price: of one GPU.

    Raises:
        InvalidInputError: a number that cannot be.
    """
    if tokens_per_second is None:
        return Estimate("gpu", missing="the response tokens that a GPU writes in a second")
    _check("response tokens per second", tokens_per_second)
    return _estimate_machines(
        "gpu", workload, workload.written / tokens_per_second, hour_price, "the price of a GPU's hour"
    )


def _estimate_machines(
    writer: str, workload: Workload, busy_seconds: float, hour_price: float | None, missing: str
) -> Estimate:
    machines = max(1, math.ceil(busy_seconds / workload.seconds))
    hours = busy_seconds / _HOUR
    if hour_price is None:
        return Estimate(writer, None, machines, hours, None, missing)
    _check("price of an hour", hour_price, 0.0)
    return Estimate(writer, hours * hour_price, machines, hours, machines * workload.days * 24 * hour_price)


def _check(name: str, value: float, at_least: float = LEAST) -> None:
    if not at_least <= value <= MOST:
        raise InvalidInputError(f"{name} {value:g} cannot be; give a number from {at_least:g} to {MOST:g}")
