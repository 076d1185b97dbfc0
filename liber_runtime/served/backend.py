"""The seam to Triton's Python backend: requests to arrays, outputs and errors to responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from liber_runtime.exceptions import ConfigurationError, InvalidInputError, LiberError

Tensors: TypeAlias = Mapping[str, npt.NDArray[Any]]
Outcome: TypeAlias = "dict[str, npt.NDArray[Any]] | LiberError"


class ServedModel(Protocol):
    """One model of the repository."""

    inputs: Sequence[str]
    """Names of the tensors it reads."""

    def run(self, batch: Sequence[Tensors]) -> list[Outcome]:
        """Answers every request of a batch; an error in one leaves the others alone."""
        ...


def version_directory(args: Mapping[str, str]) -> Path:
    """The directory of the model version that Triton is initializing.

    Raises:
        ConfigurationError: this Python has numpy 2 or later, whose arrays the backend turns into zeros, silently.
    """
    if int(np.__version__.split(".")[0]) >= 2:
        raise ConfigurationError(
            f"numpy {np.__version__} is installed in Triton's Python; its backend needs numpy below 2: "
            "pip install 'numpy<2'"
        )
    return Path(args["model_repository"]) / args["model_version"]


class Counter:
    """A counter among the metrics that the server shows; calling it adds to it.

    Args:
        name: as Prometheus shows it.
        description: beside it.
    """

    def __init__(self, name: str, description: str) -> None:
        import triton_python_backend_utils as triton  # exists inside Triton only

        # A family that nobody holds takes its metrics with it.
        self._family = triton.MetricFamily(name=name, description=description, kind=triton.MetricFamily.COUNTER)
        self._metric = self._family.Metric(labels={})

    def __call__(self, amount: int) -> None:
        """Adds `amount`."""
        self._metric.increment(amount)


def answer(requests: Sequence[Any], model: ServedModel) -> list[Any]:
    """Runs `model` on what Triton handed to ``execute`` and wraps the outcomes as Triton's responses."""
    import triton_python_backend_utils as triton  # exists inside Triton only

    batch = [
        {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in model.inputs}
        for request in requests
    ]
    responses = []
    for outcome in model.run(batch):
        if isinstance(outcome, LiberError):
            code = (
                triton.TritonError.INVALID_ARG
                if isinstance(outcome, InvalidInputError)
                else (triton.TritonError.UNAVAILABLE)
            )
            responses.append(triton.InferenceResponse(error=triton.TritonError(str(outcome), code)))
        else:
            tensors = [triton.Tensor(name, np.ascontiguousarray(array)) for name, array in outcome.items()]
            responses.append(triton.InferenceResponse(output_tensors=tensors))
    return responses
