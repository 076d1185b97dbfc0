"""Tells a running Triton to take a published version, and to leave what no version needs any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from liber_runtime.grpc_errors import explain

LOAD_SECONDS = 120.0


def load_models(url: str, names: Sequence[str]) -> None:
    """Loads models, an ensemble with all its steps; requests in flight end on the version they began on.

    Args:
        url: host:port of Triton's gRPC endpoint.
        names: of the models.

    Raises:
        ScoringError: the server does not answer or refuses; what it served before it goes on serving.
    """
    with _client(url) as client:
        for name in names:
            client.load_model(name, client_timeout=LOAD_SECONDS)


def unload_models(url: str, names: Sequence[str]) -> None:
    """Unloads models that nothing uses any more; one that is not loaded stays so.

    Args:
        url: host:port of Triton's gRPC endpoint.
        names: of the models.

    Raises:
        ScoringError: the server does not answer or refuses.
    """
    with _client(url) as client:
        for name in names:
            client.unload_model(name, client_timeout=LOAD_SECONDS)


@contextlib.contextmanager
def _client(url: str) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    client = tritonclient.grpc.InferenceServerClient(url)
    try:
        yield client
    except InferenceServerException as error:
        raise explain(error, url, LOAD_SECONDS) from None
    finally:
        client.close()
