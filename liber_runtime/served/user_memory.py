"""``user_memory``: raw ids of a folded request -> what the fuser and the backbone read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from liber_runtime.bundle import VOCABULARY, Manifest
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, LiberError, StoreError
from liber_runtime.memory import MemoryStore, UserMemory, open_store
from liber_runtime.served.backend import Outcome, Tensors
from liber_runtime.settings import Settings, load_settings
from liber_runtime.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class FoldedRequest:
    """A scoring request as it came over the wire, checked: U users, N candidates, whose candidate each is."""

    users: list[str]
    items: list[str]
    user_index: npt.NDArray[np.int32]


class UserMemoryModel:
    """Reads the store once per distinct user of a batch and maps everything to the bundle's indices.

    Outputs, per request: ``item_index`` int32[1,N], ``history_item`` and ``history_feedback`` int32[1,U,L],
    ``history_length`` int32[1,U], ``profile`` int32[1,U,P], ``representations`` float32[1,U,J,d],
    ``partition_mask`` bool[1,U,J] (J is at least 1: Triton moves no empty tensors), ``user_known`` bool[1,U] and
    ``item_known`` bool[1,N]. Vectors are those of the bundle's own encoding, whatever others the store holds; one that
    is still to be made is not there yet. A user of whom nothing is held has an empty history and no partitions; an
    item outside the catalogue has index 0. Both are scored, and marked as not known.
    """

    inputs = ("user_id", "item_id", "user_index")

    def __init__(self, store: MemoryStore, vocabulary: Vocabulary, manifest: Manifest, settings: Settings) -> None:
        self._store = store
        self._vocabulary = vocabulary
        self._manifest = manifest
        self._settings = settings

    @classmethod
    def load(cls, directory: Path) -> UserMemoryModel:
        """Reads the bundle's part in `directory` and opens the store that ``LIBER_STORE`` names."""
        settings = load_settings()
        return cls(
            open_store(settings.store, create=False),
            Vocabulary.load(directory / VOCABULARY),
            Manifest.load(directory),
            settings,
        )

    def close(self) -> None:
        """Closes the store."""
        self._store.close()

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """See `ServedModel.run`."""
        checked: list[FoldedRequest | LiberError] = []
        for tensors in batch:
            try:
                checked.append(check(tensors, self._settings))
            except InvalidInputError as error:
                checked.append(error)
        wanted = list(dict.fromkeys(user for each in checked if isinstance(each, FoldedRequest) for user in each.users))
        try:
            memories = self._read(wanted)
        except StoreError as error:
            return [each if isinstance(each, LiberError) else error for each in checked]
        return [each if isinstance(each, LiberError) else self._outcome(each, memories) for each in checked]

    def _read(self, users: list[str]) -> dict[str, UserMemory | None]:
        manifest = self._manifest
        read = self._store.read(users, manifest.lookback, manifest.max_partitions, manifest.fingerprint)
        return dict(zip(users, read, strict=True))

    def _outcome(self, request: FoldedRequest, memories: dict[str, UserMemory | None]) -> Outcome:
        held = [memories[user] for user in request.users]
        for user, memory in zip(request.users, held, strict=True):
            if memory and memory.foreign:
                return ConfigurationError(
                    f"the vectors of user {user!r} were made by encoder and PCA {', '.join(sorted(memory.foreign))}, "
                    f"this bundle reads {self._manifest.fingerprint}; publish the bundle they belong to, or make "
                    "vectors and a bundle from the stored texts with `liber build re-encode`"
                )
        item_index = self._vocabulary.item_indices(request.items)
        outcome = self._history(held)
        outcome.update(self._knowledge(held))
        outcome["profile"] = np.array(
            [self._vocabulary.profile_indices(memory.profile if memory else {}) for memory in held], dtype=np.int32
        )
        outcome["item_index"] = item_index
        outcome["item_known"] = item_index > 0
        outcome["user_known"] = np.array([memory is not None for memory in held])
        return {name: array[np.newaxis] for name, array in outcome.items()}

    def _history(self, held: Sequence[UserMemory | None]) -> dict[str, npt.NDArray[Any]]:
        lengths = np.array([len(memory.history) if memory else 0 for memory in held], dtype=np.int32)
        valid = np.arange(self._manifest.lookback) < lengths[:, np.newaxis]
        behaviors = [behavior for memory in held if memory for behavior in memory.history]
        items = np.zeros(valid.shape, dtype=np.int32)
        feedback = np.zeros(valid.shape, dtype=np.int32)
        if behaviors:
            items[valid] = self._vocabulary.item_indices([item for item, _ in behaviors])
            feedback[valid] = self._vocabulary.feedback_indices([value for _, value in behaviors])
        return {"history_item": items, "history_feedback": feedback, "history_length": lengths}

    def _knowledge(self, held: Sequence[UserMemory | None]) -> dict[str, npt.NDArray[Any]]:
        counts = np.array([len(memory.representations) if memory else 0 for memory in held])
        mask = np.arange(max(1, int(counts.max(initial=0)))) < counts[:, np.newaxis]
        representations = np.zeros((*mask.shape, self._manifest.dimension), dtype=np.float32)
        if mask.any():
            representations[mask] = np.concatenate(
                [memory.representations for memory in held if memory and len(memory.representations)]
            )
        return {"representations": representations, "partition_mask": mask}


def check(tensors: Tensors, settings: Settings) -> FoldedRequest:
    """Checks one scoring request.

    Raises:
        InvalidInputError: no candidates or users, too many, lengths that differ, an index outside the users, an id
            that is not UTF-8.
    """
    user_id, item_id, user_index = (tensors[name] for name in UserMemoryModel.inputs)
    for name, tensor in (("user_id", user_id), ("item_id", item_id), ("user_index", user_index)):
        if tensor.ndim != 2 or tensor.shape[0] != 1:
            raise InvalidInputError(f"{name} has shape {list(tensor.shape)}; send [1, n]")
    users, candidates = user_id.shape[1], item_id.shape[1]
    if not candidates or not users:
        raise InvalidInputError(
            f"the request has {users} users and {candidates} candidates; send at least one of each, or no request"
        )
    if candidates > settings.max_candidates:
        raise InvalidInputError(
            f"{candidates} candidates in one request; the limit is {settings.max_candidates} "
            "(LIBER_MAX_CANDIDATES): split the request, as the scoring client does"
        )
    if users > settings.max_users:
        raise InvalidInputError(
            f"{users} users in one request; the limit is {settings.max_users} (LIBER_MAX_USERS): split the request, "
            "as the scoring client does"
        )
    if user_index.shape[1] != candidates:
        raise InvalidInputError(
            f"user_index has {user_index.shape[1]} entries for {candidates} candidates; send one for each"
        )
    index = user_index[0]
    outside = (index < 0) | (index >= users)
    if outside.any():
        where = int(np.argmax(outside))
        raise InvalidInputError(
            f"user_index[{where}] is {int(index[where])}; with {users} users it must lie in 0..{users - 1}"
        )
    return FoldedRequest(_decode("user_id", user_id[0]), _decode("item_id", item_id[0]), index)


def _decode(name: str, ids: npt.NDArray[np.object_]) -> list[str]:
    decoded = []
    for position, value in enumerate(ids):
        try:
            decoded.append(value.decode())
        except UnicodeDecodeError:
            raise InvalidInputError(
                f"{name}[{position}] is {value[:40]!r}, which is not UTF-8; send ids encoded as UTF-8"
            ) from None
    return decoded
