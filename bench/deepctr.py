"""DeepCTR-Torch's own models beside ours: the same embedding, hidden and MLP sizes, inputs made in its way.

Its weights are its own: the two implementations share no parameter layout, so probabilities cannot be compared, and
only the time counts. Its models read less than ours: fields of item and user, and a history of items and categories.
Ours reads the feedback of each past behavior as well, and all of `builders.models.numbers`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.engines import Probabilities, Tensors
from builders.assembly import FittedFeatures
from liber_runtime.exceptions import ConfigurationError

MODELS: Mapping[str, str] = {
    "DNN": "WDL",
    "DCN": "DCN",
    "DCNv2": "DCN",
    "DeepFM": "DeepFM",
    "xDeepFM": "xDeepFM",
    "AutoInt": "AutoInt",
    "FiBiNet": "FiBiNET",
    "DIN": "DIN",
    "DIEN": "DIEN",
}
"""Its class for a backbone of ours; it has no LR, and of DNN only the wide form."""

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "DCN": {"cross_num": 3},
    "DCNv2": {"cross_num": 2, "cross_parameterization": "matrix"},
    "xDeepFM": {"cin_layer_size": (64, 64)},
    "AutoInt": {"att_layer_num": 2, "att_head_num": 2},
    "FiBiNet": {"bilinear_type": "each"},
    "DIN": {"att_hidden_size": (64, 16)},
    "DIEN": {"gru_type": "AUGRU", "att_hidden_units": (64, 16)},
}


def run_deepctr(
    backbone: str,
    fitted: FittedFeatures,
    rows: Tensors,
    *,
    embedding_dim: int,
    mlp_sizes: tuple[int, ...],
    seed: int,
) -> Callable[[], Probabilities]:
    """Its model of a backbone on the rows of `bench.engines.unfold`, in eager PyTorch.

    Args:
        backbone: one of `MODELS`.
        fitted: sizes of the fields.
        rows: with ``interest`` if the model reads it: as a dense feature, its way of taking a vector.
        embedding_dim: E.
        mlp_sizes: of the deep part.
        seed: of the weights.

    Raises:
        ConfigurationError: deepctr-torch is not installed.
    """
    is_sequential = backbone in ("DIN", "DIEN")
    columns, values = _columns(fitted, rows, embedding_dim, is_sequential)
    kind = getattr(_import("deepctr_torch.models"), MODELS[backbone])
    options = {"dnn_hidden_units": mlp_sizes, "seed": seed, **_OPTIONS.get(backbone, {})}
    model = kind(columns, ["item", "category"] if is_sequential else columns, **options)
    model.eval()
    matrix = torch.from_numpy(
        np.concatenate([values[name].reshape(len(rows["item_index"]), -1) for name in model.feature_index], axis=1)
    ).float()

    def call() -> Probabilities:
        with torch.inference_mode():
            probability: Probabilities = model(matrix).squeeze(-1).numpy()
        return probability

    return call


def _columns(
    fitted: FittedFeatures, rows: Tensors, embedding_dim: int, is_sequential: bool
) -> tuple[list[Any], dict[str, npt.NDArray[np.float32]]]:
    """Its feature columns, and a value for each of their names.

    Its models of sequences share an embedding between the candidate and the history. Its other models count their
    fields by their embeddings, so there each has its own.
    """
    inputs = _import("deepctr_torch.inputs")
    vocabulary, table = fitted.vocabulary.vocabulary, fitted.vocabulary.item_table
    steps = fitted.history_length
    length = rows["history_length"]
    place = np.maximum(length - steps, 0)[:, np.newaxis] + np.arange(steps)
    real = place < length[:, np.newaxis]
    history = np.take_along_axis(rows["history_item"], np.minimum(place, rows["history_item"].shape[1] - 1), 1) * real
    (category,) = vocabulary.item_fields
    sizes = {"item": len(table), "category": category.size}
    values = {
        "item": rows["item_index"],
        "category": table[rows["item_index"], 1],
        "hist_item": history,
        "hist_category": table[history, 1],
        "seq_length": np.minimum(length, steps),
    }
    columns = [inputs.SparseFeat(name, size, embedding_dim) for name, size in sizes.items()]
    for number, field in enumerate(vocabulary.user_fields):
        columns.append(inputs.SparseFeat(field.name, field.size, embedding_dim))
        values[field.name] = rows["profile"][:, number]
    if "interest" in rows:
        columns.append(inputs.DenseFeat("interest", rows["interest"].shape[1]))
        values["interest"] = rows["interest"]
    for name, size in sizes.items():
        shared = name if is_sequential else None
        history_column = inputs.SparseFeat(f"hist_{name}", size, embedding_dim, embedding_name=shared)
        columns.append(inputs.VarLenSparseFeat(history_column, maxlen=steps, length_name="seq_length"))
    return columns, {name: value.astype(np.float32) for name, value in values.items()}


def _import(module: str) -> Any:
    """A module of deepctr-torch without its ``__init__``, which starts a thread that asks an index for newer versions.

    Raises:
        ConfigurationError: it is not installed.
    """
    spec = importlib.util.find_spec("deepctr_torch")
    if spec is None:
        raise ConfigurationError("deepctr-torch is not installed; run: pip install 'liber-runtime[bench]'")
    sys.modules.setdefault("deepctr_torch", importlib.util.module_from_spec(spec))
    return importlib.import_module(module)
