"""Exports the fuser and the backbones to ONNX, with dynamic sizes, and checks what was written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from builders.models.backbone import Backbone, ItemEmbedding
from builders.models.fuser import AttentionFuser
from liber_runtime.exceptions import ConfigurationError

TOLERANCE = 1e-5
"""Largest difference allowed between the exported graph and PyTorch, absolute, on outputs of order one."""

_USERS, _CANDIDATES, _PARTITIONS = "users", "candidates", "partitions"
_BACKBONE_AXES: dict[str, dict[int, str]] = {
    "item_index": {0: _CANDIDATES},
    "user_index": {0: _CANDIDATES},
    "history_item": {0: _USERS},
    "history_feedback": {0: _USERS},
    "history_length": {0: _USERS},
    "profile": {0: _USERS},
    "interest": {0: _USERS},
}
_FUSER_AXES = {"representations": {0: _USERS, 1: _PARTITIONS}, "partition_mask": {0: _USERS, 1: _PARTITIONS}}


class _Scorer(nn.Module):
    """The served face of a backbone: probabilities, not logits."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        item_index: Tensor,
        user_index: Tensor,
        history_item: Tensor,
        history_feedback: Tensor,
        history_length: Tensor,
        profile: Tensor,
        interest: Tensor | None = None,
    ) -> Tensor:
        logits: Tensor = self.backbone(
            item_index, user_index, history_item, history_feedback, history_length, profile, interest
        )
        return logits.sigmoid()


def export_fuser(fuser: AttentionFuser, path: Path) -> None:
    """Writes ``representations, partition_mask -> interest``, dynamic in users and partitions.

    Args:
        fuser: trained; left as it is.
        path: of the ONNX file; its folder exists.

    Raises:
        ConfigurationError: the written graph does not compute what the fuser does.
    """
    fuser = copy.deepcopy(fuser).eval()
    _export(fuser, _fuser_inputs(fuser, 3, 4), _FUSER_AXES, "interest", path)
    _check(fuser, [_fuser_inputs(fuser, users, partitions) for users, partitions in ((1, 0), (1, 1), (5, 40))], path)


def export_backbone(model: Backbone, path: Path) -> None:
    """Writes the inputs of `Backbone.forward` -> ``click_probability``, dynamic in users and candidates.

    Item attributes are resolved here: the graph holds one embedding per item of the catalogue.

    Args:
        model: trained; left as it is. Without an ``interest`` input if its `interest_size` is 0.
        path: of the ONNX file; its folder exists.

    Raises:
        ConfigurationError: the written graph does not compute what the model does.
    """
    model = copy.deepcopy(model).eval()
    looked_up = copy.deepcopy(model)
    if isinstance(model.item_embedding, ItemEmbedding):
        with torch.no_grad():
            looked_up.item_embedding = _table(model.item_embedding.catalogue())
    axes = {name: axis for name, axis in _BACKBONE_AXES.items() if name != "interest" or model.interest_size}
    _export(_Scorer(looked_up).eval(), _backbone_inputs(model, 3, 5), axes, "click_probability", path)
    batches = [_backbone_inputs(model, users, candidates) for users, candidates in ((1, 1), (1, 7), (60, 40))]
    _check(_Scorer(model).eval(), batches, path)


def _table(rows: Tensor) -> nn.Embedding:
    table = nn.Embedding(*rows.shape)
    table.weight.copy_(rows)
    return table


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], axes: dict[str, dict[int, str]], output: str, path: Path
) -> None:
    """Traces `module`, whose arguments are named by `axes`, and writes the graph with its weights inside."""
    with warnings.catch_warnings():
        # The tracing exporter unrolls the recurrences in a second; torch.export takes twenty.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(
            module,
            inputs,
            str(path),
            input_names=list(axes),
            output_names=[output],
            dynamic_axes={**axes, output: {0: next(iter(axes.values()))[0]}},
            opset_version=18,
            dynamo=False,
        )


def _check(module: nn.Module, batches: Sequence[tuple[Tensor, ...]], path: Path) -> None:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for batch in batches:
        with torch.inference_mode():
            expected = module(*batch).numpy()
        (found,) = session.run(None, dict(zip(names, (tensor.numpy() for tensor in batch), strict=True)))
        difference = float(np.abs(found - expected).max(initial=0.0))
        if not difference <= TOLERANCE:
            shapes = [tuple(tensor.shape) for tensor in batch]
            raise ConfigurationError(
                f"{path} differs from the trained model by {difference:.2g} (at most {TOLERANCE:g} is allowed) on "
                f"inputs of shapes {shapes}; export with another version than torch {torch.__version__}"
            )


def _fuser_inputs(fuser: AttentionFuser, users: int, partitions: int) -> tuple[Tensor, ...]:
    """Random partitions; the first user has all of them, the last none."""
    generator = torch.Generator().manual_seed(users)
    count = torch.linspace(partitions, 0, users).round().int()
    return (
        torch.randn(users, partitions, fuser.size, generator=generator),
        torch.arange(partitions) < count[:, None],
    )


def _backbone_inputs(model: Backbone, users: int, candidates: int) -> tuple[Tensor, ...]:
    """Random folded batch; the first user has a full history, the last an empty one."""
    generator = torch.Generator().manual_seed(users)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    length = torch.linspace(model.history_size, 0, users).round().int()
    real = torch.arange(model.history_size) < length[:, None]
    inputs = (
        draw(model.item_embedding.num_embeddings, candidates),
        draw(users, candidates),
        draw(model.item_embedding.num_embeddings, users, model.history_size) * real,
        draw(model.feedback_size, users, model.history_size) * real,
        length,
        torch.cat([draw(size, users, 1) for size in model.profile_sizes] or [draw(1, users, 0)], dim=1),
    )
    if not model.interest_size:
        return inputs
    return *inputs, torch.randn(users, model.interest_size, generator=generator)
