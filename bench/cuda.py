"""How long DIEN takes on a GPU: in PyTorch as it is, compiled, as a CUDA graph, and with its recurrences as one kernel.

``python -m bench.inference_latency --device cuda`` runs it on any machine with a GPU that PyTorch and the package
triton can use. Every engine answers the same question with the same weights; one whose answer differs from that of the
CPU by more than its precision allows is not timed, and the notes say so. Engines take turns, call by call.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.floor import count_flops
from bench.serving import PUBLISHED, Workshop
from builders.models.backbone import Ranker
from builders.models.cuda import Precision, capture, fuse, is_interpreted, load_kernels
from builders.models.features import FeatureEmbedding, Inputs
from liber_runtime.exceptions import ConfigurationError, LiberError

MODEL = "DIEN"

EAGER, COMPILED, GRAPH = "pytorch-eager", "torch-compile", "cuda-graph"
FUSED, FUSED_GRAPH = "fused-kernel", "fused-kernel-cuda-graph"

TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference from the probabilities of the CPU, by precision; what it really is stands in every row."""

KERNEL_PRECISION: Mapping[str, Precision] = {"fp32": "tf32x3", "tf32": "tf32", "fp16": "fp16", "bf16": "bf16"}

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CudaPlan:
    """How much is measured.

    Attributes:
        histories: T.
        samples: N, and U of ``distinct_users``.
        lookback: L, newest behaviors that feedback to similar items is looked up in.
        partitions: of every user.
        items: of the catalogue.
        embedding_dim: E.
        dimension: d.
        options: of `MODEL`.
        compiled: those T at which torch.compile is measured: it takes minutes over the unrolled steps of one model.
        precisions: of the fused kernel as a CUDA graph; all else is float32.
        warm_up: calls of each engine before those that are timed.
        rounds: timed calls of each engine.
        gemm: rows of the square matrices that the peak is measured with.
    """

    histories: Sequence[int] = (20, 50, 100)
    samples: int = 1000
    lookback: int = 200
    partitions: int = 10
    items: int = 2000
    embedding_dim: int = 32
    dimension: int = 32
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(PUBLISHED[MODEL]))
    compiled: Sequence[int] = (20,)
    precisions: Sequence[str] = ("fp32", "tf32", "fp16", "bf16")
    warm_up: int = 10
    rounds: int = 100
    gemm: int = 4096


@dataclass(frozen=True)
class Engine:
    """One way to answer the question: its name, its precision, and the call that gives probabilities float[N]."""

    name: str
    precision: str
    call: Callable[[], Tensor]


@dataclass(frozen=True)
class Times:
    """Of one engine, a value for each round.

    Attributes:
        wall: seconds from the call to the answer, on the device still.
        cpu: seconds of this process's processors.
        device: seconds between two events on the GPU around the call; empty on a CPU.
    """

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    device: list[float] = dataclasses.field(default_factory=list)


def measure_cuda(*, seed: int = 1, device: str = "cuda", plan: CudaPlan | None = None) -> dict[str, Any]:
    """Measures DIEN with LIBER and without, for 1000 distinct users and for one user, at every length of history.

    Args:
        seed: of weights and inputs.
        device: a CUDA device; with ``cpu`` what needs no GPU runs there, to see that it works.
        plan: how much.

    Returns:
        ``rows``, ``ratios`` of eager PyTorch to each engine, ``gemm_gflops`` by precision, ``gpu``, ``notes``.

    Raises:
        ConfigurationError: there is no such device.
        LiberError: PyTorch on the device does not give what it gives on the CPU.
    """
    place = _find(device)
    plan = plan or CudaPlan()
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="liber-cuda-") as directory:
        peaks = {precision: _measure_gemm(place, precision, plan.gemm) for precision in plan.precisions}
        workshop = Workshop(
            Path(directory), items=plan.items, dimension=plan.dimension, embedding_dim=plan.embedding_dim, seed=seed
        )
        for history in plan.histories:
            for is_liber in (True, False):
                ranker, _ = workshop.ranker(
                    MODEL,
                    fusion="matched" if is_liber else "none",
                    history_length=history,
                    lookback=plan.lookback,
                    options=plan.options,
                )
                for shape, users in (("distinct_users", plan.samples), ("one_user", 1)):
                    rows += _measure_shape(ranker, shape, users, place, plan, peaks, seed, notes)
    return {
        "rows": rows,
        "ratios": compare_with_eager(rows),
        "gemm_gflops": {precision: round(peak, 1) for precision, peak in peaks.items()},
        "gpu": torch.cuda.get_device_name(place) if place.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "notes": notes,
    }


def compare_with_eager(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster than eager PyTorch each engine was, of the medians."""
    alike = ("shape", "history", "liber")
    eager = {tuple(row[key] for key in alike): row["p50_ms"] for row in rows if row["engine"] == EAGER}
    return [
        {
            **{key: row[key] for key in (*alike, "engine", "precision")},
            "times_faster_than_eager": round(eager[tuple(row[key] for key in alike)] / row["p50_ms"], 2),
        }
        for row in rows
        if row["engine"] != EAGER
    ]


def _find(device: str) -> torch.device:
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"--device cuda: torch sees no CUDA device (torch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda or 'none'}); install a torch built for CUDA on a machine with a GPU, or measure with "
            "--device cpu"
        )
    return torch.device(device)


def _measure_shape(
    ranker: Ranker,
    shape: str,
    users: int,
    device: torch.device,
    plan: CudaPlan,
    peaks: Mapping[str, float],
    seed: int,
    notes: list[str],
) -> list[dict[str, Any]]:
    question = draw_question(ranker.features, users, plan, seed)
    expected = _answer(ranker, question)
    where = f"{shape}, T={ranker.features.schema.history_length}, {'with' if ranker.fuser else 'without'} LIBER"
    engines: list[Engine] = []
    differences: list[float] = []
    placed = copy.deepcopy(ranker).to(device)
    for engine, reason in _make_engines(placed, _move(question, device), device, plan):
        found = engine.call().float().cpu() if engine is not None else None
        if engine is None or found is None:
            notes.append(f"{where}: {reason}")
            continue
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCES[engine.precision]:
            wrong = f"{where}: {engine.name} ({engine.precision}) differs from the CPU by {difference:.2g}"
            if engine.name == EAGER:
                raise LiberError(f"{wrong}; nothing is timed")
            notes.append(f"{wrong} and is not timed")
            continue
        engines.append(engine)
        differences.append(difference)
    timed = _race(engines, device, plan)
    flops = count_flops(ranker, users, plan.samples)
    return [
        {
            "model": MODEL,
            "engine": engine.name,
            "path": "in_process",
            "shape": shape,
            "users": users,
            "candidates": plan.samples,
            "history": ranker.features.schema.history_length,
            "liber": ranker.fuser is not None,
            "precision": engine.precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "p50_ms": _milliseconds(times.wall, 50),
            "p99_ms": _milliseconds(times.wall, 99),
            "cpu_ms": _milliseconds(times.cpu, 50),
            "device_ms": _milliseconds(times.device, 50) if times.device else None,
            "floor_ms": round(flops / peaks[engine.precision] / 1e6, 4),
            "difference": difference,
        }
        for engine, times, difference in zip(engines, timed, differences, strict=True)
    ]


Question = tuple[Inputs, Tensor | None, Tensor | None]


def draw_question(features: FeatureEmbedding, users: int, plan: CudaPlan, seed: int) -> Question:
    """A folded batch of users with full histories, the candidates shared out evenly; with LIBER also their vectors."""
    generator = torch.Generator().manual_seed(seed)
    steps = features.lookback

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    inputs = Inputs(
        item_index=draw(1, features.num_items, plan.samples),
        user_index=(torch.arange(plan.samples) % users).int(),
        history_item=draw(1, features.num_items, users, steps),
        history_feedback=draw(1, features.feedback_size, users, steps),
        history_length=torch.full((users,), steps, dtype=torch.int32),
        profile=torch.cat(
            [draw(0, size, users, 1) for size in features.profile_sizes] or [draw(0, 1, users, 0)], dim=1
        ),
        interest=None,
    )
    if not features.interest_size:
        return inputs, None, None
    vectors = torch.randn(users, plan.partitions, features.interest_size, generator=generator)
    return inputs, vectors, torch.ones(users, plan.partitions, dtype=torch.bool)


def _answer(ranker: Ranker, question: Question, precision: str = "fp32") -> Tensor:
    """float32[N]. Half precision is the backbone's alone: the numbers among its features are sums that need more."""
    features = ranker.embed(*question)
    kind = _AUTOCAST.get(precision)
    with torch.autocast(features.candidate.device.type, dtype=kind, enabled=kind is not None, cache_enabled=False):
        logits: Tensor = ranker.backbone(features)
    return logits.float().sigmoid()


def _move(question: Question, device: torch.device) -> Question:
    inputs, vectors, mask = question
    moved = Inputs(**{name: tensor.to(device) for name, tensor in inputs._asdict().items() if tensor is not None})
    return moved, None if vectors is None else vectors.to(device), None if mask is None else mask.to(device)


def _make_engines(
    ranker: Ranker, question: Question, device: torch.device, plan: CudaPlan
) -> Iterator[tuple[Engine | None, str]]:
    """Each engine, already called so often that it has compiled all it compiles; or None and why there is none."""
    is_cuda = device.type == "cuda"
    with_kernels = is_cuda or _is_interpreted()

    def eager() -> Tensor:
        return _answer(ranker, question)

    def fused(precision: str) -> Callable[[], Tensor]:
        model = fuse(ranker, KERNEL_PRECISION[precision])
        return lambda: _answer(model, question, precision)

    def compiled() -> Callable[[], Tensor]:
        torch._dynamo.reset()
        model = torch.compile(ranker, dynamic=False)
        return lambda: model(*question).sigmoid()

    makers: list[tuple[str, str, Callable[[], Callable[[], Tensor]]]] = [(EAGER, "fp32", lambda: eager)]
    if is_cuda:
        makers.append((GRAPH, "fp32", lambda: capture(eager)))
        if ranker.features.schema.history_length in plan.compiled:
            makers.append((COMPILED, "fp32", compiled))
    if with_kernels:
        makers.append((FUSED, "fp32", lambda: fused("fp32")))
    if is_cuda:
        makers += [(FUSED_GRAPH, each, lambda each=each: capture(fused(each))) for each in plan.precisions]  # type: ignore[misc]
    for name, precision, make in makers:
        try:
            # A recorded graph keeps the arithmetic that it was recorded in.
            with _arithmetic(precision):
                call = make()
                for _ in range(plan.warm_up):
                    call()
                _wait(device)
        except Exception as error:  # a compiler's, a driver's, or a lack of memory
            reason = (str(error).strip().splitlines() or [""])[0]
            if name == EAGER:
                raise
            yield None, f"{name} ({precision}) does not run: {type(error).__name__}: {reason:.300}"
        else:
            yield Engine(name, precision, call), ""


@contextlib.contextmanager
def _arithmetic(precision: str) -> Iterator[None]:
    """Matrix products of float32 on tensor cores if the precision is TF32, and only then."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _is_interpreted() -> bool:
    try:
        return is_interpreted(load_kernels())
    except ConfigurationError:
        return False


def _race(engines: Sequence[Engine], device: torch.device, plan: CudaPlan) -> list[Times]:
    """Times the engines, one call of each in every round, in an order that moves on by one from round to round."""
    times = [Times() for _ in engines]
    events = [(_event(device), _event(device)) for _ in engines]
    gc.collect()
    gc.disable()
    try:
        for done in range(plan.rounds):
            for turn in range(len(engines)):
                number = (turn + done) % len(engines)
                begins, ends = events[number]
                _wait(device)
                cpu, started = time.process_time(), time.perf_counter()
                if begins is not None:
                    begins.record()
                engines[number].call()
                if ends is not None:
                    ends.record()
                _wait(device)
                times[number].wall.append(time.perf_counter() - started)
                times[number].cpu.append(time.process_time() - cpu)
                if begins is not None and ends is not None:
                    times[number].device.append(1e-3 * begins.elapsed_time(ends))
    finally:
        gc.enable()
    return times


def _measure_gemm(device: torch.device, precision: str, size: int) -> float:
    """GFLOP/s of the fastest of 20 products of two square matrices."""
    kind = _AUTOCAST.get(precision, torch.float32)
    left, right = torch.randn(size, size, device=device, dtype=kind), torch.randn(size, size, device=device, dtype=kind)
    with _arithmetic(precision):
        engine = Engine("gemm", precision, lambda: left @ right)
        plan = CudaPlan(rounds=20)
        for _ in range(3):
            engine.call()
        (times,) = _race([engine], device, plan)
    return 2 * size**3 / min(times.device or times.wall) / 1e9


def _event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(seconds: Sequence[float], percent: float) -> float:
    return round(1e3 * float(np.percentile(seconds, percent)), 4)
