"""Everything one score needs of one user, in a few look-ups by key, however long the user's history is.

What is read lies in three rows: the user's own with the cache, the copy of the newest behaviors of the partitions, and
the copy of the newest vectors (``migrations/0003_scoring.sql``). `keep_behaviors` and `keep_vectors` make the copies.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

import numpy as np

from liber_runtime.behavior import Attributes
from liber_runtime.memory import UserMemory
from liber_runtime.memory.history import History
from liber_runtime.memory.packing import NO_VECTORS, Packed, load_attributes, stack_vectors

KEPT_BEHAVIORS = 256
"""Of the partitions, in one row. A bundle that looks back further reads the partitions themselves."""

KEPT_VECTORS = 40
"""Of an encoding, in one row. A bundle that fuses more reads them one by one."""


def wanted_of(db: sqlite3.Connection, fingerprint: str) -> tuple[int, bool]:
    """The number of an encoding (-1 for one the file has never seen), and whether its vectors are to be made."""
    row = db.execute("SELECT encoding, wanted FROM encodings WHERE fingerprint = ?", (fingerprint,)).fetchone()
    return (int(row[0]), bool(row[1])) if row else (-1, False)


def read_users(
    db: sqlite3.Connection, user_ids: Sequence[str], history: int, partitions: int, encoding: int, wanted: bool
) -> dict[str, UserMemory | None]:
    """See `MemoryStore.read`; one statement for all users.

    Args:
        db: in a transaction.
        user_ids: distinct.
        history: see there.
        partitions: see there.
        encoding: and `wanted`: what `wanted_of` says of the one asked for.
        wanted: see `encoding`.
    """
    found: dict[str, UserMemory | None] = dict.fromkeys(user_ids)
    many = len(user_ids) > 1
    # Of nobody's encoding there are no vectors: the join finds none where none are asked for.
    given = (json.dumps(user_ids) if many else user_ids[0], encoding if partitions > 0 else -1)
    held = db.execute(_USERS if many else _USER, given).fetchall()
    profiles: dict[str, Attributes] = {}  # many users have the same
    for user_id, user, cut, profile, item_ids, feedback, number, complete, older_ids, older, count, vectors in held:
        if cut and len(feedback) < 8 * history:
            if number == cut and (complete or len(feedback) + len(older) >= 8 * history):
                item_ids, feedback = _joined(older_ids, item_ids, older, feedback)
            else:
                item_ids, feedback = _reach_back(db, user, cut, item_ids, feedback, history)
        matrix, foreign = NO_VECTORS, _NOTHING
        if cut and partitions > 0:
            if count is not None and (count < KEPT_VECTORS or partitions <= KEPT_VECTORS):
                matrix = np.frombuffer(vectors, "<f4").reshape(count, -1)[-partitions:]
            elif encoding >= 0:
                matrix = stack_vectors(_newest_vectors(db, user, encoding, partitions))
            if not len(matrix) and not wanted:
                foreign = _foreign(db, user)
        if profile not in profiles:
            profiles[profile] = load_attributes(profile)
        found[user_id] = UserMemory(profiles[profile], History(item_ids, feedback).newest(history), matrix, foreign)
    return found


_NOTHING: frozenset[str] = frozenset()

_COLUMNS = (
    "u.user_id, u.user, u.partitions, u.profile, u.item_ids, u.feedback,"
    " b.number, b.complete, b.item_ids, b.feedback, v.count, v.vectors"
)
_COPIES = (
    "LEFT JOIN newest_behaviors b ON b.user = u.user LEFT JOIN newest_vectors v ON v.user = u.user AND v.encoding = ?2"
)
_USER = f"SELECT {_COLUMNS} FROM users u {_COPIES} WHERE u.user_id = ?1"
_USERS = f"SELECT {_COLUMNS} FROM json_each(?1) j CROSS JOIN users u ON u.user_id = j.value {_COPIES}"


def keep_behaviors(db: sqlite3.Connection, user: int, number: int, cut: Iterable[Packed]) -> tuple[object, ...]:
    """The row of a user's newest behaviors once partitions are cut: for ``INSERT OR REPLACE INTO newest_behaviors``.

    Args:
        db: in the transaction that cuts them.
        user: whose.
        number: of the user's last partition before.
        cut: the partitions after it, in order.
    """
    row = db.execute(
        "SELECT number, complete, item_ids, feedback FROM newest_behaviors WHERE user = ?", (user,)
    ).fetchone()
    if row and row[0] == number:
        _, complete, item_ids, feedback = row
    else:
        item_ids, feedback = _reach_back(db, user, number, "", b"", KEPT_BEHAVIORS)
        complete = len(feedback) < 8 * KEPT_BEHAVIORS or number == 0
    for ids, given, _, _ in cut:
        number += 1
        item_ids, feedback = _joined(item_ids, ids, feedback, given)
    kept = History(item_ids, feedback).newest(KEPT_BEHAVIORS).trimmed()
    complete = complete and len(feedback) <= 8 * KEPT_BEHAVIORS
    return user, number, int(complete), kept.joined_ids, kept.packed_feedback


def keep_vectors(db: sqlite3.Connection, changed: Iterable[tuple[int, int]]) -> None:
    """Makes the rows of the newest vectors.

    Args:
        db: in the transaction that changes them.
        changed: (user, encoding), any of which may have vectors.
    """
    rows = []
    for user, encoding in changed:
        vectors = _newest_vectors(db, user, encoding, KEPT_VECTORS)
        # Vectors that do not belong together are left as they are: whoever reads them is to be told.
        if vectors and len(set(map(len, vectors))) == 1:
            rows.append((user, encoding, len(vectors), b"".join(vectors)))
    db.executemany("INSERT OR REPLACE INTO newest_vectors VALUES (?, ?, ?, ?)", rows)


def _newest_vectors(db: sqlite3.Connection, user: int, encoding: int, limit: int) -> list[bytes]:
    """In order. Where some of the newest are pending, older ones take their places."""
    query = "SELECT vector FROM representations WHERE user = ? AND encoding = ? ORDER BY number DESC LIMIT ?"
    rows = db.execute(query, (user, encoding, limit)).fetchall()
    return [vector for (vector,) in reversed(rows)]


def _joined(older_ids: str, item_ids: str, older: bytes, feedback: bytes) -> tuple[str, bytes]:
    if not (older and feedback):
        return (older_ids, older) if older else (item_ids, feedback)
    return f"{older_ids}\n{item_ids}", older + feedback


def _reach_back(
    db: sqlite3.Connection, user: int, number: int, item_ids: str, feedback: bytes, history: int
) -> tuple[str, bytes]:
    """Puts partitions, up to one of a number, before what there is until the history is long enough."""
    # Rows are fetched one by one: only as many partitions are touched as the history needs.
    runs = db.execute(
        "SELECT item_ids, feedback FROM partitions WHERE user = ? AND number <= ? ORDER BY number DESC", (user, number)
    )
    for older_ids, older in runs:
        item_ids, feedback = _joined(older_ids, item_ids, older, feedback)
        if len(feedback) >= 8 * history:
            break
    runs.close()
    return item_ids, feedback


def _foreign(db: sqlite3.Connection, user: int) -> frozenset[str]:
    return frozenset(
        fingerprint
        for (fingerprint,) in db.execute(
            "SELECT fingerprint FROM encodings e WHERE EXISTS"
            " (SELECT 1 FROM representations r WHERE r.user = ? AND r.encoding = e.encoding)",
            (user,),
        )
    )
