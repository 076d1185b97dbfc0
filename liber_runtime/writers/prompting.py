"""Makes a prompt fit: the token budget, the chat template, what may leave the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from liber_runtime.exceptions import ConfigurationError, PromptRefusedError
from liber_runtime.interest import ItemPrompt, Prompt, ShiftPrompt, SummaryPrompt
from liber_runtime.writers.tokens import TokenCount, estimated

FEWEST_NOTE_CHARACTERS = 200
"""A summary in a shift's prompt is cut down to no less."""

SPECIAL_TOKENS = 8
"""Room for what a server puts around bare text by itself: the beginning of a text, at least."""

CHAT_TOKENS = 64
"""Room for the chat template that a server puts around a prompt by itself."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a call may hold.

    Attributes:
        context_tokens: most tokens of prompt and answer together, as the LLM or its server was built.
        response_tokens: most tokens of an answer; what is left is the prompt's.
        reserved_tokens: for what a server puts around a prompt: `SPECIAL_TOKENS` or `CHAT_TOKENS`.

    Raises:
        ConfigurationError: no prompt would fit.
    """

    context_tokens: int = 4096
    response_tokens: int = 512
    reserved_tokens: int = SPECIAL_TOKENS

    def __post_init__(self) -> None:
        if self.response_tokens < 1 or self.prompt_tokens < 256:
            raise ConfigurationError(
                f"a context of {self.context_tokens} tokens with answers of {self.response_tokens} leaves "
                f"{self.prompt_tokens} for a prompt; it needs 256 at least: allow shorter answers or a longer context"
            )

    @property
    def prompt_tokens(self) -> int:
        """Most tokens of a prompt."""
        return self.context_tokens - self.response_tokens - self.reserved_tokens


class Template(Protocol):
    """A message format: what a chat model was trained to answer."""

    def render(self, text: str) -> str:
        """`text` as the one message of a user, ready to be answered; it is in there as it is."""
        ...


class ChatTemplate:
    """The message format of a chat model: for endpoints that take bare text and models that were trained on messages.

    Args:
        source: a template as ``tokenizer_config.json`` holds it under ``chat_template``, in Jinja
            (https://huggingface.co/docs/transformers/chat_templating).
        tokens: the special tokens it may name, e.g. ``bos_token``. One that the server adds by itself is given as "".

    Raises:
        ConfigurationError: it is no template, or does not show a message.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        self._tokens = {"bos_token": "", "eos_token": "", **(tokens or {})}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigurationError(f"the chat template is not usable: {error}") from None
        if _PROBE not in self.render(_PROBE):
            raise ConfigurationError("the chat template does not show the user's message; give that of the LLM")

    @classmethod
    def read(cls, path: Path) -> ChatTemplate:
        """Reads a Jinja file.

        Raises:
            ConfigurationError: it cannot be read, or see the class.
        """
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"chat template {path} cannot be read: {error}") from None

    def render(self, text: str) -> str:
        """`text` as the one message of a user, ready to be answered."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except TemplateError as error:
            raise ConfigurationError(f"the chat template is not usable: {error}") from None


_PROBE = "What does this person like?"


def _raise(message: str) -> None:
    raise TemplateError(message)


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt as it goes out.

    Attributes:
        text: all of it.
        prefix: what it begins with and shares with all prompts of its kind.
        tokens: of `text`, as they were counted.
        note: what was left out so that it fits; empty if nothing was.
    """

    text: str
    prefix: str
    tokens: int
    note: str = ""


@dataclass(frozen=True)
class Prompting:
    """How prompts are put to one LLM.

    Attributes:
        budget: of tokens.
        count: counts them.
        template: the chat format; None for bare text, and for servers that apply their own.
        profile: whether users' profiles are told; False leaves them on this machine.
    """

    budget: Budget = field(default_factory=Budget)
    count: TokenCount = estimated
    template: Template | None = None
    profile: bool = True

    def fit(self, prompt: Prompt) -> FittedPrompt:
        """The prompt within the budget: of a summary's the oldest behaviors are left out, of a shift's the notes' ends.

        Raises:
            PromptRefusedError: it is too long even so.
        """
        if isinstance(prompt, SummaryPrompt):
            return self._fit_summary(prompt if self.profile else replace(prompt, profile={}))
        if isinstance(prompt, ShiftPrompt):
            return self._fit_shift(prompt)
        return self._fitted(prompt, "")

    def _fit_summary(self, prompt: SummaryPrompt) -> FittedPrompt:
        total = len(prompt.history)

        def without(dropped: int) -> SummaryPrompt:
            return replace(prompt, history=prompt.history[dropped:])

        dropped = _smallest(0, max(total - 1, 0), lambda count: self._fits(without(count)))
        note = f"the oldest {dropped} of {total} behaviors were left out: the prompt was too long" if dropped else ""
        return self._fitted(without(dropped), note)

    def _fit_shift(self, prompt: ShiftPrompt) -> FittedPrompt:
        longest = min(max(len(prompt.previous), len(prompt.current)), prompt.most_characters)

        def without(removed: int) -> ShiftPrompt:
            return replace(prompt, most_characters=longest - removed)

        removed = _smallest(0, max(longest - FEWEST_NOTE_CHARACTERS, 0), lambda count: self._fits(without(count)))
        note = f"summaries were cut at {longest - removed} characters: the prompt was too long" if removed else ""
        return self._fitted(without(removed), note)

    def _fits(self, prompt: Prompt) -> bool:
        return self.count(self._rendered(prompt.text)) <= self.budget.prompt_tokens

    def _rendered(self, text: str) -> str:
        return text if self.template is None else self.template.render(text)

    def _fitted(self, prompt: Prompt, note: str) -> FittedPrompt:
        text = self._rendered(prompt.text)
        tokens = self.count(text)
        if tokens > self.budget.prompt_tokens:
            what = f"item {prompt.item.item_id!r}" if isinstance(prompt, ItemPrompt) else f"this {prompt.kind}"
            raise PromptRefusedError(
                f"the prompt for {what} has {tokens} tokens even when shortened, and {self.budget.prompt_tokens} fit; "
                "raise the context (LIBER_WRITER_CONTEXT_TOKENS) if the LLM has more, or name fewer factors"
            )
        return FittedPrompt(text, text[: text.index(prompt.prefix) + len(prompt.prefix)], tokens, note)


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest number in [low, high] for which a monotone condition holds; `high` if it holds for none."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high
