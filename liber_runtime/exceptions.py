"""Every error LIBER raises on purpose: one line that names the value and the fix."""


class LiberError(Exception):
    """Base of all errors a user can meet; its text is meant to be read by that user."""


class InvalidInputError(LiberError, ValueError):
    """A value that came from outside is unusable (an id, a line of a log, a request)."""


class ConfigurationError(LiberError):
    """Settings, files or installed packages do not fit together."""


class StoreError(LiberError):
    """The memory store cannot do what was asked; nothing was half-written."""


class IngestError(LiberError):
    """Behaviors cannot be fetched or set aside (a broker, a work directory); what was acknowledged is kept."""


class ServerError(LiberError):
    """The Triton server did not start, or did not do what was asked of it."""


class WriterAwayError(LiberError):
    """A writer was certainly not called, e.g. because the connection was refused: nothing was paid for."""


class PromptRefusedError(LiberError):
    """A prompt is refused, and would be refused again: it is too long, or not allowed. Nothing was paid for."""


class UnusableAnswerError(LiberError):
    """A writer answered with what is no knowledge (nothing, a loop); the call was paid for.

    Attributes:
        prompt_tokens: tokens it read, None where none are counted.
        response_tokens: tokens it wrote, likewise.
    """

    def __init__(self, message: str, prompt_tokens: int | None = None, response_tokens: int | None = None) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.response_tokens = response_tokens


class ScoringError(LiberError):
    """A scoring or encoding call failed; `status` holds the gRPC status name (e.g. ``INVALID_ARGUMENT``)."""

    def __init__(self, message: str, status: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.status = status
