r"""Values from outside, worded for people: what could steer a terminal is made visible, times and amounts are readable.

Titles, profiles, ids, texts and error messages are untrusted. A terminal obeys control characters, and a reader is
misled by characters that reorder or hide others; both are shown as what they are (``\x1b``, ``\u202e``).
"""

from __future__ import annotations

import datetime
import unicodedata

_JOINERS = "\u200c\u200d"
"""Zero-width joiners change no order and hide nothing; Persian, Hindi and emoji are spelled with them."""

_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of control and format characters, lone surrogates, and separators of lines and paragraphs."""


def visible(text: str) -> str:
    """`text` on one line, with every character that steers a terminal or hides what is there spelled as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spell(character) for character in text)


def visible_lines(text: str) -> list[str]:
    """The lines of `text`, as a writer broke them, each made `visible`; blank lines at the end are dropped."""
    return [visible(line.replace("\t", " ").removesuffix("\r")) for line in text.rstrip().split("\n")]


def moment(timestamp: float) -> str:
    """A time as ``2024-05-01 18:20`` UTC; what no calendar holds as seconds since 1970."""
    known = _calendar(timestamp)
    return f"{known:%Y-%m-%d %H:%M}" if known else f"{timestamp:g} s"


def day(timestamp: float) -> str:
    """The day of a time as ``2024-05-01`` UTC; what no calendar holds as seconds since 1970."""
    known = _calendar(timestamp)
    return f"{known:%Y-%m-%d}" if known else f"{timestamp:g} s"


def iso_time(timestamp: float) -> str | None:
    """A time in ISO 8601, UTC; None for what no calendar holds."""
    known = _calendar(timestamp)
    return known.isoformat() if known else None


def amount(number: int, noun: str) -> str:
    """``1 vector``, ``2,000 vectors``, ``2 summaries``: a count with its noun."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _calendar(timestamp: float) -> datetime.datetime | None:
    try:
        known = datetime.datetime.fromtimestamp(timestamp, datetime.timezone.utc)
    except (OverflowError, ValueError, OSError):
        return None
    return known if known.year >= 1000 else None


def _spell(character: str) -> str:
    if unicodedata.category(character) not in _STEERING or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")
