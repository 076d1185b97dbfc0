"""Data sets: behaviors, items, profiles and the domain's description, whatever format they came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from liber_runtime.behavior import Attributes, Behavior, Domain, Item
from liber_runtime.exceptions import InvalidInputError


@dataclass(frozen=True)
class Dataset:
    """One data set in memory.

    Attributes:
        domain: its description.
        behaviors: in time order, unless `ordered`; behaviors of the same second stay in file order. A repeated
            delivery (same user and event id) is dropped, as the memory store drops it, so that replay and store see
            the same log.
        items: the catalogue by item id. Behaviors may name items that are not in it.
        profiles: what is known of users, by user id; may lack users.
        origin: where it came from, in words for a report.
        ordered: whether the behaviors are in the order they arrived in, which then is kept whatever their times say.
        cuts: by user id the sizes of the partitions of users whose memory lost behaviors after it was cut: the
            partition condition would cut what is left in other places.

    Raises:
        InvalidInputError: an attribute is a number that is not finite.
    """

    domain: Domain
    behaviors: list[Behavior]
    items: dict[str, Item]
    profiles: dict[str, Attributes]
    origin: str = "made in Python"
    ordered: bool = False
    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrived = self.behaviors if self.ordered else sorted(self.behaviors, key=lambda each: each.timestamp)
        object.__setattr__(self, "behaviors", _distinct(arrived))
        for noun, described in (
            ("item", ((item_id, item.attributes) for item_id, item in self.items.items())),
            ("user", self.profiles.items()),
        ):
            for described_id, attributes in described:
                _require_finite(noun, described_id, attributes)


def _require_finite(noun: str, described_id: str, attributes: Attributes) -> None:
    for name, value in attributes.items():
        # nan - nan and inf - inf are nan; of an int however large it is 0.
        if isinstance(value, int | float) and value - value != 0:
            raise InvalidInputError(
                f"{name} {value!r} of {noun} {described_id!r:.80} is not a finite number; correct it or leave it out"
            )


def _distinct(behaviors: list[Behavior]) -> list[Behavior]:
    distinct: dict[tuple[str, str], Behavior] = {}
    for behavior in behaviors:
        distinct.setdefault((behavior.user_id, behavior.event_id), behavior)
    return list(distinct.values())


def load(source: str | Path | None = None) -> Dataset:
    """Loads a data set, recognising its format.

    Args:
        source: one of

            - None: the generated sample (`builders.datasets.sample`);
            - a directory with ``u.data``, ``u.item``, ``u.user``: MovieLens-100K in its original format;
            - a directory with ``behaviors.{csv,jsonl,parquet}`` and ``items.*``, optionally ``users.*`` and
              ``domain.json`` (`builders.datasets.tabular`);
            - a behaviors file alone: items are then just ids.

    Raises:
        InvalidInputError: nothing of that is there, or a file in it is broken.
        ConfigurationError: Parquet without the ``parquet`` extra.
    """
    from builders.datasets import movielens, sample, tabular

    if source is None:
        return sample.generate()
    path = Path(source)
    if path.is_file():
        return tabular.load_file(path)
    if not path.is_dir():
        raise InvalidInputError(f"data {str(path)!r} does not exist; give a directory or a behaviors file")
    if (path / "u.data").exists():
        return movielens.load(path)
    if tabular.find_table(path, "behaviors") is not None:
        return tabular.load_directory(path)
    raise InvalidInputError(
        f"data {str(path)!r} is not understood: neither u.data, u.item, u.user (MovieLens-100K) nor "
        "behaviors.csv|jsonl|parquet with items.csv|jsonl|parquet are in it; add one of the two"
    )
