"""Puts the parts of a bundle together and writes its manifest."""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from liber_runtime.bundle import FORMAT, MANIFEST, PARTS, EncoderSpec, Manifest, digest_of


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
) -> Manifest:
    """Makes `directory` a complete bundle, replacing what was there as a whole.

    Args:
        parts: where each of `liber_runtime.bundle.PARTS` lies now.
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
    """
    digests = {name: digest_of(parts[name]) for name in PARTS}
    manifest = Manifest(
        format=FORMAT,
        bundle_id=hashlib.sha256("".join(digests[name] for name in PARTS).encode()).hexdigest()[:16],
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
        writers=writers,
        seed=seed,
        digests=digests,
    )
    building = directory.with_name(f".{directory.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name in PARTS:
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
