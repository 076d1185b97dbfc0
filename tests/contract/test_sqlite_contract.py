from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_store_contract import Clock, Engine, MemoryStoreContract

from liber_runtime.memory.sqlite import SQLiteStore
from liber_runtime.partition import PartitionCondition


class SQLiteEngine:
    def __init__(self, folder: Path, numbers: Iterator[int], opened: list[SQLiteStore]) -> None:
        self._folder, self._numbers, self._opened = folder, numbers, opened
        self._path = folder / f"memory-{next(numbers)}.db"
        self.url = f"sqlite:///{self._path}"
        self.clock = Clock()

    def open(self, condition: PartitionCondition | None = None) -> SQLiteStore:
        store = SQLiteStore(str(self._path), condition, clock=self.clock)
        self._opened.append(store)
        return store

    def fresh(self) -> SQLiteEngine:
        return SQLiteEngine(self._folder, self._numbers, self._opened)


class TestSQLite(MemoryStoreContract):
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[Engine]:
        opened: list[SQLiteStore] = []
        yield SQLiteEngine(tmp_path, itertools.count(), opened)
        for store in opened:
            store.close()
