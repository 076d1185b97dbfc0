"""The application all commands belong to, and what they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from liber_runtime.exceptions import ConfigurationError
from liber_runtime.memory import MemoryStore, open_store
from liber_runtime.partition import parse_condition
from liber_runtime.settings import load_settings

application = typer.Typer(
    name="liber",
    help="Lifelong user interest, written by an LLM or the statistical writer, served on Triton.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

output = Console(markup=False, emoji=False, highlight=False)

StoreOption = Annotated[
    str | None, typer.Option("--store", help="Memory store, e.g. sqlite:///runs/memory.db. (env var: LIBER_STORE)")
]
TritonOption = Annotated[
    str | None, typer.Option("--triton", help="host:port of Triton's gRPC endpoint. (env var: LIBER_TRITON)")
]
MetricsPortOption = Annotated[
    int, typer.Option("--metrics-port", help="Serve Prometheus metrics on this port; 0 for none.")
]
MetricsHostOption = Annotated[
    str, typer.Option("--metrics-host", help="Address of --metrics-port; 0.0.0.0 for other machines to reach it.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="LIBER_DATA",
        help="MovieLens-100K's directory, a directory with behaviors.* and items.*, or a behaviors file. "
        "Without it: the generated sample.",
    ),
]
WriterOption = Annotated[
    str | None,
    typer.Option(
        "--writer",
        help="statistical (no LLM), openai (any OpenAI-compatible endpoint), triton, transformers. What is no option "
        "is a variable: docs/llm.md. (env var: LIBER_WRITER)",
    ),
]
WriterUrlOption = Annotated[
    str | None,
    typer.Option(help="The LLM's endpoint, or host:port of its Triton. (env var: LIBER_WRITER_URL)"),
]
WriterModelOption = Annotated[
    str | None,
    typer.Option(help="What the LLM is called there, or its checkpoint. (env var: LIBER_WRITER_MODEL)"),
]


def quiet_grpc() -> None:
    """Keeps gRPC from printing, in its own manner, what the error of a call says in one line.

    To be called before anything imports gRPC, which looks at this only then.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@contextmanager
def needs_builders() -> Iterator[None]:
    """Says how to get the packages that building needs where they are missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"this command needs {error.name}, which is not installed; run it in a checkout of LIBER after: "
            "pip install -e '.[build,serve]'"
        ) from None


@contextmanager
def opened(url: str | None, condition: str | None = None, create: bool = False) -> Iterator[MemoryStore]:
    """The store at `url`, or that of the settings, closed afterwards."""
    wanted = parse_condition(condition) if condition else None
    memory = open_store(url or load_settings().store, wanted, create=create)
    try:
        yield memory
    finally:
        memory.close()
