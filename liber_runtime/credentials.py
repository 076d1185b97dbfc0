"""Certificates, keys and secrets: checked before anything uses them, and never shown.

gRPC and Triton report an unusable file late and in riddles (a key of another certificate: "Socket already in use"), so
all that can be wrong with one is found here, where it can be named.
"""

from __future__ import annotations

import os
import re
import ssl
import stat
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn

from liber_runtime.exceptions import ConfigurationError

CONTROL_HEADER = "liber-control-key"
"""What the control key travels under; gRPC's metadata has `GRPC_HEADER_PREFIX` before it."""

GRPC_HEADER_PREFIX = "triton-grpc-protocol-"

_CONTROL_KEY = re.compile(r"[A-Za-z0-9+/=_.~-]{16,256}")
"""Triton splits its options at commas, colons and spaces; these are the characters of base64, hexadecimal, URLs."""

_VALIDITY = re.compile(rb"(?:\x17\x0d(\d{12})Z|\x18\x0f(\d{14})Z)" * 2)
"""Two times, one after the other, in DER: from when and until when a certificate is valid."""


def read_secret(variable: str, value: str, file: Path | None) -> str:
    """A secret from the environment or from a file.

    Args:
        variable: the environment variable's name, for messages; the file's is that with ``_FILE``.
        value: of the variable; empty where it is not set.
        file: holds the secret alone; whitespace around it is dropped.

    Returns:
        The secret, empty where neither is set.

    Raises:
        ConfigurationError: both are set, or the file cannot be read, is empty, or others may read it.
    """
    if file is None:
        return value
    origin = f"{variable}_FILE"
    if value:
        raise ConfigurationError(f"{variable} and {origin} are both set; unset one of them")
    require_private(file, origin)
    secret = _read(file, origin).decode(errors="replace").strip()
    if not secret:
        raise ConfigurationError(f"{origin} {file} is empty; write the secret into it")
    return secret


def check_control_key(key: str) -> str:
    """Returns a control key that Triton takes as it is, and that nobody guesses.

    Raises:
        ConfigurationError: it is too short, too long, or has other characters; the message does not show it.
    """
    if not _CONTROL_KEY.fullmatch(key):
        raise ConfigurationError(
            f"the control key has {len(key)} characters, or some that Triton cannot take; use 16 to 256 letters, "
            "digits and +/=_.~- (make one with `openssl rand -hex 32`)"
        )
    return key


def require_private(path: Path, origin: str) -> None:
    """Refuses a file of ours that others may read, as ssh does.

    A file of somebody else's (root's, as containers mount secrets) was put there for us, and its mode is not ours to
    change.

    Args:
        path: holds a key or a secret.
        origin: the variable or option that named it, for messages.

    Raises:
        ConfigurationError: it cannot be found, or it is ours and others may read or write it.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, origin, error) from None
    if found.st_uid == os.geteuid() and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigurationError(
            f"{origin} {path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}); chmod 600 {path}"
        )


def read_authority(path: Path, origin: str) -> bytes:
    """The certificates of those who may vouch for the other side, in PEM.

    Args:
        path: one certificate or several.
        origin: the variable or option that named it, for messages.

    Raises:
        ConfigurationError: it cannot be read, or holds no certificate.
    """
    content = _read(path, origin)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError):
        raise ConfigurationError(f"{origin} {path} holds no usable certificate in PEM; name another file") from None
    return content


def read_certificate(certificate: Path, key: Path, origin: str, key_origin: str) -> tuple[bytes, bytes]:
    """A certificate (with those between it and its authority) and its private key, in PEM.

    Args:
        certificate: the certificate itself comes first.
        key: without a passphrase.
        origin: the variable or option that named the certificate, for messages.
        key_origin: the same of the key.

    Raises:
        ConfigurationError: one cannot be read or is not what it should be, others may read the key, they do not belong
            together, or the certificate has expired or is not valid yet.
    """
    require_private(key, key_origin)
    contents = _read(certificate, origin), _read(key, key_origin)
    if b"BEGIN CERTIFICATE" not in contents[0]:
        raise ConfigurationError(f"{origin} {certificate} holds no certificate in PEM; name another file")
    if b"PRIVATE KEY" not in contents[1]:
        raise ConfigurationError(f"{key_origin} {key} holds no private key in PEM; name another file")

    def refuse() -> NoReturn:
        raise ConfigurationError(
            f"{key_origin} {key} is locked by a passphrase, for which nobody can be asked here; "
            f"unlock it: openssl pkey -in {key} -out unlocked.key"
        )

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password=refuse)
    except ssl.SSLError as error:
        wrong = (
            "do not belong together"
            if error.reason == "KEY_VALUES_MISMATCH"
            else f"cannot be used ({error.reason or error})"
        )
        raise ConfigurationError(
            f"{origin} {certificate} and {key_origin} {key} {wrong}; name a certificate and its own key"
        ) from None
    _require_valid(certificate, origin, contents[0])
    return contents


def _require_valid(certificate: Path, origin: str, content: bytes) -> None:
    text = content.decode("ascii", errors="ignore")
    first = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
    validity = _VALIDITY.search(ssl.PEM_cert_to_DER_cert(first[0])) if first else None
    if validity is None:
        return
    begin, end = (_moment(written) for written in filter(None, validity.groups()))
    now = datetime.now(timezone.utc)
    if not begin <= now <= end:
        when = f"expired on {end:%Y-%m-%d %H:%M}" if now > end else f"is not valid before {begin:%Y-%m-%d %H:%M}"
        raise ConfigurationError(f"{origin} {certificate} {when} UTC; name one that is valid now")


def _moment(written: bytes) -> datetime:
    """A time of a certificate; one whose year has two digits lies between 1950 and 2049 (RFC 5280, section 4.1.2.5)."""
    text = written.decode()
    if len(text) == 12:
        text = ("19" if text >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%S").replace(tzinfo=timezone.utc)


def _read(path: Path, origin: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, origin, error) from None


def _unreadable(path: Path, origin: str, error: OSError) -> ConfigurationError:
    reason = (error.strerror or str(error)).lower()
    return ConfigurationError(f"{origin} {path} cannot be read ({reason}); correct the path or the file's mode")
