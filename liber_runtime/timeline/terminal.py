"""One user's memory, texts by version and given-up steps on a terminal: all `visible`, none of it markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text as Styled

from liber_runtime.behavior import Attributes, Behavior, Text
from liber_runtime.memory import DeadStep, PartitionRecord, Representation
from liber_runtime.timeline import OpenStep, UserView
from liber_runtime.timeline.census import Tally
from liber_runtime.wording import amount, day, moment, visible, visible_lines


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is listed: the newest partitions, and of each run of behaviors the newest; None for all."""

    partitions: int | None = 10
    behaviors: int | None = 5


def show_user(view: UserView, bounds: Bounds) -> Iterator[RenderableType]:
    """The timeline, oldest partition first, so that the newest is next to the prompt."""
    timeline = view.timeline
    records, cache = timeline.partitions, timeline.cache
    behaviors = view.behaviors_of(record.number for record in records) + len(cache)
    yield Styled.assemble(("user ", "bold"), (visible(timeline.user_id), "bold cyan"))
    yield Styled(tell_attributes(timeline.profile) or "no profile", style="dim")
    yield Styled(
        f"{amount(behaviors, 'behavior')}: {amount(len(records), 'partition')} and {len(cache):,} in the cache"
    )
    shown = records if bounds.partitions is None else records[max(len(records) - bounds.partitions, 0) :]
    if len(shown) < len(records):
        older = len(records) - len(shown)
        yield Styled(f"\n{amount(older, 'older partition')} not shown; --all shows them", style="dim")
    for record in shown:
        yield Styled()
        yield _heading(f"partition {record.number}", record.behaviors)
        yield from _partition(view, record, bounds)
    yield Styled()
    yield _heading("cache", cache)
    yield from _behaviors(view, cache, bounds)


def show_dead(steps: Sequence[DeadStep], total: int) -> Iterator[RenderableType]:
    """The dead-letter list and how to try again."""
    if not steps:
        yield Styled("no step was given up")
        return
    table = _table("user", "partition", "step", "attempts", "reason")
    for step in steps:
        name = OpenStep(step.step, step.fingerprint, step).name
        table.add_row(visible(step.user_id), f"{step.number}", visible(name), f"{step.attempts}", visible(step.error))
    yield table
    if len(steps) < total:
        yield Styled(f"{len(steps):,} of {total:,} steps; --all shows them all", style="dim")
    yield Styled("mend the cause, then `liber worker --retry-dead` makes them ready again with all their attempts")


def show_tallies(tallies: Sequence[Tally]) -> Iterator[RenderableType]:
    """Which writer and prompt wrote how many texts."""
    if not tallies:
        yield Styled("the store holds no texts")
        return
    table = _table("kind", "writer", "prompt", "texts", "users", "tokens read", "written", "seconds", "made")
    for tally in tallies:
        # Some writers count no tokens: a dash, or that the sum is a lower bound.
        known = tally.texts - tally.uncounted
        least = "" if not tally.uncounted else ">= "
        tokens = [f"{least}{count:,}" if known else "-" for count in (tally.prompt_tokens, tally.response_tokens)]
        made = f"{day(tally.first)} to {day(tally.last)}"
        names = (tally.kind, visible(tally.writer), visible(tally.prompt_version))
        table.add_row(*names, f"{tally.texts:,}", f"{tally.users:,}", *tokens, f"{tally.seconds:,.1f}", made)
    yield table


def tell_attributes(attributes: Attributes) -> str:
    """A profile on one line."""
    return ", ".join(
        f"{visible(name)} {visible(', '.join(value) if isinstance(value, tuple) else str(value))}"
        for name, value in attributes.items()
    )


def tell_origin(view: UserView, record: PartitionRecord, text: Text) -> str:
    """From which behaviors a text was made, by what, when, and at which cost."""
    sources = view.sources(record, text)
    partitions = " and ".join(map(str, sources))
    parts = [
        f"from the {amount(view.behaviors_of(sources), 'behavior')} of partition{'s' if len(sources) > 1 else ''} "
        f"{partitions}",
        f"by {visible(text.writer)}, prompt {visible(text.prompt_version)}",
        tell_tokens(text),
        f"{text.seconds:.3g} s",
        f"made {moment(text.made_at)}",
    ]
    if text.note:
        parts.append(visible(text.note))
    return " · ".join(parts)


def tell_tokens(text: Text) -> str:
    """Tokens read and written, as far as the writer counts them."""
    if text.prompt_tokens is None and text.response_tokens is None:
        return "no tokens counted"
    read, written = ("?" if count is None else f"{count:,}" for count in (text.prompt_tokens, text.response_tokens))
    return f"{read} tokens read, {written} written"


def tell_vectors(representations: Mapping[str, Representation]) -> str:
    """Each vector's length and encoding."""
    return ", ".join(
        f"{len(representations[name].vector)} numbers by {visible(name)}" for name in sorted(representations)
    )


def _heading(name: str, behaviors: Sequence[Behavior]) -> Rule:
    title = f"{name}: no behaviors"
    if behaviors:
        # In order of arrival, which need not be that of the clock.
        times = [behavior.timestamp for behavior in behaviors]
        title = f"{name}: {amount(len(behaviors), 'behavior')}, {day(min(times))} to {day(max(times))}"
    return Rule(Styled(title, style="bold"), align="left", style="dim")


def _partition(view: UserView, record: PartitionRecord, bounds: Bounds) -> Iterator[RenderableType]:
    yield from _behaviors(view, record.behaviors, bounds)
    if not record.behaviors:
        yield Styled("all of its behaviors were erased", style="dim")
    for text in (record.summary, record.shift):
        if text is not None:
            yield Styled.assemble((text.kind, "bold green"), (f"  {tell_origin(view, record, text)}", "dim"))
            yield from (Padding(Styled(line), (0, 0, 0, 2), expand=False) for line in visible_lines(text.text))
    if record.representations:
        yield Styled.assemble(("vector", "bold green"), (f"  {tell_vectors(record.representations)}", "dim"))
    steps = view.open_steps(record)
    if pending := [visible(step.name) for step in steps if step.dead is None]:
        yield Styled.assemble(("pending", "bold yellow"), f"  {', '.join(pending)}")
    for step in steps:
        if step.dead is not None:
            reason = (
                f"  {visible(step.name)}, after {amount(step.dead.attempts, 'attempt')}: {visible(step.dead.error)}"
            )
            yield Styled.assemble(("given up", "bold red"), reason)


def _behaviors(view: UserView, behaviors: Sequence[Behavior], bounds: Bounds) -> Iterator[RenderableType]:
    shown = behaviors if bounds.behaviors is None else behaviors[max(len(behaviors) - bounds.behaviors, 0) :]
    if len(shown) < len(behaviors):
        yield Styled(f"  {amount(len(behaviors) - len(shown), 'older behavior')}; --all lists them", style="dim")
    if shown:
        yield Padding(_grid(view, shown), (0, 0, 0, 2), expand=False)


def _grid(view: UserView, behaviors: Iterable[Behavior]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column(overflow="fold")
    for behavior in behaviors:
        title = visible(view.title(behavior))
        name = Styled.assemble(title, (f"  {visible(behavior.item_id)}", "dim")) if title else visible(behavior.item_id)
        grid.add_row(moment(behavior.timestamp), visible(view.feedback(behavior.feedback)), name)
    return grid


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        right = column in ("partition", "attempts", "texts", "users", "tokens read", "written", "seconds")
        table.add_column(column, overflow="fold", justify="right" if right else "left")
    return table
