"""``liber inspect`` and ``liber forget``: what is held, and erasing it."""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import Annotated

import numpy as np
import typer

from liber_runtime.cli.application import StoreOption, application, opened, output
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.memory import Timeline


@application.command()
def inspect(
    user: Annotated[str | None, typer.Argument(help="User id; without one, counts over the whole store.")] = None,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what the store holds: partitions, texts with their origin, the cache."""
    with opened(store) as memory:
        if user is None:
            typer.echo(json.dumps(dataclasses.asdict(memory.statistics()), indent=2))
            return
        timeline = memory.timeline(user)
    if timeline is None:
        raise InvalidInputError(f"the store holds nothing of user {user!r}; `liber inspect` alone counts what it holds")
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(timeline), indent=2, default=_plain))
    else:
        _print_timeline(timeline)


@application.command()
def forget(
    user: Annotated[str, typer.Argument(help="User id.")],
    store: StoreOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase everything held of a user: behaviors, partitions, texts, vectors, pending work."""
    with opened(store) as memory:
        if memory.timeline(user) is None:
            output.print(f"nothing was held of user {user!r}", soft_wrap=True)
            return
        if not yes:
            typer.confirm(f"Erase everything held of user {user!r}?", abort=True)
        forgotten = memory.forget(user)
    output.print(
        f"erased {forgotten.behaviors} behaviors and {forgotten.partitions} partitions of user {user!r}", soft_wrap=True
    )


def _print_timeline(timeline: Timeline) -> None:
    profile = ", ".join(f"{name} {value}" for name, value in timeline.profile.items()) or "no profile"
    output.print(f"user {timeline.user_id}: {profile}", soft_wrap=True)
    for record in timeline.partitions:
        first, last = (_day(record.behaviors[end].timestamp) for end in (0, -1))
        output.print(f"\npartition {record.number}: {len(record.behaviors)} behaviors, {first} to {last}", style="bold")
        for text in (record.summary, record.shift):
            if text is not None:
                output.print(f"{text.kind} ({text.writer}, {text.prompt_version}):", style="cyan")
                output.print(text.text, soft_wrap=True)
        made = record.representation
        output.print(
            f"vector: {f'{len(made.vector)} numbers by {made.fingerprint}' if made else 'pending'}", style="dim"
        )
    output.print(f"\ncache: {len(timeline.cache)} behaviors", style="bold")


def _day(timestamp: float) -> str:
    return datetime.datetime.fromtimestamp(timestamp, datetime.timezone.utc).strftime("%Y-%m-%d")


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else str(value)
