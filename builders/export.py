"""Exports the fuser and the backbone with its features to ONNX, with dynamic sizes, and checks what was written."""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from builders.local_functions import OPSET, define
from builders.models.backbone import Ranker
from builders.models.features import FeatureEmbedding, Inputs, ItemEmbedding
from builders.models.functions import recording
from builders.models.fuser import Fuser
from builders.quantization import quantize
from builders.ragged import RaggedFuser, make_ragged
from liber_runtime.bundle import TABLES, Precision
from liber_runtime.exceptions import ConfigurationError

TOLERANCE = 1e-5
"""Largest difference allowed between the exported graph and PyTorch, absolute, on outputs of order one."""

INT8_TOLERANCE = 0.05
"""The same for a graph with int8 weights, in click probabilities."""

INT8_NOISE = 0.25
"""Largest root mean square of these differences, as a share of the standard deviation of the probabilities: where all
candidates are almost alike, a graph that tells none from another would otherwise pass."""

APART_BYTES = 1 << 20
"""Constants of a graph of this size or more are kept in a file beside it."""

PAGE = 4096
"""Where one of them begins, so that it can be mapped into memory."""

EXAMPLE_ITEMS = 64
"""Items of the catalogue that a graph is traced with."""

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
_FUSER_AXES = {"representations": {0: _PARTITIONS}, "partition_count": {0: _USERS}}


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
    """Writes ``representations, partition_count -> interest``, dynamic in users and partitions.

    The partitions of all users come one after another (`builders.ragged`); the graph pads them to the largest count.

    Args:
        fuser: trained; left as it is.
        path: of the ONNX file; its folder exists.

    Raises:
        ConfigurationError: the written graph does not compute what the fuser does.
    """
    fuser = copy.deepcopy(fuser).eval()
    _export(make_ragged(fuser).eval(), _fuser_inputs(fuser, 3, 4), _FUSER_AXES, ("interest", _USERS), path)
    batches = [_fuser_inputs(fuser, users, partitions) for users, partitions in ((1, 0), (3, 0), (1, 1), (5, 40))]
    _check(RaggedFuser(fuser), batches, list(_FUSER_AXES), path)


def export_backbone(model: Ranker, path: Path, *, precision: Precision = "fp32") -> None:
    """Writes the tensors of `Inputs`, numbers excepted -> ``click_probability``, dynamic in users and candidates.

    Item attributes are resolved here: the graph holds one embedding per item of the catalogue. Numbers are computed in
    the graph.

    Args:
        model: trained; left as it is. Without an ``interest`` input if it has no fuser.
        path: of the ONNX file; its folder exists.
        precision: ``int8`` for int8 weights, see `quantize`: the graph then equals the model to `INT8_TOLERANCE` and
            `INT8_NOISE`, not to `TOLERANCE`.

    Raises:
        ConfigurationError: the backbone cannot be exported, or the written graph does not compute what the model does.
    """
    model = _copy(model).cpu().eval()
    looked_up = _copy(model.features)
    if isinstance(model.features.item_embedding, ItemEmbedding):
        with torch.no_grad():
            looked_up.item_embedding = _table(model.features.item_embedding.catalogue())
    size = model.features.interest_size
    axes = {name: axis for name, axis in _BACKBONE_AXES.items() if name != "interest" or size}
    scorer = _Scorer(looked_up, model.backbone).eval()
    tables = _shorten(scorer, model.features.num_items)
    example = _backbone_inputs(model.features, 3, 5, items=min(EXAMPLE_ITEMS, model.features.num_items))
    _export(scorer, example, axes, ("click_probability", _CANDIDATES), path, tables, precision)
    batches = [_backbone_inputs(model.features, users, count) for users, count in ((1, 1), (1, 7), (60, 40))]
    _check(_Scorer(model.features, model.backbone).eval(), batches, list(axes), path, precision)


_Module = TypeVar("_Module", bound=nn.Module)


def _copy(module: _Module) -> _Module:
    """A copy of a module's structure; tensors, which may be a large catalogue's, are shared where they can stay."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors if tensor.device.type == "cpu"})


def _table(rows: Tensor) -> nn.Embedding:
    table: nn.Embedding = nn.Embedding.from_pretrained(rows)  # type: ignore[no-untyped-call]
    return table


def _shorten(module: nn.Module, items: int) -> dict[str, Tensor]:
    """Cuts the large tables of a catalogue down to what an example needs; returns them whole, by their names.

    What is traced is held in memory several times, and no more than 2 GiB of it.
    """
    tables = {}
    for prefix, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.ndim != 2 or len(tensor) != items or tensor.nbytes < APART_BYTES:
                    continue
                tables[f"{prefix}.{name}"] = tensor
                short = tensor[:EXAMPLE_ITEMS].detach().clone()
                held[name] = nn.Parameter(short, requires_grad=False) if held is part._parameters else short
    return tables


def _export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    axes: dict[str, dict[int, str]],
    output: tuple[str, str],
    path: Path,
    tables: Mapping[str, Tensor] | None = None,
    precision: Precision = "fp32",
) -> None:
    """Traces `module` and writes the graph with the functions that it calls; large tables go to a file beside it.

    Args:
        module: in eval mode.
        inputs: an example batch.
        axes: names of the dynamic axes of each input.
        output: name of the output, and of its first axis.
        path: of the file.
        tables: what stands in the graph's place of parameters that were traced with fewer rows, by their names; None to
            keep all constants in the graph.
        precision: of the weights.
    """
    name, rows = output
    file = io.BytesIO()
    names = {"input_names": list(axes), "output_names": [name], "dynamic_axes": {**axes, name: {0: rows}}}
    try:
        with recording() as recorder:
            _trace(module, inputs, file, **names)
        model = onnx.load_model_from_string(file.getvalue())
        define(model, recorder, _trace)
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ConfigurationError(
            f"{path.name} cannot be exported ({str(error).splitlines()[0]}); docs/backbones.md says what a "
            "backbone may do"
        ) from error
    if precision == "int8":
        model = quantize(model)
    if tables is not None:
        _keep_apart(model, path.with_name(TABLES), tables)
    path.write_bytes(model.SerializeToString())


def _keep_apart(model: onnx.ModelProto, path: Path, tables: Mapping[str, Tensor]) -> None:
    """Moves the large constants of a graph into a file, where ONNX Runtime and the kernels map them into memory."""
    with path.open("wb") as file:
        for initializer in model.graph.initializer:
            table = tables.get(initializer.name)
            if table is None and len(initializer.raw_data) < APART_BYTES:
                continue
            file.seek(-file.tell() % PAGE, os.SEEK_CUR)
            start = file.tell()
            if table is None:
                file.write(initializer.raw_data)
            else:
                table.detach().contiguous().numpy().tofile(file)
                del initializer.dims[:]
                initializer.dims.extend(table.shape)
            # The file's length has to be there: a graph whose tables were cut short is refused.
            length = file.tell() - start
            initializer.raw_data = b""
            onnx.external_data_helper.set_external_data(initializer, path.name, start, length)
            initializer.ClearField("raw_data")
        file.truncate()


def _trace(module: nn.Module, inputs: tuple[Tensor, ...], file: io.BytesIO, **options: Any) -> None:
    with warnings.catch_warnings():
        # The tracing exporter unrolls the recurrences in a second; torch.export takes twenty.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # `newest_steps` branches on the steps of a history, which are as many in every batch that is served.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python", module=r"builders\.models")
        torch.onnx.export(module, inputs, file, opset_version=OPSET, dynamo=False, **options)  # type: ignore[arg-type]


def _check(
    module: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    names: Sequence[str],
    path: Path,
    precision: Precision = "fp32",
) -> None:
    """Compares the graph with `module`, whose arguments are `names`; it may lack inputs that nothing reads."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    read = [entry.name for entry in session.get_inputs()]
    allowed = INT8_TOLERANCE if precision == "int8" else TOLERANCE
    pairs = []
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
        if not difference <= allowed:
            shapes = [tuple(tensor.shape) for tensor in batch]
            raise ConfigurationError(
                f"{path} differs from the trained model by {difference:.2g} (at most {allowed:g} is allowed) on "
                f"inputs of shapes {shapes}; {_ADVICE[precision]}"
            )
        pairs.append((found, expected))
    if precision == "int8":
        found, expected = (np.concatenate(each) for each in zip(*pairs, strict=True))
        _check_noise(found, expected, path)


_ADVICE: Mapping[Precision, str] = {
    "fp32": "docs/backbones.md says what a backbone may do",
    "int8": "this model needs --precision fp32",
}


def _check_noise(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], path: Path) -> None:
    """Compares what int8 weights change, float[n], with how far candidates are apart."""
    noise, apart = float(np.sqrt(np.square(found - expected).mean())), float(expected.std())
    if not noise <= INT8_NOISE * apart:
        raise ConfigurationError(
            f"{path} differs from the trained model by {noise:.2g} on average, where candidates are {apart:.2g} apart "
            f"(at most {INT8_NOISE:g} of that is allowed); {_ADVICE['int8']}"
        )


def _fuser_inputs(fuser: Fuser, users: int, partitions: int) -> tuple[Tensor, ...]:
    """Random partitions; the first user has most of them, the last of several none, and one row is nobody's."""
    generator = torch.Generator().manual_seed(users)
    count = torch.linspace(partitions, 0, users).round().int()
    return torch.randn(int(count.sum()) + 1, fuser.size, generator=generator), count


def _backbone_inputs(
    features: FeatureEmbedding, users: int, candidates: int, items: int | None = None
) -> tuple[Tensor, ...]:
    """Random folded batch of the first `items`; the first user has a full history, the last an empty one."""
    items = items or features.num_items
    generator = torch.Generator().manual_seed(users)
    steps = features.lookback

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    length = torch.linspace(steps, 0, users).round().int()
    real = torch.arange(steps) < length[:, None]
    inputs = (
        draw(items, candidates),
        draw(users, candidates),
        draw(items, users, steps) * real,
        draw(features.feedback_size, users, steps) * real,
        length,
        torch.cat([draw(size, users, 1) for size in features.profile_sizes] or [draw(1, users, 0)], dim=1),
    )
    if not features.interest_size:
        return inputs
    return *inputs, torch.randn(users, features.interest_size, generator=generator)
