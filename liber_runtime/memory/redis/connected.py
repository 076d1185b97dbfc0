"""What all parts of a Redis store share: its servers, its keys, and what is known of its encodings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from liber_runtime.exceptions import InvalidInputError, StoreError
from liber_runtime.memory.redis.keys import Catalogue, Keys
from liber_runtime.memory.redis.servers import Call, Servers, function

Argument = str | bytes | int | float

CLOCK_BASE_SECONDS = 5e8
"""Added to the time of a clock of one's own, so that times before it, which the queues write, stay positive."""


class Connected:
    """Calls functions for users, on any of a store's servers.

    Args:
        servers: of the store.
        keys: its keys.
        catalogue: the keys of what belongs to no user.
        clock: seconds since 1970-01-01 UTC, for leases and retries; None for the servers' own.
    """

    def __init__(self, servers: Servers, keys: Keys, catalogue: Catalogue, clock: Callable[[], float] | None) -> None:
        self._servers = servers
        self._keys = keys
        self._catalogue = catalogue
        self._own_clock = clock
        self._process = os.getpid()
        self._closed = False
        # '' is any encoding. Functions refuse calls that do not declare the keys of all encodings a bucket knows.
        self._encodings: tuple[str, ...] = ("",)

    def _call_user(self, verb: str, user_id: str, *arguments: Argument) -> Call:
        """A call of a function that takes the place of a user."""
        keys, place = self._keys.place(user_id, self._encodings)
        return function(self._keys.slots[self._keys.bucket_of(user_id)], verb, keys, *place, *arguments)

    def _call_bucket(self, verb: str, bucket: int, keys: Sequence[str], *arguments: Argument) -> Call:
        return function(self._keys.slots[bucket], verb, keys, *arguments)

    def _run_users(self, make: Callable[[], Sequence[Call]], *, durable: bool = False) -> list[Any]:
        """Runs calls made by `_call_user`; those that did not declare an encoding are made again.

        Args:
            make: makes the calls, the same ones each time.
            durable: see `Servers.run`.
        """
        calls = make()
        replies = self._servers.run(calls, durable=durable)
        left = [index for index, reply in enumerate(replies) if self._learn(reply)]
        while left:
            calls = make()
            again = self._servers.run([calls[index] for index in left], durable=durable)
            for index, reply in zip(left, again, strict=True):
                replies[index] = reply
            left = [index for index, reply in zip(left, again, strict=True) if self._learn(reply)]
        return replies

    def _learn(self, reply: Any) -> bool:
        """Whether a reply says that encodings were not declared; they are from now on."""
        if not (isinstance(reply, list) and len(reply) == 2 and reply[0] == b"UNDECLARED"):
            return False
        self._know(reply[1].decode().split("\n"))
        return True

    def _know(self, fingerprints: Collection[str]) -> None:
        self._encodings = ("", *sorted({*self._encodings, *fingerprints} - {""}))

    def _clock(self) -> str:
        """Milliseconds as the functions take them; empty for the server's clock."""
        return "" if self._own_clock is None else f"{(self._own_clock() + CLOCK_BASE_SECONDS) * 1000:.0f}"

    def _check_usable(self) -> None:
        address = self._servers.address
        if self._closed:
            raise StoreError(f"store {address} is closed; open it again with open_store")
        if self._process != os.getpid():
            raise StoreError(f"store {address} was opened by process {self._process}; open it in each process")

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        """Around every method: refuses a store that cannot be used and text that cannot be kept."""
        self._check_usable()
        try:
            yield
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"{error.object!r:.80} is not valid UTF-8; re-encode the source as UTF-8") from None


def require_lines(fingerprints: Collection[str]) -> None:
    """Refuses fingerprints that Redis cannot list one a line."""
    for fingerprint in fingerprints:
        if not fingerprint or "\n" in fingerprint:
            raise InvalidInputError(f"fingerprint {fingerprint!r:.80} is empty or holds a line break; give a plain one")
