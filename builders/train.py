"""Trains a ranker, with the fuser or without, on point-in-time samples; early stopping on a validation slice."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from builders.checkpoint import read_checkpoint, training_key, write_checkpoint
from builders.models.backbone import Ranker
from builders.training_data import BatchMaker, Index, TrainingData, check, gather_partitions
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.progress import console

__all__ = [
    "EpochResult",
    "Index",
    "Model",
    "Progress",
    "TrainingData",
    "TrainingResult",
    "TrainingSettings",
    "evaluate",
    "gather_partitions",
    "predict",
    "train",
]

Model: TypeAlias = Ranker
Progress: TypeAlias = Callable[[int, int, int], None]
"""Called after every batch with the epoch (from 1), the samples done in it, and the samples of one epoch."""

_PREDICTION_BATCH = {"cpu": 4096, "cuda": 32768}
"""Samples per call by kind of device; on a CPU more would leave its cache."""

_CLIPPED_NORM = 5.0


def _check_setting(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        limit = "" if highest == math.inf else f" and at most {highest:g}"
        raise ConfigurationError(f"{name} is {value}; give at least {lowest:g}{limit}")


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; what was searched for each backbone is in `builders.hyperparameters`.

    Attributes:
        max_epochs: hard limit.
        patience: epochs without a better validation log loss before stopping.
        batch_sizes: every batch has a size drawn from these; several mix both in one epoch (paper, section 4.1.3),
            one is the size of all.
        learning_rate: of AdamW, after a warm-up over the first tenth of an epoch.
        weight_decay: decoupled, on all weights but biases and embedding tables.
        embedding_decay: decoupled, on the embedding tables, the ids' above all: rows seen seldom shrink most, as
            nothing pulls them back.
        auxiliary_weight: of the backbone's own loss beside the click's.
        average_decay: of the exponential moving average of the weights, per step; the average is what is validated
            and kept.
        max_partitions: newest representations of a user that are fused.

    Raises:
        ConfigurationError: a value outside its range.
    """

    max_epochs: int = 16
    patience: int = 2
    batch_sizes: tuple[int, ...] = (512, 1024)
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    embedding_decay: float = 1e-2
    auxiliary_weight: float = 0.1
    average_decay: float = 0.97
    max_partitions: int = 40

    def __post_init__(self) -> None:
        if not self.batch_sizes:
            raise ConfigurationError("batch_sizes is empty; give at least one, e.g. (512, 1024)")
        for name, lowest in (("max_epochs", 1), ("patience", 1), ("max_partitions", 1)):
            _check_setting(name, getattr(self, name), lowest, math.inf)
        for size in self.batch_sizes:
            _check_setting("batch_sizes", size, 1, math.inf)
        for name in ("weight_decay", "embedding_decay", "auxiliary_weight"):
            _check_setting(name, getattr(self, name), 0.0, math.inf)
        _check_setting("average_decay", self.average_decay, 0.0, 1.0)
        if not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(f"learning_rate is {self.learning_rate}; give a positive number, e.g. 1e-3")


@dataclass(frozen=True)
class EpochResult:
    """One epoch: mean training loss (auxiliary included), validation AUC and log loss, seconds with validation."""

    loss: float
    auc: float
    logloss: float
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """What a training run came to.

    Attributes:
        best_epoch: whose weights the model now has, from 1.
        auc: on the validation samples, at that epoch.
        logloss: on the validation samples, at that epoch.
        epochs: every epoch that ran.
    """

    best_epoch: int
    auc: float
    logloss: float
    epochs: tuple[EpochResult, ...]


def train(
    model: Model,
    data: TrainingData,
    train_index: Index,
    validation_index: Index,
    *,
    seed: int,
    settings: TrainingSettings = TrainingSettings(),
    progress: Progress | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
) -> TrainingResult:
    """Trains in place; the model ends with the averaged weights of its best epoch, in evaluation mode.

    Order and sizes of the batches and the dropout follow from `seed` alone, the batches even for any two models: with
    equal initial weights, data, settings and number of threads, two runs on a CPU end with bit-identical weights.

    Args:
        model: with its initial weights, on the CPU, where it also ends.
        data: the samples.
        train_index: int64[n], rows to learn from.
        validation_index: int64[m], rows that choose the epoch; of both labels.
        seed: of everything random in here; the caller's random state is left as it was.
        settings: see `TrainingSettings`.
        progress: see `Progress`.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for CUDA where there is one.
        checkpoint: keeps the state after every epoch; a run that was killed and is started again with the same
            arguments goes on from there, to the same weights. Gone at the end; that of another training is not used.

    Raises:
        InvalidInputError: no samples, one label only in a slice, data that are not finite or do not fit the model, or
            a loss that is not finite.
        ConfigurationError: there is no such device.
    """
    place = _find_device(device)
    for name, index in (("training", train_index), ("validation", validation_index)):
        if len(np.unique(data.label[index])) < 2:
            raise InvalidInputError(
                f"the {len(index)} {name} samples do not hold both labels; give a longer log or another threshold"
            )
    check(model, data)
    key = training_key(model, data, train_index, validation_index, settings, seed) if checkpoint is not None else ""
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        run = _Run(model.to(place), data, train_index, validation_index, settings, seed)
        if checkpoint is not None and (kept := read_checkpoint(checkpoint, key)) is not None:
            run.restore(kept)
            console.print(f"training goes on after epoch {len(run.epochs)}, from {checkpoint}", soft_wrap=True)
        while not run.is_over():
            run.run_epoch(progress)
            if checkpoint is not None:
                write_checkpoint(checkpoint, key, run.state())
    model.load_state_dict(run.best_weights)
    model.to("cpu").eval()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    best = run.epochs[run.best_epoch - 1]
    return TrainingResult(run.best_epoch, best.auc, best.logloss, tuple(run.epochs))


def predict(
    model: Model,
    data: TrainingData,
    index: Index,
    *,
    max_partitions: int = TrainingSettings.max_partitions,
    device: str = "cpu",
) -> npt.NDArray[np.float32]:
    """Click probabilities float32[n] of the samples `index` int64[n]; the model ends on the CPU, in evaluation mode."""
    place = _find_device(device)
    batches = BatchMaker(data, place, max_partitions if model.fuser is not None else None)
    probability = _predict(model.to(place), batches, torch.from_numpy(index))
    model.to("cpu")
    return probability


def evaluate(
    model: Model,
    data: TrainingData,
    index: Index,
    *,
    max_partitions: int = TrainingSettings.max_partitions,
    device: str = "cpu",
) -> tuple[float, float]:
    """AUC and log loss of the samples `index` int64[n], which must hold both labels.

    Raises:
        InvalidInputError: the model's predictions are not finite.
    """
    return _compare(predict(model, data, index, max_partitions=max_partitions, device=device), data.label[index])


class _Run:
    """A training between two epochs; `state` is all that the rest of it follows from."""

    def __init__(
        self,
        model: Model,
        data: TrainingData,
        train_index: Index,
        validation_index: Index,
        settings: TrainingSettings,
        seed: int,
    ) -> None:
        self._model = model
        self._average = copy.deepcopy(model)
        self._settings = settings
        self._device = next(model.parameters()).device
        max_partitions = settings.max_partitions if model.fuser is not None else None
        self._batches = BatchMaker(data, self._device, max_partitions)
        self._train = torch.from_numpy(train_index)
        self._validation = torch.from_numpy(validation_index)
        # A generator of its own: what a model draws for its dropout leaves the batches as they are.
        self._order = torch.Generator().manual_seed(seed)
        self._weights: list[Tensor] = list(model.parameters())
        self._averaged: list[Tensor] = list(self._average.parameters())
        self._optimizer = _make_optimizer(model, settings)
        self._steps = 0
        batches_per_epoch = math.ceil(len(train_index) * len(settings.batch_sizes) / sum(settings.batch_sizes))
        self._warm_up = max(1, batches_per_epoch // 10)
        self.epochs: list[EpochResult] = []
        self.best_epoch = 0
        self.best_weights: dict[str, Tensor] = {}

    def is_over(self) -> bool:
        since = len(self.epochs) - self.best_epoch
        return len(self.epochs) >= self._settings.max_epochs or since >= self._settings.patience

    def run_epoch(self, progress: Progress | None) -> None:
        started = time.perf_counter()
        self._model.train()
        losses = []
        for done, rows in self._shuffled():
            losses.append(self._step(rows))
            if progress is not None:
                progress(len(self.epochs) + 1, done, len(self._train))
        for averaged, buffer in zip(self._average.buffers(), self._model.buffers(), strict=True):
            # Running statistics of a normalisation are no weights and have no average.
            averaged.copy_(buffer)
        probability = _predict(self._average, self._batches, self._validation)
        auc, logloss = _compare(probability, self._batches.label[self._validation].numpy())
        self.epochs.append(EpochResult(float(np.mean(losses)), auc, logloss, time.perf_counter() - started))
        if self.best_epoch == 0 or logloss < self.epochs[self.best_epoch - 1].logloss:
            self.best_epoch, self.best_weights = len(self.epochs), copy.deepcopy(self._average.state_dict())

    def state(self) -> dict[str, Any]:
        on_cuda = self._device.type == "cuda"
        return {
            "model": self._model.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "steps": self._steps,
            "order": self._order.get_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self._device) if on_cuda else None,
            "epochs": [dataclasses.astuple(epoch) for epoch in self.epochs],
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._model.load_state_dict(state["model"])
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._steps = state["steps"]
        self._order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if self._device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self._device)
        self.epochs = [EpochResult(*epoch) for epoch in state["epochs"]]
        self.best_epoch, self.best_weights = state["best_epoch"], state["best_weights"]

    def _shuffled(self) -> Iterator[tuple[int, Tensor]]:
        """Batches in random order, each with the number of samples done after it."""
        sizes, total = self._settings.batch_sizes, len(self._train)
        order = self._train[torch.randperm(total, generator=self._order)]
        done = 0
        while done < total:
            drawn = int(torch.randint(len(sizes), (1,), generator=self._order)) if len(sizes) > 1 else 0
            # Not a last batch of one sample: a batch normalisation has no variance of it.
            end = total if total - done - sizes[drawn] <= 1 else done + sizes[drawn]
            yield end, order[done:end]
            done = end

    def _step(self, rows: Tensor) -> float:
        rate = self._settings.learning_rate * min(1.0, (self._steps + 1) / self._warm_up)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        logits, auxiliary = self._model.forward_with_auxiliary(*self._batches.make(rows))
        loss = functional.binary_cross_entropy_with_logits(logits, self._batches.labels(rows))
        loss = loss + self._settings.auxiliary_weight * auxiliary
        reached = loss.item()
        if not math.isfinite(reached):
            raise InvalidInputError(
                f"the training loss became {reached}; lower learning_rate {self._settings.learning_rate}"
            )
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._weights, _CLIPPED_NORM)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, self._weights, 1 - self._settings.average_decay)
        self._steps += 1
        return reached


def _make_optimizer(model: Model, settings: TrainingSettings) -> torch.optim.Optimizer:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings = [weight for weight in model.parameters() if id(weight) in tables]
    matrices = [weight for weight in model.parameters() if id(weight) not in tables and weight.ndim > 1]
    rest = [weight for weight in model.parameters() if id(weight) not in tables and weight.ndim <= 1]
    groups = [
        {"params": embeddings, "weight_decay": settings.embedding_decay},
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate, fused=True)


def _predict(model: Model, batches: BatchMaker, rows: Tensor) -> npt.NDArray[np.float32]:
    model.eval()
    size = _PREDICTION_BATCH.get(next(model.parameters()).device.type, 4096)
    with torch.inference_mode():
        parts = [model(*batches.make(part)).sigmoid().cpu().numpy() for part in torch.split(rows, size) if len(part)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _compare(probability: npt.NDArray[np.float32], label: npt.NDArray[np.float32]) -> tuple[float, float]:
    """AUC and log loss."""
    probability = probability.astype(np.float64)
    if not np.isfinite(probability).all():
        raise InvalidInputError("the model's predictions are not finite: its weights diverged; lower learning_rate")
    return float(roc_auc_score(label, probability)), float(log_loss(label, probability, labels=[0, 1]))


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device {name!r} is unknown; give cpu, cuda, cuda:1 or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(f"device {name!r} is not there ({torch.cuda.device_count()} GPUs); give cpu or auto")
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device {name!r} is not supported; give cpu, cuda, cuda:1 or auto")
    return device
