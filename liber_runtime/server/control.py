"""Talks to a running tritonserver about its models, and makes one readable line of what it says when one fails.

Plain HTTP, a connection per call: Triton waits for open connections when it stops, and a supervisor must not keep one.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from liber_runtime.exceptions import ServerError
from liber_runtime.server.stubs import ModelVersion

_CALL_SECONDS = 10.0
_READY_SECONDS = 2.0
_MOST_REASON_CHARACTERS = 300

# In the order in which they explain most: a broken model also breaks the ensembles that use it.
_FAILURES = (
    re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)"),
    re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)"),
    re.compile(r"model_repository_manager\.cc:\d+\] \"?(?:[\w ]+: )?(?P<reason>.*?\bensemble '?(?P<model>[^\s,']+).*)"),
)
_SYNTAX_ERROR = re.compile(r"Error parsing text-format inference\.ModelConfig: (?P<position>.*)")
_TAKEN_PORT = re.compile(r"Socket '[^']*:(?P<port>\d+)' already in use")


class NoAnswerError(ServerError):
    """The server did not answer in time, or not at all."""


class ServerControl:
    """The model control calls of one server.

    Args:
        host: where its HTTP service listens.
        port: see `host`.
        headers: what its calls have to carry, see `liber_runtime.server.security.Security.headers`.
    """

    def __init__(self, host: str, port: int, headers: Mapping[str, str] | None = None) -> None:
        self._host = host
        self._port = port
        self._headers = {"Connection": "close", **(headers or {})}

    def is_ready(self) -> bool:
        """Whether the server answers and all models of its start are loaded."""
        try:
            status, _ = self._request("GET", "v2/health/ready", _READY_SECONDS)
        except (OSError, http.client.HTTPException):
            return False
        return status == 200

    def loaded_versions(self) -> list[ModelVersion]:
        """The model versions that the server calls ready.

        Raises:
            NoAnswerError: it is gone, or hangs.
        """
        entries = self._call("POST", "v2/repository/index")
        return [ModelVersion(e["name"], e["version"]) for e in entries if e.get("state") == "READY"]

    def configuration(self, model: ModelVersion) -> dict[str, Any]:
        """A loaded model version's configuration, completed by the server.

        Raises:
            ServerError: there is no such version, or no answer.
        """
        path = f"v2/models/{quote(model.name)}/versions/{model.version}/config"
        configuration: dict[str, Any] = self._call("GET", path)
        return configuration

    def load(self, name: str, timeout: float) -> None:
        """Loads what changed of a model; returns when that is done.

        Raises:
            NoAnswerError: it did not load within `timeout` seconds.
            ServerError: it did not load; what was served goes on being served.
        """
        self._call("POST", f"v2/repository/models/{quote(name)}/load", timeout)

    def unload(self, name: str) -> None:
        """Begins to unload a model, and with it the ensembles that use it.

        Raises:
            ServerError: there is no such model, or no answer.
        """
        self._call("POST", f"v2/repository/models/{quote(name)}/unload")

    def _call(self, method: str, path: str, timeout: float = _CALL_SECONDS) -> Any:
        try:
            status, body = self._request(method, path, timeout)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise NoAnswerError(f"tritonserver on {self._host}:{self._port} did not answer {path}: {reason}") from None
        content = json.loads(body) if body else None
        if status != 200:
            raise ServerError(shorten_reason((content or {}).get("error", f"{path} gave HTTP status {status}")))
        return content

    def _request(self, method: str, path: str, timeout: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        try:
            connection.request(method, f"/{path}", headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def explain_failure(log: str) -> str | None:
    r"""The one reason in a failed start's log that helps, with the model's name; None if there is none.

    Example:
        >>> explain_failure("E0101 model_lifecycle.cc:642] \"failed to load 'm' version 1: Internal: KeyError: 'x'\"")
        "model 'm' did not load: KeyError: 'x'"
    """
    for pattern in _FAILURES:
        failure = pattern.search(log)
        if failure is None:
            continue
        reason = shorten_reason(failure["reason"])
        syntax_error = _SYNTAX_ERROR.search(log)
        if syntax_error is not None and "failed to read text proto" in reason:
            reason += f": {syntax_error['position']}"
        if "cannot import name" in reason and "liber_runtime" in reason:
            reason += "; another version of LIBER published this repository: publish the bundle again"
        return f"model {failure['model']!r} did not load: {reason}"
    return None


def find_taken_port(log: str) -> int | None:
    """The port that a failed start found in use; None if that was not why."""
    taken = _TAKEN_PORT.search(log)
    return int(taken["port"]) if taken else None


def shorten_reason(text: str) -> str:
    """Triton's words without the Python traceback, the escapes and the quotes around them, on one line."""
    # Triton's log escapes line breaks, its HTTP answers do not.
    text = text.replace("\\n", "\n").replace('\\"', '"').split("\n\nAt:\n")[0]
    text = " ".join(text.split()).rstrip('";').removeprefix("Internal: ")
    return text if len(text) <= _MOST_REASON_CHARACTERS else f"{text[: _MOST_REASON_CHARACTERS - 3]}..."
