"""Embeds the texts of a store on Triton, once each, and projects them: what a bundle is fitted on (Eq. 4)."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builders.repository import publish_encoder
from liber_runtime.bundle import EncoderSpec
from liber_runtime.progress import progress
from liber_runtime.representation import Encoded, TextModel
from liber_runtime.served.session import OnnxSession
from liber_runtime.server import TritonServer

Pair = tuple[str, str]
"""(summary, shift)."""

MODEL = "liber_embed"


class EmbeddingCache:
    """Embeddings on disk by encoder and content hash, so that an interrupted build encodes no text twice."""

    def __init__(self, path: Path, spec: EncoderSpec) -> None:
        """Opens, or makes, the cache file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._encoder = spec.digest
        self._size = spec.embedding_size
        self._database = sqlite3.connect(path)
        self._database.execute("CREATE TABLE IF NOT EXISTS embeddings (hash BLOB PRIMARY KEY, vector BLOB) STRICT")

    def missing(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The distinct pairs that are not in the cache."""
        known = {key for (key,) in self._database.execute("SELECT hash FROM embeddings")}
        return [pair for pair in dict.fromkeys(pairs) if self._key(pair) not in known]

    def put(self, pairs: Sequence[Pair], embeddings: npt.NDArray[np.float32]) -> None:
        """Keeps embeddings float32[n, h] of n pairs, durably."""
        rows = [(self._key(pair), row.astype("<f4").tobytes()) for pair, row in zip(pairs, embeddings, strict=True)]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)

    def get(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float32]:
        """float32[n, h] of pairs that are all in the cache."""
        read = "SELECT vector FROM embeddings WHERE hash = ?"
        blobs = [self._database.execute(read, (self._key(pair),)).fetchone()[0] for pair in pairs]
        return np.frombuffer(b"".join(blobs), dtype="<f4").reshape(len(pairs), self._size).astype(np.float32)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def _key(self, pair: Pair) -> bytes:
        content = "\x1e".join((self._encoder, *pair))
        return hashlib.blake2b(content.encode(), digest_size=20).digest()


def embed(encoder: Path, pairs: Sequence[Pair], cache: EmbeddingCache) -> None:
    """Brings the embeddings of all pairs into the cache; what is missing is computed by ``liber_embed`` on Triton.

    Args:
        encoder: directory of an exported encoder.
        pairs: (summary, shift) of partitions.
        cache: receives the embeddings as they come, so that an interrupted run loses little.

    Raises:
        ServerError: Triton did not start.
        ScoringError: it refused the texts.
    """
    missing = cache.missing(pairs)
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="liber-embed-") as directory:
        repository = Path(directory) / "model_repository"
        log_file = Path(directory) / "triton.log"
        publish_encoder(encoder, repository)
        with TritonServer(repository, log_file=log_file) as server:
            asyncio.run(_embed(server.grpc_url, missing, cache))


async def _embed(url: str, pairs: Sequence[Pair], cache: EmbeddingCache) -> None:
    model = TextModel(url, MODEL)
    with progress("encode texts on Triton", len(pairs)) as advance:

        def receive(positions: list[int], outputs: dict[str, npt.NDArray[Any]]) -> None:
            cache.put([pairs[position] for position in positions], outputs["text_embedding"])
            advance(len(positions))

        try:
            await model.run(pairs, ("text_embedding",), receive)
        finally:
            await model.close()


class CachedEncoder:
    """The `Encoder` of a build: cached embeddings through the new bundle's PCA graph, as Triton will run it."""

    def __init__(self, cache: EmbeddingCache, pca: Path, fingerprint: str) -> None:
        """Loads the PCA graph."""
        self._cache = cache
        self._session = OnnxSession(pca, threads=1)
        self._fingerprint = fingerprint

    async def encode(self, texts: Sequence[Pair]) -> Encoded:
        """See `Encoder.encode`; every pair must be in the cache."""
        vectors = self._session.run({"text_embedding": self._cache.get(texts)})["representation"]
        return Encoded(vectors, self._fingerprint)
