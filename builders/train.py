"""Trains a backbone, alone or with the fuser, on point-in-time samples; early stopping on a validation slice."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from builders.models.backbone import Backbone, LiberModel
from liber_runtime.exceptions import InvalidInputError

Model: TypeAlias = Backbone | LiberModel
Index: TypeAlias = npt.NDArray[np.int64]
Progress: TypeAlias = Callable[[int, int, int], None]
"""Called after every batch with the epoch (from 1), the samples done in it, and the samples of one epoch."""

_PREDICTION_BATCH = 4096


@dataclass(frozen=True)
class TrainingData:
    """Samples as columns, S of them, each as the world was just before it.

    Attributes:
        item: int32[S], the candidate's index.
        label: float32[S], 1.0 for a click.
        history_item: int32[S, T], item indices of the user's latest behaviors, oldest first, post-padded with 0.
        history_feedback: int32[S, T], their feedback buckets, post-padded with 0.
        history_length: int32[S].
        profile: int32[S, P].
        partition_start: int64[S], row of the user's first partition in `representations`.
        partition_count: int32[S], the user's partitions completed before the sample.
        representations: float32[R, d], the partitions' representations, each user's in a row, oldest first.
    """

    item: npt.NDArray[np.int32]
    label: npt.NDArray[np.float32]
    history_item: npt.NDArray[np.int32]
    history_feedback: npt.NDArray[np.int32]
    history_length: npt.NDArray[np.int32]
    profile: npt.NDArray[np.int32]
    partition_start: npt.NDArray[np.int64]
    partition_count: npt.NDArray[np.int32]
    representations: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        rows = {name: len(getattr(self, name)) for name in self.__dataclass_fields__ if name != "representations"}
        if len(set(rows.values())) != 1:
            raise InvalidInputError(f"columns of the samples differ in length: {rows}; give each one row per sample")
        if len(self.item) and int((self.partition_start + self.partition_count).max()) > len(self.representations):
            raise InvalidInputError(
                f"a sample reads partition {int((self.partition_start + self.partition_count).max())} of "
                f"{len(self.representations)}; encode every partition before training"
            )


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the defaults were chosen on MovieLens-100K's validation slice.

    Attributes:
        max_epochs: hard limit.
        patience: epochs without a better validation log loss before stopping.
        batch_size: samples per step.
        learning_rate: of AdamW, after a warm-up over the first tenth of an epoch.
        weight_decay: decoupled, on all weights but biases.
        auxiliary_weight: of the backbone's own loss beside the click's.
        average_decay: of the exponential moving average of the weights, per step; the average is what is validated
            and kept.
        max_partitions: newest representations of a user that are fused.
    """

    max_epochs: int = 16
    patience: int = 2
    batch_size: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    auxiliary_weight: float = 0.1
    average_decay: float = 0.97
    max_partitions: int = 40


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
) -> TrainingResult:
    """Trains in place; the model ends with the averaged weights of its best epoch, in evaluation mode.

    The order of the samples and the dropout follow from `seed` alone: with equal initial weights, data, settings and
    number of threads, two runs end with bit-identical weights.

    Args:
        model: with its initial weights.
        data: the samples.
        train_index: int64[n], rows to learn from.
        validation_index: int64[m], rows that choose the epoch; of both labels.
        seed: of everything random in here; the caller's random state is left as it was.
        settings: see `TrainingSettings`.
        progress: see `Progress`.

    Raises:
        InvalidInputError: no samples, one label only in a slice, or a loss that is not finite.
    """
    for name, index in (("training", train_index), ("validation", validation_index)):
        if len(np.unique(data.label[index])) < 2:
            raise InvalidInputError(
                f"the {len(index)} {name} samples do not hold both labels; give a longer log or another threshold"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        epochs, best_epoch, best_state = _run_epochs(model, data, train_index, validation_index, settings, progress)
    model.load_state_dict(best_state)
    model.eval()
    best = epochs[best_epoch - 1]
    return TrainingResult(best_epoch, best.auc, best.logloss, tuple(epochs))


def predict(
    model: Model, data: TrainingData, index: Index, *, max_partitions: int = TrainingSettings.max_partitions
) -> npt.NDArray[np.float32]:
    """Click probabilities float32[n] of the samples `index` int64[n]; the model is left in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        batches = [
            model(*_batch(model, data, index[start : start + _PREDICTION_BATCH], max_partitions)).sigmoid().numpy()
            for start in range(0, len(index), _PREDICTION_BATCH)
        ]
    return np.concatenate(batches) if batches else np.zeros(0, np.float32)


def evaluate(
    model: Model, data: TrainingData, index: Index, *, max_partitions: int = TrainingSettings.max_partitions
) -> tuple[float, float]:
    """AUC and log loss of the samples `index` int64[n], which must hold both labels."""
    probability = predict(model, data, index, max_partitions=max_partitions).astype(np.float64)
    label = data.label[index]
    return float(roc_auc_score(label, probability)), float(log_loss(label, probability, labels=[0, 1]))


def _run_epochs(
    model: Model,
    data: TrainingData,
    train_index: Index,
    validation_index: Index,
    settings: TrainingSettings,
    progress: Progress | None,
) -> tuple[list[EpochResult], int, dict[str, Tensor]]:
    optimizer, schedule = _optimizer(model, settings, math.ceil(len(train_index) / settings.batch_size))
    average = copy.deepcopy(model)
    epochs: list[EpochResult] = []
    best_epoch, best_state = 0, average.state_dict()
    for epoch in range(1, settings.max_epochs + 1):
        started = time.perf_counter()
        losses = []
        for done, batch in _shuffled(train_index, settings.batch_size):
            losses.append(_step(model, average, data, batch, optimizer, settings))
            schedule.step()
            if progress is not None:
                progress(epoch, done, len(train_index))
        auc, logloss = evaluate(average, data, validation_index, max_partitions=settings.max_partitions)
        epochs.append(EpochResult(float(np.mean(losses)), auc, logloss, time.perf_counter() - started))
        if best_epoch == 0 or logloss < epochs[best_epoch - 1].logloss:
            best_epoch, best_state = epoch, copy.deepcopy(average.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
    return epochs, best_epoch, best_state


def _step(
    model: Model,
    average: Model,
    data: TrainingData,
    batch: Index,
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
) -> float:
    model.train()
    logits, auxiliary = model.forward_with_auxiliary(*_batch(model, data, batch, settings.max_partitions))
    loss = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(data.label[batch]))
    loss = loss + settings.auxiliary_weight * auxiliary
    if not torch.isfinite(loss):
        raise InvalidInputError(f"the training loss became {loss.item()}; lower learning_rate {settings.learning_rate}")
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - settings.average_decay)
    return loss.item()


def _shuffled(index: Index, batch_size: int) -> Iterator[tuple[int, Index]]:
    """Batches in random order, each with the number of samples done after it."""
    order = index[torch.randperm(len(index)).numpy()]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        yield start + len(batch), batch


def _optimizer(
    model: Model, settings: TrainingSettings, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    warm_up = max(1, steps_per_epoch // 10)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))


def _batch(model: Model, data: TrainingData, batch: Index, max_partitions: int) -> tuple[Any, ...]:
    """The arguments of the model for these samples, one user per candidate: tensors, and None for `user_index`."""
    inputs = (
        torch.from_numpy(data.item[batch]),
        None,
        torch.from_numpy(data.history_item[batch]),
        torch.from_numpy(data.history_feedback[batch]),
        torch.from_numpy(data.history_length[batch]),
        torch.from_numpy(data.profile[batch]),
    )
    if isinstance(model, Backbone):
        return inputs
    representations, mask = gather_partitions(data, batch, max_partitions)
    return torch.from_numpy(representations), torch.from_numpy(mask), *inputs


def gather_partitions(
    data: TrainingData, index: Index, max_partitions: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Representations of the samples' newest partitions, post-padded with zeros.

    Args:
        data: the samples.
        index: int64[n], which of them.
        max_partitions: older ones are left out.

    Returns:
        float32[n, J, d] and the mask bool[n, J]; J is the most partitions any of these samples has.
    """
    count = np.minimum(data.partition_count[index], max_partitions)
    first = data.partition_start[index] + data.partition_count[index] - count
    steps = np.arange(int(count.max(initial=0)))
    mask = steps < count[:, None]
    representations = data.representations[np.where(mask, first[:, None] + steps, 0)] * mask[:, :, None]
    return representations.astype(np.float32, copy=False), mask
