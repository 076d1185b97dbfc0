"""The `liber` command as someone with own data uses it, and what it says when something is wrong."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import share_encoder

from builders.datasets import Dataset, sample
from liber_runtime.cli import application
from liber_runtime.server.process import find_ports

PATIENCE_SECONDS = 120

PLACES = ("--data", "data", "--store", "sqlite:///memory.db", "--output", "build", "--repository", "models")
BUILD = ("build", *PLACES, "--dimension", 8, "--history", 10)
FAST = ("--backbone", "DNN")
"""The backbone that is trained and exported in the shortest time, where any will do."""

DOMAIN = {
    "name": "films",
    "item_noun": "movie",
    "feedback_noun": "stars",
    "feedback_range": [1, 5],
    "positive_above": 3,
    "factors": ["genre", "time/period"],
    "group_attribute": "genres",
    "period_attribute": "year",
}


def environment(**settings: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LIBER_")}
    return {**inherited, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **settings}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "liber_runtime.cli", *map(str, arguments)]


def liber(*arguments: object, directory: Path, given: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=directory,
        env=environment(**settings),
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def done(*arguments: object, directory: Path, given: str = "", **settings: str) -> str:
    """What a command that succeeds prints."""
    ended = liber(*arguments, directory=directory, given=given, **settings)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def refused(*arguments: object, directory: Path, given: str = "", **settings: str) -> str:
    """The one line that a command ends with which cannot do what it was asked."""
    ended = liber(*arguments, directory=directory, given=given, **settings)
    assert ended.returncode == 1, ended.stdout
    lines = ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def scrape(address: str) -> dict[str, float]:
    """The samples that a process shows to Prometheus at `host:port`."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_SECONDS) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@dataclasses.dataclass(frozen=True)
class World:
    """Own data in ``data``, a store, a bundle in a repository, and a server on both: all in one directory."""

    directory: Path
    dataset: Dataset
    built: str
    ready: str
    supervisor: str

    @property
    def triton(self) -> str:
        found = re.fullmatch(r"ready: gRPC (\S+), HTTP (\S+), metrics (\S+)", self.ready)
        assert found
        return found[1]

    @property
    def store(self) -> str:
        return f"sqlite:///{self.directory / 'memory.db'}"


def write_data(directory: Path) -> Dataset:
    directory.mkdir()
    dataset = sample.generate(seed=3, users=60, items=80, behaviors=4_000)
    write_log(directory / "behaviors.csv", [(b.user_id, b.item_id, b.timestamp, b.feedback) for b in dataset.behaviors])
    with (directory / "items.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item", "title", "genres", "year"])
        for item in dataset.items.values():
            genres, year = item.attributes["genres"], item.attributes["year"]
            assert isinstance(genres, tuple)
            rows.writerow([item.item_id, item.title, "|".join(genres), year])
    with (directory / "users.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "age", "gender"])
        rows.writerows([user, profile["age"], profile["gender"]] for user, profile in dataset.profiles.items())
    (directory / "domain.json").write_text(json.dumps(DOMAIN))
    return dataset


def write_log(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item", "timestamp", "feedback"), *rows])
    return path


@contextlib.contextmanager
def serving(directory: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `liber serve` and the line it printed when it was ready."""
    log = directory / "triton.log"
    with subprocess.Popen(
        command("serve", "--grpc-port", 0, "--http-port", 0, "--metrics-port", 0, "--log-file", log, *arguments),
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, exported_encoder: Path) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("cli")
    dataset = write_data(directory / "data")
    share_encoder(exported_encoder, directory / "build" / "knowledge")
    built = done(*BUILD, "--encoder", tiny_bert, directory=directory)
    ports = find_ports({"supervisor": "127.0.0.1"}, {"supervisor": 0})
    place = ("--repository", "models", "--store", "sqlite:///memory.db")
    with serving(directory, *place, "--supervisor-metrics-port", ports["supervisor"]) as (_, ready):
        yield World(directory, dataset, built, ready, f"127.0.0.1:{ports['supervisor']}")


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port that is taken, and on which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that refuses connections, and which nobody else can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


class TestOwnData:
    def test_build_says_what_it_made_and_where(self, world: World) -> None:
        first, second = world.built.splitlines()
        assert re.fullmatch(r"bundle [0-9a-f]{16} in build/bundle: validation AUC 0\.\d+, log loss \d\.\d{4}", first)
        assert second == "published as version 1 of models"
        assert (world.directory / "build" / "bundle" / "manifest.json").is_file()

    def test_score_ranks_the_candidates(self, world: World) -> None:
        items = [*list(world.dataset.items)[:6], "nothing"]
        answer = json.loads(done("score", "u1", *items, "--json", directory=world.directory, LIBER_TRITON=world.triton))
        assert answer["user"] == "u1"
        assert answer["unknown_users"] == []
        assert answer["unknown_items"] == ["nothing"]
        probabilities = [each["click_probability"] for each in answer["ranking"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sorted(each["item"] for each in answer["ranking"]) == sorted(items)
        table = done("score", "u1", *items, "--triton", world.triton, directory=world.directory)
        shown = [line for line in table.splitlines() if re.search(r"0\.\d{4}", line)]
        for line, each in zip(shown, answer["ranking"], strict=True):
            assert each["item"] in line
            assert f"{each['click_probability']:.4f}" in line
        assert "nothing (not in the catalogue)" in table
        stranger = done("score", "[b]", "[/i]", "--triton", world.triton, directory=world.directory)
        assert "user [b] (nothing known)" in stranger
        assert "[/i] (not in the catalogue)" in stranger

    def test_a_user_comes_is_learned_and_is_forgotten(self, world: World) -> None:
        directory, store, user = world.directory, world.store, "new [/user]"
        items = list(world.dataset.items)
        log = write_log(directory / "more.csv", [(user, items[n], 1_700_000_000 + n, 1 + n % 5) for n in range(45)])
        kept = done("ingest", log, directory=directory, LIBER_STORE=store)
        assert kept == "kept 45 behaviors, 0 were there already; cut 2 partitions\n"
        kept = done("ingest", log, "--store", store, directory=directory)
        assert kept == "kept 0 behaviors, 0 were there already; cut 0 partitions\n"
        kept = done("ingest", "-", "--store", store, directory=directory, given=log.read_text())
        assert kept == "kept 0 behaviors, 45 were there already; cut 0 partitions\n"

        counts = json.loads(done("inspect", "--store", store, directory=directory))
        assert counts["users"] == 61
        assert counts["pending"] == {"summary": 2, "shift": 0, "representation": 0}
        before = done("score", user, *items[:5], "--json", "--triton", world.triton, directory=directory)
        report = json.loads(done("worker", "--drain", "--store", store, "--triton", world.triton, directory=directory))
        assert (report["summaries"], report["shifts"], report["representations"]) == (2, 1, 2)
        assert report["failed"] == report["dead"] == 0
        after = done("score", user, *items[:5], "--json", "--triton", world.triton, directory=directory)
        assert json.loads(before)["ranking"] != json.loads(after)["ranking"]

        held = json.loads(done("inspect", user, "--json", "--store", store, directory=directory))
        assert [each["vectors"][0]["dimension"] for each in held["partitions"]] == [8, 8]
        done("forget", user, "--yes", "--store", store, directory=directory)
        gone = done("score", user, *items[:5], "--json", "--triton", world.triton, directory=directory)
        assert json.loads(gone)["unknown_users"] == [user]

    def test_a_rebuild_switches_the_running_server(self, world: World, tiny_bert: Path) -> None:
        before = done("score", "u1", "m1", "--json", "--triton", world.triton, directory=world.directory)
        options = ("--encoder", tiny_bert, *FAST, "--seed", 2, "--triton", world.triton)
        built = done(*BUILD, *options, directory=world.directory)
        assert built.splitlines()[1:] == [f"published as version 2 of models; Triton at {world.triton} serves it"]
        after = done("score", "u1", "m1", "--json", "--triton", world.triton, directory=world.directory)
        assert json.loads(after)["ranking"] != json.loads(before)["ranking"]

    def test_a_reencode_needs_no_log_and_switches_the_running_server(self, world: World) -> None:
        directory = world.directory
        before = done("score", "u1", "m1", "--json", "--triton", world.triton, directory=directory)
        place = ("--store", "sqlite:///memory.db", "--output", "build")
        (was,) = json.loads(done("inspect", *place[:2], directory=directory))["encodings"]
        first, told = done("build", "re-encode", *place, *FAST, "--dimension", 6, directory=directory).splitlines()
        assert re.fullmatch(r"bundle [0-9a-f]{16} in build/bundle: validation AUC 0\.\d+, log loss \d\.\d{4}", first)
        manifest = json.loads((directory / "build" / "bundle" / "manifest.json").read_text())
        now = manifest["fingerprint"]
        assert (manifest["dimension"], manifest["history_length"]) == (6, 10)
        assert told == (
            f"vectors of {was} are still made beside those of {now}; when a Triton serves the new bundle, run: "
            "liber build switch --triton HOST:PORT"
        )
        again = done("score", "u1", "m1", "--json", "--triton", world.triton, directory=directory)
        assert again == before
        # Told too early it says that nothing new serves, by going back to what does.
        assert done("build", "switch", *place[:2], "--triton", world.triton, directory=directory) == ""
        assert json.loads(done("inspect", *place[:2], directory=directory))["encodings"] == [was]
        served = ("--repository", "models", "--triton", world.triton)
        _, told = done("build", "re-encode", *place, *FAST, *served, directory=directory).splitlines()
        assert re.fullmatch(rf"published as version \d of models; Triton at {world.triton} serves it", told)
        assert json.loads(done("inspect", *place[:2], directory=directory))["encodings"] == [now]
        after = done("score", "u1", "m1", "--json", "--triton", world.triton, directory=directory)
        assert json.loads(after)["ranking"] != json.loads(before)["ranking"]

    def test_a_backbone_of_ones_own_is_trained_exported_and_served(self, world: World) -> None:
        page = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text("utf-8")
        (world.directory / "my_model.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
        scored = ("score", "u1", *list(world.dataset.items)[:6], "--json", "--triton", world.triton)
        before = json.loads(done(*scored, directory=world.directory))
        place = ("--store", "sqlite:///memory.db", "--output", "build", "--repository", "models")
        options = ("--backbone", "my_model:MyModel", "--fusion", "paper", "--triton", world.triton)
        done("build", "re-encode", *place, *options, directory=world.directory)
        manifest = json.loads((world.directory / "build" / "bundle" / "manifest.json").read_text())
        assert (manifest["backbone"], manifest["fusion"]) == ("my_model:MyModel", "paper")
        after = json.loads(done(*scored, directory=world.directory))
        assert after["ranking"] != before["ranking"]
        assert {each["item"] for each in after["ranking"]} == {each["item"] for each in before["ranking"]}
        assert all(0 < each["click_probability"] < 1 for each in after["ranking"])

    def test_catalogue_and_profiles_alone(self, world: World, tmp_path: Path) -> None:
        data = world.directory / "data"
        tables = ("--items", data / "items.csv", "--domain", data / "domain.json", "--users", data / "users.csv")
        printed = done("ingest", *tables, "--store", "sqlite:///a.db", directory=tmp_path)
        assert printed == "80 items of 'films' are in the catalogue\n60 profiles are kept\n"
        shown = done("inspect", "u1", "--store", "sqlite:///a.db", directory=tmp_path)
        assert re.match(r"user u1\nage \d+, gender (fe)?male\n", shown)

    def test_texts_need_no_server(self, world: World, tmp_path: Path) -> None:
        data = world.directory / "data"
        tables = ("--items", data / "items.csv", "--domain", data / "domain.json")
        place = ("--store", "sqlite:///a.db")
        done("ingest", data / "behaviors.csv", *tables, *place, "--condition", "count(50)", directory=tmp_path)
        report = json.loads(done("worker", "--drain", "--texts-only", *place, directory=tmp_path))
        counts = json.loads(done("inspect", *place, directory=tmp_path))
        assert report["summaries"] == counts["partitions"] == counts["pending"]["representation"] > 0
        assert counts["pending"]["summary"] == counts["pending"]["shift"] == 0


class TestServe:
    def test_sigterm_ends_it_and_leaves_nothing(self, world: World, tmp_path: Path) -> None:
        with serving(tmp_path, "--repository", world.directory / "models", "--store", world.store) as (process, ready):
            assert ready.startswith("ready: gRPC 127.0.0.1:")
            assert list(Path("/dev/shm").glob(f"liber_{process.pid}_*"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) == 0
            assert not list(Path("/dev/shm").glob(f"liber_{process.pid}_*"))
        assert (tmp_path / "triton.log").stat().st_size

    def test_a_worker_that_waits_for_work_is_ended_by_sigterm(self, world: World) -> None:
        port = find_ports({"metrics": "127.0.0.2"}, {"metrics": 0})["metrics"]
        place = ("--store", world.store, "--triton", world.triton)
        arguments = command("worker", *place, "--metrics-port", port, "--metrics-host", "127.0.0.2")
        with subprocess.Popen(
            arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == "waiting for work; SIGTERM or Ctrl-C ends it\n"
            age = 'liber_queue_age_seconds{step="summary"}'
            while age not in (shown := scrape(f"127.0.0.2:{port}")):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0
        assert json.loads(printed)["dead"] == 0
        assert shown["liber_items"] == len(world.dataset.items)
        assert shown[age] == 0

    def test_what_was_restarted_is_shown_by_who_restarts_it(self, world: World) -> None:
        assert scrape(world.supervisor) == {
            "liber_server_up": 1,
            "liber_server_restarts_total": 0,
            "liber_stub_restarts_total": 0,
        }

    @pytest.mark.parametrize("service", ["grpc", "http", "metrics"])
    def test_a_port_in_use(self, world: World, busy_port: int, service: str) -> None:
        free = [option for name in ("grpc", "http", "metrics") if name != service for option in (f"--{name}-port", 0)]
        error = refused(
            *("serve", "--repository", "models", "--store", world.store),
            *(f"--{service}-port", busy_port, *free),
            directory=world.directory,
        )
        assert f"{service} port {busy_port} on 127.0.0.1 is already in use" in error

    def test_a_repository_without_models(self, world: World, tmp_path: Path) -> None:
        store = ("--store", world.store)
        error = refused("serve", "--repository", "nowhere", *store, directory=tmp_path)
        assert "no model repository at" in error
        assert "run `liber build`" in error
        (tmp_path / "empty").mkdir()
        assert "holds no models" in refused("serve", "--repository", "empty", *store, directory=tmp_path)

    def test_a_log_that_cannot_be_written(self, world: World, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        ports = ("--grpc-port", 0, "--http-port", 0, "--metrics-port", 0)
        place = ("--repository", world.directory / "models", "--store", world.store)
        arguments = (*place, "--log-file", tmp_path / "file" / "log", *ports)
        assert f"{tmp_path / 'file'}" in refused("serve", *arguments, directory=tmp_path)

    def test_a_store_that_is_not_there(self, world: World, tmp_path: Path) -> None:
        place = ("--repository", world.directory / "models", "--store", "sqlite:///typo.db")
        error = refused("serve", *place, directory=tmp_path)
        assert error.startswith(f"error: there is no store sqlite:///{tmp_path / 'typo.db'}; name another")
        assert not (tmp_path / "typo.db").exists()


class TestRefusals:
    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        error = refused("ingest", "nothing.csv", "--store", "sqlite:///a.db", directory=tmp_path)
        assert error == "error: nothing.csv does not exist; check the path"
        assert not (tmp_path / "a.db").exists()
        assert "data 'nothing' does not exist" in refused("build", "--data", "nothing", directory=tmp_path)
        assert "data 'nothing' does not exist" in refused("demo", directory=tmp_path, LIBER_DATA="nothing")

    def test_a_broken_line(self, tmp_path: Path) -> None:
        log = write_log(tmp_path / "log.csv", [("u", "i", 1, 3), ("u", "i[/b]", "now", 3)])
        error = refused("ingest", log, "--store", "sqlite:///a.db", directory=tmp_path)
        assert error.startswith(f"error: {log}, line 3: timestamp 'now' is neither")
        assert error.endswith("all before it is kept: correct the line and run the same command to go on")
        write_log(log, [("u", "i", 1, 3), ("u", "i[/b]", 2, 3)])
        kept = done("ingest", log, "--store", "sqlite:///a.db", directory=tmp_path)
        assert kept.startswith("kept 1 behaviors, 0 were there already")

    def test_nothing_to_do(self, tmp_path: Path) -> None:
        assert "there is nothing to ingest" in refused("ingest", directory=tmp_path)
        assert "--items and --domain go together" in refused("ingest", "--items", "items.csv", directory=tmp_path)
        for command in (("build",), ("build", "re-encode")):
            assert "--triton needs --repository" in refused(*command, "--triton", "127.0.0.1:1", directory=tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_repository_for_another_target(self, world: World, tmp_path: Path) -> None:
        told = refused("build", *PLACES, "--target", "gpu", directory=world.directory)
        assert "models is for target cpu, the bundle is to be published for gpu; name another --repository" in told
        told = refused("build", *PLACES, "--tensorrt", directory=world.directory)
        assert "TensorRT is for target gpu, not for cpu" in told
        assert "they need --repository" in refused("build", "--target", "gpu", directory=tmp_path)

    def test_a_backbone_nobody_knows(self, tmp_path: Path) -> None:
        error = refused("build", "--backbone", "DINE", directory=tmp_path)
        assert error.startswith("error: backbone 'DINE' is unknown; there are LR, DNN, ")
        assert error.endswith("or name your own as package.module:Class")
        assert not list(tmp_path.iterdir())

    def test_a_backbone_of_ones_own_is_found_in_the_current_directory(self, tmp_path: Path) -> None:
        """A console script has its own directory on the path, not the current one, as `python -m` has."""
        (tmp_path / "bin").mkdir()
        script = tmp_path / "bin" / "liber"
        script.write_text("from liber_runtime.cli import main\nmain()\n")
        (tmp_path / "own_model.py").write_text("class Model: ...\n")
        ended = subprocess.run(
            [sys.executable, script, "build", "--backbone", "own_model:Model"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: backbone 'own_model:Model' is no torch.nn.Module")

    def test_options_before_a_subcommand_are_not_ignored(self, tmp_path: Path) -> None:
        assert refused("build", "--dimension", 8, "re-encode", directory=tmp_path) == (
            "error: --dimension stands before 're-encode'; write `liber build re-encode --dimension ...`"
        )

    def test_there_is_nothing_to_encode_in_a_store_that_is_not_there(self, tmp_path: Path) -> None:
        for name in ("re-encode", "switch"):
            error = refused("build", name, directory=tmp_path, LIBER_STORE="sqlite:///typo.db")
            assert error.startswith("error: there is no store sqlite:///typo.db; name another")
        assert not list(tmp_path.iterdir())

    def test_a_data_set_nobody_knows(self, tmp_path: Path) -> None:
        assert refused("data", "ml-1m", directory=tmp_path) == (
            "error: no data set is called 'ml-1m'; there is ml-100k"
        )

    def test_a_server_that_is_not_there(self, tmp_path: Path, dead_port: int) -> None:
        error = refused("score", "u", "i", "--triton", f"127.0.0.1:{dead_port}", directory=tmp_path)
        assert error.startswith(f"error: no Triton answers at 127.0.0.1:{dead_port} (")
        assert "liber serve" in error

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (None, "domain.json does not exist; check the path"),
            (b"{", "domain.json is not a JSON object in UTF-8 (Expecting property name"),
            (b"\xff\xfe", "domain.json is not a JSON object in UTF-8 ('utf-8' codec can't decode"),
            (b"[]", "domain.json is not a JSON object but []"),
            (b'{"name": 3}', "domain.json: name 3: Input should be a valid string"),
            (b'{"nom": "x"}', "domain.json: nom 'x': Extra inputs are not permitted"),
            (b'{"name": "x"}', "domain.json lacks item_noun"),
            (json.dumps(DOMAIN | {"positive_above": 9}).encode(), "domain.json: positive_above 9.0"),
        ],
    )
    def test_a_description_that_cannot_be_used(self, tmp_path: Path, content: bytes | None, reason: str) -> None:
        (tmp_path / "items.csv").write_text("item,title\ni,One\n")
        if content is not None:
            (tmp_path / "domain.json").write_bytes(content)
        tables = ("--items", "items.csv", "--domain", "domain.json", "--store", "sqlite:///a.db")
        assert reason in refused("ingest", *tables, directory=tmp_path)
        assert not (tmp_path / "a.db").exists()

    def test_a_store_made_with_another_condition(self, tmp_path: Path) -> None:
        log = write_log(tmp_path / "log.csv", [("u", "i", 1, 3)])
        done("ingest", log, "--store", "sqlite:///a.db", "--condition", "count(5)", directory=tmp_path)
        error = refused("ingest", log, "--store", "sqlite:///a.db", "--condition", "count(6)", directory=tmp_path)
        assert "cuts partitions by count(5), not count(6)" in error
        error = refused("ingest", log, "--store", "sqlite:///b.db", "--condition", "cont(5)", directory=tmp_path)
        assert "partition condition 'cont(5)' is not understood" in error

    def test_a_store_of_an_unknown_kind(self, tmp_path: Path) -> None:
        assert "store 'memory.db' is not understood; write sqlite:///" in refused(
            "inspect", "--store", "memory.db", directory=tmp_path
        )
        (tmp_path / "notes.txt").write_text("no database, but long enough to look for one" * 50)
        assert "notes.txt" in refused("inspect", "--store", "sqlite:///notes.txt", directory=tmp_path)

    def test_a_setting_that_cannot_be_used(self, tmp_path: Path) -> None:
        error = refused("score", "u", "i", directory=tmp_path, LIBER_THREADS="abc")
        assert error.startswith("error: LIBER_THREADS='abc' is not usable (")

    def test_texts_without_a_catalogue(self, world: World, tmp_path: Path) -> None:
        place = ("--store", "sqlite:///a.db")
        done("ingest", world.directory / "data" / "behaviors.csv", *place, directory=tmp_path)
        error = refused("worker", "--drain", "--texts-only", *place, directory=tmp_path)
        assert "the store has no items; ingest the item table first" in error

    @pytest.mark.parametrize("arguments", [("score",), ("score", "u"), ("scores",), ("build", "--dimension", "0")])
    def test_a_wrong_call_ends_with_status_2(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        ended = liber(*arguments, directory=tmp_path)
        assert ended.returncode == 2
        assert "Traceback" not in ended.stderr
        assert "--help" in ended.stderr


class TestHelp:
    def test_every_command_and_every_option_is_explained(self) -> None:
        commands = typer.main.get_command(application).commands  # type: ignore[attr-defined]
        assert set(commands) == {
            *("demo", "ingest", "worker", "serve", "score", "inspect", "export", "forget", "rewrite", "build", "data"),
            "cost",
        }
        for name, each in commands.items():
            assert each.help, name
            for parameter in each.params:
                assert parameter.help, f"{name} {parameter.name}"

    @pytest.mark.parametrize("name", ["demo", "ingest", "worker", "serve", "score", "inspect", "forget", "build"])
    def test_help_shows_them(self, tmp_path: Path, name: str) -> None:
        shown = done(name, "--help", directory=tmp_path)
        assert "--no-" not in shown
        if name in ("ingest", "worker", "serve", "inspect", "forget", "build"):
            assert "LIBER_STORE" in shown

    def test_without_a_command_it_says_what_there_is(self, tmp_path: Path) -> None:
        assert "Score candidates for a user" in done("--help", directory=tmp_path)
        assert re.fullmatch(r"\d+\.\d+\.\d+\n", done("--version", directory=tmp_path))
