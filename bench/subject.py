"""What load is put on: a server of the benchmark's own on a made-up store and bundle, or one that runs already."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.calls import Mix, draw_call
from liber_runtime.scoring import ScoringClient
from liber_runtime.server import TritonServer

if TYPE_CHECKING:
    from bench.serving import Workshop

USERS = 1000
_WARM_UP_CALLS = 10
_PROBES = 20
_SETTLE_SECONDS = 10.0
_SETTLED_CALLS = 3
_SETTLED = 2.0


@dataclass(frozen=True)
class Subject:
    """A server and whom it can be asked about.

    Attributes:
        url: host:port of Triton's gRPC endpoint.
        users: ids with memory.
        items: ids of the catalogue.
        served: what the figures should say of it.
    """

    url: str
    users: Sequence[str]
    items: Sequence[str]
    served: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OwnSubject(Subject):
    """A server of the benchmark's own.

    Attributes:
        server: the server with its supervisor.
        repository: that it serves, and takes further bundles from.
        workshop: that made its bundle, and makes others of the same encoding.
    """

    server: TritonServer = field(kw_only=True)
    repository: Path = field(kw_only=True)
    workshop: Workshop = field(kw_only=True)


@contextlib.contextmanager
def own_subject(directory: Path, backbone: str, seed: int) -> Iterator[OwnSubject]:
    """Makes store and bundle in an empty directory, and serves them on a free port of 127.0.0.1.

    Args:
        directory: receives everything.
        backbone: of the bundle; with LIBER, T=20.
        seed: of behaviors, vectors and weights.
    """
    # Torch takes seconds to import, and the sender's process imports this module too.
    from bench.serving import Workshop, make_store, serve

    workshop = Workshop(directory, seed=seed)
    bundle = workshop.bundle("bundle", backbone)
    store = f"sqlite:///{directory / 'memory.db'}"
    users = make_store(store, workshop.encoding.fingerprint, users=USERS, items=workshop.items, seed=seed)
    manifest = bundle.manifest
    served = {
        "backbone": manifest.backbone,
        "fusion": manifest.fusion,
        "history": manifest.history_length,
        "users": len(users),
        "items": workshop.items,
    }
    with serve(bundle.directory, store, directory) as server:
        yield OwnSubject(
            server.grpc_url,
            users,
            [f"item-{number}" for number in range(workshop.items)],
            served,
            server=server,
            repository=directory / "model_repository",
            workshop=workshop,
        )


class Probe:
    """One caller that waits for each answer: warms a server up, estimates what it can do, and sees when it is idle.

    Args:
        subject: the server.
        mix: the kind of calls.
        seed: of users and candidates.
    """

    def __init__(self, subject: Subject, mix: Mix, seed: int) -> None:
        self._subject = subject
        self._mix = mix
        self._random = np.random.default_rng((seed, 2))
        self.seconds = 0.0
        """Median of one call on the idle server."""

    def measure(self) -> float:
        """Calls, a few times unmeasured, and returns `seconds`.

        Raises:
            ScoringError: the server does not answer.
        """
        with self._client() as client:
            for _ in range(_WARM_UP_CALLS):
                self._call(client)
            self.seconds = float(np.median([self._call(client) for _ in range(_PROBES)]))
        return self.seconds

    def settle(self) -> bool:
        """Waits until the server has done what it still had to do of calls that nobody waits for any more.

        Returns:
            Whether it has; waiting has an end.
        """
        end = time.monotonic() + _SETTLE_SECONDS
        with self._client() as client:
            while min(self._call(client) for _ in range(_SETTLED_CALLS)) > _SETTLED * self.seconds:
                if time.monotonic() > end:
                    return False
        return True

    def _client(self) -> ScoringClient:
        return ScoringClient(self._subject.url, own_connection=True)

    def _call(self, client: ScoringClient) -> float:
        call = draw_call(self._mix, self._subject.users, self._subject.items, self._random)
        begin = time.perf_counter()
        client.score(*call)
        return time.perf_counter() - begin
