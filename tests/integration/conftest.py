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

from builders.build import BuildSettings, build
from builders.datasets import Dataset, sample
from builders.hyperparameters import Hyperparameters
from builders.repository import publish
from builders.train import TrainingSettings
from liber_runtime.bundle import Manifest
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


def build_small(directory: Path, encoder: Path, seed: int = 1) -> Built:
    """Builds a bundle of the generated sample in a few seconds."""
    dataset = sample.generate(seed=3, users=60, items=80, behaviors=4_000)
    settings = BuildSettings(
        encoder=str(encoder),
        dimension=8,
        history_length=10,
        seed=seed,
        hyperparameters=Hyperparameters(TrainingSettings(max_epochs=1, batch_sizes=(256,))),
    )
    url = f"sqlite:///{directory / 'memory.db'}"
    store = open_store(url)
    try:
        manifest, _ = build(store, dataset, StatisticalWriter(), directory, settings)
    finally:
        store.close()
    return Built(dataset, directory, url, manifest, settings)


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
def built(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Built:
    return build_small(tmp_path_factory.mktemp("built"), tiny_bert)


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
