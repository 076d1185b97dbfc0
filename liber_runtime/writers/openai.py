"""An LLM behind an OpenAI-compatible endpoint: trtllm-serve, vLLM, llama.cpp, transformers serve, a vendor.

The API is https://platform.openai.com/docs/api-reference; the client is OpenAI's own. The client's own retries are
switched off: it would repeat calls that broke off in the middle, and so might have been paid for, without telling.
"""

from __future__ import annotations

import email.utils
import time
from typing import Any, Literal, TypeAlias

import openai

from liber_runtime.exceptions import ConfigurationError, LiberError, PromptRefusedError, WriterAwayError
from liber_runtime.writers.llm import BusyError, Generation

API: TypeAlias = Literal["chat", "completions"]

_NO_KEY = "none"  # Without any the client would take OPENAI_API_KEY, and tell it to an endpoint of somebody else.
_NOT_REACHED = ("ConnectError", "ConnectTimeout", "UnsupportedProtocol")
_REFUSED = ("context length", "context_length", "context size", "too long", "maximum input", "content_filter")
"""What endpoints say of a prompt that they would refuse again. Another 400 may be about our options, and mended."""
_MOST_REASON_CHARACTERS = 300
_CHECK_SECONDS = 30.0


class OpenAIModel:
    """A model of an endpoint, by its completions or its chat completions.

    Args:
        url: the endpoint's base, e.g. ``http://127.0.0.1:8000/v1``.
        model: as the endpoint calls it.
        api: ``chat`` (the endpoint puts the model's own chat template around the prompt) or ``completions`` (bare text,
            for base models).
        key: the endpoint's key; None if it wants none.
        temperature: 0 for the most likely text.
        seed: for endpoints that take one.
        seconds: until a call is given up.

    Raises:
        ConfigurationError: the URL is none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: API = "chat",
        key: str | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        seconds: float = 120.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigurationError(f"{url!r} is no URL of an endpoint; give one like http://127.0.0.1:8000/v1")
        self._url = url
        self._model = model
        self._api = api
        self._seconds = seconds
        self._options: dict[str, Any] = {"temperature": temperature}
        if seed is not None:
            self._options["seed"] = seed
        self._limit = "max_tokens"
        self._key = key or _NO_KEY
        self._opened: openai.AsyncOpenAI | None = None

    @property
    def name(self) -> str:
        """``openai:`` and the model."""
        return f"openai:{self._model}"

    async def generate(self, text: str, response_tokens: int) -> Generation:
        """See `LanguageModel.generate`."""
        try:
            return self._read(await self._post(text, response_tokens))
        except openai.BadRequestError as error:
            # Newer models of OpenAI's own call the limit otherwise, and say so.
            if self._limit == "max_tokens" and "max_completion_tokens" in str(error):
                self._limit = "max_completion_tokens"
                return await self.generate(text, response_tokens)
            raise self._explained(error) from None
        except (openai.OpenAIError, ValueError) as error:
            raise self._explained(error) from None

    async def _post(self, text: str, response_tokens: int) -> Any:
        options: dict[str, Any] = {**self._options, self._limit: response_tokens}
        if self._api == "completions":
            return await self._client.completions.create(model=self._model, prompt=text, **options)
        message: Any = {"role": "user", "content": text}
        return await self._client.chat.completions.create(model=self._model, messages=[message], **options)

    def _read(self, answer: Any) -> Generation:
        if isinstance(answer, str):
            raise LiberError(f"{self._url} answered with a page, not with a completion: {_shortened(answer)!r}")
        try:
            choice = answer.choices[0]
            text = choice.text if self._api == "completions" else choice.message.content
            cut_off = choice.finish_reason == "length"
        except (AttributeError, IndexError, TypeError):
            raise LiberError(f"{self._url} answered with half of a completion: {_shortened(str(answer))!r}") from None
        usage = answer.usage
        return Generation(
            text or "",
            cut_off,
            getattr(usage, "prompt_tokens", None),
            getattr(usage, "completion_tokens", None),
        )

    async def check(self) -> None:
        """See `LanguageModel.check`: the endpoint is there, takes the key and has the model.

        An endpoint that lists other models than this one is asked for one token: some list only part of what they have.
        """
        try:
            listed = await self._client.models.list(timeout=min(self._seconds, _CHECK_SECONDS))
            names = [model.id async for model in listed]
            if names and self._model not in names:
                await self._require_model(names)
        except openai.NotFoundError:
            return  # it lists none
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ConfigurationError(str(self._explained(error))) from None
        except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
            raise WriterAwayError(str(self._explained(error))) from None

    async def _require_model(self, names: list[str]) -> None:
        try:
            await self._post("a", 1)
        except (openai.NotFoundError, openai.BadRequestError) as error:
            raise ConfigurationError(
                f"{self._url} does not answer for the model {self._model!r} ({_reason(error)}); it lists "
                f"{', '.join(sorted(names)[:20])}: correct LIBER_WRITER_MODEL, or LIBER_WRITER_API"
            ) from None

    async def close(self) -> None:
        """See `LanguageModel.close`."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    @property
    def _client(self) -> openai.AsyncOpenAI:
        if self._opened is None:
            self._opened = openai.AsyncOpenAI(
                base_url=self._url, api_key=self._key, timeout=self._seconds, max_retries=0
            )
        return self._opened

    def _explained(self, error: Exception) -> LiberError:
        """What the client raised, as one line, by whether the call may have been paid for."""
        if isinstance(error, openai.APITimeoutError):
            if type(error.__cause__).__name__ in _NOT_REACHED:
                return WriterAwayError(f"nobody answers at {self._url}; is the endpoint up, and the URL right?")
            return LiberError(
                f"{self._url} gave no answer within {self._seconds:g} s; raise LIBER_WRITER_TIMEOUT_SECONDS, or have "
                "fewer calls in flight"
            )
        if isinstance(error, openai.APIStatusError):
            return self._explained_status(error)
        if isinstance(error, openai.APIConnectionError):
            reason = _shortened(str(error.__cause__ or error))
            if type(error.__cause__).__name__ in _NOT_REACHED:
                return WriterAwayError(f"nobody answers at {self._url} ({reason}); is the endpoint up?")
            return LiberError(f"{self._url} broke off in the middle of a call ({reason})")
        return LiberError(f"{self._url} answered with what is no completion: {_shortened(str(error))}")

    def _explained_status(self, error: openai.APIStatusError) -> LiberError:
        status, reason = error.status_code, _reason(error)
        if status in (401, 403):
            return WriterAwayError(
                f"{self._url} does not accept the key ({status}: {reason}); set LIBER_WRITER_API_KEY, or "
                "LIBER_WRITER_API_KEY_FILE"
            )
        if status == 402 or (status == 429 and error.code == "insufficient_quota"):
            return WriterAwayError(f"{self._url} asks for money ({status}: {reason})")
        if status == 404:
            return WriterAwayError(
                f"{self._url} has no model {self._model!r}, or no {self._api} ({reason}); correct LIBER_WRITER_MODEL, "
                "LIBER_WRITER_URL or LIBER_WRITER_API"
            )
        if status in (429, 503):
            return BusyError(f"{self._url} is busy ({status}: {reason})", _retry_seconds(error))
        if status == 413 or (status in (400, 422) and any(sign in reason.lower() for sign in _REFUSED)):
            return PromptRefusedError(f"{self._url} refuses this prompt ({status}: {reason})")
        return LiberError(f"{self._url} failed ({status}: {reason})")


def _reason(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, dict):
        message = body.get("message") or body.get("detail") or body.get("error") or body
        return _shortened(str(message))
    return _shortened(error.response.text)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_REASON_CHARACTERS else f"{text[: _MOST_REASON_CHARACTERS - 3]}..."


def _retry_seconds(error: openai.APIStatusError) -> float | None:
    """The header Retry-After: seconds, or a date."""
    asked = error.response.headers.get("retry-after")
    if not asked:
        return None
    try:
        return max(float(asked), 0.0)
    except ValueError:
        date = email.utils.parsedate_to_datetime(asked) if "," in asked else None
        return max(date.timestamp() - time.time(), 0.0) if date is not None else None
