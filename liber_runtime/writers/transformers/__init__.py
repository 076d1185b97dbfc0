"""A checkpoint in this process as a language model: static or continuous batching, on CUDA or on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from liber_runtime.exceptions import ConfigurationError, PromptRefusedError
from liber_runtime.processors import available_processors
from liber_runtime.writers.llm import Generation
from liber_runtime.writers.prompting import Budget, Prompting, Template
from liber_runtime.writers.transformers.batching import Batches, BatchTooLargeError, Call, Tokens
from liber_runtime.writers.transformers.checkpoint import Checkpoint, encode, import_transformers
from liber_runtime.writers.transformers.continuous import TOKENS_AT_ONCE, ContinuousBatches

Batching = Literal["static", "continuous"]
Chat = Literal["auto", "always", "never"]

BUDGET = Budget()
"""What calls may hold unless it is said otherwise."""

_PROBE = "What does this person like?"


class LocalModel:
    """A `LanguageModel` over a Hugging Face checkpoint. It blocks no event loop, and belongs to one until it is closed.

    The weights are loaded by `check` or by the first call. Static batches hold calls of like length from their first
    token to the last of the longest answer. Continuous batching is transformers' own: a call takes the place of one
    that has ended, and prompts share what they begin with; on CUDA it needs flash-attn to be the faster of the two.

    Args:
        checkpoint: what is loaded.
        batching: ``static`` or ``continuous``.
        batch_size: most calls generated at once.
        context_tokens: most tokens of prompt and answer.
        temperature: 0 for the likeliest token each time.
        seed: of what is drawn where the temperature is not 0, by torch's own generator.
        stop: tokens, as text, that end an answer beside those that the checkpoint names.
        chat: whether prompts go through the checkpoint's chat template: ``auto`` if it has one, ``always``, ``never``.

    Raises:
        ConfigurationError: it cannot be used so: too little memory, a context it was not made for, no chat template.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        batching: Batching = "static",
        batch_size: int = 8,
        context_tokens: int = BUDGET.context_tokens,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        chat: Chat = "auto",
    ) -> None:
        for name, given, known in (
            ("batching", batching, ("static", "continuous")),
            ("chat", chat, ("auto", "always", "never")),
        ):
            if given not in known:
                raise ConfigurationError(f"{name} {given!r} is unknown; give {', '.join(known)}")
        if batch_size < 1 or not 0 <= temperature < float("inf"):
            raise ConfigurationError(
                f"batch size {batch_size} must be at least 1, temperature {temperature} at least 0"
            )
        if checkpoint.longest is not None and context_tokens > checkpoint.longest:
            raise ConfigurationError(
                f"{checkpoint.name} was made for {checkpoint.longest} tokens, and the context is {context_tokens}; "
                f"lower LIBER_WRITER_CONTEXT_TOKENS to {checkpoint.longest}"
            )
        checkpoint.require_memory(batch_size, context_tokens, TOKENS_AT_ONCE if batching == "continuous" else None)
        self._checkpoint = checkpoint
        self._tokenizer = checkpoint.tokenizer
        self._context_tokens = context_tokens
        self._sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        self._seed = seed
        self.template = find_template(self._tokenizer, chat)
        self._stop = [find_token(self._tokenizer, text) for text in stop]
        self._ends: set[int] = set()
        self._model: Any = None
        self._batches = Batches(self._run, batch_size)
        self._continuous: ContinuousBatches | None = None
        if batching == "continuous":
            self._continuous = ContinuousBatches(batch_size, context_tokens, seed)

    @property
    def name(self) -> str:
        """See `LanguageModel.name`."""
        return f"transformers:{self._checkpoint.name}"

    @property
    def reuses_prefixes(self) -> bool:
        """Whether a warm-up call of a prompt's fixed text makes later calls faster."""
        return self._continuous is not None

    def count(self, text: str) -> int:
        """Tokens of a text that `template` has rendered, or of bare text: exactly those that are read."""
        return len(self._encode(text))

    def prompting(self, response_tokens: int = BUDGET.response_tokens, profile: bool = True) -> Prompting:
        """How prompts are put to it: within its context, counted by its tokenizer, in its chat template.

        Args:
            response_tokens: most tokens of an answer.
            profile: whether users' profiles are told.
        """
        return Prompting(Budget(self._context_tokens, response_tokens), self.count, self.template, profile)

    async def generate(self, text: str, response_tokens: int) -> Generation:
        """See `LanguageModel.generate`; the tokens are counted exactly, one that ends the answer included."""
        tokens = self._encode(text)
        if len(tokens) + response_tokens > self._context_tokens:
            raise PromptRefusedError(
                f"a prompt of {len(tokens)} tokens and an answer of {response_tokens} are more than the context of "
                f"{self._context_tokens}; raise LIBER_WRITER_CONTEXT_TOKENS"
            )
        await self.check()
        batches = self._continuous or self._batches
        written = await batches.put(tokens, response_tokens)
        has_end = bool(written) and written[-1] in self._ends
        said = self._tokenizer.decode(written[:-1] if has_end else written, skip_special_tokens=True)
        return Generation(said, not has_end and len(written) >= response_tokens, len(tokens), len(written))

    async def check(self) -> None:
        """Loads the weights, unless they are there.

        Raises:
            ConfigurationError: they cannot be loaded.
        """
        if self._model is None:
            await self._batches.in_thread(self._load)

    async def close(self) -> None:
        """See `LanguageModel.close`; the weights stay where they are, for they took long to load."""
        if self._continuous is not None:
            await self._continuous.close()
        await self._batches.close()

    def _encode(self, text: str) -> Tokens:
        # A chat template writes the tokens that begin a text itself.
        return encode(self._tokenizer, text, special=not isinstance(self.template, _Template))

    def _load(self) -> None:
        if self._model is not None:
            return
        import torch

        torch.set_num_threads(min(torch.get_num_threads(), available_processors()))
        model = self._checkpoint.load()
        theirs = model.generation_config
        named = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
        self._ends = {end for end in (*named, self._tokenizer.eos_token_id, *self._stop) if end is not None}
        padding = next(token for token in (self._tokenizer.pad_token_id, *self._ends, 0) if token is not None)
        # Not what the checkpoint's authors sample with: what is asked for here is all that counts.
        model.generation_config = import_transformers().GenerationConfig(
            eos_token_id=sorted(self._ends) or None, pad_token_id=padding, use_cache=True, **self._sampling
        )
        torch.manual_seed(self._seed)
        if self._continuous is not None:
            self._continuous.start(model)
        self._model = model

    def _run(self, calls: Sequence[Call]) -> list[Tokens]:
        """Continues a batch, in the thread."""
        import torch

        longest = max(len(call.tokens) for call in calls)
        padding = self._model.generation_config.pad_token_id
        ids = [[padding] * (longest - len(call.tokens)) + call.tokens for call in calls]
        mask = [[0] * (longest - len(call.tokens)) + [1] * len(call.tokens) for call in calls]

        def ended(ids: Any, scores: Any) -> Any:
            written = ids.shape[1] - longest
            return torch.tensor(
                [call.abandoned or written >= call.response_tokens for call in calls], device=ids.device
            )

        place = self._checkpoint.device
        try:
            with torch.inference_mode():
                rows = self._model.generate(
                    input_ids=torch.tensor(ids, device=place),
                    attention_mask=torch.tensor(mask, device=place),
                    max_new_tokens=max(call.response_tokens for call in calls),
                    stopping_criteria=[ended],
                )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise BatchTooLargeError(
                f"{self._checkpoint.name} ran out of memory on {place} with {len(calls)} prompts of up to {longest} "
                "tokens; lower the context (LIBER_WRITER_CONTEXT_TOKENS) or take a smaller checkpoint"
            ) from None
        return [self._cut(row[longest:].tolist(), call) for row, call in zip(rows, calls, strict=True)]

    def _cut(self, written: Tokens, call: Call) -> Tokens:
        """Without what fills a row up after its own end."""
        written = written[: call.response_tokens]
        end = next((place for place, token in enumerate(written) if token in self._ends), len(written))
        return written[: end + 1]


class _Template:
    """The chat template in a tokenizer's files."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def render(self, text: str) -> str:
        """See `Template.render`."""
        messages = [{"role": "user", "content": text}]
        try:
            rendered: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Jinja's, or the template's own
            said = (str(error).strip().splitlines() or [""])[0]
            raise ConfigurationError(
                f"the checkpoint's chat template is not usable: {said:.300}; do without it (LIBER_WRITER_CHAT=never)"
            ) from None
        return rendered


class _PromptBuilder:
    """The message format in a tokenizer's code: ChatGLM's ``build_prompt``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def render(self, text: str) -> str:
        """See `Template.render`."""
        built: str = self._tokenizer.build_prompt(text)
        return built


def find_template(tokenizer: Any, chat: Chat) -> Template | None:
    """The chat template of a tokenizer, if it is wanted.

    Raises:
        ConfigurationError: it must have one and has none, or has one that does not show the message.
    """
    if chat == "never":
        return None
    template: Template | None = None
    if getattr(tokenizer, "chat_template", None):
        template = _Template(tokenizer)
    elif hasattr(tokenizer, "build_prompt"):
        template = _PromptBuilder(tokenizer)
    if template is None and chat == "always":
        raise ConfigurationError(
            "the checkpoint's tokenizer has no chat template; give one for chat, or set LIBER_WRITER_CHAT=never"
        )
    if template is not None and _PROBE not in template.render(_PROBE):
        raise ConfigurationError(
            "the checkpoint's chat template does not show the user's message; set LIBER_WRITER_CHAT=never"
        )
    return template


def find_token(tokenizer: Any, text: str) -> int:
    """The one token that a text is.

    Raises:
        ConfigurationError: it is none, or several.
    """
    found = tokenizer.convert_tokens_to_ids(text)
    if isinstance(found, int) and found != tokenizer.unk_token_id:
        return found
    tokens = encode(tokenizer, text, special=False)
    if len(tokens) != 1:
        raise ConfigurationError(
            f"stop {text!r} is {len(tokens)} tokens of this checkpoint and must be one; give e.g. "
            f"{tokenizer.eos_token!r}"
        )
    return tokens[0]
