"""What Triton and gRPC say when a call fails, as one line a person can act on."""

from __future__ import annotations

from tritonclient.utils import InferenceServerException

from liber_runtime.exceptions import ScoringError

_TLS = (
    ("WRONG_VERSION_NUMBER", "speaks no TLS; unset LIBER_TLS_CA, or start it with `liber serve --tls-certificate`"),
    ("certificate has expired", "shows a certificate that has expired, or whose authority's has; renew it there"),
    ("certificate is not yet valid", "shows a certificate that is not valid yet; compare the clocks of both machines"),
    (
        "Hostname Verification Check failed",
        "shows a certificate that is for another host; issue it for the name or address in LIBER_TRITON",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "shows a certificate that LIBER_TLS_CA does not vouch for; name the authority that issued it",
    ),
)
"""What gRPC says in the midst of a failed handshake, and what that means of the server."""

_HUNG_UP = ("Socket closed", "Connection reset", "Broken pipe", "Endpoint closing")
"""Said after "failed to connect": the server was there, and ended the connection before the first call."""

_NOT_THERE = ("connect", "Socket closed", "resolving", "DNS resolution")
"""What gRPC says in an UNAVAILABLE of its own; models of ours answer with that status too."""


def explain(error: InferenceServerException, url: str, seconds: float) -> ScoringError:
    """Translates the exception of a Triton call.

    Args:
        error: as the Triton client raised it.
        url: host:port that was called.
        seconds: the deadline of the call.

    Returns:
        The error to raise. Where Triton asks for a key its status is PERMISSION_DENIED, as Triton's own, UNAVAILABLE,
        is for what can be tried again.
    """
    status = str(error.status() or "UNKNOWN").removeprefix("StatusCode.")
    message = (error.message() or "no reason given").strip().splitlines()[0]
    if status == "DEADLINE_EXCEEDED":
        message = f"Triton at {url} did not answer within {seconds:g} s; try again, or raise LIBER_DEADLINE_SECONDS"
    elif status == "UNAVAILABLE" and "protocol is restricted" in message:
        status = "PERMISSION_DENIED"
        message = (
            f"Triton at {url} lets itself be controlled by those alone who have its control key; set LIBER_CONTROL_KEY "
            "or LIBER_CONTROL_KEY_FILE to the key it was started with"
        )
    elif status == "UNAVAILABLE" and (meaning := next((told for sign, told in _TLS if sign in message), "")):
        message = f"Triton at {url} {meaning}"
    elif status == "UNAVAILABLE" and "failed to connect" in message and any(sign in message for sign in _HUNG_UP):
        message = (
            f"Triton at {url} hung up before the first call, as one does that speaks TLS only, or only with clients it "
            "knows; set LIBER_TLS_CA, and LIBER_TLS_CERTIFICATE and LIBER_TLS_KEY to a pair that its --tls-client-ca "
            "vouches for"
        )
    elif status == "UNAVAILABLE" and any(sign in message for sign in _NOT_THERE):
        message = f"no Triton answers at {url} ({message}); start one with `liber serve`, or set LIBER_TRITON"
    elif "unknown model" in message or "failed to poll from model repository" in message:
        message = f"Triton at {url} has no such model ({message}); publish a bundle with `liber build --repository`"
    return ScoringError(message, status)
