"""One small bundle, built once for all integration tests, and a real tritonserver that serves it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from builders.build import BuildSettings, build
from builders.datasets import Dataset, sample
from builders.repository import publish
from builders.train import TrainingSettings
from liber_runtime.bundle import Manifest
from liber_runtime.memory import MemoryStore, open_store
from liber_runtime.scoring import ScoringClient
from liber_runtime.server import TritonServer
from liber_runtime.writers.statistical import StatisticalWriter

# The models are so small that threads only wait for each other, long where other processes want the processors.
torch.set_num_threads(1)


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
        training=TrainingSettings(max_epochs=1, batch_size=256),
    )
    url = f"sqlite:///{directory / 'memory.db'}"
    store = open_store(url)
    try:
        manifest, _ = build(store, dataset, StatisticalWriter(), directory, settings)
    finally:
        store.close()
    return Built(dataset, directory, url, manifest, settings)


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
