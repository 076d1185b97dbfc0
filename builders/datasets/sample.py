"""A generated data set with planted, drifting interests, for machines without data.

Nobody in it exists. What is planted, so that a model has something to find:

- a user likes some groups and dislikes others; a little of that follows from age, gender and occupation;
- within the year the interests of most users change regime: some of their likes and dislikes are drawn anew, and
  between the changes they wander a little from week to week;
- users pick what they like and what is popular, most picks come in sessions, and a few users do most of the picking;
- a rating is interest in the item's groups + the item's quality + the user's leniency + noise, cut into five stars.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from builders.datasets import Dataset
from liber_runtime.behavior import Attributes, Behavior, Domain, Item

GROUPS = (
    "Adventure",
    "Animation",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Horror",
    "Musical",
    "Romance",
    "Science Fiction",
    "Western",
)
OCCUPATIONS = ("artist", "engineer", "farmer", "nurse", "retired", "student", "teacher", "writer")

DOMAIN = Domain(
    name="sample",
    item_noun="movie",
    feedback_noun="stars",
    feedback_range=(1.0, 5.0),
    positive_above=3.0,
    factors=("genre", "time/period", "critical acclaim"),
    group_attribute="genres",
    period_attribute="year",
)

# fmt: off
_ADJECTIVES = (
    "Amber", "Broken", "Crimson", "Distant", "Electric", "Frozen", "Golden", "Hidden", "Iron", "Jagged",
    "Last", "Midnight", "Northern", "Open", "Painted", "Quiet", "Restless", "Silent", "Twisted", "Velvet",
    "Wandering", "Winter",
)
_NOUNS = (
    "Anchor", "Bridge", "Canyon", "Daughter", "Echo", "Forest", "Garden", "Harbor", "Island", "Journey",
    "Kingdom", "Lantern", "Mirror", "Night", "Orchard", "Promise", "River", "Stranger", "Tower", "Valley",
    "Window", "Zephyr",
)
# fmt: on

_DAY = 86400.0
_YEAR_DAYS = 365
_BEGIN = 1640995200.0  # 2022-01-01 UTC
_SESSION_BEHAVIORS = 9
_STAR_SHARES = (0.09, 0.15, 0.22, 0.31)  # of 1 to 4 stars; the rest has 5

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Catalogue:
    """groups: float64[items, groups], rows sum to 1; quality, popularity: float64[items]; year: int64[items]."""

    groups: _Floats
    quality: _Floats
    popularity: _Floats
    year: _Ints


def generate(seed: int = 1, users: int = 300, items: int = 400, behaviors: int = 30_000) -> Dataset:
    """Makes the data set; the same arguments make the same one.

    Args:
        seed: of the random numbers.
        users: how many there are.
        items: how many there are; at most one title each can be invented for 484.
        behaviors: about how many there are, over one year.

    Raises:
        ValueError: more items than titles.
    """
    random = np.random.default_rng(seed)
    titles = [f"The {adjective} {noun}" for adjective, noun in itertools.product(_ADJECTIVES, _NOUNS)]
    if items > len(titles):
        raise ValueError(f"items={items} is more than the {len(titles)} titles there are; ask for fewer")
    catalogue = _make_catalogue(random, items)
    profiles, leaning = _make_profiles(random, users)
    columns = _make_log(random, catalogue, leaning, _activity(random, users, items, behaviors))
    random.shuffle(titles)
    return Dataset(
        domain=DOMAIN,
        behaviors=[
            Behavior(f"u{user + 1}", f"m{item + 1}", float(stars), float(seconds))
            for user, item, stars, seconds in zip(*(column.tolist() for column in columns), strict=True)
        ],
        items={f"m{number + 1}": _make_item(catalogue, number, titles[number]) for number in range(items)},
        profiles={f"u{number + 1}": profile for number, profile in enumerate(profiles)},
        origin=f"generated (seed {seed}): invented users with planted, drifting interests",
    )


def _make_catalogue(random: np.random.Generator, items: int) -> _Catalogue:
    ranks = np.argsort(random.gumbel(size=(items, len(GROUPS))), axis=1)
    counts = random.choice([1, 2, 3], size=items, p=[0.4, 0.4, 0.2])
    groups = np.zeros((items, len(GROUPS)))
    np.put_along_axis(groups, ranks[:, :3], (np.arange(3) < counts[:, None]).astype(float), axis=1)
    return _Catalogue(
        groups=groups / groups.sum(axis=1, keepdims=True),
        quality=random.normal(size=items),
        popularity=random.normal(scale=1.1, size=items),
        year=random.triangular(1950, 2018, 2022, size=items).astype(np.int64),
    )


def _make_item(catalogue: _Catalogue, number: int, title: str) -> Item:
    year = int(catalogue.year[number])
    genres = tuple(GROUPS[group] for group in np.flatnonzero(catalogue.groups[number]))
    return Item(f"m{number + 1}", f"{title} ({year})", {"genres": genres, "year": year})


def _make_profiles(random: np.random.Generator, users: int) -> tuple[list[Attributes], _Floats]:
    """Profiles, and float64[users, groups]: what they let expect of a user's interests."""
    ages = np.clip(random.normal(36, 14, size=users), 12, 80).astype(np.int64)
    genders = random.integers(2, size=users)
    occupations = random.integers(len(OCCUPATIONS), size=users)
    by_age, by_gender = random.normal(size=(2, len(GROUPS)))
    by_occupation = random.normal(size=(len(OCCUPATIONS), len(GROUPS)))
    leaning = (
        0.35 * ((ages - 36) / 14)[:, None] * by_age
        + 0.3 * (2 * genders - 1)[:, None] * by_gender
        + 0.3 * by_occupation[occupations]
    )
    profiles: list[Attributes] = [
        {"age": age, "gender": ("female", "male")[gender], "occupation": OCCUPATIONS[occupation]}
        for age, gender, occupation in zip(ages.tolist(), genders.tolist(), occupations.tolist(), strict=True)
    ]
    return profiles, leaning


def _activity(random: np.random.Generator, users: int, items: int, behaviors: int) -> _Ints:
    """int64[users]: how many behaviors each has; heavy-tailed, and nobody sees the whole catalogue."""
    shares = random.lognormal(sigma=0.9, size=users)
    counts: _Ints = np.clip(shares / shares.sum() * behaviors * 1.15, 5, int(0.8 * items)).astype(np.int64)
    return counts


def _make_log(
    random: np.random.Generator, catalogue: _Catalogue, leaning: _Floats, activity: _Ints
) -> tuple[_Ints, _Ints, _Ints, _Floats]:
    """(user, item, stars, seconds), one entry per behavior."""
    seconds = [_session_times(random, int(count)) for count in activity]
    picks = [_picks(random, catalogue, leaning[user], times) for user, times in enumerate(seconds)]
    score = np.concatenate([score for _, score in picks])
    stars = 1 + np.searchsorted(np.quantile(score, np.cumsum(_STAR_SHARES)), score)
    return (
        np.repeat(np.arange(len(activity)), activity),
        np.concatenate([chosen for chosen, _ in picks]),
        stars.astype(np.int64),
        np.concatenate(seconds),
    )


def _session_times(random: np.random.Generator, count: int) -> _Floats:
    """float64[count], ascending: sessions within the part of the year in which the user is there."""
    joined = random.uniform(0, 0.7) * _YEAR_DAYS
    left = min(_YEAR_DAYS, joined + random.uniform(60, _YEAR_DAYS))
    sessions = random.uniform(joined, left, size=1 + count // _SESSION_BEHAVIORS) * _DAY
    session = np.sort(random.integers(len(sessions), size=count))
    within = random.uniform(0, 3600, size=count)
    times: _Floats = np.sort(_BEGIN + np.floor(sessions[session] + within))
    return times


def _picks(
    random: np.random.Generator, catalogue: _Catalogue, leaning: _Floats, times: _Floats
) -> tuple[_Ints, _Floats]:
    """What one user picks at `times`, each item once, and how much they like it."""
    days = (times - _BEGIN) / _DAY
    regimes = _regimes(random, leaning)
    ends = np.append(np.sort(random.uniform(days[0], days[-1], size=len(regimes) - 1)), np.inf)
    leniency = random.normal(scale=0.5)
    seen = np.zeros(len(catalogue.quality), dtype=bool)
    chosen, liking = [], []
    # Interests are the same within a week, so that a week's picks are one draw without replacement.
    weeks = np.unique(days // 7, return_index=True)[1]
    wander = np.cumsum(random.normal(scale=0.12, size=(len(weeks), len(GROUPS))), axis=0)
    for week, (begin, end) in enumerate(itertools.pairwise([*weeks.tolist(), len(days)])):
        interest = regimes[int(np.searchsorted(ends, days[begin]))] + wander[week]
        affinity = catalogue.groups @ interest
        pull = 0.7 * affinity + catalogue.popularity + random.gumbel(size=len(seen))
        picked = np.argsort(-np.where(seen, -np.inf, pull))[: end - begin]
        seen[picked] = True
        chosen.append(picked)
        liking.append(1.3 * affinity[picked] + 0.55 * catalogue.quality[picked])
    return np.concatenate(chosen), np.concatenate(liking) + leniency + random.normal(scale=0.7, size=len(days))


def _regimes(random: np.random.Generator, leaning: _Floats) -> list[_Floats]:
    """One to four interests in turn, float64[groups] each; a new regime draws a third of the groups anew."""
    regimes = [leaning + random.normal(size=len(GROUPS))]
    for _ in range(random.integers(4)):
        anew = random.permutation(len(GROUPS)) < len(GROUPS) // 3
        regimes.append(np.where(anew, leaning + random.normal(scale=1.3, size=len(GROUPS)), regimes[-1]))
    return regimes
