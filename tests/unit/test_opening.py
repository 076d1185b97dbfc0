"""From settings to a writer, without a call."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from liber_runtime.exceptions import ConfigurationError
from liber_runtime.settings import load_writer_settings
from liber_runtime.writers.llm import LLMWriter
from liber_runtime.writers.opening import open_writer, price_of
from liber_runtime.writers.pricing import Price
from liber_runtime.writers.prompting import CHAT_TOKENS, SPECIAL_TOKENS
from liber_runtime.writers.statistical import StatisticalWriter
from liber_runtime.writers.triton import TritonModel

URL = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LIBER_")]:
        monkeypatch.delenv(name)


def opened(**options: object) -> LLMWriter:
    writer = open_writer(load_writer_settings(**options))
    assert isinstance(writer, LLMWriter)
    return writer


def test_without_settings_it_is_the_statistical_writer() -> None:
    assert isinstance(open_writer(load_writer_settings()), StatisticalWriter)


@pytest.mark.parametrize(("api", "reserved"), [("chat", CHAT_TOKENS), ("completions", SPECIAL_TOKENS)])
def test_an_endpoints_template_has_its_room_in_the_budget(api: str, reserved: int) -> None:
    writer = opened(writer="openai", url=URL, model="llama", api=api, context_tokens=2048, response_tokens=300)
    assert writer.name == "openai:llama"
    assert writer.prompting.budget.prompt_tokens == 2048 - 300 - reserved
    assert writer.warms_up


def test_settings_reach_the_writer(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("[INST] {{ messages[0]['content'] }} [/INST]")
    writer = opened(
        writer="triton",
        url="127.0.0.1:8001",
        chat_template=template,
        patience_seconds=7.0,
        tokens_per_minute=9000,
        profile=False,
    )
    assert isinstance(writer.model, TritonModel)
    assert writer.prompting.template is not None
    assert writer.prompting.template.render("hello") == "[INST] hello [/INST]"
    assert (writer.patience.seconds, writer.tokens_per_minute, writer.prompting.profile) == (7.0, 9000, False)


def test_a_checkpoint_is_prompted_as_its_tokenizer_counts(tiny_llama: Path) -> None:
    writer = opened(writer="transformers", model=str(tiny_llama), device="cpu", context_tokens=1024, batch_size=1)
    assert writer.name == f"transformers:{tiny_llama.name}"
    assert writer.prompting.count("a b c") > 1
    assert not writer.warms_up  # static batches use nothing of an earlier call again


def test_a_price_is_known_if_it_was_said() -> None:
    assert price_of(load_writer_settings()) is None
    said = load_writer_settings(prompt_price=0.5, response_price=2.0, currency="EUR")
    assert price_of(said) == Price(0.5, 2.0, "EUR")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"writer": "openai", "url": URL}, "needs LIBER_WRITER_MODEL: what the endpoint calls the LLM"),
        ({"writer": "triton"}, "needs LIBER_WRITER_URL: host:port"),
        ({"writer": "transformers"}, "needs LIBER_WRITER_MODEL: the checkpoint's directory"),
        ({"writer": "openai", "url": URL, "model": "m", "response_tokens": 4000}, "leaves 32 for a prompt"),
        ({"writer": "openai", "url": URL, "model": "m", "tokenizer": "nowhere"}, "no tokenizer at nowhere"),
        ({"writer": "openai", "url": URL, "model": "m", "tokens_per_minute": 10}, "10 tokens per minute are too few"),
    ],
)
def test_what_cannot_work_is_refused_before_any_call(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        open_writer(load_writer_settings(**options))


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "liber_runtime.writers.openai", raising=False)
    with pytest.raises(ConfigurationError, match=r"needs openai, which is not installed: .*liber-runtime\[llm\]"):
        open_writer(load_writer_settings(writer="openai", url=URL, model="m"))
