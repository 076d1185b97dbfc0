from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import os
import socket
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders.datasets import Dataset, load, movielens, sample
from builders.datasets.download import download_movielens
from liber_runtime.behavior import Behavior, Item
from liber_runtime.exceptions import ConfigurationError, InvalidInputError

LIBER_DATA = os.environ.get("LIBER_DATA", "")
needs_movielens = pytest.mark.skipif(not LIBER_DATA, reason="LIBER_DATA does not name a MovieLens-100K directory")


def item_line(item: str, title: str, released: str, *genres: str) -> str:
    flags = "|".join("1" if genre in genres else "0" for genre in movielens.GENRES)
    return f"{item}|{title}|{released}||http://example.org|{flags}\n"


MOVIELENS = {
    "u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n",
    "u.item": item_line("1", "Toy Story (1995)", "01-Jan-1995", "Animation", "Comedy")
    + item_line("2", "Misérables, Les (1995)", "01-Jan-1996", "Drama")
    + item_line("3", "Untitled", "02-Mar-1997", "War")
    + item_line("4", "unknown", "", "unknown"),
    "u.data": "1\t1\t5\t300\n2\t2\t3\t100\n1\t3\t4\t100\n",
    "u.info": "2 users\n4 items\n3 ratings\n",
}


def write_movielens(directory: Path, **changed: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in {**MOVIELENS, **{name.replace("_", "."): text for name, text in changed.items()}}.items():
        (directory / name).write_bytes(content.encode("latin-1"))
    return directory


def write_tables(directory: Path, **tables: str) -> Path:
    for name, content in tables.items():
        stem, _, suffix = name.rpartition("_")
        (directory / f"{stem}.{suffix}").write_text(content, "utf-8")
    return directory


def test_behaviors_are_in_time_order_and_repeats_are_dropped() -> None:
    behaviors = [
        Behavior("a", "x", 1.0, 20.0),
        Behavior("b", "y", 1.0, 10.0),
        Behavior("a", "z", 1.0, 10.0),
        Behavior("a", "x", 1.0, 20.0),
        Behavior("b", "x", 1.0, 20.0, "e"),
        Behavior("b", "w", 2.0, 5.0, "e"),
    ]
    dataset = Dataset(sample.DOMAIN, behaviors, {}, {})
    assert [(each.user_id, each.item_id) for each in dataset.behaviors] == [
        ("b", "w"),
        ("b", "y"),
        ("a", "z"),
        ("a", "x"),
    ]


def test_movielens_is_read_in_its_original_format(tmp_path: Path) -> None:
    dataset = load(write_movielens(tmp_path))
    assert dataset.domain == movielens.DOMAIN
    assert [(each.user_id, each.item_id, each.feedback, each.timestamp) for each in dataset.behaviors] == [
        ("2", "2", 3.0, 100.0),
        ("1", "3", 4.0, 100.0),
        ("1", "1", 5.0, 300.0),
    ]
    assert list(dataset.items.values()) == [
        Item("1", "Toy Story (1995)", {"genres": ("Animation", "Comedy"), "year": 1995}),
        Item("2", "Misérables, Les (1995)", {"genres": ("Drama",), "year": 1995}),
        Item("3", "Untitled", {"genres": ("War",), "year": 1997}),
        Item("4", "unknown", {}),
    ]
    assert dataset.profiles["2"] == {"age": 53, "gender": "female", "occupation": "other"}


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("u.data", "1\t1\t5\n", "u.data, line 1: ['1', '1', '5'] is broken, it has 3 fields in place of 4"),
        ("u.data", "1\t1\t5\t300\n1\t2\t6\t300\n", "u.data, line 2"),
        ("u.data", "1\t1\tx\t300\n", "u.data, line 1"),
        ("u.data", "9\t1\t5\t300\n", "its user must be in u.user"),
        ("u.data", "1\t9\t5\t300\n", "its item in u.item"),
        ("u.data", "1\t1\t5\t300\n", "holds 1 ratings but"),
        ("u.user", "1|x|M|artist|1\n", "u.user, line 1"),
        ("u.user", "1|24|X|artist|1\n", "M or F"),
        ("u.item", "1|Toy Story|01-Jan-1995||url|1|0\n", "7 fields in place of 24"),
        ("u.item", item_line("1", "Toy Story", "").replace("0", "2"), "genre flags are 0 or 1"),
        ("u.info", "many users\n", "u.info, line 1"),
    ],
)
def test_broken_movielens_files_are_named(file: str, content: str, named: str, tmp_path: Path) -> None:
    write_movielens(tmp_path, **{file.replace(".", "_"): content})
    with pytest.raises(InvalidInputError) as caught:
        load(tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["u.item", "u.user"])
def test_a_missing_movielens_file_is_named(file: str, tmp_path: Path) -> None:
    (write_movielens(tmp_path) / file).unlink()
    with pytest.raises(InvalidInputError, match=f"{file} cannot be read"):
        load(tmp_path)


@needs_movielens
def test_movielens_100k_has_the_known_counts() -> None:
    dataset = load(LIBER_DATA)
    assert (len(dataset.profiles), len(dataset.items), len(dataset.behaviors)) == (943, 1682, 100_000)
    # The example of the paper's Figure 3.
    assert dataset.profiles["239"] == {"age": 39, "gender": "male", "occupation": "artist"}
    assert all(isinstance(item.attributes["year"], int) for item in dataset.items.values() if item.item_id != "267")


LOG = "user,item,timestamp,feedback\na,x,3,5\nb,y,1,1\na,z,2,2\n"
ITEMS = "item,title,kinds,brand,year\nx,Ex,Red|Blue,Acme,1990\ny,Why,Red,Acme,2000\n"


def test_a_directory_of_tables_describes_itself(tmp_path: Path) -> None:
    directory = tmp_path / "shop"
    directory.mkdir()
    dataset = load(write_tables(directory, behaviors_csv=LOG, items_csv=ITEMS, users_csv="user,age\na,30\n"))
    assert [each.item_id for each in dataset.behaviors] == ["y", "z", "x"]
    assert dataset.items["y"].attributes == {"kinds": ("Red",), "brand": "Acme", "year": 2000}
    assert dataset.profiles == {"a": {"age": 30}}
    domain = dataset.domain
    assert (domain.name, domain.item_noun, domain.feedback_noun) == ("shop", "item", "points")
    assert (domain.feedback_range, domain.positive_above) == ((1.0, 5.0), 3.0)
    assert (domain.factors, domain.group_attribute, domain.period_attribute) == (
        ("kinds", "brand", "year"),
        "kinds",
        "year",
    )


def test_a_repeating_text_attribute_is_the_group_where_none_is_multi_valued(tmp_path: Path) -> None:
    items = "item,title,code,brand\nx,Ex,c1,Acme\ny,Why,c2,Acme\n"
    assert load(write_tables(tmp_path, behaviors_csv=LOG, items_csv=items)).domain.group_attribute == "brand"


def test_domain_json_overrides_what_is_derived(tmp_path: Path) -> None:
    description = {"name": "toys", "item_noun": "toy", "feedback_range": [0, 10], "factors": ["colour"]}
    write_tables(tmp_path, behaviors_csv=LOG, items_csv=ITEMS, domain_json=json.dumps(description))
    domain = load(tmp_path).domain
    assert (domain.name, domain.item_noun, domain.feedback_noun) == ("toys", "toy", "points")
    assert (domain.feedback_range, domain.positive_above, domain.factors) == ((0.0, 10.0), 5.0, ("colour",))


@pytest.mark.parametrize(
    ("description", "named"),
    [
        ("{", "is not a JSON object"),
        ('{"item_nuon": "toy"}', "item_nuon"),
        ('{"feedback_range": [0]}', "feedback_range"),
        ('{"feedback_range": [0, 4]}', "feedback 5 of user 'a' lies outside"),
        ('{"positive_above": 7}', "positive_above 7.0"),
        (
            '{"group_attribute": "genre"}',
            "group_attribute 'genre' of domain.json is no attribute of the items, there are",
        ),
        ('{"period_attribute": "decade"}', "period_attribute 'decade' of domain.json is no attribute of the items"),
        (
            '{"period_attribute": "brand"}',
            "period_attribute 'brand' of domain.json is 'Acme' for item 'x', not a number",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_named(description: str, named: str, tmp_path: Path) -> None:
    write_tables(tmp_path, behaviors_csv=LOG, items_csv=ITEMS, domain_json=description)
    with pytest.raises(InvalidInputError) as caught:
        load(tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_log_alone_has_ids_for_titles(tmp_path: Path) -> None:
    dataset = load(write_tables(tmp_path, clicks_csv=LOG) / "clicks.csv")
    assert dataset.domain.name == "clicks"
    assert dataset.items["x"] == Item("x", "x")
    assert not dataset.profiles


def test_what_is_not_a_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match=r"neither u\.data.*nor behaviors\.csv"):
        load(tmp_path)
    write_tables(tmp_path, behaviors_csv=LOG)
    with pytest.raises(InvalidInputError, match=r"holds no items\.csv"):
        load(tmp_path)
    write_tables(tmp_path, items_csv=ITEMS, items_jsonl="")
    with pytest.raises(InvalidInputError, match="both there"):
        load(tmp_path)


def test_a_period_that_is_text_names_the_item_that_made_it_so(tmp_path: Path) -> None:
    items = ITEMS + "z,Zed,Red,Acme,1990s\n"
    write_tables(tmp_path, behaviors_csv=LOG, items_csv=items, domain_json='{"period_attribute": "year"}')
    with pytest.raises(InvalidInputError, match=r"period_attribute 'year' of domain\.json is '1990s' for item 'z'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("table", "content", "named"),
    [
        ("items", "item,title\nx.0,Ex\ny.0,Why\n", "items.csv: none of the 3 items of"),
        ("users", "user,age\n1,30\n2,31\n", "users.csv: none of the 2 users of"),
    ],
)
def test_a_table_of_other_ids_than_the_log_is_refused(table: str, content: str, named: str, tmp_path: Path) -> None:
    write_tables(tmp_path, behaviors_csv=LOG, **{"items_csv": ITEMS, f"{table}_csv": content})
    with pytest.raises(
        InvalidInputError, match=rf"{named} .*behaviors.csv is in it, e\.g\. '[ax]'; write the ids alike"
    ):
        load(tmp_path)


def test_items_of_the_log_that_the_table_lacks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load(write_tables(tmp_path, behaviors_csv=LOG, items_csv=ITEMS))
    assert sorted(dataset.items) == ["x", "y"]
    log, table = tmp_path / "behaviors.csv", tmp_path / "items.csv"
    assert capsys.readouterr().err == (
        f"1 of the 3 items of {log} are not in {table}, e.g. 'z': they have no title and no attributes\n"
    )


def test_a_log_of_ratings_under_their_usual_names_is_read(tmp_path: Path) -> None:
    log = "user_id,item_id,rating,timestamp\na,x,5,3\nb,y,1,1\n"
    write_tables(tmp_path, behaviors_csv=log, items_csv=ITEMS.replace("item,", "item_id,"))
    assert [(each.user_id, each.item_id, each.feedback) for each in load(tmp_path).behaviors] == [
        ("b", "y", 1.0),
        ("a", "x", 5.0),
    ]


def test_a_log_at_one_moment_is_refused(tmp_path: Path) -> None:
    write_tables(tmp_path, clicks_csv="user,item,timestamp,feedback\na,x,7,1\nb,x,7,5\n")
    with pytest.raises(InvalidInputError, match=r"every timestamp is 7, so there is no past .*; write when each"):
        load(tmp_path / "clicks.csv")


def test_a_log_with_one_feedback_value_is_refused(tmp_path: Path) -> None:
    write_tables(tmp_path, clicks_csv="user,item,timestamp,feedback\na,x,1,1\nb,x,2,1\n")
    with pytest.raises(InvalidInputError, match="every feedback is 1"):
        load(tmp_path / "clicks.csv")


def test_the_sample_is_the_same_every_time_and_another_for_another_seed() -> None:
    small = {"users": 20, "items": 60, "behaviors": 400}
    assert sample.generate(7, **small) == sample.generate(7, **small)
    assert sample.generate(7, **small).behaviors != sample.generate(8, **small).behaviors


def test_the_sample_has_the_shape_that_was_asked_for() -> None:
    dataset = load(None)
    assert "generated" in dataset.origin
    assert dataset.domain.name == "sample"
    assert (len(dataset.profiles), len(dataset.items)) == (300, 400)
    assert 25_000 < len(dataset.behaviors) < 35_000
    assert len({item.title for item in dataset.items.values()}) == 400
    counts = sorted(Counter(each.user_id for each in dataset.behaviors).values())
    assert sum(counts[-30:]) > 0.25 * sum(counts)
    assert {each.feedback for each in dataset.behaviors} == {1.0, 2.0, 3.0, 4.0, 5.0}
    pairs = {(each.user_id, each.item_id) for each in dataset.behaviors}
    assert len(pairs) == len(dataset.behaviors)
    assert dataset.behaviors[-1].timestamp - dataset.behaviors[0].timestamp < 366 * 86400


def test_more_sample_items_than_titles_are_refused() -> None:
    with pytest.raises(ValueError, match="items=500"):
        sample.generate(items=500)


def archive(members: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as opened:
        for name, text in members.items():
            opened.writestr(name, text)
    return content.getvalue()


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/ml-100k.zip"
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/ml-100k.zip"
        finally:
            server.shutdown()
            thread.join()


def test_download_unpacks_a_data_set_that_loads(tmp_path: Path) -> None:
    content = archive(
        {f"ml-100k/{name}": text for name, text in MOVIELENS.items() if name != "u.item"}
        | {
            "ml-100k/u.item": item_line("1", "One (1995)", "")
            + item_line("2", "Two", "")
            + item_line("3", "Three", "")
            + item_line("4", "Four", "")
        }
    )
    target = tmp_path / "deep" / "data"
    with serving(content) as url:
        assert download_movielens(target, url, hashlib.md5(content).hexdigest()) == target
    assert len(load(target).behaviors) == 3
    assert [path.name for path in target.parent.iterdir()] == ["data"]
    # What is there is not fetched again: nobody serves the address any more.
    assert download_movielens(target, url, "") == target


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"ml-100k/u.data": "", "../evil": "x"}, "leads out of it"),
        ({"/evil": "x", "u.data": ""}, "leads out of it"),
        ({"ml-100k/..\\..\\evil": "x", "u.data": ""}, "leads out of it"),
        ({"ml-100k/README": "x"}, "holds no u.data"),
    ],
)
def test_download_refuses_an_archive_that_is_not_the_data_set(
    members: dict[str, str], named: str, tmp_path: Path
) -> None:
    content = archive(members)
    with serving(content) as url, pytest.raises(ConfigurationError, match=named):
        download_movielens(tmp_path / "data", url, hashlib.md5(content).hexdigest())
    assert not list(tmp_path.iterdir())


def test_download_refuses_another_digest(tmp_path: Path) -> None:
    with serving(b"not a zip") as url, pytest.raises(ConfigurationError, match="has md5 "):
        download_movielens(tmp_path / "data", url)
    assert not list(tmp_path.iterdir())


def test_download_refuses_what_is_not_an_archive(tmp_path: Path) -> None:
    with serving(b"not a zip") as url, pytest.raises(ConfigurationError, match="cannot be unpacked"):
        download_movielens(tmp_path / "data", url, hashlib.md5(b"not a zip").hexdigest())
    assert not list(tmp_path.iterdir())


def test_download_leaves_a_directory_in_use_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigurationError, match="is there and is not MovieLens-100K"):
        download_movielens(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_without_a_network_download_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/ml-100k.zip"
        with pytest.raises(ConfigurationError) as caught:
            download_movielens(tmp_path / "data", url)
    message = str(caught.value)
    assert url in message
    assert str(tmp_path / "data" / "u.data") in message
    assert "--data" in message
    assert "\n" not in message


def test_an_address_without_the_archive_is_named(tmp_path: Path) -> None:
    with serving(b"") as url, pytest.raises(ConfigurationError, match="Not Found"):
        download_movielens(tmp_path / "data", url.replace("ml-100k", "other"))
