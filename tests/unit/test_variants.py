from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from builders import replay as replaying
from builders.datasets import Dataset, load, sample
from builders.replay import Samples, replay
from builders.variants import (
    VARIANTS,
    Plan,
    SampleVectors,
    Variant,
    calls_per_user,
    find_variant,
    plan,
    sample_vectors,
    write_pairs,
)
from liber_runtime.behavior import Behavior, Item
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.interest import Prompt, SummaryPrompt
from liber_runtime.memory.sqlite import SQLiteStore
from liber_runtime.partition import AnyOf, Count, PartitionCondition, TimeGap
from liber_runtime.representation import Encoded
from liber_runtime.worker import Worker
from liber_runtime.writers import Completion
from liber_runtime.writers.statistical import StatisticalWriter, summarize

LIBER_DATA = os.environ.get("LIBER_DATA", "")
needs_movielens = pytest.mark.skipif(not LIBER_DATA, reason="LIBER_DATA does not name a MovieLens-100K directory")

ONE_TEXT = ("no_partition", "length20", "length100", "kar")


def dataset_of(events: list[tuple[int, int]]) -> Dataset:
    behaviors = [Behavior(f"u{user}", f"i{n % 3}", 1 + n % 5, time, f"e{n}") for n, (user, time) in enumerate(events)]
    return Dataset(sample.DOMAIN, behaviors, {}, {})


datasets = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200)), min_size=1, max_size=80).map(dataset_of)
conditions = st.one_of(
    st.builds(Count, st.integers(1, 6)),
    st.builds(TimeGap, st.integers(1, 20)),
    st.builds(AnyOf, st.builds(Count, st.integers(1, 6)), st.builds(TimeGap, st.integers(1, 20))),
)
variants = st.one_of(
    st.sampled_from(list(VARIANTS.values())), st.builds(Variant, window=st.integers(1, 9), is_renewed=st.booleans())
)


def replayed(dataset: Dataset, condition: PartitionCondition, minimum: int) -> Samples:
    counts = [sum(each.user_id == f"u{user}" for each in dataset.behaviors) for user in range(4)]
    assume(max(counts) > minimum)
    return replay(dataset, condition, minimum)


def seen(planned: Plan, place: int) -> list[int]:
    start = int(planned.start[place])
    return list(range(start, start + int(planned.count[place])))


@settings(max_examples=50)
@given(variants, datasets, conditions, st.integers(0, 8), st.integers(1, 9), st.data())
def test_no_sample_sees_a_text_of_behaviors_at_or_after_it(
    variant: Variant,
    dataset: Dataset,
    condition: PartitionCondition,
    minimum: int,
    refresh: int,
    data: st.DataObject,
) -> None:
    samples = replayed(dataset, condition, minimum)
    rows = np.array(data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=20)), dtype=np.int64)
    planned = plan(variant, samples, rows, refresh)
    assert planned.start.dtype == np.int64
    assert planned.user.dtype == planned.first.dtype == planned.end.dtype == planned.count.dtype == np.int32
    for place, row in enumerate(rows):
        for text in seen(planned, place):
            assert planned.user[text] == samples.user[row]
            assert 0 <= planned.first[text] < planned.end[text] <= samples.position[row]
    # What nobody sees is not paid for.
    assert {text for place in range(len(rows)) for text in seen(planned, place)} == set(range(len(planned.user)))
    assert np.all(np.diff(planned.user) >= 0)


@given(st.integers(1, 9), st.booleans(), datasets, st.integers(0, 8), st.integers(1, 9))
def test_one_text_is_the_newest_of_its_window_and_as_fresh_as_agreed(
    window: int, is_renewed: bool, dataset: Dataset, minimum: int, refresh: int
) -> None:
    samples = replayed(dataset, Count(5), minimum)
    for variant in (Variant(window=window, is_renewed=is_renewed), Variant(is_renewed=is_renewed)):
        planned = plan(variant, samples, refresh=refresh)
        for row in range(len(samples)):
            position = int(samples.position[row])
            end = minimum + (position - minimum) // refresh * refresh if is_renewed else minimum
            assert planned.count[row] == (end > 0)
            for text in seen(planned, row):
                assert planned.end[text] == end
                assert planned.first[text] == (max(end - window, 0) if variant.window else 0)


@settings(max_examples=50)
@given(datasets, conditions, st.integers(0, 8))
def test_a_text_per_partition_is_of_the_partitions_that_a_sample_sees(
    dataset: Dataset, condition: PartitionCondition, minimum: int
) -> None:
    samples = replayed(dataset, condition, minimum)
    planned = plan(VARIANTS["liber"], samples)
    boundaries = samples.boundaries
    for row in range(len(samples)):
        begin = boundaries.offsets[samples.user[row]]
        partitions = slice(begin, begin + samples.partitions[row])
        texts = seen(planned, row)
        assert planned.first[texts].tolist() == boundaries.start[partitions].tolist()
        assert planned.end[texts].tolist() == boundaries.end[partitions].tolist()


@settings(max_examples=50)
@given(datasets, conditions, st.integers(0, 8))
def test_calls_are_counted_as_the_replay_counts_them(
    dataset: Dataset, condition: PartitionCondition, minimum: int
) -> None:
    samples = replayed(dataset, condition, minimum)
    assert calls_per_user(VARIANTS["liber"], samples) == pytest.approx(replaying.calls_per_user(samples))


def test_a_text_for_every_sample_costs_a_call_for_every_sample() -> None:
    samples = replay(dataset_of([(n % 3, n) for n in range(90)]), Count(20), minimum=20)
    for name in ("no_partition", "length20", "length100"):
        assert plan(VARIANTS[name], samples, refresh=1).calls == len(samples) == 30
        assert plan(VARIANTS[name], samples, refresh=5).calls == 6
        assert plan(VARIANTS[name], samples).calls == 3
    assert plan(VARIANTS["kar"], samples).calls == 3


@needs_movielens
def test_movielens_100k_makes_the_calls_of_table_6() -> None:
    samples = replay(load(LIBER_DATA), Count(20))
    assert round(calls_per_user(VARIANTS["liber"], samples), 2) == 8.96
    assert round(calls_per_user(VARIANTS["no_shift"], samples), 2) == 4.98
    for name in ("length20", "length100", "no_partition"):
        # 81,140 samples of 911 users; the paper's 89.06 is this, cut.
        assert round(calls_per_user(VARIANTS[name], samples, refresh=1), 2) == 89.07
        assert calls_per_user(VARIANTS[name], samples) == calls_per_user(VARIANTS["no_shift"], samples)
    assert calls_per_user(VARIANTS["kar"], samples) == 1


class CountingWriter(StatisticalWriter):
    """The statistical writer, and what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    async def write(self, prompt: Prompt) -> Completion:
        self.prompts.append(prompt)
        return await super().write(prompt)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    generated = sample.generate(seed=5, users=8, items=160, behaviors=640)
    items = dict(list(generated.items.items())[1:])  # One item is known to the log alone.
    return replace(generated, items=items)


@pytest.fixture(scope="module")
def samples(dataset: Dataset) -> Samples:
    return replay(dataset, Count(20))


def prompt_before(dataset: Dataset, user: str, end: int, window: int | None) -> SummaryPrompt:
    """Straight from the log: the newest `window` of the user's first `end` behaviors."""
    behaviors = [each for each in dataset.behaviors if each.user_id == user][:end][-(window or end) :]
    history = tuple(
        (dataset.items.get(each.item_id, Item(each.item_id, each.item_id)), each.feedback) for each in behaviors
    )
    return SummaryPrompt(dataset.domain, dataset.profiles.get(user, {}), history)


@pytest.mark.parametrize("name", ONE_TEXT)
def test_one_text_is_what_the_writer_makes_of_the_behaviors_before(
    name: str, dataset: Dataset, samples: Samples, tmp_path: Path
) -> None:
    variant = VARIANTS[name]
    planned = plan(variant, samples, refresh=7)
    pairs = write_pairs(planned, dataset, samples, StatisticalWriter(), tmp_path)
    assert len(samples) > 100
    for row in range(len(samples)):
        (text,) = seen(planned, row)
        position = int(samples.position[row])
        end = position - (position - 20) % 7 if variant.is_renewed else 20
        user = samples.user_ids[samples.user[row]]
        assert pairs[text] == (summarize(prompt_before(dataset, user, end, variant.window)), "")


def test_liber_is_what_a_worker_writes_into_a_store(dataset: Dataset, samples: Samples, tmp_path: Path) -> None:
    with_store = SQLiteStore(tmp_path / "memory.db", Count(20))
    with_store.describe(dataset.domain, dataset.items.values(), dataset.profiles)
    with_store.append(dataset.behaviors)
    asyncio.run(Worker(with_store, StatisticalWriter(), None).drain())
    planned = plan(VARIANTS["liber"], samples)
    pairs = write_pairs(planned, dataset, samples, StatisticalWriter(), tmp_path)
    for user in np.unique(planned.user):
        timeline = with_store.timeline(samples.user_ids[user])
        assert timeline is not None
        written = [pairs[row] for row in np.flatnonzero(planned.user == user)]
        stored = [
            (record.summary.text if record.summary else "", record.shift.text if record.shift else "")
            for record in timeline.partitions
        ]
        assert written == stored[: len(written)]
    with_store.close()
    assert len(pairs) > 20


def test_variants_share_what_is_written(dataset: Dataset, samples: Samples, tmp_path: Path) -> None:
    def asked(name: str) -> int:
        writer = CountingWriter()
        write_pairs(plan(VARIANTS[name], samples), dataset, samples, writer, tmp_path)
        return len(writer.prompts)

    assert asked("liber") == plan(VARIANTS["liber"], samples).calls
    # Their texts are LIBER's: under count(20) the newest 20 behaviors are a partition.
    for name in ("liber", "no_shift", "mean_fusion", "length20", "kar"):
        assert asked(name) == 0
    assert 0 < asked("no_partition") < plan(VARIANTS["no_partition"], samples).calls


class TextEncoder:
    """Vectors of the lengths of both texts."""

    async def fingerprint(self) -> str:
        return "lengths"

    async def encode(self, pairs: Sequence[tuple[str, str]]) -> Encoded:
        return Encoded(np.array([[len(summary), len(shift)] for summary, shift in pairs], dtype=np.float32), "lengths")


@pytest.mark.parametrize("name", list(VARIANTS))
def test_samples_see_the_vectors_of_their_texts(name: str, dataset: Dataset, samples: Samples, tmp_path: Path) -> None:
    rows = np.arange(len(samples) - 1, 0, -3, dtype=np.int64)

    def make() -> SampleVectors:
        return sample_vectors(
            VARIANTS[name], dataset, samples, rows, StatisticalWriter(), TextEncoder(), tmp_path, refresh=5
        )

    vectors, planned = make(), plan(VARIANTS[name], samples, rows, refresh=5)
    pairs = write_pairs(planned, dataset, samples, StatisticalWriter(), tmp_path)
    assert vectors.representations.dtype == np.float32
    assert vectors.representations.tolist() == [[len(summary), len(shift)] for summary, shift in pairs]
    assert vectors.start.tolist() == planned.start.tolist()
    assert vectors.count.tolist() == planned.count.tolist()
    assert min(vectors.count) == 1
    again = make()
    for column in ("representations", "start", "count"):
        np.testing.assert_array_equal(getattr(again, column), getattr(vectors, column))


def test_what_cannot_be_written_is_named(dataset: Dataset, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="variant 'length30' is unknown; there are liber, no_shift"):
        find_variant("length30")
    assert find_variant("kar") is VARIANTS["kar"]
    with pytest.raises(ConfigurationError, match="refresh 0 is not"):
        plan(VARIANTS["length20"], samples, refresh=0)
    from_the_start = replay(dataset, Count(20), minimum=0)
    with pytest.raises(ConfigurationError, match="none of 5 samples sees a text"):
        sample_vectors(
            VARIANTS["liber"], dataset, from_the_start, np.arange(5), StatisticalWriter(), TextEncoder(), tmp_path
        )
