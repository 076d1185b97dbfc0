"""Settings of every process, from ``LIBER_*`` environment variables; command-line options override them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import pydantic

from liber_runtime.credentials import check_control_key, read_secret
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.processors import available_processors


class _FromEnvironment(pydantic.BaseModel):
    """Fields that come from variables of the environment; an empty one counts as unset, and what is given stands.

    Not by pydantic-settings: every process of a server reads settings, and it takes each as long to import as numpy.
    """

    prefix: ClassVar[str] = "LIBER_"

    def __init__(self, **given: Any) -> None:
        found = {name: os.environ.get(self.variable(name)) for name in type(self).model_fields}
        super().__init__(**{name: value for name, value in found.items() if value} | given)

    @classmethod
    def variable(cls, field: str) -> str:
        """The variable that holds a field."""
        return cls.prefix + field.upper()


class Settings(_FromEnvironment):
    """One place for what differs between a laptop, CI and production.

    Attributes:
        store: URL of the memory store.
        triton: host:port of Triton's gRPC endpoint.
        max_users: most distinct users of one scoring request, U.
        max_candidates: most candidates of one scoring request, N.
        kernels: compiled kernels for a model's heavy parts: auto (the fastest this processor runs, if they are there),
            none (ONNX Runtime alone), or an instruction set by name, see `liber_runtime.native.compile.TARGETS`.
        threads: threads of one ONNX Runtime session; 0 for one per processor that the process may use.
        deadline_seconds: how long a scoring client waits for an answer.
        tls_ca: certificates of the authorities that vouch for Triton, PEM; without it gRPC goes in plain text.
        tls_certificate: our own certificate, PEM, where Triton asks its callers for one.
        tls_key: the private key of that, PEM.
        control_key: what Triton's model control asks for; see `read_control_key`.
        control_key_file: a file that holds it.
    """

    store: str = "sqlite:///runs/memory.db"
    triton: str = "127.0.0.1:8001"
    max_users: int = pydantic.Field(default=4096, ge=1)
    max_candidates: int = pydantic.Field(default=16384, ge=1)
    kernels: str = "auto"
    threads: int = pydantic.Field(default=0, ge=0)
    deadline_seconds: float = pydantic.Field(default=10.0, gt=0)
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    control_key: pydantic.SecretStr = pydantic.SecretStr("")
    control_key_file: Path | None = None

    @property
    def session_threads(self) -> int:
        """Threads of one ONNX Runtime session."""
        return self.threads or available_processors()

    @property
    def without_tls(self) -> Settings:
        """These settings for a server that this process started for itself, on this machine, in plain text."""
        return self.model_copy(update={"tls_ca": None, "tls_certificate": None, "tls_key": None})

    def read_control_key(self) -> str:
        """The key of Triton's model control, empty where there is none.

        Raises:
            ConfigurationError: it cannot be read, or is none that Triton can take.
        """
        key = read_secret("LIBER_CONTROL_KEY", self.control_key.get_secret_value(), self.control_key_file)
        return check_control_key(key) if key else ""


class WriterSettings(_FromEnvironment):
    """Which writer, and how it is called; ``docs/llm.md`` explains the choice.

    Attributes:
        writer: statistical, openai, triton or transformers; the variable is ``LIBER_WRITER``.
        url: of the endpoint (openai, e.g. http://127.0.0.1:8000/v1) or host:port of Triton's gRPC (triton).
        model: what the endpoint or Triton calls it (triton: empty for its layout's usual name), or the checkpoint's
            directory or hub name (transformers).
        api: openai: chat, or completions for base models.
        api_key: openai: a secret; nothing shows it.
        api_key_file: a file that holds it instead.
        layout: triton: inflight_batcher_llm or llmapi; auto asks the server.
        tls: triton: whether its Triton is reached over TLS too, where ``LIBER_TLS_CA`` is set.
        tokenizer: the LLM's tokenizer.json or tokenizer.model, to count with; without it an estimate is used.
        chat_template: a Jinja file, for endpoints that take bare text and chat models.
        context_tokens: most tokens of prompt and answer.
        response_tokens: most tokens of an answer.
        temperature: 0 for the most likely text.
        seed: for temperatures above 0.
        timeout_seconds: until a call is given up.
        patience_seconds: how long a busy endpoint is asked again.
        tokens_per_minute: most tokens of calls begun in a minute, by this process; None for no limit.
        prompt_price: of a million tokens read.
        response_price: of a million tokens written.
        currency: of the prices.
        profile: whether users' profiles are told to the LLM.
        chat: transformers: whether prompts go through the checkpoint's chat template: auto (if there is one), always,
            never.
        device: transformers: auto, cpu or cuda.
        dtype: transformers: auto, float32, bfloat16 or float16.
        batching: transformers: static or continuous.
        batch_size: transformers: most calls in a batch.
        trust_remote_code: transformers: whether code that comes with the checkpoint may run here.
    """

    prefix: ClassVar[str] = "LIBER_WRITER_"

    writer: Literal["statistical", "openai", "triton", "transformers"] = "statistical"
    url: str = ""
    model: str = ""
    api: Literal["chat", "completions"] = "chat"
    api_key: pydantic.SecretStr = pydantic.SecretStr("")
    api_key_file: Path | None = None
    layout: Literal["auto", "inflight_batcher_llm", "llmapi"] = "auto"
    tls: bool = True
    tokenizer: Path | None = None
    chat_template: Path | None = None
    context_tokens: int = pydantic.Field(default=4096, ge=1)
    response_tokens: int = pydantic.Field(default=512, ge=1)
    temperature: float = pydantic.Field(default=0.0, ge=0.0, le=2.0)
    seed: int | None = pydantic.Field(default=None, ge=0)
    timeout_seconds: float = pydantic.Field(default=120.0, gt=0)
    patience_seconds: float = pydantic.Field(default=60.0, ge=0)
    tokens_per_minute: int | None = pydantic.Field(default=None, ge=1)
    prompt_price: float = pydantic.Field(default=0.0, ge=0)
    response_price: float = pydantic.Field(default=0.0, ge=0)
    currency: str = pydantic.Field(default="USD", pattern="^[A-Z]{3}$")
    profile: bool = True
    chat: Literal["auto", "always", "never"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batching: Literal["static", "continuous"] = "static"
    batch_size: int = pydantic.Field(default=8, ge=1)
    trust_remote_code: bool = False

    @classmethod
    def variable(cls, field: str) -> str:
        """See `_FromEnvironment.variable`."""
        return "LIBER_WRITER" if field == "writer" else super().variable(field)


S = TypeVar("S", bound=_FromEnvironment)


def load_settings() -> Settings:
    """Reads the environment.

    Raises:
        ConfigurationError: a variable has an unusable value.
    """
    return _load(Settings, {})


def load_writer_settings(**options: Any) -> WriterSettings:
    """Reads the environment; options that are not None override it.

    Raises:
        ConfigurationError: a variable or an option has an unusable value.
    """
    return _load(WriterSettings, {name: value for name, value in options.items() if value is not None})


def _load(kind: type[S], options: dict[str, Any]) -> S:
    try:
        return kind(**options)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        variable = kind.variable(str(problem["loc"][0]))
        raise ConfigurationError(
            f"{variable}={problem['input']!r} is not usable ({problem['msg']}); correct or unset it"
        ) from None
