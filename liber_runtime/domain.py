"""``domain.json``: a data set's description as its owner writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic

from liber_runtime.behavior import Domain
from liber_runtime.exceptions import InvalidInputError

DOMAIN_FILE = "domain.json"


class DomainFile(pydantic.BaseModel, extra="forbid"):
    """The fields of `Domain`, each of which may be left out where a default can be derived from the data."""

    name: str | None = None
    item_noun: str | None = None
    feedback_noun: str | None = None
    feedback_range: tuple[float, float] | None = None
    positive_above: float | None = None
    factors: tuple[str, ...] | None = None
    group_attribute: str | None = None
    period_attribute: str | None = None


def read_domain_file(path: Path) -> DomainFile:
    """Reads a description.

    Raises:
        InvalidInputError: not there, not JSON, an unknown key or a value of the wrong type.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InvalidInputError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} is not a JSON object in UTF-8 ({error}); correct it") from None
    if not isinstance(content, dict):
        raise InvalidInputError(f'{path} is not a JSON object but {content!r:.80}; write {{"name": ...}}')
    try:
        return DomainFile.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInputError(f"{path}: {where} {first['input']!r:.80}: {first['msg']}; correct the key") from None


def read_domain(path: Path) -> Domain:
    """Reads a complete description; only the two attributes may be left out.

    Raises:
        InvalidInputError: as `read_domain_file`, or a key is missing.
    """
    given = read_domain_file(path).model_dump(exclude_none=True)
    needed = ("name", "item_noun", "feedback_noun", "feedback_range", "positive_above", "factors")
    missing = [key for key in needed if key not in given]
    if missing:
        raise InvalidInputError(f"{path} lacks {', '.join(missing)}; streaming needs all of {', '.join(needed)}")
    try:
        return Domain(**given)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from None
