"""`liber inspect`, `export`, `forget` and `rewrite` on a real store, and what they say when something is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liber_runtime.behavior import Behavior, Domain, Item, Text
from liber_runtime.cli import main
from liber_runtime.cli.application import output
from liber_runtime.interest import ShiftPrompt, SummaryPrompt
from liber_runtime.memory import Failure, MemoryStore, Representation, Result, Task, open_store
from liber_runtime.writers.statistical import compare, summarize

DOMAIN = Domain("films", "movie", "stars", (1.0, 5.0), 3.0, ("genre",), "genres")

EVIL = "\x1b]0;owned\x07[/red]<b>\u202e"

ENCODING, OTHER = "0123456789abcdef", "fedcba9876543210"


def make(task: Task, writer: str = "statistical", encoding: str = ENCODING) -> Result:
    """What a worker would make of a task, without a worker."""
    if task.step == "representation":
        return Result(task, Representation(np.arange(8, dtype=np.float32) + 0.1, task.fingerprint or encoding))
    if task.step == "summary":
        history = tuple((item_of(behavior.item_id), behavior.feedback) for behavior in task.behaviors)
        said = summarize(SummaryPrompt(DOMAIN, task.profile, history))
    else:
        said = compare(ShiftPrompt(DOMAIN, task.previous, task.summary))
    return Result(task, Text(task.step, said, writer, f"{task.step}-1", 700, 90, 1.5, 1.7e9))


def drain(store: MemoryStore, made: Callable[[Task], Result] = make) -> int:
    """Makes all that is pending; returns the number of texts."""
    texts = 0
    while tasks := store.claim(("summary", "shift", "representation"), 100, 60.0, ENCODING):
        store.commit([made(task) for task in tasks])
        texts += sum(task.step != "representation" for task in tasks)
    return texts


def item_of(item_id: str) -> Item:
    return Item(
        item_id, EVIL if item_id == "m0" else f"Film {item_id}", {"genres": ("Drama", "Crime")[: len(item_id) - 1]}
    )


def fill(store: MemoryStore, user: str, behaviors: int) -> None:
    store.append(
        [Behavior(user, f"m{at}", 1.0 + at % 5, 1.6e9 + 3600 * at, f"{user}-e{at}") for at in range(behaviors)]
    )


@dataclasses.dataclass(frozen=True)
class Command:
    """The command line in this process: what `liber` prints, and how it ends."""

    url: str
    directory: Path
    captured: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    def run(self, *arguments: object, given: str = "") -> tuple[int, str, str]:
        self.captured.readouterr()
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        self.patch.setattr(sys, "argv", ["liber", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self.captured.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    def done(self, *arguments: object) -> str:
        status, out, error = self.run(*arguments)
        assert status == 0, error
        return out

    def refused(self, *arguments: object) -> str:
        status, out, error = self.run(*arguments)
        assert (status, out) == (1, "")
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error.removeprefix("error: ").removesuffix("\n")

    def json(self, *arguments: object) -> Any:
        return json.loads(self.done(*arguments))

    def store(self) -> MemoryStore:
        return open_store(self.url)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three users, all made but what one of them lacks."""
    path = tmp_path_factory.mktemp("filled") / "memory.db"
    store = open_store(f"sqlite:///{path}")
    store.describe(DOMAIN, [item_of(f"m{at}") for at in range(70)], {"u1": {"age": 31}, "silent": {"age": 7}})
    store.encode_by([ENCODING])
    fill(store, "u1", 65)
    fill(store, "u2", 25)
    drain(store)
    fill(store, EVIL[1:3], 20)
    drain(
        store, lambda task: Result(task, Failure(f"the writer said {EVIL}", None)) if task.number == 1 else make(task)
    )
    store.close()
    return path


@pytest.fixture
def liber(
    filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """The command on a copy of that store."""
    (tmp_path / "memory.db").write_bytes(filled.read_bytes())
    url = f"sqlite:///{tmp_path / 'memory.db'}"
    for name in [name for name in os.environ if name.startswith("LIBER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LIBER_STORE", url)
    monkeypatch.setattr(output, "width", 200)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield Command(url, tmp_path, capsys, monkeypatch)
    signal.signal(signal.SIGTERM, before)


class TestInspect:
    def test_counts_over_the_store(self, liber: Command) -> None:
        counts = liber.json("inspect")
        assert (counts["users"], counts["behaviors"], counts["partitions"]) == (3, 110, 5)
        assert counts["vectors"] == {ENCODING: 4}
        assert counts["encodings"] == [ENCODING]
        assert counts["dead"] == {"summary": 1, "shift": 0, "representation": 0}
        assert liber.json("inspect", "--json") == counts

    def test_a_user(self, liber: Command) -> None:
        told = liber.done("inspect", "u1")
        assert told.startswith("user u1\nage 31\n65 behaviors: 3 partitions and 5 in the cache\n")
        assert "shift  from the 40 behaviors of partitions 1 and 2 · by statistical, prompt shift-1" in told
        assert f"vector  8 numbers by {ENCODING}" in told
        assert "15 older behaviors; --all lists them" in told
        assert r"\x1b]0;owned\x07[/red]<b>\u202e" in liber.done("inspect", "u1", "--all")
        assert told.replace("\n", "").isprintable()

    def test_a_user_as_json(self, liber: Command) -> None:
        held = liber.json("inspect", "u1", "--json")
        assert (held["format"], held["version"]) == ("liber.user", 1)
        assert [len(each["behaviors"]) for each in held["partitions"]] == [20, 20, 20]
        assert held["partitions"][2]["shift"]["from_partitions"] == [2, 3]
        assert held["partitions"][2]["vectors"] == [{"encoding": ENCODING, "dimension": 8}]
        assert held["partitions"][0]["behaviors"][0]["title"] == EVIL

    def test_a_page(self, liber: Command) -> None:
        (liber.directory / "u1.html").write_text("older")
        assert liber.done("inspect", "u1", "--html", "u1.html") == "wrote u1.html\n"
        page = (liber.directory / "u1.html").read_text("utf-8")
        assert page.startswith("<!DOCTYPE html>")
        assert page.endswith("</html>")
        assert "Interests over time" in page
        assert "&lt;b&gt;" in page
        assert {path.name for path in liber.directory.iterdir()} == {"memory.db", "u1.html"}
        assert stat.S_IMODE((liber.directory / "u1.html").stat().st_mode) == 0o600

    def test_a_page_that_cannot_be_written(self, liber: Command) -> None:
        assert "there is no directory nowhere; make it first" in liber.refused(
            "inspect", "u1", "--html", "nowhere/a.html"
        )
        assert ". is a directory; name a file in it" in liber.refused("inspect", "u1", "--html", ".")

    def test_what_was_given_up(self, liber: Command) -> None:
        told = liber.done("inspect", "--dead")
        assert r"the writer said \x1b]0;owned\x07[/red]<b>\u202e" in told
        assert "liber worker --retry-dead" in told
        [step] = liber.json("inspect", "--dead", "--json")
        assert (step["user_id"], step["number"], step["step"], step["attempts"]) == ("]0", 1, "summary", 1)
        assert "given up  summary, after 1 attempt: the writer said" in liber.done("inspect", "]0")
        store = liber.store()
        assert store.revive() == 1
        store.close()
        assert liber.done("inspect", "--dead") == "no step was given up\n"

    def test_what_wrote_the_texts(self, liber: Command) -> None:
        tallies = {each["kind"]: each for each in liber.json("inspect", "--versions", "--json")}
        assert (tallies["summary"]["texts"], tallies["summary"]["users"]) == (4, 2)
        assert (tallies["shift"]["texts"], tallies["shift"]["prompt_tokens"]) == (2, 1400)
        assert "statistical" in liber.done("inspect", "--versions")

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("--html", "a.html"), "--html a.html shows one user; name the user"),
            (("u1", "--dead"), "--dead is about the whole store; leave out user 'u1'"),
            (("u1", "--versions"), "--versions is about the whole store; leave out user 'u1'"),
            (("--dead", "--versions"), "--dead and --versions are two questions; ask one at a time"),
            (("u1", "--json", "--html", "a"), "--json and --html exclude each other; ask for one"),
        ],
    )
    def test_what_does_not_go_together(self, liber: Command, arguments: tuple[str, ...], reason: str) -> None:
        assert liber.refused("inspect", *arguments) == reason

    def test_a_terminal_that_knows_ascii_alone(self, liber: Command) -> None:
        store = liber.store()
        store.describe(DOMAIN, [Item("m64", "千と千尋")])
        store.close()
        ended = subprocess.run(
            [sys.executable, "-m", "liber_runtime.cli", "inspect", "u1"],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
        )
        assert ended.returncode == 0, ended.stderr
        assert rb"\u5343\u3068\u5343\u5c0b" in ended.stdout


class TestExport:
    def test_everything_is_in_it(self, liber: Command) -> None:
        held = liber.json("export", "u1")
        store = liber.store()
        timeline = store.timeline("u1")
        store.close()
        assert timeline is not None
        assert held["profile"] == {"age": 31}
        events = [each["event_id"] for part in held["partitions"] for each in part["behaviors"]]
        assert events + [each["event_id"] for each in held["cache"]] == [f"u1-e{at}" for at in range(65)]
        for part, record in zip(held["partitions"], timeline.partitions, strict=True):
            assert record.summary is not None
            assert part["summary"]["text"] == record.summary.text
            values = np.array(part["vectors"][0]["values"], np.float32)
            assert values.tobytes() == record.representations[ENCODING].vector.tobytes()

    def test_what_was_given_up_and_what_is_pending(self, liber: Command) -> None:
        held = liber.json("export", "]0")
        assert [each["error"] for each in held["dead"]] == [f"the writer said {EVIL}"]
        assert held["partitions"][0]["open"] == [
            {"step": "summary", "encoding": "", "dead": True},
            {"step": "representation", "encoding": ENCODING, "dead": False},
        ]

    def test_a_user_with_a_profile_alone(self, liber: Command) -> None:
        held = liber.json("export", "silent")
        assert (held["profile"], held["partitions"], held["cache"]) == ({"age": 7}, [], [])

    def test_a_file_of_the_owner_alone(self, liber: Command) -> None:
        status, out, error = liber.run("export", "u1", "--output", "u1.json")
        assert (status, out, error) == (0, "", "wrote u1.json\n")
        path = liber.directory / "u1.json"
        assert json.loads(path.read_text()) == liber.json("export", "u1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_nobody(self, liber: Command) -> None:
        assert liber.refused("export", "\x1b[2J") == (
            r"the store holds nothing of user '\x1b[2J'; `liber inspect` alone counts what it holds"
        )

    def test_a_reader_that_leaves_ends_it_quietly(self, liber: Command) -> None:
        code = "import sys; from liber_runtime.cli import main; sys.argv[0] = 'liber'; main()"
        with subprocess.Popen(
            [sys.executable, "-c", code, "export", "u1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert "Traceback" not in process.stderr.read()


class TestForget:
    def test_a_user(self, liber: Command) -> None:
        lines = liber.done("forget", "u1", "--yes").splitlines()
        assert lines[0] == (
            "erased of user 'u1': 65 behaviors, 3 partitions, 3 summaries, 2 shifts, 3 vectors, the profile and all "
            "pending work"
        )
        assert "backups" in lines[1]
        assert "the store holds nothing of user 'u1'" in liber.refused("inspect", "u1")
        assert liber.done("forget", "u1", "--yes") == "nothing was held of user 'u1'\n"
        assert liber.json("inspect")["users"] == 2

    def test_nobody_is_erased_unasked(self, liber: Command) -> None:
        held = liber.done("export", "u1")
        for arguments in (("u1",), ("u1", "--event", "u1-e3")):
            for answer in ("n\n", "\n", ""):
                status, out, _ = liber.run("forget", *arguments, given=answer)
                assert status == 1
                assert out.startswith("Erase ")
        assert liber.done("export", "u1") == held
        status, out, _ = liber.run("forget", "u1", "--event", "u1-e3", given="y\n")
        assert status == 0
        assert "Film m3 of 2020-09-13 15:26, in partition 1? [y/N]: " in out
        assert liber.done("export", "u1") != held

    def test_one_behavior(self, liber: Command) -> None:
        lines = liber.done("forget", "u1", "--event", "u1-e23", "--yes").splitlines()
        vectors = [f"vector of partition {number} by {ENCODING}" for number in (2, 3)]
        assert lines[0] == "erased event 'u1-e23' of user 'u1': Film m23 of 2020-09-14 11:26, in partition 2"
        assert lines[1] == f"removed with it: summary 2, shift 2, {vectors[0]}, shift 3, {vectors[1]}"
        queued = "summary 2, shift 2, vector of {0} of partition 2, shift 3, vector of {0} of partition 3"
        assert lines[2] == f"queued to be made from what remains: {queued.format(ENCODING)}"
        assert "backups" in lines[3]
        store = liber.store()
        assert drain(store) == 3
        store.close()
        held = liber.json("export", "u1")
        assert [len(each["behaviors"]) for each in held["partitions"]] == [20, 19, 20]
        assert all(each["vectors"] and not each["open"] for each in held["partitions"])
        assert "u1-e23" not in json.dumps(held)
        assert "has no event 'u1-e23'" in liber.refused("forget", "u1", "--event", "u1-e23", "--yes")

    def test_one_behavior_of_the_cache(self, liber: Command) -> None:
        lines = liber.done("forget", "u1", "--event", "u1-e64", "--yes").splitlines()
        assert lines[0].endswith(", in the cache")
        assert lines[1] == "no text and no vector was made from it yet"
        assert liber.json("inspect")["pending"]["summary"] == 0

    def test_what_is_not_there(self, liber: Command) -> None:
        assert liber.refused("forget", "u1", "--event", "\x1b", "--yes") == (
            r"user 'u1' has no event '\x1b'; `liber export` lists the event ids of all behaviors that are held"
        )
        assert "the store holds nothing of user 'nobody'" in liber.refused("forget", "nobody", "--event", "e", "--yes")


class TestRewrite:
    def test_a_dry_run_counts_what_is_queued_and_changes_nothing(self, liber: Command) -> None:
        held = liber.done("export", "u1")
        for selection, texts, calls in (
            (("--all",), 4, 6),
            (("--writer", "statistical"), 4, 6),
            (("--prompt-version", "shift-1"), 2, 2),
            (("--user", "u2"), 1, 1),
            (("--user", "u2", "--user", "u1", "--prompt-version", "summary-1"), 4, 6),
            (("--writer", "nobody"), 0, 0),
        ):
            told = liber.done("rewrite", *selection, "--dry-run").splitlines()
            assert told[0].startswith(f"{texts} text")
            assert f": {calls} writer call" in told[1]
            assert liber.json("inspect")["pending"]["summary"] == 0
            copy = liber.directory / "copy.db"
            copy.write_bytes((liber.directory / "memory.db").read_bytes())
            told = liber.done("rewrite", *selection, "--store", f"sqlite:///{copy}").splitlines()
            assert told[0].startswith(f"{texts} text")
            store = open_store(f"sqlite:///{copy}")
            assert drain(store) == calls
            store.close()
            copy.unlink()
        assert liber.done("export", "u1") == held

    def test_what_it_cost_last_time(self, liber: Command) -> None:
        told = liber.done("rewrite", "--user", "u1", "--dry-run").splitlines()
        assert told[2] == "the texts there are took 3,500 prompt tokens, 450 response tokens and 7.5 s of calls"

    def test_the_old_texts_serve_until_they_are_replaced(self, liber: Command) -> None:
        before = liber.json("inspect", "u1", "--json")
        told = liber.done("rewrite", "--user", "u1")
        assert told.startswith("3 texts queued to be written again")
        assert liber.json("inspect", "u1", "--json") == before
        store = liber.store()
        drain(store, lambda task: make(task, writer="better"))
        store.close()
        after = liber.json("inspect", "u1", "--json")
        writers = {text["writer"] for each in after["partitions"] for text in (each["summary"], each["shift"]) if text}
        assert writers == {"better"}

    def test_users_of_a_file(self, liber: Command) -> None:
        named = "\ufeffu2\r\nnobody\n\nu2\n"
        (liber.directory / "users.txt").write_text(named, "utf-8")
        for path, given in (("users.txt", ""), ("-", named)):
            status, out, error = liber.run("rewrite", "--users-file", path, given=given)
            assert status == 0
            assert out.startswith("1 text queued")
            assert error == "nothing is held of 1 of the 2 users named, e.g. 'nobody'\n"

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"u1\na\x1bb\n", r"users.txt, line 2: user id 'a\x1bb' holds a control character; remove it"),
            (b"u1\n\xff\n", "users.txt is not UTF-8 at byte 3; re-encode it as UTF-8"),
            (b"\n\n", "users.txt names no user; write one user id a line"),
            (None, "users.txt does not exist; check the path"),
        ],
    )
    def test_a_file_that_cannot_be_used(self, liber: Command, content: bytes | None, reason: str) -> None:
        if content is not None:
            (liber.directory / "users.txt").write_bytes(content)
        assert liber.refused("rewrite", "--users-file", "users.txt") == reason

    def test_which_texts_has_to_be_said(self, liber: Command) -> None:
        assert liber.refused("rewrite").startswith("nothing says which texts; give --writer, --prompt-version")
        assert "--all means every text" in liber.refused("rewrite", "--all", "--user", "u1")


class TestStores:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("inspect",),
            ("inspect", "u"),
            ("inspect", "--dead"),
            ("export", "u"),
            ("forget", "u", "--yes"),
            ("rewrite", "--all"),
        ],
    )
    def test_a_mistyped_store_does_not_become_one(self, liber: Command, arguments: tuple[str, ...]) -> None:
        error = liber.refused(*arguments, "--store", "sqlite:///typo.db")
        assert error.startswith("there is no store sqlite:///typo.db; name another")
        assert not (liber.directory / "typo.db").exists()

    @pytest.mark.parametrize("user", ["[/red]", "[bold]", ":smile:", "100%", "\x1b[31m"])
    def test_what_looks_like_markup_is_shown_as_it_is(self, liber: Command, user: str) -> None:
        assert liber.refused("inspect", user).startswith(f"the store holds nothing of user {user!r};")
