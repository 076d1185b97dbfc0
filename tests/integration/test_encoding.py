"""What a build encoded on Triton, and what its PCA was fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from conftest import Built

from builders.embedding import EmbeddingCache
from builders.pca import fit_pca
from builders.replay import replay, split
from liber_runtime.bundle import PCA, EncoderSpec
from liber_runtime.memory import MemoryStore


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
