"""A real Triton with an LLM in both of TensorRT-LLM's layouts; and a worker while that Triton is killed and lies.

The LLM is a tiny random Llama. The Triton and its models are real processes; the tensors are those of TensorRT-LLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from llama_engine import Fault, LlamaEngine
from llm_harness import write_llm_repository

from liber_runtime.behavior import Behavior, Domain, Item
from liber_runtime.exceptions import ConfigurationError, LiberError, PromptRefusedError, WriterAwayError
from liber_runtime.interest import ShiftPrompt, SummaryPrompt
from liber_runtime.memory import MemoryStore, PartitionRecord, open_store
from liber_runtime.partition import Count
from liber_runtime.server import TritonServer
from liber_runtime.server.stubs import parse_stub
from liber_runtime.settings import load_writer_settings
from liber_runtime.worker import Worker
from liber_runtime.writers.answering import read_answer
from liber_runtime.writers.llm import BusyError, Generation, LLMWriter, Patience
from liber_runtime.writers.opening import open_writer
from liber_runtime.writers.prompting import Budget, Prompting
from liber_runtime.writers.triton import TritonModel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")

PATIENCE_SECONDS = 60.0
NAMES = ("tensorrt_llm", "tensorrt_llm_stream", "tensorrt_llm_bls", "ensemble")
COUNTING = ("tensorrt_llm_bls", "ensemble")
ANSWER_TOKENS = 24
IN_FLIGHT = 6
K, USERS, PARTITIONS = 4, 6, 6
DOMAIN = Domain("films", "film", "stars", (1.0, 5.0), 3.0, ("genre", "era"))
ITEMS = [Item(f"item-{number}", f"Film {number} (19{60 + number})") for number in range(30)]


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(tiny_llama) as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: LlamaEngine) -> Iterator[TritonServer]:
    directory = tmp_path_factory.mktemp("llm")
    repository = write_llm_repository(directory / "repository", engine.address)
    models = ("tensorrt_llm", "tensorrt_llm_stream", "tensorrt_llm_queued", "ensemble")
    with TritonServer(repository, log_file=directory / "triton.log", models=models, stop_timeout=3) as running:
        yield running


@pytest.fixture
async def open_model(server: TritonServer):
    async with contextlib.AsyncExitStack() as stack:

        def open_one(name: str, **settings) -> TritonModel:
            model = TritonModel(server.grpc_url, name, **{"seconds": PATIENCE_SECONDS} | settings)
            stack.push_async_callback(model.close)
            return model

        yield open_one


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


class TestCalls:
    @pytest.mark.parametrize("name", NAMES)
    async def test_many_in_flight_each_with_its_own_answer(self, engine: LlamaEngine, open_model, name: str) -> None:
        model = open_model(name, temperature=1.0, seed=5)
        await model.check()
        prompts = [f"What does person {number} like? Amélie, 1 star" for number in range(12)]
        engine.largest_batch = 0
        made = await asyncio.gather(*(model.generate(prompt, ANSWER_TOKENS) for prompt in prompts))
        assert [one.text.encode() for one in made] == [engine.replied[prompt][-1] for prompt in prompts]
        assert len({one.text for one in made}) == len(prompts)
        assert engine.largest_batch > 1
        told = name in COUNTING
        assert {(one.prompt_tokens, one.response_tokens is None) for one in made} == {
            (engine.count(prompts[0]) + 1 if told else None, not told),
            (engine.count(prompts[-1]) + 1 if told else None, not told),
        }
        assert {one.cut_off for one in made if one.response_tokens == ANSWER_TOKENS} <= {True}

    @pytest.mark.parametrize("name", NAMES)
    async def test_greedy_says_the_same_and_draws_do_not(self, engine: LlamaEngine, open_model, name: str) -> None:
        async def made(**settings) -> str:
            return (await open_model(name, **settings).generate("The user likes", 8)).text

        assert await made() == await made() == await made(seed=7)
        draws = [await made(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        assert draws[0] == draws[1] != draws[2]
        asked = engine.asked[-1]
        assert (asked["temperature"], asked["top_k"], asked["top_p"], asked["seed"]) == (1.0, 0, 1.0, 2)

    async def test_the_layouts_write_the_same(self, engine: LlamaEngine, open_model) -> None:
        made = [await open_model(name, count=engine.count).generate("The user likes", 8) for name in NAMES]
        assert len({one.text for one in made}) == 1
        assert all(one.cut_off for one in made)
        assert made[0].prompt_tokens == engine.count("The user likes")
        assert made[0] == Generation(made[0].text, True, made[0].prompt_tokens, engine.count(made[0].text))

    @pytest.mark.parametrize("name", NAMES)
    async def test_a_prompt_that_is_too_long(
        self, engine: LlamaEngine, open_model, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "most_prompt_tokens", 50)
        with pytest.raises(PromptRefusedError, match=r"refuses the prompt: .*exceeds maximum input length \(50\)"):
            await open_model(name).generate("word " * 100, 8)

    @pytest.mark.parametrize("name", NAMES)
    async def test_an_answer_that_takes_too_long(self, engine: LlamaEngine, open_model, name: str) -> None:
        engine.faults.append(Fault(seconds=5 if name == "ensemble" else PATIENCE_SECONDS))
        abandoned = engine.abandoned
        with pytest.raises(LiberError, match=r"did not answer within 0\.5 s") as raised:
            await open_model(name, seconds=0.5).generate("a", 8)
        assert not isinstance(raised.value, WriterAwayError)
        if name != "ensemble":  # Triton does not tell the models of an ensemble
            await until(lambda: engine.abandoned == abandoned + 1)

    @pytest.mark.parametrize("name", ["tensorrt_llm", "tensorrt_llm_stream", "tensorrt_llm_bls"])
    async def test_a_cancelled_call_ends_on_the_server(self, engine: LlamaEngine, open_model, name: str) -> None:
        model = open_model(name)
        await model.generate("a", 1)
        engine.faults.append(Fault(seconds=PATIENCE_SECONDS))
        asked, abandoned = len(engine.asked), engine.abandoned
        call = asyncio.ensure_future(model.generate("a", 8))
        await until(lambda: len(engine.asked) == asked + 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: engine.abandoned == abandoned + 1)

    async def test_a_full_queue_makes_a_writer_wait(self, engine: LlamaEngine, open_model) -> None:
        model = open_model("tensorrt_llm_queued")
        writer = LLMWriter(model, warms_up=False, patience=Patience(PATIENCE_SECONDS, 0.1))
        await model.generate("a", 1)
        engine.faults.append(Fault(seconds=1.0))
        asked = len(engine.asked)
        running = asyncio.ensure_future(model.generate("a", 8))
        await until(lambda: len(engine.asked) == asked + 1)
        # One is computed, one is with the instance, one waits; of the rest none was taken.
        more = await asyncio.gather(*(model.generate("b", 8) for _ in range(6)), return_exceptions=True)
        refused = [one for one in more if isinstance(one, BusyError)]
        assert 3 <= len(refused) < 6
        assert "Exceeds maximum queue size" in str(refused[0])
        assert len(engine.asked) == asked + 1 + len(more) - len(refused)
        await running
        engine.faults.append(Fault(seconds=0.5))
        prompts = [SummaryPrompt(DOMAIN, {}, ((item, 4.0),)) for item in ITEMS[:8]]
        writer.prompting = Prompting(Budget(4096, 4))
        await asyncio.gather(*(writer.write(prompt) for prompt in prompts))
        assert writer.retried > 0

    async def test_what_there_is_not(self, server: TritonServer, open_model) -> None:
        served = "ensemble, tensorrt_llm, tensorrt_llm_bls, tensorrt_llm_queued, tensorrt_llm_stream"
        with pytest.raises(ConfigurationError, match=f"has no model 'llama'; it serves {served}: correct"):
            await open_model("llama").check()
        with pytest.raises(WriterAwayError, match="has no model 'llama'"):
            await open_model("llama").generate("a", 1)
        with pytest.raises(ConfigurationError, match="no LLM of layout llmapi: it takes exclude_input_in_output"):
            await open_model("ensemble", layout="llmapi").check()


async def test_settings_open_it(server: TritonServer, tiny_llama: Path) -> None:
    settings = load_writer_settings(
        writer="triton", url=server.grpc_url, layout="llmapi", temperature=1.0, response_tokens=8, tokenizer=tiny_llama
    )
    writer = open_writer(settings)
    assert isinstance(writer, LLMWriter)
    await writer.check()
    made = await writer.write(SummaryPrompt(DOMAIN, {}, ((ITEMS[0], 4.0),)))
    await writer.close()
    assert (writer.name, made.text != "") == ("triton:tensorrt_llm", True)
    assert (made.prompt_tokens or 0) > 100


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    opened = open_store(f"sqlite:///{tmp_path / 'memory.db'}", Count(K))
    opened.describe(DOMAIN, ITEMS)
    yield opened
    opened.close()


def fill(store: MemoryStore, users: int, partitions: int) -> None:
    store.append(
        [
            Behavior(f"user-{user}", f"item-{(7 * user + 3 * n) % len(ITEMS)}", 1.0 + n % 5, 1e9 + n, str(n))
            for user in range(users)
            for n in range(partitions * K)
        ]
    )


def written(store: MemoryStore) -> Iterator[tuple[PartitionRecord, PartitionRecord | None]]:
    """Every partition with the one before it."""
    for user in store.users():
        timeline = store.timeline(user)
        assert timeline is not None
        before = None
        for record in timeline.partitions:
            yield record, before
            before = record


def kill_stub(server: TritonServer) -> None:
    for child in psutil.Process(server.process_id).children():
        with contextlib.suppress(psutil.Error):
            stub = parse_stub(child.cmdline())
            if stub is not None and stub.model.name == "tensorrt_llm":
                child.kill()


def kill_server(server: TritonServer) -> None:
    assert server.process_id is not None
    os.kill(server.process_id, signal.SIGKILL)


class TestWorker:
    async def test_counts_of_the_model_are_kept(self, store: MemoryStore, open_model) -> None:
        fill(store, 1, 3)
        writer = LLMWriter(open_model("ensemble", temperature=1.0, seed=1), Prompting(Budget(4096, ANSWER_TOKENS)))
        report = await Worker(store, writer, None, concurrency=4).drain()
        assert (report.summaries, report.shifts, report.failed) == (3, 2, 0)
        for record, _ in written(store):
            assert record.summary is not None
            assert record.summary.writer == "triton:ensemble"
            assert (record.summary.prompt_tokens or 0) > 100
            assert 0 < (record.summary.response_tokens or 0) <= ANSWER_TOKENS

    async def test_every_partition_has_its_texts_once_whatever_happens_to_the_server(
        self, store: MemoryStore, server: TritonServer, engine: LlamaEngine, open_model
    ) -> None:
        fill(store, USERS, PARTITIONS)
        model = open_model("tensorrt_llm", temperature=1.0, seed=1, seconds=5.0, count=engine.count)
        prompting = Prompting(Budget(4096, ANSWER_TOKENS), engine.count)
        writer = LLMWriter(model, prompting)
        worker = Worker(
            store,
            writer,
            None,
            concurrency=IN_FLIGHT,
            max_attempts=100,
            backoff_seconds=0.05,
            max_backoff_seconds=0.5,
            idle_seconds=0.02,
        )
        garbage = [
            Fault(reply={"text": b""}),
            Fault(reply={"text": b"ab\xff\xfe"}),
            Fault(reply={"text": b"likes drama " * 30}),
            Fault(reply={"missing": ["text_output"]}),
            Fault(reply={"floats": {"text_output": 1.5}}),
            Fault(reply={"error": "CUDA error: an illegal memory access was encountered"}),
        ]
        hanging = [Fault(seconds=PATIENCE_SECONDS)] * 3
        stubs, servers = server.stub_restarts, server.server_restarts
        asked = len(engine.asked)

        def warm_ups() -> int:
            return sum(question["max_tokens"] == 1 for question in engine.asked[asked:])

        async def answers(count: int) -> None:
            before = engine.answered
            await until(lambda: engine.answered >= before + count)

        async def disturb() -> None:
            # One of summaries and one of shifts; what goes wrong with those is no step's.
            await until(lambda: warm_ups() == 2)
            await answers(4)
            engine.faults.extend(garbage)
            await answers(8)
            for kill in (kill_stub, kill_server):
                engine.faults.extend(hanging)
                await until(lambda: not engine.faults)
                kill(server)
                await until(lambda: server.stub_restarts == stubs + 1)
                await answers(4)
            assert server.server_restarts == servers + 1

        report, _ = await asyncio.gather(worker.drain(), disturb())

        steps = USERS * PARTITIONS + USERS * (PARTITIONS - 1)
        assert (report.summaries, report.shifts) == (USERS * PARTITIONS, USERS * (PARTITIONS - 1))
        assert (report.dead, report.discarded, report.lost) == (0, 0, 0)
        assert set(store.statistics().pending.values()) <= {0, USERS * PARTITIONS}  # all that is left is to encode
        assert warm_ups() == 2
        repeats = len(engine.asked) - asked - warm_ups() - steps
        assert len(garbage) + 2 * len(hanging) <= repeats <= len(garbage) + 2 * IN_FLIGHT
        assert repeats <= report.repeated

        prompt_tokens = response_tokens = 0
        for record, before in written(store):
            history = tuple((ITEMS[int(b.item_id.removeprefix("item-"))], b.feedback) for b in record.behaviors)
            assert record.summary is not None
            prompts = [(SummaryPrompt(DOMAIN, {}, history), record.summary)]
            if before is not None:
                assert record.shift is not None
                assert before.summary is not None
                prompts.append((ShiftPrompt(DOMAIN, before.summary.text, record.summary.text), record.shift))
            for prompt, text in prompts:
                # The answer to this very prompt, whatever was in flight with it.
                replies = [reply.decode(errors="replace") for reply in engine.replied[prompt.text]]
                raw = next(reply for reply in replies if text.text in (_usable(reply, True), _usable(reply, False)))
                assert (text.kind, text.writer, text.prompt_version) == (
                    prompt.kind,
                    "triton:tensorrt_llm",
                    prompt.version,
                )
                assert (text.prompt_tokens, text.response_tokens) == (engine.count(prompt.text), engine.count(raw))
                assert text.seconds > 0.0
                prompt_tokens += text.prompt_tokens
                response_tokens += text.response_tokens
        metric = worker.metrics.registry.get_sample_value
        for direction, tokens in (("prompt", prompt_tokens), ("response", response_tokens)):
            assert (metric("liber_writer_tokens_total", {"direction": direction}) or 0) >= tokens
        assert metric("liber_steps_total", {"step": "summary"}) == USERS * PARTITIONS
        assert metric("liber_steps_total", {"step": "shift"}) == USERS * (PARTITIONS - 1)
        assert metric("liber_calls_repeated_total") == report.repeated


def _usable(reply: str, cut_off: bool) -> str | None:
    answer = read_answer(reply, cut_off)
    return None if isinstance(answer, str) else answer.text
