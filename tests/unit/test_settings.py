"""Settings come from the environment; an unusable value is named with its variable."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from liber_runtime.exceptions import ConfigurationError
from liber_runtime.settings import WriterSettings, load_settings, load_writer_settings


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LIBER_")]:
        monkeypatch.delenv(name)


def test_defaults() -> None:
    settings = load_settings()
    assert settings.store == "sqlite:///runs/memory.db"
    assert settings.triton == "127.0.0.1:8001"
    assert settings.max_users == 4096
    assert settings.max_candidates == 16384
    assert settings.session_threads == (os.cpu_count() or 1)


def test_the_environment_overrides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBER_STORE", "sqlite:////data/memory.db")
    monkeypatch.setenv("LIBER_THREADS", "3")
    monkeypatch.setenv("LIBER_DEADLINE_SECONDS", "0.5")
    settings = load_settings()
    assert settings.store == "sqlite:////data/memory.db"
    assert settings.session_threads == 3
    assert settings.deadline_seconds == 0.5


def test_other_variables_of_ours_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBER_DATA", "somewhere")
    assert not hasattr(load_settings(), "data")


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("LIBER_THREADS", "abc", "valid integer"),
        ("LIBER_THREADS", "-1", "greater than or equal to 0"),
        ("LIBER_MAX_USERS", "0", "greater than or equal to 1"),
        ("LIBER_MAX_CANDIDATES", "1.5", "valid integer"),
        ("LIBER_DEADLINE_SECONDS", "0", "greater than 0"),
        ("LIBER_DEADLINE_SECONDS", "soon", "valid number"),
    ],
)
def test_an_unusable_value_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert str(refused.value).startswith(f"{variable}={value!r} is not usable (")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_documents_table_has_every_setting_of_writers_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "llm.md").read_text("utf-8")
    told = dict(re.findall(r"^\| `(LIBER_WRITER\w*)` \| ([^|]*?) ?\|", page, re.MULTILINE))
    expected = {}
    for name, field in WriterSettings.model_fields.items():
        variable = "LIBER_WRITER" if name == "writer" else f"LIBER_WRITER_{name.upper()}"
        default = field.default
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        expected[variable] = "" if default is None or name == "api_key" else shown
    assert told == expected


def test_a_writers_settings_come_from_the_environment_and_options_override_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIBER_WRITER", "openai")
    monkeypatch.setenv("LIBER_WRITER_MODEL", "llama")
    assert (load_writer_settings().writer, load_writer_settings().model) == ("openai", "llama")
    assert load_writer_settings(writer="triton", model="other", url=None).writer == "triton"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LIBER_WRITER", "gpt"),
        ("LIBER_WRITER_API", "soap"),
        ("LIBER_WRITER_TEMPERATURE", "-1"),
        ("LIBER_WRITER_RESPONSE_TOKENS", "0"),
        ("LIBER_WRITER_CURRENCY", "dollars"),
    ],
)
def test_an_unusable_setting_of_a_writer_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=f"{variable}='{value}' is not usable"):
        load_writer_settings()


def test_a_writers_key_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBER_WRITER_API_KEY", "very-secret")
    settings = load_writer_settings()
    assert settings.api_key.get_secret_value() == "very-secret"
    assert "very-secret" not in repr(settings) + str(settings)
