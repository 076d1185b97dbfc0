"""From settings to a writer."""

from __future__ import annotations

from liber_runtime.credentials import read_secret
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.settings import WriterSettings, load_settings
from liber_runtime.writers import Writer
from liber_runtime.writers.llm import LanguageModel, LLMWriter, Patience
from liber_runtime.writers.pricing import Price
from liber_runtime.writers.prompting import CHAT_TOKENS, SPECIAL_TOKENS, Budget, ChatTemplate, Prompting
from liber_runtime.writers.statistical import StatisticalWriter
from liber_runtime.writers.tokens import counted_by, estimated


def open_writer(settings: WriterSettings) -> Writer:
    """The writer of the settings; an `LLMWriter` unless it is the statistical one. Calls nobody.

    Raises:
        ConfigurationError: settings that do not fit together, or a package that is missing.
    """
    if settings.writer == "statistical":
        return StatisticalWriter()
    try:
        model, prompting, warms_up = _open_model(settings)
    except ModuleNotFoundError as error:
        extra = "local" if settings.writer == "transformers" else "llm"
        raise ConfigurationError(
            f"the writer {settings.writer} needs {error.name}, which is not installed: "
            f"pip install 'liber-runtime[{extra}]'"
        ) from None
    return LLMWriter(
        model,
        prompting,
        Patience(settings.patience_seconds),
        settings.tokens_per_minute,
        warms_up=warms_up,
    )


def price_of(settings: WriterSettings) -> Price | None:
    """What the writer's tokens cost; None if nobody said."""
    if not settings.prompt_price and not settings.response_price:
        return None
    return Price(settings.prompt_price, settings.response_price, settings.currency)


def _open_model(settings: WriterSettings) -> tuple[LanguageModel, Prompting, bool]:
    """The model, how it is prompted, and whether it uses again what an earlier call has computed."""
    if settings.writer == "openai":
        from liber_runtime.writers.openai import OpenAIModel

        _require(settings, "url", "the endpoint, e.g. http://127.0.0.1:8000/v1")
        _require(settings, "model", "what the endpoint calls the LLM")
        key = read_secret("LIBER_WRITER_API_KEY", settings.api_key.get_secret_value(), settings.api_key_file)
        model: LanguageModel = OpenAIModel(
            settings.url,
            settings.model,
            api=settings.api,
            key=key,
            temperature=settings.temperature,
            seed=settings.seed,
            seconds=settings.timeout_seconds,
        )
        return model, _prompting(settings, CHAT_TOKENS if settings.api == "chat" else SPECIAL_TOKENS), True
    if settings.writer == "triton":
        from liber_runtime.writers.triton import TritonModel

        _require(settings, "url", "host:port of the gRPC endpoint of the LLM's Triton")
        prompting = _prompting(settings)
        connection = load_settings()
        model = TritonModel(
            settings.url,
            settings.model,
            seconds=settings.timeout_seconds,
            temperature=settings.temperature,
            seed=settings.seed,
            layout=settings.layout,
            count=prompting.count if settings.tokenizer is not None else None,
            settings=connection if settings.tls else connection.without_tls,
        )
        return model, prompting, True
    from liber_runtime.writers.transformers import LocalModel
    from liber_runtime.writers.transformers.checkpoint import Checkpoint

    _require(settings, "model", "the checkpoint's directory, or its name on the Hugging Face Hub")
    checkpoint = Checkpoint(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    local = LocalModel(
        checkpoint,
        batching=settings.batching,
        batch_size=settings.batch_size,
        context_tokens=settings.context_tokens,
        temperature=settings.temperature,
        seed=settings.seed or 0,
        chat=settings.chat,
    )
    return local, local.prompting(settings.response_tokens, settings.profile), local.reuses_prefixes


def _prompting(settings: WriterSettings, reserved_tokens: int = SPECIAL_TOKENS) -> Prompting:
    return Prompting(
        Budget(settings.context_tokens, settings.response_tokens, reserved_tokens),
        counted_by(settings.tokenizer) if settings.tokenizer is not None else estimated,
        ChatTemplate.read(settings.chat_template) if settings.chat_template is not None else None,
        settings.profile,
    )


def _require(settings: WriterSettings, name: str, meaning: str) -> None:
    if not getattr(settings, name):
        raise ConfigurationError(f"the writer {settings.writer} needs LIBER_WRITER_{name.upper()}: {meaning}")
