"""The PCA that brings an embedding down to the size of a CTR feature (section 3.4.1), fitted with faiss."""

from __future__ import annotations

import hashlib
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from liber_runtime.bundle import EncoderSpec
from liber_runtime.exceptions import ConfigurationError


def fit_pca(embeddings: npt.NDArray[np.float32], dimension: int, path: Path) -> None:
    """Fits a PCA on the training partitions' embeddings and writes it as an ONNX graph.

    The components are scaled by one common factor so that their variance is 1 on average: a size that the fuser can
    work with, whatever the encoder's. Directions and proportions are PCA's own.

    Args:
        embeddings: float32[n, h] of training partitions only; n must be at least `dimension`.
        dimension: d.
        path: of the graph: ``text_embedding`` float32[B, h] -> ``representation`` float32[B, d].

    Raises:
        ConfigurationError: too few rows, or a dimension above h.
    """
    rows, size = embeddings.shape
    if dimension > size or rows <= dimension:
        raise ConfigurationError(
            f"a PCA to {dimension} dimensions needs more than {dimension} training partitions and an encoder of at "
            f"least that size; there are {rows} partitions of size {size}: lower --dimension or bring more behaviors"
        )
    pca = faiss.PCAMatrix(size, dimension)
    pca.train(np.ascontiguousarray(embeddings, dtype=np.float32))
    matrix = faiss.vector_to_array(pca.A).reshape(-1, size)[:dimension].T
    offset = faiss.vector_to_array(pca.b)[:dimension]
    spread = float(np.sqrt(np.mean(np.var(embeddings @ matrix, axis=0))))
    if spread == 0:
        raise ConfigurationError(f"all {rows} training partitions have the same embedding; their texts are all alike")
    _write(matrix / spread, offset / spread, path)


def fingerprint(spec: EncoderSpec, pca: Path) -> str:
    """Identifies what makes vectors: the encoder with its pooling, and the PCA. 16 hexadecimal digits."""
    return hashlib.sha256(spec.digest.encode() + pca.read_bytes()).hexdigest()[:16]


def _write(matrix: npt.NDArray[np.float32], offset: npt.NDArray[np.float32], path: Path) -> None:
    size, dimension = matrix.shape
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["text_embedding", "components"], ["projected"]),
            helper.make_node("Add", ["projected", "offset"], ["representation"]),
        ],
        "pca_projection",
        [helper.make_tensor_value_info("text_embedding", TensorProto.FLOAT, ["texts", size])],
        [helper.make_tensor_value_info("representation", TensorProto.FLOAT, ["texts", dimension])],
        [
            numpy_helper.from_array(matrix.astype(np.float32), "components"),
            numpy_helper.from_array(offset.astype(np.float32), "offset"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
