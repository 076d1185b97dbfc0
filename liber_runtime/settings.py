"""Settings of every process, from ``LIBER_*`` environment variables; command-line options override them."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import pydantic

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
    """

    store: str = "sqlite:///runs/memory.db"
    triton: str = "127.0.0.1:8001"
    max_users: int = pydantic.Field(default=4096, ge=1)
    max_candidates: int = pydantic.Field(default=16384, ge=1)
    kernels: str = "auto"
    threads: int = pydantic.Field(default=0, ge=0)
    deadline_seconds: float = pydantic.Field(default=10.0, gt=0)

    @property
    def session_threads(self) -> int:
        """Threads of one ONNX Runtime session."""
        return self.threads or available_processors()


def load_settings() -> Settings:
    """Reads the environment.

    Raises:
        ConfigurationError: a variable has an unusable value.
    """
    try:
        return Settings()
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        variable = Settings.variable(str(problem["loc"][0]))
        raise ConfigurationError(
            f"{variable}={problem['input']!r} is not usable ({problem['msg']}); correct or unset it"
        ) from None
