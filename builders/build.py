"""``liber build``: a behavior log and a store -> a bundle.

The steps are functions of their own, for the demo runs them around its live replay: `remember` fills the store,
`write_texts` its knowledge, `fit_representations` encoder, PCA and vectors, `prepare` the training data, and
`train_liber` and `export_bundle` make the bundle.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from builders.bundle import write_bundle
from builders.datasets import Dataset
from builders.embedding import CachedEncoder, EmbeddingCache, Pair, embed
from builders.encoder import EMBEDDED, export_encoder
from builders.export import export_backbone, export_fuser
from builders.models.backbone import Backbone, LiberModel
from builders.models.dien import DIEN
from builders.models.fuser import AttentionFuser
from builders.pca import fingerprint as fingerprint_of
from builders.pca import fit_pca
from builders.replay import Samples, Split, replay
from builders.replay import split as split_samples
from builders.train import EpochResult, Index, TrainingData, TrainingResult, TrainingSettings, train
from builders.vocabulary import Fit, fit
from liber_runtime import __version__
from liber_runtime.behavior import Behavior
from liber_runtime.bundle import (
    BACKBONE,
    ENCODER,
    ENCODER_SPEC,
    FUSER,
    PCA,
    TOKENIZER,
    VOCABULARY,
    EncoderSpec,
    Manifest,
)
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import MemoryStore, PartitionRecord
from liber_runtime.progress import Advance, console, progress
from liber_runtime.worker import Worker, WorkerProgress
from liber_runtime.writers import Writer

APPEND_BATCH = 10_000
USERS_PER_READ = 1_000
STEPS_PER_TRANSACTION = 512


@dataclass(frozen=True)
class BuildSettings:
    """What distinguishes one bundle from another on the same data.

    Attributes:
        encoder: BERT checkpoint, see `export_encoder`.
        dimension: d, size of r_j and of the interest.
        history_length: T, newest behaviors the backbone reads.
        minimum: earlier behaviors a sample needs; the paper's K.
        seed: of weights, batches and dropout.
        refit_pca: fit the PCA anew even if an earlier build of the same directory left one.
        training: see `TrainingSettings`.
    """

    encoder: str = EMBEDDED
    dimension: int = 32
    history_length: int = 20
    minimum: int = 20
    seed: int = 1
    refit_pca: bool = False
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(frozen=True)
class Knowledge:
    """Fitted encoder and PCA, with the store's vectors made by them.

    Attributes:
        directory: holds encoder, tokenizer and PCA as exported.
        spec: of the encoder.
        fingerprint: of encoder and PCA.
        writers: authors of the texts.
    """

    directory: Path
    spec: EncoderSpec
    fingerprint: str
    writers: tuple[str, ...]


def remember(store: MemoryStore, dataset: Dataset, behaviors: Sequence[Behavior]) -> None:
    """Brings catalogue, profiles and behaviors into the store; what it has already changes nothing."""
    store.put_items(dataset.domain, dataset.items.values())
    store.put_profiles(dataset.profiles)
    with progress("append behaviors", len(behaviors)) as advance:
        for start in range(0, len(behaviors), APPEND_BATCH):
            batch = behaviors[start : start + APPEND_BATCH]
            store.append(batch)
            advance(len(batch))


def write_texts(store: MemoryStore, writer: Writer) -> None:
    """Has every pending summary and shift written (Eq. 2, 3)."""
    with progress("write summaries and shifts", None) as advance:
        asyncio.run(drain(Worker(store, writer, None, concurrency=STEPS_PER_TRANSACTION), advance))


def fit_representations(
    store: MemoryStore, dataset: Dataset, samples: Samples, split: Split, directory: Path, settings: BuildSettings
) -> Knowledge:
    """Fits encoder and PCA, and gives every stored partition its vector (Eq. 4).

    The PCA sees the partitions that were complete before the first test sample, and no other.

    Args:
        store: with the texts of all its partitions.
        dataset: the log that the store was filled from.
        samples: of that log.
        split: of the samples.
        directory: keeps the exported encoder, the embeddings and the PCA, so that a rerun does only what is missing.
        settings: encoder and dimension.

    Raises:
        ConfigurationError: an unusable encoder, too few partitions for the dimension, or a store that was filled from
            another log or in another order.
    """
    spec = export_encoder(settings.encoder, directory)
    texts = _stored_texts(store, dataset, samples)
    cache = EmbeddingCache(directory / "embeddings.db", spec)
    try:
        before_test = samples.partitions_before(int(split.test[0]))
        boundaries = samples.boundaries
        training = [
            texts[key].pair
            for user, number in zip(boundaries.user[before_test], boundaries.number[before_test], strict=True)
            if (key := (samples.user_ids[user], int(number))) in texts
        ]
        embed(directory, training, cache)
        _fit_pca_once(cache, training, spec, directory, settings)
        fingerprint = fingerprint_of(spec, directory / PCA)
        embed(directory, [each.pair for each in texts.values() if each.fingerprint != fingerprint], cache)
        store.reencode(fingerprint)
        with progress("project and keep vectors", None) as advance:
            encoder = CachedEncoder(cache, directory / PCA, fingerprint)
            asyncio.run(drain(Worker(store, None, encoder, encode_batch=STEPS_PER_TRANSACTION), advance))
    finally:
        cache.close()
    writers = tuple(sorted({writer for each in texts.values() for writer in each.writers}))
    return Knowledge(directory, spec, fingerprint, writers)


def prepare(
    store: MemoryStore,
    dataset: Dataset,
    samples: Samples,
    rows: Index,
    vocabulary: Fit,
    knowledge: Knowledge,
    settings: BuildSettings,
) -> TrainingData:
    """The samples `rows` int64[n] as columns, with the vectors the store holds of their users.

    Raises:
        ConfigurationError: a partition that a sample sees has no vector, or one that something else made.
    """
    indexed = samples.in_vocabulary(vocabulary.vocabulary)
    history = indexed.history(rows, settings.history_length)
    users = samples.user[rows]
    profiles = [vocabulary.vocabulary.profile_indices(dataset.profiles.get(user, {})) for user in samples.user_ids]
    count = samples.partitions[rows]
    representations, start = _stored_vectors(store, samples, _most_seen(samples, rows), knowledge, settings.dimension)
    lacking = np.flatnonzero(start[users] + count > start[users + 1])
    if len(lacking):
        user = samples.user_ids[users[lacking[0]]]
        raise ConfigurationError(
            f"user {user!r} has {count[lacking[0]]} partitions before a sample and fewer vectors in the store; "
            "let a worker finish the store's pending steps first"
        )
    return TrainingData(
        item=indexed.item[rows],
        label=samples.label[rows],
        history_item=history.item,
        history_feedback=history.feedback,
        history_length=history.length,
        profile=np.array(profiles, dtype=np.int32)[users],
        partition_start=start[users],
        partition_count=count,
        representations=representations,
    )


def make_base(vocabulary: Fit, settings: BuildSettings) -> Backbone:
    """The backbone without LIBER, weights from the seed."""
    torch.manual_seed(settings.seed)
    return _make_backbone(vocabulary, settings, interest_size=0)


def make_liber(vocabulary: Fit, settings: BuildSettings) -> LiberModel:
    """Fuser and backbone (Eq. 5-7), weights from the seed."""
    torch.manual_seed(settings.seed)
    return LiberModel(
        AttentionFuser(settings.dimension), _make_backbone(vocabulary, settings, interest_size=settings.dimension)
    )


def train_once(
    name: str, model: Backbone | LiberModel, data: TrainingData, split: Split, settings: BuildSettings, directory: Path
) -> TrainingResult:
    """Trains `model`, or loads the weights that the same training left in `directory`.

    Args:
        name: ``base`` or ``liber``: of the files and the progress bar.
        model: with its initial weights; ends with the trained ones.
        data: the training part, so that its rows are the split's.
        split: rows to train on and to validate by.
        settings: seed and training settings.
        directory: receives ``<name>.pt``.
    """
    path = directory / f"{name}.pt"
    key = _digest_training(model, data, settings)
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        if kept["key"] == key:
            console.print(f"train {name}: an earlier run did")
            model.load_state_dict(kept["weights"])
            model.eval()
            return _restore_result(kept["result"])
    with progress(f"train {name}", len(split.train) * settings.training.max_epochs) as advance:
        reached = 0

        def report(epoch: int, done: int, total: int) -> None:
            nonlocal reached
            now = (epoch - 1) * total + done
            advance(now - reached)
            reached = now

        result = train(
            model, data, split.train, split.validation, seed=settings.seed, settings=settings.training, progress=report
        )
    directory.mkdir(parents=True, exist_ok=True)
    building = path.with_suffix(".building")
    torch.save({"key": key, "weights": model.state_dict(), "result": asdict(result)}, building)
    building.replace(path)
    return result


def export_bundle(
    model: LiberModel, vocabulary: Fit, knowledge: Knowledge, dataset: Dataset, directory: Path, settings: BuildSettings
) -> Manifest:
    """Exports everything that serving needs into the bundle `directory`."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export-") as scratch:
        made = Path(scratch)
        export_fuser(model.fuser, made / FUSER)
        export_backbone(model.backbone, made / BACKBONE)
        (made / VOCABULARY).write_text(vocabulary.vocabulary.model_dump_json())
        parts = {name: made / name for name in (FUSER, BACKBONE, VOCABULARY)}
        parts |= {name: knowledge.directory / name for name in (ENCODER, ENCODER_SPEC, TOKENIZER, PCA)}
        return write_bundle(
            parts,
            directory,
            domain=dataset.domain.name,
            encoder=knowledge.spec,
            fingerprint=knowledge.fingerprint,
            dimension=settings.dimension,
            history_length=settings.history_length,
            max_partitions=settings.training.max_partitions,
            backbone=type(model.backbone).__name__,
            writers=knowledge.writers,
            seed=settings.seed,
        )


def build(
    store: MemoryStore, dataset: Dataset, writer: Writer, directory: Path, settings: BuildSettings
) -> tuple[Manifest, TrainingResult]:
    """The whole way from a log to a bundle in ``directory / "bundle"``.

    Raises:
        InvalidInputError: the log cannot be split or learned from.
        ConfigurationError: encoder, store and settings do not fit together.
    """
    samples = replay(dataset, store.condition, settings.minimum)
    parts = split_samples(samples)
    remember(store, dataset, dataset.behaviors)
    write_texts(store, writer)
    knowledge = fit_representations(store, dataset, samples, parts, directory / "knowledge", settings)
    vocabulary = fit(dataset, dataset.behaviors[: samples.behavior[parts.test[0]]])
    data = prepare(store, dataset, samples, parts.training_part, vocabulary, knowledge, settings)
    model = make_liber(vocabulary, settings)
    result = train_once("liber", model, data, parts, settings, directory / "models")
    return export_bundle(model, vocabulary, knowledge, dataset, directory / "bundle", settings), result


def _make_backbone(vocabulary: Fit, settings: BuildSettings, interest_size: int) -> Backbone:
    fields = vocabulary.vocabulary
    return DIEN(
        vocabulary.item_table,
        fields.item_fields,
        fields.user_fields,
        fields.feedback,
        history_size=settings.history_length,
        interest_size=interest_size,
    )


async def drain(worker: Worker, advance: Advance | None = None) -> None:
    """Has a worker make everything that is pending.

    Args:
        worker: any.
        advance: told of the steps made as they come.

    Raises:
        ConfigurationError: steps were given up: what a bundle is built from, or scored with, would lack them.
    """
    done, error = 0, ""

    def report(progressed: WorkerProgress) -> None:
        nonlocal done, error
        now = progressed.report.summaries + progressed.report.shifts + progressed.report.representations
        if advance is not None:
            advance(now - done)
        done, error = now, progressed.error

    worked = await worker.drain(report)
    if worked.dead:
        raise ConfigurationError(
            f"{worked.dead} steps were given up after repeated failures ({error}); mend the cause and build with a new "
            "store"
        )


@dataclass(frozen=True)
class _StoredTexts:
    """A partition's texts, their authors, and what its vector was made by ("" if it has none)."""

    pair: Pair
    writers: frozenset[str]
    fingerprint: str


def _stored_texts(store: MemoryStore, dataset: Dataset, samples: Samples) -> dict[tuple[str, int], _StoredTexts]:
    """By user and partition number, the partitions whose texts are complete."""
    number_of = {user: number for number, user in enumerate(samples.user_ids)}
    texts: dict[tuple[str, int], _StoredTexts] = {}
    for user in store.users():
        timeline = store.timeline(user)
        for record in timeline.partitions if timeline else ():
            if user in number_of:
                _require_same_partition(record, user, number_of[user], dataset, samples)
            if record.summary and (record.shift or record.number == 1):
                texts[user, record.number] = _StoredTexts(
                    pair=(record.summary.text, record.shift.text if record.shift else ""),
                    writers=frozenset(text.writer for text in (record.summary, record.shift) if text),
                    fingerprint=record.representation.fingerprint if record.representation else "",
                )
    return texts


def _require_same_partition(
    record: PartitionRecord, user: str, number: int, dataset: Dataset, samples: Samples
) -> None:
    """Training would otherwise pair a sample with the knowledge of other behaviors than those before it."""
    first, boundaries = samples.offsets[number], samples.boundaries
    row = boundaries.offsets[number] + record.number - 1
    if row >= boundaries.offsets[number + 1]:
        # Of behaviors that came after the log was written: no sample sees it.
        return
    rows = samples.sequence_behavior[first + boundaries.start[row] : first + boundaries.end[row]]
    expected = [dataset.behaviors[place].event_id for place in rows]
    if expected != [behavior.event_id for behavior in record.behaviors]:
        raise ConfigurationError(
            f"partition {record.number} of user {user!r} in the store holds other behaviors than the log in time "
            "order: the store was filled from another log, or behaviors arrived late; build with a new --store"
        )


def _fit_pca_once(
    cache: EmbeddingCache, training: Sequence[Pair], spec: EncoderSpec, directory: Path, settings: BuildSettings
) -> None:
    """Fits the PCA unless `directory` has one for this encoder and dimension.

    A PCA is kept from build to build: with another one every stored vector would have to be made anew, and the bundle
    that serves meanwhile would refuse the users whose vectors already are.
    """
    key = f"{spec.digest} {settings.dimension}"
    note = directory / "pca.key"
    if not settings.refit_pca and note.is_file() and note.read_text() == key and (directory / PCA).is_file():
        return
    note.unlink(missing_ok=True)
    building = directory / "pca.building"
    fit_pca(cache.get(training), settings.dimension, building)
    building.replace(directory / PCA)
    note.write_text(key)


def _most_seen(samples: Samples, rows: Index) -> npt.NDArray[np.int64]:
    """int64[users]: how many partitions of each user the newest of the samples `rows` sees."""
    most = np.zeros(len(samples.user_ids), dtype=np.int64)
    np.maximum.at(most, samples.user[rows], samples.partitions[rows])
    return most


def _stored_vectors(
    store: MemoryStore, samples: Samples, count: npt.NDArray[np.int64], knowledge: Knowledge, dimension: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The first `count` int64[users] vectors of all users float32[R, d], and int64[users + 1], where each user's begin.

    The store may hold more, of behaviors after the samples: they are left out, so that the same samples always make
    the same training data.
    """
    # The store gives the newest; to have the first of them, all are asked for.
    most = store.statistics().partitions
    matrices = [np.zeros((0, dimension), dtype=np.float32)]
    start = np.zeros(len(samples.user_ids) + 1, dtype=np.int64)
    for first in range(0, len(samples.user_ids), USERS_PER_READ):
        users = samples.user_ids[first : first + USERS_PER_READ]
        for user, memory in enumerate(store.read(users, history=0, partitions=most), start=first):
            held = memory.representations[: count[user]] if memory else ()
            if memory and memory.fingerprints - {knowledge.fingerprint}:
                raise ConfigurationError(
                    f"user {samples.user_ids[user]!r} has vectors of encoder and PCA "
                    f"{', '.join(sorted(memory.fingerprints))}, this build made {knowledge.fingerprint}; is another "
                    "worker encoding into this store? stop it and build again"
                )
            if len(held):
                matrices.append(np.asarray(held))
            start[user + 1] = len(held)
    return np.concatenate(matrices), np.cumsum(start)


def _restore_result(kept: dict[str, Any]) -> TrainingResult:
    return TrainingResult(**{**kept, "epochs": tuple(EpochResult(**epoch) for epoch in kept["epochs"])})


def _digest_training(model: Backbone | LiberModel, data: TrainingData, settings: BuildSettings) -> str:
    digest = hashlib.sha256(f"{__version__} {settings!r}".encode())
    for name in TrainingData.__dataclass_fields__:
        digest.update(np.ascontiguousarray(getattr(data, name)).tobytes())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()
