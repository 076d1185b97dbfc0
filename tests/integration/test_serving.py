"""A server that goes on: bundles are switched, refused and broken under it, users learn, are new, are forgotten."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc
from conftest import (
    Built,
    Matrix,
    Questions,
    Running,
    await_true,
    copy_build,
    opened,
    predict_offline,
    share_encoder,
    users_with_partitions,
)

from builders.build import build
from builders.bundle import write_bundle
from builders.repository import BUNDLE_ENSEMBLES, KEPT_VERSIONS, PARTS_OF_MODEL, deploy, publish, read_config
from liber_runtime.behavior import Behavior
from liber_runtime.bundle import BACKBONE, ENCODER, PARTS, VOCABULARY
from liber_runtime.exceptions import ConfigurationError, ScoringError
from liber_runtime.memory import MemoryStore
from liber_runtime.metrics import registry_of
from liber_runtime.representation import Encoded, TritonEncoder
from liber_runtime.scoring import ScoringClient
from liber_runtime.server import TritonServer
from liber_runtime.server.stubs import ModelVersion, parse_stub
from liber_runtime.worker import Worker, WorkerReport
from liber_runtime.writers.statistical import StatisticalWriter


def rebuild(built: Built, directory: Path, **changes: object) -> Built:
    """Another bundle over the same store, made in `directory`."""
    settings = dataclasses.replace(built.settings, **changes)  # type: ignore[arg-type]
    if settings.encoder == built.settings.encoder and directory != built.directory:
        share_encoder(built.directory / "knowledge", directory / "knowledge")
    with opened(built) as store:
        manifest, _ = build(store, built.dataset, StatisticalWriter(), directory, settings)
    return dataclasses.replace(built, directory=directory, manifest=manifest, settings=settings)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, built: Built) -> Iterator[Running]:
    """A server on a repository and a store that this module's tests may do anything to."""
    directory = tmp_path_factory.mktemp("own")
    copied = copy_build(built, directory / "built")
    publish(copied.bundle, directory / "model_repository")
    server = TritonServer(
        directory / "model_repository",
        log_file=directory / "triton.log",
        environment={"LIBER_STORE": copied.store_url},
    )
    with server:
        yield Running(server, copied, directory / "model_repository")


@pytest.fixture
def scoring(own: Running) -> Iterator[ScoringClient]:
    with ScoringClient(own.url) as client:
        yield client


@pytest.fixture
def memory(own: Running) -> Iterator[MemoryStore]:
    with opened(own.built) as store:
        yield store


def users_without_partitions(built: Built) -> list[str]:
    return sorted({each.user_id for each in built.dataset.behaviors} - set(users_with_partitions(built)))


@pytest.fixture
def questions(own: Running) -> Questions:
    return Questions(own.built)


@pytest.fixture(scope="module")
def plain(own: Running, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The backbone without LIBER, over the same store."""
    return rebuild(own.built, tmp_path_factory.mktemp("plain") / "built", fusion="none", seed=2)


def test_a_new_bundle_takes_over_between_two_answers(own: Running, questions: Questions, plain: Built) -> None:
    assert plain.manifest.bundle_id != own.built.manifest.bundle_id
    assert (own.built.manifest.fused, plain.manifest.fused) == (True, False)
    # The same encoder, the same PCA: the store's vectors are the new bundle's too.
    assert plain.manifest.fingerprint == own.built.manifest.fingerprint
    require_seamless_switch(own, questions, plain)


def require_seamless_switch(own: Running, questions: Questions, second: Built) -> None:
    """Has the server take another bundle under load: each answer is the one's or the other's, and none is missing."""
    answers: list[list[Matrix]] = [[] for _ in range(4)]
    stop = threading.Event()
    failures: list[Exception] = []

    def ask(into: list[Matrix]) -> None:
        with ScoringClient(own.url, own_connection=True) as client:
            while not stop.is_set():
                try:
                    into.append(questions.ask(client))
                except Exception as error:
                    failures.append(error)

    with ScoringClient(own.url) as client:
        old = questions.ask(client)
        threads = [threading.Thread(target=ask, args=(into,)) for into in answers]
        for thread in threads:
            thread.start()
        await_true(lambda: all(len(each) > 5 for each in answers))
        deploy(second.bundle, own.repository, own.url)
        new = questions.ask(client)
        seen = [len(each) for each in answers]
        await_true(lambda: all(len(each) > before + 5 for each, before in zip(answers, seen, strict=True)))
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert own.server.stub_restarts == own.server.server_restarts == 0
    assert np.abs(old - new).max() > 1e-3
    for each in answers:
        is_old = [np.allclose(answer, old, atol=1e-6) for answer in each]
        is_new = [np.allclose(answer, new, atol=1e-6) for answer in each]
        assert all(one != other for one, other in zip(is_old, is_new, strict=True))
        # One thread's requests follow each other: once it was answered by the new bundle, the old one is gone.
        assert is_new == sorted(is_new)
        assert is_old[0]
        assert is_new[-1]


def test_the_backbone_is_served_without_liber_and_with_it_again(
    own: Running, questions: Questions, plain: Built, memory: MemoryStore, scoring: ScoringClient
) -> None:
    # Two versions stay; with the second of them the fuser is needed no more.
    for _ in range(2):
        deploy(plain.bundle, own.repository, own.url)
    users, items, offline = predict_offline(plain, memory)
    np.testing.assert_allclose(scoring.score(users, items).probability, offline, atol=1e-5)
    assert not (own.repository / "attention_fuser").exists()
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(own.url)) as raw:
        assert not raw.is_model_ready("attention_fuser")
    require_seamless_switch(own, questions, own.built)


def test_only_the_newest_two_versions_stay_and_serve(own: Running, questions: Questions) -> None:
    last = deploy(own.built.bundle, own.repository, own.url)
    while last <= KEPT_VERSIONS:
        last = deploy(own.built.bundle, own.repository, own.url)
    for model in (*PARTS_OF_MODEL, *BUNDLE_ENSEMBLES):
        kept = {entry.name for entry in (own.repository / model).iterdir() if entry.is_dir()}
        assert kept == {str(last - 1), str(last)}
    with ScoringClient(own.url) as client:
        assert np.isfinite(questions.ask(client)).all()


def test_vectors_of_another_encoder_are_refused_until_their_bundle_is_back(
    own: Running, questions: Questions, other_bert: Path, exported_other: Path, tmp_path: Path
) -> None:
    share_encoder(exported_other, tmp_path / "other" / "knowledge")
    foreign = rebuild(copy_build(own.built, tmp_path / "copy"), tmp_path / "other", encoder=str(other_bert))
    ours, theirs = own.built.manifest.fingerprint, foreign.manifest.fingerprint
    assert ours != theirs
    # The vectors that served stay beside the new ones, and no text was written again.
    assert _knowledge(foreign) == [(text, {ours, theirs}) for text, _ in _knowledge(own.built)]
    newcomers = users_without_partitions(own.built)
    items = list(own.built.dataset.items)[:3]
    with ScoringClient(own.url) as client:
        deploy(own.built.bundle, own.repository, own.url)
        before = questions.ask(client)
        deploy(foreign.bundle, own.repository, own.url)
        with pytest.raises(ScoringError) as refused:
            questions.ask(client)
        assert refused.value.status == "UNAVAILABLE"
        message = str(refused.value)
        assert ours in message
        assert theirs in message
        assert "liber build" in message
        assert "\n" not in message
        assert len(newcomers) >= 2
        scores = client.score(newcomers, items[:1] * len(newcomers))
        assert scores.unknown_users == ()
        assert np.isfinite(scores.probability).all()
        assert client.score("nobody", items).unknown_users == ("nobody",)
        deploy(own.built.bundle, own.repository, own.url)
        np.testing.assert_allclose(questions.ask(client), before, atol=1e-6)


class TestABrokenBundle:
    def test_that_was_changed_is_not_published(self, own: Running, tmp_path: Path) -> None:
        broken = tmp_path / "bundle"
        shutil.copytree(own.built.bundle, broken)
        _cut_short(broken / BACKBONE)
        before = sorted(own.repository.rglob("*"))
        with pytest.raises(ConfigurationError, match=f"{BACKBONE} is not the file the manifest was written for"):
            deploy(broken, own.repository, own.url)
        assert sorted(own.repository.rglob("*")) == before

    @pytest.mark.parametrize(
        ("part", "model"),
        [(VOCABULARY, "user_memory"), (BACKBONE, "ctr_backbone"), (ENCODER, "bert_encoder")],
    )
    async def test_that_does_not_load_leaves_the_one_that_serves(
        self, own: Running, questions: Questions, scoring: ScoringClient, tmp_path: Path, part: str, model: str
    ) -> None:
        before, held = questions.ask(scoring), _files(own.repository)
        broken = _forge(own.built, tmp_path / "bundle", part)
        with pytest.raises(ScoringError, match=rf"{model}.*{part}.* cannot be") as refused:
            deploy(broken, own.repository, own.url)
        message = str(refused.value)
        assert "\n" not in message
        assert "Traceback" not in message
        np.testing.assert_allclose(questions.ask(scoring), before, atol=1e-6)
        assert (await _encode(own, [("summary", "shift")])).fingerprint == own.built.manifest.fingerprint
        # Nothing is left that a restart of the server, or the next bundle, would stumble over.
        now = _files(own.repository)
        assert now.items() <= held.items()
        newest = max(int(path.name) for path in (own.repository / model).iterdir() if path.is_dir())
        assert _pinned(own.repository) == {newest}

    def test_is_replaced_by_the_next_good_one(self, own: Running, questions: Questions, tmp_path: Path) -> None:
        with ScoringClient(own.url) as client:
            before = questions.ask(client)
            with pytest.raises(ScoringError, match="ctr_backbone"):
                deploy(_forge(own.built, tmp_path / "bundle", BACKBONE), own.repository, own.url)
            deploy(own.built.bundle, own.repository, own.url)
            np.testing.assert_allclose(questions.ask(client), before, atol=1e-6)

    def test_a_server_that_is_not_there_takes_none(self, own: Running) -> None:
        before = _pinned(own.repository)
        # A port that is taken and not listened on is nobody else's either.
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            url = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(ScoringError, match=f"no Triton answers at {url}"):
                deploy(own.built.bundle, own.repository, url)
        assert _pinned(own.repository) == before


@pytest.mark.parametrize("model", ["ctr_backbone", "user_memory"])
def test_a_model_whose_process_is_killed_comes_back_by_itself(
    own: Running, questions: Questions, scoring: ScoringClient, model: str
) -> None:
    before, restarts = questions.ask(scoring), own.server.stub_restarts
    (version,) = _pinned(own.repository)
    serving = ModelVersion(model, str(version))
    # One that a withdrawn bundle had under the same number may still be ending.
    await_true(lambda: len(_stubs(own, serving)) == 1)
    _stubs(own, serving)[0].kill()

    def is_served() -> bool:
        try:
            return bool(np.allclose(questions.ask(scoring), before, atol=1e-6))
        except ScoringError:
            return False

    await_true(lambda: own.server.stub_restarts > restarts and is_served())
    assert own.server.stub_restarts == restarts + 1
    assert own.server.server_restarts == 0
    shown = registry_of(own.server)
    assert shown.get_sample_value("liber_stub_restarts_total") == restarts + 1
    assert shown.get_sample_value("liber_server_up") == 1


class TestLearning:
    async def test_the_server_encodes_as_the_build_did(self, own: Running, memory: MemoryStore) -> None:
        records = [
            record
            for user in users_with_partitions(own.built)
            if (timeline := memory.timeline(user))
            for record in timeline.partitions
        ]
        texts = [(r.summary.text, r.shift.text if r.shift else "") for r in records if r.summary]
        encoded = await _encode(own, texts)
        assert len(texts) == len(records) > 100
        assert encoded.fingerprint == own.built.manifest.fingerprint
        fingerprint = own.built.manifest.fingerprint
        stored = np.stack([record.representations[fingerprint].vector for record in records])
        np.testing.assert_allclose(encoded.vectors, stored, atol=1e-5)

    async def test_a_partition_more_changes_the_next_score(
        self, own: Running, memory: MemoryStore, scoring: ScoringClient
    ) -> None:
        user = users_with_partitions(own.built)[0]
        items = list(own.built.dataset.items)[:10]
        count = _partitions(memory, user)
        assert memory.append(_picks(own.built, user, 20)).partitions == 1
        # The history has moved already, the interest has not.
        behind = scoring.score(user, items).probability
        report = await _learn(memory, own)
        assert (report.summaries, report.shifts, report.representations) == (1, 1, 1)
        assert _partitions(memory, user) == count + 1
        (held,) = memory.read([user], 0, count + 1, own.built.manifest.fingerprint)
        assert held is not None
        assert len(held.representations) == count + 1
        assert np.abs(scoring.score(user, items).probability - behind).max() > 1e-6

    async def test_a_new_user_becomes_known_and_gets_a_first_partition(
        self, own: Running, memory: MemoryStore, scoring: ScoringClient, fresh_user: str
    ) -> None:
        items = list(own.built.dataset.items)[:10]
        nobody = scoring.score(fresh_user, items)
        assert nobody.unknown_users == (fresh_user,)
        picks = _picks(own.built, fresh_user, 20)
        assert memory.append(picks[:19]).partitions == 0
        known = scoring.score(fresh_user, items)
        assert known.unknown_users == ()
        assert np.abs(known.probability - nobody.probability).max() > 1e-6
        assert memory.append(picks[19:]).partitions == 1
        behind = scoring.score(fresh_user, items).probability
        report = await _learn(memory, own)
        assert (report.summaries, report.shifts, report.representations) == (1, 0, 1)
        (held,) = memory.read([fresh_user], 0, 5, own.built.manifest.fingerprint)
        assert held is not None
        assert held.representations.shape == (1, own.built.settings.dimension)
        assert np.abs(scoring.score(fresh_user, items).probability - behind).max() > 1e-6

    def test_a_rebuild_from_a_log_that_lags_behind_learns_from_that_log_alone(
        self, own: Running, memory: MemoryStore
    ) -> None:
        user = users_with_partitions(own.built)[1]
        memory.append(_picks(own.built, user, 40))
        again = rebuild(own.built, own.built.directory)
        assert again.manifest.bundle_id == own.built.manifest.bundle_id
        assert _partitions(memory, user) > 2

    async def test_a_forgotten_user_is_unknown_to_the_next_score(
        self, own: Running, memory: MemoryStore, scoring: ScoringClient, fresh_user: str
    ) -> None:
        items = list(own.built.dataset.items)[:10]
        nobody = scoring.score(fresh_user, items).probability
        memory.describe(profiles={fresh_user: {"age": 30, "gender": "female"}})
        memory.append(_picks(own.built, fresh_user, 45))
        await _learn(memory, own)
        assert scoring.score(fresh_user, items).unknown_users == ()
        forgotten = memory.forget(fresh_user)
        assert (forgotten.behaviors, forgotten.partitions) == (45, 2)
        after = scoring.score(fresh_user, items)
        assert after.unknown_users == (fresh_user,)
        np.testing.assert_allclose(after.probability, nobody, atol=1e-7)


def _forge(built: Built, directory: Path, part: str) -> Path:
    """The bundle with one part cut short, and a manifest that knows no better."""
    parts = {name: built.bundle / name for name in PARTS}
    parts[part] = directory.parent / part
    shutil.copyfile(built.bundle / part, parts[part])
    _cut_short(parts[part])
    kept = built.manifest.model_dump(exclude={"format", "bundle_id", "created_at", "digests", "encoder", "fused"})
    write_bundle(parts, directory, encoder=built.manifest.encoder, **kept)
    return directory


def _cut_short(path: Path) -> None:
    content = path.read_bytes()
    # Another file, for the old one may be linked to.
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def _files(repository: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}


def _pinned(repository: Path) -> set[int]:
    configs = [read_config(repository / name / "config.pbtxt") for name in BUNDLE_ENSEMBLES]
    return {step.model_version for config in configs for step in config.ensemble_scheduling.step}


async def _encode(running: Running, texts: list[tuple[str, str]]) -> Encoded:
    encoder = TritonEncoder(running.url)
    try:
        return await encoder.encode(texts)
    finally:
        await encoder.close()


async def _learn(memory: MemoryStore, running: Running) -> WorkerReport:
    encoder = TritonEncoder(running.url)
    try:
        return await Worker(memory, StatisticalWriter(), encoder).drain()
    finally:
        await encoder.close()


def _picks(built: Built, user: str, count: int) -> list[Behavior]:
    items = list(built.dataset.items)
    begin = built.dataset.behaviors[-1].timestamp
    return [Behavior(user, items[(7 * n) % len(items)], float(1 + n % 5), begin + n, f"new-{n}") for n in range(count)]


def _knowledge(built: Built) -> list[tuple[str, set[str]]]:
    """Of every partition the texts and what its vectors were made by."""
    with opened(built) as store:
        timelines = [timeline for user in store.users() if (timeline := store.timeline(user))]
    return [
        (
            "".join(f"{text.text}, {text.made_at}" for text in (record.summary, record.shift) if text),
            set(record.representations),
        )
        for timeline in timelines
        for record in timeline.partitions
    ]


def _partitions(memory: MemoryStore, user: str) -> int:
    timeline = memory.timeline(user)
    return len([each for each in timeline.partitions if each.representations]) if timeline else 0


def _stubs(running: Running, model: ModelVersion) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(running.server.process_id).children():
        with contextlib.suppress(psutil.Error):
            stub = parse_stub(process.cmdline())
            if stub is not None and stub.model == model:
                found.append(process)
    return found
