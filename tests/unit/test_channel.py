"""How clients are opened by the settings; what the servers say to it is in the integration tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import trustme
from tritonclient.utils import InferenceServerException

from liber_runtime.channel import channel_credentials, open_async_client, open_client
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.grpc_errors import explain
from liber_runtime.model_control import load_models
from liber_runtime.representation import TritonEncoder
from liber_runtime.scoring import AsyncScoringClient, ScoringClient
from liber_runtime.settings import Settings, load_settings


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An authority, a certificate of its own and the key: what the settings take."""
    directory, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    found = {name: directory / f"{name}.pem" for name in ("tls_ca", "tls_certificate", "tls_key")}
    authority.cert_pem.write_to_path(str(found["tls_ca"]))
    made.cert_chain_pems[0].write_to_path(str(found["tls_certificate"]))
    made.private_key_pem.write_to_path(str(found["tls_key"]))
    found["tls_key"].chmod(0o600)
    return found


def test_plain_text_is_what_settings_without_an_authority_mean() -> None:
    assert channel_credentials(Settings()) is None


@pytest.mark.parametrize("names", [("tls_ca",), ("tls_ca", "tls_certificate", "tls_key")])
def test_tls_with_and_without_a_certificate_of_ones_own(files: dict[str, Path], names: tuple[str, ...]) -> None:
    settings = Settings(**{name: files[name] for name in names})  # type: ignore[arg-type]
    assert isinstance(channel_credentials(settings), grpc.ChannelCredentials)
    assert channel_credentials(settings.without_tls) is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("tls_ca", "tls_certificate"), "LIBER_TLS_CERTIFICATE and LIBER_TLS_KEY need each other"),
        (("tls_ca", "tls_key"), "LIBER_TLS_CERTIFICATE and LIBER_TLS_KEY need each other"),
        (("tls_certificate", "tls_key"), "LIBER_TLS_CERTIFICATE without LIBER_TLS_CA would go unused"),
    ],
)
@pytest.mark.parametrize(
    "opened",
    [
        lambda settings: open_client("127.0.0.1:1", settings),
        lambda settings: ScoringClient("127.0.0.1:1", settings),
        lambda settings: TritonEncoder("127.0.0.1:1", settings),
        lambda settings: load_models("127.0.0.1:1", ["any"], settings),
    ],
    ids=["client", "scoring", "encoder", "control"],
)
def test_settings_that_lack_one_another_are_refused_before_any_call(
    files: dict[str, Path], names: tuple[str, ...], said: str, opened: Callable[[Settings], object]
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{said}"):
        opened(Settings(**{name: files[name] for name in names}))  # type: ignore[arg-type]


async def test_so_are_those_of_asynchronous_clients(files: dict[str, Path]) -> None:
    settings = Settings(tls_ca=files["tls_ca"].with_name("none"))
    for opened in (open_async_client, AsyncScoringClient):
        with pytest.raises(ConfigurationError, match=r"^LIBER_TLS_CA .*none cannot be read \(no such file"):
            opened("127.0.0.1:1", settings)


class TestTheEnvironment:
    def test_files(self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        for name, path in files.items():
            monkeypatch.setenv(f"LIBER_{name.upper()}", str(path))
        settings = load_settings()
        assert {name: getattr(settings, name) for name in files} == files

    def test_what_is_empty_is_not_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIBER_TLS_CA", "")
        monkeypatch.setenv("LIBER_CONTROL_KEY_FILE", "")
        assert load_settings().tls_ca is None
        assert load_settings().read_control_key() == ""

    def test_the_control_key_is_never_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIBER_CONTROL_KEY", "0123456789abcdef")
        settings = load_settings()
        assert settings.read_control_key() == "0123456789abcdef"
        assert "0123456789abcdef" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"

    def test_a_control_key_of_no_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIBER_CONTROL_KEY", "hunter2")
        with pytest.raises(ConfigurationError, match=r"^the control key has 7 characters") as said:
            load_settings().read_control_key()
        assert "hunter2" not in str(said.value)


def test_a_model_that_is_away_is_no_matter_of_tls() -> None:
    error = InferenceServerException("Socket closed", status="StatusCode.UNAVAILABLE")
    assert "no Triton answers at host:1" in str(explain(error, "host:1", 1))
