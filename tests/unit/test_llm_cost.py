"""What `bench.llm_cost` counts, measures and computes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.llm_cost import NOT_MEASURED, Costs, describe_tokenizer, main, measure_device, parse_arguments
from bench.llm_cost.answers import ask, ask_variant
from bench.llm_cost.floor import (
    H200,
    LLAMA2_13B,
    Shape,
    Speed,
    largest_batch,
    least_seconds,
    least_seconds_per_call,
)
from bench.llm_cost.generation import fastest, measure_generation, parse_sizes
from bench.llm_cost.prompts import COMPARED, Prompts, stand_in
from bench.llm_cost.table import NAMES, compare_with_targets, write_markdown
from builders.datasets import Dataset, load, sample
from builders.paper import LLM_COST
from builders.replay import Samples, replay
from builders.variants import VARIANTS, plan
from liber_runtime.exceptions import ConfigurationError, LiberError, UnusableAnswerError
from liber_runtime.interest import Prompt, ShiftPrompt
from liber_runtime.partition import Count
from liber_runtime.writers import Completion
from liber_runtime.writers.llm import Generation, LLMWriter
from liber_runtime.writers.prompting import Budget
from liber_runtime.writers.statistical import StatisticalWriter, summarize
from liber_runtime.writers.tokens import TokenCount, counted_by, estimated

LIBER_DATA = os.environ.get("LIBER_DATA", "")
LIBER_LLAMA_TOKENIZER = os.environ.get("LIBER_LLAMA_TOKENIZER", "")

TINY = Shape(layers=2, hidden=32, intermediate=64, heads=4, key_value_heads=2, vocabulary=128, positions=256)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return sample.generate(seed=5, users=8, items=160, behaviors=640)


@pytest.fixture(scope="module")
def samples(dataset: Dataset) -> Samples:
    return replay(dataset, Count(20))


@pytest.fixture(scope="session")
def pieces(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A SentencePiece model that, as Llama 2's, reads bytes where it has no piece and never joins two lines."""

    def train(directory: Path) -> None:
        import sentencepiece

        generated = sample.generate(seed=5, users=8, items=160, behaviors=640)
        prompts = Prompts(generated, replay(generated, Count(20)), estimated, seed=1)
        written = plan(VARIANTS["no_shift"], replay(generated, Count(20)))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for row in range(20) for line in prompts.summary(written, row).text.splitlines()),
            model_prefix=str(directory / "tokenizer"),
            model_type="bpe",
            vocab_size=600,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )

    return made_once("pieces", train)


@pytest.fixture(scope="module")
def count(pieces: Path) -> TokenCount:
    return counted_by(pieces)


@pytest.mark.parametrize("name", ["liber", "length20", "length100"])
def test_lines_add_up_to_whole_prompts(name: str, dataset: Dataset, samples: Samples, count: TokenCount) -> None:
    prompts = Prompts(dataset, samples, count, seed=1)
    planned = plan(VARIANTS[name], samples, refresh=1)
    counted = prompts.count_summaries(planned, sample=3)
    assert counted.is_complete
    assert counted.rows.tolist() == list(range(len(planned.user)))
    rows = np.random.default_rng(2).choice(len(planned.user), 20, replace=False)
    assert [count(prompts.summary(planned, row).text) for row in rows] == counted.tokens[rows].tolist()
    assert len(set(counted.tokens.tolist())) > 10


def test_a_tokenizer_that_joins_lines_reads_whole_prompts(dataset: Dataset, samples: Samples) -> None:
    prompts = Prompts(dataset, samples, lambda text: len(text) // 7, seed=1)
    planned = plan(VARIANTS["length20"], samples, refresh=1)
    assert len(planned.user) > COMPARED
    counted = prompts.count_summaries(planned, sample=30)
    assert not counted.is_complete
    assert len(set(counted.rows.tolist())) == len(counted.tokens) == 30
    assert counted.tokens.tolist() == [len(prompts.summary(planned, row).text) // 7 for row in counted.rows]


def test_what_is_drawn_follows_from_the_seed(dataset: Dataset, samples: Samples, count: TokenCount) -> None:
    rows = np.arange(100, dtype=np.int64)
    first, again, other = (Prompts(dataset, samples, count, seed).draw(rows, 10).tolist() for seed in (1, 1, 2))
    assert first == again == sorted(set(first))
    assert first != other
    assert Prompts(dataset, samples, count, 1).draw(rows, 100) is rows


@pytest.mark.parametrize("tokens", [1, 7, 450])
def test_a_text_stands_in_for_an_answer_of_stated_length(tokens: int, count: TokenCount) -> None:
    assert tokens <= count(stand_in(count, tokens)) < tokens + 6
    assert estimated(stand_in(estimated, tokens)) - tokens in range(4)


@pytest.fixture(scope="module")
def costs(dataset: Dataset, count: TokenCount) -> Costs:
    return Costs(dataset, count, partition=20, response_tokens=40, seed=1)


def test_rows_of_stated_answers_are_means_over_all_calls(
    costs: Costs, dataset: Dataset, samples: Samples, count: TokenCount
) -> None:
    users = len(set(samples.user.tolist()))
    for work in costs.works:
        planned = plan(VARIANTS[work.variant], samples, refresh=1)
        summaries = [count(costs.prompts.summary(planned, row).text) for row in range(len(planned.user))]
        note = stand_in(count, 40)
        shifts = [count(ShiftPrompt(dataset.domain, note, note).text)] * int(planned.shifted.sum())
        row = costs.stated(work, 0.5, "engine", "device")
        assert row["calls_per_user"] == pytest.approx(planned.calls / users, abs=1e-4)
        assert row["prompt_tokens_per_call"] == pytest.approx(np.mean(summaries + shifts), abs=0.01)
        assert row["seconds_per_user"] == pytest.approx(0.5 * planned.calls / users, abs=1e-4)
        assert sorted(costs.lengths(work).tolist()) == sorted(summaries + shifts)
        assert 0 < row["prefix_tokens_per_call"] < row["prompt_tokens_per_call"]
        assert row["response_tokens_per_call"] == 40
    liber, no_shift = (costs.stated(work, None, NOT_MEASURED, None) for work in costs.works[:2])
    assert liber["calls_per_user"] > no_shift["calls_per_user"]
    assert liber["seconds_per_user"] is None


def test_the_statistical_writer_is_measured_and_its_texts_are_counted(
    costs: Costs, samples: Samples, count: TokenCount
) -> None:
    work = costs.works[0]
    row = costs.written(work, StatisticalWriter(), "cpu", most=10_000, in_flight=1)
    planned = plan(VARIANTS["liber"], samples)
    texts = [summarize(costs.prompts.summary(planned, number)) for number in range(len(planned.user))]
    assert row["engine"] == "statistical"
    assert row["asked"] == {"summary": len(texts), "shift": int(planned.shifted.sum())}
    assert row["seconds_per_user"] > 0
    assert row["unusable"] == 0
    shifts = [
        costs.prompts.shift(texts[number - 1], texts[number]) for number in np.flatnonzero(planned.shifted).tolist()
    ]
    prompts = [count(costs.prompts.summary(planned, number).text) for number in range(len(texts))]
    prompts += [count(prompt.text) for prompt in shifts]
    assert row["prompt_tokens_per_call"] == pytest.approx(np.mean(prompts), abs=0.01)
    written = [count(text) for text in texts]
    written += [count(asyncio.run(StatisticalWriter().write(prompt)).text) for prompt in shifts]
    assert row["response_tokens_per_call"] == pytest.approx(np.mean(written), abs=0.01)


class CountingWriter(StatisticalWriter):
    """Counts its own tokens, waits a little, and answers every fifth summary with nothing."""

    def __init__(self) -> None:
        self.in_flight = self.most = self.calls = 0

    async def write(self, prompt: Prompt) -> Completion:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        self.calls += 1
        number = self.calls
        await asyncio.sleep(0)
        self.in_flight -= 1
        if prompt.kind == "summary" and number % 5 == 0:
            raise UnusableAnswerError("nothing", 11, 3)
        return Completion((await super().write(prompt)).text, 11, 3)


def test_a_sample_is_asked_with_so_many_calls_in_flight(dataset: Dataset, samples: Samples, count: TokenCount) -> None:
    prompts = Prompts(dataset, samples, count, seed=1)
    planned = plan(VARIANTS["liber"], samples)
    assert len(planned.user) > 12
    writer = CountingWriter()
    answers = ask_variant(planned, prompts, writer, count, most=12, in_flight=4)
    assert writer.most == 4
    assert 6 < len(answers["summary"]) <= 12
    assert answers["summary"].unusable == len(answers["summary"]) // 5
    assert 0 < len(answers["shift"]) <= 6
    assert set(answers["summary"].prompt_tokens) == {11}
    assert set(answers["shift"].response_tokens) == {3}
    alone = ask_variant(plan(VARIANTS["length20"], samples), prompts, StatisticalWriter(), count, 7, 2)
    assert len(alone["summary"]) == 7
    assert "shift" not in alone


class Parrot:
    """A language model that says a line of the prompt again, and knows what it was asked."""

    name = "parrot"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_closed = False

    async def generate(self, text: str, response_tokens: int) -> Generation:
        self.asked.append(text)
        return Generation(text.splitlines()[0], False, len(text), 5)

    async def check(self) -> None:
        assert not self.asked

    async def close(self) -> None:
        self.is_closed = True


def test_any_llm_can_be_measured(costs: Costs) -> None:
    parrot = Parrot()
    work = costs.works[0]
    row = costs.written(work, LLMWriter(parrot), "there", most=10, in_flight=3)
    assert (row["engine"], row["device"], row["in_flight"]) == ("parrot", "there", 3)
    assert row["response_tokens_per_call"] == 5
    # The first call of each kind warms up.
    assert len(parrot.asked) == sum(row["asked"].values()) + 2
    assert parrot.is_closed
    summaries = [len(text) for text in parrot.asked if "history, oldest first" in text]
    assert len(summaries) == row["asked"]["summary"]
    shifts = [len(text) for text in parrot.asked if "Later note:" in text]
    mean = work.per_call(float(np.mean(summaries)), float(np.mean(shifts)))
    assert row["prompt_tokens_per_call"] == pytest.approx(mean, abs=0.01)


async def test_a_writer_that_fails_ends_the_measurement(dataset: Dataset, samples: Samples, count: TokenCount) -> None:
    class Failing(StatisticalWriter):
        async def write(self, prompt: Prompt) -> Completion:
            raise LiberError("gone")

    prompts = Prompts(dataset, samples, count, seed=1)
    with pytest.raises(LiberError, match="gone"):
        await ask([prompts.summary(plan(VARIANTS["liber"], samples), 0)], Failing(), count, 2)


def test_the_shape_is_llama_2s() -> None:
    published, norms = 13_015_864_320, 81 * 5120
    assert LLAMA2_13B.weight_bytes == 2 * (published - norms)
    assert LLAMA2_13B.cached_bytes == 819_200
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=TINY.vocabulary,
                hidden_size=TINY.hidden,
                intermediate_size=TINY.intermediate,
                num_hidden_layers=TINY.layers,
                num_attention_heads=TINY.heads,
                num_key_value_heads=TINY.key_value_heads,
            )
        )
    assert TINY.weight_bytes == 2 * (sum(each.numel() for each in model.parameters()) - 5 * TINY.hidden)


def test_the_least_time_is_that_of_products_and_of_what_is_moved() -> None:
    speed = Speed(1e9, 1e12)
    lengths = np.array([10, 30])
    steps = [speed.bytes_per_second**-1 * (2 * TINY.multiplied + TINY.cached_bytes * (40 + 2 * s)) for s in range(5)]
    expected = 2 * TINY.multiplied * 40 / 1e12 + sum(steps)
    assert least_seconds(lengths, 5, TINY, speed) == pytest.approx(expected)
    assert TINY.cached_bytes == 2 * 2 * 2 * 16  # keys and values of 2 layers, 2 heads of 8 numbers of 2 bytes


@settings(max_examples=30)
@given(st.integers(1, 3000), st.integers(1, 512), st.integers(1, 100))
def test_the_least_time_grows_with_all_there_is_to_do(length: int, response: int, more: int) -> None:
    def seconds(length: int, response: int) -> float:
        return least_seconds(np.array([length]), response, LLAMA2_13B, H200)

    assert seconds(length + more, response) > seconds(length, response)
    assert seconds(length, response + more) > seconds(length, response)
    calls = np.array([length])
    batch = largest_batch(calls, response, LLAMA2_13B, H200)
    held = LLAMA2_13B.weight_bytes + batch * LLAMA2_13B.cached_bytes * (length + response)
    assert held <= H200.memory_bytes < held + LLAMA2_13B.cached_bytes * (length + response)
    assert least_seconds_per_call(calls, response) < seconds(length, response) or batch == 1


def test_a_gpu_without_room_for_the_weights_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"small has 16 GB; the weights alone take 26 GB"):
        largest_batch(np.array([500]), 400, LLAMA2_13B, Speed(1e12, 1e14, "small", 16e9))


def test_generation_is_measured_on_a_tiny_shape(costs: Costs) -> None:
    """The same call as on a GPU; device and shape are arguments."""
    wide = replace(TINY, positions=4096)
    rows, made = measure_device(
        costs, 3, device="cpu", seed=1, batch_sizes=(1, 2), shape=wide, copied_bytes=2**16, gemm=32
    )
    assert [row["variant"] for row in rows] == ["liber", "no_shift", "length20", "length100"]
    assert [(row["variant"], row["batch_size"]) for row in made["rows"][:3]] == [
        ("liber", 1),
        ("liber", 2),
        ("no_shift", 1),
    ]
    for row in made["rows"]:
        assert row["response_tokens"] == 3 * row["batch_size"]
        assert row["prompt_tokens"] <= row["padded_tokens"]
        assert row["reading_seconds"] > 0
        assert row["seconds_per_call"] == pytest.approx(row["seconds"] / row["batch_size"], rel=0.05)
    for row in rows:
        best = fastest(made["rows"], row["variant"])
        assert best is not None
        assert (row["engine"], row["device"]) == ("torch-transformers", "cpu")
        assert row["seconds_per_user"] == pytest.approx(best["seconds_per_call"] * row["calls_per_user"], rel=0.01)
    assert made["speed"]["copy_bytes_per_second"] > 0
    assert fastest(made["rows"], "other") is None


def test_generation_says_what_it_cannot_do() -> None:
    lengths = {"liber": np.array([250])}
    with pytest.raises(ConfigurationError, match=r"take 306 tokens and the LLM has 256; ask for shorter answers"):
        measure_generation(lengths, 40, device="cpu", shape=TINY)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="--device cuda: torch sees no CUDA device"):
            measure_generation(lengths, 1, shape=TINY)


def test_figures_that_were_to_be_reached() -> None:
    def row(engine: str, seconds: float | None, variant: str = "liber", calls: float = 8.9649) -> dict[str, object]:
        return {"variant": variant, "engine": engine, "seconds_per_user": seconds, "calls_per_user": calls}

    rows = [
        row("statistical", 0.01),
        row("torch-transformers", 12.0),
        row("openai:llama", 2.4),
        row("length", None, "length20", 89.0669),
    ]
    found = {each["figure"]: each["met"] for each in compare_with_targets(rows, "ml-100k")}
    assert found == {
        "LIBER: calls per user": True,
        "length=20: calls per user": True,
        "LIBER, PyTorch alone: times the paper's rate": False,
        "LIBER, openai:llama: seconds per user, GPU-seconds if one GPU serves it": True,
    }
    assert not any("calls" in each["figure"] for each in compare_with_targets(rows, "other"))
    (missed,) = (each for each in compare_with_targets([row("a", None, calls=8.98)], "ml-100k"))
    assert not missed["met"]


def test_arguments_that_cannot_be_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match="--response-tokens 0 is not positive"):
        parse_arguments(["--tokenizer", "t", "--response-tokens", "0"])
    with pytest.raises(ConfigurationError, match="--batch-sizes are those of --device cuda; give both or neither"):
        parse_arguments(["--tokenizer", "t", "--batch-sizes", "1"])
    for sizes in ("", "1,x", "0,2"):
        with pytest.raises(ConfigurationError, match=r"is no list of sizes; give e\.g\. 1,16,64"):
            parse_sizes(sizes)
    assert parse_sizes("16,1") == [1, 16]
    with pytest.raises(SystemExit):
        parse_arguments([])
    assert "--tokenizer" in capsys.readouterr().err


def test_the_command_writes_rows_and_tables(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"u{number % 3},i{number % 7},{1 + number % 5},{1000 + number}" for number in range(150)]
    (tmp_path / "behaviors.csv").write_text("\n".join(["user_id,item_id,feedback,timestamp", *rows]) + "\n")
    words = ["--data", str(tmp_path / "behaviors.csv"), "--tokenizer", str(pieces)]
    words += ["--response-tokens", "30", "--sample", "6"]
    words += ["--json", str(tmp_path / "a" / "cost.json"), "--markdown", str(tmp_path / "b" / "cost.md")]
    monkeypatch.setattr(sys, "argv", ["llm_cost", *words])
    assert main() == 0
    figures = json.loads((tmp_path / "a" / "cost.json").read_text())
    assert json.loads(capsys.readouterr().out) == figures
    wanted = {"variant", "calls_per_user", "prompt_tokens_per_call", "response_tokens_per_call", "seconds_per_user"}
    assert all(wanted | {"engine", "device"} <= set(row) for row in figures["rows"])
    assert [row["engine"] for row in figures["rows"]] == ["statistical"] * 4 + [NOT_MEASURED] * 4
    assert [row["calls_per_user"] for row in figures["rows"]] == [3.0, 2.0, 30.0, 30.0] * 2
    assert figures["tokenizer"] == describe_tokenizer(pieces)
    assert {"machine", "versions", "seed", "computed", "paper"} <= set(figures)
    text = (tmp_path / "b" / "cost.md").read_text()
    assert text == write_markdown(figures)
    assert "Not measured: this run had no GPU" in text


def test_a_tokenizer_there_is_not_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llm_cost", "--tokenizer", str(tmp_path / "none")])
    with pytest.raises(ConfigurationError, match=r"no tokenizer at .*none; give tokenizer\.json or"):
        main()


@pytest.mark.skipif(not LIBER_LLAMA_TOKENIZER, reason="LIBER_LLAMA_TOKENIZER does not name Llama 2's tokenizer")
def test_llama_2s_own_tokenizer_counts_by_lines(dataset: Dataset, samples: Samples) -> None:
    llama = counted_by(Path(LIBER_LLAMA_TOKENIZER))
    assert llama("Hello, world!\n") == 5
    prompts = Prompts(dataset, samples, llama, seed=1)
    for name in ("liber", "length100"):
        assert prompts.count_summaries(plan(VARIANTS[name], samples, refresh=1), sample=1).is_complete
    assert llama(stand_in(llama, 450)) == 450


@pytest.mark.skipif(not LIBER_DATA, reason="LIBER_DATA does not name a MovieLens-100K directory")
def test_movielens_100k_costs_what_table_6_says() -> None:
    """Calls with any tokenizer; tokens with Llama 2's."""
    llama = counted_by(Path(LIBER_LLAMA_TOKENIZER)) if LIBER_LLAMA_TOKENIZER else None
    costs = Costs(load(LIBER_DATA), llama or (lambda text: len(text.split())), 20, 450, seed=1)
    rows = [costs.stated(work, None, NOT_MEASURED, None) for work in costs.works]
    found = compare_with_targets(rows, "ml-100k")
    assert [each["target"] for each in found] == ["8.96", "4.98", "89.06", "89.06"]
    assert all(each["met"] for each in found)
    if llama is not None:
        assert all(each["complete"] and each["over_limit"] == 0 for each in costs.describe_prompts(Budget()))
        paper = [LLM_COST[NAMES[row["variant"]]].tokens_per_prompt for row in rows]
        np.testing.assert_allclose([row["prompt_tokens_per_call"] + 450 for row in rows], paper, rtol=0.04)
