"""Knowledge encoder, online half: (summary, shift) -> r_j through Triton (paper, section 3.4.1, Eq. 4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from liber_runtime.channel import channel_credentials, open_async_client
from liber_runtime.exceptions import ScoringError
from liber_runtime.grpc_errors import explain
from liber_runtime.settings import Settings, load_settings

MODEL = "liber_encode"

PAIRS_PER_REQUEST = 8
"""Pairs of texts in one request. On a CPU few are faster than many: their activations stay in the cache (measured:
13,000 tokens/s with 8 pairs, 9,000 with 32)."""

REQUESTS_IN_FLIGHT = 2
"""One request computes while the next one is tokenized."""

FINGERPRINT_SECONDS = 10.0
"""A server may be switched to another bundle while there is nothing to encode: what it makes is asked that often."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors and what made them.

    Attributes:
        vectors: float32[B, d], row i for the i-th pair of texts.
        fingerprint: identifies encoder, pooling and PCA; vectors of different fingerprints never mix.
    """

    vectors: npt.NDArray[np.float32]
    fingerprint: str


class Encoder(Protocol):
    """Turns the two texts of partitions into representations."""

    async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
        """Encodes pairs of (summary, shift), at least one; the shift of a first partition is empty.

        Raises:
            ScoringError: the encoding server refused or did not answer. UNAVAILABLE and ABORTED cost no attempt.
        """
        ...

    async def fingerprint(self) -> str:
        """What encoding the vectors are of that `encode` would make now: what a worker claims steps for.

        Raises:
            ScoringError: the encoding server refused or did not answer.
        """
        ...


class TextModel:
    """An ensemble on Triton that makes one row of each (summary, shift): ``liber_encode`` or ``liber_embed``."""

    def __init__(
        self, url: str, model: str, deadline_seconds: float = 120.0, *, settings: Settings | None = None
    ) -> None:
        """Names the server and the ensemble; connects at the first call.

        Args:
            url: host:port of Triton's gRPC endpoint.
            model: the ensemble.
            deadline_seconds: how long an answer is waited for.
            settings: TLS; default from the environment.

        Raises:
            ConfigurationError: the settings of TLS will not do.
        """
        self._settings = settings or load_settings()
        channel_credentials(self._settings)  # what is wrong with a file is to be known before there is work
        self._url = url
        self._model = model
        self._deadline = deadline_seconds
        self._client: Any = None

    async def run(
        self,
        texts: Sequence[tuple[str, str]],
        outputs: Sequence[str],
        receive: Callable[[list[int], dict[str, npt.NDArray[Any]]], None],
    ) -> None:
        """Sends all pairs, those of like length together, so that little padding is computed.

        Args:
            texts: pairs of (summary, shift).
            outputs: tensors wanted.
            receive: called once per answered request with the positions in `texts` it was about, and its outputs.

        Raises:
            ScoringError: the server refused or did not answer; what was received before stays received.
        """
        order = sorted(range(len(texts)), key=lambda position: -sum(map(len, texts[position])))
        slots = asyncio.Semaphore(REQUESTS_IN_FLIGHT)

        async def send(positions: list[int]) -> None:
            async with slots:
                receive(positions, await self._infer([texts[position] for position in positions], outputs))

        requests = [
            asyncio.ensure_future(send(order[start : start + PAIRS_PER_REQUEST]))
            for start in range(0, len(order), PAIRS_PER_REQUEST)
        ]
        try:
            await asyncio.gather(*requests)
        finally:
            for request in requests:
                request.cancel()

    async def _infer(self, texts: Sequence[tuple[str, str]], outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        inputs = []
        for name, column in zip(("summary", "shift"), zip(*texts, strict=True), strict=True):
            tensor = tritonclient.grpc.InferInput(name, [len(texts)], "BYTES")
            tensor.set_data_from_numpy(np.array([text.encode() for text in column], dtype=np.object_))
            inputs.append(tensor)
        requested = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]
        if self._client is None:
            # Not sooner: a channel belongs to the event loop that runs when it is made.
            self._client = open_async_client(self._url, self._settings)
        try:
            answer = await self._client.infer(self._model, inputs, outputs=requested, client_timeout=self._deadline)
        except InferenceServerException as error:
            raise explain(error, self._url, self._deadline) from None
        return {name: answer.as_numpy(name) for name in outputs}

    async def close(self) -> None:
        """Closes the channel."""
        if self._client is not None:
            await self._client.close()


class TritonEncoder:
    """The `Encoder` of production: ``liber_encode``, which says itself what its vectors were made by."""

    def __init__(self, url: str, settings: Settings | None = None) -> None:
        """Names the server; connects at the first call. See `TextModel`."""
        self._model = TextModel(url, MODEL, settings=settings)
        self._fingerprint = ""
        self._told_at = 0.0

    async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
        """See `Encoder.encode`. Equal pairs are encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows: dict[tuple[str, str], npt.NDArray[np.float32]] = {}
        fingerprints: set[str] = set()

        def receive(positions: list[int], outputs: dict[str, npt.NDArray[Any]]) -> None:
            fingerprints.add(outputs["fingerprint"][0].decode())
            for position, row in zip(positions, outputs["representation"], strict=True):
                rows[distinct[position]] = row

        await self._model.run(distinct, ("representation", "fingerprint"), receive)
        if len(fingerprints) != 1:
            self._fingerprint = ""
            raise ScoringError("the encoder was replaced while these texts were encoded; encode them again", "ABORTED")
        self._fingerprint, self._told_at = fingerprints.pop(), time.monotonic()
        return Encoded(np.stack([rows[pair] for pair in texts]), self._fingerprint)

    async def fingerprint(self) -> str:
        """See `Encoder.fingerprint`: that of the newest answer, or of one short text if that is long ago."""
        if not self._fingerprint or time.monotonic() - self._told_at > FINGERPRINT_SECONDS:
            await self.encode([("interest", "")])
        return self._fingerprint

    async def close(self) -> None:
        """Closes the channel."""
        await self._model.close()
