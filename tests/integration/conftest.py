"""One small bundle, built once for all integration tests, and a real tritonserver that serves it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from builders.assembly import with_knowledge
from builders.build import (
    BuildSettings,
    Knowledge,
    build,
    fit_for,
    know_items,
    make_liber,
    prepare,
    read_vectors,
    train_once,
)
from builders.datasets import Dataset, sample
from builders.hyperparameters import Hyperparameters
from builders.replay import Samples, replay, split
from builders.repository import publish
from builders.statistics import compute_numbers
from builders.train import Index, TrainingData, TrainingSettings, predict
from liber_runtime.bundle import ENCODER, ENCODER_SPEC, TOKENIZER, Manifest
from liber_runtime.memory import MemoryStore, open_store
from liber_runtime.scoring import ScoringClient
from liber_runtime.server import TritonServer
from liber_runtime.writers.statistical import StatisticalWriter

# The models are so small that threads only wait for each other, long where other processes want the processors.
torch.set_num_threads(1)

PATIENCE_SECONDS = 30.0

Matrix = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build left: its data, its bundle, the store it filled and the settings it ran with."""

    dataset: Dataset
    directory: Path
    store_url: str
    manifest: Manifest
    settings: BuildSettings

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"


@dataclasses.dataclass(frozen=True)
class Running:
    """A server on a bundle."""

    server: TritonServer
    built: Built
    repository: Path

    @property
    def url(self) -> str:
        return self.server.grpc_url


def build_small(directory: Path, encoder: Path) -> None:
    """Builds a bundle of the generated sample in a few seconds."""
    store = open_store(f"sqlite:///{directory / 'memory.db'}")
    try:
        build(store, _small_dataset(), StatisticalWriter(), directory, _small_settings(encoder))
    finally:
        store.close()


def read_small(directory: Path, encoder: Path) -> Built:
    """What `build_small` left in `directory`."""
    manifest, url = Manifest.load(directory / "bundle"), f"sqlite:///{directory / 'memory.db'}"
    return Built(_small_dataset(), directory, url, manifest, _small_settings(encoder))


def _small_dataset() -> Dataset:
    return sample.generate(seed=3, users=60, items=80, behaviors=4_000)


def _small_settings(encoder: Path) -> BuildSettings:
    return BuildSettings(
        encoder=str(encoder),
        dimension=8,
        history_length=10,
        hyperparameters=Hyperparameters(TrainingSettings(max_epochs=1, batch_sizes=(256,))),
    )


def share_encoder(exported: Path, directory: Path) -> None:
    """Puts an exported encoder where a build would export the same, which takes longer than all else it does here."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (ENCODER, ENCODER_SPEC, TOKENIZER):
        # Another file, for the one before may be linked to.
        (directory / name).unlink(missing_ok=True)
        shutil.copy2(exported / name, directory / name)


def copy_build(built: Built, directory: Path) -> Built:
    """The build with a store of its own, so that what a test does to it no other test sees."""
    directory.mkdir()
    for name in ("bundle", "knowledge", "models"):
        shutil.copytree(built.directory / name, directory / name)
    with (
        contextlib.closing(sqlite3.connect(built.directory / "memory.db")) as source,
        contextlib.closing(sqlite3.connect(directory / "memory.db")) as target,
    ):
        source.backup(target)
    return dataclasses.replace(built, directory=directory, store_url=f"sqlite:///{directory / 'memory.db'}")


@contextlib.contextmanager
def opened(built: Built) -> Iterator[MemoryStore]:
    store = open_store(built.store_url)
    try:
        yield store
    finally:
        store.close()


def users_with_partitions(built: Built) -> list[str]:
    with opened(built) as store:
        users = store.users()
        read = store.read(users, 0, 1, built.manifest.fingerprint)
    return [user for user, held in zip(users, read, strict=True) if held and len(held.representations)]


def predict_offline(built: Built, store: MemoryStore) -> tuple[list[str], list[str], Matrix]:
    """What the trained model itself says of users, of a candidate each, and the probabilities.

    The last sample of every user that is also their last behavior sees what the store holds, less itself. So the users
    are scored for the state *after* their whole log, with an arbitrary candidate.
    """
    settings = built.settings
    samples = replay(built.dataset, store.condition, settings.minimum)
    parts = split(samples)
    kept = built.directory / "knowledge"
    knowledge = Knowledge(kept, built.manifest.encoder, built.manifest.fingerprint, built.manifest.writers)
    fitted = fit_for(built.dataset, samples, parts, settings)
    items = know_items(built.dataset, StatisticalWriter(), knowledge, fitted, settings)
    fitted = with_knowledge(fitted, samples, parts, items)

    def seen(dataset: Dataset, replayed: Samples, rows: Index) -> TrainingData:
        vectors = read_vectors(store, replayed, rows, knowledge, settings)
        served, trained = fitted.numbers.served, replayed is samples
        numbers = compute_numbers(served, replayed, rows, fitted.vocabulary, settings.lookback)
        return prepare(vectors, dataset, replayed, rows, fitted, None if trained else numbers)

    model = make_liber(fitted, items, settings)
    data = seen(built.dataset, samples, parts.training_part)
    train_once("liber", model, data, parts, settings, built.directory / "models")
    longer = _with_one_more_behavior_each(built.dataset)
    again = replay(longer, store.condition, settings.minimum)
    rows = np.flatnonzero(again.behavior >= len(built.dataset.behaviors))
    offline = predict(model, seen(longer, again, rows), np.arange(len(rows)))
    users = [again.user_ids[user] for user in again.user[rows]]
    return users, [again.item_ids[item] for item in again.item[rows]], offline


def _with_one_more_behavior_each(dataset: Dataset) -> Dataset:
    last, items = dataset.behaviors[-1].timestamp, list(dataset.items)
    more = [
        dataclasses.replace(
            dataset.behaviors[0],
            user_id=user,
            item_id=items[place % len(items)],
            timestamp=last + 1 + place,
            event_id=f"candidate-{place}",
        )
        for place, user in enumerate(dict.fromkeys(behavior.user_id for behavior in dataset.behaviors))
    ]
    return dataclasses.replace(dataset, behaviors=[*dataset.behaviors, *more])


class Questions:
    """The same call again and again: 12 users with partitions, 5 candidates each."""

    def __init__(self, built: Built) -> None:
        users, items = users_with_partitions(built)[:12], list(built.dataset.items)[:5]
        self.users = [user for user in users for _ in items]
        self.items = items * len(users)

    def ask(self, client: ScoringClient) -> Matrix:
        return client.score(self.users, self.items).probability


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    made_once: Callable[[str, Callable[[Path], object]], Path],
    tiny_bert: Path,
    exported_encoder: Path,
) -> Built:
    """A copy of this process's own of what was built once."""

    def make(directory: Path) -> None:
        share_encoder(exported_encoder, directory / "knowledge")
        build_small(directory, tiny_bert)

    made = read_small(made_once("built", make), tiny_bert)
    return copy_build(made, tmp_path_factory.mktemp("copy") / "built")


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, built: Built) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("serving")
    repository = directory / "model_repository"
    publish(built.bundle, repository)
    server = TritonServer(repository, log_file=directory / "triton.log", environment={"LIBER_STORE": built.store_url})
    with server:
        yield Running(server, built, repository)


@pytest.fixture
def client(running: Running) -> Iterator[ScoringClient]:
    with ScoringClient(running.url) as scoring:
        yield scoring


@pytest.fixture
def store(built: Built) -> Iterator[MemoryStore]:
    memory = open_store(built.store_url)
    yield memory
    memory.close()


@pytest.fixture
def fresh_user() -> str:
    """An id no other test uses."""
    return f"fresh-{next(_numbers)}"


_numbers = itertools.count()
