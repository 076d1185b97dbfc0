"""The fused kernels of DIEN, interpreted on the CPU, against the layers they stand for."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from model_harness import D, draw_inputs, make_features_module
from torch import Tensor

from bench.cuda import EAGER, FUSED, CudaPlan, measure_cuda
from builders.models import cuda, make_backbone
from builders.models.backbone import Ranker
from builders.models.fuser import AttentionFuser
from builders.models.layers import AUGRU, GRU, gather_users
from liber_runtime.exceptions import ConfigurationError

# The interpreter's own way with loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

ROW_KEYS = (
    *("model", "engine", "path", "shape", "users", "candidates", "history", "liber", "precision", "device"),
    *("p50_ms", "p99_ms", "cpu_ms", "floor_ms"),
)

T, U = 5, 3


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[ModuleType]:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        loaded = importlib.reload(cuda.load_kernels())
        assert cuda.is_interpreted(loaded)
        yield loaded
    importlib.reload(loaded)


def project(layer: GRU | AUGRU, inputs: Tensor) -> Tensor:
    return torch.cat((layer.gates_input(inputs), layer.candidate_input(inputs)), dim=-1)


def reference(layer: GRU | AUGRU, inputs: Tensor, attention: Tensor | None) -> Tensor:
    """The formulas of the layers' documentation, step by step, for rows that are their own users'; every state."""
    size = layer.hidden_size
    state = inputs.new_zeros(inputs.shape[1], size)
    states = []
    for step, projected in enumerate(project(layer, inputs)):
        recurrent = layer.recurrent(state)
        update, reset = (projected[:, : 2 * size] + recurrent[:, : 2 * size]).sigmoid().split(size, dim=1)
        candidate = (projected[:, 2 * size :] + reset * recurrent[:, 2 * size :]).tanh()
        if attention is not None:
            update = attention[step, :, None] * update
        state = (1 - update) * state + update * candidate
        states.append(state)
    return torch.stack(states)


@pytest.fixture(params=[5, 16, 24], ids=lambda size: f"H={size}")
def size(request: pytest.FixtureRequest) -> int:
    """Less than a block, a block, and more than one that is no power of two."""
    torch.manual_seed(request.param)
    return int(request.param)


@pytest.mark.parametrize("rows", [1, 16, 19])
@torch.no_grad()
def test_gru_gives_every_state(size: int, rows: int) -> None:
    layer, inputs = GRU(7, size), torch.randn(T, rows, 7)
    found = cuda.gru(project(layer, inputs), layer.recurrent.weight)
    torch.testing.assert_close(found, reference(layer, inputs, None), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, None])
@torch.no_grad()
def test_augru_gives_the_last_state_of_every_candidate(size: int, kind: torch.dtype | None) -> None:
    layer, inputs = AUGRU(7, size), torch.randn(T, U, 7)
    user_index = None if kind is None else torch.randint(U, (37,)).to(kind)
    rows = U if user_index is None else 37
    attention = torch.rand(T, rows)
    found = cuda.augru(project(layer, inputs), attention, layer.recurrent.weight, user_index)
    expected = reference(layer, gather_users(inputs, user_index, dim=1), attention)[-1]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, layer(inputs, attention, user_index), atol=1e-6, rtol=0)


@torch.no_grad()
def test_steps_without_attention_leave_the_state_as_it_is() -> None:
    torch.manual_seed(0)
    layer, inputs, attention = AUGRU(7, 16), torch.randn(T, U, 7), torch.rand(T, U)
    attention[3:] = 0
    projected = project(layer, inputs)
    whole = cuda.augru(projected, attention, layer.recurrent.weight)
    assert torch.equal(whole, cuda.augru(projected[:3], attention[:3], layer.recurrent.weight))
    assert torch.equal(cuda.augru(projected, 0 * attention, layer.recurrent.weight), torch.zeros(U, 16))
    assert cuda.augru(projected, attention[:, :0], layer.recurrent.weight, torch.zeros(0, dtype=torch.int32)).shape == (
        0,
        16,
    )


@torch.no_grad()
def test_half_precision_is_that_of_the_product_alone() -> None:
    torch.manual_seed(0)
    layer, inputs, attention = AUGRU(7, 16), torch.randn(T, U, 7), torch.rand(T, U)
    exact = cuda.augru(project(layer, inputs), attention, layer.recurrent.weight)
    half = cuda.augru(project(layer, inputs), attention, layer.recurrent.weight, precision="fp16")
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 2e-3


@pytest.mark.parametrize("candidates", [None, 20])
@torch.no_grad()
def test_a_fused_ranker_scores_as_the_one_it_is_made_of(candidates: int | None) -> None:
    features = make_features_module(meeting=True, history_length=4)
    torch.manual_seed(1)
    backbone = make_backbone("DIEN", features.schema, {"hidden_size": 8})
    ranker = Ranker(features, backbone, AttentionFuser(D)).eval()
    given = draw_inputs(features, 5, candidates), torch.randn(5, 2, D), torch.ones(5, 2, dtype=torch.bool)
    torch.testing.assert_close(cuda.fuse(ranker)(*given), ranker(*given), atol=1e-5, rtol=0)


SMALL = CudaPlan(
    histories=(2,),
    samples=4,
    lookback=6,
    partitions=2,
    items=40,
    embedding_dim=4,
    dimension=4,
    options={"hidden_size": 4, "attention_size": 4, "mlp_sizes": (8, 4)},
    warm_up=1,
    rounds=2,
    gemm=16,
)


def test_the_benchmark_compares_and_times_what_needs_no_gpu() -> None:
    figures = measure_cuda(device="cpu", plan=SMALL)
    assert not figures["notes"]
    assert {(row["engine"], row["shape"], row["users"], row["liber"]) for row in figures["rows"]} == {
        (engine, shape, users, liber)
        for engine in (EAGER, FUSED)
        for shape, users in (("distinct_users", 4), ("one_user", 1))
        for liber in (True, False)
    }
    for row in figures["rows"]:
        assert row.keys() >= set(ROW_KEYS)
        assert 0 < row["floor_ms"] <= row["p50_ms"] <= row["p99_ms"]
        assert row["difference"] < 1e-5
    assert {ratio["engine"] for ratio in figures["ratios"]} == {FUSED}
    assert set(figures["gemm_gflops"]) == set(SMALL.precisions)


def test_an_engine_that_answers_otherwise_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cuda.fuse", lambda ranker, precision: _Wrong(ranker))
    figures = measure_cuda(device="cpu", plan=SMALL)
    assert {row["engine"] for row in figures["rows"]} == {EAGER}
    assert len(figures["notes"]) == 4
    assert all(
        re.search(r"fused-kernel \(fp32\) differs from the CPU by .* is not timed", note) for note in figures["notes"]
    )


class _Wrong:
    def __init__(self, ranker: Ranker) -> None:
        self.embed = ranker.embed
        self.backbone = lambda features: ranker.backbone(features) + 1


class TestRefusals:
    def test_no_gpu(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        with pytest.raises(ConfigurationError, match=r"--device cuda: torch sees no CUDA device .*--device cpu"):
            measure_cuda()

    def test_shapes_that_do_not_fit(self) -> None:
        inputs, weight = torch.zeros(T, U, 12), torch.zeros(12, 4)
        with pytest.raises(ValueError, match=r"attention has shape \(5, 4\), the inputs \(5, 3, 12\)"):
            cuda.augru(inputs, torch.zeros(T, U + 1), weight)
        with pytest.raises(ValueError, match="inputs of width 9 do not go with weights"):
            cuda.gru(inputs[..., :9], weight)

    def test_another_backbone(self) -> None:
        features = make_features_module(interest_size=0)
        with pytest.raises(ConfigurationError, match="for DIEN, not for DIN"):
            cuda.fuse(Ranker(features, make_backbone("DIN", features.schema)))

    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib, "import_module", _missing)
        with pytest.raises(ConfigurationError, match=r"needs the package triton .*liber-runtime\[gpu\]"):
            cuda.gru(torch.zeros(T, U, 12), torch.zeros(12, 4))


def _missing(name: str) -> ModuleType:
    raise ImportError(f"No module named {name}")
