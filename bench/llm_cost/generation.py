"""How fast a GPU generates with an LLM's true shape: random weights, real lengths of prompts, answers of stated length.

The time of a token depends on shapes alone, not on what the weights are, so no checkpoint is needed. The engine is
PyTorch with transformers: one batch of prompts at a time, padded to the longest, keys and values in a cache of fixed
size, and no answer ends early. A serving engine (TensorRT-LLM, vLLM) fills free places at once and wastes no padding.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

from bench.llm_cost.floor import LLAMA2_13B, Shape, Speed, least_seconds
from liber_runtime.exceptions import ConfigurationError, LiberError

ENGINE = "torch-transformers"

BATCH_SIZES = (1, 16, 64, 96, 128, 192, 256)
"""Tried in this order, until the memory is full."""

_ROUNDING = 16
"""Lengths are padded to a multiple: what attention kernels like."""

Lengths = npt.NDArray[np.int64]


def measure_generation(
    lengths: Mapping[str, Lengths],
    response_tokens: int,
    *,
    device: str = "cuda",
    shape: Shape = LLAMA2_13B,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 1,
    copied_bytes: int = 2**31,
    gemm: int = 8192,
) -> dict[str, Any]:
    """Generates one batch of each size for each variant.

    Args:
        lengths: by variant, int64[n], prompt tokens of its calls; a batch is drawn from them.
        response_tokens: of every answer.
        device: a CUDA device; ``cpu`` for tiny shapes, to see that it works.
        shape: of the LLM.
        batch_sizes: ascending.
        seed: of weights, tokens and draws.
        copied_bytes: of the buffer that the bandwidth is measured with.
        gemm: rows of the square matrices that the arithmetic is measured with.

    Returns:
        ``engine``, ``device``, ``rows`` with a row for each variant and batch size, ``speed``, ``notes``.

    Raises:
        ConfigurationError: there is no such device, or not even the weights fit.
        LiberError: the engine wrote another number of tokens than asked for.
    """
    place = find_device(device)
    longest = max(int(each.max()) for each in lengths.values()) + response_tokens + _ROUNDING
    if longest > shape.positions:
        raise ConfigurationError(
            f"the longest prompt and its answer take {longest} tokens and the LLM has {shape.positions}; "
            "ask for shorter answers"
        )
    speed = measure_speed(place, copied_bytes, gemm)
    model = _make_model(shape, place, seed)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with torch.inference_mode():
        _generate(model, _draw_batch(next(iter(lengths.values())), 1, shape, 4, seed), 4, place)
        for variant, drawn_from in lengths.items():
            for size in batch_sizes:
                try:
                    row = _measure_batch(model, drawn_from, size, response_tokens, shape, place, seed, speed)
                except torch.cuda.OutOfMemoryError:
                    notes.append(f"{variant}: a batch of {size} does not fit into the memory")
                    break
                rows.append({"variant": variant, **row})
                _free(place)
            _free(place)
    return {
        "engine": ENGINE,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "dtype": "bfloat16",
        "weights_gib": round(sum(each.numel() * each.element_size() for each in model.parameters()) / 2**30, 3),
        "speed": {"copy_bytes_per_second": speed.bytes_per_second, "gemm_flops": speed.flops},
        "rows": rows,
        "notes": notes,
    }


def parse_sizes(text: str) -> Sequence[int]:
    """Batch sizes from a list like ``1,16,64``.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise ConfigurationError(f"--batch-sizes {text!r} is no list of sizes; give e.g. 1,16,64")
    return sizes


def fastest(rows: Sequence[Mapping[str, Any]], variant: str) -> Mapping[str, Any] | None:
    """The batch size of a variant with the least time per call; None if none was measured."""
    return min(
        (row for row in rows if row["variant"] == variant), key=lambda row: row["seconds_per_call"], default=None
    )


def measure_speed(device: torch.device, copied_bytes: int, gemm: int) -> Speed:
    """What the device really does: bytes read and written by the fastest of ten copies, FLOP/s of ten products."""
    speed = Speed(2 * copied_bytes / _copy_seconds(device, copied_bytes), 2 * gemm**3 / _gemm_seconds(device, gemm))
    _free(device)
    return speed


def _copy_seconds(device: torch.device, copied_bytes: int) -> float:
    source = torch.empty(copied_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return min(_timed(lambda: target.copy_(source), device) for _ in range(10))


def _gemm_seconds(device: torch.device, gemm: int) -> float:
    left, right = (torch.randn(gemm, gemm, device=device, dtype=torch.bfloat16) for _ in range(2))
    return min(_timed(lambda: left @ right, device) for _ in range(10))


def find_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigurationError: torch sees none.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"--device {device}: torch sees no CUDA device (torch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda or 'none'}); install a torch built for CUDA on a machine with a GPU, or leave it out"
        )
    return torch.device(device)


def _make_model(shape: Shape, device: torch.device, seed: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.positions,
    )
    torch.manual_seed(seed)
    try:
        with _default_dtype(torch.bfloat16), device:
            model: Any = transformers.LlamaForCausalLM(config)
    except torch.cuda.OutOfMemoryError:
        raise ConfigurationError(
            f"the weights take {shape.weight_bytes / 1e9:.0f} GB and do not fit into the memory of {device}; use a "
            "larger GPU, or one that nothing else uses"
        ) from None
    model.eval()
    # No answer ends early.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _measure_batch(
    model: Any,
    drawn_from: Lengths,
    size: int,
    response_tokens: int,
    shape: Shape,
    device: torch.device,
    seed: int,
    speed: Speed,
) -> dict[str, Any]:
    """One batch: all of it, and once more up to the first token alone, which is the time of reading the prompts."""
    batch = _draw_batch(drawn_from, size, shape, response_tokens, seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reading = _timed(lambda: _generate(model, batch, 1, device), device)
    seconds = _timed(lambda: _generate(model, batch, response_tokens, device), device)
    lengths = batch[1].sum(dim=1).numpy()
    least = least_seconds(lengths, response_tokens, shape, speed)
    return {
        "batch_size": size,
        "prompt_tokens": int(lengths.sum()),
        "padded_tokens": batch[0].numel(),
        "response_tokens": response_tokens * size,
        "seconds": round(seconds, 4),
        "reading_seconds": round(reading, 4),
        "seconds_per_call": seconds / size,
        "response_tokens_per_second": round(response_tokens * size / seconds, 2),
        "least_seconds": round(least, 6),
        "times_least": round(seconds / least, 3),
        "memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None,
    }


def _draw_batch(drawn_from: Lengths, size: int, shape: Shape, response_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """int64[B, T] random tokens and int64[B, T] where there are any, padded before the first."""
    draw = np.random.default_rng(seed)
    lengths = draw.choice(drawn_from, size)
    total = -(-(int(lengths.max()) + response_tokens) // _ROUNDING) * _ROUNDING
    width = total - response_tokens
    there = np.arange(width) >= width - lengths[:, None]
    tokens = np.where(there, draw.integers(3, shape.vocabulary, size=there.shape), 0)
    return torch.from_numpy(tokens), torch.from_numpy(there.astype(np.int64))


def _generate(model: Any, batch: tuple[Tensor, Tensor], response_tokens: int, device: torch.device) -> None:
    tokens, there = (each.to(device) for each in batch)
    # Of this batch's own size: one that generate makes is as long as the longest so far.
    cache = transformers.StaticCache(config=model.config, max_cache_len=tokens.shape[1] + response_tokens)
    made = model.generate(
        tokens,
        attention_mask=there,
        past_key_values=cache,
        max_new_tokens=response_tokens,
        min_new_tokens=response_tokens,
        do_sample=False,
        # Compiling takes minutes for each size of a batch; large batches keep a GPU busy without it.
        disable_compile=True,
    )
    written = made.shape[1] - tokens.shape[1]
    if written != response_tokens:
        raise LiberError(f"the engine wrote {written} tokens instead of {response_tokens}; nothing is timed")


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
