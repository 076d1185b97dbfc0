"""What a build encoded on Triton, and what its PCA was fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import psutil
import pytest
from conftest import Built, share_encoder

from builders.build import drain
from builders.catalogue import embed_items, write_items
from builders.embedding import EmbeddingCache, keep_embedders, open_embedder, open_encoder
from builders.pca import fit_pca
from builders.replay import replay, split
from builders.variants import VARIANTS, sample_vectors
from liber_runtime.behavior import Behavior
from liber_runtime.bundle import PCA, VOCABULARY, EncoderSpec
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.interest import Prompt
from liber_runtime.memory import MemoryStore, open_store
from liber_runtime.vocabulary import Vocabulary
from liber_runtime.worker import Worker
from liber_runtime.writers import Completion
from liber_runtime.writers.statistical import StatisticalWriter


def components(path: Path) -> npt.NDArray[np.float32]:
    (matrix,) = [each for each in onnx.load(path).graph.initializer if each.name == "components"]
    return onnx.numpy_helper.to_array(matrix)


def test_the_pca_is_fitted_on_the_training_partitions_alone(built: Built, store: MemoryStore, tmp_path: Path) -> None:
    samples = replay(built.dataset, store.condition, built.settings.minimum)
    training = samples.partitions_before(int(split(samples).test[0]))
    texts = []
    for user, number in zip(samples.boundaries.user, samples.boundaries.number, strict=True):
        timeline = store.timeline(samples.user_ids[user])
        assert timeline is not None
        record = timeline.partitions[number - 1]
        assert record.summary is not None
        texts.append((record.summary.text, record.shift.text if record.shift else ""))
    cache = EmbeddingCache(built.directory / "knowledge" / "embeddings.db", EncoderSpec.load(built.bundle))
    embeddings = cache.get(texts)
    cache.close()
    fit_pca(embeddings[training], built.settings.dimension, tmp_path / "training.onnx")
    fit_pca(embeddings, built.settings.dimension, tmp_path / "all.onnx")
    assert 0 < training.sum() < len(training)
    served = components(built.bundle / PCA)
    np.testing.assert_allclose(served, components(tmp_path / "training.onnx"), atol=1e-3 * np.abs(served).max())
    assert np.abs(served - components(tmp_path / "all.onnx")).max() > 1e-2 * np.abs(served).max()


class RefusingWriter:
    name = "refusing"

    async def write(self, prompt: Prompt) -> Completion:
        raise InvalidInputError("this writer refuses everything")


async def test_a_build_does_not_go_on_without_what_was_given_up(built: Built, tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'memory.db'}")
    store.describe(built.dataset.domain)
    store.append([Behavior("u", "i", 3.0, float(second)) for second in range(20)])
    with pytest.raises(ConfigurationError, match=r"^1 steps were given up .*\(this writer refuses everything\)"):
        await drain(Worker(store, RefusingWriter(), None, max_attempts=1))
    store.close()


def test_variants_and_items_are_encoded_as_the_store_is(built: Built, store: MemoryStore, tmp_path: Path) -> None:
    samples = replay(built.dataset, store.condition, built.settings.minimum)
    rows = np.arange(len(samples), dtype=np.int64)[::7]
    spec = EncoderSpec.load(built.bundle)
    writer = StatisticalWriter()
    with open_encoder(built.directory / "knowledge", spec, built.manifest.fingerprint) as encoder:
        seen = sample_vectors(VARIANTS["liber"], built.dataset, samples, rows, writer, encoder, tmp_path)
        whole = sample_vectors(VARIANTS["no_partition"], built.dataset, samples, rows[-3:], writer, encoder, tmp_path)
        vocabulary = Vocabulary.load(built.bundle / VOCABULARY)
        items = embed_items(write_items(built.dataset, writer, tmp_path), vocabulary, encoder)
    assert seen.count.max() > 2
    for place, row in enumerate(rows):
        timeline = store.timeline(samples.user_ids[samples.user[row]])
        assert timeline is not None
        stored = [record.representations[built.manifest.fingerprint].vector for record in timeline.partitions]
        start, count = seen.start[place], seen.count[place]
        assert count == samples.partitions[row]
        np.testing.assert_allclose(seen.representations[start : start + count], stored[:count], atol=1e-5)
    assert whole.representations.shape == (3, built.settings.dimension)
    assert items.shape == (len(vocabulary.items) + 1, built.settings.dimension)
    assert not items[0].any()
    assert items[1:].any(axis=1).all()


def test_who_asks_for_an_embedder_that_is_kept_gets_that_one(built: Built, tmp_path: Path) -> None:
    share_encoder(built.directory / "knowledge", tmp_path)
    spec = EncoderSpec.load(tmp_path)
    others = _tritons()
    with keep_embedders():
        with open_embedder(tmp_path, spec) as (_, first):
            first.embed([("one", "")])
            processes = _tritons() - others
        with open_embedder(tmp_path, spec) as (cache, second):
            second.embed([("two", "")])
            assert second is first
            assert _tritons() - others == processes != set()
            assert cache.get([("one", ""), ("two", "")]).shape == (2, spec.embedding_size)
    assert not _tritons() & processes
    with open_embedder(tmp_path, spec) as (_, third):
        assert third is not first


def _tritons() -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.name() == "tritonserver"}
