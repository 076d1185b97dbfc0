"""What Triton and gRPC say when a call fails, as one line a person can act on."""

from __future__ import annotations

from tritonclient.utils import InferenceServerException

from liber_runtime.exceptions import ScoringError

_NOT_THERE = ("connect", "Socket closed", "resolving", "DNS resolution")
"""What gRPC says in an UNAVAILABLE of its own; models of ours answer with that status too."""


def explain(error: InferenceServerException, url: str, seconds: float) -> ScoringError:
    """Translates the exception of a Triton call.

    Args:
        error: as the Triton client raised it.
        url: host:port that was called.
        seconds: the deadline of the call.
    """
    status = str(error.status() or "UNKNOWN").removeprefix("StatusCode.")
    message = (error.message() or "no reason given").strip().splitlines()[0]
    if status == "DEADLINE_EXCEEDED":
        message = f"Triton at {url} did not answer within {seconds:g} s; try again, or raise LIBER_DEADLINE_SECONDS"
    elif status == "UNAVAILABLE" and any(sign in message for sign in _NOT_THERE):
        message = f"no Triton answers at {url} ({message}); start one with `liber serve`, or set LIBER_TRITON"
    elif "unknown model" in message or "failed to poll from model repository" in message:
        message = f"Triton at {url} has no such model ({message}); publish a bundle with `liber build --repository`"
    return ScoringError(message, status)
