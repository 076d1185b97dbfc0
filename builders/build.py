"""``liber build``: a behavior log and a store, or what a store holds alone -> a bundle.

The steps are functions of their own, for the demo runs them around its live replay: `remember` fills the store,
`write_texts` its knowledge, `fit_representations` encoder, PCA and vectors, `know_items` the items' own knowledge,
`prepare` the training data, `train_once` and `export_bundle` the bundle. `build` starts from a log, `reencode` from
the store; both then go one way, beside whatever scores, appends and writes meanwhile: the vectors of the encodings
there were stay, and are still made for new partitions, until the new bundle serves and `switch` says so.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from builders.assembly import KNOWING, FittedFeatures, Fusion, fit_features, make_ranker, with_knowledge
from builders.bundle import write_bundle
from builders.catalogue import embed_items, write_items
from builders.checkpoint import training_key
from builders.datasets import Dataset
from builders.datasets.stored import load as load_stored
from builders.embedding import Pair, keep_embedders, open_embedder, open_encoder
from builders.encoder import EMBEDDED, export_encoder
from builders.export import export_backbone, export_fuser
from builders.hyperparameters import Hyperparameters, load_hyperparameters
from builders.models.backbone import Ranker
from builders.pca import fingerprint as fingerprint_of
from builders.pca import fit_pca
from builders.replay import Samples, Split, replay
from builders.replay import split as split_samples
from builders.train import EpochResult, Index, TrainingData, TrainingResult, train
from liber_runtime.behavior import Behavior
from liber_runtime.bundle import (
    BACKBONE,
    ENCODER,
    ENCODER_SPEC,
    FUSER,
    PARTS,
    PCA,
    TOKENIZER,
    VOCABULARY,
    EncoderSpec,
    Manifest,
    Precision,
)
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import MemoryStore, PartitionRecord, Timeline
from liber_runtime.progress import Advance, console, progress
from liber_runtime.vocabulary import Vocabulary
from liber_runtime.worker import Worker, WorkerProgress
from liber_runtime.writers import Writer

APPEND_BATCH = 10_000
TEXTS_PER_TRANSACTION = 512

PCA_TEXTS = 100_000
"""A PCA is not fitted on more: their embeddings are in memory at once, 150 MB of them for a BERT of width 384."""


@dataclass(frozen=True)
class BuildSettings:
    """What distinguishes one bundle from another on the same data.

    Attributes:
        backbone: see `make_backbone`.
        fusion: see `Fusion`; ``none`` and ``items`` make a bundle that scores without an interest.
        encoder: BERT checkpoint, see `export_encoder`.
        dimension: d, size of r_j and of the interest.
        history_length: T, newest behaviors the backbone reads.
        lookback: newest behaviors that feedback to similar items is looked up in; not less than T.
        minimum: earlier behaviors a sample needs; the paper's K.
        seed: of weights, batches and dropout.
        precision: of the backbone's weights where it is served, see `export_backbone`.
        refit_pca: fit the PCA anew even if an earlier build of the same directory left one with its bundle.
        hyperparameters: of model and training; None for those that were chosen for the backbone.
    """

    backbone: str = "DIEN"
    fusion: Fusion = "matched"
    encoder: str = EMBEDDED
    dimension: int = 32
    history_length: int = 20
    lookback: int = 200
    minimum: int = 20
    seed: int = 1
    precision: Precision = "fp32"
    refit_pca: bool = False
    hyperparameters: Hyperparameters | None = None

    def __post_init__(self) -> None:
        if self.lookback < self.history_length:
            raise ConfigurationError(
                f"lookback {self.lookback} is less than the history of {self.history_length} that a backbone reads; "
                "give at least that"
            )

    @property
    def chosen(self) -> Hyperparameters:
        """`hyperparameters`, or those of the backbone."""
        return self.hyperparameters or load_hyperparameters(self.backbone)


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
    store.describe(dataset.domain, dataset.items.values(), dataset.profiles)
    with progress("append behaviors", len(behaviors)) as advance:
        for start in range(0, len(behaviors), APPEND_BATCH):
            batch = behaviors[start : start + APPEND_BATCH]
            store.append(batch)
            advance(len(batch))


def write_texts(store: MemoryStore, writer: Writer) -> None:
    """Has every pending summary and shift written (Eq. 2, 3)."""
    with progress("write summaries and shifts", None) as advance:
        asyncio.run(drain(Worker(store, writer, None, concurrency=TEXTS_PER_TRANSACTION), advance))


def fit_representations(
    store: MemoryStore, dataset: Dataset, samples: Samples, split: Split, directory: Path, settings: BuildSettings
) -> Knowledge:
    """Fits encoder and PCA, and gives every stored partition its vector (Eq. 4).

    The PCA sees the partitions that were complete before the first test sample, and no other: all of them, or
    `PCA_TEXTS` evenly chosen ones. The encodings that the store has vectors of go on being wanted, see `switch`.

    Args:
        store: with the texts of its partitions; those whose texts are pending are left out.
        dataset: the log that the store was filled from, or what it holds.
        samples: of that log.
        split: of the samples.
        directory: keeps the exported encoder, the embeddings and the PCA, so that a rerun does only what is missing.
        settings: encoder and dimension.

    Raises:
        ConfigurationError: an unusable encoder, too few partitions for the dimension, or a store that was filled from
            another log or in another order.
    """
    spec = export_encoder(settings.encoder, directory)
    training = _training_keys(samples, split)
    texts, writers = _read_texts(store, dataset, samples, set(training))
    _fit_pca_once([texts[key] for key in training if key in texts], spec, directory, settings)
    knowledge = Knowledge(directory, spec, fingerprint_of(spec, directory / PCA), writers)
    store.encode_by({*encodings(store), knowledge.fingerprint})
    encode_pending(store, knowledge)
    return knowledge


def encode_pending(store: MemoryStore, knowledge: Knowledge) -> None:
    """Gives every partition whose texts are complete its vector by `knowledge`, a few at a time.

    Raises:
        ConfigurationError: see `drain`.
    """
    with (
        open_encoder(knowledge.directory, knowledge.spec, knowledge.fingerprint) as encoder,
        progress("keep vectors", None) as advance,
    ):
        asyncio.run(drain(Worker(store, None, encoder), advance))


def encodings(store: MemoryStore) -> frozenset[str]:
    """Fingerprints of the vectors that are wanted; where nobody has said so yet, of those that are there."""
    statistics = store.statistics()
    return statistics.encodings or frozenset(statistics.vectors)


@dataclass(frozen=True)
class StoredVectors:
    """The vectors that samples see, as a store held them.

    Attributes:
        vectors: float32[R, d], users one after the other, each in the order of the partitions.
        start: int64[users + 1]; the vectors of user u are rows ``start[u]`` to ``start[u + 1]``.
    """

    vectors: npt.NDArray[np.float32]
    start: npt.NDArray[np.int64]

    def reach(self, samples: Samples, rows: Index) -> npt.NDArray[np.bool_]:
        """bool[n]: which of the samples `rows` int64[n] have a vector of every partition before them."""
        users = samples.user[rows]
        reached: npt.NDArray[np.bool_] = self.start[users] + samples.partitions[rows] <= self.start[users + 1]
        return reached


def read_vectors(
    store: MemoryStore, samples: Samples, rows: Index, knowledge: Knowledge, settings: BuildSettings
) -> StoredVectors:
    """The vectors by `knowledge` of the partitions that the samples `rows` int64[n] see.

    The store may hold more, of behaviors after the samples: they are left out, so that the same samples always make the
    same training data. So is what comes after a partition without a vector, which would be taken for it.
    """
    count = _most_seen(samples, rows)
    matrices = [np.zeros((0, settings.dimension), dtype=np.float32)]
    start = np.zeros(len(count) + 1, dtype=np.int64)
    for user, most in enumerate(count.tolist()):
        timeline = store.timeline(samples.user_ids[user]) if most else None
        records = _records(timeline)[:most] if timeline else []
        made = [record.representations.get(knowledge.fingerprint) for record in records]
        found = [each.vector for each in itertools.takewhile(lambda each: each is not None, made) if each is not None]
        if found:
            matrices.append(np.stack(found))
        start[user + 1] = start[user] + len(found)
    return StoredVectors(np.concatenate(matrices), start)


def know_items(
    dataset: Dataset, writer: Writer, knowledge: Knowledge, fitted: FittedFeatures, settings: BuildSettings
) -> npt.NDArray[np.float32] | None:
    """The items' own knowledge float32[I+1, d], where the fusion reads it: their texts as the partitions' are made.

    Args:
        dataset: whose catalogue it is.
        writer: of the texts; asked for those alone that no earlier build had written.
        knowledge: encoder and PCA; its directory keeps the texts.
        fitted: whose vocabulary gives the order.
        settings: fusion and dimension.

    Raises:
        InvalidInputError: the data set has no catalogue.
        LiberError: the writer gave no usable answer.
    """
    if settings.fusion not in KNOWING:
        return None
    texts = write_items(dataset, writer, knowledge.directory)
    with open_encoder(knowledge.directory, knowledge.spec, knowledge.fingerprint) as encoder:
        return embed_items(texts, fitted.vocabulary.vocabulary, encoder)


def prepare(
    stored: StoredVectors,
    dataset: Dataset,
    samples: Samples,
    rows: Index,
    fitted: FittedFeatures,
    numbers: npt.NDArray[np.float32] | None = None,
) -> TrainingData:
    """The samples `rows` int64[n] as columns, with the vectors of their users.

    `numbers` float32[n, M] are theirs; None if they are samples that `fitted` was fitted on.

    Raises:
        ConfigurationError: a partition that a sample sees has no vector.
    """
    vocabulary = fitted.vocabulary.vocabulary
    indexed = samples.in_vocabulary(vocabulary)
    history = indexed.history(rows, fitted.history_length)
    users = samples.user[rows]
    profiles = [vocabulary.profile_indices(dataset.profiles.get(user, {})) for user in samples.user_ids]
    lacking = np.flatnonzero(~stored.reach(samples, rows))
    if len(lacking):
        raise ConfigurationError(
            f"user {samples.user_ids[users[lacking[0]]]!r} has {samples.partitions[rows[lacking[0]]]} partitions "
            "before a sample and fewer vectors in the store; let a worker finish the store's pending steps first"
        )
    return TrainingData(
        item=indexed.item[rows],
        label=samples.label[rows],
        history_item=history.item,
        history_feedback=history.feedback,
        history_length=history.length,
        profile=np.array(profiles, dtype=np.int32)[users],
        numbers=fitted.numbers.values[rows] if numbers is None else numbers,
        partition_start=stored.start[users],
        partition_count=samples.partitions[rows],
        representations=stored.vectors,
    )


def fit_for(dataset: Dataset, samples: Samples, parts: Split, settings: BuildSettings) -> FittedFeatures:
    """The features by these settings; see `fit_features`."""
    return fit_features(
        dataset,
        samples,
        parts,
        history_length=settings.history_length,
        lookback=settings.lookback,
        seed=settings.seed,
    )


def make_base(fitted: FittedFeatures, settings: BuildSettings) -> Ranker:
    """The backbone without LIBER, weights from the seed."""
    return make_ranker(settings.backbone, fitted, settings.chosen, seed=settings.seed)


def make_liber(
    fitted: FittedFeatures, item_knowledge: npt.NDArray[np.float32] | None, settings: BuildSettings
) -> Ranker:
    """Fuser, if the fusion has one, and backbone (Eq. 5-7), weights from the seed; `item_knowledge` of `know_items`."""
    return make_ranker(
        settings.backbone,
        fitted,
        settings.chosen,
        fusion=settings.fusion,
        dimension=settings.dimension,
        item_knowledge=item_knowledge,
        seed=settings.seed,
    )


def train_once(
    name: str, model: Ranker, data: TrainingData, split: Split, settings: BuildSettings, directory: Path
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
    training = settings.chosen.training
    key = training_key(model, data, split.train, split.validation, settings.chosen, settings.seed)
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        if kept["key"] == key:
            console.print(f"train {name}: an earlier run did")
            model.load_state_dict(kept["weights"])
            model.eval()
            return _restore_result(kept["result"])
    directory.mkdir(parents=True, exist_ok=True)
    with progress(f"train {name}", len(split.train) * training.max_epochs) as advance:
        reached = 0

        def report(epoch: int, done: int, total: int) -> None:
            nonlocal reached
            now = (epoch - 1) * total + done
            advance(now - reached)
            reached = now

        result = train(
            model,
            data,
            split.train,
            split.validation,
            seed=settings.seed,
            settings=training,
            checkpoint=directory / f"{name}.checkpoint",
            progress=report,
        )
    building = path.with_suffix(".building")
    torch.save({"key": key, "weights": model.state_dict(), "result": asdict(result)}, building)
    building.replace(path)
    return result


def export_bundle(
    model: Ranker,
    fitted: FittedFeatures,
    knowledge: Knowledge,
    dataset: Dataset,
    directory: Path,
    settings: BuildSettings,
) -> Manifest:
    """Exports everything that serving needs into the bundle `directory`; no fuser if the model has none."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export-") as scratch:
        made = Path(scratch)
        export_backbone(model, made / BACKBONE, precision=settings.precision)
        (made / VOCABULARY).write_text(fitted.vocabulary.vocabulary.model_dump_json())
        if model.fuser is not None:
            export_fuser(model.fuser, made / FUSER)
        parts = {name: made / name for name in PARTS if (made / name).is_file()}
        parts |= {name: knowledge.directory / name for name in (ENCODER, ENCODER_SPEC, TOKENIZER, PCA)}
        return write_bundle(
            parts,
            directory,
            domain=dataset.domain.name,
            encoder=knowledge.spec,
            fingerprint=knowledge.fingerprint,
            dimension=settings.dimension,
            history_length=settings.history_length,
            lookback=settings.lookback,
            max_partitions=settings.chosen.training.max_partitions,
            backbone=settings.backbone,
            fusion=settings.fusion,
            writers=knowledge.writers,
            seed=settings.seed,
            precision=settings.precision,
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
    return _make_bundle(store, dataset, samples, parts, writer, directory, settings)


def reencode(
    store: MemoryStore, writer: Writer, directory: Path, settings: BuildSettings
) -> tuple[Manifest, TrainingResult]:
    """From the texts and behaviors that a store holds to a bundle in ``directory / "bundle"``.

    No text of a user is written; `writer` describes the items that no build of `directory` has described yet. Items
    that no behavior names are found where a bundle that `directory` has lists them.

    Raises:
        InvalidInputError: what the store holds cannot be split or learned from.
        ConfigurationError: encoder, store and settings do not fit together.
    """
    before = directory / "bundle"
    catalogue = Vocabulary.load(before / VOCABULARY).items if (before / VOCABULARY).is_file() else ()
    dataset = load_stored(store, catalogue)
    samples = replay(dataset, store.condition, settings.minimum)
    return _make_bundle(store, dataset, samples, split_samples(samples), writer, directory, settings)


def switch(store: MemoryStore, fingerprint: str) -> int:
    """From now on vectors are made for the bundle with this fingerprint alone, for it serves; returns how many are due.

    The vectors of the bundle before stay readable until the next change of encodings, for requests that began on it.

    Raises:
        ConfigurationError: the store has no vector by it, so whatever serves it reads another store.
    """
    statistics = store.statistics()
    if fingerprint not in statistics.encodings | statistics.vectors.keys():
        there = ", ".join(sorted(encodings(store))) or "none"
        raise ConfigurationError(
            f"the bundle that is served reads vectors of encoder and PCA {fingerprint}, the store has those of "
            f"{there}; name the store that it was built with"
        )
    return store.encode_by({fingerprint})


def _make_bundle(
    store: MemoryStore,
    dataset: Dataset,
    samples: Samples,
    parts: Split,
    writer: Writer,
    directory: Path,
    settings: BuildSettings,
) -> tuple[Manifest, TrainingResult]:
    """What `build` and `reencode` have in common: everything after the texts."""
    with keep_embedders():
        knowledge = fit_representations(store, dataset, samples, parts, directory / "knowledge", settings)
        fitted = fit_for(dataset, samples, parts, settings)
        items = know_items(dataset, writer, knowledge, fitted, settings)
    stored = read_vectors(store, samples, parts.training_part, knowledge, settings)
    rows, learned = _leave_out(parts, stored.reach(samples, parts.training_part))
    fitted = with_knowledge(fitted, samples, parts, items)
    data = prepare(stored, dataset, samples, rows, fitted)
    model = make_liber(fitted, items, settings)
    result = train_once("liber", model, data, learned, settings, directory / "models")
    manifest = export_bundle(model, fitted, knowledge, dataset, directory / "bundle", settings)
    # Of partitions that came while this trained.
    encode_pending(store, knowledge)
    return manifest, result


def _leave_out(parts: Split, kept: npt.NDArray[np.bool_]) -> tuple[Index, Split]:
    """The samples to learn from, int64[n], and which of these rows are for training and which for validation.

    Args:
        parts: of all samples.
        kept: bool[training part], False for samples that see a partition without a vector.
    """
    if not kept.all():
        console.print(
            f"{np.count_nonzero(~kept)} of {len(kept)} samples are left out: partitions before them have no vector, "
            "for their texts are pending or were given up (liber inspect)",
            soft_wrap=True,
        )
    rows = parts.training_part[kept]
    trained = int(np.count_nonzero(kept[: len(parts.train)]))
    places = np.arange(len(rows), dtype=np.int64)
    return rows, Split(places[:trained], places[trained:], parts.test)


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
            f"{worked.dead} steps were given up after repeated failures ({error}); mend the cause, run "
            "`liber worker --retry-dead`, and build again"
        )


def _training_keys(samples: Samples, split: Split) -> list[tuple[str, int]]:
    """(user id, partition) of the partitions that were complete before the first test sample, `PCA_TEXTS` at most."""
    rows = np.flatnonzero(samples.partitions_before(int(split.test[0])))
    if len(rows) > PCA_TEXTS:
        rows = rows[np.linspace(0, len(rows) - 1, PCA_TEXTS).astype(np.int64)]
    users, numbers = samples.boundaries.user[rows].tolist(), samples.boundaries.number[rows].tolist()
    return [(samples.user_ids[user], number) for user, number in zip(users, numbers, strict=True)]


def _records(timeline: Timeline) -> list[PartitionRecord]:
    """The partitions that hold behaviors: those of which all were erased have no texts, and no sample sees them."""
    return [record for record in timeline.partitions if record.behaviors]


def _read_texts(
    store: MemoryStore, dataset: Dataset, samples: Samples, wanted: Collection[tuple[str, int]]
) -> tuple[dict[tuple[str, int], Pair], tuple[str, ...]]:
    """The texts of the `wanted` (user id, partition) that are complete, and the authors of all texts there are."""
    number_of = {user: number for number, user in enumerate(samples.user_ids)}
    texts: dict[tuple[str, int], Pair] = {}
    writers: set[str] = set()
    for user in store.users():
        timeline = store.timeline(user)
        before: PartitionRecord | None = None
        for number, record in enumerate(_records(timeline) if timeline else (), start=1):
            if user in number_of:
                _require_same_partition(record, number, user, number_of[user], dataset, samples)
            writers |= {text.writer for text in (record.summary, record.shift) if text}
            # As the store has it: no shift from nothing.
            is_first = before is None or before.number != record.number - 1
            before = record
            if (user, number) in wanted and record.summary and (record.shift or is_first):
                texts[user, number] = (record.summary.text, record.shift.text if record.shift else "")
    return texts, tuple(sorted(writers))


def _require_same_partition(
    record: PartitionRecord, number: int, user_id: str, user: int, dataset: Dataset, samples: Samples
) -> None:
    """Training would otherwise pair a sample with the knowledge of other behaviors than those before it."""
    first, boundaries = samples.offsets[user], samples.boundaries
    row = boundaries.offsets[user] + number - 1
    if row >= boundaries.offsets[user + 1]:
        # Of behaviors that came after the log was written: no sample sees it.
        return
    rows = samples.sequence_behavior[first + boundaries.start[row] : first + boundaries.end[row]]
    expected = [dataset.behaviors[place].event_id for place in rows]
    if expected != [behavior.event_id for behavior in record.behaviors]:
        raise ConfigurationError(
            f"partition {record.number} of user {user_id!r} in the store holds other behaviors than the log in time "
            "order: the store was filled from another log, behaviors arrived late, or some were erased; build from "
            "what the store holds with `liber build re-encode`, or with a new --store"
        )


def _fit_pca_once(training: Sequence[Pair], spec: EncoderSpec, directory: Path, settings: BuildSettings) -> None:
    """Fits the PCA unless `directory` has one for this encoder and dimension.

    A PCA is kept from build to build: with another one every stored vector would have to be made anew. One that is to
    be fitted anew is so once: a build that was interrupted left it without a bundle.
    """
    key = f"{spec.digest} {settings.dimension}"
    note = directory / "pca.key"
    is_there = note.is_file() and note.read_text() == key and (directory / PCA).is_file()
    if is_there and not (settings.refit_pca and _is_used(fingerprint_of(spec, directory / PCA), directory)):
        return
    note.unlink(missing_ok=True)
    building = directory / "pca.building"
    with open_embedder(directory, spec) as (cache, embedder):
        embedder.embed(training)
        fit_pca(cache.get(training), settings.dimension, building)
    building.replace(directory / PCA)
    note.write_text(key)


def _is_used(fingerprint: str, directory: Path) -> bool:
    bundle = directory.parent / "bundle"
    return bundle.is_dir() and Manifest.load(bundle).fingerprint == fingerprint


def _most_seen(samples: Samples, rows: Index) -> npt.NDArray[np.int64]:
    """int64[users]: how many partitions of each user the newest of the samples `rows` sees."""
    most = np.zeros(len(samples.user_ids), dtype=np.int64)
    np.maximum.at(most, samples.user[rows], samples.partitions[rows])
    return most


def _restore_result(kept: dict[str, Any]) -> TrainingResult:
    return TrainingResult(**{**kept, "epochs": tuple(EpochResult(**epoch) for epoch in kept["epochs"])})
