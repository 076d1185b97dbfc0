"""Folding: every candidate once, in order, within the limits, each with its own user."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liber_runtime.exceptions import InvalidInputError
from liber_runtime.scoring import FoldedCall, fold

IDS = st.sampled_from([f"u{number}" for number in range(8)] + ["é", "用户", "a b"])


def unfolded(calls: list[FoldedCall]) -> list[tuple[str, str]]:
    return [
        (call.user_ids[user], item)
        for call in calls
        for user, item in zip(call.user_index.tolist(), call.item_ids, strict=True)
    ]


@given(
    candidates=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=60),
    max_users=st.integers(1, 6),
    max_candidates=st.integers(1, 20),
)
def test_every_candidate_goes_out_once_and_in_order(
    candidates: list[tuple[str, str]], max_users: int, max_candidates: int
) -> None:
    calls = fold([user for user, _ in candidates], [item for _, item in candidates], max_users, max_candidates)
    assert unfolded(calls) == candidates
    for call in calls:
        assert 1 <= len(call.user_ids) <= max_users
        assert 1 <= len(call.item_ids) <= max_candidates
        assert len(set(call.user_ids)) == len(call.user_ids)
        assert call.user_index.dtype == np.int32
        assert set(call.user_index.tolist()) == set(range(len(call.user_ids)))


@given(
    candidates=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=60),
    max_users=st.integers(1, 6),
    max_candidates=st.integers(1, 20),
)
def test_a_call_is_cut_only_where_a_limit_is_met(
    candidates: list[tuple[str, str]], max_users: int, max_candidates: int
) -> None:
    calls = fold([user for user, _ in candidates], [item for _, item in candidates], max_users, max_candidates)
    for call, following in itertools.pairwise(calls):
        next_user = following.user_ids[following.user_index[0]]
        full = len(call.item_ids) == max_candidates
        crowded = len(call.user_ids) == max_users and next_user not in call.user_ids
        assert full or crowded


@given(items=st.lists(IDS, min_size=1, max_size=40), max_candidates=st.integers(1, 20))
def test_one_user_for_all_is_that_user_for_each(items: list[str], max_candidates: int) -> None:
    ranking = unfolded(fold("somebody", items, 4, max_candidates))
    assert ranking == unfolded(fold(["somebody"] * len(items), items, 4, max_candidates))


def test_a_call_within_the_limits_is_one_request() -> None:
    (call,) = fold(["a", "b", "a", "c", "b"], ["1", "2", "3", "4", "5"], 3, 5)
    assert call.user_ids == ("a", "b", "c")
    assert call.item_ids == ("1", "2", "3", "4", "5")
    assert call.user_index.tolist() == [0, 1, 0, 2, 1]


def test_an_id_that_cannot_be_sent_is_refused_wherever_it_stands() -> None:
    with pytest.raises(InvalidInputError, match="user id is empty"):
        fold(["a", "b", ""], ["1", "2", "3"], 1, 1)
    with pytest.raises(InvalidInputError, match="item id None is a NoneType"):
        fold("a", ["1", "2", None], 1, 1)  # type: ignore[list-item]
