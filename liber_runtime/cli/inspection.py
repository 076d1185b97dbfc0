"""``liber inspect``: what is held of a user, and counts, versions and given-up steps over the whole store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from liber_runtime.cli.application import StoreOption, application, opened, output
from liber_runtime.cli.files import write_private
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.memory import MemoryStore, Statistics, Timeline
from liber_runtime.progress import progress
from liber_runtime.timeline import UserView, view_user
from liber_runtime.timeline.census import count_texts
from liber_runtime.timeline.document import write_user
from liber_runtime.timeline.terminal import Bounds, show_dead, show_tallies, show_user

LISTED_DEAD = 100
"""Given-up steps on a terminal, unless all are asked for."""


@application.command()
def inspect(
    user: Annotated[str | None, typer.Argument(help="User id; without one, counts over the whole store.")] = None,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write the user's timeline as one HTML page.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="List everything, not the newest alone.")] = False,
    dead: Annotated[bool, typer.Option("--dead", help="List the steps that were given up, and why.")] = False,
    versions: Annotated[
        bool, typer.Option("--versions", help="Count the texts by writer and prompt version; reads the whole store.")
    ] = False,
) -> None:
    """Show what the store holds: partitions, texts with their origin, the cache."""
    asked = [name for name, given in (("--json", as_json), ("--html", html), ("--all", everything)) if given]
    if dead and versions:
        raise InvalidInputError("--dead and --versions are two questions; ask one at a time")
    if user is not None and (dead or versions):
        option = "--dead" if dead else "--versions"
        raise InvalidInputError(f"{option} is about the whole store; leave out user {user!r}")
    if user is None and html is not None:
        raise InvalidInputError(f"--html {html} shows one user; name the user")
    if as_json and html is not None:
        raise InvalidInputError(f"{' and '.join(asked[:2])} exclude each other; ask for one")
    with opened(store) as memory:
        if user is not None:
            _show_user(require_user(memory, user), as_json, html, everything)
        elif dead:
            _show_dead(memory, as_json, everything)
        elif versions:
            _show_versions(memory, as_json)
        else:
            typer.echo(json.dumps(count_store(memory.statistics()), indent=2))


def require_user(memory: MemoryStore, user: str) -> UserView:
    """What is held of a user.

    Raises:
        InvalidInputError: nothing is.
    """
    view = view_user(memory, user)
    if view is None:
        raise InvalidInputError(f"the store holds nothing of user {user!r}; `liber inspect` alone counts what it holds")
    return view


def read_timelines(memory: MemoryStore, user_ids: Iterable[str], total: int, title: str) -> Iterator[Timeline]:
    """Timelines one after the other, with a progress bar; who is forgotten meanwhile is left out."""
    with progress(title, total) as advance:
        for user_id in user_ids:
            timeline = memory.timeline(user_id)
            advance(1)
            if timeline is not None:
                yield timeline


def count_store(statistics: Statistics) -> dict[str, object]:
    """`Statistics` as JSON knows it: sets as sorted lists."""
    counts = dataclasses.asdict(statistics)
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in counts.items()}


def _show_user(view: UserView, as_json: bool, html: Path | None, everything: bool) -> None:
    if as_json:
        for piece in write_user(view, vectors=False):
            typer.echo(piece, nl=False)
    elif html is not None:
        # Imported here: the template engine takes longer to load than most commands run.
        from liber_runtime.timeline.page import PAGE_BOUNDS, render_user

        write_private(html, render_user(view, Bounds(None, None) if everything else PAGE_BOUNDS))
        output.print(f"wrote {html}", soft_wrap=True)
    else:
        _print(show_user(view, Bounds(None, None) if everything else Bounds()))


def _show_dead(memory: MemoryStore, as_json: bool, everything: bool) -> None:
    total = sum(memory.statistics().dead.values())
    steps = memory.dead(total if as_json or everything else LISTED_DEAD) if total else []
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(step) for step in steps], indent=2))
    else:
        _print(show_dead(steps, total))


def _show_versions(memory: MemoryStore, as_json: bool) -> None:
    users = memory.users()
    tallies = count_texts(read_timelines(memory, users, len(users), "count texts"))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(tally) for tally in tallies], indent=2))
    else:
        _print(show_tallies(tallies))


def _print(shown: Iterable[RenderableType]) -> None:
    for each in shown:
        output.print(each)
