"""What an LLM's tokens cost."""

from __future__ import annotations

from dataclasses import dataclass

from liber_runtime.exceptions import ConfigurationError


@dataclass(frozen=True, slots=True)
class Price:
    """A price list of two entries.

    Attributes:
        prompt: for a million tokens read.
        response: for a million tokens written.
        currency: in which; a label of the metric ``liber_writer_cost_total``.

    Raises:
        ConfigurationError: a price below 0.
    """

    prompt: float
    response: float
    currency: str = "USD"

    def __post_init__(self) -> None:
        for name, price in (("prompt", self.prompt), ("response", self.response)):
            if not 0.0 <= price < float("inf"):
                raise ConfigurationError(f"the price of {name} tokens is {price}; give {self.currency} per million")

    def of(self, prompt_tokens: float, response_tokens: float) -> float:
        """What so many tokens cost, in `currency`."""
        return (prompt_tokens * self.prompt + response_tokens * self.response) / 1e6
