"""Everything one score needs of one user, in a few look-ups by key, however long the user's history is."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from liber_runtime.memory import UserMemory
from liber_runtime.memory.packing import load_attributes, newest

_NO_VECTORS = np.zeros((0, 0), dtype=np.float32)


def wanted_of(db: sqlite3.Connection, fingerprint: str) -> tuple[int, bool]:
    """The number of an encoding (-1 for one the file has never seen), and whether its vectors are to be made."""
    row = db.execute("SELECT encoding, wanted FROM encodings WHERE fingerprint = ?", (fingerprint,)).fetchone()
    return (int(row[0]), bool(row[1])) if row else (-1, False)


def read_users(
    db: sqlite3.Connection, user_ids: Sequence[str], history: int, partitions: int, encoding: int, wanted: bool
) -> dict[str, UserMemory | None]:
    """See `MemoryStore.read`; a statement for all users where the engine would else be asked for each.

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
    held = db.execute(_USERS if many else _USER, (json.dumps(user_ids) if many else user_ids[0],)).fetchall()
    vectors = _newest_vectors(db, [row[1:3] for row in held], partitions, encoding)
    for user_id, user, cut, profile, item_ids, feedback, last_ids, last_feedback in held:
        if len(feedback) < 8 * history and last_ids:
            item_ids = f"{last_ids}\n{item_ids}" if item_ids else last_ids
            feedback = last_feedback + feedback
        if len(feedback) < 8 * history and cut > 1:
            item_ids, feedback = _reach_back(db, user, cut, item_ids, feedback, history)
        matrix = vectors.get(user, _NO_VECTORS)
        foreign = _NOTHING
        if cut and partitions > 0 and not len(matrix) and not wanted:
            foreign = _foreign(db, user)
        found[user_id] = UserMemory(load_attributes(profile), newest(item_ids, feedback, history), matrix, foreign)
    return found


_NOTHING: frozenset[str] = frozenset()

# With the newest partition beside the cache: together they are long enough for most histories.
_COLUMNS = "u.user_id, u.user, u.partitions, u.profile, u.item_ids, u.feedback, p.item_ids, p.feedback"
_LAST = "LEFT JOIN partitions p ON p.user = u.user AND p.number = u.partitions"
_USER = f"SELECT {_COLUMNS} FROM users u {_LAST} WHERE u.user_id = ?"
_USERS = f"SELECT {_COLUMNS} FROM json_each(?) j CROSS JOIN users u ON u.user_id = j.value {_LAST}"


def _newest_vectors(
    db: sqlite3.Connection, held: Sequence[tuple[int, int]], partitions: int, encoding: int
) -> dict[int, npt.NDArray[np.float32]]:
    """float32[J, d] of each (user, number of partitions) that has vectors of an encoding."""
    if partitions < 1 or encoding < 0:
        return {}
    rows: dict[int, list[bytes]] = {}
    if len(held) > 1:
        newest_numbers = json.dumps([[user, cut - partitions] for user, cut in held if cut])
        for user, vector in db.execute(_ALL_NEWEST, (newest_numbers, encoding)):
            rows.setdefault(user, []).append(vector)
    for user, cut in held:
        # Where some of the newest are pending, older ones take their places.
        if cut and len(rows.get(user, ())) < min(partitions, cut):
            numbered = db.execute(_NEWEST, (user, encoding, partitions)).fetchall()
            rows[user] = [vector for (vector,) in reversed(numbered)]
    return {user: np.frombuffer(b"".join(each), "<f4").reshape(len(each), -1) for user, each in rows.items() if each}


_NEWEST = "SELECT vector FROM representations WHERE user = ? AND encoding = ? ORDER BY number DESC LIMIT ?"
_ALL_NEWEST = (
    "SELECT r.user, r.vector FROM json_each(?) j CROSS JOIN representations r"
    " ON r.user = json_extract(j.value, '$[0]') AND r.encoding = ? AND r.number > json_extract(j.value, '$[1]')"
)


def _reach_back(
    db: sqlite3.Connection, user: int, cut: int, item_ids: str, feedback: bytes, history: int
) -> tuple[str, bytes]:
    """Puts older partitions before what there is until the history is long enough."""
    # Rows are fetched one by one: only as many partitions are touched as the history needs.
    runs = db.execute(
        "SELECT item_ids, feedback FROM partitions WHERE user = ? AND number < ? ORDER BY number DESC", (user, cut)
    )
    for older_ids, older_feedback in runs:
        if older_ids:
            item_ids = f"{older_ids}\n{item_ids}" if item_ids else older_ids
            feedback = older_feedback + feedback
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
