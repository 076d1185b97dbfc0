"""The schema of a SQLite store, brought up to date from numbered scripts, and what to do when the engine complains."""

from __future__ import annotations

import importlib.resources
import sqlite3
import time
from collections.abc import Iterator

from liber_runtime.exceptions import StoreError
from liber_runtime.memory.packing import event_digest

BUSY_SECONDS = 30.0
"""How long a write waits for another process's write before it gives up."""

_APPLICATION = 0x4C494252  # "LIBR": tells our file from another program's


def use_wal(db: sqlite3.Connection) -> None:
    """Switches to write-ahead logging, which does not wait by itself for another process that does the same."""
    patience = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL").fetchall()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > patience:
                raise
            time.sleep(0.01)
        else:
            return


def migrate(db: sqlite3.Connection, path: str) -> None:
    """Brings the file's schema up to date; the number of the newest script is the schema's version.

    Raises:
        StoreError: the file is another program's, or a newer version made it.
    """
    folder = importlib.resources.files("liber_runtime.memory.sqlite") / "migrations"
    scripts = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda entry: entry.name)
    if _checked_version(db, path, len(scripts)) == len(scripts):
        return
    db.create_function("event_digest", 1, event_digest, deterministic=True)
    # Tables are made anew under their old names, which no reference may follow.
    db.execute("PRAGMA legacy_alter_table = ON")
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("BEGIN IMMEDIATE")
    try:
        # Again, now that no other process can be at it.
        version = _checked_version(db, path, len(scripts))
        for number, script in enumerate(scripts[version:], version + 1):
            for statement in _statements(script.read_text(encoding="utf-8")):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    finally:
        db.execute("PRAGMA legacy_alter_table = OFF")
        db.execute("PRAGMA foreign_keys = ON")


def _checked_version(db: sqlite3.Connection, path: str, newest: int) -> int:
    ((version,),) = db.execute("PRAGMA user_version")
    ((application,),) = db.execute("PRAGMA application_id")
    ((tables,),) = db.execute("SELECT count(*) FROM sqlite_master")
    if application != _APPLICATION and (tables or version):
        raise StoreError(f"store {path} is another program's database; choose another path")
    if version > newest:
        raise StoreError(
            f"store {path} has schema version {version}, this liber-runtime knows up to {newest}; upgrade liber-runtime"
        )
    return int(version)


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


_REMEDIES: tuple[tuple[str, str], ...] = (
    ("full", "make room on the disk and repeat the call"),
    ("no space", "make room on the disk and repeat the call"),
    ("readonly", "make the file and its directory writable"),
    ("read-only", "make the file and its directory writable"),
    ("permission", "make the file and its directory writable"),
    ("not a database", "it is some other file; choose another path"),
    ("malformed", "the file is damaged; restore a backup, or save what is left with 'sqlite3 FILE .recover'"),
    ("locked", "another process writes without pause; stop it, or append in larger batches"),
    ("unable to open", "check that the path is a file in a directory that can be written"),
    ("directory", "check that the path is a file in a directory that can be written"),
    ("file exists", "check that the path is a file in a directory that can be written"),
)


def remedy_for(message: str) -> str:
    """What to do about an error of the engine or the file system, by what it says."""
    lowered = message.lower()
    return next((remedy for sign, remedy in _REMEDIES if sign in lowered), "check the disk and repeat the call")
