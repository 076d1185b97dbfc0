"""Exports the fuser and the backbone with its features to ONNX, with dynamic sizes, and checks what was written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from builders.models.backbone import Ranker
from builders.models.features import FeatureEmbedding, Inputs, ItemEmbedding
from builders.models.fuser import Fuser
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
    """The served face of features and backbone: flat tensors in, probabilities out."""

    def __init__(self, features: FeatureEmbedding, backbone: nn.Module) -> None:
        super().__init__()
        self.features = features
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
        inputs = Inputs(item_index, user_index, history_item, history_feedback, history_length, profile, interest)
        logits: Tensor = self.backbone(self.features(inputs))
        return logits.sigmoid()


def export_fuser(fuser: Fuser, path: Path) -> None:
    """Writes ``representations, partition_mask -> interest``, dynamic in users and partitions.

    Args:
        fuser: trained; left as it is.
        path: of the ONNX file; its folder exists.

    Raises:
        ConfigurationError: the written graph does not compute what the fuser does.
    """
    fuser = copy.deepcopy(fuser).eval()
    _export(fuser, _fuser_inputs(fuser, 3, 4), _FUSER_AXES, "interest", path)
    batches = [_fuser_inputs(fuser, users, partitions) for users, partitions in ((1, 0), (1, 1), (5, 40))]
    _check(fuser, batches, list(_FUSER_AXES), path)


def export_backbone(model: Ranker, path: Path) -> None:
    """Writes the tensors of `Inputs`, numbers excepted -> ``click_probability``, dynamic in users and candidates.

    Item attributes are resolved here: the graph holds one embedding per item of the catalogue. Numbers are computed in
    the graph.

    Args:
        model: trained; left as it is. Without an ``interest`` input if it has no fuser.
        path: of the ONNX file; its folder exists.

    Raises:
        ConfigurationError: the backbone cannot be exported, or the written graph does not compute what the model does.
    """
    model = copy.deepcopy(model).cpu().eval()
    looked_up = copy.deepcopy(model.features)
    if isinstance(model.features.item_embedding, ItemEmbedding):
        with torch.no_grad():
            looked_up.item_embedding = _table(model.features.item_embedding.catalogue())
    size = model.features.interest_size
    axes = {name: axis for name, axis in _BACKBONE_AXES.items() if name != "interest" or size}
    scorer = _Scorer(looked_up, model.backbone).eval()
    _export(scorer, _backbone_inputs(model.features, 3, 5), axes, "click_probability", path)
    batches = [_backbone_inputs(model.features, users, count) for users, count in ((1, 1), (1, 7), (60, 40))]
    _check(_Scorer(model.features, model.backbone).eval(), batches, list(axes), path)


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
        # `newest_steps` branches on the steps of a history, which are as many in every batch that is served.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean", module=r"builders\.models\.layers")
        try:
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
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            raise ConfigurationError(
                f"{path.name} cannot be exported ({str(error).splitlines()[0]}); docs/backbones.md says what a "
                "backbone may do"
            ) from error


def _check(module: nn.Module, batches: Sequence[tuple[Tensor, ...]], names: Sequence[str], path: Path) -> None:
    """Compares the graph with `module`, whose arguments are `names`; it may lack inputs that nothing reads."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    read = [entry.name for entry in session.get_inputs()]
    for batch in batches:
        with torch.inference_mode():
            expected = module(*batch).numpy()
        given = dict(zip(names, batch, strict=True))
        try:
            (found,) = session.run(None, {name: given[name].numpy() for name in read})
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise ConfigurationError(
                f"{path} cannot be run on another batch than it was exported with ({str(error).splitlines()[0]:.200}); "
                "docs/backbones.md says what a backbone may do"
            ) from error
        difference = float(np.abs(found - expected).max(initial=0.0))
        if not difference <= TOLERANCE:
            shapes = [tuple(tensor.shape) for tensor in batch]
            raise ConfigurationError(
                f"{path} differs from the trained model by {difference:.2g} (at most {TOLERANCE:g} is allowed) on "
                f"inputs of shapes {shapes}; docs/backbones.md says what a backbone may do"
            )


def _fuser_inputs(fuser: Fuser, users: int, partitions: int) -> tuple[Tensor, ...]:
    """Random partitions; the first user has all of them, the last none."""
    generator = torch.Generator().manual_seed(users)
    count = torch.linspace(partitions, 0, users).round().int()
    return (
        torch.randn(users, partitions, fuser.size, generator=generator),
        torch.arange(partitions) < count[:, None],
    )


def _backbone_inputs(features: FeatureEmbedding, users: int, candidates: int) -> tuple[Tensor, ...]:
    """Random folded batch; the first user has a full history, the last an empty one."""
    generator = torch.Generator().manual_seed(users)
    steps = features.lookback

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    length = torch.linspace(steps, 0, users).round().int()
    real = torch.arange(steps) < length[:, None]
    inputs = (
        draw(features.num_items, candidates),
        draw(users, candidates),
        draw(features.num_items, users, steps) * real,
        draw(features.feedback_size, users, steps) * real,
        length,
        torch.cat([draw(size, users, 1) for size in features.profile_sizes] or [draw(1, users, 0)], dim=1),
    )
    if not features.interest_size:
        return inputs
    return *inputs, torch.randn(users, features.interest_size, generator=generator)
