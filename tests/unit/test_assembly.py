from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from model_harness import draw_inputs, run_flat

from builders.assembly import KNOWING, FittedFeatures, Fusion, fit_features, make_ranker, with_knowledge
from builders.datasets import Dataset, sample
from builders.export import export_backbone, export_fuser
from builders.hyperparameters import Hyperparameters
from builders.models.backbone import Ranker
from builders.models.fuser import AttentionFuser, Fuser, MeanFuser
from builders.models.numbers import Numbers
from builders.replay import Samples, Split, replay, split
from builders.statistics import compute_numbers
from builders.train import TrainingSettings
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.partition import Count

T, LOOKBACK, D, MINIMUM = 4, 9, 3, 5
SMALL = Hyperparameters(
    training=TrainingSettings(), embedding_dim=4, options={"mlp_sizes": [8], "hidden_size": 5, "attention_size": 4}
)


class Data(NamedTuple):
    dataset: Dataset
    samples: Samples
    split: Split
    fitted: FittedFeatures
    knowledge: npt.NDArray[np.float32]


def fit(dataset: Dataset, samples: Samples, parts: Split) -> FittedFeatures:
    return fit_features(dataset, samples, parts, history_length=T, lookback=LOOKBACK, seed=1)


@pytest.fixture(scope="module")
def data() -> Data:
    dataset = sample.generate(users=40, items=80, behaviors=1500)
    samples = replay(dataset, Count(MINIMUM), MINIMUM)
    parts = split(samples)
    fitted = fit(dataset, samples, parts)
    knowledge = np.random.default_rng(0).normal(size=(len(fitted.vocabulary.item_table), D)).astype(np.float32)
    knowledge[0] = 0
    return Data(dataset, samples, parts, fitted, knowledge)


@pytest.fixture(scope="module")
def knowing(data: Data) -> FittedFeatures:
    return with_knowledge(data.fitted, data.samples, data.split, data.knowledge)


def make(data: Data, fitted: FittedFeatures, fusion: Fusion, seed: int = 1, backbone: str = "DIEN") -> Ranker:
    knowledge = data.knowledge if fusion not in ("none", "paper") else None
    return make_ranker(backbone, fitted, SMALL, fusion=fusion, dimension=D, item_knowledge=knowledge, seed=seed)


# fitting


def test_features_are_fitted_on_what_is_before_the_test_part(data: Data) -> None:
    first = int(data.samples.behavior[data.split.test[0]])
    others = [
        dataclasses.replace(each, feedback=6 - each.feedback, item_id=("unseen", each.item_id)[at % 2])
        if at >= first
        else each
        for at, each in enumerate(data.dataset.behaviors)
    ]
    changed = dataclasses.replace(data.dataset, behaviors=others)
    samples = replay(changed, Count(MINIMUM), MINIMUM)
    assert (samples.label[data.split.test] != data.samples.label[data.split.test]).any()
    again = fit(changed, samples, data.split)
    assert "unseen" not in again.vocabulary.vocabulary.items
    assert again.vocabulary.vocabulary == data.fitted.vocabulary.vocabulary
    rows = data.split.training_part
    np.testing.assert_array_equal(again.numbers.values[rows], data.fitted.numbers.values[rows])
    for mine, theirs in zip(again.numbers.served.buffers(), data.fitted.numbers.served.buffers(), strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


def test_what_is_served_gives_the_numbers_of_the_test_part(data: Data, knowing: FittedFeatures) -> None:
    for fitted in (data.fitted, knowing):
        assert (fitted.history_length, fitted.lookback) == (T, LOOKBACK)
        assert fitted.numbers.served.recent == T
        served = compute_numbers(fitted.numbers.served, data.samples, data.split.test, fitted.vocabulary, LOOKBACK)
        np.testing.assert_allclose(served, fitted.numbers.values[data.split.test], atol=1e-4)


def test_without_knowledge_the_features_are_as_they_were(data: Data) -> None:
    assert with_knowledge(data.fitted, data.samples, data.split, None) is data.fitted


def test_knowledge_adds_numbers_and_changes_none(data: Data, knowing: FittedFeatures) -> None:
    assert data.fitted.numbers.served.names == Numbers.STATISTICAL
    assert knowing.numbers.served.names == Numbers.STATISTICAL + Numbers.KNOWING
    assert knowing.tables is data.fitted.tables
    assert knowing.vocabulary is data.fitted.vocabulary
    statistical = len(Numbers.STATISTICAL)
    np.testing.assert_allclose(knowing.numbers.values[:, :statistical], data.fitted.numbers.values, atol=1e-5)
    added = knowing.numbers.values[data.split.train, statistical:]
    np.testing.assert_allclose(added.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(added.std(0), 1, atol=1e-3)


# rankers

MATCH = ("interest in the candidate",)
EXPECTED: dict[Fusion, tuple[type[Fuser] | None, bool, tuple[str, ...]]] = {
    "none": (None, False, ()),
    "paper": (AttentionFuser, True, ()),
    "items": (None, False, ()),
    "matched": (AttentionFuser, True, MATCH),
    "mean": (MeanFuser, True, MATCH),
    "kar": (MeanFuser, False, ("knowledge of the user", "knowledge of the item")),
}
every_fusion = pytest.mark.parametrize("fusion", get_args(Fusion))


@every_fusion
def test_a_fusion_decides_which_fields_a_backbone_is_given(fusion: Fusion, data: Data, knowing: FittedFeatures) -> None:
    fuser, reads_interest, pair = EXPECTED[fusion]
    fitted = knowing if fusion in KNOWING else data.fitted
    ranker = make(data, fitted, fusion).eval()
    schema = ranker.features.schema
    assert type(ranker.fuser) is (fuser or type(None))
    assert ranker.features.interest_size == (D if fuser else 0)
    assert schema.pair == pair
    assert schema.user.count("interest") == reads_interest
    assert schema.numbers == fitted.numbers.served.names
    assert (schema.history_length, ranker.features.lookback, schema.embedding_dim) == (T, LOOKBACK, 4)

    inputs = draw_inputs(ranker.features, 3, 8)._replace(interest=None)
    representations, mask = torch.randn(3, 2, D), torch.tensor([[True, True], [True, False], [False, False]])
    with torch.inference_mode():
        found = ranker(inputs, representations, mask)
        assert found.shape == (8,)
        assert torch.isfinite(found).all()
        if fuser is None:
            torch.testing.assert_close(ranker(inputs), found)
        else:
            assert not torch.allclose(ranker(inputs, -representations, mask), found, atol=1e-7, rtol=0)


def test_no_fusion_takes_no_interest(data: Data) -> None:
    ranker = make(data, data.fitted, "none")
    inputs = draw_inputs(ranker.features, 3, 8)
    assert inputs.interest is None
    with pytest.raises(ValueError, match="take an interest of 0, but one is given"):
        ranker(inputs._replace(interest=torch.zeros(3, D)))


def test_the_knowledge_of_the_items_is_held_where_an_interest_meets_it(data: Data, knowing: FittedFeatures) -> None:
    ranker = make(data, knowing, "matched")
    np.testing.assert_array_equal(ranker.features.item_knowledge.numpy(), data.knowledge)
    assert "item_knowledge" not in dict(make(data, knowing, "items").features.named_buffers())
    with pytest.raises(ValueError, match="item_knowledge has shape None"):
        make_ranker("DNN", knowing, dataclasses.replace(SMALL, options={}), fusion="matched", dimension=D, seed=1)


@every_fusion
def test_a_seed_decides_the_weights_and_the_callers_random_state_stays(fusion: Fusion, data: Data) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = make(data, data.fitted, fusion, seed=1).state_dict()
    torch.testing.assert_close(torch.get_rng_state(), before, atol=0, rtol=0)
    torch.rand(5)
    same, other = (make(data, data.fitted, fusion, seed=seed).state_dict() for seed in (1, 2))
    assert list(one) == list(same) == list(other)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fusion", ["matched", "kar"])
def test_the_exported_graphs_of_a_ranker_equal_pytorch(
    fusion: Fusion, data: Data, knowing: FittedFeatures, tmp_path: Path
) -> None:
    """Fuser and backbone one after the other, as they are served; with users whose histories are longer than T."""
    fitted = knowing if fusion in KNOWING else data.fitted
    options = {"mlp_sizes": [8], "dropout": 0.0}
    ranker = make_ranker(
        "DNN",
        fitted,
        dataclasses.replace(SMALL, options=options),
        fusion=fusion,
        dimension=D,
        item_knowledge=data.knowledge,
        seed=1,
    ).eval()
    assert ranker.fuser is not None
    export_fuser(ranker.fuser, tmp_path / "fuser.onnx")
    export_backbone(ranker, tmp_path / "backbone.onnx")
    inputs = draw_inputs(ranker.features, 12, 50)
    lengths = inputs.history_length.tolist()
    assert 0 in lengths
    assert LOOKBACK in lengths
    assert any(T < length < LOOKBACK for length in lengths)
    representations, mask = torch.randn(12, 4, D), torch.arange(4) < torch.arange(12)[:, None] % 5
    with torch.inference_mode():
        expected = ranker(inputs, representations, mask).sigmoid().numpy()
    (interest,) = onnxruntime.InferenceSession(str(tmp_path / "fuser.onnx")).run(
        None, {"representations": representations[mask].numpy(), "partition_count": mask.sum(1).int().numpy()}
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "backbone.onnx"))
    served = inputs._replace(interest=torch.from_numpy(interest))
    np.testing.assert_allclose(run_flat(session, served), expected, atol=1e-5, rtol=0)
    assert np.abs(run_flat(session, inputs) - expected).max() > 1e-4  # which is of another interest


def test_hyperparameters_reach_features_and_backbone(data: Data) -> None:
    chosen = Hyperparameters(embedding_dim=6, dropout=0.25, id_dropout=0.15, options={"mlp_sizes": [9]})
    ranker = make_ranker("DNN", data.fitted, chosen, seed=1)
    assert ranker.features.schema.embedding_dim == 6
    assert ranker.features.dropout.p == 0.25
    assert ranker.features.item_embedding.id_dropout == 0.15
    assert ranker.backbone.mlp.candidate.out_features == 9


def test_an_option_that_cannot_be_is_named(data: Data) -> None:
    with pytest.raises(ConfigurationError, match=r"DNN cannot be made with mlp_sizes=\[\]"):
        make_ranker("DNN", data.fitted, dataclasses.replace(SMALL, options={"mlp_sizes": []}), seed=1)
