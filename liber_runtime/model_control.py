"""Tells a running Triton to take a published version, and to leave what no version needs any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from liber_runtime.channel import channel_credentials, open_client
from liber_runtime.credentials import CONTROL_HEADER, GRPC_HEADER_PREFIX
from liber_runtime.grpc_errors import explain
from liber_runtime.settings import Settings, load_settings

LOAD_SECONDS = 120.0


def check_access(settings: Settings) -> None:
    """Finds what is wrong with files and keys before there is anything to load.

    Raises:
        ConfigurationError: the settings of TLS, or the control key, will not do.
    """
    channel_credentials(settings)
    settings.read_control_key()


def load_models(url: str, names: Sequence[str], settings: Settings | None = None) -> None:
    """Loads models, an ensemble with all its steps; requests in flight end on the version they began on.

    Args:
        url: host:port of Triton's gRPC endpoint.
        names: of the models.
        settings: TLS and the control key; default from the environment.

    Raises:
        ConfigurationError: the settings of TLS, or the control key, will not do.
        ScoringError: the server does not answer or refuses; what it served before it goes on serving.
    """
    with _controlling(url, settings) as (client, headers):
        for name in names:
            client.load_model(name, headers=headers, client_timeout=LOAD_SECONDS)


def unload_models(url: str, names: Sequence[str], settings: Settings | None = None) -> None:
    """Unloads models that nothing uses any more; one that is not loaded stays so.

    Args:
        url: host:port of Triton's gRPC endpoint.
        names: of the models.
        settings: TLS and the control key; default from the environment.

    Raises:
        ConfigurationError: the settings of TLS, or the control key, will not do.
        ScoringError: the server does not answer or refuses.
    """
    with _controlling(url, settings) as (client, headers):
        for name in names:
            client.unload_model(name, headers=headers, client_timeout=LOAD_SECONDS)


@contextlib.contextmanager
def _controlling(
    url: str, settings: Settings | None
) -> Iterator[tuple[tritonclient.grpc.InferenceServerClient, dict[str, str]]]:
    """A client, and what each of its calls has to carry."""
    settings = settings or load_settings()
    key = settings.read_control_key()
    client = open_client(url, settings)
    try:
        yield client, {GRPC_HEADER_PREFIX + CONTROL_HEADER: key} if key else {}
    except InferenceServerException as error:
        raise explain(error, url, LOAD_SECONDS) from None
    finally:
        client.close()
