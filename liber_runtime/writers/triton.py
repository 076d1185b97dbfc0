"""An LLM on Triton over gRPC, in the two layouts in which TensorRT-LLM is served.

`inflight_batcher_llm` serves engines, behind a model ``ensemble`` or ``tensorrt_llm_bls``; `llmapi` serves checkpoints,
behind a model ``tensorrt_llm``. They differ in the names of their tensors and in what they say of an answer
(https://github.com/NVIDIA/TensorRT-LLM, triton_backend/all_models). Which of them a model has is asked from the server,
and of the optional tensors those go out that the model takes.

A call that is cancelled here is cancelled on the server, where the model asks for that; Triton 24.10 does not tell the
models of an ensemble.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import numpy as np
import numpy.typing as npt
import tritonclient.grpc
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from liber_runtime.channel import open_async_client
from liber_runtime.exceptions import (
    ConfigurationError,
    LiberError,
    PromptRefusedError,
    UnusableAnswerError,
    WriterAwayError,
)
from liber_runtime.settings import Settings, load_settings
from liber_runtime.writers.llm import BusyError, Generation
from liber_runtime.writers.tokens import TokenCount

_PROMPT, _TEXT = "text_input", "text_output"
_FINISH_REASON, _PROMPT_TOKENS, _RESPONSE_TOKENS = "finish_reason", "num_input_tokens", "num_output_tokens"
_OUTPUTS = (_TEXT, _FINISH_REASON, _PROMPT_TOKENS, _RESPONSE_TOKENS)

_LOOK_SECONDS = 10.0
"""Limit of a call that asks about a model; it says nothing of how long an answer may take."""

_MOST_MESSAGE_CHARACTERS = 300
_MEND = "start it, correct LIBER_WRITER_URL, or set LIBER_TLS_CA if it wants TLS"

# What gRPC says when no connection came about. "Socket closed" and the like may be the end of one that was there.
_NEVER_CONNECTED = re.compile(r"failed to connect|DNS resolution|resolving|name resolution", re.IGNORECASE)
# Triton's scheduler and TensorRT-LLM's executor, whatever the status.
_FULL = re.compile(r"maximum queue size", re.IGNORECASE)
# Triton with status UNAVAILABLE: while it stops, while it loads, when a request waited for too long.
_NOT_NOW = re.compile(r"server is stopping|not ready|request timeout expired", re.IGNORECASE)
# TensorRT-LLM's executor (engines), and its worker (checkpoints).
_TOO_LONG = re.compile(r"exceeds maximum \w*\s?(?:input|sequence) length|should not exceed max_\w+", re.IGNORECASE)
# Triton compares a request with the model's configuration before any model sees it.
_OTHER_TENSORS = re.compile(r"inference input|inputs but got|input byte size|unexpected shape", re.IGNORECASE)
_RESTRICTED = "protocol is restricted"


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tensors of a served LLM are called.

    Attributes:
        name: as TensorRT-LLM calls it.
        model: what the model that takes prompts is usually called.
        most_tokens: the input that bounds the answer; a model with it has the layout.
        sampling: what goes before ``temperature``, ``top_k``, ``top_p`` and ``seed``.
        switches: inputs that are set to true: the prompt does not come back, counts and reasons do.
        streaming: the input that asks for an answer in pieces.
    """

    name: str
    model: str
    most_tokens: str
    sampling: str
    switches: tuple[str, ...]
    streaming: str


LAYOUTS = (
    Layout(
        "inflight_batcher_llm",
        "ensemble",
        "max_tokens",
        "",
        ("exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens"),
        "stream",
    ),
    Layout(
        "llmapi",
        "tensorrt_llm",
        "sampling_param_max_tokens",
        "sampling_param_",
        ("sampling_param_exclude_input_from_output", "return_finish_reason"),
        "streaming",
    ),
)


@dataclass(frozen=True, slots=True)
class _Served:
    """What the server says of the model.

    Attributes:
        layout: of its tensors.
        types: Triton's data type of each input.
        rank: of the prompt: [1, 1] where the model takes batches, else [1].
        outputs: those of its outputs that a `Generation` is made from.
    """

    layout: Layout
    types: Mapping[str, str]
    rank: int
    outputs: tuple[str, ...]


class TritonModel:
    """A `LanguageModel` behind a Triton; in one event loop until it is closed, then in another if need be.

    A model with a decoupled transaction policy answers over a stream; that is found out with the first call.

    Args:
        url: host:port of Triton's gRPC endpoint.
        model: the model's name there, e.g. ``tensorrt_llm_bls``; empty for the layout's usual one (``ensemble`` if that
            is ``auto``).
        seconds: until a call is given up. A Triton never answers a call whose model's process died in the middle of it.
        temperature: 0 for the likeliest token each time (greedy); above, tokens are drawn from all there are.
        seed: of the draws; None for the server's.
        layout: ``inflight_batcher_llm`` or ``llmapi``; ``auto`` for the one that the model has.
        count: counts tokens where the model does not tell them; the LLM's own tokenizer, or None.
        settings: how Triton is reached; default from the environment.

    Raises:
        ConfigurationError: a value that no model takes.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        seconds: float = 120.0,
        temperature: float = 0.0,
        seed: int | None = None,
        layout: str = "auto",
        count: TokenCount | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Names the server and the model; connects at the first call."""
        layouts = [each for each in LAYOUTS if layout in (each.name, "auto")]
        if not layouts:
            known = ", ".join(each.name for each in LAYOUTS)
            raise ConfigurationError(f"unknown layout {layout!r}; use one of {known}, or auto")
        if not 0.0 <= temperature < float("inf"):
            raise ConfigurationError(f"temperature {temperature:g} is not usable; give 0 or more, 1 for the LLM's own")
        if seed is not None and not 0 <= seed < 2**64:
            raise ConfigurationError(f"seed {seed} is not usable; give 0 to {2**64 - 1}, or none")
        if not seconds > 0.0:
            raise ConfigurationError(f"a limit of {seconds:g} s lets no answer through; allow more than 0")
        self._url = url
        self._model = model or layouts[0].model
        self._layouts = layouts
        self._seconds = seconds
        self._temperature = temperature
        self._seed = seed
        self._count = count
        self._settings = settings or load_settings()
        self._client: Any = None
        self._served: _Served | None = None
        self._decoupled = False

    @property
    def name(self) -> str:
        """See `LanguageModel.name`."""
        return f"triton:{self._model}"

    async def generate(self, text: str, response_tokens: int) -> Generation:
        """See `LanguageModel.generate`."""
        if self._served is None:
            try:
                self._served = await self._look()
            except ConfigurationError as error:
                raise WriterAwayError(str(error)) from None
        try:
            inputs = self._inputs(self._served, text, response_tokens)
            answers = await self._infer(inputs, self._served.outputs)
        except InferenceServerException as error:
            self._fail(error)
        return self._read(answers, text, response_tokens)

    async def check(self) -> None:
        """See `LanguageModel.check`."""
        self._served = await self._look()

    async def close(self) -> None:
        """See `LanguageModel.close`."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _connected(self) -> Any:
        if self._client is None:
            # Not sooner: a channel belongs to the event loop that runs when it is made.
            self._client = open_async_client(self._url, self._settings)
        return self._client

    # -- what is served ------------------------------------------------------------------------------------------

    async def _look(self) -> _Served:
        """Asks the server what the model takes.

        Raises:
            ConfigurationError: there is no such model, it is no LLM of the layout, or the question is not allowed.
            WriterAwayError: nobody answers, or the model is not ready at the moment.
        """
        try:
            metadata = await self._connected().get_model_metadata(self._model, client_timeout=_LOOK_SECONDS)
            if await self._connected().is_model_ready(self._model, client_timeout=_LOOK_SECONDS):
                return self._understand(metadata)
        except InferenceServerException as error:
            await self._explain_look(error)
        raise WriterAwayError(f"{self._who} is loaded, but not ready to answer; look into Triton's log if it stays so")

    async def _explain_look(self, error: InferenceServerException) -> NoReturn:
        status, message = _status(error), _line(error)
        if status == "NOT_FOUND" or "unknown model" in message:
            await self._explain_missing()
        if _RESTRICTED in message or status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise ConfigurationError(
                f"Triton at {self._url} does not say what model {self._model!r} takes ({message}); leave its protocols "
                "'health', 'metadata' and 'inference' open to this client"
            )
        if status == "DEADLINE_EXCEEDED":
            message = f"no answer within {_LOOK_SECONDS:g} s"
        raise WriterAwayError(f"no Triton answers at {self._url} ({message}); {_MEND}")

    async def _explain_missing(self) -> NoReturn:
        """Why there is no such model, as far as the server tells."""
        missing = f"Triton at {self._url} has no model {self._model!r}"
        try:
            index = await self._connected().get_model_repository_index(client_timeout=_LOOK_SECONDS)
        except InferenceServerException:
            raise ConfigurationError(f"{missing}; correct LIBER_WRITER_MODEL") from None
        mine = [entry for entry in index.models if entry.name == self._model]
        if mine:
            state = " ".join(part for part in (mine[-1].state, mine[-1].reason) if part) or "not loaded"
            raise WriterAwayError(f"{missing} at the moment ({state}); load it, or wait until it is") from None
        ready = sorted({entry.name for entry in index.models if entry.state == "READY"})
        raise ConfigurationError(
            f"{missing}; it serves {', '.join(ready) or 'none'}: correct LIBER_WRITER_MODEL"
        ) from None

    def _understand(self, metadata: Any) -> _Served:
        types = {tensor.name: tensor.datatype for tensor in metadata.inputs}
        outputs = {tensor.name: tensor.datatype for tensor in metadata.outputs}
        layouts = [each for each in self._layouts if each.most_tokens in types]
        if not layouts or types.get(_PROMPT) != "BYTES" or outputs.get(_TEXT) != "BYTES":
            wanted = " or ".join(each.name for each in self._layouts)
            raise ConfigurationError(
                f"{self._who} is no LLM of layout {wanted}: it takes {', '.join(sorted(types)) or 'nothing'} and gives "
                f"{', '.join(sorted(outputs)) or 'nothing'}; correct LIBER_WRITER_MODEL, or LIBER_WRITER_LAYOUT"
            )
        rank = next(len(tensor.shape) for tensor in metadata.inputs if tensor.name == _PROMPT)
        return _Served(layouts[0], types, rank, tuple(name for name in _OUTPUTS if name in outputs))

    @property
    def _who(self) -> str:
        return f"model {self._model!r} of Triton at {self._url}"

    # -- a call --------------------------------------------------------------------------------------------------

    def _inputs(self, served: _Served, text: str, response_tokens: int) -> list[tritonclient.grpc.InferInput]:
        try:
            prompt = text.encode()
        except UnicodeEncodeError as error:
            raise PromptRefusedError(f"the prompt is not text ({error.reason} at character {error.start})") from None
        layout = served.layout
        values: dict[str, Any] = {_PROMPT: prompt, layout.most_tokens: response_tokens, layout.streaming: False}
        greedy = "top_k" if layout.sampling + "top_k" in served.types else "temperature"
        values |= {layout.sampling + name: value for name, value in self._sampling(greedy).items()}
        values |= dict.fromkeys(layout.switches, True)
        return [
            _tensor(name, value, served.types[name], served.rank)
            for name, value in values.items()
            if name in served.types
        ]

    def _sampling(self, greedy: str) -> dict[str, Any]:
        """How tokens are drawn; `greedy` names the tensor to say so with, if they are not.

        Of one token (top_k 1) there is no choice: that is greedy in every version, which a temperature of 0 is not.
        Without top_k and top_p every version is greedy, at any temperature: so both are named to draw from all tokens.
        """
        if not self._temperature:
            return {"top_k": 1} if greedy == "top_k" else {"temperature": 0.0}
        drawn: dict[str, Any] = {"temperature": self._temperature, "top_k": 0, "top_p": 1.0}
        return drawn if self._seed is None else drawn | {"seed": self._seed}

    async def _infer(self, inputs: Sequence[tritonclient.grpc.InferInput], names: Sequence[str]) -> list[Any]:
        outputs = [tritonclient.grpc.InferRequestedOutput(name) for name in names]
        if not self._decoupled:
            try:
                return [
                    await self._connected().infer(self._model, inputs, outputs=outputs, client_timeout=self._seconds)
                ]
            except InferenceServerException as error:
                if _status(error) != "UNIMPLEMENTED" or "decoupled" not in _line(error):
                    raise
                self._decoupled = True
        return await self._infer_over_stream(inputs, outputs)

    async def _infer_over_stream(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": self._model, "inputs": inputs, "outputs": outputs}

        # With this header errors have a status, as those of a call without a stream do.
        stream = self._connected().stream_infer(
            requests(), stream_timeout=self._seconds, headers={"triton_grpc_error": "true"}
        )
        answers = []
        try:
            async for answer, error in stream:
                if error is not None:
                    stream.cancel()
                    raise error
                answers.append(answer)
        except grpc.RpcError as error:
            raise InferenceServerException(error.details() or "", str(error.code())) from None
        return answers

    # -- an answer -----------------------------------------------------------------------------------------------

    def _read(self, answers: Sequence[Any], prompt: str, response_tokens: int) -> Generation:
        if not answers:
            raise LiberError(f"{self._who} ended the call without an answer; look into Triton's log")
        raw = b"".join(self._element(answer, _TEXT) or b"" for answer in answers)
        reason = (self._element(answers[-1], _FINISH_REASON, needed=False) or b"").decode(errors="replace")
        read = self._number(answers[-1], _PROMPT_TOKENS)
        written = self._number(answers[-1], _RESPONSE_TOKENS)
        if read is None and self._count is not None:
            read = self._count(prompt)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise UnusableAnswerError(
                f"{self._who} answered what is not UTF-8: {raw[error.start :]!r:.80}", read, written
            ) from None
        if reason in ("timeout", "cancelled"):
            raise LiberError(f"{self._who} ended the call before its answer was whole ({reason}); try again")
        text = text.removeprefix(prompt)  # by models that cannot leave it out
        if written is None and self._count is not None:
            written = self._count(text)
        cut_off = reason == "length" or (reason != "stop" and written is not None and written >= response_tokens)
        return Generation(text, cut_off, read, written)

    def _element(self, answer: Any, name: str, needed: bool = True) -> bytes | None:
        """The first element of an output of text; None if there is none."""
        array = self._array(answer, name)
        if array is None and not needed:
            return None
        if array is None or array.dtype != np.object_:
            what = "no" if array is None else f"{array.dtype} as"
            raise LiberError(f"{self._who} answered with {what} {name}, where text is due; look into Triton's log")
        return bytes(array.flat[0]) if array.size else b""

    def _number(self, answer: Any, name: str) -> int | None:
        array = self._array(answer, name)
        return int(array.flat[0]) if array is not None and array.size and array.dtype.kind in "iu" else None

    def _array(self, answer: Any, name: str) -> npt.NDArray[Any] | None:
        try:
            array: npt.NDArray[Any] | None = answer.as_numpy(name)
        except Exception as error:  # whatever comes of bytes that are none of the type they are said to be
            raise LiberError(f"{self._who} answered with a broken {name} ({error}); look into Triton's log") from None
        return array

    def _fail(self, error: InferenceServerException) -> NoReturn:
        """Raises what a failed call means, see `LanguageModel.generate`."""
        status, message = _status(error), _line(error)
        if _TOO_LONG.search(str(error.message())):
            raise PromptRefusedError(f"{self._who} refuses the prompt: {message}") from None
        if status == "UNAVAILABLE" and _NEVER_CONNECTED.search(message):
            raise WriterAwayError(f"no Triton answers at {self._url} ({message}); {_MEND}") from None
        if _FULL.search(message) or (status == "UNAVAILABLE" and _NOT_NOW.search(message)):
            raise BusyError(f"{self._who} takes no call just now: {message}") from None
        if status == "DEADLINE_EXCEEDED":
            raise LiberError(
                f"{self._who} did not answer within {self._seconds:g} s; raise LIBER_WRITER_TIMEOUT_SECONDS, "
                "or have fewer calls in flight"
            ) from None
        if self._never_began(status, message):
            # It may be another model by now: the next call asks anew.
            self._served, self._decoupled = None, False
            raise WriterAwayError(f"{self._who} does not take the call: {message}") from None
        raise LiberError(f"{self._who} failed: {status}: {message}") from None

    def _never_began(self, status: str, message: str) -> bool:
        refused = status in ("NOT_FOUND", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED")
        return (
            refused
            or _RESTRICTED in message
            or "unknown model" in message
            or (status == "INVALID_ARGUMENT" and _OTHER_TENSORS.search(message) is not None)
        )


def _tensor(name: str, value: Any, datatype: str, rank: int) -> tritonclient.grpc.InferInput:
    """One value as a tensor of the model's own type: [1], or [1, 1] for a model that takes batches."""
    shape = (1,) * rank
    dtype = triton_to_np_dtype(datatype)
    array = np.empty(shape, dtype=np.object_ if isinstance(value, bytes) else dtype)
    array.flat[0] = value
    tensor = tritonclient.grpc.InferInput(name, shape, datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def _status(error: InferenceServerException) -> str:
    return str(error.status() or "UNKNOWN").removeprefix("StatusCode.")


def _line(error: InferenceServerException) -> str:
    """The first line of what the server says, without the trace that may follow."""
    lines = (error.message() or "").strip().splitlines()
    return lines[0][:_MOST_MESSAGE_CHARACTERS] if lines else "no reason given"
