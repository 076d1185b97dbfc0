"""What goes wrong with Redis: refusals, full memory, killed and restarted servers, slots on their way."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis.connection import Connection

from bench.redis_servers import MISSING, RedisCluster, RedisServer, is_installed, redis_cluster, single_redis
from liber_runtime.behavior import Behavior, Text
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, StoreError
from liber_runtime.memory import Appended, MemoryStore, Representation, Result, Task, open_store
from liber_runtime.memory.redis import RedisStore
from liber_runtime.memory.redis.library import DIGEST
from liber_runtime.memory.redis.servers import Node
from liber_runtime.partition import Count

pytestmark = pytest.mark.skipif(not is_installed(), reason=MISSING)


def run(user: str, count: int, start: int = 0) -> list[Behavior]:
    return [Behavior(user, f"item-{n}", 4.0, 1e9 + n, f"event-{n}") for n in range(start, start + count)]


def made(task: Task) -> Result:
    if task.step == "representation":
        return Result(task, Representation(np.full(4, task.number, np.float32), "encoder-1"))
    return Result(task, Text(task.step, f"{task.step} of {task.number}", "test", "v1", None, None, 0.0, 0.0))


def events_of(store: MemoryStore, user: str) -> list[str]:
    timeline = store.timeline(user)
    assert timeline is not None
    behaviors = [each for record in timeline.partitions for each in record.behaviors] + list(timeline.cache)
    return [each.event_id for each in behaviors]


@pytest.fixture(scope="module")
def single() -> Iterator[RedisServer]:
    with single_redis() as server:
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with redis_cluster() as servers:
        yield servers


# opening


def test_there_is_no_store_until_one_is_made(single: RedisServer) -> None:
    url = f"redis://{single.address}/0?name=made"
    with pytest.raises(ConfigurationError, match=r"there is no store .*name=made"):
        open_store(url, create=False)
    open_store(url).close()
    open_store(url, create=False).close()


def test_nobody_listens() -> None:
    with pytest.raises(StoreError, match=r"refused.*start the server, or correct host and port"):
        open_store("redis://127.0.0.1:1/0")


def test_a_cluster_has_one_database(cluster: RedisCluster) -> None:
    with pytest.raises(StoreError, match="a cluster has database 0 only; write /0"):
        open_store(f"redis://{cluster.address}/3")


def test_a_cluster_waits_for_a_replica_and_a_single_redis_for_none(single: RedisServer, cluster: RedisCluster) -> None:
    for address, query, replicas in (
        (single.address, "", 0),
        (cluster.address, "", 1),
        (cluster.address, "&replicas=0", 0),
    ):
        store = RedisStore(f"redis://{address}/0?name=waits{query}")
        assert store._servers.replicas == replicas
        store.close()


def test_databases_and_names_keep_stores_apart(single: RedisServer) -> None:
    stores = [open_store(f"redis://{single.address}/{place}") for place in ("1?name=x", "2?name=x", "1?name=y")]
    for number, store in enumerate(stores):
        store.append(run("ann", number + 1))
    assert [store.statistics().behaviors for store in stores] == [1, 2, 3]
    for store in stores:
        store.close()


def test_the_buckets_are_those_of_the_first(single: RedisServer) -> None:
    first = open_store(f"redis://{single.address}/0?name=buckets&buckets=3")
    first.append([*run("ann", 2), *run("bo", 3)])
    second = open_store(f"redis://{single.address}/0?name=buckets&buckets=7")
    assert second.append(run("bo", 4)) == Appended(1, 3, 0)
    assert second.statistics().behaviors == 6
    first.close()
    second.close()


# users and passwords


def test_passwords_and_users() -> None:
    with single_redis("--requirepass", "p@ss/word") as server:
        with pytest.raises(StoreError, match="put user and password into the URL"):
            open_store(f"redis://{server.address}/0")
        with pytest.raises(StoreError, match="correct user and password") as caught:
            open_store(f"redis://:secret-but-wrong@{server.address}/0")
        assert "secret-but-wrong" not in str(caught.value)
        store = open_store(f"redis://:p%40ss%2Fword@{server.address}/0")
        connection = store._servers._borrow(("127.0.0.1", server.port))  # type: ignore[attr-defined]

        def command(*words: str) -> None:
            connection.send_command(*words)
            connection.read_response()

        command("ACL", "SETUSER", "reader", "on", ">r", "~liber:*", "+@read", "+info")
        command("ACL", "SETUSER", "liber", "on", ">l", "~liber:*", "+@all", "-@dangerous", "+info")
        with pytest.raises(StoreError, match=r"no permissions.*ACL SETUSER"):
            open_store(f"redis://reader:r@{server.address}/0?name=liber")
        with pytest.raises(StoreError, match="no permissions"):
            open_store(f"redis://liber:l@{server.address}/0?name=others")
        user = open_store(f"redis://liber:l@{server.address}/0?name=liber", Count(20))
        assert user.append(run("ann", 20)) == Appended(20, 0, 1)
        assert [task.number for task in user.claim(["summary"], 1, 60.0)] == [1]
        user.close()
        store.close()


def test_tls(tmp_path: Path) -> None:
    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)

    openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=liber"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "server.key", "-out", "server.crt"),
    )
    certificate, key = str(tmp_path / "server.crt"), str(tmp_path / "server.key")
    options = ["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate]
    server = RedisServer(tmp_path / "server")
    server.options = ("--port", "0", "--tls-port", str(server.port), *options)
    server.start()
    try:
        address = server.address
        with pytest.raises(StoreError, match="name the certificate authority in the URL: ca="):
            open_store(f"rediss://{address}/0?timeout_seconds=1")
        url = f"rediss://{address}/0?ca={certificate}&cert={certificate}&key={key}"
        store = open_store(url)
        assert store.append(run("ann", 3)) == Appended(3, 0, 0)
        store.close()
    finally:
        server.kill()


# what Redis refuses


def test_a_full_redis_refuses_and_keeps_nothing_of_it(single: RedisServer) -> None:
    store = open_store(f"redis://{single.address}/0?name=full", Count(5))
    store.append(run("ann", 7))
    before = store.statistics()
    single.command("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(StoreError, match="Redis is full: raise maxmemory or forget users"):
            store.append(run("ann", 7, 7))
        after = store.statistics()
        assert dataclasses.replace(after, age_seconds=before.age_seconds) == before
        assert store.forget("ann").behaviors == 7
    finally:
        single.command("CONFIG", "SET", "maxmemory", "0")
    assert store.append(run("ann", 14)) == Appended(14, 0, 2)
    store.close()


def test_a_replica_is_refused(single: RedisServer, tmp_path: Path) -> None:
    replica = RedisServer(tmp_path, ("--replicaof", "127.0.0.1", str(single.port)))
    replica.start()
    try:
        with pytest.raises(StoreError, match="the server is a replica: name its master"):
            open_store(f"redis://{replica.address}/0?name=replica")
    finally:
        replica.kill()


def test_too_few_replicas_are_told(single: RedisServer) -> None:
    open_store(f"redis://{single.address}/0?name=lonely").close()
    url = f"redis://{single.address}/0?name=lonely&replicas=1&wait_milliseconds=20"
    with pytest.raises(
        StoreError, match=r"kept on the master, not yet replicated: 0 of 1.*repeat the call, it is safe"
    ):
        open_store(url)


def test_functions_that_were_lost_are_loaded_again(single: RedisServer) -> None:
    store = open_store(f"redis://{single.address}/0?name=functions")
    store.append(run("ann", 1))
    assert f"append_{DIGEST}" in single.command("FUNCTION", "LIST")
    single.command("FUNCTION", "FLUSH")
    assert store.append(run("ann", 2)) == Appended(1, 1, 0)
    store.close()


def test_a_store_of_another_format_is_refused(single: RedisServer) -> None:
    open_store(f"redis://{single.address}/0?name=newer").close()
    single.command("HSET", "newer:{catalogue}:settings", "format", "2")
    with pytest.raises(ConfigurationError, match=r"format 2.*upgrade liber-runtime"):
        open_store(f"redis://{single.address}/0?name=newer")


def test_a_fingerprint_is_one_line(single: RedisServer) -> None:
    store = open_store(f"redis://{single.address}/0?name=lines")
    with pytest.raises(InvalidInputError, match="line break"):
        store.encode_by({"a\nb"})
    store.close()


def use_after_fork(store: MemoryStore, told: multiprocessing.Queue[str]) -> None:
    try:
        store.append(run("ann", 1))
    except StoreError as error:
        told.put(str(error))
    else:
        told.put("appended")


def test_a_store_belongs_to_the_process_that_opened_it(single: RedisServer) -> None:
    store = open_store(f"redis://{single.address}/0?name=fork")
    told: multiprocessing.Queue[str] = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=use_after_fork, args=(store, told))
    child.start()
    assert f"was opened by process {os.getpid()}; open it in each process" in told.get(timeout=30)
    child.join()
    told.close()
    store.close()


# many users, long histories, two writers


@pytest.mark.parametrize("place", ["single", "cluster"])
def test_any_users_in_one_call(request: pytest.FixtureRequest, place: str) -> None:
    """On a cluster their keys lie in different slots: no call may name two of them."""
    address = request.getfixturevalue(place).address
    store = open_store(f"redis://{address}/0?name=many", Count(3))
    users = [*(f"user-{n}" for n in range(1_000)), "{brace}", "}{", "{}", "{0}", "a:b", "queue:summary:", "a b\u2028c"]
    store.append([each for user in users for each in run(user, 4)])
    while tasks := store.claim(["summary", "shift", "representation"], 500, 60.0):
        assert store.commit([made(task) for task in tasks]).discarded == 0
    memories = store.read(users, 10, 10, "encoder-1")
    assert all(memory is not None and len(memory.history) == 4 for memory in memories)
    assert all(memory is not None and memory.representations.shape == (1, 4) for memory in memories)
    assert set(store.users()) == set(users)
    assert sum(store.forget(user).behaviors for user in users) == 4 * len(users)
    statistics = store.statistics()
    assert (statistics.users, statistics.behaviors, statistics.partitions, statistics.vectors) == (0, 0, 0, {})
    for server in [request.getfixturevalue(place)] if place == "single" else request.getfixturevalue(place).servers:
        assert server.command("KEYS", "many:*user*") == ""
    store.close()


def test_a_history_over_many_partitions(single: RedisServer) -> None:
    store = open_store(f"redis://{single.address}/0?name=long", Count(2))
    store.append(run("ann", 5_001))
    (memory,) = store.read(["ann"], 25, 5, "encoder-1")
    assert memory is not None
    assert [item for item, _ in memory.history] == [f"item-{n}" for n in range(4_976, 5_001)]
    assert events_of(store, "ann") == [f"event-{n}" for n in range(5_001)]
    assert store.forget("ann", "event-2500").behaviors == 1
    assert store.forget("ann", "event-2500").behaviors == 0
    assert events_of(store, "ann") == [f"event-{n}" for n in range(5_001) if n != 2_500]
    store.close()


def test_an_erased_behavior_of_the_last_partition_is_out_of_the_history(single: RedisServer) -> None:
    store = open_store(f"redis://{single.address}/0?name=last", Count(3))
    store.append(run("ann", 10))
    store.forget("ann", "event-7")
    (memory,) = store.read(["ann"], 4, 5, "encoder-1")
    assert memory is not None
    assert [item for item, _ in memory.history] == ["item-5", "item-6", "item-8", "item-9"]
    store.close()


def test_a_shift_waits_while_the_summary_before_it_is_rewritten(single: RedisServer) -> None:
    store = open_store(f"redis://{single.address}/0?name=rewritten", Count(3))
    store.append(run("ann", 6))
    for task, version in zip(store.claim(["summary"], 2, 60.0), ("v1", "v2"), strict=True):
        store.commit([Result(task, Text("summary", version, "test", version, None, None, 0.0, 0.0))])
    assert store.statistics().pending["shift"] == 1
    assert store.rewrite(prompt_version="v1") == 1
    (task,) = store.claim(["summary", "shift", "representation"], 9, 60.0)
    assert (task.number, task.step) == (1, "summary")
    store.commit([made(task)])
    (shift,) = store.claim(["shift"], 9, 60.0)
    assert (shift.previous, shift.summary) == ("summary of 1", "v2")
    store.close()


def test_an_append_whose_reply_is_lost_counts_once_and_is_counted(single: RedisServer) -> None:
    store = RedisStore(f"redis://{single.address}/0?name=lost", Count(5))
    store.append(run("ann", 2))
    servers, lost = store._servers, []
    receive = servers._receive

    def receive_nothing(node: Node, indices: Sequence[int], connection: Connection, *rest: Any) -> Any:
        if not lost:
            lost.append(connection.read_response())  # carried out, and the way back cut off
            connection.disconnect()
        return receive(node, indices, connection, *rest)

    servers._receive = receive_nothing  # type: ignore[method-assign]
    assert store.append(run("ann", 7, 2)) == Appended(7, 0, 1)
    assert lost == [1]
    assert events_of(store, "ann") == [f"event-{n}" for n in range(9)]
    assert store.statistics().behaviors == 9
    store.close()


def append_in_process(url: str, first: int, count: int) -> None:
    store = open_store(url)
    for number in range(first, first + count, 2):
        store.append(run("ann", 3, number))
    store.close()


def test_two_processes_append_to_one_user(cluster: RedisCluster) -> None:
    url = f"redis://{cluster.address}/0?name=two"
    store = open_store(url, Count(7))
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_in_process, args=(url, first, 60)) for first in (0, 30)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    kept = events_of(store, "ann")
    assert sorted(kept) == sorted(f"event-{n}" for n in range(91))
    statistics = store.statistics()
    assert (statistics.behaviors, statistics.partitions, statistics.pending["summary"]) == (91, 13, 13)
    store.close()


def test_two_processes_make_one_store(single: RedisServer) -> None:
    errors: list[Exception] = []

    def open_with(size: int) -> None:
        try:
            open_store(f"redis://{single.address}/0?name=race", Count(size)).close()
        except ConfigurationError as error:
            errors.append(error)

    threads = [threading.Thread(target=open_with, args=(size,)) for size in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert "cuts partitions by count" in str(errors[0])


# servers that die


def test_a_server_that_is_gone_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, ("--appendfsync", "always"))
    server.start()
    try:
        store = open_store(f"redis://{server.address}/0?timeout_seconds=0.3", Count(5))
        store.append(run("ann", 7))
        server.kill()
        with pytest.raises(StoreError, match=r"start the server|check the server"):
            store.append(run("ann", 7, 7))
        server.start()
        assert store.append(run("ann", 14)) == Appended(7, 7, 1)
        assert events_of(store, "ann") == [f"event-{n}" for n in range(14)]
        store.close()
    finally:
        server.kill()


def test_a_server_that_is_killed_in_the_middle_of_calls_is_waited_for(tmp_path: Path) -> None:
    # With `everysec` Redis may put off a write while the disk is slow to sync, and answer all the same.
    server = RedisServer(tmp_path, ("--appendfsync", "always"))
    server.start()
    store = open_store(f"redis://{server.address}/0", Count(5))
    stop = threading.Event()

    def kill_now_and_then() -> None:
        while not stop.wait(random.uniform(0.02, 0.1)):
            server.kill()
            server.start()

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        for number in range(0, 3_000, 4):
            # What a try that was cut off had kept is not counted as known already.
            assert store.append(run("ann", 4, number)).behaviors == 4
    finally:
        stop.set()
        killer.join()
    assert events_of(store, "ann") == [f"event-{n}" for n in range(3_000)]
    assert store.statistics().partitions == 600
    store.close()
    server.kill()


def test_no_acknowledged_behavior_is_lost_when_masters_are_killed(cluster: RedisCluster) -> None:
    store = open_store(f"redis://{cluster.address}/0?name=failover", Count(5))
    users = [f"user-{n}" for n in range(24)]
    acknowledged = dict.fromkeys(users, 0)
    failures: list[BaseException] = []
    stop = threading.Event()

    def append_on() -> None:
        try:
            while not stop.is_set():
                for start in range(0, len(users), 6):
                    part = users[start : start + 6]
                    try:
                        store.append([each for user in part for each in run(user, 3, acknowledged[user])])
                    except StoreError as error:
                        if "not yet replicated" not in str(error):
                            raise
                        continue
                    for user in part:
                        acknowledged[user] += 3
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=append_on)
    writer.start()
    for kill in range(3):
        wanted, patience = min(acknowledged.values()) + 9, time.monotonic() + 30
        while min(acknowledged.values()) < wanted and not failures and time.monotonic() < patience:
            time.sleep(0.01)
        master = cluster.masters()[kill]
        master.kill()
        cluster.wait_for_failover(master)
        master.start()
        cluster.wait_until_whole()
    stop.set()
    writer.join()
    assert failures == []
    assert min(acknowledged.values()) >= 27
    for user in users:
        kept = events_of(store, user)
        assert kept[: acknowledged[user]] == [f"event-{n}" for n in range(acknowledged[user])]
        assert len(kept) == len(set(kept))
    statistics = store.statistics()
    assert statistics.behaviors == sum(len(events_of(store, user)) for user in users)
    assert statistics.partitions == statistics.pending["summary"]
    store.close()


def test_a_slot_on_its_way_to_another_server_is_followed(cluster: RedisCluster) -> None:
    store = RedisStore(f"redis://{cluster.address}/0?name=moving&buckets=1", Count(5))
    store.append(run("ann", 12))
    slot = store._keys.slots[0]
    source, target = (
        _owner(cluster, slot),
        next(each for each in cluster.masters() if each is not _owner(cluster, slot)),
    )
    ids = {server.port: server.command("CLUSTER", "MYID") for server in (source, target)}
    target.command("CLUSTER", "SETSLOT", str(slot), "IMPORTING", ids[source.port])
    source.command("CLUSTER", "SETSLOT", str(slot), "MIGRATING", ids[target.port])
    appended: list[Appended] = []
    writer = threading.Thread(target=lambda: appended.append(store.append(run("ann", 3, 12))))
    try:
        keys = source.command("CLUSTER", "GETKEYSINSLOT", str(slot), "1000").split("\n")
        for number, key in enumerate(keys):
            if number == len(keys) // 2:
                writer.start()  # sees half of the keys here and half there, and must wait
                writer.join(0.2)
            source.command("MIGRATE", "127.0.0.1", str(target.port), key, "0", "5000")
    finally:
        for server in (target, source, *(each for each in cluster.masters() if each not in (source, target))):
            server.command("CLUSTER", "SETSLOT", str(slot), "NODE", ids[target.port])
    writer.join()
    assert appended == [Appended(3, 0, 1)]
    assert events_of(store, "ann") == [f"event-{n}" for n in range(15)]
    assert _owner(cluster, slot) is target
    store.close()


def _owner(cluster: RedisCluster, slot: int) -> RedisServer:
    lines = cluster.servers[0].command("CLUSTER", "NODES").splitlines()
    for line in lines:
        words = line.split()
        for first, _, last in (word.partition("-") for word in words[8:] if not word.startswith("[")):
            if int(first) <= slot <= int(last or first):
                port = int(words[1].split("@")[0].rpartition(":")[2])
                return next(server for server in cluster.servers if server.port == port)
    raise AssertionError(f"nobody has slot {slot}")


def test_a_server_that_hangs_is_left_for_its_replica(cluster: RedisCluster) -> None:
    store = open_store(f"redis://{cluster.address}/0?name=hanging&timeout_seconds=6&wait_milliseconds=1000", Count(5))
    users = [f"user-{n}" for n in range(30)]
    store.append([each for user in users for each in run(user, 5)])
    master = cluster.masters()[0]
    master.signal(signal.SIGSTOP)
    try:
        cluster.wait_for_failover(master)
        memories = store.read(users, 5, 5, "")
        assert all(memory is not None and len(memory.history) == 5 for memory in memories)
    finally:
        master.signal(signal.SIGCONT)
    cluster.wait_until_whole()
    assert store.append([each for user in users for each in run(user, 6)]) == Appended(30, 150, 0)
    store.close()
