"""What is SQLite's own; the promises common to all engines are in ``tests/contract``."""

from __future__ import annotations

import importlib.resources
import multiprocessing
import os
import resource
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from liber_runtime.behavior import Behavior, Item, Text
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, StoreError
from liber_runtime.memory import STEPS, Appended, Forgotten, Representation, Result, open_store
from liber_runtime.memory.packing import pack
from liber_runtime.memory.sqlite import SQLiteStore
from liber_runtime.memory.sqlite import file as engine
from liber_runtime.partition import Count


def run(user: str, count: int, start: int = 0) -> list[Behavior]:
    return [Behavior(user, f"item-{n % 50}", 4.0, 1e9 + n, f"{user}-event-{n}") for n in range(start, start + count)]


def work_all(store: SQLiteStore) -> None:
    while tasks := store.claim(STEPS, 500, 60.0):
        store.commit(
            [
                Result(task, Representation(np.ones(8, np.float32), "encoder"))
                if task.step == "representation"
                else Result(task, Text(task.step, f"{task.user_id} likes " * 40, "test", "v1", None, None, 0.1, 1.0))
                for task in tasks
            ]
        )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(str(path), Count(20))
    yield store
    store.close()


# -- opening ---------------------------------------------------------------------------------------------------------


def test_directories_are_made(tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path}/a/b/memory.db").close()
    assert (tmp_path / "a/b/memory.db").is_file()


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("sqlite:///memory.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.users() == []
    store.close()
    assert not list(Path.cwd().iterdir())


def test_the_file_is_durable_and_overwrites_what_it_deletes(store: SQLiteStore) -> None:
    settings = {
        name: store._file._writer.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
    }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "foreign_keys": 1}


def test_a_newer_version_is_refused_untouched(path: Path) -> None:
    SQLiteStore(str(path)).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(
        StoreError, match=r"schema version 99, this liber-runtime knows up to \d+; upgrade liber-runtime"
    ):
        SQLiteStore(str(path))
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_untouched(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE users (name TEXT)")
    db.close()
    with pytest.raises(StoreError, match="another program's database; choose another path"):
        SQLiteStore(str(path))
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("users",)]
    db.close()


def test_a_file_that_is_no_database_is_refused_untouched(path: Path) -> None:
    path.write_text("user,item,timestamp\n" * 1000)
    with pytest.raises(StoreError, match="file is not a database; it is some other file"):
        SQLiteStore(str(path))
    assert path.read_text() == "user,item,timestamp\n" * 1000


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder,
        lambda folder: Path((folder / "file").write_text("") or folder / "file") / "memory.db",
        lambda folder: Path("/proc/memory.db"),
        lambda folder: Path("/proc/nothing/memory.db"),
    ],
    ids=["a directory", "inside a file", "in /proc", "a directory in /proc"],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    place = make(tmp_path)
    with pytest.raises(StoreError, match=r"check that the path is a file in a directory that can be written") as error:
        SQLiteStore(str(place))
    assert str(place) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_may_only_be_read_is_named(store: SQLiteStore) -> None:
    store._file._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="attempt to write a readonly database; make the file and its directory"):
        store.append(run("ann", 1))
    assert store.users() == []


def test_a_damaged_file_is_named(path: Path) -> None:
    store = SQLiteStore(str(path), Count(20))
    store.append(run("ann", 2000))
    store.close()
    content = bytearray(path.read_bytes())
    for page in range(4096, len(content), 4096):
        content[page : page + 16] = b"\xff" * 16
    path.write_bytes(content)
    with pytest.raises(StoreError, match="malformed; the file is damaged; restore a backup"):
        SQLiteStore(str(path))


def test_a_locked_file_is_named(store: SQLiteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.05)
    other = SQLiteStore(str(path))
    writing = sqlite3.connect(path, isolation_level=None)
    writing.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="database is locked; another process writes without pause"):
        other.append(run("ann", 1))
    writing.execute("ROLLBACK")
    writing.close()
    assert other.append(run("ann", 1)) == Appended(1, 0, 0)
    other.close()


def open_once(path: str, gate: threading.Barrier) -> None:
    gate.wait()
    store = SQLiteStore(path)
    store.append(run(str(os.getpid()), 1))
    store.close()


def test_processes_may_make_the_file_at_the_same_moment(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(4)
    processes = [context.Process(target=open_once, args=(str(path), gate)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    store = SQLiteStore(str(path))
    assert len(store.users()) == 4
    store.close()


def test_a_failed_migration_changes_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package/migrations"
    package.mkdir(parents=True)
    (package / "0001_good.sql").write_text("CREATE TABLE one (a); -- with ; inside\nCREATE TABLE two (a);\n")
    (package / "0002_bad.sql").write_text("CREATE TABLE three (a);\nCREATE TABLE one (a);\n")
    monkeypatch.setattr("importlib.resources.files", lambda name: package.parent)
    with pytest.raises(StoreError, match="table one already exists"):
        SQLiteStore(str(path))
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        assert db.execute("PRAGMA user_version").fetchone() == (0,)
    db.close()


def test_a_store_of_the_first_schema_is_brought_up_to_date(path: Path) -> None:
    """What version 1 kept, written by hand as it wrote it, is there in the newest version."""
    script = importlib.resources.files("liber_runtime.memory.sqlite") / "migrations/0001_initial.sql"
    with sqlite3.connect(path) as db:
        db.executescript(script.read_text())
        db.execute("PRAGMA user_version = 1")
        db.execute("PRAGMA application_id = 0x4C494252")
        db.execute("INSERT INTO settings VALUES ('condition', 'count(5)')")
        behaviors = run("ann", 7)
        db.execute("INSERT INTO users VALUES (1, 'ann', '{\"age\": 31}', 1, ?, ?, ?, ?)", pack(behaviors[5:]))
        db.executemany("INSERT INTO events VALUES (1, ?)", [(one.event_id,) for one in behaviors])
        db.execute("INSERT INTO partitions VALUES (1, 1, ?, ?, ?, ?)", pack(behaviors[:5]))
        db.execute("INSERT INTO texts VALUES (1, 1, 'summary', 'text', 'w', 'v', NULL, NULL, 0.1, 5.0)")
        db.execute("INSERT INTO representations VALUES (1, 1, ?, 'old')", (np.ones(4, "<f4").tobytes(),))
        db.execute("INSERT INTO steps (user, number, step, due) VALUES (1, 1, 'representation', 0)")
        db.execute("INSERT INTO steps (user, number, step, due) VALUES (1, 1, 'summary', NULL)")
        db.execute("INSERT INTO items VALUES ('film', 'Film', '{}')")
        db.execute("UPDATE counters SET value = 1 WHERE name IN ('users', 'partitions')")
        db.execute("UPDATE counters SET value = 7 WHERE name = 'behaviors'")
    db.close()
    store = SQLiteStore(str(path))
    timeline = store.timeline("ann")
    assert timeline is not None
    assert (*timeline.partitions[0].behaviors, *timeline.cache) == tuple(behaviors)
    (memory,) = store.read(["ann"], 9, 9, "old")
    assert memory is not None
    assert memory.representations.tolist() == [[1.0] * 4]
    assert store.append(behaviors) == Appended(0, 7, 0)
    statistics = store.statistics()
    assert (statistics.vectors, statistics.items) == ({"old": 1}, 1)
    assert (statistics.pending, statistics.dead) == (
        {"summary": 0, "shift": 0, "representation": 1},
        {"summary": 1, "shift": 0, "representation": 0},
    )
    assert statistics.age_seconds["representation"] > 1e9
    store.describe(items=[Item("film", "Film"), Item("other", "Other")])
    assert store.statistics().items == 2
    assert [task.step for task in store.claim(STEPS, 9, 60.0)] == ["representation"]
    assert store.forget("ann") == Forgotten(7, 1)
    assert store.statistics().users == 0
    with store._file.read() as db:
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    store.close()


def test_statistics_walk_through_nothing_that_grows(store: SQLiteStore) -> None:
    asked: list[str] = []
    with store._file.read() as db:
        db.set_trace_callback(asked.append)
    store.statistics()
    with store._file.read() as db:
        db.set_trace_callback(None)
        queries = [query for query in asked if query.startswith("SELECT")]
        plans = {step[3] for query in queries for step in db.execute(f"EXPLAIN QUERY PLAN {query}")}
    walks = {plan for plan in plans if plan.startswith("SCAN")}
    assert walks == {"SCAN counters", "SCAN encodings"}
    assert any("steps_by_since" in plan for plan in plans - walks)


# -- group commit ----------------------------------------------------------------------------------------------------


def test_threads_that_wait_share_a_transaction(store: SQLiteStore) -> None:
    """While one write holds the turn others line up; they are then committed together, each all or nothing."""
    inside, go_on = threading.Event(), threading.Event()

    def hold(db: sqlite3.Connection) -> None:
        inside.set()
        assert go_on.wait(20)

    transactions: list[str] = []
    first = threading.Thread(target=store._file.write, args=(hold,))
    first.start()
    assert inside.wait(20)
    outcomes: dict[int, object] = {}

    def append(number: int) -> None:
        def work(db: sqlite3.Connection) -> int:
            db.execute("INSERT INTO marks VALUES (?, ?)", (f"log {number}", number))
            if number == 3:
                raise InvalidInputError("no")
            return number

        try:
            outcomes[number] = store._file.write(work)
        except InvalidInputError as error:
            outcomes[number] = str(error)

    others = [threading.Thread(target=append, args=(number,)) for number in range(8)]
    for thread in others:
        thread.start()
    while len(store._file._waiting) < 8:
        time.sleep(0.001)
    store._file._writer.set_trace_callback(transactions.append)
    go_on.set()
    for thread in [first, *others]:
        thread.join()
    store._file._writer.set_trace_callback(None)
    assert outcomes == {**{n: n for n in range(8)}, 3: "no"}
    assert [store.position(f"log {n}") for n in range(8)] == [0, 1, 2, 0, 4, 5, 6, 7]
    assert [statement for statement in transactions if statement in ("BEGIN IMMEDIATE", "COMMIT")] == [
        "COMMIT",
        "BEGIN IMMEDIATE",
        "COMMIT",
    ]


def test_a_million_behaviors_in_one_call(store: SQLiteStore) -> None:
    behaviors = [Behavior(f"user-{n % 1000}", "item", 4.0, 1e9 + n, str(n)) for n in range(1_000_000)]
    assert store.append(behaviors) == Appended(1_000_000, 0, 50_000)


# -- a full disk -----------------------------------------------------------------------------------------------------


def append_with_little_room(path: str, answers: multiprocessing.Queue[object]) -> None:
    store = SQLiteStore(path, Count(20))
    store.append(run("ann", 50))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    try:
        store.append(run("bo", 50_000))
    except StoreError as error:
        answers.put(str(error))
    else:
        answers.put("no error")
    answers.put(store.users())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answers.put(store.append(run("bo", 50_000)))
    store.close()


def test_a_file_that_cannot_grow_keeps_all_or_nothing(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[object] = context.Queue()
    process = context.Process(target=append_with_little_room, args=(str(path), answers))
    process.start()
    message, users, again = (answers.get(timeout=60) for _ in range(3))
    process.join(60)
    answers.close()
    assert process.exitcode == 0
    assert isinstance(message, str)
    assert message.startswith(f"store {path}: ")
    assert users == ["ann"]
    assert again == Appended(50_000, 0, 2500)
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_a_full_database_says_so(store: SQLiteStore) -> None:
    (pages,) = store._file._writer.execute("PRAGMA page_count").fetchone()
    store._file._writer.execute(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(StoreError, match="database or disk is full; make room on the disk and repeat the call"):
        store.append(run("ann", 5000))
    assert store.users() == []
    assert store.statistics().behaviors == 0


# -- erasing ---------------------------------------------------------------------------------------------------------


def test_nothing_of_a_forgotten_user_is_in_the_files(store: SQLiteStore, path: Path) -> None:
    users = [f"person{n:03}" for n in range(60)]
    for start in range(0, 120, 30):
        store.append([b for user in users for b in run(user, 30, start)])
        work_all(store)
    gone = users[::2]
    for user in gone:
        store.forget(user)
    kept = [store.timeline(user) for user in users[1::2]]
    store.close()
    held = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert all(user.encode() in held for user in users[1::2])
    assert [user for user in gone if user.encode() in held] == []
    store = SQLiteStore(str(path))
    assert repr([store.timeline(user) for user in users[1::2]]) == repr(kept)
    assert store.statistics().users == 30
    store.close()


def test_forget_does_not_wait_for_a_reader_for_ever(
    store: SQLiteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append(run("ann", 5))
    with store._file.read() as reader:
        assert reader.execute("SELECT count(*) FROM users").fetchone() == (1,)
        assert store.forget("ann").behaviors == 5
        assert reader.execute("SELECT count(*) FROM users").fetchone() == (1,)
    store.close()
    assert b"ann-event" not in b"".join(file.read_bytes() for file in path.parent.iterdir())


# -- the copies that scoring reads -------------------------------------------------------------------------------------


def encode_all(store: SQLiteStore) -> None:
    """Every partition of its number: vectors that tell which they are."""
    while tasks := store.claim(STEPS, 500, 60.0, "encoder"):
        store.commit(
            [
                Result(task, Representation(np.full(4, task.number, np.float32), "encoder"))
                if task.step == "representation"
                else Result(task, Text(task.step, "text", "test", "v1", None, None, 0.1, 1.0))
                for task in tasks
            ]
        )


def assert_scoring_reads_what_is_held(store: SQLiteStore, users: Sequence[str]) -> None:
    for history, partitions in ((0, 0), (1, 1), (100, 39), (256, 40), (257, 41), (2_000, 500)):
        for user, memory in zip(users, store.read(users, history, partitions, "encoder"), strict=True):
            timeline = store.timeline(user)
            assert timeline is not None
            assert memory is not None
            behaviors = [b for record in timeline.partitions for b in record.behaviors] + list(timeline.cache)
            expected = [(b.item_id, b.feedback) for b in behaviors]
            assert memory.history == expected[max(0, len(expected) - history) :]
            numbers = [record.number for record in timeline.partitions if record.representations]
            assert memory.representations[:, :1].ravel().tolist() == numbers[max(0, len(numbers) - partitions) :]


def test_scoring_reads_what_is_held_whatever_happened_to_it(path: Path) -> None:
    """Partitions cut one by one and at once, vectors still to come, behaviors and vectors that went away again."""
    store = SQLiteStore(str(path), Count(7))
    store.encode_by({"encoder"})
    users = ["ann", "bo"]
    store.append([*run("ann", 600), *run("bo", 3)])
    assert_scoring_reads_what_is_held(store, users)
    encode_all(store)
    for start in range(600, 640, 3):
        store.append(run("ann", 3, start))
        assert_scoring_reads_what_is_held(store, users)
    encode_all(store)
    assert_scoring_reads_what_is_held(store, users)
    for number in (2, 300, 500, 639):
        store.forget("ann", f"ann-event-{number}")
        assert_scoring_reads_what_is_held(store, users)
    store.append([*run("ann", 50, 700), *run("bo", 400, 3)])
    assert_scoring_reads_what_is_held(store, users)
    encode_all(store)
    assert_scoring_reads_what_is_held(store, users)
    store.encode_by(())
    store.encode_by({"other"})
    assert [len(memory.representations) for memory in store.read(users, 1, 40, "encoder") if memory] == [0, 0]
    with store._file.read() as db:
        assert db.execute("SELECT count(*) FROM newest_behaviors").fetchone() == (2,)
        assert db.execute("SELECT count(*) FROM newest_vectors").fetchone() == (0,)
    store.forget("ann")
    with store._file.read() as db:
        assert db.execute("SELECT count(*) FROM newest_behaviors").fetchone() == (1,)
    store.close()


# -- cost ------------------------------------------------------------------------------------------------------------


def instructions(connection: sqlite3.Connection, call: Callable[[], object]) -> int:
    """How many steps SQLite's virtual machine takes in a call: a cost without a clock."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    connection.set_progress_handler(tick, 1)
    call()
    connection.set_progress_handler(None, 1)
    return count


def test_costs_do_not_grow_with_a_users_history(store: SQLiteStore) -> None:
    store.append([*run("new", 105), *run("old", 20_005)])
    work_all(store)
    store.read(["new"], 20, 5, "encoder")
    (reader,) = store._file._idle_readers
    read = [instructions(reader, lambda user=user: store.read([user], 50, 5, "encoder")) for user in ("new", "old")]
    assert read[0] == read[1]
    append = [
        instructions(store._file._writer, lambda user=user, start=start: store.append(run(user, 1, start)))
        for user, start in (("new", 105), ("old", 20_005))
    ]
    assert append[0] == append[1]


def test_a_claim_does_not_look_at_the_steps_it_leaves(store: SQLiteStore) -> None:
    store.append(run("ann", 20 * 50))
    few = instructions(store._file._writer, lambda: store.claim(["summary"], 10, 60.0))
    store.append(run("bo", 20 * 5000))
    many = instructions(store._file._writer, lambda: store.claim(["summary"], 10, 60.0))
    assert many < 1.2 * few


# -- threads and processes -------------------------------------------------------------------------------------------


def test_a_forked_process_must_open_its_own(store: SQLiteStore) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.append(run("ann", 1))
        except StoreError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert f"was opened by process {os.getpid()}" in os.read(reading, 1000).decode()
    os.close(reading)
    assert store.append(run("ann", 1)) == Appended(1, 0, 0)


def test_close_lets_a_read_in_another_thread_end(store: SQLiteStore) -> None:
    store.append(run("ann", 5))
    inside, closed = threading.Event(), threading.Event()
    found: list[object] = []

    def read() -> None:
        with store._file.read() as db:
            inside.set()
            closed.wait(20)
            found.append(db.execute("SELECT count(*) FROM events").fetchone())

    thread = threading.Thread(target=read)
    thread.start()
    inside.wait(20)
    store.close()
    closed.set()
    thread.join()
    assert found == [(5,)]
    with pytest.raises(StoreError, match="closed"):
        store.read(["ann"], 1, 1, "encoder")


def test_readers_are_reused(store: SQLiteStore) -> None:
    threads = [threading.Thread(target=lambda: [store.users() for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(store._file._idle_readers) <= 4


# -- shards ----------------------------------------------------------------------------------------------------------


def test_users_are_shared_out_over_the_files(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/memory.db?shards=4"
    store = open_store(url, Count(5))
    store.append([b for n in range(100) for b in run(f"user-{n}", 3)])
    store.close()
    files = sorted(tmp_path.glob("memory.db.*of4"))
    assert [file.name for file in files] == [f"memory.db.{n}of4" for n in (1, 2, 3, 4)]
    opened = [SQLiteStore(str(file)) for file in files]
    held = [len(one.users()) for one in opened]
    for one in opened:
        one.close()
    assert sum(held) == 100
    assert min(held) > 10
    again = open_store(url, create=False)
    assert again.statistics().behaviors == 300
    again.close()


def test_another_number_of_shards_is_refused(tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path}/memory.db?shards=4").close()
    with pytest.raises(ConfigurationError, match=r"was made with 4 shards and not 3; open it with \?shards=4"):
        open_store(f"sqlite:///{tmp_path}/memory.db?shards=3")
    for wrong in ("shards=0", "shards=many", "shard=2", "shards=65"):
        with pytest.raises(ConfigurationError, match=r"is not understood; write \?shards=N"):
            open_store(f"sqlite:///{tmp_path}/other.db?{wrong}")
    with pytest.raises(ConfigurationError, match="there is no store"):
        open_store(f"sqlite:///{tmp_path}/missing.db?shards=2", create=False)


def test_users_come_in_the_order_they_first_came(store: SQLiteStore) -> None:
    store.append(run("zoe", 1))
    store.describe(profiles={"mia": {"age": 1}})
    store.append([*run("ann", 1), *run("zoe", 1, 1)])
    assert store.users() == ["zoe", "mia", "ann"]


# -- what one file promises beyond the contract -----------------------------------------------------------------------


def test_the_oldest_steps_of_all_users_come_first(path: Path) -> None:
    now = [1_000.0]
    store = SQLiteStore(str(path), Count(5), clock=lambda: now[0])
    for user in ("zoe", "ann", "mia"):
        store.append(run(user, 5))
        now[0] += 1.0
    (first,) = store.claim(["summary"], 1, 60.0)
    store.commit([Result(first, Text("summary", "text", "test", "v1", None, None, 0.1, 1.0))])
    now[0] += 1.0
    store.append(run("late", 5))
    claimed = [(task.user_id, task.step) for task in store.claim(STEPS, 9, 60.0)]
    assert claimed == [("ann", "summary"), ("mia", "summary"), ("zoe", "representation"), ("late", "summary")]
    store.close()


def test_a_call_is_all_or_nothing_over_its_users(path: Path) -> None:
    class Broken:
        def boundary(self, cache: Sequence[Behavior], previous: object) -> int:
            return 99 if cache[-1].user_id == "bo" else 0

        def __str__(self) -> str:
            return "broken"

    store = SQLiteStore(str(path), Broken())
    with pytest.raises(ConfigurationError, match="broken cut 99"):
        store.append([*run("ann", 1), *run("bo", 1)])
    assert store.users() == []
    assert store.statistics().behaviors == 0
    store.close()
