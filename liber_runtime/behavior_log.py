"""Behavior logs, item tables and profiles from CSV, JSON lines or Parquet, read line by line.

A reader never guesses past a broken line: it stops with an `InvalidInputError` that names the file, the line, the
value and the fix.

Columns:
    behaviors: ``user``, ``item``, ``timestamp`` (seconds since 1970 or ISO-8601; without a zone it is UTC),
        ``feedback`` (a number) and, if there is one, ``event_id``. Other columns are ignored.
    items: ``item``, ``title``; every other column is an attribute.
    profiles: ``user``; every other column is an attribute.

    Where one of these is missing, `SYNONYMS` of it is read in its place.

Attributes in CSV are typed by column: a column in which any value holds ``|`` is multi-valued in every row
(``Drama|War``), one in which all values are plain decimal numbers is numeric (``007`` is not: it is a code), anything
else is text. JSON lines and Parquet carry their own types: text, number, list of texts; an attribute that is a number
in one line is one in all. An empty or null value is an absent attribute; ``nan`` and ``inf`` among numbers are refused.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import datetime
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeAlias

from liber_runtime.behavior import Attributes, AttributeValue, Behavior, Item
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.memory.checks import check_arrival
from liber_runtime.progress import console

STANDARD_INPUT = "-"
BEHAVIOR_KEYS = ("user", "item", "timestamp", "feedback")
SYNONYMS: Mapping[str, str] = {"user": "user_id", "item": "item_id", "feedback": "rating"}
SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
MAX_LINE_BYTES = 1 << 20
"""A line longer than this is a file in another format, and is not read into memory to find that out."""

_PARQUET_BATCH_ROWS = 1 << 16
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d{1,3})?", re.ASCII)
_NO_NUMBER = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_ISO_8601 = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?\s?(Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
)
_LAST_SECOND = 253402300799.0  # of the year 9999
_FIRST_SECOND = -62135596800.0  # of the year 1

_Record: TypeAlias = Mapping[str, Any]
_Numbered: TypeAlias = tuple[int, _Record]
_Stray: TypeAlias = tuple[int, str]


class Place(NamedTuple):
    """Where a record of a log ends, so that reading can go on behind it.

    Attributes:
        offset: bytes from the start of a text file, rows of a Parquet file.
        line: lines before it.
    """

    offset: int
    line: int


START = Place(0, 0)


class BehaviorLog:
    """The behaviors of one log in file order, and how far reading has come.

    Args:
        path: a ``.csv``, ``.jsonl``/``.ndjson`` or ``.parquet`` file, or ``-`` for standard input, which is JSON
            lines if its first byte is ``{`` and CSV otherwise.
        start: the `place` that an earlier reading of the same file came to. Standard input has one start only.

    Attributes:
        offset: where the record of the newest behavior ended, see `Place`. A last line without its line break is not
            counted: it may still be growing.
    """

    def __init__(self, path: str | Path, start: Place = START) -> None:
        self.path = path
        self.offset = start.offset
        self._line = start.line
        self._start = start
        self._behaviors = self._read()
        self._first: list[Behavior] = []

    @property
    def place(self) -> Place:
        """Where the record of the newest behavior ended."""
        return Place(self.offset, self._line)

    def check(self) -> None:
        """Reads as far as the first behavior, which is not lost: a log that is none is refused before anything is done.

        Raises:
            InvalidInputError: see `__iter__`.
            ConfigurationError: see `__iter__`.
        """
        self._first += itertools.islice(self._behaviors, 1)

    def __iter__(self) -> Iterator[Behavior]:
        """Yields one behavior at a time; a log is read once.

        Raises:
            InvalidInputError: missing or empty file, unknown suffix, missing column, a broken line, or a timestamp more
                than a day ahead of the clock.
            ConfigurationError: Parquet without the ``parquet`` extra.
        """
        return itertools.chain(self._first, self._behaviors)

    def _read(self) -> Iterator[Behavior]:
        reached = _Reached(self._start.offset, self._start.line)
        found = self._start != START
        for line, record in _records(self.path, BEHAVIOR_KEYS, reached):
            found = True
            try:
                behavior = to_behavior(record)
            except InvalidInputError as error:
                _refuse(self.path, line, str(error))
            self.offset, self._line = reached.offset, reached.line
            yield behavior
        if not found:
            raise InvalidInputError(f"{_name(self.path)} holds no behaviors; put at least one line below the header")


def read_behaviors(path: str | Path) -> Iterator[Behavior]:
    """Yields the behaviors of a log in file order, one at a time; see `BehaviorLog`."""
    return iter(BehaviorLog(path))


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


def is_parquet(path: str | Path) -> bool:
    """Whether a log is Parquet, by its name."""
    return Path(path).suffix == ".parquet"


def size_of(path: str | Path) -> int:
    """Bytes of a text file, rows of a Parquet file: what `Place.offset` comes to at its end.

    Raises:
        InvalidInputError: it is not there, or said to be Parquet and is not.
        ConfigurationError: Parquet without the ``parquet`` extra.
    """
    if is_parquet(path):
        with _parquet(Path(path)) as (polars, table):
            return int(table.select(polars.len()).collect().item())
    _require_file(Path(path))
    return Path(path).stat().st_size


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
                "2023-11-14T22:13:20Z (pandas.to_datetime(column).dt.strftime('%Y-%m-%dT%H:%M:%SZ') converts dates)"
            ) from None
    if not math.isfinite(seconds):
        raise InvalidInputError(f"timestamp {value!r:.80} is not a finite number; correct or drop the event")
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


def to_behavior(record: Mapping[str, Any]) -> Behavior:
    """The behavior of a record with the keys ``user``, ``item``, ``timestamp``, ``feedback`` and maybe ``event_id``.

    Raises:
        InvalidInputError: a value that is none, or a timestamp more than a day ahead of the clock.
    """
    try:
        feedback = _number(record["feedback"])
    except ValueError:
        raise InvalidInputError(
            f"feedback {record['feedback']!r:.80} is not a number; write a rating, seconds, or 1 and 0 for clicks"
        ) from None
    event = record.get("event_id")
    behavior = Behavior(
        user_id=_id("user", record["user"]),
        item_id=_id("item", record["item"]),
        feedback=feedback,
        timestamp=parse_timestamp(record["timestamp"]),
        event_id="" if event is None or event == "" else _id("event", event),
    )
    check_arrival((behavior,))
    return behavior


def parse_record(text: str, required: tuple[str, ...] = BEHAVIOR_KEYS) -> dict[str, Any]:
    """The object on a JSON line, with all the `required` keys.

    Raises:
        InvalidInputError: not JSON, no object, or a key is missing.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{text.strip()!r:.80} is not JSON ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise InvalidInputError(f"{text.strip()!r:.80} is not an object; write one {{...}} a line")
    names = _names(record, required)
    for key in required:
        if key not in names:
            raise InvalidInputError(f"key {key!r} is missing from {text.strip()!r:.120}; add it")
    return dict(zip(names, record.values(), strict=True))


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
    types = _column_types(path, numbered, required) if Path(path).suffix == ".csv" else {}
    seen: dict[str, tuple[int, AttributeValue]] = {}
    for line, record in numbered:
        attributes: dict[str, AttributeValue] = {}
        for name, value in record.items():
            if name in required or value is None or value == "":
                continue
            try:
                attributes[name] = types[name](name, value) if name in types else _typed(name, value)
                _require_alike(name, attributes[name], *seen.setdefault(name, (line, attributes[name])))
            except InvalidInputError as error:
                _refuse(path, line, str(error))
        yield line, record, attributes


def _column_types(
    path: str | Path, numbered: list[_Numbered], required: tuple[str, ...]
) -> dict[str, Callable[[str, str], AttributeValue]]:
    types: dict[str, Callable[[str, str], AttributeValue]] = {}
    for name in numbered[0][1]:
        if name in required:
            continue
        values = [(line, record[name]) for line, record in numbered if record[name]]
        others = [(line, value) for line, value in values if not _NUMBER.fullmatch(value)]
        if any("|" in value for _, value in values):
            types[name] = _split
        elif values and not others:
            types[name] = _whole if all(value.lstrip("-").isdigit() for _, value in values) else _decimal
        else:
            types[name] = _text
            _check_strays(path, name, others, len(values))
    return types


def _check_strays(path: str | Path, name: str, others: list[_Stray], count: int) -> None:
    """Refuses ``nan`` and the like in a column of numbers; tells of texts in one, for they may be meant.

    A code with a leading zero is meant: nobody writes a number so.
    """
    texts = [(line, value) for line, value in others if not _NO_NUMBER.fullmatch(value.strip())]
    if texts and len(texts) >= count / 2:
        return
    for line, value in others:
        if _NO_NUMBER.fullmatch(value.strip()):
            _refuse(path, line, f"{name} {value!r:.80} is not a finite number; correct it or leave the cell empty")
    if not any(value[0] == "0" and value.isdigit() for _, value in texts):
        line, value = texts[0]
        console.print(
            f"{_name(path)}, line {line}: {name} {value!r:.80} is not a number, but {count - len(texts)} of {count} "
            f"values of {name} are; the whole column is read as text",
            soft_wrap=True,
        )


def _split(_: str, value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split("|") if part.strip())


def _text(_: str, value: str) -> str:
    return value


def _whole(name: str, value: str) -> int:
    # Python refuses to read integers of thousands of digits, and no float holds one of more than 309.
    _decimal(name, value)
    return int(value)


def _decimal(name: str, value: str) -> float:
    return _finite(name, value, float(value))


def _finite(name: str, value: object, number: float) -> float:
    if not math.isfinite(number):
        raise InvalidInputError(f"{name} {value!r:.80} is not a finite number; correct it or leave it out")
    return number


def _typed(name: str, value: object) -> AttributeValue:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        try:
            _finite(name, value, float(value))
        except OverflowError:
            raise InvalidInputError(f"{name} {str(value)[:80]}... is not a number that fits; correct it") from None
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise InvalidInputError(f"{name} {value!r:.80} is not an attribute; write a text, a number or a list of texts")


def _require_alike(name: str, value: AttributeValue, line: int, first: AttributeValue) -> None:
    if isinstance(value, int | float) != isinstance(first, int | float):
        raise InvalidInputError(
            f"{name} {value!r:.80} is a {_kind(value)}, but {first!r:.80} in line {line} is a {_kind(first)}; write "
            "one kind in all lines"
        )


def _kind(value: AttributeValue) -> str:
    return "number" if isinstance(value, int | float) else "text" if isinstance(value, str) else "list of texts"


class _Reached:
    """How far a reader has come; at first how far it shall skip. See `Place`."""

    def __init__(self, offset: int = 0, line: int = 0) -> None:
        self.offset = offset
        self.line = line


def _records(path: str | Path, required: tuple[str, ...], reached: _Reached | None = None) -> Iterator[_Numbered]:
    """(line number, record) from any source, from where `reached` says; every record has all the required keys."""
    reached = reached or _Reached()
    if str(path) == STANDARD_INPUT:
        lines = _Lines(sys.stdin.buffer, path, reached)
        yield from (_json_records if lines.first_byte() == b"{" else _csv_records)(lines, path, required)
        return
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InvalidInputError(f"{path} has an unknown suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    if is_parquet(path):
        yield from _parquet_records(path, required, reached)
        return
    _require_file(path)
    try:
        with path.open("rb") as stream:
            lines = _Lines(stream, path, reached)
            yield from (_csv_records if path.suffix == ".csv" else _json_records)(lines, path, required)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _require_file(path: Path) -> None:
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist; check the path")
    if path.is_dir():
        raise InvalidInputError(f"{path} is a directory; name the file in it")


class _Lines:
    """Decoded lines of a stream. Decoding line by line, rather than by the stream, is what can name the broken line."""

    def __init__(self, stream: BinaryIO, path: str | Path, reached: _Reached) -> None:
        self._stream = stream
        self._path = path
        self._reached = reached
        self._skip = Place(reached.offset, reached.line)
        self._first = b""
        self.number = reached.offset = reached.line = 0

    def first_byte(self) -> bytes:
        """What the stream begins with, still to be read; nothing if it is empty."""
        self._first = self._stream.read(1)
        return self._first

    def skip(self) -> None:
        """Goes on where an earlier reading ended, unless that is already behind."""
        if self._skip.offset > self._reached.offset:
            self._stream.seek(self._skip.offset)
            self._reached.offset, self._reached.line = self._skip
            self.number = self._skip.line

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE_BYTES + 1)
        if self._first:
            line, self._first = self._first + line, b""
        if not line:
            if not self.number:
                raise InvalidInputError(
                    f"{_name(self._path)} is empty; put a header and at least one line into it"
                ) from None
            raise StopIteration
        self.number += 1
        if len(line) > MAX_LINE_BYTES:
            problem = f"longer than {MAX_LINE_BYTES} bytes; is this a text file with one record a line?"
            _refuse(self._path, self.number, problem)
        try:
            text = (line.removeprefix(codecs.BOM_UTF8) if self.number == 1 else line).decode()
        except UnicodeDecodeError as error:
            bad = error.object[error.start : error.end]
            problem = f"byte {bad!r} at column {error.start + 1} is not UTF-8; re-encode the file as UTF-8"
            _refuse(self._path, self.number, problem)
        if line.endswith(b"\n"):
            self._reached.offset += len(line)
            self._reached.line = self.number
        return text


def _csv_records(lines: _Lines, path: str | Path, required: tuple[str, ...]) -> Iterator[_Numbered]:
    rows = csv.reader(lines, strict=True)
    try:
        header = _names([column.strip() for column in next(rows, [])], required)
        _require_columns(header, path, required)
        repeated = {column for column in header if header.count(column) > 1}
        if repeated:
            _refuse(path, 1, f"column {min(repeated)!r} appears twice in the header; rename one")
        lines.skip()
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                _refuse(
                    path,
                    lines.number,
                    f"{len(row)} values {row!r:.120} under {len(header)} columns; quote values that hold a comma",
                )
            yield lines.number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        _refuse(path, lines.number, f"not CSV ({error}); quote values that hold a comma, a quote or a line break")


def _require_columns(found: Iterable[str], path: str | Path, required: tuple[str, ...]) -> None:
    names = list(found)
    missing = [column for column in required if column not in names]
    if missing:
        listed = ", ".join(map(repr, names))
        mark = next((mark for mark in ";\t|" if mark in "".join(names)), "")
        fix = f"separate values by commas, not by {mark!r}" if mark else f"name the columns {','.join(required)}"
        _refuse(path, 1, f"column {missing[0]!r} is missing, there are {listed:.200}; {fix}")


def _names(found: Iterable[str], required: tuple[str, ...]) -> list[str]:
    """The columns by LIBER's names, a synonym for its own where that is missing."""
    names = list(found)
    own = {SYNONYMS[name]: name for name in required if name in SYNONYMS and name not in names}
    return [own.get(name, name) for name in names]


def _json_records(lines: _Lines, path: str | Path, required: tuple[str, ...]) -> Iterator[_Numbered]:
    lines.skip()
    for line in lines:
        if not line.strip():
            continue
        try:
            record = parse_record(line, required)
        except InvalidInputError as error:
            _refuse(path, lines.number, str(error))
        yield lines.number, record


def _parquet_records(path: Path, required: tuple[str, ...], reached: _Reached) -> Iterator[_Numbered]:
    with _parquet(path) as (polars, table):
        columns = table.collect_schema().names()
        names = _names(columns, required)
        _require_columns(names, path, required)
        table = table.rename(dict(zip(columns, names, strict=True)))
        rows = table.select(polars.len()).collect().item()
        for start in range(reached.offset, rows, _PARQUET_BATCH_ROWS):
            batch = table.slice(start, _PARQUET_BATCH_ROWS).collect()
            for row, record in enumerate(batch.iter_rows(named=True), start=start + 1):
                reached.offset = reached.line = row
                yield row, record


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[tuple[Any, Any]]:
    """Polars, and a Parquet file that nothing has been read of."""
    try:
        import polars
    except ImportError:
        raise ConfigurationError(f"{path} is Parquet, which needs polars; install liber-runtime[parquet]") from None
    _require_file(path)
    try:
        yield polars, polars.scan_parquet(path)
    except (polars.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInputError(f"{path} cannot be read as Parquet ({reason:.200}); write it again") from None


def _refuse(path: str | Path, line: int, problem: str) -> NoReturn:
    raise InvalidInputError(f"{_name(path)}, line {line}: {problem}") from None


def _name(path: str | Path) -> str:
    return "standard input" if str(path) == STANDARD_INPUT else str(path)
