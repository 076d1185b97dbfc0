"""What goes wrong between us and Redis, and what to do about it."""

from __future__ import annotations

from redis import exceptions

from liber_runtime.exceptions import StoreError

_PASSING = ("TRYAGAIN", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "BUSY ", "NOREPLICAS", "UNBLOCKED")
_REMEDIES: tuple[tuple[str, str], ...] = (
    ("WRONGPASS", "correct user and password in the URL (percent-encoded)"),
    ("invalid username-password", "correct user and password in the URL (percent-encoded)"),
    ("Invalid Username or Password", "correct user and password in the URL (percent-encoded)"),
    ("without any password configured", "the server asks for no password; take it out of the URL"),
    ("NOAUTH", "put user and password into the URL: redis://user:password@host"),
    ("Authentication required", "put user and password into the URL: redis://user:password@host"),
    (
        "has no permissions",
        "allow the user the store's keys and the commands that its functions call: "
        "ACL SETUSER user ~name:* +@all -@dangerous +info",
    ),
    ("maxmemory", "Redis is full: raise maxmemory or forget users, and repeat the call"),
    ("OOM", "Redis is full: raise maxmemory or forget users, and repeat the call"),
    ("MISCONF", "Redis cannot write to its disk: make room there, and repeat the call"),
    ("Errors writing to the AOF", "Redis cannot write to its disk: make room there, and repeat the call"),
    ("read only replica", "the server is a replica: name its master in the URL"),
    ("CLUSTERDOWN", "a part of the cluster has no master: start its servers, and repeat the call"),
    ("Hash slot not served", "a part of the cluster has no master: start its servers, and repeat the call"),
    ("cluster is down", "a part of the cluster has no master: start its servers, and repeat the call"),
    (
        "UNBLOCKED",
        "the cluster replaced the master while it worked: raise cluster-node-timeout, or append fewer behaviors "
        "of a user in one call, and repeat the call",
    ),
    ("NOREPLICAS", "the master has fewer replicas than min-replicas-to-write: start them, and repeat the call"),
    ("unknown command", "LIBER needs Redis 7.0 or newer"),
    ("SELECT is not allowed", "a cluster has database 0 only; write /0"),
    ("DB index is out of range", "the server has fewer databases; choose another number in the URL"),
    ("CERTIFICATE_VERIFY_FAILED", "name the certificate authority in the URL: ca=path/to/ca.crt"),
    ("certificate verify failed", "name the certificate authority in the URL: ca=path/to/ca.crt"),
    ("Timeout", "the server does not answer in time: check its load and the network, and repeat the call"),
    ("refused", "start the server, or correct host and port in the URL"),
    ("Name or service not known", "correct the host in the URL"),
)


def message_of(error: BaseException) -> str:
    """One line."""
    return " ".join(str(error).split()) or type(error).__name__


def explain(store: object, error: BaseException) -> StoreError:
    """An error of Redis or of the way to it as one line that says what to do."""
    message = message_of(error)
    if isinstance(error, exceptions.OutOfMemoryError):
        message = f"OOM {message}"
    remedy = next((remedy for sign, remedy in _REMEDIES if sign in message), "")
    if not remedy:
        lost = isinstance(error, exceptions.ConnectionError | OSError)
        remedy = "check the server and the network, and repeat the call" if lost else "look into the server's log"
    return StoreError(f"store {store}: {message}; {remedy}")


def is_refusal(error: BaseException) -> bool:
    """Whether a server that was reached will not have us, however often we ask."""
    return isinstance(error, exceptions.AuthenticationError | exceptions.NoPermissionError) or any(
        sign in message_of(error)
        for sign in (
            "WRONGPASS",
            "NOAUTH",
            "CERTIFICATE_VERIFY_FAILED",
            "certificate verify failed",
            "DB index is out",
            "SELECT is not",
        )
    )


def is_passing(error: BaseException) -> bool:
    """Whether an error reply goes away by itself: a failover, a slot on its way, a server that starts."""
    passing = (
        exceptions.TryAgainError
        | exceptions.ClusterDownError
        | exceptions.BusyLoadingError
        | exceptions.MasterDownError
    )
    return isinstance(error, passing) or message_of(error).startswith(_PASSING)


def redirection_of(error: BaseException) -> tuple[str, tuple[str, int]] | None:
    """``MOVED`` or ``ASK`` and the server that has the slot, if that is what a reply says."""
    if isinstance(error, exceptions.AskError):  # MovedError is one too
        kind = "MOVED" if isinstance(error, exceptions.MovedError) else "ASK"
        return kind, (error.host, int(error.port))
    words = message_of(error).split(" ")
    if len(words) == 3 and words[0] in ("MOVED", "ASK"):
        host, _, port = words[2].rpartition(":")
        return words[0], (host, int(port))
    return None
