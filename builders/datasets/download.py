"""Fetches MovieLens-100K from GroupLens. Its terms: research use, and no redistribution without permission."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import stat
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath

from liber_runtime.exceptions import ConfigurationError

MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MOVIELENS_MD5 = "0e33842e24a9c977be4e0107933c0723"
"""The digest that GroupLens publishes beside the archive."""

_TIMEOUT_SECONDS = 30.0
_MAX_ARCHIVE_BYTES = 64 << 20
_MAX_UNPACKED_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20


def download_movielens(directory: str | Path, url: str = MOVIELENS_URL, md5: str = MOVIELENS_MD5) -> Path:
    """Fetches, checks and unpacks MovieLens-100K, so that ``u.data`` lies in `directory`.

    The directory appears complete or not at all. If it holds the data set already, nothing is fetched.

    Args:
        directory: where to; its parent is made if need be.
        url: of the archive.
        md5: of the archive, in hexadecimal digits.

    Returns:
        `directory`.

    Raises:
        ConfigurationError: no network, another digest, an archive that is not the data set, or a directory in use.
    """
    target = Path(directory)
    if (target / "u.data").exists():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigurationError(f"{target} is there and is not MovieLens-100K; name a new or an empty directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as scratch:
            archive = Path(scratch, "archive.zip")
            _fetch(url, archive, target)
            _check_digest(archive, md5, url)
            found = _unpack(archive, Path(scratch, "unpacked"))
            found.replace(target)
    except OSError as error:
        raise ConfigurationError(f"{target} cannot be written ({error.strerror}); name another directory") from None
    return target


def _fetch(url: str, archive: Path, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, archive.open("wb") as file:
            size = 0
            while chunk := response.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > _MAX_ARCHIVE_BYTES:
                    raise ConfigurationError(f"{url} sends more than {_MAX_ARCHIVE_BYTES >> 20} MiB; check the address")
                file.write(chunk)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigurationError(
            f"{url} cannot be fetched ({reason}); fetch it on a machine with a network, unpack it so that "
            f"{target / 'u.data'} is there, and pass --data {target}"
        ) from None


def _check_digest(archive: Path, md5: str, url: str) -> None:
    found = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        raise ConfigurationError(f"{url} has md5 {found} in place of {md5}; it is damaged or changed, try again later")


def _unpack(archive: Path, scratch: Path) -> Path:
    """Unpacks into `scratch`; returns the directory in it that holds ``u.data``."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _check_members(members)
            for member in members:
                path = scratch / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, path.open("wb") as destination:
                    shutil.copyfileobj(source, destination)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ConfigurationError(f"the archive cannot be unpacked ({error}); try again later") from None
    found = next(scratch.rglob("u.data"), None)
    if found is None:
        raise ConfigurationError("the archive holds no u.data; is it MovieLens-100K?")
    return found.parent


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or stat.S_ISLNK(member.external_attr >> 16):
            raise ConfigurationError(f"the archive holds {member.filename!r:.80}, which leads out of it; do not use it")
    if sum(member.file_size for member in members) > _MAX_UNPACKED_BYTES:
        raise ConfigurationError(f"the archive unpacks to more than {_MAX_UNPACKED_BYTES >> 20} MiB; do not use it")
