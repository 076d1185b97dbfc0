"""Embeds the texts of a store on Triton, once each, and projects them: what a bundle is fitted on (Eq. 4)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builders.priority import share_priority
from builders.repository import publish_encoder
from liber_runtime.bundle import PCA, EncoderSpec
from liber_runtime.exceptions import ScoringError
from liber_runtime.progress import Advance, progress
from liber_runtime.representation import Encoded, TextModel
from liber_runtime.served.session import OnnxSession
from liber_runtime.server import TritonServer
from liber_runtime.settings import load_settings

Pair = tuple[str, str]
"""(summary, shift)."""

MODEL = "liber_embed"

ATTEMPTS = 5
"""Of embedding what is missing, before a build gives up; what came meanwhile is kept."""


class EmbeddingCache:
    """Embeddings on disk by encoder and content hash, so that an interrupted build encodes no text twice."""

    def __init__(self, path: Path, spec: EncoderSpec) -> None:
        """Opens, or makes, the cache file; it belongs to the thread that opened it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._encoder = spec.digest
        self._size = spec.embedding_size
        self._database = sqlite3.connect(path)
        self._database.execute("CREATE TABLE IF NOT EXISTS embeddings (hash BLOB PRIMARY KEY, vector BLOB) STRICT")

    def missing(self, pairs: Iterable[Pair]) -> list[Pair]:
        """The distinct pairs that are not in the cache."""
        look = "SELECT 1 FROM embeddings WHERE hash = ?"
        return [
            pair for pair in dict.fromkeys(pairs) if self._database.execute(look, (self._key(pair),)).fetchone() is None
        ]

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


class Embedder:
    """Embeds texts that the cache lacks, on a Triton of the build's own that starts with the first of them.

    It has the priority of this process.
    """

    def __init__(self, encoder: Path, cache: EmbeddingCache) -> None:
        """Names the directory of an exported encoder; starts nothing yet."""
        self._encoder = encoder
        self._cache = cache
        self._stack = contextlib.ExitStack()
        self._server: TritonServer | None = None

    def embed(self, pairs: Sequence[Pair]) -> None:
        """Brings the embeddings of all pairs into the cache, as they come: an interrupted run loses little.

        Raises:
            ServerError: Triton did not start.
            ScoringError: it refused the texts.
        """
        missing = self._cache.missing(pairs)
        if missing:
            with progress("encode texts on Triton", len(missing)) as advance:
                asyncio.run(self.add(missing, advance))

    async def add(self, pairs: Sequence[Pair], advance: Advance | None = None) -> None:
        """The same for a few pairs, beside other work.

        Args:
            pairs: (summary, shift) of partitions.
            advance: told of the pairs as they come.

        Raises:
            ServerError: Triton did not start.
            ScoringError: it refused the texts.
        """
        for attempt in range(1, ATTEMPTS + 1):
            missing = self._cache.missing(pairs)
            if not missing:
                return
            try:
                await self._run(missing, advance)
            except ScoringError as error:
                # On a machine without idle time a model can die of it; the server heals itself.
                if attempt == ATTEMPTS or error.status == "INVALID_ARGUMENT":
                    raise
                await asyncio.sleep(attempt)

    async def _run(self, missing: Sequence[Pair], advance: Advance | None) -> None:
        def receive(positions: list[int], outputs: dict[str, npt.NDArray[Any]]) -> None:
            self._cache.put([missing[position] for position in positions], outputs["text_embedding"])
            if advance is not None:
                advance(len(positions))

        model = TextModel(self._start(), MODEL, settings=load_settings().without_tls)
        try:
            await model.run(missing, ("text_embedding",), receive)
        finally:
            await model.close()

    def close(self) -> None:
        """Stops the server, if one was needed."""
        self._stack.close()

    def _start(self) -> str:
        # Without awaiting anything, so that two callers at once do not start two.
        if self._server is None:
            directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="liber-embed-")))
            repository = directory / "model_repository"
            publish_encoder(self._encoder, repository)
            # Nobody but this process asks it, and by its end that has all its answers: nothing is to be waited for.
            server = TritonServer(repository, log_file=directory / "triton.log", stop_timeout=0)
            self._server = self._stack.enter_context(server)
            if server.process_id is not None:
                share_priority(server.process_id)
        return self._server.grpc_url


class CachedEncoder:
    """The `Encoder` of a build: embeddings, cached or made now, through the new bundle's PCA as Triton will run it."""

    def __init__(self, cache: EmbeddingCache, embedder: Embedder, pca: Path, fingerprint: str) -> None:
        """Loads the PCA graph."""
        self._cache = cache
        self._embedder = embedder
        self._session = OnnxSession(pca, threads=1)
        self._fingerprint = fingerprint

    async def fingerprint(self) -> str:
        """See `Encoder.fingerprint`."""
        return self._fingerprint

    async def encode(self, texts: Sequence[Pair]) -> Encoded:
        """See `Encoder.encode`."""
        await self._embedder.add(texts)
        vectors = self._session.run({"text_embedding": self._cache.get(texts)})["representation"]
        return Encoded(vectors, self._fingerprint)


@contextlib.contextmanager
def open_embedder(directory: Path, spec: EncoderSpec) -> Iterator[tuple[EmbeddingCache, Embedder]]:
    """The embeddings of a directory, and what brings more into them.

    Args:
        directory: with encoder, tokenizer and embeddings, as `builders.build.fit_representations` leaves it.
        spec: of the encoder.
    """
    kept = _kept.get()
    with contextlib.ExitStack() if kept is None else contextlib.nullcontext(kept.stack) as stack:
        opened = None if kept is None else kept.opened.get((directory, spec.digest))
        if opened is None:
            cache = EmbeddingCache(directory / "embeddings.db", spec)
            stack.callback(cache.close)
            opened = cache, Embedder(directory, cache)
            stack.callback(opened[1].close)
            if kept is not None:
                kept.opened[directory, spec.digest] = opened
        yield opened


@dataclass(frozen=True)
class _Kept:
    stack: contextlib.ExitStack
    opened: dict[tuple[Path, str], tuple[EmbeddingCache, Embedder]] = field(default_factory=dict)


_kept: ContextVar[_Kept | None] = ContextVar("_kept", default=None)


@contextlib.contextmanager
def keep_embedders() -> Iterator[None]:
    """What `open_embedder` opens stays open to the end of the block: its Triton starts once for all who ask."""
    with contextlib.ExitStack() as stack:
        before = _kept.set(_Kept(stack))
        stack.callback(_kept.reset, before)
        yield


@contextlib.contextmanager
def open_encoder(directory: Path, spec: EncoderSpec, fingerprint: str) -> Iterator[CachedEncoder]:
    """The encoder of a build, for texts beside its store.

    Args:
        directory: as of `open_embedder`, with the PCA.
        spec: of the encoder.
        fingerprint: of encoder and PCA.
    """
    with open_embedder(directory, spec) as (cache, embedder):
        yield CachedEncoder(cache, embedder, directory / PCA, fingerprint)
