"""Certificates, keys and secrets that cannot be used are refused by name before anything uses them."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from liber_runtime.credentials import (
    check_control_key,
    read_authority,
    read_certificate,
    read_secret,
    require_private,
)
from liber_runtime.exceptions import ConfigurationError

DOCS = Path(__file__).parents[2] / "docs"

NOW = datetime.datetime.now(datetime.timezone.utc)


def issue(authority: trustme.CA, directory: Path, **validity: datetime.datetime) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, as files."""
    made = authority.issue_cert("127.0.0.1", **validity)
    certificate, key = directory / "own.crt", directory / "own.key"
    certificate.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    key.chmod(0o600)
    return certificate, key


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def pair(authority: trustme.CA, tmp_path: Path) -> tuple[Path, Path]:
    return issue(authority, tmp_path)


def read(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    return read_certificate(certificate, key, "LIBER_TLS_CERTIFICATE", "LIBER_TLS_KEY")


class TestACertificateAndItsKey:
    def test_they_are_read(self, pair: tuple[Path, Path]) -> None:
        assert read(*pair) == (pair[0].read_bytes(), pair[1].read_bytes())

    @pytest.mark.parametrize("place", [0, 1])
    def test_one_is_missing(self, pair: tuple[Path, Path], place: int) -> None:
        pair[place].unlink()
        named = ("LIBER_TLS_CERTIFICATE", "LIBER_TLS_KEY")[place]
        with pytest.raises(ConfigurationError, match=rf"^{named} {pair[place]} cannot be read \(no such file"):
            read(*pair)

    def test_one_is_a_directory(self, pair: tuple[Path, Path]) -> None:
        with pytest.raises(ConfigurationError, match=r"^LIBER_TLS_CERTIFICATE .* cannot be read \(is a directory\)"):
            read(pair[0].parent, pair[1])

    def test_the_key_is_anothers(self, authority: trustme.CA, pair: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        _, other = issue(authority, tmp_path / "other")
        with pytest.raises(ConfigurationError, match=rf"{pair[0]} and LIBER_TLS_KEY {other} do not belong together"):
            read(pair[0], other)

    def test_they_stand_in_each_others_place(self, pair: tuple[Path, Path]) -> None:
        pair[0].chmod(0o600)
        with pytest.raises(ConfigurationError, match=r"^LIBER_TLS_CERTIFICATE .*own.key holds no certificate in PEM"):
            read(pair[1], pair[0])

    def test_the_key_is_no_key(self, pair: tuple[Path, Path]) -> None:
        pair[1].write_text("nothing")
        with pytest.raises(ConfigurationError, match=r"^LIBER_TLS_KEY .*own.key holds no private key in PEM"):
            read(*pair)

    @pytest.mark.parametrize("place", [0, 1])
    def test_one_is_damaged(self, pair: tuple[Path, Path], place: int) -> None:
        lines = pair[place].read_text().splitlines()
        pair[place].write_text("\n".join([lines[0], "AAAA", *lines[2:]]))
        with pytest.raises(ConfigurationError, match=r"own.crt and LIBER_TLS_KEY .*own.key cannot be used \("):
            read(*pair)

    def test_the_key_is_locked(self, pair: tuple[Path, Path]) -> None:
        key = serialization.load_pem_private_key(pair[1].read_bytes(), None)
        locked = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
        pair[1].write_bytes(locked)
        with pytest.raises(ConfigurationError, match=r"^LIBER_TLS_KEY .*own.key is locked by a passphrase"):
            read(*pair)

    @pytest.mark.parametrize(
        ("begin", "end", "said"),
        [
            # From 2050 on a certificate's years have four digits.
            (datetime.datetime(2019, 1, 1), datetime.datetime(2020, 2, 3, 4, 5), "expired on 2020-02-03 04:05 UTC"),
            (
                datetime.datetime(2051, 2, 3, 4, 5),
                datetime.datetime(2052, 1, 1),
                "is not valid before 2051-02-03 04:05",
            ),
            (datetime.datetime(2049, 2, 3), datetime.datetime(2050, 1, 1), "is not valid before 2049-02-03 00:00 UTC"),
        ],
    )
    def test_it_is_not_valid_now(
        self, authority: trustme.CA, tmp_path: Path, begin: datetime.datetime, end: datetime.datetime, said: str
    ) -> None:
        pair = issue(authority, tmp_path, not_before=begin, not_after=end)
        with pytest.raises(ConfigurationError, match=f"^LIBER_TLS_CERTIFICATE {pair[0]} {said}"):
            read(*pair)

    def test_an_authority_may_be_older_than_what_it_issues(self, authority: trustme.CA, tmp_path: Path) -> None:
        soon = NOW + datetime.timedelta(hours=12)
        certificate, key = issue(authority, tmp_path, not_before=NOW - datetime.timedelta(days=1), not_after=soon)
        with certificate.open("ab") as file:
            file.write(authority.cert_pem.bytes())
        assert read(certificate, key)[0].count(b"BEGIN CERTIFICATE") == 2


class TestAnAuthority:
    def test_one_and_several_are_read(self, authority: trustme.CA, tmp_path: Path) -> None:
        file = tmp_path / "ca.pem"
        file.write_bytes(authority.cert_pem.bytes() + trustme.CA().cert_pem.bytes())
        assert read_authority(file, "LIBER_TLS_CA") == file.read_bytes()

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
    def test_it_holds_none(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "ca.pem").write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"^--tls-client-ca .*ca.pem holds no usable certificate in PEM"):
            read_authority(tmp_path / "ca.pem", "--tls-client-ca")


class TestAFileThatOthersMayRead:
    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
    def test_is_refused_with_the_way_out(self, tmp_path: Path, mode: int) -> None:
        file = tmp_path / "key"
        file.touch()
        file.chmod(mode)
        with pytest.raises(ConfigurationError, match=rf"key is open to others \(mode {mode:04o}\); chmod 600 {file}$"):
            require_private(file, "LIBER_TLS_KEY")
        file.chmod(0o400)
        require_private(file, "LIBER_TLS_KEY")

    def test_is_taken_from_somebody_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "key"
        file.touch()
        file.chmod(0o444)
        monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
        require_private(file, "LIBER_TLS_KEY")

    def test_is_refused_as_a_tls_key_too(self, pair: tuple[Path, Path]) -> None:
        pair[1].chmod(0o644)
        with pytest.raises(ConfigurationError, match=r"^LIBER_TLS_KEY .*own.key is open to others"):
            read(*pair)


class TestASecret:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Callable[[str], Path]:
        def write(content: str) -> Path:
            path = tmp_path / "secret"
            path.write_text(content)
            path.chmod(0o600)
            return path

        return write

    def test_from_the_environment_or_a_file(self, file: Callable[[str], Path]) -> None:
        assert read_secret("LIBER_CONTROL_KEY", "", None) == ""
        assert read_secret("LIBER_CONTROL_KEY", "from the environment", None) == "from the environment"
        assert read_secret("LIBER_CONTROL_KEY", "", file("from a file\n")) == "from a file"

    def test_not_from_both(self, file: Callable[[str], Path]) -> None:
        with pytest.raises(
            ConfigurationError, match="LIBER_CONTROL_KEY and LIBER_CONTROL_KEY_FILE are both set"
        ) as said:
            read_secret("LIBER_CONTROL_KEY", "hush", file("hush"))
        assert "hush" not in str(said.value)

    def test_not_from_an_empty_file(self, file: Callable[[str], Path]) -> None:
        with pytest.raises(ConfigurationError, match=r"^LIBER_CONTROL_KEY_FILE .*secret is empty"):
            read_secret("LIBER_CONTROL_KEY", "", file(" \n"))

    def test_not_from_a_file_that_others_may_read(self, file: Callable[[str], Path]) -> None:
        path = file("hush")
        path.chmod(0o640)
        with pytest.raises(ConfigurationError, match=r"^LIBER_CONTROL_KEY_FILE .*secret is open to others") as said:
            read_secret("LIBER_CONTROL_KEY", "", path)
        assert "hush" not in str(said.value)


class TestAControlKey:
    @pytest.mark.parametrize("key", ["a" * 16, "0123456789abcdefABCDEF+/=_.~-", "f" * 256])
    def test_good_ones(self, key: str) -> None:
        assert check_control_key(key) == key

    @pytest.mark.parametrize(
        "key", ["short", "f" * 257, "a key with blanks in it", "a,key:with=signs,of:ours", "ключключключключ"]
    )
    def test_bad_ones_are_refused_and_not_shown(self, key: str) -> None:
        with pytest.raises(ConfigurationError, match="openssl rand") as said:
            check_control_key(key)
        assert key not in str(said.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_what_the_page_makes_with_openssl_fits_together(tmp_path: Path) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", (DOCS / "security.md").read_text("utf-8"), re.DOTALL)
    subprocess.run(["sh", "-e", "-c", commands], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    authority = tmp_path / "ca.pem"
    read_authority(authority, "LIBER_TLS_CA")
    contexts = []
    for name, protocol in (("server", ssl.PROTOCOL_TLS_SERVER), ("client", ssl.PROTOCOL_TLS_CLIENT)):
        read(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        context = ssl.SSLContext(protocol)
        context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    upward, downward = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = contexts[0].wrap_bio(upward, downward, server_side=True)
    client = contexts[1].wrap_bio(downward, upward, server_hostname="127.0.0.1")
    waiting = [client, server]
    for _ in range(6):
        for side in list(waiting):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                waiting.remove(side)
    assert not waiting
    assert server.getpeercert() is not None
    assert (("commonName", "ranking-service"),) in server.getpeercert()["subject"]  # type: ignore[index, operator]
