"""What the benchmark of latency computes from what it times: floors, comparisons, figures, tables."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
import torch
from model_harness import draw_inputs, make_features_module, make_statistics
from torch.utils.flop_counter import FlopCounterMode

from bench.engines import Engine, Question, unfold
from bench.floor import count_flops
from bench.inference_latency import main, make_plan, parse_arguments
from bench.latency_runs import QUICK, Plan, Row, take
from bench.latency_table import compare_with_targets, draw, paper_row, write_markdown
from bench.plot import draw_bars
from bench.race import Limits, compare, race
from builders.models import BACKBONES, make_backbone
from builders.models.backbone import Ranker
from builders.models.fuser import AttentionFuser
from builders.models.numbers import Numbers
from liber_runtime.exceptions import ConfigurationError, LiberError


def make_ranker(backbone: str, *, liber: bool) -> Ranker:
    features = make_features_module(meeting=True) if liber else make_features_module(interest_size=0)
    if liber:
        features.numbers = Numbers(make_statistics(), features.schema.history_length, features.item_knowledge.numpy())
        features.schema = dataclasses.replace(features.schema, numbers=features.numbers.names)
    fuser = AttentionFuser(features.interest_size) if liber else None
    return Ranker(features, make_backbone(backbone, features.schema), fuser).eval()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_floor_counts_the_matrix_products_that_are_run(backbone: str) -> None:
    for liber, (users, candidates) in itertools.product((True, False), ((1, 9), (7, 9))):
        ranker = make_ranker(backbone, liber=liber)
        inputs = draw_inputs(ranker.features, users, candidates)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            ranker.backbone(ranker.features(inputs))
        counted = count_flops(ranker, users, candidates)
        if backbone == "DCN":  # the counter does not see a matrix times a vector
            size = sum(weight.numel() for weight in ranker.backbone.cross.weights)  # type: ignore[union-attr]
            counted -= 2 * size * candidates
        assert counted == counter.get_total_flops()


def test_the_floor_of_an_unknown_backbone_is_refused() -> None:
    ranker = make_ranker("LR", liber=False)
    ranker.backbone = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigurationError, match="the floor of a Linear is not known"):
        count_flops(ranker, 1, 1)


def answering(*probabilities: float, liber: bool = True, **kind: Any) -> Engine:
    answer = np.array(probabilities, dtype=np.float32)
    return Engine(kind.pop("name", "some"), "in_process", lambda: answer, liber, **kind)


def compare_all(*engines: Engine) -> list[float | None]:
    return compare(engines, [engine.call() for engine in engines])


def test_engines_with_the_same_weights_must_agree() -> None:
    same = answering(0.5, 0.25), answering(0.5, 0.250001)
    assert compare_all(*same) == [0.0, pytest.approx(1e-6, rel=0.1)]
    with pytest.raises(LiberError, match=r"odd \(in_process\) differs by 0.001 from the engines with the same weights"):
        compare_all(*same, answering(0.501, 0.25, name="odd"))


def test_engines_that_read_other_inputs_or_weights_are_not_compared() -> None:
    engines = answering(0.5), answering(0.6, liber=False), answering(0.7, comparable=False), answering(0.6, liber=False)
    assert compare_all(*engines) == [0.0, 0.0, None, 0.0]


def test_a_reduced_precision_may_differ_and_says_by_how_much() -> None:
    assert compare_all(answering(0.5), answering(0.75, precision="int8")) == [0.0, 0.25]


@pytest.mark.parametrize("wrong", [float("nan"), -0.1, 1.5])
def test_what_is_no_probability_is_refused_of_any_engine(wrong: float) -> None:
    with pytest.raises(LiberError, match="no probability"):
        compare_all(answering(wrong, comparable=False))


def test_engines_take_turns_until_the_limits() -> None:
    calls: list[str] = []

    def engine(name: str) -> Engine:
        def call() -> Any:
            calls.append(name)
            return np.array([0.5], dtype=np.float32)

        return Engine(name, "in_process", call, True, single=call)

    first, second = race([engine("a"), engine("b")], Limits(0.0, least=4, most=9))
    assert len(first.seconds) == len(second.seconds) == 4
    assert "".join(calls[: 4 + 8]) == "abab" + "abbaabba"
    assert first.cpu_seconds is not None
    assert first.rss_bytes is None
    assert race([engine("a")], Limits(60.0, least=1, most=3))[0].seconds.shape == (3,)


TENSORS = {
    "item_index": np.array([[4, 5, 6]]),
    "user_index": np.array([[0, 1, 2]]),
    "history_item": np.array([[[1], [2], [3]]]),
    "history_length": np.array([[1, 1, 0]]),
}


def test_unfolding_gives_every_candidate_a_row_of_its_user() -> None:
    folded = {**TENSORS, "user_index": np.array([[2, 0, 2]])}
    rows = unfold(folded)
    assert rows["history_item"].tolist() == [[3], [1], [3]]
    assert rows["history_length"].tolist() == [0, 1, 0]
    assert rows["item_index"].tolist() == [4, 5, 6]
    assert "user_index" not in rows


def test_more_samples_are_the_same_ones_again() -> None:
    distinct = take(TENSORS, "distinct_users", 5)
    assert distinct["item_index"].tolist() == [[4, 5, 6, 4, 5]]
    assert distinct["user_index"].tolist() == [[0, 1, 2, 3, 4]]
    assert distinct["history_item"].tolist() == [[[1], [2], [3], [1], [2]]]
    one = take(TENSORS, "one_user", 2)
    assert one["item_index"].tolist() == [[4, 5]]
    assert one["user_index"].tolist() == [[0, 0]]
    assert one["history_length"].tolist() == [[1]]


def test_a_question_is_folded_by_user() -> None:
    question = Question("folded", ("a", "b", "a"), ("x", "y", "z"))
    tensors = question.tensors()
    assert (question.users, question.candidates) == (2, 3)
    assert tensors["user_id"].tolist() == [[b"a", b"b"]]
    assert tensors["user_index"].tolist() == [[0, 1, 0]]


def row(engine: str, p50_ms: float, **other: Any) -> Row:
    return {
        "model": "DIEN",
        "engine": engine,
        "path": "in_process",
        "shape": "distinct_users",
        "users": 1000,
        "candidates": 1000,
        "history": 20,
        "liber": True,
        "precision": "fp32",
        "device": "cpu",
        "p50_ms": p50_ms,
        "p99_ms": p50_ms + 1,
        "cpu_ms": None,
        "floor_ms": 10.0,
        "rss_mib": None,
        "usd_per_million": 0.5,
        "part": "served",
        **other,
    }


ROWS = [
    row("liber_graph", 14.0),
    row("liber_graph", 4.0, shape="one_user", users=1, floor_ms=1.0),
    row("deepctr_torch", 80.0, floor_ms=None),
    row("onnx_export", 21.0),
    row("liber", 20.0),
    row("liber", 22.0, path="grpc", ratio_to_backbone=1.02),
    row("liber", 22.0, path="grpc", liber=False),
    row("liber", 2.0, path="grpc", shape="single", users=1, candidates=1, ratio_to_backbone=1.5),
    *(row("liber_graph", ms, history=steps) for steps, ms in ((50, 29.0), (100, 80.0))),
    *(row("liber_graph", ms, part="samples", candidates=count) for count, ms in ((1000, 14.0), (4000, 58.8))),
    *(row("liber", ms, part="catalogue", items=items) for items, ms in ((10_000, 10.0), (1_000_000, 12.0))),
]


def test_figures_are_met_or_missed() -> None:
    figures = {each["figure"]: each for each in compare_with_targets(ROWS)}
    of = "DIEN + LIBER, T=20"
    expected = {
        f"{of}, distinct users: deepctr_torch / liber_graph": (5.7143, ">= 5", True),
        f"{of}, distinct users: onnx_export / liber_graph": (1.5, ">= 2", False),
        f"{of}, distinct users: liber_graph / floor": (1.4, "<= 1.5", True),
        f"{of}: distinct users / one user, liber_graph": (3.5, ">= 3", True),
        f"{of}, one user: liber_graph / floor": (4.0, "<= 2.5", False),
        f"{of}, distinct_users: gRPC / in process": (1.1, "<= 1.15", True),
        f"{of}, a single sample through gRPC, ms": (2.0, "<= 1.5", False),
        "DIEN, T=20, distinct_users: LIBER / its backbone through gRPC": (1.02, "<= 1.03", True),
        "DIEN + LIBER, distinct_users: time for each sample, 4000 against 1000": (1.05, "<= 1.1", True),
        "DIEN + LIBER, distinct_users: T=100 against the line through 20 and 50": (1.4815, "<= 1.1", False),
        "DIEN + LIBER, distinct_users, liber in process: 10000 to 1000000 items, slowest / fastest": (
            1.2,
            "<= 1.3",
            True,
        ),
    }
    assert {name: (each["value"], each["target"], each["met"]) for name, each in figures.items()} == expected


def test_what_was_not_measured_is_no_figure() -> None:
    assert compare_with_targets([]) == []
    assert len(compare_with_targets(ROWS[:1])) == 1


def test_the_paper_is_beside_the_figures() -> None:
    paper = paper_row()
    assert paper["ms_per_1000"] == {"TALLRec": 9960.0, "DIEN": 83.8, "KAR": 91.2, "LIBER": 96.1}
    assert paper["liber_over_backbone"] == 1.147


def test_the_table_has_every_row_and_says_what_was_left_out() -> None:
    text = write_markdown(
        {
            "rows": ROWS,
            "ratios": compare_with_targets(ROWS),
            "paper": paper_row(),
            "machine": {"cpu": "some", "cores": 2, "memory_gib": 8, "platform": "Linux"},
            "gemm_gflops": 200.0,
            "kernels": None,
            "usd_per_hour": 0.1,
            "seed": 1,
            "notes": ["DIEN, T=20: no int8: why"],
        }
    )
    tables = [line for line in text.splitlines() if line.startswith("| distinct_users") or "distinct_users |" in line]
    assert len(tables) == sum(each["shape"] == "distinct_users" for each in ROWS)
    assert "| distinct_users | 1000 | 1000 | deepctr-torch 0.3.0 eager | in_process | with | 80 | 81 |" in text
    assert "| 1,000,000 | distinct_users | liber | 12 | 13 | 10 |" in text
    assert "- DIEN, T=20: no int8: why" in text
    assert "LIBER / DIEN 1.147" in text


def test_the_plot_draws_the_engines_of_the_papers_shape() -> None:
    plot = ElementTree.fromstring(draw(ROWS))
    texts = [element.text for element in plot.iter("{http://www.w3.org/2000/svg}text")]
    assert "FLOP floor 10" in texts
    bars = plot.findall("{http://www.w3.org/2000/svg}rect")[1:]
    assert len(bars) == 5
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == sorted(widths)
    assert draw([]) == ""


def test_a_name_in_a_plot_of_bars_is_text() -> None:
    plot = ElementTree.fromstring(draw_bars([("<b>", 1.0)], title="&", limit=2.0, limit_name="<"))
    assert [element.text for element in plot.iter("{http://www.w3.org/2000/svg}text")] == ["&", "<b>", "1", "< 2"]


def test_parts_are_chosen_by_a_pattern() -> None:
    assert Plan(only="DIEN-*").parts() == ["DIEN-20", "DIEN-50", "DIEN-100"]
    assert QUICK.parts() == ["DIEN-20", "samples", "partitions", "catalogue"]
    assert len(Plan().parts()) == 3 + 9 + 3
    with pytest.raises(ConfigurationError, match="--only 'dien' matches none of the parts: DIEN-20"):
        Plan(only="dien").parts()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "paper"], "--only 'paper' matches none of the parts: DIEN-20, DIEN-50, DIEN-100, LR-20"),
        (["--histories", "20,x"], "--histories '20,x' is not understood; write positive numbers, e.g. 20,50"),
        (["--backbones", "DEIN"], "backbone 'DEIN' is unknown; there are LR, DNN"),
        pytest.param(
            ["--device", "cuda"],
            "this machine has no CUDA device that PyTorch can use; measure with --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.inference_latency", *arguments])
    with pytest.raises(ConfigurationError, match=f"^{re.escape(said)}"):
        main()


def test_sizes_and_lengths_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "--quick",
        "--hidden",
        "32",
        "--mlp",
        "100,50",
        "--histories",
        "5",
        "--backbones",
        "DIEN,LR",
        "--price",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["bench.inference_latency", *given])
    plan = make_plan(parse_arguments())
    assert plan.sizes == dataclasses.replace(QUICK.sizes, hidden_size=32, mlp_sizes=(100, 50))
    assert (plan.histories, plan.backbones, plan.price) == ((5,), ("DIEN", "LR"), 1.0)
    assert plan.parts()[:2] == ["DIEN-5", "LR-20"]
