"""MovieLens-100K in its original format: ``u.data``, ``u.item`` (Latin-1), ``u.user``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from builders.datasets import Dataset
from liber_runtime.behavior import Attributes, AttributeValue, Behavior, Domain, Item
from liber_runtime.exceptions import InvalidInputError

DOMAIN = Domain(
    name="ml-100k",
    item_noun="movie",
    feedback_noun="stars",
    feedback_range=(1.0, 5.0),
    positive_above=3.0,
    factors=(
        "genre",
        "director/actors",
        "time/period/country",
        "character",
        "plot/theme",
        "mood/tone",
        "critical acclaim/award",
        "production quality",
        "soundtrack",
    ),
    group_attribute="genres",
    period_attribute="year",
)
"""The description behind the paper's prompts (Figure 3) and its labels (a rating above 3 is a click)."""

GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
"""The genre flags of ``u.item``, in their order."""

_FIRST_GENRE_COLUMN = 5
_GENDERS = {"M": "male", "F": "female"}
_YEAR = re.compile(r"\((\d{4})\)")
_NOUNS = {"users": "u.user", "items": "u.item", "ratings": "u.data"}


def load(directory: Path) -> Dataset:
    """Reads the data set.

    Every item has a ``title``, as in the file, and where they are known ``genres`` (a tuple) and ``year``; every user
    ``age``, ``gender`` and ``occupation``.

    Raises:
        InvalidInputError: a file is missing or a line is broken, a rating names an unlisted user or item, or the
            counts are not those of ``u.info`` (where that file is there).
    """
    items = {item.item_id: item for item in _read_items(directory / "u.item")}
    profiles = dict(_read_profiles(directory / "u.user"))
    behaviors = list(_read_behaviors(directory / "u.data", items, profiles))
    _check_counts(directory / "u.info", {"users": len(profiles), "items": len(items), "ratings": len(behaviors)})
    return Dataset(DOMAIN, behaviors, items, profiles, origin="MovieLens-100K")


def _read_items(path: Path) -> Iterator[Item]:
    for line, row in _rows(path, "|", _FIRST_GENRE_COLUMN + len(GENRES)):
        flags = row[_FIRST_GENRE_COLUMN:]
        if set(flags) - {"0", "1"}:
            raise _broken(path, line, flags, "genre flags are 0 or 1")
        attributes: dict[str, AttributeValue] = {}
        # The flag "unknown" is the absence of a genre, not a genre to have a taste for.
        genres = tuple(genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1" and genre != "unknown")
        if genres:
            attributes["genres"] = genres
        year = _year(row[1], row[2])
        if year is not None:
            attributes["year"] = year
        yield Item(row[0], row[1], attributes)


def _year(title: str, release_date: str) -> int | None:
    """The year in the title's brackets, which is the film's; the release date is that of its American release."""
    in_title = _YEAR.findall(title)
    if in_title:
        return int(in_title[-1])
    last = release_date.rpartition("-")[2]
    return int(last) if last.isdecimal() else None


def _read_profiles(path: Path) -> Iterator[tuple[str, Attributes]]:
    for line, row in _rows(path, "|", 5):
        user, age, gender, occupation, _ = row
        if not age.isdecimal() or gender not in _GENDERS:
            raise _broken(path, line, row, "it is user|age|M or F|occupation|zip code")
        yield user, {"age": int(age), "gender": _GENDERS[gender], "occupation": occupation}


def _read_behaviors(path: Path, items: dict[str, Item], profiles: dict[str, Attributes]) -> Iterator[Behavior]:
    low, high = DOMAIN.feedback_range
    for line, row in _rows(path, "\t", 4):
        user, item, rating, timestamp = row
        if not rating.isdecimal() or not timestamp.isdecimal() or not low <= int(rating) <= high:
            raise _broken(path, line, row, "it is user, item, rating from 1 to 5, seconds since 1970")
        if user not in profiles or item not in items:
            raise _broken(path, line, row, "its user must be in u.user and its item in u.item")
        yield Behavior(user, item, float(rating), float(timestamp))


def _rows(path: Path, separator: str, width: int) -> Iterator[tuple[int, list[str]]]:
    try:
        text = path.read_text("latin-1")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read ({error.strerror}); put all of MovieLens-100K there") from None
    # Not splitlines(): Latin-1 knows more line breaks than the file does.
    for number, line in enumerate(text.split("\n"), start=1):
        row = line.removesuffix("\r").split(separator)
        if row == [""]:
            continue
        if len(row) != width:
            raise _broken(path, number, row, f"it has {len(row)} fields in place of {width}")
        yield number, row


def _broken(path: Path, line: int, row: list[str], problem: str) -> InvalidInputError:
    return InvalidInputError(f"{path}, line {line}: {row!r:.120} is broken, {problem}; fetch the file again")


def _check_counts(path: Path, found: dict[str, int]) -> None:
    if not path.exists():
        return
    for line, row in _rows(path, " ", 2):
        count, noun = row
        if noun not in found or not count.isdecimal():
            raise _broken(path, line, row, f"it is a count and one of {', '.join(found)}")
        if found[noun] != int(count):
            raise InvalidInputError(
                f"{path.with_name(_NOUNS[noun])} holds {found[noun]} {noun} but {path} says {count}; "
                "fetch the file again"
            )
