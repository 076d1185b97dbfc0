"""What goes to a Triton that serves an LLM, and what its answers and refusals mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from liber_runtime.exceptions import (
    ConfigurationError,
    LiberError,
    PromptRefusedError,
    UnusableAnswerError,
    WriterAwayError,
)
from liber_runtime.writers.llm import BusyError, Generation
from liber_runtime.writers.triton import TritonModel

INFLIGHT = {
    "text_input": "BYTES",
    "max_tokens": "INT32",
    "stop_words": "BYTES",
    "temperature": "FP32",
    "top_k": "INT32",
    "top_p": "FP32",
    "seed": "UINT64",
    "stream": "BOOL",
    "exclude_input_in_output": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
LLMAPI = {
    "text_input": "BYTES",
    "streaming": "BOOL",
    "sampling_param_max_tokens": "INT32",
    "sampling_param_temperature": "FP32",
    "sampling_param_top_k": "INT32",
    "sampling_param_top_p": "FP32",
    "sampling_param_seed": "UINT64",
    "sampling_param_exclude_input_from_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_stop_reason": "BOOL",
}
COUNTED = {"text_output": "BYTES", "cum_log_probs": "FP32", "num_input_tokens": "INT32", "num_output_tokens": "INT32"}
REASONED = {"text_output": "BYTES", "finish_reason": "BYTES", "stop_reason": "BYTES"}


class Fake(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton with one model, which answers, or refuses, as it is told."""

    def __init__(self) -> None:
        self.inputs, self.rank, self.outputs = dict(INFLIGHT), 2, dict(COUNTED)
        self.answer: dict[str, Any] = {"text_output": b"Likes drama."}
        self.refusals: dict[str, tuple[str, str]] = {}
        self.index: dict[str, str] = {}
        self.ready = True
        self.asked: list[str] = []
        self.requests: list[Any] = []
        self.url = ""

    async def _ask(self, what: str, context: Any) -> None:
        self.asked.append(what)
        if what in self.refusals:
            status, message = self.refusals[what]
            await context.abort(grpc.StatusCode[status], message)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        await self._ask("metadata", context)
        metadata = service_pb2.ModelMetadataResponse(name=request.name)
        for kind, types in ((metadata.inputs, self.inputs), (metadata.outputs, self.outputs)):
            for name, datatype in types.items():
                kind.add(name=name, datatype=datatype, shape=[-1, 1][-self.rank :])
        return metadata

    async def ModelReady(self, request: Any, context: Any) -> Any:
        await self._ask("ready", context)
        return service_pb2.ModelReadyResponse(ready=self.ready)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        await self._ask("index", context)
        index = service_pb2.RepositoryIndexResponse()
        for name, state in self.index.items():
            index.models.add(name=name, version="1", state=state, reason="" if state == "READY" else "unloaded")
        return index

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        await self._ask("infer", context)
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, value in self.answer.items():
            text = isinstance(value, bytes)
            array = np.array([value], np.object_ if text else np.int32)
            response.outputs.add(name=name, datatype="BYTES" if text else "INT32", shape=[1])
            response.raw_output_contents.append(serialize_byte_tensor(array).item() if text else array.tobytes())
        return response

    @property
    def sent(self) -> dict[str, Any]:
        """The values of the newest request; each tensor was checked to be one of them."""
        values = {}
        for tensor, raw in zip(self.requests[-1].inputs, self.requests[-1].raw_input_contents, strict=True):
            assert list(tensor.shape) == [1] * self.rank
            assert tensor.datatype == self.inputs[tensor.name]
            text = tensor.datatype == "BYTES"
            array = deserialize_bytes_tensor(raw) if text else np.frombuffer(raw, triton_to_np_dtype(tensor.datatype))
            values[tensor.name] = array.item()
        return values


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    served, server = Fake(), grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(served, server)
    served.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield served
    await server.stop(None)


@pytest.fixture
async def open_model(fake: Fake) -> AsyncIterator[Callable[..., TritonModel]]:
    opened: list[TritonModel] = []

    def open_one(**settings: Any) -> TritonModel:
        opened.append(TritonModel(fake.url, "ensemble", **settings))
        return opened[-1]

    yield open_one
    for model in opened:
        await model.close()


Open = Callable[..., TritonModel]


class TestWhatIsSent:
    async def test_greedy_to_engines(self, fake: Fake, open_model: Open) -> None:
        await open_model().generate("Films: Psycho (1960), Amélie.", 64)
        assert fake.sent == {
            "text_input": "Films: Psycho (1960), Amélie.".encode(),
            "max_tokens": 64,
            "top_k": 1,
            "stream": False,
            "exclude_input_in_output": True,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
        }
        assert [output.name for output in fake.requests[0].outputs] == [
            "text_output",
            "num_input_tokens",
            "num_output_tokens",
        ]

    async def test_drawn_from_a_checkpoint(self, fake: Fake, open_model: Open) -> None:
        fake.inputs, fake.rank, fake.outputs = dict(LLMAPI), 1, dict(REASONED)
        await open_model(temperature=0.5, seed=2**64 - 1).generate("a", 7)
        assert fake.sent == {
            "text_input": b"a",
            "streaming": False,
            "sampling_param_max_tokens": 7,
            "sampling_param_temperature": 0.5,
            "sampling_param_top_k": 0,
            "sampling_param_top_p": 1.0,
            "sampling_param_seed": 2**64 - 1,
            "sampling_param_exclude_input_from_output": True,
            "return_finish_reason": True,
        }
        assert [output.name for output in fake.requests[0].outputs] == ["text_output", "finish_reason"]

    async def test_only_what_the_model_takes_in_its_own_types(self, fake: Fake, open_model: Open) -> None:
        fake.inputs, fake.outputs = {"text_input": "BYTES", "max_tokens": "UINT32"}, {"text_output": "BYTES"}
        await open_model(temperature=1.0, seed=3).generate("a", 7)
        assert fake.sent == {"text_input": b"a", "max_tokens": 7}

    async def test_greedy_without_a_choice_of_tokens(self, fake: Fake, open_model: Open) -> None:
        fake.inputs = {"text_input": "BYTES", "max_tokens": "INT32", "temperature": "FP32"}
        await open_model().generate("a", 7)
        assert fake.sent == {"text_input": b"a", "max_tokens": 7, "temperature": 0.0}

    async def test_the_model_is_looked_at_once(self, fake: Fake, open_model: Open) -> None:
        model = open_model()
        await model.check()
        await asyncio.gather(*(model.generate("a", 1) for _ in range(3)))
        assert fake.asked == ["metadata", "ready", "infer", "infer", "infer"]

    async def test_what_is_no_text_is_not_sent(self, fake: Fake, open_model: Open) -> None:
        with pytest.raises(PromptRefusedError, match=r"not text \(surrogates not allowed at character 2\)"):
            await open_model().generate("ab\ud800", 1)
        assert not fake.requests


class TestWhatIsRead:
    @pytest.mark.parametrize(
        ("answer", "generation"),
        [
            (
                {"text_output": b"\xc3\xa9", "num_input_tokens": 9, "num_output_tokens": 4},
                Generation("é", True, 9, 4),
            ),
            ({"text_output": b"a", "num_input_tokens": 9, "num_output_tokens": 3}, Generation("a", False, 9, 3)),
            ({"text_output": b"four words, not more", "finish_reason": b"stop"}, Generation("four words, not more")),
            ({"text_output": b"a", "finish_reason": b"length"}, Generation("a", True)),
            ({"text_output": b"a", "finish_reason": b"None"}, Generation("a")),
            ({"text_output": b"The prompt. And more."}, Generation(" And more.")),
            ({"text_output": b""}, Generation("")),
        ],
    )
    async def test_an_answer(
        self, fake: Fake, open_model: Open, answer: Mapping[str, Any], generation: Generation
    ) -> None:
        fake.answer = dict(answer)
        assert await open_model().generate("The prompt.", 4) == generation

    @pytest.mark.parametrize(("reason", "cut_off"), [(b"stop", False), (b"length", True), (None, True)])
    async def test_what_the_model_does_not_count_is_counted_here(
        self, fake: Fake, open_model: Open, reason: bytes | None, cut_off: bool
    ) -> None:
        fake.answer = {"text_output": b"a b c d"} | ({"finish_reason": reason} if reason else {})
        made = await open_model(count=lambda text: len(text.split())).generate("The prompt.", 4)
        assert made == Generation("a b c d", cut_off, 2, 4)

    @pytest.mark.parametrize(
        ("answer", "error", "message"),
        [
            ({}, LiberError, "answered with no text_output"),
            ({"text_output": 3}, LiberError, "answered with int32 as text_output, where text is due"),
            ({"text_output": b"ab\xff\xfe"}, UnusableAnswerError, r"not UTF-8: b'\\xff\\xfe'"),
            (
                {"text_output": b"a", "finish_reason": b"timeout"},
                LiberError,
                r"before its answer was whole \(timeout\)",
            ),
        ],
    )
    async def test_garbage(
        self, fake: Fake, open_model: Open, answer: dict[str, Any], error: type[LiberError], message: str
    ) -> None:
        fake.answer = answer
        with pytest.raises(LiberError, match=message) as raised:
            await open_model().generate("a", 4)
        assert type(raised.value) is error

    async def test_garbage_that_was_paid_for_says_what_it_cost(self, fake: Fake, open_model: Open) -> None:
        fake.answer = {"text_output": b"\xff", "num_input_tokens": 9, "num_output_tokens": 3}
        with pytest.raises(UnusableAnswerError) as raised:
            await open_model().generate("a", 4)
        assert (raised.value.prompt_tokens, raised.value.response_tokens) == (9, 3)


REFUSALS = [
    ("UNAVAILABLE", "Exceeds maximum queue size", BusyError, "takes no call just now: Exceeds"),
    ("INTERNAL", "Maximum queue size of 8 has been reached, please try again later", BusyError, "takes no call"),
    (
        "UNAVAILABLE",
        "Server is stopping, scheduler for model has stopped accepting new inference requests",
        BusyError,
        "takes no call just now: Server is stopping",
    ),
    ("UNAVAILABLE", "Socket closed", LiberError, "failed: UNAVAILABLE: Socket closed"),
    ("UNAVAILABLE", "Connection reset by peer", LiberError, "failed: UNAVAILABLE: Connection reset"),
    (
        "INTERNAL",
        "in ensemble 'ensemble', Executor failed process requestId 7 due to the following error: Encountered an error "
        "when fetching new request: Prompt length (4000) exceeds maximum input length (3584).\n1 0x7f at frame",
        PromptRefusedError,
        r"refuses the prompt: .*exceeds maximum input length \(3584\)\.$",
    ),
    (
        "INTERNAL",
        "Error generating request: The sum of prompt length (9000.0), query length (0) should not exceed "
        "max_num_tokens (8192)",
        PromptRefusedError,
        "refuses the prompt",
    ),
    ("INVALID_ARGUMENT", "unexpected inference input 'top_p' for model 'x'", WriterAwayError, "does not take the call"),
    ("INVALID_ARGUMENT", "[request id: 1] expected 3 inputs but got 2 inputs", WriterAwayError, "does not take"),
    ("INVALID_ARGUMENT", "the LoRA is unknown", LiberError, "failed: INVALID_ARGUMENT: the LoRA is unknown"),
    ("NOT_FOUND", "Request for unknown model: 'ensemble' is not found", WriterAwayError, "does not take the call"),
    ("UNAVAILABLE", "This protocol is restricted, expecting header 'key'", WriterAwayError, "does not take the call"),
    ("PERMISSION_DENIED", "no", WriterAwayError, "does not take the call: no"),
    ("INTERNAL", "the adapter failed to connect to its store", LiberError, "failed: INTERNAL: the adapter"),
    ("INTERNAL", "Stub process 'x_0_0' is not healthy.", LiberError, "failed: INTERNAL: Stub process"),
    ("INTERNAL", "The worker was not ready to compute this", LiberError, "failed: INTERNAL"),
    ("CANCELLED", "Request cancelled by client", LiberError, "failed: CANCELLED"),
    ("UNKNOWN", "", LiberError, "failed: UNKNOWN: no reason given"),
]


class TestRefusals:
    @pytest.mark.parametrize(("status", "said", "error", "message"), REFUSALS)
    async def test_a_call(
        self, fake: Fake, open_model: Open, status: str, said: str, error: type[LiberError], message: str
    ) -> None:
        fake.refusals["infer"] = (status, said)
        model = open_model()
        with pytest.raises(LiberError, match=message) as raised:
            await model.generate("a", 4)
        assert type(raised.value) is error
        assert "\n" not in str(raised.value)
        del fake.refusals["infer"]
        await model.generate("a", 4)
        # What cannot be called as it was known is looked at again.
        assert fake.asked.count("metadata") == (2 if error is WriterAwayError else 1)

    async def test_nobody_there(self) -> None:
        model = TritonModel("127.0.0.1:1", "ensemble")
        for call in (model.check(), model.generate("a", 4)):
            with pytest.raises(WriterAwayError, match=r"no Triton answers at 127\.0\.0\.1:1 \(failed to connect"):
                await call
        await model.close()

    async def test_nobody_there_any_more(self, fake: Fake, open_model: Open) -> None:
        fake.refusals["infer"] = ("UNAVAILABLE", "failed to connect to all addresses; last error: Connection refused")
        with pytest.raises(WriterAwayError, match="no Triton answers"):
            await open_model().generate("a", 4)

    async def test_no_answer_in_time(self, fake: Fake, open_model: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        async def hang(what: str, context: Any) -> None:
            if what == hanging:
                await asyncio.Event().wait()

        monkeypatch.setattr(fake, "_ask", hang)
        monkeypatch.setattr("liber_runtime.writers.triton._LOOK_SECONDS", 0.1)
        hanging = "infer"
        with pytest.raises(LiberError, match=r"did not answer within 0\.1 s; raise LIBER_WRITER_TIMEOUT") as raised:
            await open_model(seconds=0.1).generate("a", 4)
        assert not isinstance(raised.value, WriterAwayError)
        hanging = "metadata"
        with pytest.raises(WriterAwayError, match=r"no Triton answers .*no answer within 0\.1 s"):
            await open_model().generate("a", 4)


class TestCheck:
    async def test_an_unknown_model(self, fake: Fake, open_model: Open) -> None:
        fake.refusals["metadata"] = ("NOT_FOUND", "Request for unknown model: 'ensemble' is not found")
        fake.index = {"llama": "READY", "bert": "READY", "old": "UNAVAILABLE"}
        model = open_model()
        with pytest.raises(
            ConfigurationError, match=r"has no model 'ensemble'; it serves bert, llama: correct LIBER_WRITER_MODEL$"
        ):
            await model.check()
        with pytest.raises(
            WriterAwayError, match=r"has no model 'ensemble'; it serves bert, llama: correct LIBER_WRITER_MODEL$"
        ):
            await model.generate("a", 4)
        fake.refusals["index"] = ("UNAVAILABLE", "This protocol is restricted")
        with pytest.raises(ConfigurationError, match=r"has no model 'ensemble'; correct LIBER_WRITER_MODEL$"):
            await model.check()

    async def test_a_model_that_is_not_loaded(self, fake: Fake, open_model: Open) -> None:
        fake.refusals["metadata"] = ("NOT_FOUND", "Request for unknown model: 'ensemble' has no available versions")
        fake.index = {"ensemble": "UNAVAILABLE"}
        with pytest.raises(WriterAwayError, match=r"at the moment \(UNAVAILABLE unloaded\); load it, or wait"):
            await open_model().check()

    async def test_a_model_that_is_not_ready(self, fake: Fake, open_model: Open) -> None:
        fake.ready = False
        with pytest.raises(WriterAwayError, match="loaded, but not ready"):
            await open_model().check()

    async def test_what_is_no_llm(self, fake: Fake, open_model: Open) -> None:
        fake.inputs, fake.outputs = {"summary": "BYTES", "shift": "BYTES"}, {"representation": "FP32"}
        with pytest.raises(ConfigurationError, match=r"takes shift, summary and gives representation; correct LIBER"):
            await open_model().check()

    async def test_another_layout(self, fake: Fake, open_model: Open) -> None:
        await open_model(layout="inflight_batcher_llm").check()
        with pytest.raises(ConfigurationError, match=r"no LLM of layout llmapi: it takes exclude_input_in_output, "):
            await open_model(layout="llmapi").check()

    async def test_a_server_that_does_not_say(self, fake: Fake, open_model: Open) -> None:
        fake.refusals["metadata"] = ("UNAVAILABLE", "This protocol is restricted, expecting header")
        with pytest.raises(ConfigurationError, match=r"does not say what model 'ensemble' takes .*'metadata'"):
            await open_model().check()

    def test_the_usual_names(self) -> None:
        named = {layout: TritonModel("127.0.0.1:8001", layout=layout).name for layout in ("auto", "llmapi")}
        assert named == {"auto": "triton:ensemble", "llmapi": "triton:tensorrt_llm"}
        assert TritonModel("127.0.0.1:8001", "llama").name == "triton:llama"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"layout": "vllm"}, "unknown layout 'vllm'; use one of inflight_batcher_llm, llmapi, or auto"),
            ({"temperature": -0.5}, "temperature -0.5 is not usable"),
            ({"temperature": float("nan")}, "temperature nan is not usable"),
            ({"seed": -1}, "seed -1 is not usable"),
            ({"seconds": 0.0}, "a limit of 0 s lets no answer through"),
        ],
    )
    def test_unusable_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            TritonModel("127.0.0.1:8001", "ensemble", **settings)
