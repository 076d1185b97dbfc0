"""Another encoder under a system that goes on: it works with the old vectors, and then with the new ones."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import Built, Matrix, Questions, Running, await_true, copy_build, opened, share_encoder

from builders import embedding
from builders.build import reencode, switch
from builders.embedding import EmbeddingCache, Pair
from builders.repository import deploy, publish
from liber_runtime.behavior import Behavior
from liber_runtime.bundle import Manifest
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.interest import Prompt
from liber_runtime.memory import MemoryStore, Timeline
from liber_runtime.representation import TritonEncoder
from liber_runtime.scoring import ScoringClient
from liber_runtime.server import TritonServer
from liber_runtime.worker import Worker
from liber_runtime.writers import Completion
from liber_runtime.writers.statistical import StatisticalWriter


@pytest.fixture
def system(built: Built, tmp_path: Path) -> Iterator[Running]:
    """A server on a store of its own."""
    copied = copy_build(built, tmp_path / "built")
    publish(copied.bundle, tmp_path / "model_repository")
    server = TritonServer(
        tmp_path / "model_repository",
        log_file=tmp_path / "triton.log",
        environment={"LIBER_STORE": copied.store_url},
    )
    with server:
        yield Running(server, copied, tmp_path / "model_repository")


class CountingWriter:
    """The statistical writer, which says how often it was called."""

    name = "statistical"

    def __init__(self) -> None:
        self.calls = 0
        self._writer = StatisticalWriter()

    async def write(self, prompt: Prompt) -> Completion:
        self.calls += 1
        return await self._writer.write(prompt)


class Traffic:
    """Scorers, an appender and a worker in threads, until the block ends.

    The scorers ask about users who stay as they are; the appender brings others, 20 behaviors of each at a time.
    """

    def __init__(self, system: Running, questions: Questions, scorers: int = 3) -> None:
        self._system = system
        self._questions = questions
        self._stop = threading.Event()
        self.answers: list[list[Matrix]] = [[] for _ in range(scorers)]
        self.failures: list[BaseException] = []
        self.appended = 0
        self.writer = CountingWriter()
        self._threads = [
            *(threading.Thread(target=self._guarded, args=(self._score, into)) for into in self.answers),
            threading.Thread(target=self._guarded, args=(self._append,)),
            threading.Thread(target=self._guarded, args=(self._work,)),
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        await_true(lambda: bool(self.failures) or all(len(each) > 3 for each in self.answers))
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _guarded(self, run, *arguments) -> None:  # type: ignore[no-untyped-def]
        try:
            run(*arguments)
        except BaseException as error:
            self.failures.append(error)

    def _score(self, into: list[Matrix]) -> None:
        with ScoringClient(self._system.url, own_connection=True) as client:
            # With a pause, for else they would take the processors that the build needs to come to its end.
            while not self._stop.wait(0.05):
                into.append(self._questions.ask(client))

    def _append(self) -> None:
        items = list(self._system.built.dataset.items)
        begin = self._system.built.dataset.behaviors[-1].timestamp
        with opened(self._system.built) as store:
            while not self._stop.wait(0.1):
                user = f"newcomer-{self.appended % 7}"
                count = self.appended // 7 * 20
                store.append(
                    [Behavior(user, items[n % len(items)], 1.0 + n % 5, begin + n) for n in range(count, count + 20)]
                )
                self.appended += 1

    def _work(self) -> None:
        async def work(store: MemoryStore) -> None:
            encoder, stop = TritonEncoder(self._system.url), asyncio.Event()
            working = asyncio.ensure_future(Worker(store, self.writer, encoder, idle_seconds=0.05).run(stop))
            try:
                while not self._stop.is_set() and not working.done():
                    await asyncio.sleep(0.05)
                stop.set()
                await working
            finally:
                await encoder.close()

        with opened(self._system.built) as store:
            asyncio.run(work(store))


def held(store: MemoryStore) -> list[Timeline]:
    return [timeline for user in store.users() if (timeline := store.timeline(user))]


def test_requests_are_answered_from_the_old_vectors_and_then_from_the_new_ones(
    system: Running, other_bert: Path, exported_other: Path
) -> None:
    built, questions = system.built, Questions(system.built)
    share_encoder(exported_other, built.directory / "knowledge")
    settings = dataclasses.replace(built.settings, encoder=str(other_bert), dimension=6)
    with opened(built) as store, ScoringClient(system.url) as client:
        before, old = held(store), questions.ask(client)
        with Traffic(system, questions) as traffic:
            manifest, _ = reencode(store, StatisticalWriter(), built.directory, settings)
            assert store.statistics().encodings == {built.manifest.fingerprint, manifest.fingerprint}
            deploy(built.bundle, system.repository, system.url)
            switch(store, manifest.fingerprint)
            new = questions.ask(client)
            seen = [len(each) for each in traffic.answers]
            await_true(
                lambda: (
                    bool(traffic.failures)
                    or all(len(each) > count + 3 for each, count in zip(traffic.answers, seen, strict=True))
                )
            )
            # The worker goes on with the new encoding by itself.
            await_true(
                lambda: (
                    bool(traffic.failures)
                    or any("newcomer" in each.user_id and _is_complete(each, manifest) for each in held(store))
                )
            )
        assert not traffic.failures
        assert system.server.stub_restarts == system.server.server_restarts == 0
        assert np.abs(old - new).max() > 1e-3
        for each in traffic.answers:
            is_old = [np.allclose(answer, old, atol=1e-6) for answer in each]
            is_new = [np.allclose(answer, new, atol=1e-6) for answer in each]
            assert all(one != other for one, other in zip(is_old, is_new, strict=True))
            assert is_new == sorted(is_new)
            assert is_old[0]
            assert is_new[-1]
        after = {each.user_id: each for each in held(store)}
        for timeline in before:
            for was, now in zip(timeline.partitions, after[timeline.user_id].partitions, strict=True):
                assert (was.summary, was.shift) == (now.summary, now.shift)
                assert set(now.representations) == {built.manifest.fingerprint, manifest.fingerprint}
                old_vector = was.representations[built.manifest.fingerprint].vector
                np.testing.assert_array_equal(now.representations[built.manifest.fingerprint].vector, old_vector)
        texts = sum(
            (record.summary is not None) + (record.shift is not None)
            for user, timeline in after.items()
            if user.startswith("newcomer")
            for record in timeline.partitions
        )
        assert traffic.writer.calls == texts > 0
        assert store.statistics().encodings == {manifest.fingerprint}


class _StopError(Exception):
    """Ends a re-encode in the middle."""


def test_an_interrupted_one_goes_on_where_it_was(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = copy_build(built, tmp_path / "built")
    (copied.directory / "knowledge" / "embeddings.db").unlink()
    settings = dataclasses.replace(copied.settings, dimension=6)
    embedded: list[Pair] = []
    batches = 0
    put = EmbeddingCache.put

    def put_and_stop(self: EmbeddingCache, pairs: Sequence[Pair], embeddings: Matrix) -> None:
        nonlocal batches
        put(self, pairs, embeddings)
        embedded.extend(pairs)
        batches += 1
        if batches == 4:
            raise _StopError

    monkeypatch.setattr(embedding.EmbeddingCache, "put", put_and_stop)
    with opened(copied) as store:
        with contextlib.suppress(_StopError):
            reencode(store, StatisticalWriter(), copied.directory, settings)
        assert batches >= 4
        stopped = len(embedded)
        pairs = {
            (record.summary.text, record.shift.text if record.shift else "")
            for timeline in held(store)
            for record in timeline.partitions
            if record.summary
        }
        assert 0 < stopped < len(pairs)
        (user, *_) = store.users()
        (read,) = store.read([user], 0, 40, copied.manifest.fingerprint)
        assert read is not None
        assert not read.foreign
        manifest, _ = reencode(store, StatisticalWriter(), copied.directory, settings)
        assert manifest.fingerprint != copied.manifest.fingerprint
        # Of the partitions and, as r̂ meets them, of the items.
        assert len(embedded) == len(set(embedded)) == len(pairs) + len(built.dataset.items)
        # Nothing is left to do: the same again makes the same bundle and encodes nothing.
        again, _ = reencode(store, StatisticalWriter(), copied.directory, settings)
        assert again.bundle_id == manifest.bundle_id
        assert len(embedded) == len(pairs) + len(built.dataset.items)


def test_it_learns_what_a_build_from_the_log_learns(built: Built, tmp_path: Path) -> None:
    copied = copy_build(built, tmp_path / "built")
    with opened(copied) as store:
        again, _ = reencode(store, StatisticalWriter(), copied.directory, copied.settings)
        assert store.statistics().encodings == {copied.manifest.fingerprint}
    assert again.fingerprint == copied.manifest.fingerprint
    assert again.bundle_id == copied.manifest.bundle_id


def test_a_refitted_pca_is_fitted_once(built: Built, tmp_path: Path) -> None:
    """A build that ended before its bundle left a PCA: the next one takes it, and the one after fits anew."""
    copied = copy_build(built, tmp_path / "built")
    settings = dataclasses.replace(copied.settings, refit_pca=True, dimension=5)
    with opened(copied) as store:
        first, _ = reencode(store, StatisticalWriter(), copied.directory, settings)
        assert store.statistics().encodings == {copied.manifest.fingerprint, first.fingerprint}
        with pytest.raises(ConfigurationError, match=r"reads vectors of encoder and PCA f00, the store has those of"):
            switch(store, "f00")
        assert switch(store, first.fingerprint) == 0
        assert store.statistics().encodings == {first.fingerprint}


def _is_complete(timeline: Timeline, manifest: Manifest) -> bool:
    newest = timeline.partitions[-1:] if timeline.partitions else ()
    return any(manifest.fingerprint in record.representations for record in newest)
