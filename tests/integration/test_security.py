"""Who may call the real tritonserver, and what of it: TLS, certificates of callers, the control key."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import trustme
from conftest import Built, Questions, Running, await_true, copy_build, opened
from tritonclient.utils import InferenceServerException

from builders.repository import deploy, publish
from liber_runtime.behavior import Behavior
from liber_runtime.channel import open_async_client, open_client
from liber_runtime.credentials import CONTROL_HEADER, GRPC_HEADER_PREFIX
from liber_runtime.exceptions import ConfigurationError, ScoringError
from liber_runtime.grpc_errors import explain
from liber_runtime.model_control import load_models, unload_models
from liber_runtime.scoring import AsyncScoringClient, ScoringClient
from liber_runtime.server import Security, TritonServer
from liber_runtime.server.stubs import parse_stub
from liber_runtime.settings import Settings

CONTROL_KEY = "the+control/key_of-this.test=="

MODEL = """
class TritonPythonModel:
    def execute(self, requests):
        return []
"""


@dataclasses.dataclass(frozen=True)
class Authority:
    """A certificate authority, and where its files go."""

    directory: Path
    issuer: trustme.CA

    @property
    def file(self) -> Path:
        path = self.directory / "ca.pem"
        self.issuer.cert_pem.write_to_path(str(path))
        return path

    def issue(self, host: str, **validity: datetime.datetime) -> tuple[Path, Path]:
        """A certificate for a host, and its key."""
        made = self.issuer.issue_cert(host, **validity)
        certificate, key = self.directory / f"{host}.crt", self.directory / f"{host}.key"
        certificate.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
        key.touch(0o600)
        key.write_bytes(made.private_key_pem.bytes())
        return certificate, key


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), trustme.CA())


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"), trustme.CA())


@pytest.fixture(scope="module")
def secured(
    tmp_path_factory: pytest.TempPathFactory, built: Built, authority: Authority
) -> Iterator[tuple[Running, str]]:
    """A server that knows its callers, on all addresses; and host:port of its gRPC as its certificate has it."""
    directory = tmp_path_factory.mktemp("secured")
    copied = copy_build(built, directory / "built")
    publish(copied.bundle, directory / "model_repository")
    certificate, key = authority.issue("127.0.0.1")
    server = TritonServer(
        directory / "model_repository",
        log_file=directory / "triton.log",
        host="0.0.0.0",
        security=Security(certificate, key, authority.file, CONTROL_KEY),
        environment={"LIBER_STORE": copied.store_url},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBER_CONTROL_KEY", CONTROL_KEY)
        server.start()
    try:
        yield Running(server, copied, directory / "model_repository"), server.grpc_url.replace("0.0.0.0", "127.0.0.1")
    finally:
        server.stop()


@pytest.fixture(scope="module")
def friendly(authority: Authority) -> Settings:
    """What a caller needs that the server knows: everything but the control key."""
    certificate, key = authority.issue("friend.example")
    return Settings(tls_ca=authority.file, tls_certificate=certificate, tls_key=key, deadline_seconds=20)


@pytest.fixture
def environment(friendly: Settings) -> dict[str, str]:
    return {
        "LIBER_TLS_CA": str(friendly.tls_ca),
        "LIBER_TLS_CERTIFICATE": str(friendly.tls_certificate),
        "LIBER_TLS_KEY": str(friendly.tls_key),
    }


@pytest.fixture
def questions(secured: tuple[Running, str]) -> Questions:
    return Questions(secured[0].built)


def liber(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LIBER_")}
    return subprocess.run(
        [sys.executable, "-m", "liber_runtime.cli", *map(str, arguments)],
        env={**inherited, "COLUMNS": "200", **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )


def score_error(url: str, settings: Settings, own_connection: bool = True) -> str:
    """The one line that a call ends with which was to fail."""
    with ScoringClient(url, settings, own_connection=own_connection) as client, pytest.raises(ScoringError) as refused:
        client.score("user", ["item"])
    assert refused.value.status == "UNAVAILABLE"
    assert "\n" not in str(refused.value)
    return str(refused.value)


class TestScoringOverTls:
    def test_known_callers_are_served_as_ever(
        self, secured: tuple[Running, str], friendly: Settings, questions: Questions
    ) -> None:
        with (
            ScoringClient(secured[1], friendly) as first,
            ScoringClient(secured[1], friendly, own_connection=True) as second,
        ):
            answer = questions.ask(first)
            assert np.all((answer > 0) & (answer < 1))
            np.testing.assert_allclose(questions.ask(second), answer, atol=1e-6)

    async def test_asynchronous_ones_too(
        self, secured: tuple[Running, str], friendly: Settings, questions: Questions
    ) -> None:
        async with AsyncScoringClient(secured[1], friendly) as client:
            assert len((await client.score(questions.users, questions.items)).probability) == len(questions.items)

    def test_the_commands_take_it_from_the_environment(
        self, secured: tuple[Running, str], environment: dict[str, str], fresh_user: str
    ) -> None:
        running, url = secured
        item = next(iter(running.built.dataset.items))
        with opened(running.built) as store:
            behaviors = [Behavior(fresh_user, item, 4.0, 1.6e9 + place, str(place)) for place in range(25)]
            store.append(behaviors)
        worked = liber("worker", "--drain", "--store", running.built.store_url, "--triton", url, **environment)
        assert worked.returncode == 0, worked.stderr
        assert json.loads(worked.stdout)["representations"] >= 1
        scored = liber("score", fresh_user, item, "--json", "--triton", url, **environment)
        assert scored.returncode == 0, scored.stderr
        assert json.loads(scored.stdout)["unknown_users"] == []

    def test_a_command_that_is_refused_says_so_in_one_line(
        self, secured: tuple[Running, str], environment: dict[str, str], stranger: Authority
    ) -> None:
        scored = liber(
            "score", "user", "item", "--triton", secured[1], **environment | {"LIBER_TLS_CA": str(stranger.file)}
        )
        assert scored.returncode == 1
        assert scored.stderr == (
            f"error: Triton at {secured[1]} shows a certificate that LIBER_TLS_CA does not vouch for; name the "
            "authority that issued it\n"
        )


class TestStrangers:
    def test_without_a_certificate(self, secured: tuple[Running, str], friendly: Settings) -> None:
        settings = friendly.model_copy(update={"tls_certificate": None, "tls_key": None})
        said = score_error(secured[1], settings)
        assert said.startswith(f"Triton at {secured[1]} hung up before the first call")
        assert "LIBER_TLS_CERTIFICATE and LIBER_TLS_KEY" in said

    def test_with_a_certificate_of_another_authority(
        self, secured: tuple[Running, str], friendly: Settings, stranger: Authority
    ) -> None:
        certificate, key = stranger.issue("friend.example")
        settings = friendly.model_copy(update={"tls_certificate": certificate, "tls_key": key})
        assert "hung up before the first call" in score_error(secured[1], settings)

    @pytest.mark.parametrize("own_connection", [False, True])
    def test_in_plain_text(self, secured: tuple[Running, str], friendly: Settings, own_connection: bool) -> None:
        said = score_error(secured[1], friendly.without_tls, own_connection)
        assert "hung up before the first call, as one does that speaks TLS only" in said
        assert "set LIBER_TLS_CA" in said

    def test_who_are_not_sure_of_the_server(
        self, secured: tuple[Running, str], friendly: Settings, stranger: Authority
    ) -> None:
        settings = friendly.model_copy(update={"tls_ca": stranger.file})
        assert "shows a certificate that LIBER_TLS_CA does not vouch for" in score_error(secured[1], settings)

    def test_who_call_it_by_another_name(self, secured: tuple[Running, str], friendly: Settings) -> None:
        url = secured[1].replace("127.0.0.1", "localhost")
        assert f"Triton at {url} shows a certificate that is for another host" in score_error(url, friendly)

    def test_from_other_machines_find_no_http(self, secured: tuple[Running, str]) -> None:
        server = secured[0].server
        addresses = {
            each.laddr.port: each.laddr.ip
            for each in psutil.Process(server.process_id).net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        }
        ports = {
            name: int(url.rpartition(":")[2]) for name, url in (("http", server.http_url), ("grpc", server.grpc_url))
        }
        assert addresses[ports["grpc"]] in ("0.0.0.0", "::")
        assert addresses[ports["http"]] == "127.0.0.1"


RESTRICTED: dict[str, Callable[[Any, dict[str, str]], object]] = {
    "load": lambda client, headers: client.load_model("liber_score", headers=headers),
    "unload": lambda client, headers: client.unload_model("user_memory", headers=headers),
    "index": lambda client, headers: client.get_model_repository_index(headers=headers),
    "shared memory": lambda client, headers: client.register_system_shared_memory("any", "/any", 8, headers=headers),
    "CUDA memory": lambda client, headers: client.register_cuda_shared_memory("any", b"", 0, 8, headers=headers),
    "trace": lambda client, headers: client.update_trace_settings(settings={"trace_file": "/any"}, headers=headers),
    "logging": lambda client, headers: client.update_log_settings({"log_file": "/any"}, headers=headers),
}


class TestModelControl:
    @pytest.mark.parametrize("name", RESTRICTED)
    @pytest.mark.parametrize("key", [None, "another/key_of-this.test"])
    def test_over_grpc_without_the_key(
        self, secured: tuple[Running, str], friendly: Settings, name: str, key: str | None
    ) -> None:
        headers = {} if key is None else {GRPC_HEADER_PREFIX + CONTROL_HEADER: key}
        with contextlib.closing(open_client(secured[1], friendly)) as client:
            with pytest.raises(InferenceServerException, match="protocol is restricted") as refused:
                RESTRICTED[name](client, headers)
            assert client.is_model_ready("user_memory")
        said = explain(refused.value, "host:1", 1)
        assert said.status == "PERMISSION_DENIED"
        assert str(said).startswith(
            "Triton at host:1 lets itself be controlled by those alone who have its control key"
        )

    async def test_over_grpc_asynchronously(self, secured: tuple[Running, str], friendly: Settings) -> None:
        client = open_async_client(secured[1], friendly)
        with pytest.raises(InferenceServerException, match="protocol is restricted"):
            await client.load_model("liber_score")
        await client.close()

    @pytest.mark.parametrize(
        "path",
        [
            *(
                "v2/repository/index",
                "v2/repository/models/user_memory/unload",
                "v2/repository/models/liber_score/load",
            ),
            *("v2/systemsharedmemory/region/any/register", "v2/cudasharedmemory/region/any/register"),
            *("v2/trace/setting", "v2/logging"),
        ],
    )
    @pytest.mark.parametrize("key", [None, "another/key_of-this.test"])
    def test_over_http_without_the_key(self, secured: tuple[Running, str], path: str, key: str | None) -> None:
        connection = http.client.HTTPConnection(secured[0].server.http_url, timeout=20)
        with contextlib.closing(connection):
            connection.request("POST", f"/{path}", body="{}", headers={} if key is None else {CONTROL_HEADER: key})
            answer = connection.getresponse()
            assert (answer.status, b"restricted" in answer.read()) == (403, True)
            connection.request("GET", "/v2/models/user_memory/ready")
            assert connection.getresponse().status == 200

    @pytest.mark.parametrize(
        "change", [{}, {"control_key": Settings(control_key="another/key_of-this.test").control_key}]
    )
    def test_ours_without_the_key(
        self, secured: tuple[Running, str], friendly: Settings, change: dict[str, object]
    ) -> None:
        for control in (load_models, unload_models):
            with pytest.raises(
                ScoringError, match="set LIBER_CONTROL_KEY or LIBER_CONTROL_KEY_FILE to the key"
            ) as refused:
                control(secured[1], ["liber_score"], friendly.model_copy(update=change))
            assert CONTROL_KEY not in str(refused.value)

    def test_a_bundle_is_not_published_without_the_key(
        self, secured: tuple[Running, str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running, url = secured
        versions = sorted(path.name for path in (running.repository / "liber_score").iterdir())
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ScoringError, match="LIBER_CONTROL_KEY"):
            deploy(running.built.bundle, running.repository, url)
        assert sorted(path.name for path in (running.repository / "liber_score").iterdir()) == versions
        monkeypatch.setenv("LIBER_CONTROL_KEY", "short")
        with pytest.raises(ConfigurationError, match=r"^the control key has 5 characters"):
            deploy(running.built.bundle, running.repository, url)
        assert sorted(path.name for path in (running.repository / "liber_score").iterdir()) == versions

    def test_ours_with_the_key_from_a_file(
        self,
        secured: tuple[Running, str],
        environment: dict[str, str],
        questions: Questions,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        secret = tmp_path / "key"
        secret.touch(0o600)
        secret.write_text(CONTROL_KEY + "\n")
        for name, value in (environment | {"LIBER_CONTROL_KEY_FILE": str(secret)}).items():
            monkeypatch.setenv(name, value)
        unload_models(secured[1], ["liber_score"])
        with ScoringClient(secured[1]) as client:
            with pytest.raises(ScoringError, match="no such model"):
                client.score("user", ["item"])
            load_models(secured[1], ["liber_score"])
            questions.ask(client)

    def test_the_supervisor_has_it(self, secured: tuple[Running, str]) -> None:
        server = secured[0].server
        (stub,) = stubs(server, "ctr_backbone")[-1:]
        stub.kill()
        await_true(lambda: server.stub_restarts == 1)
        assert server.server_restarts == 0

    def test_nothing_of_ours_tells_it(self, secured: tuple[Running, str]) -> None:
        server = secured[0].server
        assert CONTROL_KEY not in server.log_file.read_text()
        assert "model_repository" in server.log_file.read_text()  # Triton's dump of its options is in it
        assert CONTROL_KEY not in repr(server._security)
        for process in [psutil.Process(server.process_id), *stubs(server, "user_memory")]:
            assert CONTROL_KEY not in process.environ().values()


def stubs(server: TritonServer, model: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(server.process_id).children():
        with contextlib.suppress(psutil.Error):
            stub = parse_stub(process.cmdline())
            if stub is not None and stub.model.name == model:
                found.append(process)
    return found


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A repository with a model that nobody calls."""
    (tmp_path / "repository" / "tiny" / "1").mkdir(parents=True)
    (tmp_path / "repository" / "tiny" / "1" / "model.py").write_text(MODEL)
    (tmp_path / "repository" / "tiny" / "config.pbtxt").write_text(
        'name: "tiny" backend: "python" instance_group [{ kind: KIND_CPU count: 1 }]\n'
        'input [{ name: "X" data_type: TYPE_FP32 dims: [1] }] output [{ name: "Y" data_type: TYPE_FP32 dims: [1] }]\n'
    )
    return tmp_path / "repository"


class TestServersThatWillNotDo:
    def test_a_certificate_that_has_expired(
        self, tiny: Path, authority: Authority, friendly: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        then = datetime.datetime(2020, 1, 1)
        pair = authority.issue("127.0.0.1", not_before=then, not_after=then + datetime.timedelta(days=1))
        server = TritonServer(tiny, log_file=tmp_path / "triton.log", security=Security(*pair), stop_timeout=0)
        with pytest.raises(ConfigurationError, match=rf"^--tls-certificate {pair[0]} expired on 2020-01-02"):
            server.start()
        # One that expires while the server runs.
        monkeypatch.setattr(Security, "check", lambda security: None)
        with server:
            said = score_error(server.grpc_url, friendly)
        assert said.startswith(f"Triton at {server.grpc_url} shows a certificate that has expired")

    def test_no_tls(self, tiny: Path, friendly: Settings, tmp_path: Path) -> None:
        with TritonServer(tiny, log_file=tmp_path / "triton.log", stop_timeout=0) as server:
            said = score_error(server.grpc_url, friendly)
        assert said.startswith(f"Triton at {server.grpc_url} speaks no TLS; unset LIBER_TLS_CA")

    def test_files_that_do_not_belong_together(self, tiny: Path, authority: Authority, tmp_path: Path) -> None:
        certificate, key = authority.issue("first.example")
        _, other = authority.issue("second.example")
        for security, said in (
            (Security(certificate, other), "do not belong together"),
            (Security(certificate), "need each other"),
            (Security(key=key), "need each other"),
            (Security(client_ca=authority.file), "--tls-client-ca needs --tls-certificate"),
            (Security(certificate, key, tmp_path / "none"), "^--tls-client-ca .*none cannot be read"),
            (Security(control_key="too short"), "^the control key has 9 characters"),
        ):
            with pytest.raises(ConfigurationError, match=said):
                TritonServer(tiny, log_file=tmp_path / "triton.log", security=security).start()
        assert not (tmp_path / "triton.log").exists()

    def test_a_key_that_would_leave_the_machine_in_plain_text_is_told_of(
        self, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        security = Security(control_key=CONTROL_KEY)
        server = TritonServer(tiny, log_file=tmp_path / "triton.log", host="192.0.2.1", security=security)
        with pytest.raises(ConfigurationError, match=r"on 192\.0\.2\.1 cannot be used"):
            server.start()
        assert "the control key travels to 192.0.2.1 in plain text; use --tls-certificate" in caplog.text
        assert CONTROL_KEY not in caplog.text

    def test_a_command_says_it_in_one_line(self, tiny: Path, tmp_path: Path) -> None:
        key = tmp_path / "open.key"
        key.touch(0o644)
        key.chmod(0o644)
        store = f"sqlite:///{tmp_path / 'memory.db'}"
        refused = liber("serve", "--repository", tiny, "--store", store, LIBER_CONTROL_KEY_FILE=str(key))
        assert refused.returncode == 1
        assert refused.stderr == (
            f"error: LIBER_CONTROL_KEY_FILE {key} is open to others (mode 0644); chmod 600 {key}\n"
        )
