from __future__ import annotations

import io
import itertools
import json
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liber_runtime import behavior_log
from liber_runtime.behavior import Behavior, Item
from liber_runtime.behavior_log import parse_timestamp, read_behaviors, read_items, read_profiles
from liber_runtime.exceptions import ConfigurationError, InvalidInputError

BEHAVIORS = [
    Behavior("ann", "i1", 4.0, 1700000000.0),
    Behavior("bob", "i,2", 2.5, 1700000001.5, "e7"),
    Behavior("ünal", "3", 0.0, -1.0),
]
ROWS = [
    {"user": each.user_id, "item": each.item_id, "timestamp": each.timestamp, "feedback": each.feedback}
    for each in BEHAVIORS
]
ROWS[1]["event_id"] = "e7"
CSV = (
    "user,item,timestamp,feedback,event_id\n"
    "ann,i1,1700000000,4,\n"
    'bob,"i,2",2023-11-14T22:13:21.5Z,2.5,e7\n'
    "\n"
    "ünal,3,1969-12-31 23:59:59,0,\n"
)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_json_lines_and_parquet_hold_the_same_log(tmp_path: Path) -> None:
    csv = write(tmp_path / "log.csv", CSV)
    lines = write(tmp_path / "log.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    parquet = tmp_path / "log.parquet"
    polars.DataFrame(ROWS, infer_schema_length=None).write_parquet(parquet)
    assert list(read_behaviors(csv)) == BEHAVIORS
    assert list(read_behaviors(lines)) == BEHAVIORS
    assert list(read_behaviors(parquet)) == BEHAVIORS


def test_byte_order_mark_line_ends_and_other_columns_do_not_matter(tmp_path: Path) -> None:
    content = "\ufefffeedback,user,device,item,timestamp\r\n4,ann,phone,i1,1700000000\r\n"
    assert list(read_behaviors(write(tmp_path / "log.csv", content))) == BEHAVIORS[:1]


def test_whole_numbers_are_ids_in_json_and_parquet(tmp_path: Path) -> None:
    row = {"user": 196, "item": 242, "timestamp": 881250949, "feedback": 3}
    parquet = tmp_path / "log.parquet"
    polars.DataFrame([row]).write_parquet(parquet)
    expected = [Behavior("196", "242", 3.0, 881250949.0)]
    assert list(read_behaviors(write(tmp_path / "log.jsonl", json.dumps(row)))) == expected
    assert list(read_behaviors(parquet)) == expected


def test_parquet_is_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behavior_log, "_PARQUET_BATCH_ROWS", 3)
    path = tmp_path / "log.parquet"
    when = [datetime(2024, 1, 1, 0, 0, second, tzinfo=timezone.utc) for second in range(8)]
    table = polars.DataFrame({"user": ["u"] * 8, "item": list("abcdefgh"), "timestamp": when, "feedback": [1.0] * 8})
    table.write_parquet(path)
    assert [each.item_id for each in read_behaviors(path)] == list("abcdefgh")
    assert [each.timestamp for each in read_behaviors(path)] == [moment.timestamp() for moment in when]
    table.with_columns(item=polars.Series(["a"] * 7 + [None])).write_parquet(path)
    with pytest.raises(InvalidInputError, match="line 8: item id is missing"):
        list(read_behaviors(path))


@pytest.mark.parametrize("content", [CSV, "\n".join(json.dumps(row) for row in ROWS)])
def test_standard_input_is_told_apart_by_its_first_byte(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert list(read_behaviors("-")) == BEHAVIORS


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "standard input is empty"),
        ("user,item,timestamp,feedback\na,b,1,x\n", "standard input, line 2: feedback 'x'"),
    ],
)
def test_broken_standard_input_is_named(content: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    with pytest.raises(InvalidInputError, match=named):
        list(read_behaviors("-"))


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", CSV + "broken\n")
    assert list(itertools.islice(read_behaviors(path), 3)) == BEHAVIORS


HEADER = "user,item,timestamp,feedback,event_id\n"


@pytest.mark.parametrize(
    ("content", "line", "named"),
    [
        ("user,item,time,feedback\n", 1, "column 'timestamp' is missing"),
        ("user;item;timestamp;feedback\n", 1, "'user;item;timestamp;feedback'; separate values by commas, not by ';'"),
        ("user\titem\ttimestamp\tfeedback\n", 1, "separate values by commas, not by '\\t'"),
        ("user,user_id,item,timestamp\n", 1, "column 'feedback' is missing"),
        ("user_id,user_id,item,timestamp,rating\n", 1, "column 'user' appears twice"),
        ("user,item,timestamp,feedback,user\n", 1, "column 'user' appears twice"),
        (HEADER + "a,b,1\n", 2, "3 values"),
        (HEADER + "a,b,1,4,,9\n", 2, "6 values"),
        (HEADER + "a,b,1,4,\n,b,1,4,\n", 3, "user id is missing"),
        (HEADER + "a,,1,4,\n", 2, "item id is missing"),
        (HEADER + f"{'x' * 600},b,1,4,\n", 2, "600 bytes"),
        (HEADER + "a,b,1,five,\n", 2, "feedback 'five'"),
        (HEADER + "a,b,1,,\n", 2, "feedback ''"),
        (HEADER + "a,b,1,nan,\n", 2, "feedback nan"),
        (HEADER + "a,b,yesterday,4,\n", 2, "timestamp 'yesterday'"),
        (HEADER + "a,b,2023-02-30,4,\n", 2, "timestamp '2023-02-30'"),
        (HEADER + "a,b,14/11/2023,4,\n", 2, "timestamp '14/11/2023' is neither"),
        (HEADER + "a,b,14/11/2023,4,\n", 2, "pandas.to_datetime"),
        (HEADER + "a,b,nan,4,\n", 2, "timestamp 'nan' is not a finite number; correct or drop the event"),
        (HEADER + "a,b,-inf,4,\n", 2, "timestamp '-inf' is not a finite number"),
        (HEADER + "a,b,,4,\n", 2, "timestamp ''"),
        (HEADER + "a,b,1700000000000,4,\n", 2, "divide milliseconds by 1000"),
        (HEADER + 'a,"b,1,4,\n', 2, "not CSV"),
        (HEADER + "a,b\x01,1,4,\n", 2, "control character"),
        (HEADER.encode() + b"a,b,1,4,\nf\xe9e,b,1,4,\n", 3, "byte b'\\xe9' at column 2"),
        (HEADER + "a" * (behavior_log.MAX_LINE_BYTES + 1), 2, "longer than"),
    ],
)
def test_a_broken_csv_line_is_named(content: str | bytes, line: int, named: str, tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", content)
    with pytest.raises(InvalidInputError) as caught:
        list(read_behaviors(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"user": "a", "item": "b", "timestamp": 1}', "key 'feedback' is missing"),
        ('{"user": "a", "item": "b", "timestamp": 1, "feedback": true}', "feedback True"),
        ('{"user": "a", "item": "b", "timestamp": 1, "feedback": null}', "feedback None"),
        ('{"user": "a", "item": "b", "timestamp": [], "feedback": 1}', "timestamp []"),
        ('{"user": "a", "item": "b", "timestamp": NaN, "feedback": 1}', "timestamp nan is not a finite number"),
        ('{"user": 1.5, "item": "b", "timestamp": 1, "feedback": 1}', "user id 1.5 is a float"),
        ('{"user": "a", "item": "\\ud800", "timestamp": 1, "feedback": 1}', "not valid UTF-8"),
        ('{"user": "a", "item": "b", "timestamp": 1, "feedback": 1, "event_id": {}}', "event id {}"),
        ('["a", "b", 1, 4]', "not an object"),
        ("{user: a}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_broken_json_line_is_named(content: str, named: str, tmp_path: Path) -> None:
    good = '{"user": "a", "item": "b", "timestamp": 1, "feedback": 1}\n'
    path = write(tmp_path / "log.jsonl", good + content + "\n")
    with pytest.raises(InvalidInputError) as caught:
        list(read_behaviors(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_logs_are_named(tmp_path: Path) -> None:
    directory = tmp_path / "folder.csv"
    directory.mkdir()
    for path, named in [
        (tmp_path / "none.csv", "does not exist"),
        (tmp_path / "none.parquet", "does not exist"),
        (directory, "is a directory"),
        (write(tmp_path / "log.txt", CSV), "unknown suffix '.txt'"),
        (write(tmp_path / "empty.csv", ""), "is empty"),
        (write(tmp_path / "empty.jsonl", ""), "is empty"),
        (write(tmp_path / "header.csv", HEADER), "holds no behaviors"),
        (write(tmp_path / "bad.parquet", CSV), "cannot be read as Parquet"),
    ]:
        with pytest.raises(InvalidInputError) as caught:
            list(read_behaviors(path))
        assert str(path) in str(caught.value)
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)


def test_parquet_without_a_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    polars.DataFrame({"user": ["a"], "item": ["b"], "when": [1]}).write_parquet(path)
    with pytest.raises(InvalidInputError, match="column 'timestamp' is missing"):
        list(read_behaviors(path))


def test_parquet_without_polars_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ConfigurationError, match=r"liber-runtime\[parquet\]"):
        list(read_behaviors(tmp_path / "log.parquet"))


@given(st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29)), st.integers(-1439, 1439))
def test_iso_8601_texts_and_datetimes_are_the_same_moment(moment: datetime, offset: int) -> None:
    utc = moment.replace(tzinfo=timezone.utc).timestamp()
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=offset)))
    assert parse_timestamp(moment) == parse_timestamp(moment.isoformat()) == utc
    assert parse_timestamp(zoned) == parse_timestamp(zoned.isoformat()) == zoned.timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-02", 86400.0),
        ("1970-01-01T00:01Z", 60.0),
        ("1970-01-01 00:00:01", 1.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("1970-01-01T01:00:00+0100", 0.0),
        ("1970-01-01T01:00:00+01", 0.0),
        ("1970-01-01T00:00:00.25Z", 0.25),
        ("1970-01-01T00:00:00.123456789Z", 0.123456),
        ("12.5", 12.5),
    ],
)
def test_timestamps_are_read_alike_on_every_python(text: str, seconds: float) -> None:
    assert parse_timestamp(text) == seconds


def test_item_columns_are_typed_by_all_their_values(tmp_path: Path) -> None:
    path = write(
        tmp_path / "items.csv",
        "item,title,genres,year,score,code,zip\n"
        'i1,"Comma, The | Film",Drama|War,1994,4.5,x1,00123\n'
        "i2,Other,Comedy,,3,7,10115\n"
        "i3,Third,,2001,,,\n",
    )
    assert read_items(path) == [
        Item(
            "i1",
            "Comma, The | Film",
            {"genres": ("Drama", "War"), "year": 1994, "score": 4.5, "code": "x1", "zip": "00123"},
        ),
        Item("i2", "Other", {"genres": ("Comedy",), "score": 3.0, "code": "7", "zip": "10115"}),
        Item("i3", "Third", {"year": 2001}),
    ]


def test_synonyms_stand_for_columns_that_are_missing(tmp_path: Path) -> None:
    csv = write(tmp_path / "log.csv", CSV.replace("user,item", "user_id,item_id").replace("feedback", "rating"))
    named = [
        {"user_id": row["user"], "item": row["item"], "timestamp": row["timestamp"], "rating": row["feedback"]}
        for row in ROWS
    ]
    named[1]["event_id"] = "e7"
    lines = write(tmp_path / "log.jsonl", "\n".join(map(json.dumps, named)))
    parquet = tmp_path / "log.parquet"
    polars.DataFrame(named, infer_schema_length=None).write_parquet(parquet)
    assert list(read_behaviors(csv)) == list(read_behaviors(lines)) == list(read_behaviors(parquet)) == BEHAVIORS
    # Beside the column itself, a synonym is any other column.
    both = write(tmp_path / "both.csv", "user,item,timestamp,feedback,rating\nann,i1,1700000000,4,x\n")
    assert list(read_behaviors(both)) == BEHAVIORS[:1]
    assert read_items(write(tmp_path / "items.csv", "item_id,title,rating\ni1,One,3\n")) == [
        Item("i1", "One", {"rating": 3})
    ]
    assert read_profiles(write(tmp_path / "users.csv", "user_id,age\nann,39\n")) == {"ann": {"age": 39}}


def test_item_tables_in_json_lines_and_parquet_carry_their_types(tmp_path: Path) -> None:
    rows = [
        {"item": "i1", "title": "One", "genres": ["Drama", "War"], "year": 1994, "new": True},
        {"item": "i2", "title": "Two", "genres": None, "year": 2001, "new": False},
    ]
    expected = [
        Item("i1", "One", {"genres": ("Drama", "War"), "year": 1994, "new": "true"}),
        Item("i2", "Two", {"year": 2001, "new": "false"}),
    ]
    parquet = tmp_path / "items.parquet"
    polars.DataFrame(rows).write_parquet(parquet)
    assert read_items(write(tmp_path / "items.jsonl", "\n".join(map(json.dumps, rows)))) == expected
    assert read_items(parquet) == expected


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("item,name\ni1,One\n", "line 1: column 'title' is missing"),
        ("item,title\ni1,One\ni1,Two\n", "line 3: item 'i1' was listed before"),
        ("item,title\ni1,\n", "line 2: title ''"),
        ("item,title\n,One\n", "line 2: item id is missing"),
        ("item,title\n", "holds no lines"),
        ("movie,title\ni1,One\n", "line 1: column 'item' is missing, there are 'movie', 'title'"),
        (
            "item,title,year\ni1,One,1990\ni2,Two,nan\n",
            "line 3: year 'nan' is not a finite number; correct it or leave",
        ),
        ("item,title,year\ni1,One,-inf\ni2,Two,1.5\n", "line 2: year '-inf' is not a finite number"),
        ("item,title,year\ni1,One,1990\ni2,Two,1e999\n", "line 3: year '1e999' is not a finite number"),
        (f"item,title,year\ni1,One,1990\ni2,Two,{'9' * 5000}\n", "line 3: year '9+ is not a finite number"),
    ],
)
def test_a_broken_item_table_is_named(content: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=named):
        read_items(write(tmp_path / "items.csv", content))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ('{"a": 1}', r"line 2: cast \{'a': 1\} is not an attribute"),
        ("[1, 2]", r"line 2: cast \[1, 2\] is not an attribute"),
        ("NaN", "line 2: cast nan is not a finite number; correct it or leave it out"),
        ("1e999", "line 2: cast inf is not a finite number"),
        ("9" * 400, r"line 2: cast 9+\.\.\. is not a number that fits"),
        ('"7"', "line 2: cast '7' is a text, but 7 in line 1 is a number; write one kind in all lines"),
        ('["7"]', r"line 2: cast \('7',\) is a list of texts, but 7 in line 1 is a number"),
        ("true", "line 2: cast 'true' is a text, but 7 in line 1 is a number"),
    ],
)
def test_an_attribute_of_another_type_is_named(value: str, named: str, tmp_path: Path) -> None:
    first = '{"item": "i1", "title": "One", "cast": 7}\n'
    path = write(tmp_path / "items.jsonl", first + f'{{"item": "i2", "title": "Two", "cast": {value}}}\n')
    with pytest.raises(InvalidInputError, match=named):
        read_items(path)


def test_not_a_number_in_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    table = polars.DataFrame({"item": ["i1", "i2"], "title": ["One", "Two"], "year": [1990.0, float("nan")]})
    table.write_parquet(path)
    with pytest.raises(InvalidInputError, match="line 2: year nan is not a finite number"):
        read_items(path)
    table.with_columns(polars.col("year").fill_nan(None)).write_parquet(path)
    assert [item.attributes for item in read_items(path)] == [{"year": 1990.0}, {}]


@pytest.mark.parametrize(
    ("years", "told"),
    [
        (("1990", "1991", "c. 1992"), "line 4: year 'c. 1992' is not a number, but 2 of 3 values of year are"),
        (("1990", "soon", "c. 1992"), ""),  # a column of texts, one of which looks like a number
        (("10115", "10117", "01067"), ""),  # codes
        (("soon", "nan", "late"), ""),
    ],
)
def test_a_text_among_numbers_makes_a_text_column_and_is_told(
    years: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"i{number},Title,{year}\n" for number, year in enumerate(years))
    items = read_items(write(tmp_path / "items.csv", f"item,title,year\n{rows}"))
    assert tuple(item.attributes["year"] for item in items) == years
    said = capsys.readouterr().err
    assert told in said
    assert bool(said) == bool(told)


def test_profiles_are_typed_and_listed_once(tmp_path: Path) -> None:
    path = write(tmp_path / "users.csv", "user,age,gender\nann,39,female\nbob,,male\n")
    assert read_profiles(path) == {"ann": {"age": 39, "gender": "female"}, "bob": {"gender": "male"}}
    write(path, "user,age\nann,39\nann,40\n")
    with pytest.raises(InvalidInputError, match="line 3: user 'ann' was listed before"):
        read_profiles(path)
