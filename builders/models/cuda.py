"""DIEN on a GPU: its recurrences as one kernel each, and a ranker's whole forward as one CUDA graph.

A recurrence of T steps is a dozen small kernels for each step in PyTorch, so that a GPU spends its time starting them.
Here it is one (`builders.models.cuda_kernels`); a CUDA graph starts all kernels of a forward at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.models.backbone import Ranker
from builders.models.dien import DIEN
from builders.models.features import Features
from builders.models.layers import AUGRU, GRU, gather_users, masked_softmax
from liber_runtime.exceptions import ConfigurationError

Precision: TypeAlias = Literal["tf32x3", "ieee", "tf32", "bf16", "fp16"]
"""Of the product of states and weights; sums and states are float32. ``tf32x3`` makes up float32 of three products on
tensor cores, ``ieee`` multiplies in float32 beside them, which is what GPUs before Ampere can. The weights have to fit
into a processor's shared memory: with H = 64 they take 104 KiB as ``tf32x3``, half as ``tf32``, 30 KiB as halves."""

_BLOCK_ROWS = 16
"""Rows of a program: the least that tensor cores take, so that 1000 rows are spread over many processors."""

_WARPS = 4
_LARGEST = 2**31


def gru(inputs: Tensor, recurrent_weight: Tensor, *, precision: Precision = "tf32x3") -> Tensor:
    """Every state of a GRU, see `builders.models.layers.GRU`.

    Args:
        inputs: float[T, U, 3H], mapped for the gates update, reset, candidate, their biases in them.
        recurrent_weight: float[3H, H].
        precision: see `Precision`.

    Returns:
        float32[T, U, H].

    Raises:
        ConfigurationError: the package triton is not installed.
        ValueError: shapes do not fit, tensors are too large, or not on a GPU.
    """
    steps, users, size = inputs.shape[0], inputs.shape[1], recurrent_weight.shape[1]
    out = torch.empty(steps, users, size, device=inputs.device)
    _recur(inputs, None, recurrent_weight, None, out, users, precision)
    return out


def augru(
    inputs: Tensor,
    attention: Tensor,
    recurrent_weight: Tensor,
    user_index: Tensor | None = None,
    *,
    precision: Precision = "tf32x3",
) -> Tensor:
    """The last state of an AUGRU, see `builders.models.layers.AUGRU`; where attention is 0 the state stays.

    Args:
        inputs: as of `gru`.
        attention: float[T, N].
        recurrent_weight: float[3H, H].
        user_index: int[N], or None if N = U in order.
        precision: see `Precision`.

    Returns:
        float32[N, H].

    Raises:
        ConfigurationError: see `gru`.
        ValueError: see `gru`.
    """
    rows = attention.shape[1]
    out = torch.empty(rows, recurrent_weight.shape[1], device=inputs.device)
    if attention.shape[0] != inputs.shape[0] or (user_index is None and rows != inputs.shape[1]):
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}, the inputs {tuple(inputs.shape)}; they have the steps in "
            "common, and without a user_index the rows"
        )
    _recur(inputs, attention, recurrent_weight, user_index, out, rows, precision)
    return out


def _recur(
    inputs: Tensor,
    attention: Tensor | None,
    recurrent_weight: Tensor,
    user_index: Tensor | None,
    out: Tensor,
    rows: int,
    precision: Precision,
) -> None:
    steps, users, width = inputs.shape
    size = recurrent_weight.shape[1]
    if width != 3 * size or recurrent_weight.shape[0] != width:
        raise ValueError(
            f"inputs of width {width} do not go with weights {tuple(recurrent_weight.shape)}: 3H and 3H, H"
        )
    if max(inputs.numel(), out.numel(), steps * rows) >= _LARGEST:
        raise ValueError(
            f"{steps} steps of {users} users and {rows} rows are more than the kernel can count; split them"
        )
    kernels = load_kernels()
    if not (inputs.is_cuda or is_interpreted(kernels)):
        raise ValueError(f"inputs are on {inputs.device}; the kernel runs on a GPU, or with TRITON_INTERPRET=1")
    if not rows:
        return
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    inputs = inputs.contiguous()
    with torch.cuda.device_of(inputs):  # type: ignore[no-untyped-call]
        kernels.recur[(-(-rows // _BLOCK_ROWS),)](
            inputs,
            inputs if attention is None else attention.contiguous(),
            inputs if user_index is None else user_index.contiguous(),
            recurrent_weight.to(kind).contiguous(),
            out,
            steps,
            rows,
            users,
            SIZE=size,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_SIZE=max(16, 1 << (size - 1).bit_length()),
            IS_ATTENDED=attention is not None,
            IS_FOLDED=user_index is not None,
            PRECISION="ieee" if precision in ("bf16", "fp16") else precision,
            num_warps=_WARPS,
        )


def load_kernels() -> ModuleType:
    """The compiled language's side, imported when it is first needed.

    Raises:
        ConfigurationError: the package triton is not installed.
    """
    try:
        return importlib.import_module("builders.models.cuda_kernels")
    except ImportError as error:
        raise ConfigurationError(
            f"the fused kernel needs the package triton ({error}); pip install 'liber-runtime[gpu]'"
        ) from None


def is_interpreted(kernels: ModuleType) -> bool:
    """Whether the kernel is interpreted on the CPU (TRITON_INTERPRET=1 when it was imported), to check what it does."""
    return type(kernels.recur).__name__ == "InterpretedFunction"


class FusedDIEN(nn.Module):
    """A trained `DIEN` with its recurrences as one kernel each; for scoring alone, without gradients.

    Args:
        backbone: what it computes; its weights are read once.
        precision: see `Precision`.
    """

    extractor: Tensor
    extractor_bias: Tensor
    evolution: Tensor
    evolution_bias: Tensor

    def __init__(self, backbone: DIEN, precision: Precision = "tf32x3") -> None:
        super().__init__()
        self.backbone = backbone
        self.precision = precision
        for name, layer in (("extractor", backbone.extractor), ("evolution", backbone.evolution)):
            weight, bias = _input_weights(layer)
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_bias", bias)

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]; see `DIEN.forward`."""
        model, user_index, mask = self.backbone, features.user_index, features.history_mask
        item = features.candidate.flatten(1)
        projected = functional.linear(features.history, self.extractor, self.extractor_bias)
        states = gru(projected, model.extractor.recurrent.weight, precision=self.precision)
        scores = model.attention(model.query(item), states, user_index)
        attention = masked_softmax(scores, gather_users(mask, user_index, dim=1), dim=0)
        projected = functional.linear(states, self.evolution, self.evolution_bias)
        weight = model.evolution.recurrent.weight
        evolved = augru(projected, attention, weight, user_index, precision=self.precision)
        valid = mask.unsqueeze(-1).to(states.dtype)
        history = (features.history * valid).sum(0) / valid.sum(0).clamp(min=1)
        match = item * gather_users(model.taste(history), user_index)
        candidate = torch.cat((item, match, features.pair.flatten(1), features.numbers, evolved), dim=1)
        logits: Tensor = model.mlp(features.user.flatten(1), candidate, user_index)
        return logits


def _input_weights(layer: GRU | AUGRU) -> tuple[Tensor, Tensor]:
    weight = torch.cat((layer.gates_input.weight, layer.candidate_input.weight))
    bias = torch.cat((layer.gates_input.bias, layer.candidate_input.bias))
    return weight.detach().clone(), bias.detach().clone()


def fuse(ranker: Ranker, precision: Precision = "tf32x3") -> Ranker:
    """The same ranker with a `FusedDIEN`; it shares all other weights.

    Raises:
        ConfigurationError: its backbone is not a DIEN.
    """
    if not isinstance(ranker.backbone, DIEN):
        raise ConfigurationError(f"there is a fused kernel for DIEN, not for {type(ranker.backbone).__name__}")
    return Ranker(ranker.features, FusedDIEN(ranker.backbone, precision), ranker.fuser).eval()


def capture(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` as one CUDA graph: what it starts on the GPU is recorded once, and started as a whole from then on.

    Args:
        call: reads tensors on the GPU that stay where they are; write other values into them before the next call.
            Depends on nothing else that changes, and waits for nothing.

    Returns:
        Does the same; the tensor it returns is written over by the next call.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        # Kernels are compiled and libraries make their workspaces, which a recording cannot take.
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
