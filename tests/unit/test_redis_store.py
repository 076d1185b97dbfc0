"""What a store in Redis does without a Redis: URLs, keys, packing, messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import exceptions

from liber_runtime.behavior import Behavior
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import open_store
from liber_runtime.memory.redis.address import Address, parse_address
from liber_runtime.memory.redis.failures import explain, is_passing, redirection_of
from liber_runtime.memory.redis.keys import SLOTS, Keys, slot_of
from liber_runtime.memory.redis.library import DIGEST, SOURCE
from liber_runtime.memory.redis.queue import _portions, _share
from liber_runtime.memory.redis.records import dump_run, load_run, newest_of, newest_of_two

IDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
RUNS = st.lists(st.builds(Behavior, st.just("ann"), IDS, st.floats(-5, 5), st.floats(0, 1e9), IDS), max_size=8)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://localhost/0?nmae=a", "parameter 'nmae' is unknown; there are name"),
        ("redis://localhost/0?name=a&name=b", "name is given twice"),
        ("redis://localhost/0?name={a}", "name '{a}' must be 1 to 64 letters"),
        ("redis://localhost/zero", "database 'zero' is not a number"),
        ("redis://local:host:1/0", "server 'local:host:1' is not understood"),
        ("redis://localhost:99999/0", "server 'localhost:99999' is not understood"),
        ("redis://localhost/0?replicas=-1", "replicas=-1 must be a whole number from 0"),
        ("redis://localhost/0?buckets=0", "buckets=0 must be a whole number from 1"),
        ("redis://localhost/0?buckets=5000", "more than 4096"),
        ("redis://localhost/0?timeout_seconds=soon", "timeout_seconds=soon must be a positive number"),
        ("redis://localhost/0?timeout_seconds=0", "timeout_seconds=0 must be a positive number"),
        ("redis://localhost/0?ca=ca.crt", "parameter ca is for TLS; write rediss://"),
        ("rediss://localhost/0?ca=/nowhere/ca.crt", "no file /nowhere/ca.crt (ca)"),
        ("redis://localhost/0?password_file=/nowhere/word", "password_file /nowhere/word cannot be read (No such file"),
        ("redis://localhost/0?password_file=/dev/null", "password_file /dev/null is empty"),
        ("redis://ann:p@localhost/0?password_file=/dev/null", "a password and a password_file are given"),
        ("redis://", "is not understood"),
    ],
)
def test_a_url_that_is_not_understood_is_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        open_store(url)


def test_a_url_says_all_and_shows_no_password() -> None:
    address = parse_address("rediss://an%40n:p%2Fw@a:1,[::1],b/0?name=x.y&replicas=2&timeout_seconds=1.5&buckets=9")
    assert address == Address(
        (("a", 1), ("::1", 6379), ("b", 6379)),
        username="an@n",
        password="p/w",
        tls=True,
        name="x.y",
        replicas=2,
        timeout_seconds=1.5,
        buckets=9,
    )
    assert str(address) == "rediss://a:1,[::1]:6379,b:6379/0?name=x.y"
    assert "p/w" not in repr(address)


def test_a_password_may_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("p/w %20\n")
    address = parse_address(f"redis://ann@a/0?name=x&password_file={tmp_path}/password")
    assert address == Address((("a", 6379),), username="ann", password="p/w %20", name="x")
    (tmp_path / "password").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match=r"cannot be read \(not UTF-8\); name a file"):
        parse_address(f"redis://ann@a/0?password_file={tmp_path}/password")


@given(IDS, IDS)
def test_all_keys_of_a_user_share_a_slot(user: str, fingerprint: str) -> None:
    keys = Keys("liber", 128)
    bucket = keys.bucket_of(user)
    named, _ = keys.place(user, ["", fingerprint])
    tags = {re.match(r"liber:\{(\d+)\}:", key)[1] for key in named}  # type: ignore[index]
    assert tags == {str(bucket)}
    assert keys.slots[bucket] == slot_of(str(bucket))
    assert len(set(named)) == len(named)
    assert keys.for_scoring(user, fingerprint) == (
        slot_of(str(bucket)),
        keys.user(user),
        keys.vectors(user, fingerprint),
    )


def test_slots_are_those_of_redis() -> None:
    assert (slot_of("123456789"), slot_of("foo")) == (0x31C3 % SLOTS, 12182)


@given(RUNS)
def test_a_run_comes_back(behaviors: list[Behavior]) -> None:
    assert load_run("ann", dump_run(behaviors)) == behaviors


@given(RUNS, RUNS, st.integers(0, 12))
def test_the_newest_of_runs(older: list[Behavior], newer: list[Behavior], limit: int) -> None:
    expected = tuple((each.item_id, each.feedback) for each in [*older, *newer])
    expected = expected[max(0, len(expected) - limit) :]
    assert newest_of_two(dump_run(older), dump_run(newer), limit) == expected

    def for_scoring(behaviors: list[Behavior]) -> bytes:
        run = dump_run(behaviors)
        return run[: 8 + len("\n".join(each.item_id for each in behaviors).encode()) + 8 * len(behaviors)]

    assert newest_of(for_scoring(newer) + for_scoring(older), limit) == expected


@given(st.dictionaries(st.integers(0, 200), st.integers(1, 50), max_size=30), st.integers(0, 100))
def test_shares_take_all_there_is_up_to_the_limit(ready: dict[int, int], limit: int) -> None:
    shares = _share(ready, limit)
    assert sum(shares.values()) == min(limit, sum(ready.values()))
    assert all(0 < share <= ready[bucket] for bucket, share in shares.items())


@given(st.integers(1, 300))
def test_portions_are_all_buckets_once(buckets: int) -> None:
    assert sorted(each for portion in _portions(range(buckets)) for each in portion) == list(range(buckets))


def test_the_library_is_named_by_its_content() -> None:
    assert SOURCE.startswith(f"#!lua name=liber_{DIGEST}\n")


@pytest.mark.parametrize("error", [exceptions.ResponseError("MOVED 7 h:1"), exceptions.MovedError("7 h:1")])
def test_a_redirection_is_read(error: Exception) -> None:
    assert redirection_of(error) == ("MOVED", ("h", 1))


def test_what_passes_and_what_stays() -> None:
    assert is_passing(exceptions.ResponseError("TRYAGAIN Multiple keys request during rehashing of slot"))
    assert not is_passing(exceptions.ResponseError("WRONGTYPE Operation against a key"))
    assert redirection_of(exceptions.ResponseError("WRONGTYPE Operation against a key")) is None


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("MISCONF Redis is configured to save RDB snapshots, but it's unable to persist", "make room there"),
        ("OOM command not allowed when used memory > 'maxmemory'", "raise maxmemory"),
        ("CLUSTERDOWN Hash slot not served", "start its servers"),
        ("NOREPLICAS Not enough good replicas to write.", "min-replicas-to-write"),
        ("unknown command 'FCALL', with args", "Redis 7.0 or newer"),
        ("something never seen\nin two lines", "something never seen in two lines; look into the server's log"),
    ],
)
def test_errors_say_what_to_do(said: str, remedy: str) -> None:
    message = str(explain("redis://here", exceptions.ResponseError(said)))
    assert remedy in message
    assert "\n" not in message
