"""Everything one score needs of one user, in a few look-ups by key, however long the user's history is."""

from __future__ import annotations

import sqlite3

import numpy as np

from liber_runtime.memory import UserMemory
from liber_runtime.memory.packing import load_attributes, newest

_NO_VECTORS = np.zeros((0, 0), dtype=np.float32)


def wanted_of(db: sqlite3.Connection, fingerprint: str) -> tuple[int, bool]:
    """The number of an encoding (-1 for one the file has never seen), and whether its vectors are to be made."""
    row = db.execute("SELECT encoding, wanted FROM encodings WHERE fingerprint = ?", (fingerprint,)).fetchone()
    return (int(row[0]), bool(row[1])) if row else (-1, False)


def read_user(
    db: sqlite3.Connection, user_id: str, history: int, partitions: int, encoding: int, wanted: bool
) -> UserMemory | None:
    """See `MemoryStore.read`; `encoding` and `wanted` are what `wanted_of` says of the one asked for."""
    row = db.execute(
        "SELECT user, profile, partitions, item_ids, feedback FROM users WHERE user_id = ?", (user_id,)
    ).fetchone()
    if row is None:
        return None
    user, profile, cut, item_ids, feedback = row
    if len(feedback) < 8 * history and cut:
        # Rows are fetched one by one: only as many partitions are touched as the history needs.
        runs = db.execute("SELECT item_ids, feedback FROM partitions WHERE user = ? ORDER BY number DESC", (user,))
        for older_ids, older_feedback in runs:
            if older_ids:
                item_ids = f"{older_ids}\n{item_ids}" if item_ids else older_ids
                feedback = older_feedback + feedback
            if len(feedback) >= 8 * history:
                break
        runs.close()
    vectors, foreign = _NO_VECTORS, frozenset[str]()
    if cut and partitions > 0:
        rows = db.execute(
            "SELECT vector FROM representations WHERE user = ? AND encoding = ? ORDER BY number DESC LIMIT ?",
            (user, encoding, partitions),
        ).fetchall()
        if rows:
            rows.reverse()
            vectors = np.frombuffer(b"".join([row[0] for row in rows]), "<f4").reshape(len(rows), -1)
        elif not wanted:
            foreign = _foreign(db, user)
    return UserMemory(load_attributes(profile), newest(item_ids, feedback, history), vectors, foreign)


def _foreign(db: sqlite3.Connection, user: int) -> frozenset[str]:
    return frozenset(
        fingerprint
        for (fingerprint,) in db.execute(
            "SELECT fingerprint FROM encodings e WHERE EXISTS"
            " (SELECT 1 FROM representations r WHERE r.user = ? AND r.encoding = e.encoding)",
            (user,),
        )
    )
