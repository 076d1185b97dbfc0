"""How behaviors and texts lie in Redis: a run of behaviors as one string, a text as one JSON array."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence

from liber_runtime.behavior import Behavior, Item, Text
from liber_runtime.memory.history import History
from liber_runtime.memory.packing import pack, unpack

_HEADER = struct.Struct("<II")  # behaviors; bytes of their item ids
_TEXT_FIELDS = tuple(field.name for field in dataclasses.fields(Text) if field.name not in ("kind",))


def dump_run(behaviors: Sequence[Behavior]) -> bytes:
    """A run of one user's behaviors; what scoring reads lies first (reading.lua cuts the rest off)."""
    item_ids, feedback, timestamps, event_ids = pack(behaviors)
    ids = item_ids.encode()
    return b"".join((_HEADER.pack(len(behaviors), len(ids)), ids, feedback, timestamps, event_ids.encode()))


def load_run(user_id: str, run: bytes) -> list[Behavior]:
    """The behaviors of a run; none of an empty string."""
    if len(run) <= _HEADER.size:
        return []
    count, size = _HEADER.unpack_from(run)
    start = _HEADER.size + size
    return unpack(
        user_id,
        run[_HEADER.size : start].decode(),
        run[start : start + 8 * count],
        run[start + 8 * count : start + 16 * count],
        run[start + 16 * count :].decode(),
    )


def newest_of(runs: bytes, limit: int) -> History:
    """At most `limit` newest behaviors of runs as scoring reads them, newest run first."""
    at, item_ids, feedback = 0, "", b""
    while at < len(runs):
        count, size = _HEADER.unpack_from(runs, at)
        at += _HEADER.size
        if count:
            older = runs[at : at + size].decode()
            item_ids = f"{older}\n{item_ids}" if item_ids else older
            feedback = runs[at + size : at + size + 8 * count] + feedback
        at += size + 8 * count
    return History(item_ids, feedback).newest(limit)


def newest_of_two(last: bytes, cache: bytes, limit: int) -> History:
    """At most `limit` newest behaviors of the last partition and the cache; whole runs too."""
    item_ids, feedback = b"", b""
    for run in (cache, last):
        if len(run) > _HEADER.size and len(feedback) < 8 * limit:
            count, size = _HEADER.unpack_from(run)
            start = _HEADER.size + size
            older = run[_HEADER.size : start]
            item_ids = older + b"\n" + item_ids if item_ids else older
            feedback = run[start : start + 8 * count] + feedback
    return History(item_ids.decode(), feedback).newest(limit)


def dump_text(text: Text) -> bytes:
    """A text with where it came from. queue.lua reads the writer and the prompt's version out of it."""
    return json.dumps([getattr(text, name) for name in _TEXT_FIELDS], ensure_ascii=False).encode()


def load_text(kind: str, record: bytes) -> Text:
    """The text of a record."""
    return Text(kind, *json.loads(record))  # type: ignore[arg-type]


def words_of(record: bytes) -> str:
    """The text of a record alone."""
    return str(json.loads(record)[0]) if record else ""


def dump_item(item: Item) -> bytes:
    """An item beside its id."""
    return json.dumps([item.title, dict(item.attributes)], ensure_ascii=False).encode()


def load_item(item_id: str, record: bytes) -> Item:
    """The item of a record, tuples as tuples."""
    title, attributes = json.loads(record)
    return Item(
        item_id, title, {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()}
    )
