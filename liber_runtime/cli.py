"""The ``liber`` command."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from liber_runtime import __version__
from liber_runtime.behavior import Behavior, Domain
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, LiberError
from liber_runtime.memory import MemoryStore, Timeline, open_store
from liber_runtime.partition import parse_condition
from liber_runtime.progress import console, progress
from liber_runtime.settings import load_settings

APPEND_BATCH = 10_000
"""Behaviors in one transaction of `ingest`."""

application = typer.Typer(
    name="liber",
    help="Lifelong user interest, written by an LLM or the statistical writer, served on Triton.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

output = Console()

StoreOption = Annotated[
    Optional[str], typer.Option("--store", help="Memory store, e.g. sqlite:///runs/memory.db. [env: LIBER_STORE]")
]
TritonOption = Annotated[
    Optional[str], typer.Option("--triton", help="host:port of Triton's gRPC endpoint. [env: LIBER_TRITON]")
]
DataOption = Annotated[
    Optional[Path],
    typer.Option(
        "--data",
        envvar="LIBER_DATA",
        help="MovieLens-100K's directory, a directory with behaviors.* and items.*, or a behaviors file. "
        "Without it: the generated sample.",
    ),
]


def main() -> None:
    """Runs the command; an error of LIBER's own is one line on standard error and exit status 1."""
    try:
        application()
    except LiberError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, markup=True, soft_wrap=True)
        sys.exit(1)


@application.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
