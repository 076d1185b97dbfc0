"""A bundle is complete and unchanged, or it is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders.bundle import write_bundle
from liber_runtime.bundle import (
    BACKBONE,
    ENCODER_SPEC,
    FORMAT,
    FUSER,
    MANIFEST,
    PARTS,
    EncoderSpec,
    Manifest,
    Precision,
    parts_of,
    verify,
)
from liber_runtime.exceptions import ConfigurationError

SPEC = EncoderSpec(name="tiny", digest="d", embedding_size=8, max_tokens=16, start_id=2, end_id=3, pad_id=0)


def make_bundle(
    directory: Path, content: str = "content", seed: int = 1, fused: bool = True, precision: Precision = "fp32"
) -> Manifest:
    """A bundle whose parts are a few bytes each: whole, but not loadable."""
    made = directory.parent / f"parts-of-{directory.name}-{content}"
    made.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        # A new file, not new content of the old one, which a bundle may be linked to.
        (made / part).unlink(missing_ok=True)
        (made / part).write_text(SPEC.model_dump_json() if part == ENCODER_SPEC else f"{content} of {part}")
    return write_bundle(
        {part: made / part for part in parts_of(fused)},
        directory,
        domain="films",
        encoder=SPEC,
        fingerprint="f",
        dimension=4,
        history_length=6,
        lookback=12,
        fusion="matched",
        max_partitions=3,
        backbone="DIEN",
        writers=("statistical",),
        seed=seed,
        precision=precision,
    )


def test_what_was_written_is_read_and_verified(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "bundle")
    assert verify(tmp_path / "bundle") == manifest == Manifest.load(tmp_path / "bundle")
    assert set(manifest.digests) == set(manifest.parts) == set(PARTS)
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {*PARTS, MANIFEST}


def test_the_id_is_that_of_the_parts(tmp_path: Path) -> None:
    first, again = make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", seed=2)
    other = make_bundle(tmp_path / "c", content="other")
    assert first.bundle_id == again.bundle_id != other.bundle_id


def test_a_bundle_that_is_not_fused_has_no_fuser(tmp_path: Path) -> None:
    fused, plain = make_bundle(tmp_path / "fused"), make_bundle(tmp_path / "plain", fused=False)
    assert fused.fused
    assert not plain.fused
    assert verify(tmp_path / "plain") == plain
    assert set(plain.parts) == set(fused.parts) - {FUSER}
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {*plain.parts, MANIFEST}
    assert plain.bundle_id != fused.bundle_id


def test_a_bundle_is_replaced_as_a_whole(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "left-over").touch()
    second = make_bundle(tmp_path / "bundle", content="other")
    assert verify(tmp_path / "bundle") == second
    assert not (tmp_path / "bundle" / "left-over").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing(tmp_path: Path, part: str) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / part).unlink()
    with pytest.raises(ConfigurationError, match=f"lacks {part}; run `liber build` again"):
        verify(tmp_path / "bundle")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_cut_short(tmp_path: Path, part: str) -> None:
    make_bundle(tmp_path / "bundle")
    path = tmp_path / "bundle" / part
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])
    with pytest.raises(ConfigurationError, match=f"{part} is not the file the manifest was written for"):
        verify(tmp_path / "bundle")


def edit_manifest(directory: Path, **changes: object) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_digest_that_the_manifest_lacks(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "bundle")
    edit_manifest(tmp_path / "bundle", digests={k: v for k, v in manifest.digests.items() if k != BACKBONE})
    with pytest.raises(ConfigurationError, match=f"{BACKBONE} is not the file"):
        verify(tmp_path / "bundle")


@pytest.mark.parametrize("other", [FORMAT - 1, FORMAT + 1])
def test_a_format_of_another_version(tmp_path: Path, other: int) -> None:
    """Whatever else a manifest of that format holds."""
    (tmp_path / MANIFEST).write_text(json.dumps({"format": other, "unheard_of": 1}))
    with pytest.raises(ConfigurationError, match=f"has format {other}, this version reads {FORMAT}"):
        verify(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b'{"format": %d}' % FORMAT])
def test_a_manifest_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    make_bundle(tmp_path / "bundle")
    path = tmp_path / "bundle" / MANIFEST
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"manifest\.json cannot be read \(.*\); run `liber build`") as refused:
        verify(tmp_path / "bundle")
    assert "\n" not in str(refused.value)


def test_an_encoder_specification_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / ENCODER_SPEC).write_text('{"name": 7}')
    with pytest.raises(ConfigurationError, match=r"encoder\.json cannot be read \(.*\); run `liber build`") as refused:
        EncoderSpec.load(tmp_path)
    assert "\n" not in str(refused.value)
