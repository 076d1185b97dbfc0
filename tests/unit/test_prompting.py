"""Prompts fit the budget, visibly; what shall not leave the machine does not; chat templates go around them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liber_runtime.behavior import Domain, Item
from liber_runtime.exceptions import ConfigurationError, PromptRefusedError
from liber_runtime.interest import ItemPrompt, ShiftPrompt, SummaryPrompt
from liber_runtime.writers.prompting import FEWEST_NOTE_CHARACTERS, Budget, ChatTemplate, Prompting
from liber_runtime.writers.tokens import BYTES_PER_TOKEN, counted_by, estimated

DOMAIN = Domain("films", "movie", "stars", (1, 5), 3, ("genre", "mood"))
LLAMA = (
    "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
    "{% if false %}{{ raise_exception('never') }}{% endif %}"
)


def summary(count: int, characters: int = 30) -> SummaryPrompt:
    history = tuple((Item(f"i{n}", f"film {n:04d} ".ljust(characters, "x")), 4.0) for n in range(count))
    return SummaryPrompt(DOMAIN, {"occupation": "lighthouse keeper"}, history)


def in_words(text: str) -> int:
    return len(text.split())


def test_what_fits_goes_out_as_it_is() -> None:
    prompt = summary(20)
    fitted = Prompting().fit(prompt)
    assert (fitted.text, fitted.note) == (prompt.text, "")
    assert fitted.tokens == estimated(prompt.text)
    assert fitted.text.startswith(fitted.prefix)
    assert fitted.prefix == prompt.prefix == summary(3).prefix


@given(count=st.integers(1, 120), characters=st.integers(12, 80), context=st.integers(700, 4096))
def test_the_oldest_behaviors_are_left_out_and_no_more_than_needed(count: int, characters: int, context: int) -> None:
    prompting = Prompting(Budget(context, 256))
    prompt = summary(count, characters)
    fitted = prompting.fit(prompt)
    most = prompting.budget.prompt_tokens
    kept = fitted.text.count(" stars\n")
    assert fitted.tokens <= most
    assert f'"film {count - 1:04d} ' in fitted.text  # the newest stays
    assert fitted.text == SummaryPrompt(DOMAIN, prompt.profile, prompt.history[count - kept :]).text
    if kept == count:
        assert fitted.note == ""
    else:
        assert fitted.note.startswith(f"the oldest {count - kept} of {count} behaviors were left out")
        one_more = SummaryPrompt(DOMAIN, prompt.profile, prompt.history[count - kept - 1 :])
        assert prompting.count(one_more.text) > most


@given(previous=st.integers(1, 6000), current=st.integers(1, 6000), context=st.integers(1024, 8192))
def test_a_shift_shortens_both_notes_alike_and_says_so(previous: int, current: int, context: int) -> None:
    prompting = Prompting(Budget(context, 256))
    fitted = prompting.fit(ShiftPrompt(DOMAIN, "p" * previous, "c" * current))
    assert fitted.tokens <= prompting.budget.prompt_tokens
    if fitted.note:
        limit = int(fitted.note.split()[4])
        assert FEWEST_NOTE_CHARACTERS <= limit < max(previous, current)
        assert "..." in fitted.text
    else:
        assert "p" * previous in fitted.text
        assert "c" * current in fitted.text


def test_what_does_not_fit_even_so_is_refused_with_its_size() -> None:
    long = Domain("films", "movie", "stars", (1, 5), 3, tuple(f"factor number {n}" for n in range(100)))
    with pytest.raises(PromptRefusedError, match=r"this summary has \d+ tokens even when shortened, and 266 fit"):
        Prompting(Budget(530, 256)).fit(SummaryPrompt(long, {}, ((Item("i", "Alien"), 4.0),)))
    with pytest.raises(PromptRefusedError, match="the prompt for item 'i7' has"):
        Prompting(Budget(530, 256)).fit(ItemPrompt(long, Item("i7", "Alien")))


def test_a_context_without_room_for_prompts_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="context of 600 tokens with answers of 512 leaves 80"):
        Budget(600, 512)


def test_the_profile_stays_here_if_it_is_to() -> None:
    told, kept = Prompting().fit(summary(2)), Prompting(profile=False).fit(summary(2))
    assert "lighthouse keeper" in told.text
    assert "lighthouse" not in kept.text
    assert "The person: nothing is known" in kept.text


def test_a_chat_template_goes_around_the_prompt_and_its_tokens_count() -> None:
    template = ChatTemplate(LLAMA, {"bos_token": "<s>"})
    prompting = Prompting(count=in_words, template=template)
    prompt = summary(2)
    fitted = prompting.fit(prompt)
    assert fitted.text == f"<s>[INST] {prompt.text} [/INST]"
    assert fitted.prefix == f"<s>[INST] {prompt.prefix}"
    assert fitted.tokens == in_words(prompt.text) + 2


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for", "not usable"),
        ("always the same", "does not show"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0]['content'] }}", "not usable"),
    ],
)
def test_an_unusable_chat_template_is_refused(source: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        ChatTemplate(source)


def test_a_chat_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"llama\.jinja cannot be read"):
        ChatTemplate.read(tmp_path / "llama.jinja")


@given(st.text())
def test_the_estimate_is_of_bytes_and_never_below(text: str) -> None:
    assert len(text.encode()) / BYTES_PER_TOKEN <= estimated(text) < len(text.encode()) / BYTES_PER_TOKEN + 1


def test_tokens_are_counted_by_the_llms_own_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert counted_by(tmp_path)("a b c") == counted_by(tmp_path / "tokenizer.json")("a a a") == 3


def test_tokens_are_counted_by_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    words = [" ".join(f"word{(n * k) % 50}" for k in range(9)) for n in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "tokenizer"), vocab_size=30, minloglevel=2
    )
    count = counted_by(tmp_path)
    assert count("") == 0
    assert 1 <= count("word7 word9") <= 11


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_that_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no tokenizer at"):
        counted_by(tmp_path)
    (tmp_path / name).write_text("<html>not found</html>")
    with pytest.raises(ConfigurationError, match=f"{name} is no "):
        counted_by(tmp_path)
