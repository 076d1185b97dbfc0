"""Tells a running Triton to take a published version."""

from __future__ import annotations

from collections.abc import Sequence

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
    client = tritonclient.grpc.InferenceServerClient(url)
    try:
        for name in names:
            client.load_model(name, client_timeout=LOAD_SECONDS)
    except InferenceServerException as error:
        raise explain(error, url, LOAD_SECONDS) from None
    finally:
        client.close()
