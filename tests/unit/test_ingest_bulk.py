"""Backfills: the same store as streaming gives, whatever kills them."""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_harness import HEADER, ended, held, lines, start, streamed

from liber_runtime.behavior import Behavior
from liber_runtime.behavior_log import read_behaviors
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.ingest import append_batches
from liber_runtime.ingest.bulk import Backfill, BulkLimits
from liber_runtime.ingest.log import LogFile
from liber_runtime.memory import Appended, MemoryStore, open_store
from liber_runtime.partition import parse_condition

SMALL = BulkLimits(part_bytes=300, parts=4, chunk_bytes=200, buffered=7, flushes=2, batch=10)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    memory = open_store(f"sqlite:///{tmp_path / 'memory.db'}")
    yield memory
    memory.close()


def backfill(store: MemoryStore, *paths: Path, limits: BulkLimits = SMALL, url: str = "a store") -> Appended:
    return Backfill(store, url, paths, paths[0].parent / "work", limits).run()


def write(path: Path, text: str) -> Path:
    path.write_text(HEADER + text)
    return path


events = st.tuples(
    st.integers(0, 4),
    st.integers(0, 3),
    st.one_of(st.integers(0, 400).map(float), st.floats(-1e9, 1.7e9)),
    st.sampled_from([1, 2.5, -3]),
    st.sampled_from(["", "", "e1", "e2", "e3"]),
)
conditions = st.one_of(
    st.integers(1, 6).map(lambda size: f"count({size})"),
    st.integers(1, 200).map(lambda seconds: f"time_gap({seconds})"),
    st.integers(1, 200).map(lambda seconds: f"any_of(count(4), time_window({seconds}))"),
)
bounds = st.builds(
    BulkLimits,
    part_bytes=st.integers(1, 3000),
    parts=st.integers(1, 4),
    chunk_bytes=st.integers(1, 1000),
    buffered=st.integers(1, 20),
    flushes=st.integers(1, 3),
    batch=st.integers(1, 20),
)


@given(st.lists(st.lists(events, max_size=60), min_size=1, max_size=3), conditions, bounds, st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_a_backfill_leaves_what_streaming_leaves(
    tmp_path_factory: pytest.TempPathFactory,
    logs: list[list[tuple[int, int, float, float, str]]],
    condition: str,
    limits: BulkLimits,
    batch: int,
) -> None:
    directory = tmp_path_factory.mktemp("backfill")
    paths = []
    for number, log in enumerate(logs):
        rows = [(f"ü{user}", f"i{item}", when, feedback, event) for user, item, when, feedback, event in log]
        text = "user,item,timestamp,feedback,event_id\nfirst,i,0,1,\n"
        paths.append(directory / f"log{number}.csv")
        paths[-1].write_text(text + "".join(",".join(map(str, row)) + "\n" for row in rows))
    stores = [open_store(f"sqlite:///{directory / name}", parse_condition(condition)) for name in ("a.db", "b.db")]
    behaviors = [behavior for path in paths for behavior in read_behaviors(path)]
    for at in range(0, len(behaviors), batch):
        stores[0].append(behaviors[at : at + batch])
    total = Backfill(stores[1], "b", paths, directory / "work", limits).run()
    assert held(stores[0]) == held(stores[1])
    # Ages are of the moment that they are asked in.
    counts = [replace(memory.statistics(), age_seconds={}) for memory in stores]
    assert counts[0] == counts[1]
    assert total == Appended(counts[0].behaviors, len(behaviors) - counts[0].behaviors, counts[0].partitions)
    assert not (directory / "work").exists()
    for memory in stores:
        memory.close()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_log_that_was_backfilled_is_not_read_again(suffix: str, store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / f"log{suffix}"
    frame = polars.read_csv(write(tmp_path / "source.csv", lines(60)))
    {".csv": frame.write_csv, ".jsonl": frame.write_ndjson, ".parquet": frame.write_parquet}[suffix](path)
    assert backfill(store, path) == Appended(60, 0, 3)
    assert backfill(store, path) == Appended(0, 0, 0)
    assert append_batches(store, LogFile(path, store).batches()) == Appended(0, 0, 0)


def test_backfills_and_runs_go_on_where_the_other_ended(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liber_runtime.ingest.log.BLOCK_BYTES", 200)
    path = tmp_path / "log.csv"
    for size, bulk in [(20, False), (50, True), (90, False), (91, True), (160, True), (200, False)]:
        write(path, lines(size))
        kept = store.statistics().behaviors
        run = backfill(store, path) if bulk else append_batches(store, LogFile(path, store).batches())
        assert (run.behaviors, run.duplicates) == (size - kept, 0)
    assert held(store) == streamed(read_behaviors(path), tmp_path / "other.db")


def test_each_user_is_written_once(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "log.csv", lines(300, users=30))
    seen: list[set[str]] = []
    append = type(store).append

    def watch(self: MemoryStore, behaviors: list[Behavior], mark: object = None) -> Appended:
        seen.append({behavior.user_id for behavior in behaviors})
        return append(self, behaviors, mark)

    monkeypatch.setattr(type(store), "append", watch)
    backfill(store, path, limits=BulkLimits(part_bytes=2000, batch=10))
    assert sum(map(len, seen)) == len(set().union(*seen)) == 30


def test_a_broken_line_appends_nothing_and_mending_it_goes_on(store: MemoryStore, tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", lines(50) + "u0,i1,soon,1\n" + lines(10, start=50))
    other = write(tmp_path / "more.csv", lines(20, start=60))
    with pytest.raises(InvalidInputError, match=r"log.csv, line 52: timestamp 'soon' .* run the same command to go on"):
        backfill(store, path, other)
    assert store.statistics().behaviors == 0
    assert (tmp_path / "work").exists()
    write(path, lines(60))
    assert backfill(store, path, other) == Appended(80, 0, 3)
    assert held(store) == streamed([*read_behaviors(path), *read_behaviors(other)], tmp_path / "other.db")


def test_a_log_that_was_replaced_meanwhile_is_spilled_anew(store: MemoryStore, tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", lines(50) + "broken\n")
    with pytest.raises(InvalidInputError, match="line 52"):
        backfill(store, path)
    write(path, lines(70, start=5))
    assert backfill(store, path) == Appended(70, 0, 3)


def test_a_work_directory_of_something_else_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", lines(50) + "broken\n")
    with pytest.raises(InvalidInputError, match="line 52"):
        backfill(store, path)
    other = write(tmp_path / "other.csv", lines(5))
    with pytest.raises(ConfigurationError, match="holds an unfinished bulk run of other files or another store"):
        backfill(store, other)
    with pytest.raises(ConfigurationError, match="holds an unfinished bulk run of other files or another store"):
        backfill(store, path, url="another store")
    with (tmp_path / "work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="is in use by another bulk run"):
            backfill(store, path)
    (tmp_path / "work" / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ConfigurationError, match=r"is not understood \(format 99\); delete the directory"):
        backfill(store, path)
    (full := tmp_path / "full").mkdir()
    (full / "photo.jpg").touch()
    with pytest.raises(ConfigurationError, match=r"full is not empty \('photo.jpg'\)"):
        Backfill(store, "a store", [other], full).run()
    assert (full / "photo.jpg").exists()


def test_standard_input_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="standard input cannot be read twice"):
        Backfill(store, "a store", ["-"], tmp_path / "work")


KILL = """
import os, signal
def kill_at(owner, name, number, after):
    original, calls = getattr(owner, name), []
    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, counted)
from pathlib import Path
from liber_runtime.memory.sqlite import SQLiteStore
"""


def test_a_killed_backfill_goes_on_at_both_stages(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", lines(2_000, users=40))
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    arguments = ("ingest", path, "--bulk", "--store", url)
    kills = [
        "os, 'write', 20, True",  # while spilling
        "os, 'fsync', 12, False",
        "SQLiteStore, 'append', 3, False",  # while appending
        "SQLiteStore, 'append', 20, True",
        "Path, 'unlink', 2, True",  # while cleaning up
    ]
    for kill in kills:
        status, _, error = ended(start(*arguments, before=f"{KILL}\nkill_at({kill})"))
        assert status == -signal.SIGKILL, (kill, error)
    status, printed, error = ended(start(*arguments))
    assert status == 0, error
    assert printed == "kept 0 behaviors, 0 were there already; cut 0 partitions\n"
    memory = open_store(url)
    assert held(memory) == streamed(read_behaviors(path), tmp_path / "other.db")
    memory.close()
    assert not (tmp_path / "memory.db-bulk").exists()


def test_no_room_for_the_work_is_one_line_and_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", lines(3_000, users=40))
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    arguments = ("ingest", path, "--bulk", "--store", url, "--work", tmp_path / "work")
    full = """
import os, errno
write, calls = os.write, []
def full_disk(*arguments):
    calls.append(1)
    if len(calls) > 20:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(*arguments)
os.write = full_disk
"""
    status, _, error = ended(start(*arguments, before=full))
    assert status == 1
    assert error.startswith(f"error: work directory {tmp_path / 'work'}: No space left on device; make room there")
    assert ended(start(*arguments))[:2] == (0, "kept 3000 behaviors, 0 were there already; cut 120 partitions\n")
