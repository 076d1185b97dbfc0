from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import vocabulary as builder
from builders.datasets import Dataset, sample
from builders.vocabulary import fit
from liber_runtime.behavior import Attributes, AttributeValue, Behavior, Item
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.vocabulary import Field, Vocabulary


def dataset_of(
    attributes: list[Attributes], profiles: dict[str, Attributes] | None = None, seen: list[int] | None = None
) -> Dataset:
    """Items i0.. with `attributes`; `seen` are the items of the behaviors, whose feedback alternates from 1 to 5."""
    items = {f"i{number}": Item(f"i{number}", "title", each) for number, each in enumerate(attributes)}
    chosen = seen if seen is not None else [0, 0]
    behaviors = [Behavior(f"u{n}", f"i{item}", float(1 + 4 * (n % 2)), float(n)) for n, item in enumerate(chosen)]
    return Dataset(sample.DOMAIN, behaviors, items, profiles or {})


def test_index_0_is_everything_unknown() -> None:
    vocabulary = Vocabulary(
        items=("a", "b"),
        user_fields=(
            Field(name="job", kind="category", values=("artist", "nurse")),
            Field(name="age", kind="number", boundaries=(18.0, 30.0)),
        ),
        item_fields=(),
        feedback=Field(name="feedback", kind="number", boundaries=(2.5, 3.5)),
    )
    assert vocabulary.item_indices(["b", "nobody", "a", ""]).tolist() == [2, 0, 1, 0]
    assert vocabulary.item_indices([]).shape == (0,)
    assert vocabulary.profile_indices({"job": "nurse", "age": 30}) == [2, 3]
    assert vocabulary.profile_indices({"job": "pilot", "age": math.nan}) == [0, 0]
    assert vocabulary.profile_indices({"age": "old"}) == [0, 0]
    assert vocabulary.profile_indices({}) == [0, 0]
    assert vocabulary.feedback_indices([1.0, 2.5, 3.0, 3.5, 99.0]).tolist() == [1, 2, 2, 3, 3]
    assert [field.size for field in vocabulary.user_fields] == [3, 4]


def test_categories_fill_their_width_with_known_values_in_order() -> None:
    field = Field(name="genres", kind="categories", values=("Drama", "War", "Western"), width=2)
    assert field.indices(("War", "Sci-Fi", "Drama", "Western")) == [2, 1]
    assert field.indices(("Western",)) == [3, 0]
    assert field.indices("War") == [2, 0]
    assert field.indices(()) == field.indices(None) == [0, 0]


def test_a_vocabulary_comes_back_from_its_file(tmp_path: Path) -> None:
    vocabulary = fit(sample.generate(users=20, items=60, behaviors=400), sample.generate().behaviors).vocabulary
    path = tmp_path / "vocabulary.json"
    path.write_text(vocabulary.model_dump_json())
    assert Vocabulary.load(path) == vocabulary
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match=r"vocabulary\.json cannot be read"):
        Vocabulary.load(path)


def test_the_catalogue_is_whole_and_rare_items_share_row_0() -> None:
    dataset = dataset_of([{}, {}, {}], seen=[0, 0, 0, 2, 2, 7, 7, 7, 1])
    made = fit(dataset, dataset.behaviors, minimum_count=3)
    assert made.vocabulary.items == ("i0", "i1", "i2", "i7")
    assert made.item_table.tolist() == [[0], [1], [0], [0], [2]]


def test_only_the_training_part_is_looked_at() -> None:
    profiles: dict[str, Attributes] = {f"u{n}": {"job": "artist" if n < 6 else "pilot"} for n in range(12)}
    dataset = dataset_of([{}, {}], profiles, seen=[0] * 6 + [1] * 6)
    made = fit(dataset, dataset.behaviors[:6])
    assert [field.values for field in made.vocabulary.user_fields] == [("artist",)]
    assert made.item_table[:, 0].tolist() == [0, 1, 0]


def test_item_fields_by_type() -> None:
    attributes: list[Attributes] = [
        {"genres": ("Drama", "War"), "brand": "Acme", "year": 1990, "code": "c1", "same": 7},
        {"genres": ("Drama",), "brand": "Acme", "year": 1994, "code": "c2", "same": 7},
        {"genres": ("War", "Drama", "Rare"), "brand": "Other", "year": 1990, "code": "c3", "same": 7},
        {},
    ]
    dataset = dataset_of(attributes)
    made = fit(dataset, dataset.behaviors, minimum_count=2, minimum_category=2)
    assert made.vocabulary.item_fields == (
        Field(name="brand", kind="category", values=("Acme",)),
        Field(name="genres", kind="categories", values=("Drama", "War"), width=2),
        Field(name="year", kind="number", boundaries=(1992.0,)),
    )
    assert made.item_table.tolist() == [
        [0, 0, 0, 0, 0],
        [1, 1, 1, 2, 1],
        [0, 1, 1, 0, 2],
        [0, 0, 2, 1, 1],
        [0, 0, 0, 0, 0],
    ]


def test_width_is_capped() -> None:
    many = tuple(f"tag{n}" for n in range(20))
    dataset = dataset_of([{"tags": many}, {"tags": many}])
    made = fit(dataset, dataset.behaviors, minimum_category=2)
    assert made.vocabulary.item_fields[0].width == builder.MAX_WIDTH
    assert made.item_table.shape == (3, 1 + builder.MAX_WIDTH)


def test_a_multi_valued_profile_attribute_is_one_category() -> None:
    profiles: dict[str, Attributes] = {"u0": {"langs": ("de", "en")}, "u1": {"langs": ("de", "en")}}
    dataset = dataset_of([{}], profiles)
    vocabulary = fit(dataset, dataset.behaviors, minimum_category=2).vocabulary
    assert vocabulary.profile_indices({"langs": ("de", "en")}) == [1]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_numbers_fall_into_at_most_ten_buckets_none_empty(numbers: list[float]) -> None:
    dataset = dataset_of([{"size": number} for number in numbers])
    fields = fit(dataset, dataset.behaviors).vocabulary.item_fields
    if len(set(numbers)) == 1:
        assert fields == ()
        return
    (field,) = fields
    used = Counter(field.indices(number)[0] for number in numbers)
    assert set(used) == set(range(1, field.size))
    assert len(used) <= builder.MAX_BUCKETS


def test_many_numbers_are_spread_evenly() -> None:
    dataset = dataset_of([{"size": float(n) ** 3} for n in range(1000)])
    (field,) = fit(dataset, dataset.behaviors).vocabulary.item_fields
    used = Counter(field.indices(float(n) ** 3)[0] for n in range(1000))
    assert len(used) == builder.MAX_BUCKETS
    assert max(used.values()) - min(used.values()) <= 1


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    with pytest.raises(
        InvalidInputError, match=rf"size {number!r} of item 'i1' is not a finite number; .*leave it out"
    ):
        dataset_of([{"size": 1.0}, {"size": number}])
    with pytest.raises(InvalidInputError, match=rf"age {number!r} of user 'ann' is not a finite number"):
        dataset_of([{}], {"ann": {"age": number}})


values = st.one_of(
    st.none(),
    st.text(max_size=5),
    st.integers(),
    st.floats(),
    st.just(10**400),
    st.lists(st.sampled_from(["de", "en", "fr", "?"]), max_size=5).map(tuple),
)
fields = st.one_of(
    st.builds(Field, name=st.just("f"), kind=st.just("number"), boundaries=st.just((0.0, 10.0))),
    st.builds(Field, name=st.just("f"), kind=st.just("category"), values=st.just(("de", "de en", "1990"))),
    st.builds(
        Field,
        name=st.just("f"),
        kind=st.just("categories"),
        values=st.just(("de", "en", "fr")),
        width=st.integers(1, 3),
    ),
)


@given(fields, values)
@settings(max_examples=50)
def test_whatever_a_profile_holds_is_an_index_that_was_trained(field: Field, value: AttributeValue | None) -> None:
    """A value of the wrong type, or no number, is an unknown one and no error: scoring never fails for a profile."""
    indices = field.indices(value)
    assert len(indices) == field.width
    assert all(0 <= index < field.size for index in indices)
    if field.kind == "number" and isinstance(value, float) and not math.isfinite(value):
        assert indices == [0]


typed = st.one_of(
    st.lists(st.integers(-100, 100), min_size=6, max_size=30),
    st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=30),
    st.lists(st.sampled_from(["a", "b", "c d"]), min_size=6, max_size=30),
    st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=4).map(tuple), min_size=6, max_size=30),
)


@given(typed)
def test_training_and_serving_read_an_attribute_alike(column: list[AttributeValue]) -> None:
    """What the table of the training holds is what a bundle's vocabulary, back from its file, says of each value."""
    profiles: dict[str, Attributes] = {f"u{number}": {"f": value} for number, value in enumerate(column)}
    dataset = dataset_of([{"f": value} for value in column], profiles, seen=[0] * len(column))
    made = fit(dataset, dataset.behaviors, minimum_category=2)
    served = Vocabulary.model_validate_json(made.vocabulary.model_dump_json())
    assert served == made.vocabulary
    for row, value in enumerate(column, start=1):
        for field in served.item_fields:
            assert made.item_table[row, 1:].tolist() == field.indices(value)
        # As a store gives it back: through JSON, where a tuple is a list until it is read.
        kept = json.loads(json.dumps({"f": value}))
        profile = {name: tuple(each) if isinstance(each, list) else each for name, each in kept.items()}
        assert served.profile_indices(profile) == made.vocabulary.profile_indices({"f": value})
    # Each value that is frequent enough has an index of its own kind, the unknown one has none.
    for field in served.user_fields:
        joined = Counter(" ".join(value) if isinstance(value, tuple) else value for value in column)
        for value in column:
            count = joined[" ".join(value) if isinstance(value, tuple) else value]
            known = field.kind == "number" or count >= 2
            assert (field.indices(value) != [0]) == known


@pytest.mark.parametrize(("distinct", "buckets"), [(2, 2), (5, 5), (20, 20), (21, 10), (500, 10)])
def test_feedback_has_a_bucket_per_value_or_deciles(distinct: int, buckets: int) -> None:
    behaviors = [Behavior("u", "i0", float(value), float(value)) for value in range(distinct)]
    vocabulary = fit(dataset_of([{}]), behaviors).vocabulary
    used = vocabulary.feedback_indices([each.feedback for each in behaviors])
    assert sorted(set(used.tolist())) == list(range(1, buckets + 1))
    assert np.all(np.diff(used) >= 0)


@pytest.mark.parametrize(("feedback", "named"), [([], "no behavior"), ([4.0, 4.0], "only the value 4")])
def test_a_training_part_without_variety_is_named(feedback: list[float], named: str) -> None:
    training = [Behavior("u", "i0", value, float(n)) for n, value in enumerate(feedback)]
    with pytest.raises(InvalidInputError, match=named):
        fit(dataset_of([{}]), training)


def test_the_same_data_in_another_order_make_the_same_vocabulary() -> None:
    dataset = sample.generate(users=30, items=80, behaviors=900)
    first = fit(dataset, dataset.behaviors)
    shuffled = random.Random(0).sample(dataset.behaviors, len(dataset.behaviors))
    profiles = dict(reversed(dataset.profiles.items()))
    second = fit(Dataset(dataset.domain, dataset.behaviors, dataset.items, profiles), shuffled)
    assert first.vocabulary.model_dump_json() == second.vocabulary.model_dump_json()
    assert np.array_equal(first.item_table, second.item_table)
    assert first.item_table.dtype == np.int32
    assert first.item_table.shape[1] == 1 + sum(field.width for field in first.vocabulary.item_fields)
