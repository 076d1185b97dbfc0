"""The ``liber`` command: a module for each kind of commands."""

from __future__ import annotations

import io
import signal
import sys
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from liber_runtime import __version__
from liber_runtime.cli import build, cost, engine, ingest, inspection, memory, serve, worker  # each adds its commands
from liber_runtime.cli.application import application
from liber_runtime.exceptions import LiberError
from liber_runtime.progress import console

__all__ = ["application", "build", "cost", "engine", "ingest", "inspection", "main", "memory", "serve", "worker"]


def main() -> None:
    """Runs the command; an error of LIBER's own is one line on standard error and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        # Titles may hold what a terminal's encoding has no bytes for; that is no reason to end.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # As Ctrl-C does, SIGTERM unwinds the stack, so that servers are stopped and files closed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        application()
    except LiberError as error:
        _fail(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}; check that the path is right and can be written")


def _fail(reason: str) -> NoReturn:
    line = " ".join(reason.split("\n"))
    console.print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True)
    sys.exit(1)


@application.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
