"""One user's memory as JSON: what ``liber export`` writes, and ``liber inspect USER --json`` without vectors' numbers.

The shape, version 1. Keys are added without a new version; a key that changes its meaning or goes brings a new one.

```
{
  "format": "liber.user", "version": 1,
  "user_id": "u1",
  "profile": {"age": 31, "genres": ["Drama"]},
  "domain": {"name": ..., "item_noun": ..., "feedback_noun": ..., "feedback_range": [1, 5], ...} or null,
  "encodings": ["<fingerprint>"],     encodings that every partition shall have a vector of; [] if any will do
  "partitions": [{
    "number": 1,                      from 1, oldest first
    "behaviors": [{
      "event_id": "...", "item_id": "m1", "title": "..." or null, "feedback": 4.0,
      "timestamp": 1650000000.0,      seconds since 1970-01-01 UTC
      "time": "2022-04-15T05:20:00+00:00" or null if no calendar holds it
    }],
    "summary": null or {
      "text": "...",
      "from_partitions": [1],         it was made from these partitions' behaviors; a shift's are [j-1, j]
      "writer": "...", "prompt_version": "...",
      "prompt_tokens": 512 or null, "response_tokens": 128 or null,   null if the writer counts none
      "seconds": 1.25,                wall time of the writer's call
      "made_at": 1650000100.0, "made": "2022-04-15T05:21:40+00:00",
      "note": "..."                   what the prompt left out, or how the answer was cut; empty if nothing is wrong
    },
    "shift": as summary,
    "vectors": [{"encoding": "<fingerprint>", "dimension": 64, "values": [0.1, ...]}],
    "open": [{"step": "summary" | "shift" | "representation", "encoding": "<fingerprint>" or "",
              "dead": false}]         what the partition still needs; dead ones were given up
  }],
  "cache": [as behaviors],            not in a partition yet
  "dead": [{"partition": 1, "step": "summary", "encoding": "", "attempts": 5, "error": "..."}]
}
```

``values`` are float32 as the shortest decimal that reads back as the same float32; they are in an export alone. All
text is ASCII with escapes, so that no terminal and no encoding can change it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from liber_runtime.behavior import Attributes, Behavior, Text
from liber_runtime.memory import DeadStep, PartitionRecord, Representation
from liber_runtime.timeline import UserView
from liber_runtime.wording import iso_time

FORMAT = "liber.user"
VERSION = 1


def write_user(view: UserView, *, vectors: bool) -> Iterator[str]:
    """The document, piece by piece: a partition at a time, so that a long memory is never one string.

    Args:
        view: what is held.
        vectors: with the vectors' numbers.
    """
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "user_id": view.timeline.user_id,
        "profile": _attributes(view.timeline.profile),
        "domain": dataclasses.asdict(view.domain) if view.domain else None,
        "encodings": sorted(view.encodings),
    }
    yield "{\n"
    for key, value in head.items():
        yield f"{json.dumps(key)}: {_dump(value)},\n"
    yield from _array("partitions", (_partition(view, record, vectors) for record in view.timeline.partitions))
    yield ",\n"
    yield from _array("cache", (_behavior(view, behavior) for behavior in view.timeline.cache))
    yield ",\n"
    yield from _array("dead", map(_dead, view.dead))
    yield "\n}\n"


def _array(key: str, values: Iterator[dict[str, Any]]) -> Iterator[str]:
    yield f"{json.dumps(key)}: ["
    separator = "\n"
    for value in values:
        yield separator + _dump(value)
        separator = ",\n"
    yield "]" if separator == "\n" else "\n]"


def _partition(view: UserView, record: PartitionRecord, vectors: bool) -> dict[str, Any]:
    return {
        "number": record.number,
        "behaviors": [_behavior(view, behavior) for behavior in record.behaviors],
        "summary": _text(view, record, record.summary),
        "shift": _text(view, record, record.shift),
        "vectors": [_vector(name, record.representations[name], vectors) for name in sorted(record.representations)],
        "open": [
            {"step": step.step, "encoding": step.fingerprint, "dead": step.dead is not None}
            for step in view.open_steps(record)
        ],
    }


def _behavior(view: UserView, behavior: Behavior) -> dict[str, Any]:
    return {
        "event_id": behavior.event_id,
        "item_id": behavior.item_id,
        "title": view.title(behavior) or None,
        "feedback": behavior.feedback,
        "timestamp": behavior.timestamp,
        "time": iso_time(behavior.timestamp),
    }


def _text(view: UserView, record: PartitionRecord, text: Text | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return {
        "text": text.text,
        "from_partitions": list(view.sources(record, text)),
        "writer": text.writer,
        "prompt_version": text.prompt_version,
        "prompt_tokens": text.prompt_tokens,
        "response_tokens": text.response_tokens,
        "seconds": text.seconds,
        "made_at": text.made_at,
        "made": iso_time(text.made_at),
        "note": text.note,
    }


def _vector(fingerprint: str, made: Representation, values: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"encoding": fingerprint, "dimension": len(made.vector)}
    if values:
        # A float32 names itself in at most 9 digits; as float64 it would carry 17.
        shown["values"] = [float(str(number)) for number in made.vector]
    return shown


def _dead(step: DeadStep) -> dict[str, Any]:
    return {
        "partition": step.number,
        "step": step.step,
        "encoding": step.fingerprint,
        "attempts": step.attempts,
        "error": step.error,
    }


def _attributes(attributes: Attributes) -> dict[str, Any]:
    """JSON knows no NaN and no infinity; an attribute that is one says nothing."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in attributes.items()
    }


def _dump(value: dict[str, Any] | Sequence[Any] | str | int | None) -> str:
    return json.dumps(value, allow_nan=False)
