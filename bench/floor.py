"""How fast a model could be scored: the matrix products it needs, over the fastest that the machine multiplies."""

from __future__ import annotations

import time

import torch
from torch import nn

from builders.models.autoint import AutoInt
from builders.models.backbone import Ranker
from builders.models.dcn import DCN, DCNv2
from builders.models.deepfm import DeepFM
from builders.models.dien import DIEN
from builders.models.din import DIN
from builders.models.dnn import DNN
from builders.models.features import FeatureSchema
from builders.models.fibinet import FiBiNet
from builders.models.functions import ITERATIONS
from builders.models.layers import MLP, CompressedInteraction, CrossNet, FoldedLinear, FoldedMLP, InteractingLayer
from builders.models.lr import LR
from builders.models.meeting import ProductMeeting
from builders.models.numbers import Numbers
from builders.models.xdeepfm import XDeepFM
from liber_runtime.exceptions import ConfigurationError

_SIZE = 2048


def measure_gemm(threads: int, seconds: float) -> float:
    """GFLOP/s of the fastest float32 product of two square matrices of 2048 rows, over about `seconds`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
        out = torch.empty(_SIZE, _SIZE)
        best, ends = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < ends:
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2 * _SIZE**3 / best / 1e9


def count_flops(ranker: Ranker, users: int, candidates: int) -> int:
    """Floating point operations of the matrix products in one folded score of the backbone with its features.

    Two for each multiplication with its addition. A product that depends on the user alone counts once for each user,
    every other one once for each candidate. Histories are taken to be full. What is left out makes the floor lower:
    activations, softmax, sums and products of entries, looking rows up and moving them. The fuser is left out too: it
    runs before the graph, once for each user, over a few vectors.

    Args:
        ranker: whose sizes count; its weights do not matter.
        users: U.
        candidates: N.

    Raises:
        ConfigurationError: there is no formula for this backbone.
    """
    schema, backbone = ranker.features.schema, ranker.backbone
    for kind, products in _PRODUCTS.items():
        if type(backbone) is kind:
            return 2 * (_features(ranker, users, candidates) + products(backbone, schema, users, candidates))
    raise ConfigurationError(f"the floor of a {type(backbone).__name__} is not known; add its products to bench.floor")


def _features(ranker: Ranker, users: int, candidates: int) -> int:
    features = ranker.features
    products = _numbers(features.numbers, features.lookback, users, candidates)
    if features.interest is not None:
        products += _linear(features.interest, users)
    if isinstance(features.meeting, ProductMeeting):
        products += _linear(features.meeting.user, users) + _linear(features.meeting.candidate, candidates)
    return products


def _numbers(numbers: Numbers, lookback: int, users: int, candidates: int) -> int:
    """Fold-in of the taste for each user; likeness of each candidate to the items of the history."""
    recent, size = numbers.recent, numbers.vectors.shape[1]
    fold_in = recent * size * size + recent * size + ITERATIONS * size * size
    compared = lookback * numbers.similarity.shape[1] + recent * numbers.attributes.shape[1]
    if len(numbers.names) > len(Numbers.STATISTICAL):
        compared += lookback * numbers.knowledge.shape[1]
    return users * fold_in + candidates * compared


def _linear(layer: nn.Linear, rows: int) -> int:
    return rows * layer.in_features * layer.out_features


def _all_linear(module: nn.Module, rows: int) -> int:
    return sum(_linear(layer, rows) for layer in module.modules() if isinstance(layer, nn.Linear))


def _folded(layer: FoldedLinear, users: int, candidates: int) -> int:
    rest = _all_linear(layer.rest, candidates) if isinstance(layer, FoldedMLP) else 0
    return _linear(layer.user, users) + _linear(layer.candidate, candidates) + rest


def _lr(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, LR)
    return _folded(model.linear, users, candidates)


def _dnn(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, DNN)
    return _folded(model.mlp, users, candidates)


def _dcn(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, DCN)
    assert isinstance(model.cross, CrossNet)
    crosses: int = sum(candidates * weight.numel() for weight in model.cross.weights)
    return crosses + _linear(model.output, candidates) + _dnn(model.deep, schema, users, candidates)


def _dcn_v2(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, DCNv2)
    crosses = _all_linear(model.cross, candidates)
    return crosses + _linear(model.output, candidates) + _dnn(model.deep, schema, users, candidates)


def _deepfm(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, DeepFM)
    return _lr(model.linear, schema, users, candidates) + _dnn(model.deep, schema, users, candidates)


def _xdeepfm(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, XDeepFM)
    return (
        _lr(model.linear, schema, users, candidates)
        + candidates * _interaction(model.crosses, len(schema.fields), schema.embedding_dim)
        + _linear(model.output, candidates)
        + _dnn(model.deep, schema, users, candidates)
    )


def _interaction(crosses: CompressedInteraction, fields: int, size: int) -> int:
    """Of one candidate: the inner products, what is read of them, and the maps that go on."""
    products = 0
    for weight, kept in zip(crosses.weights, [*crosses.kept, 0], strict=True):
        rows, pairs = weight.shape
        products += pairs * size + pairs * (rows - kept) + kept * pairs * size
    return products


def _autoint(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, AutoInt)
    fields = len(schema.fields)
    attended = 0
    for layer in model.interactions:
        assert isinstance(layer, InteractingLayer)
        attended += _all_linear(layer, candidates * fields)
        attended += 2 * candidates * fields * fields * layer.num_heads * layer.head_size
    return (
        _lr(model.linear, schema, users, candidates)
        + attended
        + _linear(model.output, candidates)
        + _dnn(model.deep, schema, users, candidates)
    )


def _fibinet(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, FiBiNet)
    fields = len(schema.fields)
    size = model.mapping.out_features
    return (
        _lr(model.linear, schema, users, candidates)
        + _linear(model.mapping, candidates * fields)
        + _all_linear(model.weighing, candidates)
        + 2 * candidates * (fields - 1) * size * size
        + _mlp(model.deep, candidates)
    )


def _mlp(model: MLP, candidates: int) -> int:
    return _all_linear(model, candidates)


def _din(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, DIN)
    steps = schema.history_length
    return (
        _linear(model.step, users * steps)
        + _linear(model.query, candidates)
        + _linear(model.attention.query, candidates)
        + _linear(model.attention.key, users * steps)
        + _linear(model.attention.product, candidates * steps)
        + _linear(model.attention.score, candidates * steps)
        + _linear(model.taste, users)
        + _folded(model.mlp, users, candidates)
    )


def _dien(model: nn.Module, schema: FeatureSchema, users: int, candidates: int) -> int:
    assert isinstance(model, DIEN)
    steps, hidden = schema.history_length, model.query.out_features
    inputs, states = schema.step_size * 3 * hidden, hidden * 3 * hidden
    return (
        users * steps * (inputs + states)  # the extractor
        + _linear(model.query, candidates)
        + _linear(model.attention.query, candidates)
        + _linear(model.attention.key, users * steps)
        + _linear(model.attention.product, candidates * steps)
        + _linear(model.attention.score, candidates * steps)
        + users * steps * states  # the evolution's inputs
        + candidates * steps * states  # and its recurrence
        + _linear(model.taste, users)
        + _folded(model.mlp, users, candidates)
    )


_PRODUCTS = {
    LR: _lr,
    DNN: _dnn,
    DCN: _dcn,
    DCNv2: _dcn_v2,
    DeepFM: _deepfm,
    XDeepFM: _xdeepfm,
    AutoInt: _autoint,
    FiBiNet: _fibinet,
    DIN: _din,
    DIEN: _dien,
}
