"""What a team would otherwise write: FastAPI, uvicorn, the ranker in eager PyTorch, and the same store.

``python -m bench.fastapi_service --ranker FILE --bundle DIRECTORY --store URL`` prints its port and serves on 127.0.0.1
until its standard input ends. One row for each sample, as models are served that do not fold; but each user is read
from the store once, which is more than many do.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
import torch

from bench.engines import Probabilities, Question
from builders.models.features import Inputs
from liber_runtime.bundle import VOCABULARY, Manifest
from liber_runtime.exceptions import ConfigurationError, LiberError
from liber_runtime.memory import MemoryStore, UserMemory, open_store
from liber_runtime.vocabulary import Vocabulary


class ScoreRequest(pydantic.BaseModel):
    """A user and an item for each sample."""

    user_ids: list[str]
    item_ids: list[str]


class Scorer:
    """Ids to probabilities, one row for each sample.

    Args:
        ranker: a file that `torch.save` wrote.
        bundle: whose vocabulary and manifest say how inputs are made.
        store: whose users are scored.
    """

    def __init__(self, ranker: Path, bundle: Path, store: MemoryStore) -> None:
        self._ranker = torch.load(ranker, weights_only=False)
        self._vocabulary = Vocabulary.load(bundle / VOCABULARY)
        self._manifest = Manifest.load(bundle)
        self._store = store

    def score(self, user_ids: Sequence[str], item_ids: Sequence[str]) -> list[float]:
        """The click probability of each sample."""
        manifest = self._manifest
        distinct = list(dict.fromkeys(user_ids))
        read = self._store.read(distinct, manifest.lookback, manifest.max_partitions, manifest.fingerprint)
        memories = dict(zip(distinct, read, strict=True))
        rows = {user_id: number for number, user_id in enumerate(distinct)}
        owner = np.array([rows[user_id] for user_id in user_ids])
        made = self._tensors([memories[user_id] for user_id in distinct])
        tensors = {name: torch.from_numpy(array[owner]) for name, array in made.items()}
        representations, mask = tensors.pop("representations"), tensors.pop("partition_mask")
        item_index = torch.from_numpy(self._vocabulary.item_indices(item_ids))
        inputs = Inputs(item_index=item_index, user_index=None, **tensors)
        knowledge = (representations, mask) if self._ranker.fuser is not None else ()
        with torch.inference_mode():
            probability: list[float] = self._ranker(inputs, *knowledge).sigmoid().tolist()
        return probability

    def _tensors(self, memories: Sequence[UserMemory | None]) -> dict[str, npt.NDArray[Any]]:
        """One row for each user."""
        manifest, vocabulary = self._manifest, self._vocabulary
        users = len(memories)
        most = max([1, *(len(memory.representations) for memory in memories if memory)])
        made: dict[str, npt.NDArray[Any]] = {
            "history_item": np.zeros((users, manifest.lookback), dtype=np.int32),
            "history_feedback": np.zeros((users, manifest.lookback), dtype=np.int32),
            "history_length": np.zeros(users, dtype=np.int32),
            "profile": np.zeros((users, len(vocabulary.user_fields)), dtype=np.int32),
            "representations": np.zeros((users, most, manifest.dimension), dtype=np.float32),
            "partition_mask": np.zeros((users, most), dtype=np.bool_),
        }
        for row, memory in enumerate(memories):
            if memory is None:
                continue
            length, count = len(memory.history), len(memory.representations)
            made["history_length"][row] = length
            made["profile"][row] = vocabulary.profile_indices(memory.profile)
            if length:
                made["history_item"][row, :length] = vocabulary.item_indices([item for item, _ in memory.history])
                made["history_feedback"][row, :length] = vocabulary.feedback_indices(
                    [feedback for _, feedback in memory.history]
                )
            if count:
                made["representations"][row, :count] = memory.representations
                made["partition_mask"][row, :count] = True
        return made


@dataclass(frozen=True)
class RunningService:
    """A service in a process of its own."""

    port: int
    process_id: int

    def asking(self, question: Question) -> tuple[Callable[[], Probabilities], Callable[[], None]]:
        """One call over a connection that is kept, the body made anew for each; and what closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        asked = {"user_ids": question.user_ids, "item_ids": question.item_ids}

        def call() -> Probabilities:
            try:
                connection.request("POST", "/score", json.dumps(asked), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                raise LiberError(f"the FastAPI service does not answer ({error!r})") from error
            if answer.status != http.client.OK:
                raise LiberError(f"the FastAPI service answered {answer.status}: {body.decode()[:200]}")
            return np.array(json.loads(body)["probability"], dtype=np.float32)

        return call, connection.close


@contextlib.contextmanager
def serve_with_fastapi(ranker: Path, bundle: Path, store_url: str) -> Iterator[RunningService]:
    """Starts a service in a process of its own and ends it afterwards; arguments as of `Scorer`.

    Raises:
        LiberError: it did not start; what it said goes to this process's standard error.
    """
    command = [sys.executable, "-m", "bench.fastapi_service", "--ranker", str(ranker), "--bundle", str(bundle)]
    process = subprocess.Popen(
        [*command, "--store", store_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        if not said:
            raise LiberError("the FastAPI service did not start; install it with: pip install 'liber-runtime[bench]'")
        yield RunningService(int(said), process.pid)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.fastapi_service", description=__doc__)
    parser.add_argument("--ranker", type=Path, required=True, help="the model, as torch.save wrote it")
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle whose vocabulary it was made with")
    parser.add_argument("--store", required=True, help="the store whose users are scored")
    arguments = parser.parse_args()
    try:
        import fastapi
        import uvicorn
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{error.name} is not installed; run: pip install 'liber-runtime[bench]'") from None
    scorer = Scorer(arguments.ranker, arguments.bundle, open_store(arguments.store, create=False))
    application = fastapi.FastAPI()

    @application.post("/score")
    def score(request: ScoreRequest) -> dict[str, list[float]]:
        return {"probability": scorer.score(request.user_ids, request.item_ids)}

    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_end_with_input, daemon=True).start()
    print(listening.getsockname()[1], flush=True)
    # Connections are kept however long other engines take meanwhile; by default they are closed after five seconds.
    configuration = uvicorn.Config(application, log_level="warning", timeout_keep_alive=3600)
    uvicorn.Server(configuration).run(sockets=[listening])
    return 0


def _end_with_input() -> None:
    """Whoever started this closes its standard input in the end, or is killed, which closes it too."""
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    from bench.environment import run_command

    run_command(main)
