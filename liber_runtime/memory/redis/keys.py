"""Where everything lies: users in buckets, and a bucket's keys under one hash tag, so that they share a slot."""

from __future__ import annotations

import binascii
import functools
import zlib
from collections.abc import Sequence
from urllib.parse import quote

from liber_runtime.memory import Step

SLOTS = 16384
"""Of a Redis Cluster."""


def slot_of(tag: str) -> int:
    """The slot of keys with this hash tag."""
    return binascii.crc_hqx(tag.encode(), 0) % SLOTS


@functools.lru_cache(maxsize=256)
def _quoted(fingerprint: str) -> str:
    return quote(fingerprint, safe="")


class Keys:
    """The names of all keys of one store.

    What changes together must lie in one slot: a user's data with the queues and the counters. Redis has one queue for
    many users, so the hash tag is a bucket of users and not a user.

    Args:
        name: of the store, the beginning of every key.
        buckets: how many; fixed when the store is made.
    """

    def __init__(self, name: str, buckets: int) -> None:
        self._prefixes = [f"{name}:{{{bucket}}}:" for bucket in range(buckets)]
        self.slots = [slot_of(str(bucket)) for bucket in range(buckets)]

    @property
    def buckets(self) -> range:
        """All buckets, by number."""
        return range(len(self.slots))

    def bucket_of(self, user_id: str) -> int:
        """Which bucket a user is in."""
        return zlib.crc32(user_id.encode()) % len(self.slots)

    def bucket(self, bucket: int) -> str:
        """Counters and settings of a bucket."""
        return f"{self._prefixes[bucket]}bucket"

    def registry(self, bucket: int) -> str:
        """Ids of a bucket's users, by arrival."""
        return f"{self._prefixes[bucket]}users"

    def dead(self, bucket: int) -> str:
        """Steps of a bucket that were given up."""
        return f"{self._prefixes[bucket]}dead"

    def queue(self, bucket: int, step: Step, fingerprint: str = "") -> str:
        """The stream of a bucket's steps of one kind, and of one encoding for representations."""
        return f"{self._prefixes[bucket]}queue:{step}:{_quoted(fingerprint)}"

    def user(self, user_id: str) -> str:
        """What is held of a user."""
        return f"{self._prefixes[self.bucket_of(user_id)]}user:{user_id}"

    def steps(self, user_id: str) -> str:
        """What a user's partitions still need."""
        return f"{self._prefixes[self.bucket_of(user_id)]}steps:{user_id}"

    def events(self, user_id: str) -> str:
        """Digests of a user's event ids."""
        return f"{self._prefixes[self.bucket_of(user_id)]}events:{user_id}"

    def vectors(self, user_id: str, fingerprint: str) -> str:
        """A user's vectors of one encoding."""
        # The quoted fingerprint holds no colon, so the key is unambiguous whatever the user's id is.
        return f"{self._prefixes[self.bucket_of(user_id)]}vectors:{_quoted(fingerprint)}:{user_id}"

    def for_scoring(self, user_id: str, fingerprint: str) -> tuple[int, str, str]:
        """Slot, `user` and `vectors`, together, because scoring asks for many."""
        bucket = self.bucket_of(user_id)
        prefix = self._prefixes[bucket]
        return self.slots[bucket], f"{prefix}user:{user_id}", f"{prefix}vectors:{_quoted(fingerprint)}:{user_id}"

    def arrival(self, user_id: str) -> list[str]:
        """What an append touches, as `append` in behaviors.lua takes it."""
        bucket = self.bucket_of(user_id)
        prefix = self._prefixes[bucket]
        return [
            f"{prefix}user:{user_id}",
            f"{prefix}steps:{user_id}",
            f"{prefix}events:{user_id}",
            f"{prefix}bucket",
            f"{prefix}users",
            f"{prefix}dead",
            f"{prefix}queue:summary:",
        ]

    def place(self, user_id: str, encodings: Sequence[str]) -> tuple[list[str], list[str]]:
        """Keys and first arguments of the functions that begin with `place` in steps.lua."""
        bucket = self.bucket_of(user_id)
        keys = [*self.arrival(user_id), self.queue(bucket, "shift")]
        for fingerprint in encodings:
            keys += (self.queue(bucket, "representation", fingerprint), self.vectors(user_id, fingerprint))
        return keys, [user_id, str(len(encodings)), *encodings]


class Catalogue:
    """The keys of what belongs to no user; all in one slot."""

    def __init__(self, name: str) -> None:
        prefix = f"{name}:{{catalogue}}:"
        self.slot = slot_of("catalogue")
        self.settings = f"{prefix}settings"
        self.items = f"{prefix}items"
        self.marks = f"{prefix}marks"
