"""Your own data: a behavior log and an item table as CSV, JSON lines or Parquet.

``domain.json`` describes the data set; any key of `liber_runtime.behavior.Domain` can be set in it. What it leaves out:

    name: the directory's name.
    item_noun, feedback_noun: ``item``, ``points``.
    feedback_range: lowest and highest feedback in the log.
    positive_above: the middle of the range.
    factors: the names of the items' attributes.
    group_attribute: the multi-valued attribute that most items have, else the text attribute that most items have and
        whose values repeat; empty if there is none.
    period_attribute: ``year``, if that is a numeric attribute; else empty.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from builders.datasets import Dataset
from liber_runtime.behavior import AttributeValue, Behavior, Domain, Item
from liber_runtime.behavior_log import SUFFIXES, read_behaviors, read_items, read_profiles
from liber_runtime.domain import DOMAIN_FILE, DomainFile, read_domain_file
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.progress import console

_REPEATS = 2.0
"""A text attribute is one to tell tastes by if its values stand for at least this many items each, on average."""


def load_directory(directory: Path) -> Dataset:
    """Reads ``behaviors.*``, ``items.*`` and, where they are there, ``users.*`` and ``domain.json``.

    Raises:
        InvalidInputError: a table is missing, there twice, or broken; a table describes no item or user of the log;
            every feedback or every timestamp is the same; or the description does not fit the data.
        ConfigurationError: Parquet without the ``parquet`` extra.
    """
    tables = {stem: find_table(directory, stem) for stem in ("behaviors", "items", "users")}
    log, catalogue, users = tables["behaviors"], tables["items"], tables["users"]
    if log is None or catalogue is None:
        missing = "behaviors" if log is None else "items"
        raise InvalidInputError(f"{directory} holds no {missing}.csv, .jsonl or .parquet; add one")
    behaviors = list(read_behaviors(log))
    items = {item.item_id: item for item in read_items(catalogue)}
    profiles = read_profiles(users) if users is not None else {}
    _require_known(log, [behavior.item_id for behavior in behaviors], catalogue, items, "item")
    if users is not None:
        _require_known(log, [behavior.user_id for behavior in behaviors], users, profiles, "user")
    description = directory / DOMAIN_FILE
    given = read_domain_file(description) if description.exists() else DomainFile()
    domain = _describe(directory.resolve().name, behaviors, items, given)
    return Dataset(domain, behaviors, items, profiles, origin=str(directory))


def load_file(path: Path) -> Dataset:
    """Reads a behavior log alone; every item is then titled by its id.

    Raises:
        InvalidInputError: the log is broken, or all its feedback or all its timestamps are the same.
        ConfigurationError: Parquet without the ``parquet`` extra.
    """
    behaviors = list(read_behaviors(path))
    items = {behavior.item_id: Item(behavior.item_id, title=behavior.item_id) for behavior in behaviors}
    return Dataset(_describe(path.stem, behaviors, items, DomainFile()), behaviors, items, {}, origin=str(path))


def find_table(directory: Path, stem: str) -> Path | None:
    """The table called `stem` in any format that can be read; None if there is none.

    Raises:
        InvalidInputError: it is there in more than one format.
    """
    found = [path for suffix in SUFFIXES if (path := directory / f"{stem}{suffix}").exists()]
    if len(found) > 1:
        raise InvalidInputError(f"{found[0]} and {found[1].name} are both there; keep one")
    return found[0] if found else None


def _require_known(log: Path, named: Iterable[str], table: Path, known: Container[str], noun: str) -> None:
    """Refuses a table that describes nothing of the log, and tells of items that have no title.

    A log may name users and items that no table has; one that names no other has its ids written in another way.
    """
    ids = dict.fromkeys(named)
    missing = [each for each in ids if each not in known]
    if len(missing) == len(ids):
        raise InvalidInputError(
            f"{table}: none of the {len(ids)} {noun}s of {log} is in it, e.g. {missing[0]!r:.80}; write the ids alike "
            "in both ('1' is not '1.0')"
        )
    if missing and noun == "item":
        console.print(
            f"{len(missing)} of the {len(ids)} items of {log} are not in {table}, e.g. {missing[0]!r:.80}: they have "
            "no title and no attributes",
            soft_wrap=True,
        )


def _describe(name: str, behaviors: list[Behavior], items: dict[str, Item], given: DomainFile) -> Domain:
    attributes = _attributes(items.values())
    _require_times(behaviors)
    _require_described(items, attributes, given)
    low, high = given.feedback_range or _range(behaviors)
    defaults: dict[str, Any] = {
        "name": name,
        "item_noun": "item",
        "feedback_noun": "points",
        "feedback_range": (low, high),
        "positive_above": (low + high) / 2,
        "factors": tuple(attribute.replace("_", " ") for attribute in attributes) or ("kind of item",),
        "group_attribute": _group_attribute(attributes),
        "period_attribute": "year" if _is_numeric(attributes.get("year", [])) else "",
    }
    domain = Domain(**{**defaults, **given.model_dump(exclude_none=True)})
    outside = next((each for each in behaviors if not low <= each.feedback <= high), None)
    if outside is not None:
        raise InvalidInputError(
            f"feedback {outside.feedback:g} of user {outside.user_id!r} lies outside the feedback_range "
            f"[{low:g}, {high:g}] of {DOMAIN_FILE}; correct one of them"
        )
    return domain


def _require_times(behaviors: list[Behavior]) -> None:
    first = behaviors[0].timestamp
    if len(behaviors) > 1 and all(behavior.timestamp == first for behavior in behaviors):
        raise InvalidInputError(
            f"every timestamp is {first:g}, so there is no past to learn from and no future to test on; write when "
            "each behavior was"
        )


def _require_described(items: dict[str, Item], attributes: dict[str, list[AttributeValue]], given: DomainFile) -> None:
    """Whether the attributes that the description names are there and can be what it says."""
    there = ", ".join(attributes) or "none"
    for key, name in (("group_attribute", given.group_attribute), ("period_attribute", given.period_attribute)):
        if name and name not in attributes:
            raise InvalidInputError(
                f"{key} {name!r} of {DOMAIN_FILE} is no attribute of the items, there are {there:.200}; name one of "
                'them or "" for none'
            )
    if given.period_attribute and not _is_numeric(attributes[given.period_attribute]):
        name = given.period_attribute
        values = {item.item_id: item.attributes[name] for item in items.values() if name in item.attributes}
        # In CSV one text makes a column of texts: name the one that did.
        item_id = next((item_id for item_id, value in values.items() if not _looks_numeric(value)), next(iter(values)))
        raise InvalidInputError(
            f"period_attribute {name!r} of {DOMAIN_FILE} is {values[item_id]!r:.80} for item {item_id!r:.80}, not a "
            'number; correct the table, or write "" for none'
        )


def _range(behaviors: list[Behavior]) -> tuple[float, float]:
    feedback = [behavior.feedback for behavior in behaviors]
    low, high = min(feedback), max(feedback)
    if low == high:
        raise InvalidInputError(
            f"every feedback is {low:g}, so there is nothing to tell clicks from non-clicks by; log both"
        )
    return low, high


def _attributes(items: Iterable[Item]) -> dict[str, list[AttributeValue]]:
    """The values of every attribute, by name in order of appearance."""
    values: dict[str, list[AttributeValue]] = defaultdict(list)
    for item in items:
        for name, value in item.attributes.items():
            values[name].append(value)
    return values


def _group_attribute(attributes: dict[str, list[AttributeValue]]) -> str:
    multiple = {name: values for name, values in attributes.items() if any(isinstance(each, tuple) for each in values)}
    texts = {
        name: values
        for name, values in attributes.items()
        if all(isinstance(each, str) for each in values) and len(values) >= _REPEATS * len(set(values))
    }
    candidates = multiple or texts
    return max(candidates, key=lambda name: len(candidates[name]), default="")


def _looks_numeric(value: AttributeValue) -> bool:
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _is_numeric(values: list[AttributeValue]) -> bool:
    return bool(values) and all(isinstance(value, int | float) for value in values)
