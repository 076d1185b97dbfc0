"""Puts the parts of a bundle together and writes its manifest."""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from liber_runtime.bundle import FORMAT, FUSER, MANIFEST, EncoderSpec, Manifest, Precision, digest_of, parts_of


def write_bundle(
    parts: Mapping[str, Path],
    directory: Path,
    *,
    domain: str,
    encoder: EncoderSpec,
    fingerprint: str,
    dimension: int,
    history_length: int,
    lookback: int,
    max_partitions: int,
    backbone: str,
    fusion: str,
    writers: tuple[str, ...],
    seed: int,
    precision: Precision = "fp32",
) -> Manifest:
    """Makes `directory` a complete bundle, replacing what was there as a whole.

    Args:
        parts: where each of `liber_runtime.bundle.PARTS` lies now. Without a fuser it becomes a bundle that scores
            without an interest.
        directory: of the bundle.
        domain: see `Manifest`, as for the rest.
        encoder: of the representations.
        fingerprint: of encoder and PCA.
        dimension: d.
        history_length: T.
        lookback: L.
        max_partitions: newest representations fused.
        backbone: name of the CTR model.
        fusion: how it takes the interest.
        writers: authors of the texts.
        seed: of training.
        precision: of the backbone's weights.
    """
    fused = FUSER in parts
    digests = {name: digest_of(parts[name]) for name in parts_of(fused)}
    manifest = Manifest(
        format=FORMAT,
        bundle_id=hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:16],
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        domain=domain,
        encoder=encoder,
        fingerprint=fingerprint,
        dimension=dimension,
        history_length=history_length,
        lookback=lookback,
        max_partitions=max_partitions,
        backbone=backbone,
        fusion=fusion,
        fused=fused,
        precision=precision,
        writers=writers,
        seed=seed,
        digests=digests,
    )
    building = directory.with_name(f".{directory.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name in manifest.parts:
        place_file(parts[name], building / name)
    (building / MANIFEST).write_text(manifest.model_dump_json(indent=2))
    shutil.rmtree(directory, ignore_errors=True)
    building.rename(directory)
    return manifest


def place_file(source: Path, target: Path) -> None:
    """Puts a file at a second place, by a hard link where the file system can: encoders are hundreds of megabytes.

    Files of a bundle are therefore replaced, never written over.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
