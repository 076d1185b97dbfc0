"""The seam to Triton's Python backend: requests to arrays, outputs and errors to responses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
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


class Counters:
    """Counters among the metrics that the server shows.

    An increment is a round trip to the server, which a request shall not wait for: amounts are gathered, and handed on
    twice a second by a thread.

    Args:
        meanings: what each counts, by the name that Prometheus shows.
    """

    def __init__(self, meanings: Mapping[str, str]) -> None:
        import triton_python_backend_utils as triton  # exists inside Triton only

        # A family that nobody holds takes its metrics with it.
        self._families = {
            name: triton.MetricFamily(name=name, description=meaning, kind=triton.MetricFamily.COUNTER)
            for name, meaning in meanings.items()
        }
        self._metrics = {name: family.Metric(labels={}) for name, family in self._families.items()}
        self._gathered = Gathered(lambda name, amount: self._metrics[name].increment(amount))

    def add(self, amounts: Mapping[str, int]) -> None:
        """Adds to counters, by name."""
        self._gathered.add(amounts)

    def close(self) -> None:
        """Hands on what is left."""
        self._gathered.close()


class Gathered:
    """Amounts by name, gathered by any thread and handed on by one of their own.

    Args:
        hand_on: takes a name and what came together since it was last called with it.
        seconds: between two rounds.
    """

    def __init__(self, hand_on: Callable[[str, int], None], seconds: float = 0.5) -> None:
        self._hand_on = hand_on
        self._seconds = seconds
        self._amounts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="counters", daemon=True)
        self._thread.start()

    def add(self, amounts: Mapping[str, int]) -> None:
        """Adds `amounts`."""
        with self._lock:
            held = self._amounts
            for name, amount in amounts.items():
                if amount:
                    held[name] = held.get(name, 0) + amount

    def close(self) -> None:
        """Hands on what is left and ends the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            self._hand_all_on()
        self._hand_all_on()

    def _hand_all_on(self) -> None:
        with self._lock:
            amounts, self._amounts = self._amounts, {}
        for name, amount in amounts.items():
            self._hand_on(name, amount)


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
