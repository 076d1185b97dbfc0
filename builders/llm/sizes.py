"""How much GPU memory and disk an engine takes, by arithmetic, before anything is loaded.

On each GPU: its share of the weights; a workspace (CUDA's own, and the activations of one pass of `max_num_tokens`
tokens); and the KV cache, of which TensorRT-LLM takes `CACHE_FRACTION` of what is left. The cache is paged: a sequence
holds blocks for the tokens it has, so that short ones leave room for more.
"""

from __future__ import annotations

import dataclasses
import math

from builders.llm.checkpoint import LlamaShape
from builders.llm.engines import AWQ_GROUP, EngineSettings

GIB = 1 << 30

CACHE_FRACTION = 0.9
"""Of the memory that is free once an engine is loaded."""

_CONTEXT = 3 * GIB // 2
"""CUDA's context, kernels and NCCL; an estimate, on the high side."""

_WEIGHT_BYTES = {"fp16": 2.0, "fp8": 1.0, "int4-awq": 0.5 + 2 / AWQ_GROUP}
"""Of a weight in a block's linear layers; embedding, output layer and norms stay fp16. AWQ adds a scale for a group."""


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """Bytes, on each GPU unless said otherwise.

    Attributes:
        weights: of the model.
        workspace: beside weights and cache.
        token: KV cache of one token.
        sequence: KV cache of one sequence of `max_seq_len` tokens.
        batch: most sequences in flight.
        calibration: while weights are quantized, over all GPUs together: the model in fp16. 0 where they are not.
        disk: of the TensorRT-LLM checkpoint over all ranks, and of the engine again.
    """

    weights: int
    workspace: int
    token: int
    sequence: int
    batch: int
    calibration: int
    disk: int

    @property
    def least(self) -> int:
        """What must be free for the engine to load and answer the longest request."""
        return self.weights + self.workspace + math.ceil(self.sequence / CACHE_FRACTION)

    @property
    def full(self) -> int:
        """What `batch` of the longest requests take at once."""
        return self.weights + self.workspace + math.ceil(self.batch * self.sequence / CACHE_FRACTION)

    def cached_tokens(self, free: int) -> int:
        """Tokens that the KV cache holds on GPUs with `free` bytes each."""
        return max(0, int((free - self.weights - self.workspace) * CACHE_FRACTION)) // self.token


def sizes_of(shape: LlamaShape, settings: EngineSettings) -> EngineSizes:
    """The sizes of an engine.

    Args:
        shape: of the model.
        settings: of the engine.
    """
    tp = settings.tp
    # Each rank has the whole embedding (it is not split unless asked), and its columns of the output layer.
    whole = 2 * (shape.embedding_weights + shape.norm_weights)
    split = int(shape.block_weights * _WEIGHT_BYTES[settings.quantization]) + 2 * shape.embedding_weights
    weights = whole + split // tp
    # Residual stream, attention's input and output, and the three products of an MLP, in fp16.
    activations = 2 * settings.max_num_tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size // tp)
    token = 2 * shape.layers * shape.key_value_heads * shape.head_size * settings.cache_bytes // tp
    return EngineSizes(
        weights=weights,
        workspace=_CONTEXT + activations,
        token=token,
        sequence=token * settings.max_seq_len,
        batch=settings.max_batch_size,
        calibration=0 if settings.quantization == "fp16" else int(2.2 * shape.parameters) + 4 * GIB,
        disk=weights * tp,
    )


def gib(size: float) -> str:
    """Bytes as ``12.3 GiB``."""
    return f"{size / GIB:.1f} GiB"
