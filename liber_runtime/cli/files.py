"""Files that commands write whole or not at all, and lists of users that they read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from liber_runtime.behavior import check_id
from liber_runtime.exceptions import InvalidInputError


def write_private(path: Path, pieces: Iterable[str]) -> None:
    """Writes a file that its owner alone may read: what is held of a person. It replaces an older one at the end.

    Raises:
        InvalidInputError: the directory is not there, or the path is one.
        OSError: the file cannot be written; nothing of it is left then.
    """
    if not path.parent.is_dir():
        raise InvalidInputError(f"{path} cannot be written: there is no directory {path.parent}; make it first")
    if path.is_dir():
        raise InvalidInputError(f"{path} is a directory; name a file in it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(pieces)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_user_ids(path: str) -> list[str]:
    """Reads user ids, one a line; blank lines are skipped, repeats dropped.

    Args:
        path: a file in UTF-8, or ``-`` for standard input.

    Raises:
        InvalidInputError: not there, not UTF-8, a line that is no id, or no id at all.
    """
    name = "standard input" if path == "-" else path
    try:
        content = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except FileNotFoundError:
        raise InvalidInputError(f"{name} does not exist; check the path") from None
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{name} is not UTF-8 at byte {error.start}; re-encode it as UTF-8") from None
    found: dict[str, None] = {}
    # Not splitlines: ids may hold characters that it takes for the end of a line.
    for number, line in enumerate(content.split("\n"), 1):
        user_id = line.removesuffix("\r")
        if user_id.strip():
            try:
                found[check_id("user id", user_id)] = None
            except InvalidInputError as error:
                raise InvalidInputError(f"{name}, line {number}: {error}") from None
    if not found:
        raise InvalidInputError(f"{name} names no user; write one user id a line")
    return list(found)
