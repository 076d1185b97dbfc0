"""A checkpoint in this process: a tiny random Llama, compared with transformers' own generate()."""

from __future__ import annotations

import asyncio
import functools
import http.server
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from liber_runtime.behavior import Behavior, Domain, Item
from liber_runtime.exceptions import ConfigurationError, LiberError, PromptRefusedError
from liber_runtime.interest import SummaryPrompt
from liber_runtime.memory.sqlite import SQLiteStore
from liber_runtime.partition import Count
from liber_runtime.worker import Worker
from liber_runtime.writers.llm import Generation, LLMWriter
from liber_runtime.writers.transformers import Batching, LocalModel
from liber_runtime.writers.transformers import checkpoint as checkpoints
from liber_runtime.writers.transformers.batching import Batches, BatchTooLargeError, Call, choose
from liber_runtime.writers.transformers.checkpoint import Checkpoint, Memory, free_memory

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = tuple("The user loves " + "comedies and dramas, " * count for count in (1, 30, 4, 60, 2, 9))
TEMPLATE = "{{ bos_token }}[INST] {{ messages[0]['content'] | trim }} [/INST]"
DOMAIN = Domain("films", "movie", "stars", (1.0, 5.0), 3.0, ("genre", "mood"))


@pytest.fixture
def checkpoint(tiny_llama: Path) -> Checkpoint:
    return Checkpoint(tiny_llama, device="cpu")


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., LocalModel]]:
    """Opens models, and closes them when the test is over."""
    made: list[LocalModel] = []

    def make(checkpoint: Checkpoint, **options: Any) -> LocalModel:
        made.append(LocalModel(checkpoint, **options))
        return made[-1]

    yield make
    for model in made:
        await model.close()


def copied(tiny_llama: Path, directory: Path, template: str = "", **settings: Any) -> Path:
    """The checkpoint with another configuration, or with a chat template."""
    shutil.copytree(tiny_llama, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return directory


@functools.cache
def loaded(directory: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return transformers.AutoTokenizer.from_pretrained(directory), model.eval()


def alone(directory: Path, text: str, most: int, end: int | None = None) -> list[int]:
    """What transformers writes by itself, one prompt at a time."""
    tokenizer, model = loaded(directory)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    ends = [tokenizer.eos_token_id] if end is None else [tokenizer.eos_token_id, end]
    row = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, eos_token_id=ends)[0]
    written: list[int] = row[ids.shape[1] :].tolist()
    return written


async def ask(model: LocalModel, texts: Sequence[str] = TEXTS, most: int = 12) -> list[Generation]:
    return list(await asyncio.gather(*(model.generate(text, most) for text in texts)))


@pytest.mark.parametrize("batching", ["static", "continuous"])
async def test_batches_answer_as_each_would_alone(
    checkpoint: Checkpoint, opened: Callable[..., LocalModel], tiny_llama: Path, batching: Batching
) -> None:
    """With prompts of all lengths padded into one batch, and with answers of different lengths."""
    model = opened(checkpoint, batching=batching, batch_size=4)
    most = [12, 7, 1, 12, 9, 3]
    answers = await asyncio.gather(*(model.generate(*each) for each in zip(TEXTS, most, strict=True)))
    for text, count, answer in zip(TEXTS, most, answers, strict=True):
        written = alone(tiny_llama, text, count)
        assert answer.text == checkpoint.tokenizer.decode(written, skip_special_tokens=True)
        assert (answer.prompt_tokens, answer.response_tokens) == (model.count(text), len(written))
        assert answer.cut_off
    assert model.count(TEXTS[0]) == len(checkpoint.tokenizer(TEXTS[0])["input_ids"])


@pytest.mark.parametrize("batching", ["static", "continuous"])
async def test_a_stop_token_ends_an_answer(
    checkpoint: Checkpoint, opened: Callable[..., LocalModel], tiny_llama: Path, batching: Batching
) -> None:
    unstopped = alone(tiny_llama, TEXTS[1], 12)
    # One that its answer has not had before, so that it ends there.
    place = next(each for each in range(2, 12) if unstopped[each] not in unstopped[:each])
    stop = checkpoint.tokenizer.convert_ids_to_tokens(unstopped[place])
    model = opened(checkpoint, batching=batching, batch_size=6, stop=[stop])
    answers = await ask(model)
    assert answers[1].response_tokens == place + 1
    assert not answers[1].cut_off
    assert answers[1].text == checkpoint.tokenizer.decode(unstopped[:place], skip_special_tokens=True)
    for text, answer in zip(TEXTS, answers, strict=True):
        assert answer.response_tokens == len(alone(tiny_llama, text, 12, unstopped[place]))


def test_what_cannot_be_asked_for_is_refused_in_words(checkpoint: Checkpoint) -> None:
    for options, said in (
        ({"stop": ["never one token"]}, "stop 'never one token' is .* must be one"),
        ({"chat": "always"}, "has no chat template"),
        ({"chat": "maybe"}, "chat 'maybe' is unknown"),
        ({"batching": "best"}, "batching 'best' is unknown; give static, continuous"),
        ({"batch_size": 0}, "batch size 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"context_tokens": 8192}, "made for 4096 tokens, and the context is 8192"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            LocalModel(checkpoint, **options)  # type: ignore[arg-type]


async def test_a_prompt_over_the_context_is_refused(checkpoint: Checkpoint, opened: Callable[..., LocalModel]) -> None:
    model = opened(checkpoint, context_tokens=256)
    with pytest.raises(PromptRefusedError, match="more than the context of 256"):
        await model.generate(TEXTS[3] * 4, 12)


async def test_the_same_seed_draws_the_same(checkpoint: Checkpoint, opened: Callable[..., LocalModel]) -> None:
    async def drawn(seed: int) -> list[Generation]:
        return await ask(opened(checkpoint, temperature=1.0, seed=seed, batch_size=6))

    first = await drawn(1)
    assert first == await drawn(1)
    assert first != await drawn(2)
    assert first != await ask(opened(checkpoint, batch_size=6))


async def test_a_cancelled_call_does_not_hold_up_its_batch(
    checkpoint: Checkpoint, opened: Callable[..., LocalModel]
) -> None:
    model = opened(checkpoint, batch_size=2)
    await model.check()
    passes = count_passes(model)
    long = asyncio.create_task(model.generate(TEXTS[0], 3000))
    short = asyncio.create_task(model.generate(TEXTS[2], 8))
    while len(passes) < 20:
        await asyncio.sleep(0.001)
    assert set(passes[:20]) == {2}
    long.cancel()
    assert (await short).response_tokens == 8
    assert len(passes) < 3000


async def test_a_cancelled_call_makes_room_in_continuous_batching(
    checkpoint: Checkpoint, opened: Callable[..., LocalModel]
) -> None:
    model = opened(checkpoint, batching="continuous", batch_size=1)
    await model.check()
    passes = count_passes(model)
    long = asyncio.create_task(model.generate(TEXTS[0], 3000))
    short = asyncio.create_task(model.generate(TEXTS[2], 8))
    while len(passes) < 20:
        await asyncio.sleep(0.001)
    assert not short.done()
    long.cancel()
    assert (await short).response_tokens == 8
    assert len(passes) < 3000


def count_passes(model: LocalModel) -> list[int]:
    """Rows of every forward pass from now on."""
    passes: list[int] = []

    def note(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        passes.append(named["input_ids"].shape[0])

    model._model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


async def test_a_batch_that_does_not_fit_is_halved(
    checkpoint: Checkpoint, opened: Callable[..., LocalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await ask(opened(checkpoint, batch_size=6))
    model = opened(checkpoint, batch_size=6)
    await model.check()
    most = [2]

    def fail(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        if named["input_ids"].shape[0] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model._model.register_forward_pre_hook(fail, with_kwargs=True)
    passes = count_passes(model)
    assert await ask(model) == expected
    assert max(passes) == 2
    most[0] = 0
    with pytest.raises(LiberError, match=r"ran out of memory on cpu with 1 prompts of up to .* lower the context"):
        await model.generate(TEXTS[0], 12)
    most[0] = 2
    assert await model.generate(TEXTS[0], 12) == expected[0]


async def test_continuous_batching_begins_anew_after_a_failure(
    checkpoint: Checkpoint, opened: Callable[..., LocalModel]
) -> None:
    model = opened(checkpoint, batching="continuous")
    expected = await ask(model)
    handle = model._model.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    found = await asyncio.gather(*(model.generate(text, 12) for text in TEXTS), return_exceptions=True)
    assert all(isinstance(each, LiberError) for each in found)
    assert any("CUDA out of memory.; if memory ran out, lower the batch size" in str(each) for each in found)
    handle.remove()
    assert await ask(model) == expected


@pytest.mark.parametrize(
    ("batching", "said"), [("static", "closed while calls waited"), ("continuous", "finished before this request")]
)
async def test_closing_ends_the_calls_and_later_ones_are_answered(
    checkpoint: Checkpoint, batching: Batching, said: str
) -> None:
    model = LocalModel(checkpoint, batching=batching, batch_size=1)
    await model.check()
    passes = count_passes(model)
    running = asyncio.create_task(model.generate(TEXTS[0], 3000))
    waiting = asyncio.create_task(model.generate(TEXTS[1], 3000))
    while len(passes) < 5:
        await asyncio.sleep(0.001)
    await model.close()
    for task in (running, waiting):
        with pytest.raises(LiberError, match=said):
            await task
    assert len(passes) < 3000
    assert (await model.generate(TEXTS[0], 8)).response_tokens == 8
    await model.close()


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_one_event_loop_after_the_other_is_served_by_the_same_weights(
    checkpoint: Checkpoint, batching: Batching
) -> None:
    """As a build does: its texts are written in one loop, those of items in another."""
    model = LocalModel(checkpoint, batching=batching)

    async def ask_all() -> list[str]:
        try:
            return [made.text for made in await asyncio.gather(*(model.generate(text, 6) for text in TEXTS))]
        finally:
            await model.close()

    assert asyncio.run(ask_all()) == asyncio.run(ask_all())


@pytest.mark.parametrize(
    ("waiting", "size", "chosen"),
    [
        ((50, 900, 52, 10, 51, 48, 1000), 4, [48, 50, 51, 52]),
        ((900, 52, 10, 51, 48, 1000), 3, [52, 900, 1000]),
        ((10, 51, 48, 1000), 3, [10, 48, 51]),
        ((1000, 10, 51), 9, [10, 51, 1000]),
        ((5,), 4, [5]),
    ],
)
def test_a_batch_holds_the_oldest_call_and_those_of_like_length(
    waiting: tuple[int, ...], size: int, chosen: list[int]
) -> None:
    assert [waiting[place] for place in choose([Call([1] * each, 1) for each in waiting], size)] == chosen


async def test_the_event_loop_goes_on_while_a_batch_runs() -> None:
    may_end = threading.Event()
    sizes = []

    def run(batch: Sequence[Call]) -> list[list[int]]:
        sizes.append(len(batch))
        # Set by the event loop alone: if that were blocked, nobody would.
        assert may_end.wait(60)
        return [call.tokens for call in batch]

    batches = Batches(run, 3)
    tasks = [asyncio.create_task(batches.put([number], 1)) for number in range(5)]
    while not sizes:
        await asyncio.sleep(0.001)
    may_end.set()
    assert await asyncio.gather(*tasks) == [[number] for number in range(5)]
    assert sizes == [3, 2]
    await batches.close()


async def test_one_failed_batch_fails_its_own_calls_alone() -> None:
    def run(batch: Sequence[Call]) -> list[list[int]]:
        if any(len(call.tokens) > 5 for call in batch):
            raise RuntimeError("a kernel\nis broken")
        return [call.tokens for call in batch]

    batches = Batches(run, 1)
    found = await asyncio.gather(batches.put([1] * 9, 1), batches.put([1], 1), return_exceptions=True)
    assert str(found[0]) == "the language model failed: RuntimeError: a kernel"
    assert found[1] == [1]
    await batches.close()


async def test_a_smaller_batch_is_kept_to() -> None:
    sizes = []

    def run(batch: Sequence[Call]) -> list[list[int]]:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise BatchTooLargeError("too large")
        return [call.tokens for call in batch]

    batches = Batches(run, 8)
    assert await asyncio.gather(*(batches.put([number], 1) for number in range(8))) == [[n] for n in range(8)]
    assert sizes == [8, 4, 2, 2, 2, 2]
    await batches.close()


def test_a_chat_template_is_the_checkpoints_own(tiny_llama: Path, tmp_path: Path) -> None:
    chat = Checkpoint(copied(tiny_llama, tmp_path / "chat", TEMPLATE), device="cpu")
    prompt = SummaryPrompt(DOMAIN, {"age": 31}, ((Item("a", 'Alien" [/INST] </s>'), 5.0),))
    model = LocalModel(chat)
    fitted = model.prompting().fit(prompt)
    assert fitted.text == f"<s>[INST] {prompt.text} [/INST]"
    assert fitted.prefix == f"<s>[INST] {prompt.prefix}"
    # Exactly what is read: one token that begins the text, not two, and none of the title's.
    ids = model._encode(fitted.text)
    assert fitted.tokens == len(ids)
    tokenizer = chat.tokenizer
    assert [ids.count(token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)] == [1, 0]
    bare = LocalModel(chat, chat="never").prompting(profile=False).fit(prompt)
    assert bare.text.startswith(prompt.prefix)
    assert "31" not in bare.text
    assert LocalModel(Checkpoint(tiny_llama, device="cpu")).template is None


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ 'nothing' }}", "does not show the user's message"), ("{{ raise_exception('no users') }}", "no users")],
)
def test_a_broken_chat_template_is_refused(tiny_llama: Path, tmp_path: Path, template: str, said: str) -> None:
    chat = Checkpoint(copied(tiny_llama, tmp_path / "chat", template), device="cpu")
    with pytest.raises(ConfigurationError, match=said):
        LocalModel(chat)
    assert LocalModel(chat, chat="never").template is None


CODE = """
from transformers import PreTrainedTokenizerFast

class RoundsTokenizer(PreTrainedTokenizerFast):
    def build_prompt(self, query, history=None):
        return "[Round 1]\\n\\nQ: " + query + "\\n\\nA:"
"""


async def test_a_checkpoints_own_code_runs_only_where_it_is_trusted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[..., LocalModel]
) -> None:
    """As ChatGLM2 comes: a tokenizer whose code builds the prompt."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = copied(tiny_llama, tmp_path / "rounds")
    (directory / "tokenization_rounds.py").write_text(CODE)
    named = json.loads((directory / "tokenizer_config.json").read_text())
    named |= {
        "tokenizer_class": "RoundsTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_rounds.RoundsTokenizer"]},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(
        ConfigurationError, match=r"Python code that comes with it.*LIBER_WRITER_TRUST_REMOTE_CODE=true"
    ):
        Checkpoint(directory, device="cpu")
    model = opened(Checkpoint(directory, device="cpu", trust_remote_code=True))
    prompt = SummaryPrompt(DOMAIN, {}, ((Item("a", "Alien"), 5.0),))
    fitted = model.prompting().fit(prompt)
    assert fitted.text == f"[Round 1]\n\nQ: {prompt.text}\n\nA:"
    # Its format is text: what begins it comes from the tokenizer.
    assert model._encode(fitted.text)[0] == model._tokenizer.bos_token_id
    assert (await model.generate(fitted.text, 4)).prompt_tokens == fitted.tokens


def test_memory_is_counted_before_anything_is_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    """Of Llama 2 13B's shape: 26 GB of weights and 0.8 MiB for each token, by the configuration alone."""
    shape = {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "head_dim": 128,
        "vocab_size": 32000,
    }
    large = Checkpoint(copied(tiny_llama, tmp_path / "13b", **shape), device="cpu", dtype="bfloat16")
    assert large.memory.weights == 2 * 13_015_864_320
    assert large.memory.cache == 2 * 40 * 5120 * 2
    small = Checkpoint(tiny_llama, device="cpu")
    stored = (tiny_llama / "model.safetensors").stat().st_size
    assert 0 <= stored - small.memory.weights < 10_000


def test_what_does_not_fit_says_what_would(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(checkpoint), "memory", Memory(weights=24 * 2**30, cache=2**20, activations=0, workspace=0))
    monkeypatch.setattr(checkpoints, "free_memory", lambda _: 40 * 2**30)
    with pytest.raises(
        ConfigurationError,
        match=r"float32 needs 56.0 GiB: 24.0 GiB for its weights and 32.0 GiB for 8 contexts of 4096 tokens; cpu has "
        r"40.0 GiB free; lower the batch size to 4",
    ):
        LocalModel(checkpoint, batch_size=8)
    LocalModel(checkpoint, batch_size=4)
    monkeypatch.setattr(checkpoints, "free_memory", lambda _: 20 * 2**30)
    with pytest.raises(ConfigurationError, match="not even the weights fit"):
        LocalModel(checkpoint, batch_size=1)


def test_a_control_group_limits_the_memory(tmp_path: Path) -> None:
    device = torch.device("cpu")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(device, tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(device, tmp_path) > 10**6
    assert free_memory(device, tmp_path / "nowhere") > 10**6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM, which does not continue"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification, which does not"),
        ({"model_type": "newest"}, "model type `newest` but Transformers does not recognize"),
        ({"vocab_size": 50}, "has no usable tokenizer"),
        (
            {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}},
            "Python code that comes with it",
        ),
    ],
)
def test_what_is_no_language_model_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Checkpoint(copied(tiny_llama, tmp_path / "other", **settings), device="cpu")


def test_missing_files_and_unknown_places_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no checkpoint at '/no/such'"):
        Checkpoint("/no/such")
    with pytest.raises(ConfigurationError, match=r"holds no config\.json"):
        Checkpoint(tmp_path)
    with pytest.raises(ConfigurationError, match="dtype 'int3' is unknown"):
        Checkpoint(tiny_llama, device="cpu", dtype="int3")
    with pytest.raises(ConfigurationError, match="device 'cuda:64' is not there: torch"):
        Checkpoint(tiny_llama, device="cuda:64")
    with pytest.raises(ConfigurationError, match="device 'tpu' is unknown"):
        Checkpoint(tiny_llama, device="tpu")
    untold = copied(tiny_llama, tmp_path / "untold")
    for file in untold.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigurationError, match="has no usable tokenizer"):
        Checkpoint(untold, device="cpu")


async def test_weights_that_are_not_there_are_found_out_by_the_check(
    tiny_llama: Path, tmp_path: Path, opened: Callable[..., LocalModel]
) -> None:
    directory = copied(tiny_llama, tmp_path / "half")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    model = opened(Checkpoint(directory, device="cpu"))
    with pytest.raises(ConfigurationError, match=r"the weights of .*half cannot be read"):
        await model.check()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A server that answers every request as the Hub refuses one."""
    answer: dict[str, Any] = {}

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer["status"])
            self.send_header("X-Error-Code", answer["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield answer
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", r"some/model is gated on the Hugging Face Hub; accept its licence"),
        (404, "RepoNotFound", r"some/model is neither a directory here nor a checkpoint on the Hugging Face Hub"),
        (404, "RevisionNotFound", r"some/model has no revision 'main'"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(hub: dict[str, Any], status: int, code: str, said: str) -> None:
    hub |= {"status": status, "code": code}
    with pytest.raises(ConfigurationError, match=said) as raised:
        Checkpoint("some/model", device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("batching", ["static", "continuous"])
async def test_a_worker_writes_with_it(tiny_llama: Path, tmp_path: Path, batching: Batching) -> None:
    chat = copied(tiny_llama, tmp_path / "films-chat", TEMPLATE)
    model = LocalModel(Checkpoint(chat, device="cpu"), batching=batching, temperature=1.0, seed=1)
    writer = LLMWriter(model, model.prompting(response_tokens=24), warms_up=model.reuses_prefixes)
    store = SQLiteStore(str(tmp_path / "memory.db"), Count(3))
    store.describe(DOMAIN, [Item("item-0", "Alien"), Item("item-1", "Clerks")])
    for user in ("ann", "bo"):
        store.append([Behavior(user, f"item-{n % 2}", 4.0, 1e9 + n, str(n)) for n in range(7)])
    report = await Worker(store, writer, None, backoff_seconds=0.01, idle_seconds=0.01).drain()
    await writer.close()
    assert (report.summaries, report.shifts, report.dead) == (4, 2, 0)
    timeline = store.timeline("ann")
    assert timeline is not None
    _, second = timeline.partitions
    assert second.summary is not None
    assert second.summary.writer == "transformers:films-chat"
    assert second.summary.response_tokens == 24
    assert second.summary.prompt_tokens is not None
    assert 100 < second.summary.prompt_tokens < 1000
    store.close()
