"""Behavior logs, item tables and profiles from CSV, JSON lines or Parquet, read line by line.

A reader never guesses past a broken line: it stops with an `InvalidInputError` that names the file, the line, the
value and the fix.

Columns:
    behaviors: ``user``, ``item``, ``timestamp`` (seconds since 1970 or ISO-8601; without a zone it is UTC),
        ``feedback`` (a number) and, if there is one, ``event_id``. Other columns are ignored.
    items: ``item``, ``title``; every other column is an attribute.
    profiles: ``user``; every other column is an attribute.

Attributes in CSV are typed by column: a column in which any value holds ``|`` is multi-valued in every row
(``Drama|War``), one in which all values are plain decimal numbers is numeric (``007`` is not: it is a code), anything
else is text. JSON lines and Parquet carry their own types: text, number, list of texts. An empty or null value is an
absent attribute.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeAlias

from liber_runtime.behavior import Attributes, AttributeValue, Behavior, Item
from liber_runtime.exceptions import ConfigurationError, InvalidInputError

STANDARD_INPUT = "-"
SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
MAX_LINE_BYTES = 1 << 20
"""A line longer than this is a file in another format, and is not read into memory to find that out."""

_PARQUET_BATCH_ROWS = 1 << 16
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d{1,3})?", re.ASCII)
_ISO_8601 = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?\s?(Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
)
_LAST_SECOND = 253402300799.0  # of the year 9999
_FIRST_SECOND = -62135596800.0  # of the year 1

_Record: TypeAlias = Mapping[str, Any]
_Numbered: TypeAlias = tuple[int, _Record]


def read_behaviors(path: str | Path) -> Iterator[Behavior]:
    """Yields the behaviors of a log in file order, one at a time.

    Args:
        path: a ``.csv``, ``.jsonl``/``.ndjson`` or ``.parquet`` file, or ``-`` for standard input, which is JSON
            lines if its first byte is ``{`` and CSV otherwise.

    Raises:
        InvalidInputError: missing or empty file, unknown suffix, missing column, or a broken line.
        ConfigurationError: Parquet without the ``parquet`` extra.
    """
    found = False
    for line, record in _records(path, required=("user", "item", "timestamp", "feedback")):
        found = True
        try:
            yield _behavior(record)
        except InvalidInputError as error:
            _refuse(path, line, str(error))
    if not found:
        raise InvalidInputError(f"{_name(path)} holds no behaviors; put at least one line below the header")


def read_items(path: str | Path) -> list[Item]:
    """Reads an item table: ``item``, ``title`` and attributes.

    Raises:
        InvalidInputError: missing or empty file, missing column, a broken line, or an item listed twice.
        ConfigurationError: Parquet without the ``parquet`` extra.
    """
    items: dict[str, Item] = {}
    for line, record, attributes in _described(path, required=("item", "title")):
        try:
            title = record["title"]
            if not isinstance(title, str) or not title.strip():
                raise InvalidInputError(
                    f"title {title!r:.80} of item {record['item']!r:.80} is not a text; give it one"
                )
            item = Item(_id("item", record["item"]), title, attributes)
            if item.item_id in items:
                raise InvalidInputError(f"item {item.item_id!r:.80} was listed before; keep one line for it")
        except InvalidInputError as error:
            _refuse(path, line, str(error))
        items[item.item_id] = item
    return list(items.values())


def read_profiles(path: str | Path) -> dict[str, Attributes]:
    """Reads users' profiles: ``user`` and attributes.

    Raises:
        InvalidInputError: missing or empty file, missing column, a broken line, or a user listed twice.
        ConfigurationError: Parquet without the ``parquet`` extra.
    """
    profiles: dict[str, Attributes] = {}
    for line, record, attributes in _described(path, required=("user",)):
        try:
            user = _id("user", record["user"])
            if user in profiles:
                raise InvalidInputError(f"user {user!r:.80} was listed before; keep one line for each user")
        except InvalidInputError as error:
            _refuse(path, line, str(error))
        profiles[user] = attributes
    return profiles


def parse_timestamp(value: object) -> float:
    """Seconds since 1970-01-01 UTC from a number of seconds, an ISO-8601 text or a datetime.

    Raises:
        InvalidInputError: anything else, or a time outside the years 1 to 9999 (milliseconds, usually).
    """
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)).timestamp()
    if isinstance(value, datetime.date):
        return datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.timezone.utc).timestamp()
    seconds = _iso_8601(value.strip()) if isinstance(value, str) else None
    if seconds is None:
        try:
            seconds = _number(value)
        except ValueError:
            raise InvalidInputError(
                f"timestamp {value!r:.80} is neither seconds since 1970 nor ISO-8601; write 1700000000 or "
                "2023-11-14T22:13:20Z"
            ) from None
    if not _FIRST_SECOND <= seconds <= _LAST_SECOND:
        raise InvalidInputError(f"timestamp {value!r:.80} is not a time in seconds; divide milliseconds by 1000")
    return seconds


def _iso_8601(text: str) -> float | None:
    match = _ISO_8601.fullmatch(text)
    if match is None:
        return None
    date, minutes, seconds, fraction, zone = match.groups()
    offset = "+00:00" if zone in (None, "Z") else f"{zone[:3]}:{zone[3:].lstrip(':') or '00'}"
    # Python 3.10 reads a part of ISO-8601 only, so the text is brought to that part first.
    plain = f"{date}T{minutes or '00:00'}:{seconds or '00'}.{(fraction or '').ljust(6, '0')[:6]}{offset}"
    try:
        return datetime.datetime.fromisoformat(plain).timestamp()
    except (ValueError, OverflowError):
        return None


def _number(value: object) -> float:
    if isinstance(value, bool) or value is None:
        raise ValueError
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        raise ValueError from None


def _behavior(record: _Record) -> Behavior:
    try:
        feedback = _number(record["feedback"])
    except ValueError:
        raise InvalidInputError(
            f"feedback {record['feedback']!r:.80} is not a number; write a rating, seconds, or 1 and 0 for clicks"
        ) from None
    event = record.get("event_id")
    return Behavior(
        user_id=_id("user", record["user"]),
        item_id=_id("item", record["item"]),
        feedback=feedback,
        timestamp=parse_timestamp(record["timestamp"]),
        event_id="" if event is None or event == "" else _id("event", event),
    )


def _id(noun: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or value == "":
        raise InvalidInputError(f"{noun} id is missing; give the line one or drop it")
    if not isinstance(value, str):
        raise InvalidInputError(f"{noun} id {value!r:.80} is a {type(value).__name__}; write it as text")
    return value


def _described(path: str | Path, required: tuple[str, ...]) -> Iterator[tuple[int, _Record, Attributes]]:
    """Records with their typed attributes, i.e. every column beside the required ones."""
    numbered = list(_records(path, required))
    if not numbered:
        raise InvalidInputError(f"{_name(path)} holds no lines; put at least one below the header")
    types = _column_types(numbered, required) if Path(path).suffix == ".csv" else {}
    for line, record in numbered:
        attributes: dict[str, AttributeValue] = {}
        for name, value in record.items():
            if name in required or value is None or value == "":
                continue
            try:
                attributes[name] = types[name](value) if name in types else _typed(name, value)
            except InvalidInputError as error:
                _refuse(path, line, str(error))
        yield line, record, attributes


def _column_types(numbered: list[_Numbered], required: tuple[str, ...]) -> dict[str, Callable[[str], AttributeValue]]:
    types: dict[str, Callable[[str], AttributeValue]] = {}
    for name in numbered[0][1]:
        if name in required:
            continue
        values = [record[name] for _, record in numbered if record[name]]
        if any("|" in value for value in values):
            types[name] = _split
        elif values and all(_NUMBER.fullmatch(value) for value in values):
            types[name] = int if all(value.lstrip("-").isdigit() for value in values) else float
        else:
            types[name] = str
    return types


def _split(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split("|") if part.strip())


def _typed(name: str, value: object) -> AttributeValue:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int) or (isinstance(value, float) and value - value == 0):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise InvalidInputError(f"{name} {value!r:.80} is not an attribute; write a text, a number or a list of texts")


def _records(path: str | Path, required: tuple[str, ...]) -> Iterator[_Numbered]:
    """(line number, record) from any source; every record has all the required keys."""
    if str(path) == STANDARD_INPUT:
        lines = _lines(sys.stdin.buffer, path)
        first = next(lines, "")
        rest = itertools.chain([first] if first else [], lines)
        return (_json_records if first.startswith("{") else _csv_records)(rest, path, required)
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InvalidInputError(f"{path} has an unknown suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        return _parquet_records(path, required)
    return (_csv_records if path.suffix == ".csv" else _json_records)(_file_lines(path), path, required)


def _file_lines(path: Path) -> Iterator[str]:
    _require_file(path)
    try:
        with path.open("rb") as stream:
            yield from _lines(stream, path)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _require_file(path: Path) -> None:
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist; check the path")
    if path.is_dir():
        raise InvalidInputError(f"{path} is a directory; name the file in it")


def _lines(stream: BinaryIO, path: str | Path) -> Iterator[str]:
    """Decoded lines. Decoding line by line, rather than by the stream, is what can name the broken line."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_LINE_BYTES:
            _refuse(path, number, f"longer than {MAX_LINE_BYTES} bytes; is this a text file with one record a line?")
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            bad = line[error.start : error.end]
            _refuse(path, number, f"byte {bad!r} at column {error.start + 1} is not UTF-8; re-encode the file as UTF-8")
    if not number:
        raise InvalidInputError(f"{_name(path)} is empty; put a header and at least one line into it")


def _csv_records(lines: Iterable[str], path: str | Path, required: tuple[str, ...]) -> Iterator[_Numbered]:
    rows = csv.reader(lines, strict=True)
    try:
        header = [column.strip() for column in next(rows, [])]
        _require_columns(header, path, required)
        repeated = {column for column in header if header.count(column) > 1}
        if repeated:
            _refuse(path, 1, f"column {min(repeated)!r} appears twice in the header; rename one")
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                _refuse(
                    path,
                    rows.line_num,
                    f"{len(row)} values {row!r:.120} under {len(header)} columns; quote values that hold a comma",
                )
            yield rows.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        _refuse(path, rows.line_num, f"not CSV ({error}); quote values that hold a comma, a quote or a line break")


def _require_columns(found: Iterable[str], path: str | Path, required: tuple[str, ...]) -> None:
    names = list(found)
    missing = [column for column in required if column not in names]
    if missing:
        listed = ", ".join(map(repr, names))
        _refuse(
            path, 1, f"column {missing[0]!r} is missing, there are {listed:.200}; name the columns {','.join(required)}"
        )


def _json_records(lines: Iterable[str], path: str | Path, required: tuple[str, ...]) -> Iterator[_Numbered]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            _refuse(path, number, f"{line.strip()!r:.80} is not JSON ({error}); write one object a line")
        if not isinstance(record, dict):
            _refuse(path, number, f"{line.strip()!r:.80} is not an object; write one {{...}} a line")
        for key in required:
            if key not in record:
                _refuse(path, number, f"key {key!r} is missing from {line.strip()!r:.120}; add it")
        yield number, record


def _parquet_records(path: Path, required: tuple[str, ...]) -> Iterator[_Numbered]:
    try:
        import polars
    except ImportError:
        raise ConfigurationError(f"{path} is Parquet, which needs polars; install liber-runtime[parquet]") from None
    _require_file(path)
    try:
        table = polars.scan_parquet(path)
        _require_columns(table.collect_schema().names(), path, required)
        rows = table.select(polars.len()).collect().item()
        for start in range(0, rows, _PARQUET_BATCH_ROWS):
            batch = table.slice(start, _PARQUET_BATCH_ROWS).collect()
            yield from enumerate(batch.iter_rows(named=True), start=start + 1)
    except (polars.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInputError(f"{path} cannot be read as Parquet ({reason:.200}); write it again") from None


def _refuse(path: str | Path, line: int, problem: str) -> NoReturn:
    raise InvalidInputError(f"{_name(path)}, line {line}: {problem}") from None


def _name(path: str | Path) -> str:
    return "standard input" if str(path) == STANDARD_INPUT else str(path)
