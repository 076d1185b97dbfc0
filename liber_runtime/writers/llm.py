"""An LLM as a writer: what every LLM has in common, wherever it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import tenacity
from aiolimiter import AsyncLimiter

from liber_runtime.exceptions import ConfigurationError, LiberError, UnusableAnswerError, WriterAwayError
from liber_runtime.interest import Prompt
from liber_runtime.writers import Completion
from liber_runtime.writers.answering import read_answer
from liber_runtime.writers.prompting import FittedPrompt, Prompting

_LONGEST_PAUSE_SECONDS = 30.0


class BusyError(WriterAwayError):
    """An LLM's server takes no call just now (a limit, an overload): nothing was computed or paid; ask again later.

    Attributes:
        retry_seconds: how long it asks to be left alone; None if it does not say.
    """

    def __init__(self, message: str, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@dataclass(frozen=True, slots=True)
class Generation:
    """What an LLM made of a text.

    Attributes:
        text: the continuation alone, without the prompt.
        cut_off: it ended because no more tokens were allowed.
        prompt_tokens: read, None if nobody counted.
        response_tokens: written, None if nobody counted.
    """

    text: str
    cut_off: bool = False
    prompt_tokens: int | None = None
    response_tokens: int | None = None


class LanguageModel(Protocol):
    """An LLM that continues text: an endpoint, a model on Triton, a checkpoint in this process."""

    @property
    def name(self) -> str:
        """What is recorded as the author of texts, e.g. ``openai:llama-2-13b-chat``."""
        ...

    async def generate(self, text: str, response_tokens: int) -> Generation:
        """Continues a text; many calls may be in flight, and any of them may be cancelled.

        Args:
            text: the prompt, complete.
            response_tokens: most tokens of the continuation.

        Raises:
            BusyError: not now.
            WriterAwayError: certainly no call was made: nobody there, no such model, a key that is not accepted.
            PromptRefusedError: the server takes this text never.
            LiberError: it failed, and the call may have been made and paid for.
        """
        ...

    async def check(self) -> None:
        """Finds out whether calls have a chance, without making one that costs.

        Raises:
            ConfigurationError: they have none: an unknown model, a refused key; names what there is instead.
            WriterAwayError: nobody answers at the moment.
        """
        ...

    async def close(self) -> None:
        """Ends what belongs to the running event loop; the next call, in any loop, makes it anew."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How a writer deals with a busy server.

    Attributes:
        seconds: how long a call is tried again; then its step goes back to the queue, with all its attempts.
        first_pause: seconds before the second try where the server names none; doubled each time, and shuffled.
    """

    seconds: float = 60.0
    first_pause: float = 1.0


@dataclass
class LLMWriter:
    """Writes with a language model; in one event loop until it is closed, then in another if need be.

    The first prompt of each kind waits for a warm-up: one call with the template's fixed text alone and one token to
    write, because a server can reuse a prefix only once the call that computed it has ended. All others wait for that.

    Attributes:
        model: writes.
        prompting: how prompts are put to it.
        patience: with a busy server.
        tokens_per_minute: most tokens, read and to be written, of calls begun in any minute; None for no limit.
        warms_up: whether to make the warm-up calls.
        retried: calls that a busy server made wait, so far.
    """

    model: LanguageModel
    prompting: Prompting = field(default_factory=Prompting)
    patience: Patience = Patience()
    tokens_per_minute: int | None = None
    warms_up: bool = True
    retried: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        most = self.prompting.budget.context_tokens
        if self.tokens_per_minute is not None and self.tokens_per_minute < 2 * most:
            raise ConfigurationError(
                f"{self.tokens_per_minute} tokens per minute are too few for calls of up to {most}; allow {2 * most} "
                "at least, or a shorter context"
            )
        self._begin()

    def _begin(self) -> None:
        """Makes what belongs to an event loop."""
        self._warm: dict[str, asyncio.Future[None]] = {}
        self._rate: AsyncLimiter | None = None
        if self.tokens_per_minute is not None:
            # A bucket of n tokens that leaks n a minute lets at most 2 n through in a minute.
            self._rate = AsyncLimiter(self.tokens_per_minute / 2, 60.0)

    @property
    def name(self) -> str:
        """See `Writer.name`."""
        return self.model.name

    async def write(self, prompt: Prompt) -> Completion:
        """See `Writer.write`.

        Raises:
            PromptRefusedError: it does not fit, or the server takes it never.
            UnusableAnswerError: the answer is empty or goes round in a loop.
            WriterAwayError: nobody answered, or the server stayed busy for longer than there is patience.
            LiberError: any other failure, after which the call may have been paid for.
        """
        fitted = self.prompting.fit(prompt)
        await self._warm_up(fitted)
        made = await self._generate(fitted, self.prompting.budget.response_tokens)
        answer = read_answer(made.text, made.cut_off)
        if isinstance(answer, str):
            raise UnusableAnswerError(
                f"writer {self.name!r} answered {answer}", made.prompt_tokens, made.response_tokens
            )
        note = "; ".join(part for part in (fitted.note, answer.note) if part)
        return Completion(answer.text, made.prompt_tokens, made.response_tokens, note)

    async def check(self) -> None:
        """See `LanguageModel.check`."""
        await self.model.check()

    async def close(self) -> None:
        """See `LanguageModel.close`."""
        await self.model.close()
        self._begin()

    async def _warm_up(self, fitted: FittedPrompt) -> None:
        if not self.warms_up:
            return
        warm = self._warm.get(fitted.prefix)
        if warm is not None:
            await asyncio.shield(warm)
            return
        warm = self._warm[fitted.prefix] = asyncio.get_running_loop().create_future()
        try:
            await self._generate(FittedPrompt(fitted.prefix, fitted.prefix, fitted.tokens), 1)
        except WriterAwayError:
            # Nobody was there: the next call tries again, and those that wait find out by themselves.
            del self._warm[fitted.prefix]
            raise
        except LiberError:
            pass  # it was for speed alone
        finally:
            warm.set_result(None)

    async def _generate(self, fitted: FittedPrompt, response_tokens: int) -> Generation:
        async def attempt() -> Generation:
            if self._rate is not None:
                await self._rate.acquire(fitted.tokens + response_tokens)
            return await self.model.generate(fitted.text, response_tokens)

        return await self._retried_while_busy(attempt)

    async def _retried_while_busy(self, attempt: Callable[[], Awaitable[Generation]]) -> Generation:
        def count(state: tenacity.RetryCallState) -> None:
            self.retried += 1

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(BusyError),
            wait=_Pause(self.patience.first_pause),
            stop=tenacity.stop_before_delay(self.patience.seconds),
            before_sleep=count,
            reraise=True,
        )
        return await retrying(attempt)


class _Pause(tenacity.wait.wait_base):
    """What the server asks for, else exponential with jitter."""

    def __init__(self, first: float) -> None:
        self._jittered = tenacity.wait_exponential(first, _LONGEST_PAUSE_SECONDS) + tenacity.wait_random(0.0, first)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome is not None else None
        asked = error.retry_seconds if isinstance(error, BusyError) else None
        return max(asked or 0.0, self._jittered(retry_state))
