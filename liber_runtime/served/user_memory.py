"""``user_memory``: raw ids of a folded request -> what the fuser and the backbone read."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from liber_runtime.bundle import VOCABULARY, Manifest
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, LiberError, StoreError
from liber_runtime.memory import MemoryStore, UserMemory, open_store
from liber_runtime.memory.history import History
from liber_runtime.native import Kernels, load_kernels
from liber_runtime.served.backend import Outcome, Tensors
from liber_runtime.settings import Settings, load_settings
from liber_runtime.vocabulary import Vocabulary

COUNTERS: Mapping[str, str] = {
    "liber_scored_users_total": "Users of scoring requests, each once in a request.",
    "liber_unknown_users_total": "Users scored of whom nothing is held.",
    "liber_scored_candidates_total": "Candidates scored.",
    "liber_unknown_candidates_total": "Candidates scored that the bundle does not know.",
    "liber_histories_truncated_total": "Users read of whom more is held than is looked back.",
}
"""What `UserMemoryModel` counts, as `liber_runtime.metrics` has it; that is not imported, for it makes loading slow."""


@dataclass(frozen=True, slots=True)
class FoldedRequest:
    """A scoring request as it came over the wire, checked: U users, N candidates, whose candidate each is."""

    users: list[str]
    items: list[str]
    user_index: npt.NDArray[np.int32]


class UserMemoryModel:
    """Reads the store once per distinct user of a batch and maps everything to the bundle's indices.

    Outputs, per request: ``item_index`` int32[1,N], ``history_item`` and ``history_feedback`` int32[1,U,L],
    ``history_length`` int32[1,U], ``profile`` int32[1,U,P], ``representations`` float32[1,R,d] (all users' vectors one
    after another, oldest first; a row of zeros if there are none, for Triton moves no empty tensors),
    ``partition_count`` int32[1,U], ``user_known`` bool[1,U] and ``item_known`` bool[1,N]. Vectors are those of the
    bundle's own encoding, whatever others the store holds; one that is still to be made is not there yet. A user of
    whom nothing is held has an empty history and no partitions; an item outside the catalogue has index 0. Both are
    scored, and marked as not known. Of a history longer than the bundle looks back the newest L behaviors are read.
    Where the bundle is not fused, no vectors are read and none of their tensors given.

    Args:
        store: whose users are scored.
        vocabulary: of the bundle.
        manifest: of the bundle.
        settings: the limits of a request.
        count: told after each batch by how much each of the `COUNTERS` grew.
    """

    inputs = ("user_id", "item_id", "user_index")

    def __init__(
        self,
        store: MemoryStore,
        vocabulary: Vocabulary,
        manifest: Manifest,
        settings: Settings,
        count: Callable[[Mapping[str, int]], None] | None = None,
    ) -> None:
        self._store = store
        self._vocabulary = vocabulary
        self._manifest = manifest
        self._settings = settings
        self._count = count or (lambda amounts: None)
        kernels = load_kernels(settings.kernels, threads=1)
        self._mapped = _CompiledMapping(vocabulary, kernels) if kernels else _Mapping(vocabulary)
        self._nothing = np.zeros((1, manifest.dimension), dtype=np.float32)

    @classmethod
    def load(cls, directory: Path, count: Callable[[Mapping[str, int]], None]) -> UserMemoryModel:
        """Reads the bundle's part in `directory` and opens the store that ``LIBER_STORE`` names."""
        settings = load_settings()
        model = cls(
            open_store(settings.store, create=False),
            Vocabulary.load(directory / VOCABULARY),
            Manifest.load(directory),
            settings,
            count,
        )
        model.warm_up()
        return model

    def warm_up(self) -> None:
        """Asks for nobody, so that the first request finds the store opened and the vocabulary sorted in."""
        nobody = np.array([[b"nobody"]], dtype=np.object_)
        # A store that does not answer yet is no reason not to load.
        self._answer([{"user_id": nobody, "item_id": nobody, "user_index": np.zeros((1, 1), dtype=np.int32)}])

    def close(self) -> None:
        """Closes the store."""
        self._store.close()

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """See `ServedModel.run`."""
        outcomes, truncated = self._answer(batch)
        users = candidates = known_users = known_candidates = 0
        for each in outcomes:
            if isinstance(each, dict):
                users += each["user_known"].size
                known_users += np.count_nonzero(each["user_known"])
                candidates += each["item_known"].size
                known_candidates += np.count_nonzero(each["item_known"])
        self._count(
            {
                "liber_scored_users_total": users,
                "liber_unknown_users_total": users - known_users,
                "liber_scored_candidates_total": candidates,
                "liber_unknown_candidates_total": candidates - known_candidates,
                "liber_histories_truncated_total": truncated,
            }
        )
        return outcomes

    def _answer(self, batch: Sequence[Tensors]) -> tuple[list[Outcome], int]:
        """The outcomes, and of how many users more is held than is looked back."""
        checked: list[FoldedRequest | LiberError] = []
        for tensors in batch:
            try:
                checked.append(check(tensors, self._settings))
            except InvalidInputError as error:
                checked.append(error)
        wanted = list(dict.fromkeys(user for each in checked if isinstance(each, FoldedRequest) for user in each.users))
        try:
            memories, truncated = self._read(wanted)
        except StoreError as error:
            return [each if isinstance(each, LiberError) else error for each in checked], 0
        return [each if isinstance(each, LiberError) else self._outcome(each, memories) for each in checked], truncated

    def _read(self, users: list[str]) -> tuple[dict[str, UserMemory | None], int]:
        manifest = self._manifest
        partitions = manifest.max_partitions if manifest.fused else 0
        # One behavior more than is looked back to tells a history that is longer.
        read = self._store.read(users, manifest.lookback + 1, partitions, manifest.fingerprint)
        truncated = sum(memory is not None and len(memory.history) > manifest.lookback for memory in read)
        return dict(zip(users, read, strict=True)), truncated

    def _outcome(self, request: FoldedRequest, memories: dict[str, UserMemory | None]) -> Outcome:
        held = [memories[user] for user in request.users]
        try:
            knowledge = self._knowledge(request.users, held) if self._manifest.fused else {}
        except LiberError as error:
            return error
        item_index = self._mapped.candidates(request.items)
        outcome = self._history(held)
        outcome.update(knowledge)
        outcome["profile"] = self._vocabulary.profile_table([memory.profile if memory else {} for memory in held])
        outcome["item_index"] = item_index
        outcome["item_known"] = item_index > 0
        outcome["user_known"] = np.array([memory is not None for memory in held])
        return {name: array[np.newaxis] for name, array in outcome.items()}

    def _history(self, held: Sequence[UserMemory | None]) -> dict[str, npt.NDArray[Any]]:
        histories = [memory.history.newest(self._manifest.lookback) if memory else _NO_HISTORY for memory in held]
        lengths = np.array([len(history) for history in histories], dtype=np.int32)
        items, feedback = self._mapped.histories(histories, lengths, self._manifest.lookback)
        return {"history_item": items, "history_feedback": feedback, "history_length": lengths}

    def _knowledge(self, users: Sequence[str], held: Sequence[UserMemory | None]) -> dict[str, npt.NDArray[Any]]:
        """The vectors, and how many are whose.

        Raises:
            ConfigurationError: a user's are of another encoding.
            StoreError: a user's are of another size than the bundle reads, or not finite.
        """
        for user, memory in zip(users, held, strict=True):
            if memory and memory.foreign:
                raise ConfigurationError(
                    f"the vectors of user {user!r} were made by encoder and PCA {', '.join(sorted(memory.foreign))}, "
                    f"this bundle reads {self._manifest.fingerprint}; publish the bundle they belong to, or make "
                    "vectors and a bundle from the stored texts with `liber build re-encode`"
                )
        counts = np.array([len(memory.representations) if memory else 0 for memory in held], dtype=np.int32)
        found = [memory.representations for memory in held if memory and len(memory.representations)]
        if not found:
            return {"representations": self._nothing, "partition_count": counts}
        if any(vectors.shape[1] != self._manifest.dimension for vectors in found):
            raise self._unusable(users, held)
        representations = np.concatenate(found)
        if not np.isfinite(representations).all():
            raise self._unusable(users, held)
        return {"representations": representations, "partition_count": counts}

    def _unusable(self, users: Sequence[str], held: Sequence[UserMemory | None]) -> StoreError:
        """Says of the first user whose vectors cannot be read why."""
        for user, memory in zip(users, held, strict=True):
            vectors = memory.representations if memory else self._nothing
            if not len(vectors):
                continue
            again = (
                f"make them again with `liber rewrite --user {shlex.quote(user)}`, or restore the store from a backup"
            )
            if not vectors.shape[1]:
                return StoreError(f"the store's vectors of user {user!r} are not of one size; {again}")
            if vectors.shape[1] != self._manifest.dimension:
                return StoreError(
                    f"the store's vectors of user {user!r} have {vectors.shape[1]} numbers, this bundle reads "
                    f"{self._manifest.dimension}; {again}"
                )
            if not np.isfinite(vectors).all():
                return StoreError(f"a vector of user {user!r} in the store holds NaN or infinity; {again}")
        raise AssertionError("every user's vectors can be read")


_NO_HISTORY = History()


class _Mapping:
    """Ids and feedback to a bundle's indices, by its vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def candidates(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """int32[N], item indices."""
        return self._vocabulary.item_indices(ids)

    def histories(
        self, histories: Sequence[History], lengths: npt.NDArray[np.int32], lookback: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Item and feedback indices, int32[U,L] each, padded with zeros behind a user's `lengths`."""
        items, feedback = np.zeros((2, len(histories), lookback), dtype=np.int32)
        valid = np.arange(lookback) < lengths[:, np.newaxis]
        items[valid] = self._vocabulary.item_indices([item for history in histories for item in history.item_ids])
        given = np.concatenate([history.feedback for history in histories])
        feedback[valid] = self._vocabulary.feedback_indices(given)
        return items, feedback


class _CompiledMapping(_Mapping):
    """The same by kernels, which make no object for each id."""

    def __init__(self, vocabulary: Vocabulary, kernels: Kernels) -> None:
        super().__init__(vocabulary)
        self._kernels = kernels
        self._index = kernels.index(vocabulary.items)

    def candidates(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """See `_Mapping`."""
        joined = "\n".join(ids)
        # An id with a line feed is nobody's, and would count for two.
        if joined.count("\n") != len(ids) - 1:
            return super().candidates(ids)
        held = np.array([len(ids)], dtype=np.int32)
        (indices,) = self._index.find(joined.encode(), held, np.zeros_like(held), len(ids))
        return np.asarray(indices, dtype=np.int32)

    def histories(
        self, histories: Sequence[History], lengths: npt.NDArray[np.int32], lookback: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """See `_Mapping`."""
        skipped = np.array([history.skipped for history in histories], dtype=np.int32)
        held = lengths + skipped
        some = [history for history in histories if history.packed_feedback]
        ids = "\n".join([history.joined_ids for history in some]).encode()
        feedback = b"".join([history.packed_feedback for history in some])
        boundaries = self._vocabulary.feedback.boundaries
        return (
            self._index.find(ids, held, skipped, lookback),
            self._kernels.levels(feedback, held, skipped, boundaries, lookback),
        )


def check(tensors: Tensors, settings: Settings) -> FoldedRequest:
    """Checks one scoring request.

    Ids come as an element each, or all in one element, parted by line feeds: what the scoring client sends, for Triton
    takes a microsecond for each element.

    Raises:
        InvalidInputError: no candidates or users, too many, lengths that differ, an index outside the users, an id
            that is not UTF-8.
    """
    for name in UserMemoryModel.inputs:
        if tensors[name].ndim != 2 or tensors[name].shape[0] != 1:
            raise InvalidInputError(f"{name} has shape {list(tensors[name].shape)}; send [1, n]")
    user_ids, item_ids = (_decode(name, tensors[name][0]) for name in ("user_id", "item_id"))
    users, candidates = len(user_ids), len(item_ids)
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
    index = tensors["user_index"][0]
    if len(index) != candidates:
        raise InvalidInputError(f"user_index has {len(index)} entries for {candidates} candidates; send one for each")
    outside = (index < 0) | (index >= users)
    if outside.any():
        where = int(np.argmax(outside))
        raise InvalidInputError(
            f"user_index[{where}] is {int(index[where])}; with {users} users it must lie in 0..{users - 1}"
        )
    return FoldedRequest(user_ids, item_ids, index)


def _decode(name: str, ids: npt.NDArray[np.object_]) -> list[str]:
    """One id for each element; of a single element, one for each of its lines, for no id holds a line feed."""
    try:
        return ids[0].decode().split("\n") if len(ids) == 1 else list(map(bytes.decode, ids.tolist()))
    except UnicodeDecodeError as error:
        value = error.object
    raise InvalidInputError(
        f"{name}[{ids.tolist().index(value)}] is {value[:40]!r}, which is not UTF-8; send ids encoded as UTF-8"
    )
