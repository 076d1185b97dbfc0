from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
from memory_store_contract import Clock, Engine, MemoryStoreContract

from bench.redis_servers import MISSING, is_installed, redis_cluster, single_redis
from liber_runtime.memory.redis import RedisStore
from liber_runtime.partition import PartitionCondition

pytestmark = pytest.mark.skipif(not is_installed(), reason=MISSING)

NUMBERS = itertools.count()


class RedisEngine:
    """A store with a name of its own on servers that all tests share."""

    def __init__(self, address: str, opened: list[RedisStore]) -> None:
        self._address, self._opened = address, opened
        self.url = f"redis://{address}/0?name=store-{next(NUMBERS)}&buckets=16"
        self.clock = Clock()

    def open(self, condition: PartitionCondition | None = None) -> RedisStore:
        store = RedisStore(self.url, condition, clock=self.clock)
        self._opened.append(store)
        return store

    def fresh(self) -> RedisEngine:
        return RedisEngine(self._address, self._opened)

    def now(self) -> float:
        """Steps age by the servers' clock, which is this machine's."""
        return time.time()

    def let_age(self) -> float:
        time.sleep(0.02)
        return 0.018


def engine_on(address: str) -> Iterator[Engine]:
    opened: list[RedisStore] = []
    yield RedisEngine(address, opened)
    for store in opened:
        store.close()


@pytest.fixture(scope="session")
def single_address() -> Iterator[str]:
    with single_redis() as server:
        yield server.address


@pytest.fixture(scope="session")
def cluster_address() -> Iterator[str]:
    with redis_cluster() as cluster:
        yield cluster.address


class TestSingleRedis(MemoryStoreContract):
    @pytest.fixture
    def engine(self, single_address: str) -> Iterator[Engine]:
        yield from engine_on(single_address)


class TestRedisCluster(MemoryStoreContract):
    examples = 12

    @pytest.fixture
    def engine(self, cluster_address: str) -> Iterator[Engine]:
        yield from engine_on(cluster_address)
