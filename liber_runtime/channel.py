"""How this side reaches Triton over gRPC: every client of LIBER is opened here, in plain text or over TLS."""

from __future__ import annotations

import grpc
import tritonclient.grpc
import tritonclient.grpc.aio

from liber_runtime.credentials import read_authority, read_certificate
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.settings import Settings

# Naming any option takes tritonclient's own away, of which no limit of message size is the one that matters.
_NO_LIMITS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1), *_NO_LIMITS]

# After a long outage gRPC would wait up to two minutes before it tries to connect again.
_SOON_AGAIN = [("grpc.max_reconnect_backoff_ms", 10_000), *_NO_LIMITS]


def open_client(
    url: str, settings: Settings, *, own_connection: bool = False
) -> tritonclient.grpc.InferenceServerClient:
    """A client for threads; connects at the first call.

    Args:
        url: host:port of Triton's gRPC endpoint.
        settings: the files of TLS.
        own_connection: whether to keep a connection apart. In plain text the clients of a process otherwise share one
            per server; over TLS gRPC gives each its own in any case.

    Raises:
        ConfigurationError: see `channel_credentials`.
    """
    options = _OWN_CONNECTION if own_connection else None
    return tritonclient.grpc.InferenceServerClient(url, creds=channel_credentials(settings), channel_args=options)


def open_async_client(url: str, settings: Settings) -> tritonclient.grpc.aio.InferenceServerClient:
    """`open_client` for the event loop that runs now, which the client then belongs to."""
    return tritonclient.grpc.aio.InferenceServerClient(
        url, creds=channel_credentials(settings), channel_args=_SOON_AGAIN
    )


def channel_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """What a connection over TLS is made with, read anew each time; None for plain text.

    Raises:
        ConfigurationError: a file is missing or unusable, the key does not fit the certificate, others may read the
            key, or one setting lacks another.
    """
    authority, certificate, key = settings.tls_ca, settings.tls_certificate, settings.tls_key
    if (certificate is None) != (key is None):
        raise ConfigurationError("LIBER_TLS_CERTIFICATE and LIBER_TLS_KEY need each other; set both or neither")
    if authority is None:
        if certificate is not None:
            raise ConfigurationError(
                "LIBER_TLS_CERTIFICATE without LIBER_TLS_CA would go unused, in plain text; set LIBER_TLS_CA to the "
                "certificate of the authority that vouches for the server"
            )
        return None
    own = own_key = None
    if certificate is not None and key is not None:
        own, own_key = read_certificate(certificate, key, "LIBER_TLS_CERTIFICATE", "LIBER_TLS_KEY")
    return grpc.ssl_channel_credentials(read_authority(authority, "LIBER_TLS_CA"), own_key, own)
