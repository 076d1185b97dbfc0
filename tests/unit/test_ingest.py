"""Logs into a store: batches, marks, and what a second run does."""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_harness import HEADER, PATIENCE_SECONDS, ended, held, lines, start, streamed

from liber_runtime import behavior_log
from liber_runtime.behavior import Behavior
from liber_runtime.behavior_log import BehaviorLog, read_behaviors
from liber_runtime.exceptions import InvalidInputError, StoreError
from liber_runtime.ingest import append_batches, append_behaviors, log
from liber_runtime.ingest.log import LogFile
from liber_runtime.memory import Appended, MemoryStore, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    memory = open_store(f"sqlite:///{tmp_path / 'memory.db'}")
    yield memory
    memory.close()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "BLOCK_BYTES", 100)


def ingest(path: Path, store: MemoryStore, **options: bool) -> tuple[Appended, int]:
    """What a run appended, and how many behaviors it parsed."""
    file = LogFile(path, store, **options)
    appended = append_batches(store, file.batches())
    return appended, appended.behaviors + appended.duplicates


# -- any iterable ----------------------------------------------------------------------------------------------------

BEHAVIORS = [Behavior(f"u{n % 3}", f"i{n}", 1.0, float(n)) for n in range(100)]


def test_an_iterable_is_appended_in_batches_and_counted(store: MemoryStore) -> None:
    told: list[tuple[Appended, int]] = []
    total = append_behaviors(store, iter(BEHAVIORS + BEHAVIORS[:5]), batch=30, tell=lambda *now: told.append(now))
    assert total == Appended(behaviors=100, duplicates=5, partitions=3)
    assert [offset for _, offset in told] == [30, 60, 90, 105]
    assert told[0][0] == Appended(30, 0, 0)
    assert told[-1][0] == total


def test_a_named_iterable_goes_on_behind_its_last_batch(store: MemoryStore) -> None:
    def failing() -> Iterator[Behavior]:
        yield from BEHAVIORS[:70]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        append_behaviors(store, failing(), source="a log", batch=30)
    assert store.position("a log") == 60
    assert append_behaviors(store, BEHAVIORS, source="a log", batch=30) == Appended(40, 0, 0)
    assert append_behaviors(store, BEHAVIORS, source="a log", batch=30) == Appended(0, 0, 0)
    assert append_behaviors(store, BEHAVIORS, source="another log", batch=30) == Appended(0, 100, 0)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_repeated_file_changes_nothing_and_is_not_parsed(suffix: str, store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / f"log{suffix}"
    rows = [{"user": b.user_id, "item": b.item_id, "timestamp": b.timestamp, "feedback": 1} for b in BEHAVIORS]
    if suffix == ".csv":
        polars.DataFrame(rows).write_csv(path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        polars.DataFrame(rows).write_parquet(path)
    assert ingest(path, store) == (Appended(100, 0, 3), 100)
    before = held(store)
    assert ingest(path, store) == (Appended(0, 0, 0), 0)
    path.rename(renamed := tmp_path / f"renamed{suffix}")
    assert ingest(renamed, store) == (Appended(0, 0, 0), 0)
    assert ingest(renamed, store, from_start=True) == (Appended(0, 100, 0), 100)
    assert held(store) == before


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("first", [1, 5, 40])
def test_a_file_that_has_grown_goes_on_where_it_ended(first: int, store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + lines(first))
    for size, parsed in [(first, first), (first + 1, 1), (first + 60, 59), (first + 60, 0), (first + 61, 1)]:
        path.write_text(HEADER + lines(size))
        assert ingest(path, store)[1] == parsed
    assert held(store) == streamed(read_behaviors(path), tmp_path / "other.db")


@pytest.mark.usefixtures("small_blocks")
def test_a_file_that_begins_like_another_is_read_from_where_they_part(store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + lines(60))
    ingest(path, store)
    path.write_text(HEADER + lines(30) + lines(50, start=1000))
    appended, parsed = ingest(path, store)
    assert appended.behaviors == 50
    assert parsed < 60
    path.write_text(HEADER + lines(1) + lines(20, start=2000))
    assert ingest(path, store) == (Appended(20, 1, 3), 21)
    path.write_text(HEADER + lines(30))
    assert ingest(path, store)[0].behaviors == 0


@pytest.mark.usefixtures("small_blocks")
def test_a_last_line_that_is_still_growing_is_read_again(store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + lines(20) + "u0,i9,1700000000,1")
    assert ingest(path, store)[1] == 21
    assert ingest(path, store) == (Appended(0, 1, 0), 1)
    path.write_text(HEADER + lines(20) + "u0,i9,1700000000,12\n")
    assert ingest(path, store) == (Appended(1, 0, 0), 1)


@pytest.mark.usefixtures("small_blocks")
def test_records_of_several_lines_are_resumed_at_records(store: MemoryStore, tmp_path: Path) -> None:
    notes = ["a note" + "\nof lines" * (n % 9) for n in range(60)]
    rows = "".join(f'u{n % 3},i{n},{n},1,"{note}"\n' for n, note in enumerate(notes))
    path = tmp_path / "log.csv"
    path.write_text(HEADER.strip() + ",note\n" + rows)
    assert ingest(path, store)[1] == 60
    assert ingest(path, store)[1] == 0
    path.write_text(path.read_text() + 'u1,new,100,1,"a\nb"\n')
    assert ingest(path, store)[1] == 1


@pytest.mark.usefixtures("small_blocks")
def test_a_broken_line_is_named_again_and_mending_it_goes_on(store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + lines(30) + "u0,i1,soon,1\n" + lines(10, start=30))
    for parsed in (30, 0):
        file = LogFile(path, store)
        told: list[Appended] = []
        with pytest.raises(InvalidInputError, match=r"log.csv, line 32: timestamp 'soon' .*; all before it is kept: "):
            append_batches(store, file.batches(), lambda total, offset, told=told: told.append(total))
        assert sum(each.behaviors for each in told[-1:]) == parsed
    path.write_text(HEADER + lines(40))
    assert ingest(path, store) == (Appended(10, 0, 0), 10)


@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=4),
    st.integers(1, 400),
    st.sampled_from([".csv", ".jsonl"]),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_a_log_that_grows_and_is_cut_short_is_kept_once(
    tmp_path_factory: pytest.TempPathFactory, growth: list[int], block: int, suffix: str, ended: bool
) -> None:
    directory = tmp_path_factory.mktemp("log")
    path = directory / f"log{suffix}"
    memory = open_store(f"sqlite:///{directory / 'memory.db'}")
    size = 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(log, "BLOCK_BYTES", block)
        for more in growth:
            size += more
            text = HEADER + lines(size)
            if suffix == ".jsonl":
                names = HEADER.strip().split(",")
                values = (line.split(",") for line in lines(size).splitlines())
                text = "".join(json.dumps(dict(zip(names, value, strict=True))) + "\n" for value in values)
            path.write_text(text if ended else text.rstrip())
            batches = LogFile(path, memory).batches()
            # A run that is cut short has kept the first of its batches.
            append_batches(memory, [batch for batch, _ in zip(batches, range(2), strict=False)])
        ingest(path, memory)
    expected = streamed(read_behaviors(path), directory / "other.db")
    assert held(memory) == expected
    memory.close()


# -- the order and the time of behaviors -----------------------------------------------------------------------------


def test_the_order_of_the_log_is_the_order_of_the_memory(store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + "u,late,1700000009,1\nu,early,1700000001,1\nu,late,1700000009,1\nu,late,1700000009,2\n")
    assert ingest(path, store)[0] == Appended(behaviors=3, duplicates=1, partitions=0)
    timeline = store.timeline("u")
    assert timeline is not None
    assert [(each.item_id, each.feedback) for each in timeline.cache] == [("late", 1), ("early", 1), ("late", 2)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_timestamp_in_the_future_is_named(suffix: str, tmp_path: Path) -> None:
    now = time.time()
    rows = [{"user": "u", "item": "i", "timestamp": now + ahead, "feedback": 1} for ahead in (0, 80_000, 90_000)]
    path = tmp_path / f"log{suffix}"
    frame = polars.DataFrame(rows)
    {".csv": frame.write_csv, ".jsonl": frame.write_ndjson, ".parquet": frame.write_parquet}[suffix](path)
    log_read = iter(BehaviorLog(path))
    assert [next(log_read).timestamp for _ in range(2)] == [rows[0]["timestamp"], rows[1]["timestamp"]]
    line = 4 if suffix == ".csv" else 3
    with pytest.raises(InvalidInputError, match=rf"log{suffix}, line {line}: timestamp .* lies in the future"):
        next(log_read)


@pytest.mark.parametrize("noun", ["user", "item", "event_id"])
@pytest.mark.parametrize(
    ("value", "named"),
    [("x" * 10_000_000, "longer than 1048576 bytes"), ("a\0b", "control character"), ("a\nb", "control character")],
    ids=["10 MB", "NUL", "line break"],
)
def test_ids_that_are_none_are_refused_with_their_line(noun: str, value: str, named: str, tmp_path: Path) -> None:
    row = {"user": "u", "item": "i", "timestamp": 1, "feedback": 1, "event_id": "e"}
    broken = row | {noun: value}
    jsonl = tmp_path / "log.jsonl"
    jsonl.write_text(json.dumps(row) + "\n" + json.dumps(broken) + "\n")
    with pytest.raises(InvalidInputError, match=f"log.jsonl, line 2: .*{named}"):
        list(read_behaviors(jsonl))
    quoted = tmp_path / "log.csv"
    quoted.write_text(",".join(row) + "\n" + ",".join(f'"{each}"' for each in broken.values()) + "\n")
    line = 3 if value == "a\nb" else 2
    with pytest.raises(InvalidInputError, match=f"log.csv, line {line}: .*({named}|NUL)"):
        list(read_behaviors(quoted))
    if len(value) < 100:
        parquet = tmp_path / "log.parquet"
        polars.DataFrame([row, broken]).write_parquet(parquet)
        with pytest.raises(InvalidInputError, match=f"log.parquet, line 2: .*{named}"):
            list(read_behaviors(parquet))


def test_an_endless_line_is_refused_without_reading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        read_bytes = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.read_bytes += len(buffer)
            return len(buffer)

    endless = Endless()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(endless)))
    with pytest.raises(InvalidInputError, match="standard input, line 1: "):
        list(read_behaviors("-"))
    assert endless.read_bytes < 2 * behavior_log.MAX_LINE_BYTES


# -- the command -----------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def test_a_killed_command_goes_on_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + lines(6_000, users=40))
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    watcher = open_store(url)
    generator = random.Random(1)
    parsed = kills = 0
    try:
        for _ in range(3):
            before = watcher.statistics().behaviors
            process = start("ingest", path, "--store", url)
            wanted = before + generator.randrange(1, 900)
            wait_for(lambda wanted=wanted: watcher.statistics().behaviors >= wanted, process)
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
        kept = watcher.statistics().behaviors
        status, printed, _ = ended(start("ingest", path, "--store", url))
        parsed = int(printed.split()[1])
        assert status == 0
        # Behaviors and mark are kept together, so nothing that is kept is parsed again.
        assert printed.startswith(f"kept {6_000 - kept} behaviors, 0 were there already")
        assert kills > 0
        assert held(watcher) == streamed(read_behaviors(path), tmp_path / "other.db")
        assert ended(start("ingest", path, "--store", url))[1].startswith("kept 0 behaviors, 0 were there already")
    finally:
        watcher.close()
    assert parsed < 6_000


def test_standard_input_has_duplicates_only(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    for expected in ("kept 50 behaviors, 0 were", "kept 0 behaviors, 50 were"):
        status, printed, _ = ended(start("ingest", "-", "--store", url), HEADER + lines(50))
        assert (status, printed[: len(expected)]) == (0, expected)


def test_a_full_disk_is_one_line_and_what_was_acknowledged_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + lines(4_000))
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    open_store(url).close()
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    status, _, error = ended(start("ingest", path, "--store", url, before=full))
    assert status == 1
    assert error.startswith("error: store ")
    status, printed, _ = ended(start("ingest", path, "--store", url))
    assert status == 0
    assert ", 0 were there already" in printed
    memory = open_store(url)
    assert held(memory) == streamed(read_behaviors(path), tmp_path / "other.db")
    memory.close()


def test_a_read_only_store_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + lines(10))
    read_only = """
from liber_runtime.memory.sqlite.file import StoreFile
opened = StoreFile.__init__
def open_read_only(self, *arguments, **options):
    opened(self, *arguments, **options)
    self._writer.execute("PRAGMA query_only = ON")
StoreFile.__init__ = open_read_only
"""
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    status, printed, error = ended(start("ingest", path, "--store", url, before=read_only))
    assert status == 1
    assert printed == ""
    assert "make the file and its directory writable" in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("log.csv", "--work", "w"), "--work is for --bulk"),
        (("log.csv", "--metrics-port", "9100"), "--metrics-port is for --kafka"),
        (("--bulk",), "there is nothing to ingest"),
        (("log.csv", "--bulk", "--from-start"), "no --from-start"),
        (("--kafka", "h:1"), "--kafka needs --topic"),
        (("--topic", "t", "log.csv"), "are for --kafka"),
        (("log.csv", "--kafka", "h:1", "--topic", "t"), "reads no files"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liber_runtime.cli import application

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=named):
        application(["ingest", *arguments, "--store", "sqlite:///a.db"], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_a_store_that_fails_leaves_a_log_where_it_is(store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + lines(10))
    batches = LogFile(path, store).batches()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        append_batches(store, batches)
