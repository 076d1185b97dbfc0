"""The layers against DeepCTR-Torch, an independent implementation: same weights in, same numbers out.

Each test says what theirs does otherwise and how the weights were brought over.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from builders.models import functions
from builders.models.layers import (
    AUGRU,
    BilinearInteraction,
    CompressedInteraction,
    CrossNet,
    CrossNetV2,
    FactorizationMachine,
    InteractingLayer,
    InterestAttention,
    SqueezeExcitation,
)

ROWS, FIELDS, SIZE, STEPS = 9, 7, 6, 5


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """The layers of `deepctr_torch` alone: the package itself starts a thread that asks PyPI for a newer version."""
    spec = importlib.util.find_spec("deepctr_torch")
    assert spec is not None, "deepctr-torch is missing; install the extra 'test'"
    sys.modules.setdefault("deepctr_torch", importlib.util.module_from_spec(spec))
    return importlib.import_module("deepctr_torch.layers")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomise(module: nn.Module) -> None:
    """Weights of order one; theirs start so small that a wrong one would hide."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_cross_net(theirs: ModuleType) -> None:
    """Theirs keeps the layers' weights in one tensor."""
    reference, layer = theirs.CrossNet(SIZE, layer_num=3, parameterization="vector"), CrossNet(SIZE, 3)
    randomise(reference)
    with torch.no_grad():
        for number in range(3):
            layer.weights[number].copy_(reference.kernels[number].squeeze(1))
            layer.biases[number].copy_(reference.bias[number].squeeze(1))
    rows = torch.randn(ROWS, SIZE)
    assert_same(layer(rows), reference(rows))


@pytest.mark.parametrize("rank", [None, 2])
def test_cross_net_v2(theirs: ModuleType, rank: int | None) -> None:
    """Theirs has full matrices; of a low rank, the product of the two factors is put in there."""
    reference, layer = theirs.CrossNet(SIZE, layer_num=2, parameterization="matrix"), CrossNetV2(SIZE, 2, rank)
    randomise(layer)
    with torch.no_grad():
        for number, each in enumerate(layer.layers):
            last = each if rank is None else each[1]
            reference.kernels[number].copy_(each.weight if rank is None else each[1].weight @ each[0].weight)
            reference.bias[number].copy_(last.bias.unsqueeze(1))
    rows = torch.randn(ROWS, SIZE)
    assert_same(layer(rows), reference(rows))


def test_factorization_machine(theirs: ModuleType) -> None:
    fields = torch.randn(ROWS, FIELDS, SIZE)
    assert_same(FactorizationMachine()(fields), theirs.FM()(fields).squeeze(1))


@pytest.mark.parametrize("sizes", [(4,), (4, 6), (8, 4, 3)])
def test_compressed_interaction(theirs: ModuleType, sizes: tuple[int, ...]) -> None:
    """Theirs has a bias in every layer, which the paper has not: zero here. Its activation is ours by an option."""
    reference = theirs.CIN(FIELDS, sizes, activation="linear", split_half=True)
    layer = CompressedInteraction(FIELDS, sizes)
    randomise(layer)
    with torch.no_grad():
        for weight, convolution in zip(layer.weights, reference.conv1ds, strict=True):
            convolution.weight.copy_(weight.unsqueeze(2))
            convolution.bias.zero_()
    fields = torch.randn(ROWS, FIELDS, SIZE) * 0.5
    assert_same(layer(fields), reference(fields))
    assert layer(fields).shape == (ROWS, layer.output_size)


def test_interacting_layer(theirs: ModuleType) -> None:
    """Theirs ties the size of a head to that of a field: size / heads; its weights are transposed."""
    reference, layer = theirs.InteractingLayer(SIZE, head_num=2), InteractingLayer(SIZE, 2, SIZE // 2)
    randomise(reference)
    with torch.no_grad():
        weights = (reference.W_Query, reference.W_key, reference.W_Value)
        layer.query_key_value.weight.copy_(torch.cat([weight.t() for weight in weights]))
        layer.residual.weight.copy_(reference.W_Res.t())
    fields = torch.randn(ROWS, FIELDS, SIZE)
    assert_same(layer(fields), reference(fields))


def test_squeeze_excitation(theirs: ModuleType) -> None:
    reference, layer = theirs.SENETLayer(FIELDS, reduction_ratio=3), SqueezeExcitation(FIELDS, 3)
    assert layer.squeeze.out_features == reference.reduction_size
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand_like(parameter))
        reference.excitation[0].weight.copy_(layer.squeeze.weight)
        reference.excitation[2].weight.copy_(layer.excite.weight)
    fields = torch.randn(ROWS, FIELDS, SIZE)
    assert_same(layer(fields), reference(fields))


@pytest.mark.parametrize("kind", ["all", "each"])
def test_bilinear_interaction(theirs: ModuleType, kind: str) -> None:
    """Of ``each``, theirs has a matrix for the last field too, which nothing reads."""
    reference, layer = theirs.BilinearInteraction(FIELDS, SIZE, kind), BilinearInteraction(FIELDS, SIZE, kind)
    matrices = [reference.bilinear] if kind == "all" else list(reference.bilinear)[:-1]
    with torch.no_grad():
        layer.weight.copy_(torch.stack([matrix.weight for matrix in matrices]))
    fields = torch.randn(ROWS, FIELDS, SIZE)
    assert_same(layer(fields), reference(fields))


@pytest.mark.parametrize("softmax", [False, True])
def test_attention_of_din(theirs: ModuleType, softmax: bool) -> None:
    """Theirs is batch-major and concatenates [q, k, q - k, q * k].

    Users without history are left out with the softmax: theirs then weighs the padding evenly, ours gives zeros.
    """
    hidden = 4
    reference = theirs.AttentionSequencePoolingLayer(
        att_hidden_units=(hidden,), att_activation="prelu", weight_normalization=softmax, embedding_dim=SIZE
    )
    layer = InterestAttention(SIZE, hidden)
    randomise(reference)
    unit = reference.local_att
    with torch.no_grad():
        query, key, difference, product = unit.dnn.linears[0].weight.split(SIZE, dim=1)
        layer.query.weight.copy_(query + difference)
        layer.query.bias.copy_(unit.dnn.linears[0].bias)
        layer.key.weight.copy_(key - difference)
        layer.product.weight.copy_(product)
        layer.activation.weight.copy_(unit.dnn.activation_layers[0].weight)
        layer.score.load_state_dict(unit.dense.state_dict())
    queries, keys = torch.randn(ROWS, SIZE), torch.randn(STEPS, ROWS, SIZE)
    length = torch.arange(ROWS) % STEPS + 1
    length[0] = 1 if softmax else 0
    scores = layer(queries, keys)
    batch_major = keys.transpose(0, 1)
    assert_same(scores.t(), unit(queries.unsqueeze(1), batch_major).squeeze(2))
    found = functions.local_activation(queries, keys, length, None, *layer.weights(), softmax=softmax)
    assert_same(found, reference(queries.unsqueeze(1), batch_major, length.unsqueeze(1)).squeeze(1))


def test_augru(theirs: ModuleType) -> None:
    """Theirs is one step, orders its gates (reset, update, candidate), and has a second bias, zero here.

    That bias adds nothing but inside the candidate's reset product, where DIEN's Eq. 4 has none.
    """
    hidden = 4
    cell, layer = importlib.import_module("deepctr_torch.layers.sequence").AUGRUCell(SIZE, hidden), AUGRU(SIZE, hidden)
    randomise(cell)
    with torch.no_grad():
        cell.bias_hh.zero_()
        reset, update, candidate = cell.weight_ih.chunk(3)
        layer.gates_input.weight.copy_(torch.cat((update, reset)))
        layer.candidate_input.weight.copy_(candidate)
        reset, update, candidate = cell.weight_hh.chunk(3)
        layer.recurrent.weight.copy_(torch.cat((update, reset, candidate)))
        reset, update, candidate = cell.bias_ih.chunk(3)
        layer.gates_input.bias.copy_(torch.cat((update, reset)))
        layer.candidate_input.bias.copy_(candidate)
    inputs, attention = torch.randn(STEPS, ROWS, SIZE), torch.rand(STEPS, ROWS)
    state = torch.zeros(ROWS, hidden)
    for step, weight in zip(inputs, attention, strict=True):
        state = cell(step, state, weight)
    assert_same(layer(inputs, attention), state)
