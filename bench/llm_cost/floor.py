"""The least time in which a GPU can read prompts and write answers: what bandwidth and arithmetic allow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from liber_runtime.exceptions import ConfigurationError

BYTES_PER_NUMBER = 2
"""bf16, of weights and of keys and values."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder of the Llama architecture.

    Attributes:
        layers: how many.
        hidden: size of a token's vector.
        intermediate: inner size of the feed-forward layers.
        heads: of the attention.
        key_value_heads: how many of them have keys and values of their own.
        vocabulary: tokens it knows.
        positions: most tokens of prompt and answer.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32_000
    positions: int = 4096

    @property
    def multiplied(self) -> int:
        """Weights that each token is multiplied with: all but the table of input vectors and the norms."""
        key_value = self.hidden // self.heads * self.key_value_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * key_value
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        """Of all weights but the norms."""
        return BYTES_PER_NUMBER * (self.multiplied + self.hidden * self.vocabulary)

    @property
    def cached_bytes(self) -> int:
        """Of the keys and values of one token."""
        return BYTES_PER_NUMBER * 2 * self.layers * (self.hidden // self.heads) * self.key_value_heads


LLAMA2_13B = Shape(layers=40, hidden=5120, intermediate=13_824, heads=40, key_value_heads=40)
"""https://huggingface.co/meta-llama/Llama-2-13b-hf, config.json."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a GPU can do at most.

    Attributes:
        bytes_per_second: read from its memory.
        flops: multiplications and additions in bf16, each counted, a second.
        name: of the GPU.
        memory_bytes: what it has; 0 if it does not matter.
    """

    bytes_per_second: float
    flops: float
    name: str = ""
    memory_bytes: float = 0.0


H200 = Speed(4.8e12, 989e12, "NVIDIA H200, data sheet", 141e9)
"""https://www.nvidia.com/en-us/data-center/h200/ (dense bf16)."""


def least_seconds(lengths: npt.NDArray[np.int64], response_tokens: int, shape: Shape, speed: Speed) -> float:
    """The least time for one batch.

    Reading prompts takes their arithmetic. Writing takes, for each token of an answer, all weights once for the whole
    batch and the keys and values of all tokens so far. Nothing of prompts is used again.

    Args:
        lengths: int64[B], tokens of the prompts.
        response_tokens: of each answer.
        shape: of the LLM.
        speed: of the GPU.
    """
    read = 2 * shape.multiplied * float(lengths.sum()) / speed.flops
    steps = response_tokens
    cached = steps * float(lengths.sum()) + len(lengths) * steps * (steps - 1) / 2
    moved = steps * BYTES_PER_NUMBER * shape.multiplied + cached * shape.cached_bytes
    return read + moved / speed.bytes_per_second


def largest_batch(lengths: npt.NDArray[np.int64], response_tokens: int, shape: Shape, speed: Speed) -> int:
    """How many calls of average length the GPU's memory holds beside the weights.

    Raises:
        ConfigurationError: not even one.
    """
    free = speed.memory_bytes - shape.weight_bytes
    batch = int(free / (shape.cached_bytes * (float(lengths.mean()) + response_tokens)))
    if batch < 1:
        raise ConfigurationError(
            f"{speed.name or 'this GPU'} has {speed.memory_bytes / 1e9:.0f} GB; the weights alone take "
            f"{shape.weight_bytes / 1e9:.0f} GB"
        )
    return batch


def least_seconds_per_call(
    lengths: npt.NDArray[np.int64], response_tokens: int, shape: Shape = LLAMA2_13B, speed: Speed = H200
) -> float:
    """The least time of one call among as many as the memory holds; `lengths` int64[n] of all calls.

    Raises:
        ConfigurationError: the memory holds no call.
    """
    batch = largest_batch(lengths, response_tokens, shape, speed)
    alike = np.full(batch, round(float(lengths.mean())), dtype=np.int64)
    return least_seconds(alike, response_tokens, shape, speed) / batch
