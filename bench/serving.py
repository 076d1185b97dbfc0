"""What a serving benchmark serves: a store with made-up users, bundles of untrained rankers, and a Triton on one.

Everything is made by the code that makes the real thing, except for what training would have found: behaviors,
vectors, item knowledge and weights are random. How long a score takes does not depend on their values, so making takes
seconds where a build takes minutes. How well such a ranker ranks means nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import threadpoolctl
import tokenizers
import torch
from onnx import numpy_helper

from builders.assembly import FittedFeatures, Fusion, fit_features, make_ranker, with_knowledge
from builders.bundle import write_bundle
from builders.datasets import Dataset
from builders.export import export_backbone, export_fuser
from builders.hyperparameters import Hyperparameters
from builders.models.backbone import Ranker
from builders.models.layers import FieldEmbedding
from builders.models.numbers import Numbers
from builders.pca import fingerprint as fingerprint_of
from builders.pca import fit_pca
from builders.replay import Samples, Split, replay
from builders.replay import split as split_samples
from builders.repository import publish
from builders.statistics import FittedNumbers
from builders.vocabulary import Fit
from liber_runtime.behavior import Behavior, Domain, Item, Text
from liber_runtime.bundle import (
    BACKBONE,
    ENCODER,
    ENCODER_SPEC,
    FUSER,
    PCA,
    TABLES,
    TOKENIZER,
    VOCABULARY,
    EncoderSpec,
    Manifest,
    digest_of,
)
from liber_runtime.memory import STEPS, MemoryStore, Representation, Result, Task, open_store
from liber_runtime.partition import Count
from liber_runtime.server import TritonServer

DOMAIN = Domain("made-up", "thing", "stars", (1.0, 5.0), 3.0, ("category",))

SCORING_MODELS = ("user_memory", "attention_fuser", "ctr_backbone", "liber_score")

LOOKBACK = 200
"""L, the newest behaviors given to a graph: the default of ``liber build``."""

MAX_PARTITIONS = 40
"""The newest vectors of a user that are fused: the default of ``liber build``."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "DIEN": {"hidden_size": 64, "attention_size": 64},
    "DIN": {"attention_size": 64, "hidden_size": 64},
}
"""Options of a backbone that its defaults leave smaller than published: DIEN's states are as wide as its steps of item
and category, and attention has 64 hidden units. The MLP is (200, 80) by default."""

_LOG_ITEMS = 200
_LOG_USERS = 40
_LOG_BEHAVIORS = 60
_CATEGORIES = 20
_TEXT_SIZE = 64
_SPREAD = 0.5
_STEEPNESS = 8.0
_APPEND_BATCH = 10_000
_YEAR = 31_536_000.0


@dataclass(frozen=True)
class Encoding:
    """What stands for an encoder with its PCA: real graphs, small and random.

    Attributes:
        directory: holds encoder, tokenizer and PCA.
        spec: of the encoder.
        fingerprint: of both.
    """

    directory: Path
    spec: EncoderSpec
    fingerprint: str


@dataclass(frozen=True)
class MadeBundle:
    """A bundle and what it was exported from.

    Attributes:
        directory: of the bundle.
        ranker: untrained.
        fitted: its features.
        manifest: of the bundle.
    """

    directory: Path
    ranker: Ranker
    fitted: FittedFeatures
    manifest: Manifest


@dataclass
class Workshop:
    """Makes bundles that go with one store: of one catalogue and one encoding.

    Attributes:
        directory: where everything is made.
        items: I, of the catalogue: ``item-0``, ``item-1``, ... with a category each.
        dimension: d, of r_j and of r̂.
        embedding_dim: E.
        seed: of everything random.
    """

    directory: Path
    items: int = 2000
    dimension: int = 32
    embedding_dim: int = 32
    seed: int = 1

    @functools.cached_property
    def encoding(self) -> Encoding:
        """Made once."""
        return make_encoding(self.directory / "encoding", self.dimension, self.seed)

    @functools.cached_property
    def item_knowledge(self) -> npt.NDArray[np.float32]:
        """float32[I+1, d]; row 0, of the unknown item, is zero."""
        knowledge = np.random.default_rng(self.seed).standard_normal((self.items + 1, self.dimension), dtype=np.float32)
        knowledge[0] = 0
        return knowledge

    def ranker(
        self,
        backbone: str = "DIEN",
        *,
        fusion: Fusion = "matched",
        history_length: int = 20,
        lookback: int = LOOKBACK,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Ranker, FittedFeatures]:
        """An untrained ranker over the catalogue, with its features.

        Args:
            backbone: see `make_backbone`.
            fusion: ``matched``, or ``none`` for the backbone without LIBER.
            history_length: T.
            lookback: L; at least T is looked back.
            options: of the backbone; None for `PUBLISHED` ones.
        """
        fitted = self._features(history_length, max(lookback, history_length), fusion != "none")
        ranker = make_ranker(
            backbone,
            fitted,
            Hyperparameters(
                embedding_dim=self.embedding_dim,
                options=dict(PUBLISHED.get(backbone, {}) if options is None else options),
            ),
            fusion=fusion,
            dimension=self.dimension,
            item_knowledge=self.item_knowledge if fusion != "none" else None,
            seed=self.seed,
        )
        _spread(ranker, self.seed)
        return ranker.eval(), fitted

    def bundle(
        self,
        name: str,
        backbone: str = "DIEN",
        *,
        fusion: Fusion = "matched",
        history_length: int = 20,
        lookback: int = LOOKBACK,
        options: Mapping[str, Any] | None = None,
    ) -> MadeBundle:
        """Exports an untrained ranker into the bundle ``directory / name``; arguments as of `ranker`."""
        ranker, fitted = self.ranker(
            backbone, fusion=fusion, history_length=history_length, lookback=lookback, options=options
        )
        made = self.directory / f".{name}.parts"
        made.mkdir(parents=True, exist_ok=True)
        if ranker.fuser is not None:
            export_fuser(ranker.fuser, made / FUSER)
        export_backbone(ranker, made / BACKBONE)
        (made / VOCABULARY).write_text(fitted.vocabulary.vocabulary.model_dump_json())
        parts = {name: made / name for name in (BACKBONE, TABLES, VOCABULARY)}
        parts |= {name: self.encoding.directory / name for name in (ENCODER, ENCODER_SPEC, TOKENIZER, PCA)}
        if ranker.fuser is not None:
            parts[FUSER] = made / FUSER
        manifest = write_bundle(
            parts,
            self.directory / name,
            domain=DOMAIN.name,
            encoder=self.encoding.spec,
            fingerprint=self.encoding.fingerprint,
            dimension=self.dimension,
            history_length=history_length,
            lookback=fitted.lookback,
            max_partitions=MAX_PARTITIONS,
            backbone=backbone,
            fusion=fusion,
            writers=("made-up",),
            seed=self.seed,
        )
        return MadeBundle(self.directory / name, ranker, fitted, manifest)

    def _features(self, history_length: int, lookback: int, knowing: bool) -> FittedFeatures:
        fitted = self._knowing if knowing else self._fitted
        return _grow(fitted, self.items, history_length, lookback, self.item_knowledge if knowing else None)

    @functools.cached_property
    def _knowing(self) -> FittedFeatures:
        log, fitted = _fit_log(min(self.items, _LOG_ITEMS), self.seed)
        known = self.item_knowledge[: len(log.dataset.items) + 1]
        with threadpoolctl.threadpool_limits(1):
            return with_knowledge(fitted, log.samples, log.parts, known)

    @property
    def _fitted(self) -> FittedFeatures:
        return _fit_log(min(self.items, _LOG_ITEMS), self.seed)[1]


def make_bundle(
    directory: Path, backbone: str = "DIEN", *, items: int = 2000, seed: int = 1, **kind: Any
) -> MadeBundle:
    """One bundle in ``directory / "bundle"``; `kind` as of `Workshop.bundle`."""
    return Workshop(directory, items=items, seed=seed).bundle("bundle", backbone, **kind)


def make_store(
    url: str,
    fingerprint: str,
    *,
    users: int = 1000,
    behaviors: int = 200,
    partitions: int = 10,
    items: int = 2000,
    dimension: int = 32,
    seed: int = 1,
) -> list[str]:
    """Makes the store at `url`, every partition with made-up texts and a vector; returns the users' ids.

    Its own catalogue stays empty: scoring reads nothing of it.

    Args:
        url: see `open_store`.
        fingerprint: of the vectors: the encoding's that the bundles to be served have.
        users: how many.
        behaviors: of each user.
        partitions: of each user; each holds ``behaviors // partitions`` behaviors, what is left is cache.
        items: I, as of `Workshop`.
        dimension: d.
        seed: of behaviors and vectors.
    """
    store = open_store(url, Count(behaviors // partitions) if partitions else Count(behaviors + 1))
    try:
        store.describe(DOMAIN)
        user_ids = [f"user-{number}" for number in range(users)]
        add_users(store, fingerprint, user_ids, behaviors, items=items, dimension=dimension, seed=seed)
    finally:
        store.close()
    return user_ids


def add_users(
    store: MemoryStore,
    fingerprint: str,
    user_ids: Sequence[str],
    behaviors: int,
    *,
    items: int,
    dimension: int = 32,
    seed: int = 1,
) -> None:
    """Gives a store more users, each with as many `behaviors`; the other arguments as of `make_store`."""
    draw = np.random.default_rng(seed)
    store.describe(profiles={user_id: _profile(draw) for user_id in user_ids})
    store.encode_by({fingerprint})
    began = time.time() - _YEAR
    waiting: list[Behavior] = []
    for user_id in user_ids:
        chosen = draw.integers(items, size=behaviors).tolist()
        stars = draw.integers(1, 6, size=behaviors).tolist()
        for number, (item, given) in enumerate(zip(chosen, stars, strict=True)):
            waiting.append(Behavior(user_id, f"item-{item}", float(given), began + number, f"{number}"))
            if len(waiting) >= _APPEND_BATCH:
                store.append(waiting)
                waiting = []
    if waiting:
        store.append(waiting)
    while tasks := store.claim(STEPS, 2000, 600.0, fingerprint):
        store.commit([Result(task, _made(task, fingerprint, dimension, draw)) for task in tasks])


@contextlib.contextmanager
def serve(
    bundle: Path, store_url: str, directory: Path, *, environment: Mapping[str, str] | None = None
) -> Iterator[TritonServer]:
    """A real Triton that scores by a bundle from a store, with its log in ``directory / "triton.log"``.

    Args:
        bundle: a bundle's directory.
        store_url: of the store; absolute.
        directory: receives ``model_repository``, to which further bundles can be published.
        environment: of the server, beside ``LIBER_STORE``.
    """
    repository = directory / "model_repository"
    publish(bundle, repository)
    with TritonServer(
        repository,
        log_file=directory / "triton.log",
        models=[name for name in SCORING_MODELS if (repository / name).is_dir()],
        environment={"LIBER_STORE": store_url, **(environment or {})},
    ) as server:
        yield server


def make_log(items: int, seed: int) -> Dataset:
    """A small log over the first items of a catalogue, for features to be fitted on."""
    draw = np.random.default_rng(seed)
    began = time.time() - _YEAR
    times = draw.integers(10_000_000, size=(_LOG_USERS, _LOG_BEHAVIORS))
    chosen = draw.integers(items, size=times.shape)
    stars = draw.integers(1, 6, size=times.shape)
    return Dataset(
        domain=DOMAIN,
        behaviors=[
            Behavior(f"user-{user}", f"item-{chosen[user, n]}", float(stars[user, n]), began + float(times[user, n]))
            for user in range(_LOG_USERS)
            for n in range(_LOG_BEHAVIORS)
        ],
        items={f"item-{n}": Item(f"item-{n}", f"Thing {n}", {"category": f"c{n % _CATEGORIES}"}) for n in range(items)},
        profiles={f"user-{user}": _profile(draw) for user in range(_LOG_USERS)},
    )


def make_encoding(directory: Path, dimension: int, seed: int) -> Encoding:
    """A small random encoder that is no BERT, its tokenizer, and a PCA fitted on random embeddings.

    ``liber_encode`` runs on it; what it says of a text means nothing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    words = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.save(str(directory / TOKENIZER))
    draw = np.random.default_rng(seed)
    model = onnx.parser.parse_model(_ENCODER)
    table = draw.standard_normal((len(words), _TEXT_SIZE), dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    (directory / ENCODER).write_bytes(model.SerializeToString())
    digests = "".join(digest_of(directory / name) for name in (ENCODER, TOKENIZER))
    spec = EncoderSpec(
        name="made-up",
        digest=hashlib.sha256(digests.encode()).hexdigest(),
        embedding_size=_TEXT_SIZE,
        max_tokens=128,
        start_id=words["[CLS]"],
        end_id=words["[SEP]"],
        pad_id=words["[PAD]"],
    )
    (directory / ENCODER_SPEC).write_text(spec.model_dump_json())
    fit_pca(draw.standard_normal((4 * _TEXT_SIZE, _TEXT_SIZE), dtype=np.float32), dimension, directory / PCA)
    return Encoding(directory, spec, fingerprint_of(spec, directory / PCA))


_ENCODER = """
<ir_version: 9, opset_import: ["": 18]>
encoder (int64[chunks, length] input_ids, int64[chunks, length] attention_mask, int64[chunks] chunk_owner)
    => (float[texts, size] text_embedding)
<int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] second = {1}>
{
    hidden = Gather(table, input_ids)
    mask = Cast<to = 1>(attention_mask)
    rows = Unsqueeze(mask, second)
    sums = MatMul(rows, hidden)
    pooled = Squeeze(sums, second)
    counts = ReduceSum(mask, second)
    newest = ReduceMax<keepdims = 0>(chunk_owner)
    texts = Add(newest, one)
    numbers = Range(zero, texts, one)
    column = Unsqueeze(numbers, second)
    owners = Unsqueeze(chunk_owner, first)
    is_member = Equal(column, owners)
    member = Cast<to = 1>(is_member)
    total = MatMul(member, pooled)
    count = MatMul(member, counts)
    text_embedding = Div(total, count)
}
"""
"""Masked mean over the tokens of all chunks of a text, as `builders.encoder.PooledEncoder`, over a table."""


@dataclass(frozen=True)
class _Log:
    dataset: Dataset
    samples: Samples
    parts: Split


@functools.lru_cache
def _fit_log(items: int, seed: int) -> tuple[_Log, FittedFeatures]:
    """A small log over the first items of a catalogue, and features fitted on it."""
    dataset = make_log(items, seed)
    samples = replay(dataset, Count(20), 20)
    parts = split_samples(samples)
    # So small that threads would only wait for each other.
    with threadpoolctl.threadpool_limits(1):
        fitted = fit_features(dataset, samples, parts, history_length=20, lookback=LOOKBACK, seed=seed)
    return _Log(dataset, samples, parts), fitted


def _spread(ranker: Ranker, seed: int) -> None:
    """Fresh weights score all candidates alike, and a comparison of scores would see nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in ranker.modules():
            if isinstance(module, FieldEmbedding):
                torch.nn.init.normal_(module.table.weight, std=_SPREAD, generator=generator)
            elif isinstance(module, torch.nn.Linear) and module.out_features == 1:
                module.weight.mul_(_STEEPNESS)


def _grow(
    fitted: FittedFeatures, items: int, history_length: int, lookback: int, knowledge: npt.NDArray[np.float32] | None
) -> FittedFeatures:
    """The features for a catalogue of `items`: what the log knows nothing of is as what it knows, in turn."""
    small = fitted.vocabulary.vocabulary
    source = np.concatenate(([0], 1 + np.arange(items) % len(small.items)))
    table = fitted.vocabulary.item_table[source]
    # Each item has an id embedding of its own, so that the largest table there can be is served.
    table[:, 0] = np.arange(items + 1)
    vocabulary = small.model_copy(update={"items": tuple(f"item-{number}" for number in range(items))})
    statistics = fitted.tables[-1].statistics
    grown = dataclasses.replace(
        statistics,
        **{
            name: getattr(statistics, name)[source] for name in ("mean", "count", "vectors", "similarity", "attributes")
        },
    )
    served = fitted.numbers.served
    numbers = Numbers(grown, history_length, knowledge, served.mean.numpy(), served.scale.numpy())
    return FittedFeatures(
        Fit(vocabulary, table),
        fitted.tables,
        FittedNumbers(numbers, fitted.numbers.values),
        history_length,
        lookback,
    )


def _profile(draw: np.random.Generator) -> dict[str, Any]:
    return {"age": int(draw.integers(18, 80)), "occupation": f"o{draw.integers(8)}"}


def _made(task: Task, fingerprint: str, dimension: int, draw: np.random.Generator) -> Text | Representation:
    if task.step == "representation":
        return Representation(draw.standard_normal(dimension, dtype=np.float32), fingerprint)
    return Text(task.step, f"A made-up {task.step}.", "made-up", "made-up-1", None, None, 0.0, time.time())
