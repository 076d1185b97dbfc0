"""What the runs of the quality table are given, what each depends on, and one run."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import pickle
import platform
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.quality_cache import Run
from bench.quality_table import BASE, TREES, Result
from bench.trees import FeatureTable, fit_and_measure, make_features
from builders.assembly import KNOWING, FittedFeatures, Fusion, fit_features, make_ranker, with_knowledge
from builders.build import PCA_TEXTS, StoredVectors, prepare
from builders.catalogue import embed_items, write_items
from builders.datasets import Dataset
from builders.embedding import Pair, keep_embedders, open_embedder, open_encoder
from builders.encoder import EMBEDDED, export_encoder
from builders.hyperparameters import load_hyperparameters
from builders.models import BACKBONES
from builders.pca import fingerprint, fit_pca
from builders.replay import Samples, Split
from builders.train import evaluate, train
from builders.training_data import TrainingData
from builders.variants import REFRESH, SampleVectors, find_variant, plan, sample_vectors, write_pairs
from liber_runtime.bundle import PCA, EncoderSpec
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.writers import Writer

FUSIONS: Mapping[str, tuple[str, Fusion]] = {
    BASE: ("", "none"),
    "liber": ("liber", "matched"),
    "liber_paper": ("liber", "paper"),
    "items_only": ("liber", "items"),
    "no_partition": ("no_partition", "matched"),
    "no_shift": ("no_shift", "matched"),
    "mean_fusion": ("liber", "mean"),
    "length20": ("length20", "matched"),
    "length100": ("length100", "matched"),
    "kar": ("kar", "kar"),
}
"""By variant of the table: whose texts (`builders.variants.VARIANTS`), and how the ranker takes them."""

_PACKAGES = ("numpy", "scikit-learn", "torch", "faiss-cpu", "onnxruntime", "transformers")

_CODE = (
    "builders.replay",
    "builders.vocabulary",
    "builders.statistics",
    "builders.assembly",
    "builders.train",
    "builders.training_data",
    "builders.models.backbone",
    "builders.models.features",
    "builders.models.layers",
    "builders.models.numbers",
    "liber_runtime.partition",
    "liber_runtime.vocabulary",
)
_CODE_OF_TEXTS = (
    "builders.catalogue",
    "builders.encoder",
    "builders.models.fuser",
    "builders.models.kar",
    "builders.models.meeting",
    "builders.pca",
    "builders.texts",
    "builders.variants",
    "liber_runtime.interest",
    "liber_runtime.worker.answers",
    "liber_runtime.writers.statistical",
)
_CODE_OF_TREES = ("bench.trees", "builders.replay", "builders.vocabulary", "liber_runtime.vocabulary")


@dataclass(frozen=True)
class QualitySettings:
    """What all runs have in common.

    Attributes:
        partition: K: behaviors of a partition, and earlier behaviors that a sample needs.
        history_length: T, newest behaviors a backbone reads.
        lookback: see `builders.build.BuildSettings`.
        dimension: d, of r_j and r̂.
        encoder: BERT checkpoint, see `builders.encoder.export_encoder`.
        refresh: behaviors after which a variant of one text is written anew, see `builders.variants.plan`.
        preparation_seed: of what is fitted once for all runs, see `builders.assembly.fit_features`.
    """

    partition: int = 20
    history_length: int = 20
    lookback: int = 200
    dimension: int = 32
    encoder: str = EMBEDDED
    refresh: int = REFRESH
    preparation_seed: int = 1


@dataclass(frozen=True)
class Prepared:
    """What runs share.

    Attributes:
        fitted: vocabulary and statistics, of the training part.
        knowing: the same with the items' own texts, for rankers in which r̂ meets the candidate.
        data: all samples as columns, without representations.
        split: rows of `data`.
        vectors: by the name of their texts (`builders.variants.VARIANTS`).
        item_knowledge: float32[I+1, d]; None if no variant has texts.
    """

    fitted: FittedFeatures
    knowing: FittedFeatures
    data: TrainingData
    split: Split
    vectors: Mapping[str, SampleVectors]
    item_knowledge: npt.NDArray[np.float32] | None

    def save(self, directory: Path) -> None:
        """Writes it for `load`, each array as a file that processes can share in memory."""
        arrays = {f"data.{name}": getattr(self.data, name) for name in TrainingData.__dataclass_fields__}
        arrays |= {f"split.{name}": getattr(self.split, name) for name in Split.__dataclass_fields__}
        for texts, seen in self.vectors.items():
            arrays |= {f"vectors.{texts}.{name}": getattr(seen, name) for name in SampleVectors.__dataclass_fields__}
        if self.item_knowledge is not None:
            arrays["item_knowledge"] = self.item_knowledge
        for name, array in arrays.items():
            np.save(directory / f"{name}.npy", array)
        (directory / "fitted.pickle").write_bytes(pickle.dumps((self.fitted, self.knowing, tuple(self.vectors))))

    @classmethod
    def load(cls, directory: Path) -> Prepared:
        """What `save` wrote into `directory`, a directory of this program's own."""

        def array(name: str) -> Any:
            return np.load(directory / f"{name}.npy", mmap_mode="c")

        fitted, knowing, texts = pickle.loads((directory / "fitted.pickle").read_bytes())
        return cls(
            fitted=fitted,
            knowing=knowing,
            data=TrainingData(**{name: array(f"data.{name}") for name in TrainingData.__dataclass_fields__}),
            split=Split(**{name: array(f"split.{name}") for name in Split.__dataclass_fields__}),
            vectors={
                each: SampleVectors(
                    **{name: array(f"vectors.{each}.{name}") for name in SampleVectors.__dataclass_fields__}
                )
                for each in texts
            },
            item_knowledge=array("item_knowledge") if (directory / "item_knowledge.npy").is_file() else None,
        )


def prepare_runs(
    dataset: Dataset,
    samples: Samples,
    parts: Split,
    variants: Collection[str],
    writer: Writer,
    directory: Path,
    settings: QualitySettings,
) -> Prepared:
    """Everything that the runs of these variants share: features, texts, vectors.

    Args:
        dataset: whose log was replayed.
        samples: of the replay, all of them.
        parts: of the samples.
        variants: of `FUSIONS`.
        writer: of all texts.
        directory: keeps encoder, texts and embeddings, so that a rerun makes only what is missing.
        settings: see `QualitySettings`.

    Raises:
        LiberError: data, encoder and settings do not fit together, or writer or encoder failed.
    """
    fitted = fit_features(
        dataset,
        samples,
        parts,
        history_length=settings.history_length,
        lookback=settings.lookback,
        seed=settings.preparation_seed,
    )
    rows = np.arange(len(samples), dtype=np.int64)
    data = _without_representations(dataset, samples, rows, fitted)
    wanted = dict.fromkeys(texts for texts, _ in (FUSIONS[variant] for variant in variants) if texts)
    if not wanted:
        return Prepared(fitted, fitted, data, parts, {}, None)
    spec = export_encoder(settings.encoder, directory)
    planned = plan(find_variant("liber"), samples, parts.training_part)
    with keep_embedders():
        _fit_pca(write_pairs(planned, dataset, samples, writer, directory), spec, directory, settings)
        with open_encoder(directory, spec, fingerprint(spec, directory / PCA)) as encoder:
            vectors = {
                texts: sample_vectors(
                    find_variant(texts), dataset, samples, rows, writer, encoder, directory, settings.refresh
                )
                for texts in wanted
            }
            items = embed_items(write_items(dataset, writer, directory), fitted.vocabulary.vocabulary, encoder)
    knowing = with_knowledge(fitted, samples, parts, items)
    return Prepared(fitted, knowing, data, parts, vectors, items)


def run_one(run: Run, prepared: Prepared, settings: QualitySettings, checkpoint: Path | None = None) -> Result:
    """Trains and measures; the test part is looked at once, after the training.

    Args:
        run: a backbone and a variant of `FUSIONS`.
        prepared: for its variant, among others.
        settings: that it was prepared with.
        checkpoint: lets a training that was interrupted go on.
    """
    texts, fusion = FUSIONS[run.variant]
    chosen = load_hyperparameters(run.backbone)
    data = prepared.data
    if texts:
        seen = prepared.vectors[texts]
        data = dataclasses.replace(
            data, partition_start=seen.start, partition_count=seen.count, representations=seen.representations
        )
    fitted = prepared.knowing if fusion in KNOWING else prepared.fitted
    data = dataclasses.replace(data, numbers=fitted.numbers.values)
    started = time.perf_counter()
    model = make_ranker(
        run.backbone,
        fitted,
        chosen,
        fusion=fusion,
        dimension=settings.dimension if texts else 0,
        item_knowledge=prepared.item_knowledge if texts else None,
        seed=run.seed,
    )
    trained = train(
        model,
        data,
        prepared.split.train,
        prepared.split.validation,
        seed=run.seed,
        settings=chosen.training,
        checkpoint=checkpoint,
    )
    seconds = time.perf_counter() - started
    auc, logloss = evaluate(model, data, prepared.split.test, max_partitions=chosen.training.max_partitions)
    return Result(
        *run,
        auc=auc,
        logloss=logloss,
        validation_auc=trained.auc,
        validation_logloss=trained.logloss,
        epochs=len(trained.epochs),
        best_epoch=trained.best_epoch,
        seconds=seconds,
    )


class Trees:
    """The runs of the trees; their features are made with the first of them."""

    def __init__(self, dataset: Dataset, samples: Samples, parts: Split) -> None:
        """Names the data."""
        self._dataset = dataset
        self._samples = samples
        self._parts = parts
        self._tables: tuple[FeatureTable, FeatureTable] | None = None

    def run(self, run: Run) -> Result:
        """Fits on the train part for the validation figures, and on the whole training part for those of the test."""
        if self._tables is None:
            behavior, parts = self._samples.behavior, self._parts
            chosen, reported = (
                make_features(self._dataset, self._samples, int(behavior[part[0]]))
                for part in (parts.validation, parts.test)
            )
            self._tables = chosen, reported
        chosen, reported = self._tables
        label, parts = self._samples.label, self._parts
        validated = fit_and_measure(chosen, label, parts.train, parts.validation, run.seed)
        tested = fit_and_measure(reported, label, parts.training_part, parts.test, run.seed)
        return Result(
            *run,
            auc=tested.auc,
            logloss=tested.logloss,
            validation_auc=validated.auc,
            validation_logloss=validated.logloss,
            epochs=0,
            best_epoch=0,
            seconds=tested.seconds,
        )


_shared: tuple[Prepared, QualitySettings, Path] | None = None


def share(directory: Path, settings: QualitySettings, checkpoints: Path) -> None:
    """Gives this process what its runs need; `directory` as `Prepared.save` left it."""
    global _shared
    torch.set_num_threads(1)
    checkpoints.mkdir(parents=True, exist_ok=True)
    _shared = Prepared.load(directory), settings, checkpoints


def work(run: Run, key: str) -> Result:
    """One run in a process that `share` was called in; what was begun before under this key goes on."""
    if _shared is None:
        raise RuntimeError("a process works only after it was given what to work on")
    prepared, settings, checkpoints = _shared
    checkpoint = checkpoints / f"{key}.checkpoint"
    result = run_one(run, prepared, settings, checkpoint)
    checkpoint.unlink(missing_ok=True)
    return result


def digest_data(dataset: Dataset) -> str:
    """Of everything in a data set that a figure can depend on."""
    digest = hashlib.sha256(repr((dataset.domain, dataset.ordered, sorted(dataset.cuts.items()))).encode())
    for rows in (dataset.behaviors, dataset.items.values(), sorted(dataset.profiles.items())):
        for row in rows:
            digest.update(repr(row).encode())
    return digest.hexdigest()


def make_key(run: Run, data: str, writer: str, settings: QualitySettings) -> str:
    """The digest of everything that the result of a run depends on.

    Args:
        run: any.
        data: of `digest_data`.
        writer: its name.
        settings: those that the run does not see make no difference.
    """
    held: list[object] = [data, tuple(run), settings.partition, _versions()]
    if run.backbone == TREES:
        held.append(digest_code(_CODE_OF_TREES))
    else:
        held += [settings.history_length, settings.preparation_seed, repr(load_hyperparameters(run.backbone))]
        held.append(digest_code((*_CODE, _module_of(run.backbone))))
        held += [_digest_function(each) for each in (prepare, run_one, prepare_runs, _fit_pca)]
        texts, fusion = FUSIONS[run.variant]
        held += [texts, fusion]
        if texts:
            held += [settings.dimension, settings.encoder, writer, digest_code(_CODE_OF_TEXTS)]
            held += [] if find_variant(texts).is_partitioned else [settings.refresh]
    return hashlib.sha256(repr(held).encode()).hexdigest()[:32]


def digest_code(modules: Iterable[str]) -> str:
    """Of what the modules do: comments, docstrings and layout make no difference."""
    return hashlib.sha256("".join(map(_digest_module, modules)).encode()).hexdigest()


@functools.cache
def _digest_module(name: str) -> str:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ConfigurationError(f"the module {name} cannot be imported; run from the directory that holds it")
    return hashlib.sha256(f"{name} {without_words(Path(found.origin).read_text())}".encode()).hexdigest()


@functools.cache
def _digest_function(function: Callable[..., object]) -> str:
    return hashlib.sha256(without_words(inspect.getsource(function)).encode()).hexdigest()


def without_words(source: str) -> str:
    """The syntax tree of Python `source`, without the strings that stand for themselves."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            node.body = kept  # type: ignore[attr-defined]
    return ast.dump(tree)


def _module_of(backbone: str) -> str:
    if backbone in BACKBONES:
        module = inspect.getmodule(BACKBONES[backbone])
        return module.__name__ if module is not None else backbone
    return backbone.partition(":")[0]


def _versions() -> tuple[str, ...]:
    return platform.python_version(), *(importlib.metadata.version(package) for package in _PACKAGES)


def _without_representations(
    dataset: Dataset, samples: Samples, rows: npt.NDArray[np.int64], fitted: FittedFeatures
) -> TrainingData:
    """All samples as columns; the vectors of their partitions have no size yet and are not looked at."""
    count = np.zeros(len(samples.user_ids), dtype=np.int64)
    np.maximum.at(count, samples.user, samples.partitions)
    start = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(count)])
    none = StoredVectors(np.zeros((int(start[-1]), 0), dtype=np.float32), start)
    return prepare(none, dataset, samples, rows, fitted)


def _fit_pca(training: list[Pair], spec: EncoderSpec, directory: Path, settings: QualitySettings) -> None:
    """On the texts that samples of the training part see, evenly chosen if there are too many."""
    if len(training) > PCA_TEXTS:
        training = [training[row] for row in np.linspace(0, len(training) - 1, PCA_TEXTS).astype(np.int64).tolist()]
    with open_embedder(directory, spec) as (cache, embedder):
        embedder.embed(training)
        fit_pca(cache.get(training), settings.dimension, directory / PCA)
