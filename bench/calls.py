"""What scoring calls under load are made of: ids, from files or made up, and whole requests drawn beforehand.

A request is encoded before the load begins, so that sending it costs the sender next to nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from liber_runtime.exceptions import InvalidInputError
from liber_runtime.scoring import MODEL, FoldedCall, fold


@dataclass(frozen=True, slots=True)
class Mix:
    """One kind of call.

    Attributes:
        name: in tables and plots.
        users: U, distinct users of a call; 1 is ranking.
        candidates: N, candidates of a call, shared out evenly over its users.
    """

    name: str
    users: int
    candidates: int


@dataclass(frozen=True, slots=True)
class Request:
    """One call as it goes over the wire.

    Attributes:
        payload: the encoded `ModelInferRequest`.
        candidates: N, how many probabilities the answer has to have.
    """

    payload: bytes
    candidates: int


def draw_requests(mix: Mix, user_ids: Sequence[str], item_ids: Sequence[str], count: int, seed: int) -> list[Request]:
    """Draws requests of one kind, each with its own users and candidates.

    Args:
        mix: the kind.
        user_ids: drawn from without repetition within a request.
        item_ids: candidates are drawn from these.
        count: how many requests.
        seed: of the draw.

    Raises:
        InvalidInputError: U is above N or above the number of users, or one of them is below 1.
    """
    if not 1 <= mix.users <= min(mix.candidates, len(user_ids)):
        raise InvalidInputError(
            f"a call of {mix.users} users and {mix.candidates} candidates cannot be drawn from {len(user_ids)} users; "
            "let U be at least 1, at most N and at most the number of users"
        )
    random = np.random.default_rng(seed)
    requests = []
    for _ in range(count):
        (call,) = fold(*draw_call(mix, user_ids, item_ids, random), mix.users, mix.candidates)
        requests.append(encode(call))
    return requests


def draw_call(
    mix: Mix, user_ids: Sequence[str], item_ids: Sequence[str], random: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Draws the candidates of one call: whose each is, and which item; both of length N."""
    users = [user_ids[place] for place in random.choice(len(user_ids), mix.users, replace=False)]
    owners = [users[position % mix.users] for position in range(mix.candidates)]
    return owners, [item_ids[place] for place in random.integers(len(item_ids), size=mix.candidates)]


def encode(call: FoldedCall) -> Request:
    """Encodes a call as the scoring client would send it, asking for the probabilities alone."""
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    for name, ids in (("user_id", call.user_ids), ("item_id", call.item_ids)):
        request.inputs.add(name=name, datatype="BYTES", shape=[1, len(ids)])
        encoded = np.array([each.encode() for each in ids], dtype=np.object_)
        request.raw_input_contents.append(serialize_byte_tensor(encoded).item())
    request.inputs.add(name="user_index", datatype="INT32", shape=[1, len(call.user_index)])
    request.raw_input_contents.append(call.user_index.tobytes())
    request.outputs.add(name="click_probability")
    return Request(request.SerializeToString(), len(call.item_ids))


def read_ids(path: Path, key: str) -> list[str]:
    """Reads distinct ids in the order of the file; a behavior log in JSON lines will do.

    Args:
        path: UTF-8 text; a line that starts with ``{`` is a JSON object, any other that is not empty is an id.
        key: what holds the id in a JSON object.

    Raises:
        InvalidInputError: no such file, a broken line, or no ids.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read the {key} ids of {path}: {error}") from None
    ids: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text.startswith("{"):
            text = _read_key(text, key, f"{path}, line {number}")
        if text:
            ids[text] = None
    if not ids:
        raise InvalidInputError(f"{path} holds no {key} ids; put one in each line")
    return list(ids)


def _read_key(text: str, key: str, place: str) -> str:
    try:
        return str(json.loads(text)[key])
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{place}: not JSON ({error.msg}): {text:.80}") from None
    except KeyError:
        raise InvalidInputError(f"{place}: no {key!r} in {text:.80}; name the {key} id so") from None
