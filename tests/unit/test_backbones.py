from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from model_harness import (
    ITEM_FIELDS,
    USER_FIELDS,
    D,
    draw_features,
    draw_inputs,
    export_flat,
    make_features_module,
    run_flat,
    unfold,
)
from torch import Tensor, nn

from builders.models import BACKBONES, functions, make_backbone
from builders.models.backbone import Backbone, Ranker
from builders.models.features import FeatureEmbedding, Features, FeatureSchema
from builders.models.fuser import AttentionFuser
from builders.models.layers import AUGRU, GRU
from liber_runtime.exceptions import ConfigurationError

every_backbone = pytest.mark.parametrize("name", list(BACKBONES))
SEQUENTIAL = ("DIN", "DIEN")
SCHEMA = FeatureSchema(
    candidate=("id", "year"),
    user=("age", "id of the history", "interest"),
    pair=("interest in the candidate",),
    numbers=("level", "count", "match"),
    history_length=5,
    embedding_dim=4,
)


def make(name: str, features: FeatureEmbedding, seed: int = 0) -> nn.Sequential:
    """Inputs to logits, ready to predict; a given interest is read without a fuser."""
    torch.manual_seed(seed)
    return nn.Sequential(features, make_backbone(name, features.schema)).eval()


@pytest.fixture(scope="module")
def features() -> FeatureEmbedding:
    # Not larger: the factorization machine's logits grow with the square and would leave float32's fifth decimal.
    return make_features_module(meeting=True, embedding_scale=0.5)


@every_backbone
def test_the_exported_graph_equals_pytorch(name: str, features: FeatureEmbedding, tmp_path: Path) -> None:
    model = make(name, features)
    session = export_flat(model, draw_inputs(features, 3, 5), tmp_path / "backbone.onnx")
    for users, candidates, history in ((1, 1, "full"), (1, 50, "empty"), (40, 7, "mixed"), (30, 200, "mixed")):
        inputs = draw_inputs(features, users, candidates, history=history)
        with torch.inference_mode():
            expected = model(inputs).numpy()
        found = run_flat(session, inputs)
        assert found.dtype == np.float32
        assert found.shape == (candidates,)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
        if candidates > 1:
            assert found.std() > 1e-3


@every_backbone
def test_folded_equals_unfolded(name: str, features: FeatureEmbedding) -> None:
    model = make(name, features)
    for users, candidates in ((1, 1), (3, 50), (40, 200)):
        inputs = draw_inputs(features, users, candidates)
        unfolded = unfold(inputs)
        with torch.inference_mode():
            folded = model(inputs)
            torch.testing.assert_close(folded, model(unfolded), atol=1e-5, rtol=0)
            in_order = unfolded._replace(user_index=torch.arange(candidates, dtype=torch.int32))
            torch.testing.assert_close(folded, model(in_order), atol=1e-5, rtol=0)


@every_backbone
def test_padding_never_changes_a_result(name: str, features: FeatureEmbedding) -> None:
    model, inputs = make(name, features), draw_inputs(features, 20, 60)
    padded = (torch.arange(features.schema.history_length) >= inputs.history_length[:, None]).int()
    assert padded.any()
    other = inputs._replace(
        history_item=inputs.history_item + 7 * padded, history_feedback=inputs.history_feedback + padded
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(other), model(inputs), atol=1e-6, rtol=0)


@every_backbone
def test_gradients_reach_every_parameter_and_every_feature(name: str) -> None:
    torch.manual_seed(0)
    model, features = make_backbone(name, SCHEMA).train(), draw_features(SCHEMA, 64)
    leaves = {part: getattr(features, part) for part in ("candidate", "user", "pair", "numbers", "history")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    logits = model(features)
    assert logits.shape == (64,)
    logits.square().sum().backward()
    untouched = [part for part, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    assert untouched == []
    history = leaves.pop("history").grad
    if name in SEQUENTIAL:
        assert history is not None
        torch.testing.assert_close(history.any(2), features.history_mask)
    else:
        assert history is None
    for part, leaf in leaves.items():
        assert leaf.grad is not None, part
        assert leaf.grad.flatten(1).any(0).all(), part


@every_backbone
def test_a_seed_decides_everything(name: str) -> None:
    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = make_backbone(name, SCHEMA).train()
        found: Tensor = model(draw_features(SCHEMA, 16, 30))
        return found

    torch.testing.assert_close(logits(1), logits(1), atol=0, rtol=0)
    assert (logits(1) != logits(2)).any()


@every_backbone
@pytest.mark.parametrize("without", ["interest", "profile", "attributes", "all of them"])
def test_fields_that_are_not_there_are_not_needed(name: str, without: str, tmp_path: Path) -> None:
    everything = without == "all of them"
    features = make_features_module(
        item_fields=() if everything or without == "attributes" else ITEM_FIELDS,
        user_fields=() if everything or without == "profile" else USER_FIELDS,
        interest_size=0 if everything or without == "interest" else D,
        embedding_scale=0.5,
    )
    assert features.schema.pair == ()
    model, inputs = make(name, features), draw_inputs(features, 4, 30)
    with torch.inference_mode():
        folded = model(inputs)
        torch.testing.assert_close(folded, model(unfold(inputs)), atol=1e-5, rtol=0)
    assert folded.std() > 1e-3
    if everything and name in ("LR", *SEQUENTIAL):  # all that a graph without them is built of
        session = export_flat(model, inputs, tmp_path / "backbone.onnx")
        np.testing.assert_allclose(run_flat(session, inputs), folded.numpy(), atol=1e-5, rtol=0)


@every_backbone
def test_what_depends_on_the_user_alone_runs_once_per_user(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every map of the user's fields or of the history sees U rows; only what mixes both sides sees N."""
    users, candidates = 3, 40
    model, rows, linear = make_backbone(name, SCHEMA).eval(), [], torch.nn.functional.linear

    def watch(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append((weight, inputs.shape[-2]))
        return linear(inputs, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    model(draw_features(SCHEMA, users, candidates))
    named = dict(model.named_modules())
    maps = {
        part: each.weight for part, each in named.items() if part.rpartition(".")[2] in ("user", "step", "taste", "key")
    }
    maps |= {part: each.weights()[0] for part, each in named.items() if isinstance(each, GRU | AUGRU)}
    assert len(maps) >= {"DIEN": 5, "DIN": 4}.get(name, 1)
    for part, weight in maps.items():
        seen = [count for mapped, count in rows if mapped.shape == weight.shape and torch.equal(mapped, weight)]
        assert seen == [users], part


@every_backbone
def test_a_backbone_obeys_the_protocol(name: str) -> None:
    assert isinstance(make_backbone(name, SCHEMA), Backbone)


def test_options_reach_the_backbone() -> None:
    model = make_backbone("DNN", SCHEMA, {"mlp_sizes": [7, 5], "dropout": 0.0})
    assert [tuple(each.shape) for each in model.parameters() if each.ndim == 2] == [(7, 12), (7, 15), (5, 7), (1, 5)]
    features = draw_features(SCHEMA, 8)
    torch.testing.assert_close(model.train()(features), model.eval()(features))


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "LR"])
def test_dropout_is_an_option_of_every_deep_backbone(name: str) -> None:
    features = draw_features(SCHEMA, 8)
    for dropout in (0.0, 0.5):
        model = make_backbone(name, SCHEMA, {"dropout": dropout})
        same = torch.allclose(model.train()(features), model.eval()(features))
        assert same == (dropout == 0.0)


class Own(nn.Module):
    """A backbone that a user brings."""

    def __init__(self, schema: FeatureSchema, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(len(schema.numbers), 1)

    def forward(self, features: Features) -> Tensor:
        logits: Tensor = self.scale * self.linear(features.numbers).squeeze(-1)
        return logits


class Broken(nn.Module):
    """One that cannot be made, whatever it is given."""

    def __init__(self, schema: FeatureSchema, *, scale: float = 1.0) -> None:
        raise KeyError(scale)


def test_a_backbone_of_your_own_is_found_by_its_name() -> None:
    model = make_backbone(f"{__name__}:Own", SCHEMA, {"scale": 0.0})
    assert isinstance(model, Own)
    assert not model(draw_features(SCHEMA, 3)).any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DeepFFM", {}, r"'DeepFFM' is unknown; there are LR, DNN, .*DIEN, or name your own as package.module:Class"),
        ("nowhere.models:Own", {}, r"'nowhere.models:Own' cannot be imported \(No module named 'nowhere'\)"),
        (f"{__name__}:Missing", {}, r"Missing' cannot be imported \(.*has no attribute 'Missing'\)"),
        (f"{__name__}:SCHEMA", {}, r"SCHEMA' is no torch.nn.Module"),
        ("builders.models.features:FeatureSchema", {}, r"is no torch.nn.Module; name a class that derives from it"),
        ("DCN", {"layers": 3, "depth": 1}, r"DCN has no option depth, layers; it has num_layers, mlp_sizes, dropout"),
        ("LR", {"dropout": 0.1}, r"LR has no option dropout; it has none"),
        (f"{__name__}:Own", {"bias": 1}, r"Own has no option bias; it has scale"),
    ],
)
def test_a_backbone_that_cannot_be_made_is_explained(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_backbone(name, SCHEMA, options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FiBiNet", {"bilinear": "x"}, r"FiBiNet cannot be made with bilinear='x' \(ValueError: .*'all' and 'each'\)"),
        ("FiBiNet", {"reduction": 0}, r"FiBiNet cannot be made with reduction=0 \(ZeroDivisionError"),
        ("DNN", {"mlp_sizes": []}, r"DNN cannot be made with mlp_sizes=\[\] \(IndexError"),
        (
            "DIEN",
            {"mlp_sizes": [8, "x"], "dropout": 0.1},
            r"DIEN .* with mlp_sizes=\[8, 'x'\], dropout=0.1 \(Type",
        ),
        ("DCN", {"num_layers": "two"}, r"DCN cannot be made with num_layers='two' \(TypeError"),
        ("xDeepFM", {"cin_sizes": [3, 3]}, r"xDeepFM cannot be made with cin_sizes=\[3, 3\] \(ValueError: .*\[3, 3\]"),
        ("DIN", {"attention_size": -1}, r"DIN cannot be made with attention_size=-1 \(RuntimeError"),
        ("AutoInt", {"dropout": 2.0}, r"AutoInt cannot be made with dropout=2.0 \(ValueError"),
        (f"{__name__}:Broken", {"scale": 3.0}, r":Broken cannot be made with scale=3.0 \(KeyError: 3.0\)"),
    ],
)
def test_values_that_an_option_cannot_have_are_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"backbone .*{message}.*; correct these options"):
        make_backbone(name, SCHEMA, options)


def test_an_error_that_is_not_of_the_options_is_left_as_it_is() -> None:
    with pytest.raises(KeyError, match=r"1\.0"):
        make_backbone(f"{__name__}:Broken", SCHEMA)


def test_logistic_regression_has_one_weight_per_index() -> None:
    """The logit moves by the same amount whenever one index replaces another, whatever stands beside it."""
    features = make_features_module(interest_size=0)
    model, inputs = make("LR", features), draw_inputs(features, 12, history="empty")
    age = features.profile_embedding.fields[0].table.weight
    weight = model[1].linear.user.weight[0, : features.schema.embedding_dim]
    ones, twos = inputs.profile.clone(), inputs.profile.clone()
    ones[:, 0], twos[:, 0] = 1, 2
    with torch.inference_mode():
        moved = model(inputs._replace(profile=twos)) - model(inputs._replace(profile=ones))
        torch.testing.assert_close(moved, ((age[2] - age[1]) @ weight).expand(12), atol=1e-5, rtol=0)


def test_the_scores_of_din_add_up_unless_they_are_normalized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same history weighs twice as much; normalized, it weighs the same."""
    torch.manual_seed(0)
    schema, size = SCHEMA, 16
    features = draw_features(schema, 6)
    once = torch.arange(schema.history_length)[:, None] < torch.full((6,), schema.history_length)
    history = torch.cat((features.history, features.history))
    for softmax in (False, True):
        model = make_backbone("DIN", schema, {"softmax": softmax, "attention_size": size}).eval()
        picked: list[Tensor] = []
        given = functions.local_activation
        monkeypatch.setattr(functions, "local_activation", lambda *a, _k=picked, _g=given, **o: _keep(_k, _g(*a, **o)))
        for steps, mask in ((features.history, once), (history, torch.cat((once, once)))):
            model(dataclasses.replace(features, history=steps, history_mask=mask, history_length=mask.sum(0)))
        torch.testing.assert_close(picked[1], picked[0] * (1 if softmax else 2))
        assert picked[0].abs().max() > 1e-3


def _keep(kept: list[Tensor], tensor: Tensor) -> Tensor:
    kept.append(tensor)
    return tensor


def test_fuser_and_features_must_agree_on_the_size() -> None:
    features = make_features_module(interest_size=4)
    with pytest.raises(ValueError, match="interest of 4, the fuser gives 5"):
        Ranker(features, make_backbone("DIEN", features.schema), AttentionFuser(5))
    with pytest.raises(ValueError, match="interest of 4, the fuser gives 0"):
        Ranker(features, make_backbone("DIEN", features.schema))


@every_backbone
def test_a_ranker_is_the_fuser_then_the_features_then_the_backbone(name: str) -> None:
    features = make_features_module()
    backbone, inputs = make_backbone(name, features.schema), draw_inputs(features, 3, 9)._replace(interest=None)
    model = Ranker(features, backbone, AttentionFuser(D)).eval()
    representations, mask = torch.randn(3, 2, D), torch.tensor([[True, True], [True, False], [False, False]])
    assert model.fuser is not None
    expected = backbone(features(inputs._replace(interest=model.fuser(representations, mask))))
    torch.testing.assert_close(model(inputs, representations, mask), expected)
    logits, loss = model.forward_with_auxiliary(inputs, representations, mask)
    torch.testing.assert_close(logits, expected)
    assert (loss > 0) == (name == "DIEN")
