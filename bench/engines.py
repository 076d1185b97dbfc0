"""The engines that `bench.inference_latency` compares, each as a call that answers one question again and again.

A question is asked of all of them on the same inputs. Engines of our ranker hold the same weights and must give the
same probabilities; deepctr-torch's models (`bench.deepctr`) cannot.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from builders.models.backbone import Ranker
from builders.models.dien import DIEN
from builders.models.features import Features, Inputs
from liber_runtime.bundle import Manifest
from liber_runtime.exceptions import LiberError
from liber_runtime.native import load_kernels
from liber_runtime.scoring import ScoringClient, fold
from liber_runtime.served.folding import AttentionFuserModel, BackboneModel
from liber_runtime.served.session import OnnxSession
from liber_runtime.served.user_memory import UserMemoryModel

TOLERANCE = 1e-5
"""Largest difference between what is computed in two ways from the same weights, in values of order one."""

Probabilities: TypeAlias = npt.NDArray[np.float32]
Tensors: TypeAlias = dict[str, npt.NDArray[Any]]

GRAPH_INPUTS = ("item_index", "user_index", "history_item", "history_feedback", "history_length", "profile", "interest")


@dataclass(frozen=True)
class Question:
    """What is asked: the click probability of each candidate.

    Attributes:
        shape: ``one_user``, ``distinct_users``, ``folded`` or ``single``.
        user_ids: whose candidate each is.
        item_ids: the candidates.
    """

    shape: str
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]

    @property
    def users(self) -> int:
        """U, how many users are named."""
        return len(set(self.user_ids))

    @property
    def candidates(self) -> int:
        """N."""
        return len(self.item_ids)

    def tensors(self) -> Tensors:
        """The request as it comes to ``user_memory``; U and N are within the limits of one request."""
        (call,) = fold(self.user_ids, self.item_ids, len(self.user_ids), len(self.item_ids))
        return {
            "user_id": np.array([[user.encode() for user in call.user_ids]], dtype=np.object_),
            "item_id": np.array([[item.encode() for item in call.item_ids]], dtype=np.object_),
            "user_index": call.user_index[np.newaxis],
        }


@dataclass(frozen=True)
class Engine:
    """One engine, about to answer one question.

    Attributes:
        name: as rows have it.
        path: ``in_process``, ``grpc`` or ``http``.
        call: answers the question.
        liber: whether it reads the interest.
        precision: ``fp32`` or ``int8``.
        single: the same in one thread of this process; None if it answers elsewhere.
        processes: ids of the processes that hold the model; none if it is this one.
        comparable: whether its weights are the ranker's, so that it must give its probabilities.
    """

    name: str
    path: str
    call: Callable[[], Probabilities]
    liber: bool
    precision: str = "fp32"
    single: Callable[[], Probabilities] | None = None
    processes: Callable[[], Sequence[int]] | None = None
    comparable: bool = True


class LocalModels:
    """The three models of ``liber_score``, called one after another in this process.

    Args:
        bundle: its directory.
        store_url: of the store.
        threads: of a session; 0 for one per processor.
    """

    def __init__(self, bundle: Path, store_url: str, threads: int = 0) -> None:
        with _environment(LIBER_STORE=store_url, LIBER_THREADS=str(threads)):
            self.memory = UserMemoryModel.load(bundle, lambda _: None)
            self.fuser = AttentionFuserModel.load(bundle) if _is_fused(bundle) else None
            self.backbone = BackboneModel.load(bundle)

    def score(self, request: Mapping[str, npt.NDArray[Any]]) -> Probabilities:
        """float32[N]: the whole way from ids to probabilities."""
        return _probabilities(self.backbone.run([self._prepare(request)]))

    def prepare(self, request: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        """What the backbone's graph reads, each tensor with its leading 1."""
        prepared = self._prepare(request)
        return {name: prepared[name] for name in GRAPH_INPUTS if name in prepared}

    def _prepare(self, request: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        memory = {**_answer(self.memory.run([request])), "user_index": request["user_index"]}
        if self.fuser is not None:
            memory["interest"] = _answer(self.fuser.run([memory]))["interest"]
        return memory

    def graph(self, tensors: Tensors) -> Probabilities:
        """float32[N]: the backbone's graph alone."""
        return _probabilities(self.backbone.run([tensors]))

    def close(self) -> None:
        """Closes the store."""
        self.memory.close()


def serve_over_grpc(client: ScoringClient, question: Question) -> Callable[[], Probabilities]:
    """One call of the scoring client."""
    users, items = list(question.user_ids), list(question.item_ids)
    return lambda: client.score(users, items).probability


def unfold(tensors: Tensors) -> Tensors:
    """One row for each candidate with all that is its user's, as models are served that do not fold.

    Args:
        tensors: of `LocalModels.prepare`.

    Returns:
        The same tensors without their leading 1 and without ``user_index``.
    """
    owner = tensors["user_index"][0]
    rows = {name: tensors[name][0][owner] for name in GRAPH_INPUTS[2:] if name in tensors}
    return {"item_index": tensors["item_index"][0], **rows}


def run_eagerly(ranker: Ranker, rows: Tensors) -> Callable[[], Probabilities]:
    """The ranker in plain PyTorch on the rows of `unfold`."""
    inputs = _inputs({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in rows.items()})

    def call() -> Probabilities:
        with torch.inference_mode():
            probability: Probabilities = ranker(inputs).sigmoid().numpy()
        return probability

    return call


def in_one_thread(call: Callable[[], Probabilities]) -> Callable[[], Probabilities]:
    """The same call with PyTorch held to one thread."""

    def limited() -> Probabilities:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return limited


def export_plainly(ranker: Ranker, rows: Tensors, path: Path) -> None:
    """Exports a ranker as its author would at first: unfolded, DIEN's extractor as the ONNX operator GRU.

    Args:
        ranker: with weights; left as it is.
        rows: of `unfold`, an example.
        path: of the ONNX file.

    Raises:
        LiberError: the GRU with our weights copied does not give our extractor's states.
    """
    plain = copy.deepcopy(ranker).eval()
    if isinstance(plain.backbone, DIEN):
        plain.backbone = _PlainDIEN(plain.backbone)
    # More rows than the catalogue has items would take the way of a training batch.
    example = {name: torch.from_numpy(np.ascontiguousarray(array[:2])) for name, array in rows.items()}
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        # Traced first, so that nothing in the model can tell that it is being exported and make a graph of our own.
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            _Unfolded(plain, list(example)), tuple(example.values()), check_trace=False
        )
        torch.onnx.export(
            traced,
            tuple(example.values()),
            str(path),
            input_names=list(example),
            output_names=["click_probability"],
            dynamic_axes={name: {0: "rows"} for name in (*example, "click_probability")},
            opset_version=18,
            dynamo=False,
        )


class ExportedModel:
    """A plain export in a session as ONNX Runtime makes it; `threads` 0 leaves them to it."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def answering(self, rows: Tensors) -> Callable[[], Probabilities]:
        """A run on the rows of `unfold`."""
        read = {each.name: np.ascontiguousarray(rows[each.name]) for each in self._session.get_inputs()}

        def call() -> Probabilities:
            probability: Probabilities = self._session.run(None, read)[0]
            return probability

        return call


class ServedGraph:
    """An exported graph of either precision, in the session that serves.

    Args:
        path: of the graph, see `export_backbone`.
        threads: 0 for one per processor.
        kernels: see `load_kernels`.
    """

    def __init__(self, path: Path, threads: int = 0, kernels: str = "auto") -> None:
        threads = threads or os.cpu_count() or 1
        self._model = BackboneModel(OnnxSession(path, threads, load_kernels(kernels, threads)))

    def answering(self, tensors: Tensors) -> Callable[[], Probabilities]:
        """A run on the tensors of `LocalModels.prepare`."""
        return lambda: _probabilities(self._model.run([tensors]))


def _answer(outcomes: Sequence[Any]) -> Tensors:
    (outcome,) = outcomes
    if isinstance(outcome, LiberError):
        raise outcome
    answered: Tensors = outcome
    return answered


def _probabilities(outcomes: Sequence[Any]) -> Probabilities:
    probabilities: Probabilities = _answer(outcomes)["click_probability"][0]
    return probabilities


def _is_fused(bundle: Path) -> bool:
    return bool(getattr(Manifest.load(bundle), "fused", True))


def _inputs(tensors: Mapping[str, Tensor]) -> Inputs:
    return Inputs(user_index=None, **tensors)


class _Unfolded(nn.Module):
    """Rows in the order of `names` -> click probabilities."""

    def __init__(self, ranker: Ranker, names: Sequence[str]) -> None:
        super().__init__()
        self.ranker = ranker
        self.names = names

    def forward(self, *rows: Tensor) -> Tensor:
        logits: Tensor = self.ranker(_inputs(dict(zip(self.names, rows, strict=True))))
        return logits.sigmoid()


class _PlainDIEN(nn.Module):
    """DIEN with its extractor as `torch.nn.GRU`, which exporters make the ONNX operator GRU of.

    Args:
        dien: whose weights are taken.

    Raises:
        LiberError: the GRU does not give the extractor's states.
    """

    def __init__(self, dien: DIEN) -> None:
        super().__init__()
        self.dien = dien
        inputs, bias, recurrent = dien.extractor.weights()
        size = recurrent.shape[1]
        self.gru = nn.GRU(inputs.shape[1], size)

        def arrange(rows: Tensor) -> Tensor:
            """Ours: update, reset, candidate. PyTorch's: reset, what is kept (one minus the update), candidate."""
            return torch.cat((rows[size : 2 * size], -rows[:size], rows[2 * size :]))

        with torch.no_grad():
            for parameter, values in zip(self.gru.parameters(), (inputs, recurrent, bias), strict=False):
                parameter.copy_(arrange(values))
            self.gru.get_parameter("bias_hh_l0").zero_()
            steps, length = torch.randn(7, 3, inputs.shape[1]), torch.full((3,), 7)
            difference = float((self.gru(steps)[0] - dien.extractor(steps, length)).abs().max())
        if difference > TOLERANCE:
            raise LiberError(f"the standard GRU differs from the extractor by {difference:.2g}; see bench.engines")

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        states: Tensor = self.gru(features.history)[0]
        return self.dien._rank(features, states)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables of the environment as they were afterwards: the served models read their settings from it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
