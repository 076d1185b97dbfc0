"""Settings of every process, from ``LIBER_*`` environment variables; command-line options override them."""

from __future__ import annotations

from pathlib import Path

import pydantic
from pydantic_settings import BaseSettings, SettingsConfigDict

from liber_runtime.credentials import check_control_key, read_secret
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.processors import available_processors


class Settings(BaseSettings):
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

    model_config = SettingsConfigDict(env_prefix="LIBER_", env_ignore_empty=True, extra="ignore")

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


def load_settings() -> Settings:
    """Reads the environment.

    Raises:
        ConfigurationError: a variable has an unusable value.
    """
    try:
        return Settings()
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        variable = "LIBER_" + str(problem["loc"][0]).upper()
        raise ConfigurationError(
            f"{variable}={problem['input']!r} is not usable ({problem['msg']}); correct or unset it"
        ) from None
