"""``liber export``, ``liber forget`` and ``liber rewrite``: giving out, erasing and making again what is held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from liber_runtime.cli.application import StoreOption, application, opened, output
from liber_runtime.cli.files import read_user_ids, write_private
from liber_runtime.cli.inspection import read_timelines, require_user
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.memory import MemoryStore
from liber_runtime.progress import console
from liber_runtime.timeline import UserView, view_user
from liber_runtime.timeline.census import Plan, plan_rewrite
from liber_runtime.timeline.document import write_user
from liber_runtime.timeline.erasure import find_event, tell_event_erasure, tell_user_erasure
from liber_runtime.wording import amount

LOOKED_UP = 1000
"""Users asked for in one call."""


@application.command()
def export(
    user: Annotated[str, typer.Argument(help="User id.")],
    store: StoreOption = None,
    destination: Annotated[
        Path | None, typer.Option("--output", help="File to write, readable by its owner alone. Default: print.")
    ] = None,
) -> None:
    """Give out everything held of a user as JSON: behaviors, texts with their origin, vectors, steps given up."""
    with opened(store) as memory:
        view = require_user(memory, user)
    pieces = write_user(view, vectors=True)
    if destination is None:
        for piece in pieces:
            typer.echo(piece, nl=False)
    else:
        write_private(destination, pieces)
        console.print(f"wrote {destination}", soft_wrap=True)


@application.command()
def forget(
    user: Annotated[str, typer.Argument(help="User id.")],
    store: StoreOption = None,
    event: Annotated[
        str | None, typer.Option("--event", help="Erase this one behavior and all that was made from it.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase everything held of a user, or one behavior with the texts and vectors made from it."""
    with opened(store) as memory:
        if event is not None:
            lines = _forget_event(memory, user, event, yes)
        elif memory.timeline(user) is None:
            lines = [f"nothing was held of user {user!r}"]
        else:
            lines = _forget_user(memory, require_user(memory, user), yes)
    for line in lines:
        output.print(line, soft_wrap=True)


@application.command()
def rewrite(
    store: StoreOption = None,
    writer: Annotated[str, typer.Option(help="Only texts by this writer.")] = "",
    prompt_version: Annotated[str, typer.Option(help="Only texts by this version of a prompt.")] = "",
    user: Annotated[list[str] | None, typer.Option(help="Only texts of this user; may be repeated.")] = None,
    users_file: Annotated[
        str | None, typer.Option(help="Only texts of these users: a file with one id a line; - reads standard input.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All texts of the store.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be made again; change nothing.")] = False,
) -> None:
    """Queue texts to be written again by a better prompt or writer; the old ones serve until they are replaced."""
    selection = (writer, prompt_version, user, users_file)
    if not everything and not any(selection):
        raise InvalidInputError(
            "nothing says which texts; give --writer, --prompt-version, --user or --users-file, or --all for every "
            "text (`liber inspect --versions` counts them)"
        )
    if everything and any(selection):
        raise InvalidInputError("--all means every text; leave it out, or leave out the other selections")
    named = None
    if user or users_file:
        named = list(dict.fromkeys([*(user or ()), *(read_user_ids(users_file) if users_file else ())]))
    with opened(store) as memory:
        users = None if named is None else _known(memory, named)
        if dry_run:
            ids = memory.users() if users is None else users
            timelines = read_timelines(memory, ids, len(ids), "count texts")
            _tell_plan(plan_rewrite(timelines, writer=writer, prompt_version=prompt_version))
        else:
            queued = memory.rewrite(writer=writer, prompt_version=prompt_version, user_ids=users)
            output.print(
                f"{amount(queued, 'text')} queued to be written again, with the shifts and vectors that follow from "
                "them; the old ones serve until they are replaced, which `liber worker` does",
                soft_wrap=True,
            )


def _forget_event(memory: MemoryStore, user: str, event: str, yes: bool) -> list[str]:
    before = require_user(memory, user)
    place = find_event(before, event)
    if not yes:
        typer.confirm(f"Erase event {event!r} of user {user!r}, {place.told}?", abort=True)
        # Whoever was asked may have taken their time: what was made meanwhile is removed as well, and told.
        before = require_user(memory, user)
        place = find_event(before, event)
    memory.forget(user, event)
    return tell_event_erasure(before, place, view_user(memory, user))


def _forget_user(memory: MemoryStore, before: UserView, yes: bool) -> list[str]:
    user = before.timeline.user_id
    if not yes:
        typer.confirm(f"Erase everything held of user {user!r}?", abort=True)
    return tell_user_erasure(before, memory.forget(user))


def _known(memory: MemoryStore, user_ids: Sequence[str]) -> list[str]:
    """Those users of whom something is held; says on standard error how many are not."""
    known = []
    for start in range(0, len(user_ids), LOOKED_UP):
        batch = user_ids[start : start + LOOKED_UP]
        known += [user for user, held in zip(batch, memory.read(batch, 0, 0, ""), strict=True) if held is not None]
    if len(known) < len(user_ids):
        missing = set(user_ids).difference(known)
        first = next(user for user in user_ids if user in missing)
        told = f"nothing is held of {len(missing):,} of the {amount(len(user_ids), 'user')} named, e.g. {first!r}"
        console.print(told, soft_wrap=True)
    return known


def _tell_plan(plan: Plan) -> None:
    lines = [
        f"{amount(plan.texts, 'text')} of {amount(plan.users, 'user')} would be queued to be written again",
        f"with the shifts that follow from new summaries: {amount(plan.calls, 'writer call')}, "
        f"then {amount(plan.vectors, 'vector')}",
    ]
    if plan.calls > plan.uncounted:
        least = "at least " if plan.uncounted else ""
        lines.append(
            f"the texts there are took {least}{amount(plan.prompt_tokens, 'prompt token')}, "
            f"{least}{amount(plan.response_tokens, 'response token')} and {plan.seconds:,.1f} s of calls"
        )
    elif plan.calls:
        lines.append(f"the texts there are took {plan.seconds:,.1f} s of calls; their writer counts no tokens")
    for line in lines:
        output.print(line, soft_wrap=True)
