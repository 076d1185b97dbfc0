"""What a training keeps of itself between two epochs, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from builders.training_data import Index, TrainingData
from liber_runtime import __version__
from liber_runtime.progress import console


def training_key(
    model: nn.Module, data: TrainingData, train_index: Index, validation_index: Index, settings: object, seed: int
) -> str:
    """Identifies everything that the outcome of a training follows from, but for the code of the models.

    Args:
        model: with its initial weights; on the CPU.
        data: the samples.
        train_index: int64[n].
        validation_index: int64[m].
        settings: anything with a telling ``repr``.
        seed: of the training.
    """
    digest = hashlib.sha256(f"{__version__} {torch.__version__} {settings!r} {seed}".encode())
    for name, module in model.named_modules():
        # Weights do not tell a dropout rate; the plain attributes of the modules do.
        plain = {key: value for key, value in sorted(vars(module).items()) if _is_plain(value) and key != "training"}
        digest.update(f"{name} {type(module).__qualname__} {plain}".encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.numpy().tobytes())
    for column in (*(getattr(data, name) for name in TrainingData.__dataclass_fields__), train_index, validation_index):
        digest.update(f"{column.dtype}{column.shape}".encode())
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def write_checkpoint(path: Path, key: str, state: dict[str, Any]) -> None:
    """Replaces the checkpoint at `path` at once: a reader finds the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f"{path.name}.building")
    with building.open("wb") as file:
        torch.save({"key": key, "state": state}, file)
        file.flush()
        os.fsync(file.fileno())
    building.replace(path)


def read_checkpoint(path: Path, key: str) -> dict[str, Any] | None:
    """The state that `write_checkpoint` wrote under the same key.

    Returns:
        None if there is no such file; and, said on the console, if it is of another training or cannot be read.
    """
    if not path.is_file():
        return None
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        found, state = kept["key"], kept["state"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        console.print(f"checkpoint {path} cannot be read ({reason}); training starts anew", soft_wrap=True)
        return None
    if found != key:
        console.print(f"checkpoint {path} is of another training; training starts anew", soft_wrap=True)
        return None
    restored: dict[str, Any] = state
    return restored


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)
