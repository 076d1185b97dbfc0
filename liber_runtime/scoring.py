"""The gRPC scoring client, sync and asyncio: raw ids in, click probabilities out.

Both clients share `fold`, which names every distinct user once and cuts large calls into requests the server takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from liber_runtime.behavior import MAX_ID_BYTES, check_id
from liber_runtime.channel import open_async_client, open_client
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.grpc_errors import explain
from liber_runtime.settings import Settings, load_settings

MODEL = "liber_score"

_OUTPUTS = ("click_probability", "user_known", "item_known")


@dataclass(frozen=True, slots=True)
class Scores:
    """The answer to one scoring call.

    Attributes:
        probability: float32[N], in the order of the candidates.
        unknown_users: the users of whom nothing is held, once each; they were scored from the features there are.
        unknown_items: the items outside the catalogue, once each; they were scored with the out-of-vocabulary row.
    """

    probability: npt.NDArray[np.float32]
    unknown_users: tuple[str, ...]
    unknown_items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FoldedCall:
    """One request: U distinct users, N candidates, `user_index` int32[N] says whose candidate each is."""

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    user_index: npt.NDArray[np.int32]


def fold(
    user_ids: Sequence[str] | str, item_ids: Sequence[str], max_users: int, max_candidates: int
) -> list[FoldedCall]:
    """Folds repeated users and cuts the call into requests within the limits, in order.

    Args:
        user_ids: one user for all candidates, or one for each.
        item_ids: the candidates.
        max_users: most distinct users in a request.
        max_candidates: most candidates in a request.

    Raises:
        InvalidInputError: no candidates, lengths that differ, or an unusable id.
    """
    if isinstance(item_ids, str):
        raise InvalidInputError(f"item_ids is the string {item_ids!r:.80}; pass a list of item ids")
    if not len(item_ids):
        raise InvalidInputError("item_ids is empty; pass at least one candidate")
    if isinstance(user_ids, str):
        if len(item_ids) <= max_candidates and _all_plain([user_ids]) and _all_plain(item_ids):
            return [FoldedCall((user_ids,), tuple(item_ids), np.zeros(len(item_ids), np.int32))]
        owners: Sequence[str] = [user_ids] * len(item_ids)
    else:
        owners = user_ids
    if len(owners) != len(item_ids):
        raise InvalidInputError(
            f"{len(owners)} user ids for {len(item_ids)} item ids; pass one user, or one for each candidate"
        )
    if len(item_ids) <= max_candidates and _all_plain(owners) and _all_plain(item_ids):
        users = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
        if len(users) <= max_users:
            whose = np.fromiter(map(users.__getitem__, owners), np.int32, len(owners))
            return [FoldedCall(tuple(users), tuple(item_ids), whose)]
    calls: list[FoldedCall] = []
    position: dict[str, int] = {}
    items: list[str] = []
    index: list[int] = []

    def close() -> None:
        calls.append(FoldedCall(tuple(position), tuple(items), np.array(index, np.int32)))
        position.clear()
        items.clear()
        index.clear()

    for owner, item in zip(owners, item_ids, strict=True):
        if owner not in position:
            check_id("user id", owner)
            if len(position) == max_users:
                close()
        if len(items) == max_candidates:
            close()
        index.append(position.setdefault(owner, len(position)))
        items.append(check_id("item id", item))
    close()
    return calls


def _all_plain(ids: Sequence[str]) -> bool:
    """Whether all are ids that `check_id` would take, found out in a few passes over all of them; else nobody knows."""
    try:
        joined = "\n".join(ids)
    except TypeError:
        return False
    return (
        joined.isascii()
        and joined.replace("\n", "x").isprintable()
        and joined.count("\n") == len(ids) - 1
        and all(ids)
        and len(max(ids, key=len)) <= MAX_ID_BYTES
    )


class ScoringClient:
    """Scores over one gRPC channel; may be shared between threads."""

    def __init__(
        self, url: str | None = None, settings: Settings | None = None, *, own_connection: bool = False
    ) -> None:
        """Names the server; connects at the first call.

        Args:
            url: host:port of Triton's gRPC endpoint; default ``LIBER_TRITON``.
            settings: limits, deadline and TLS; default from the environment.
            own_connection: whether to keep a connection apart; see `liber_runtime.channel.open_client`.

        Raises:
            ConfigurationError: the settings of TLS will not do.
        """
        self._settings = settings or load_settings()
        self._url = url or self._settings.triton
        self._client = open_client(self._url, self._settings, own_connection=own_connection)

    def score(self, user_ids: Sequence[str] | str, item_ids: Sequence[str]) -> Scores:
        """Click probabilities of candidates.

        Args:
            user_ids: one user for all candidates (ranking), or one for each candidate.
            item_ids: the candidates, any number; large calls go out as several requests.

        Raises:
            InvalidInputError: the call cannot be sent as it is.
            ScoringError: the server refused it or did not answer in time; `status` is the gRPC status.
        """
        settings = self._settings
        calls = fold(user_ids, item_ids, settings.max_users, settings.max_candidates)
        return _gather(calls, [self._send(call) for call in calls])

    def _send(self, call: FoldedCall) -> Any:
        seconds = self._settings.deadline_seconds
        try:
            return self._client.infer(MODEL, _inputs(call), outputs=_REQUESTED, client_timeout=seconds)
        except InferenceServerException as error:
            raise explain(error, self._url, seconds) from None

    def close(self) -> None:
        """Closes the channel."""
        self._client.close()

    def __enter__(self) -> ScoringClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncScoringClient:
    """`ScoringClient` for asyncio; the requests of a large call are in flight together."""

    def __init__(self, url: str | None = None, settings: Settings | None = None) -> None:
        """See `ScoringClient`."""
        self._settings = settings or load_settings()
        self._url = url or self._settings.triton
        self._client = open_async_client(self._url, self._settings)

    async def score(self, user_ids: Sequence[str] | str, item_ids: Sequence[str]) -> Scores:
        """See `ScoringClient.score`."""
        settings = self._settings
        calls = fold(user_ids, item_ids, settings.max_users, settings.max_candidates)
        return _gather(calls, await asyncio.gather(*(self._send(call) for call in calls)))

    async def _send(self, call: FoldedCall) -> Any:
        seconds = self._settings.deadline_seconds
        try:
            return await self._client.infer(MODEL, _inputs(call), outputs=_REQUESTED, client_timeout=seconds)
        except InferenceServerException as error:
            raise explain(error, self._url, seconds) from None

    async def close(self) -> None:
        """Closes the channel."""
        await self._client.close()

    async def __aenter__(self) -> AsyncScoringClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _inputs(call: FoldedCall) -> list[tritonclient.grpc.InferInput]:
    # Ids go out as one element, parted by line feeds, which no id can hold: an element each would cost both sides a
    # microsecond for each.
    tensors = {
        "user_id": np.array([["\n".join(call.user_ids).encode()]], dtype=np.object_),
        "item_id": np.array([["\n".join(call.item_ids).encode()]], dtype=np.object_),
        "user_index": call.user_index[np.newaxis],
    }
    inputs = []
    for name, array in tensors.items():
        tensor = tritonclient.grpc.InferInput(name, array.shape, "INT32" if name == "user_index" else "BYTES")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


_REQUESTED = [tritonclient.grpc.InferRequestedOutput(name) for name in _OUTPUTS]


def _gather(calls: Sequence[FoldedCall], answers: Sequence[Any]) -> Scores:
    probability = np.concatenate([answer.as_numpy("click_probability")[0] for answer in answers])
    users: dict[str, None] = {}
    items: dict[str, None] = {}
    for call, answer in zip(calls, answers, strict=True):
        users.update(dict.fromkeys(_missing(call.user_ids, answer.as_numpy("user_known")[0])))
        items.update(dict.fromkeys(_missing(call.item_ids, answer.as_numpy("item_known")[0])))
    return Scores(probability, tuple(users), tuple(items))


def _missing(ids: Sequence[str], known: npt.NDArray[np.bool_]) -> list[str]:
    return [ids[position] for position in np.flatnonzero(~known)]
