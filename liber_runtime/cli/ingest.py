"""``liber ingest``: logs into the store."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from liber_runtime.behavior import Behavior
from liber_runtime.cli.application import StoreOption, application, opened, output
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.memory import MemoryStore
from liber_runtime.progress import progress

APPEND_BATCH = 10_000
"""Behaviors in one transaction of `ingest`."""


@application.command()
def ingest(
    behaviors: Annotated[
        str | None,
        typer.Argument(
            help="CSV, JSON lines or Parquet with user,item,timestamp,feedback[,event_id]; - reads standard input."
        ),
    ] = None,
    items: Annotated[
        Path | None, typer.Option(help="Item table: item,title and any attributes. Needs --domain.")
    ] = None,
    users: Annotated[Path | None, typer.Option(help="Profiles: user and any attributes.")] = None,
    domain: Annotated[Path | None, typer.Option(help="JSON description of the data set, see the README.")] = None,
    condition: Annotated[
        str | None,
        typer.Option(help="When the cache is cut, fixed at the first call: e.g. 'any_of(count(20), time_gap(86400))'."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Append behaviors to the store. Reading the same file again changes nothing."""
    from liber_runtime.behavior_log import read_behaviors, read_items, read_profiles
    from liber_runtime.domain import read_domain

    if behaviors is None and items is None and users is None:
        raise InvalidInputError("there is nothing to ingest; name a behaviors file, --users, or --items with --domain")
    if (items is None) != (domain is None):
        raise InvalidInputError("--items and --domain go together: prompts need both; give the two or neither")
    # All that is short is read before the store is touched, the log as far as its first behavior.
    catalogue = (read_domain(domain), read_items(items)) if items is not None and domain is not None else None
    profiles = read_profiles(users) if users is not None else {}
    log = read_behaviors(behaviors) if behaviors is not None else iter(())
    first = list(itertools.islice(log, 1))
    with opened(store, condition, create=True) as memory:
        if catalogue is not None:
            memory.put_items(*catalogue)
            output.print(f"{len(catalogue[1])} items of {catalogue[0].name!r} are in the catalogue")
        if profiles:
            memory.put_profiles(profiles)
            output.print(f"{len(profiles)} profiles are kept")
        if first:
            _append_all(memory, itertools.chain(first, log))


def _append_all(memory: MemoryStore, behaviors: Iterator[Behavior]) -> None:
    kept = duplicates = partitions = 0
    try:
        with progress("append behaviors", None) as advance:
            while batch := list(itertools.islice(behaviors, APPEND_BATCH)):
                appended = memory.append(batch)
                kept += appended.behaviors
                duplicates += appended.duplicates
                partitions += appended.partitions
                advance(len(batch))
    finally:
        # Also when a later line is broken: what came before it is kept.
        if kept or duplicates:
            output.print(f"kept {kept} behaviors, {duplicates} were there already; cut {partitions} partitions")
