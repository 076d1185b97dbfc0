from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_store_contract import Clock, Engine, MemoryStoreContract

from liber_runtime.memory import MemoryStore
from liber_runtime.memory.sharded import ShardedStore, shard_paths
from liber_runtime.memory.sqlite import SQLiteStore
from liber_runtime.partition import PartitionCondition


class SQLiteEngine:
    def __init__(self, folder: Path, numbers: Iterator[int], opened: list[SQLiteStore]) -> None:
        self._folder, self._numbers, self._opened = folder, numbers, opened
        self._path = folder / f"memory-{next(numbers)}.db"
        self.url = f"sqlite:///{self._path}"
        self.clock = Clock()

    def open(self, condition: PartitionCondition | None = None) -> MemoryStore:
        store = SQLiteStore(str(self._path), condition, clock=self.clock)
        self._opened.append(store)
        return store

    def fresh(self) -> SQLiteEngine:
        return SQLiteEngine(self._folder, self._numbers, self._opened)

    def now(self) -> float:
        return self.clock()

    def let_age(self) -> float:
        self.clock.now += 10.0
        return 10.0


class ShardedEngine(SQLiteEngine):
    """Three files; the clock is the tests', which a URL cannot give."""

    def __init__(self, folder: Path, numbers: Iterator[int], opened: list[SQLiteStore]) -> None:
        super().__init__(folder, numbers, opened)
        self.url = f"sqlite:///{self._path}?shards=3"

    def open(self, condition: PartitionCondition | None = None) -> MemoryStore:
        shards = [SQLiteStore(path, condition, clock=self.clock) for path in shard_paths(str(self._path), 3)]
        self._opened += shards
        return ShardedStore(shards)

    def fresh(self) -> ShardedEngine:
        return ShardedEngine(self._folder, self._numbers, self._opened)


class TestSQLite(MemoryStoreContract):
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[Engine]:
        opened: list[SQLiteStore] = []
        yield SQLiteEngine(tmp_path, itertools.count(), opened)
        for store in opened:
            store.close()


class TestShardedSQLite(MemoryStoreContract):
    examples = 12

    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[Engine]:
        opened: list[SQLiteStore] = []
        yield ShardedEngine(tmp_path, itertools.count(), opened)
        for store in opened:
            store.close()
