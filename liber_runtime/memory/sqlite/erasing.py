"""Erases a user, or one behavior with all that was made from it."""

from __future__ import annotations

import sqlite3

from liber_runtime.memory import Forgotten
from liber_runtime.memory.packing import pack, unpack
from liber_runtime.memory.sqlite.queue import (
    after_emptied,
    count,
    drop_vectors,
    has_behaviors,
    queue_summary,
)

_COLUMNS = "item_ids = ?, feedback = ?, timestamps = ?, event_ids = ?"


def forget_user(db: sqlite3.Connection, user: int) -> Forgotten:
    """Deletes all rows of a user."""
    (behaviors, partitions) = db.execute("SELECT behaviors, partitions FROM users WHERE user = ?", (user,)).fetchone()
    drop_vectors(db, user)
    db.execute("DELETE FROM users WHERE user = ?", (user,))
    count(db, users=-min(behaviors, 1), behaviors=-behaviors, partitions=-partitions, unscrubbed=1)
    return Forgotten(behaviors, partitions)


def forget_event(db: sqlite3.Connection, user: int, user_id: str, event_id: str, now: float) -> Forgotten:
    """Takes one behavior out of the cache or its partition; its digest stays, so that it is not appended again."""
    if not (_from_cache(db, user, user_id, event_id) or _from_partition(db, user, user_id, event_id, now)):
        return Forgotten(0, 0)
    db.execute("UPDATE users SET behaviors = behaviors - 1 WHERE user = ?", (user,))
    (left,) = db.execute("SELECT behaviors FROM users WHERE user = ?", (user,)).fetchone()
    count(db, users=-(left == 0), behaviors=-1, unscrubbed=1)
    return Forgotten(1, 0)


def _from_cache(db: sqlite3.Connection, user: int, user_id: str, event_id: str) -> bool:
    row = db.execute("SELECT item_ids, feedback, timestamps, event_ids FROM users WHERE user = ?", (user,)).fetchone()
    cache = unpack(user_id, *row)
    kept = [behavior for behavior in cache if behavior.event_id != event_id]
    if len(kept) == len(cache):
        return False
    db.execute(f"UPDATE users SET {_COLUMNS} WHERE user = ?", (*pack(kept), user))
    return True


def _from_partition(db: sqlite3.Connection, user: int, user_id: str, event_id: str, now: float) -> bool:
    found = db.execute(
        "SELECT number, item_ids, feedback, timestamps, event_ids FROM partitions WHERE user = ?"
        " AND instr(char(10) || event_ids || char(10), char(10) || ? || char(10))",
        (user, event_id),
    ).fetchone()
    if found is None:
        return False
    number, *packed = found
    kept = [behavior for behavior in unpack(user_id, *packed) if behavior.event_id != event_id]
    db.execute(f"UPDATE partitions SET {_COLUMNS} WHERE user = ? AND number = ?", (*pack(kept), user, number))
    # All that was made from the behavior goes at once: summary j, shifts j and j+1, and their vectors.
    db.execute(
        "DELETE FROM texts WHERE user = ? AND (number = ? OR number = ? AND kind = 'shift')", (user, number, number + 1)
    )
    drop_vectors(db, user, (number, number + 1))
    db.execute(
        "DELETE FROM steps WHERE user = ? AND (number = ? OR number = ? AND step <> 'summary')",
        (user, number, number + 1),
    )
    if has_behaviors(db, user, number):
        queue_summary(db, user, number, now)
    else:
        after_emptied(db, user, number, now)
    return True
