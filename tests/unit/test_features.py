from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_harness import (
    EMBEDDING_DIM,
    ITEM_FIELDS,
    ITEMS,
    USER_FIELDS,
    T,
    draw_inputs,
    make_features_module,
    make_item_table,
    make_vocabulary,
)

from builders.models.features import FeatureEmbedding, ItemEmbedding
from builders.models.numbers import Numbers


def test_the_schema_names_what_the_features_hold() -> None:
    features = make_features_module(meeting=True)
    schema, found = features.schema, features(draw_inputs(features, 3, 8))
    assert schema.candidate == ("id", "year", "genres")
    assert schema.user[:2] == ("age", "sex")
    assert schema.user[-1] == "interest"
    assert schema.pair == ("interest in the candidate",)
    assert schema.numbers == features.numbers.names == Numbers.STATISTICAL
    assert schema.fields == schema.candidate + schema.pair + schema.user
    assert found.candidate.shape == (8, len(schema.candidate), EMBEDDING_DIM)
    assert found.user.shape == (3, len(schema.user), EMBEDDING_DIM)
    assert found.pair.shape == (8, len(schema.pair), EMBEDDING_DIM)
    assert found.numbers.shape == (8, len(schema.numbers))
    assert found.history.shape == (T, 3, schema.step_size)
    assert found.history_mask.shape == (T, 3)
    assert found.fields().shape == (8, len(schema.fields), EMBEDDING_DIM)


@given(seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=25)
def test_padding_changes_nothing_but_the_padded_steps(seed: int) -> None:
    features = make_features_module()
    inputs = draw_inputs(features, 5, 20, seed=seed)
    padded = torch.arange(T) >= inputs.history_length[:, None]
    garbage = torch.randint(1, ITEMS + 1, padded.shape, generator=torch.Generator().manual_seed(seed))
    other = inputs._replace(
        history_item=torch.where(padded, garbage.int(), inputs.history_item),
        history_feedback=inputs.history_feedback + padded.int(),
    )
    with torch.inference_mode():
        expected, found = features(inputs), features(other)
    for part in ("candidate", "user", "pair", "numbers", "history_mask"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), atol=1e-6, rtol=0)
    real = expected.history_mask
    torch.testing.assert_close(found.history[real], expected.history[real])


@given(seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=25)
def test_a_long_history_gives_the_features_of_its_newest_steps(seed: int) -> None:
    """With the numbers given: they alone look back further."""
    lookback = 2 * T + 3
    features = make_features_module(meeting=True, lookback=lookback)
    inputs = draw_inputs(features, 5, 20, seed=seed)
    assert inputs.history_item.shape == (5, lookback)
    newest = [slice(max(length - T, 0), max(length, T)) for length in inputs.history_length.tolist()]
    short = inputs._replace(
        history_item=torch.stack([row[kept] for row, kept in zip(inputs.history_item, newest, strict=True)]),
        history_feedback=torch.stack([row[kept] for row, kept in zip(inputs.history_feedback, newest, strict=True)]),
        history_length=inputs.history_length.clamp(max=T),
    )
    numbers = torch.randn(20, len(features.schema.numbers))
    with torch.inference_mode():
        found = features(inputs._replace(numbers=numbers))
        expected = features(short._replace(numbers=numbers))
        differ = features.numbers(inputs) != features.numbers(short)
    for part in ("candidate", "user", "pair", "numbers", "history", "history_mask", "user_index"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), atol=1e-6, rtol=0)
    assert found.history.shape == (T, 5, features.schema.step_size)
    assert inputs.user_index is not None
    if (inputs.user_index == 0).any():  # whose history is full
        assert differ.any()


def test_an_interest_is_given_where_one_is_read_and_nowhere_else() -> None:
    base, liber = make_features_module(interest_size=0), make_features_module()
    assert "interest" not in base.schema.user
    inputs = draw_inputs(liber, 3, 5)
    with pytest.raises(ValueError, match="interest of 0, but one is given"):
        base(inputs)
    with pytest.raises(ValueError, match="interest of 4, but none is given"):
        liber(inputs._replace(interest=None))


def test_a_meeting_needs_knowledge_of_every_item() -> None:
    features = make_features_module(meeting=True)
    vocabulary = make_vocabulary()
    for knowledge, said in ((None, "None"), (np.zeros((3, 4), dtype=np.float32), r"\(3, 4\)")):
        with pytest.raises(ValueError, match=rf"item_knowledge has shape {said}; \(31, 4\) is needed"):
            FeatureEmbedding(
                vocabulary,
                make_item_table(vocabulary),
                features.numbers,
                history_length=T,
                interest_size=4,
                meeting=features.meeting,
                item_knowledge=knowledge,
            )


def test_items_embed_alike_one_by_one_and_in_bulk() -> None:
    torch.manual_seed(0)
    vocabulary = make_vocabulary()
    layer = ItemEmbedding(make_item_table(vocabulary), vocabulary, embedding_dim=4).eval()
    index = torch.arange(ITEMS + 1, dtype=torch.int32).repeat(3)
    bulk = layer(index)
    torch.testing.assert_close(bulk, torch.cat([layer(each) for each in index.split(1)]))
    torch.testing.assert_close(bulk[: ITEMS + 1], layer.catalogue())


def test_dropped_ids_become_the_out_of_vocabulary_row() -> None:
    vocabulary = make_vocabulary(item_fields=())
    layer = ItemEmbedding(make_item_table(vocabulary), vocabulary, embedding_dim=4, id_dropout=1.0)
    index = torch.tensor([5, 9])
    assert not torch.equal(layer.eval()(index)[0], layer(index)[1])
    dropped = layer.train()(index)
    torch.testing.assert_close(dropped, layer.id.table.weight[[0, 0]])


def test_a_table_of_the_wrong_width_is_refused() -> None:
    vocabulary = make_vocabulary(ITEM_FIELDS, USER_FIELDS)
    with pytest.raises(ValueError, match="3 columns; 1 \\+ 3"):
        ItemEmbedding(make_item_table(vocabulary)[:, :3], vocabulary, embedding_dim=4)
