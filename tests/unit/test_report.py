from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from builders import paper, plots
from builders.report import render, write

ATTACK = """"'><script>alert(1)</script><img src="https://evil.example/x">"""


def make_attention(count: int) -> list[list[float]]:
    rows = []
    for complete in range(1, count + 1):
        weights = [1.0 + 0.15 * index + (index * 7 % 3) * 0.4 for index in range(complete)]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def make_report(partitions: int = 8) -> dict[str, Any]:
    begin, gap = 881_250_949.0, 700_000.0
    quality = {
        "base": (
            0.7711,
            0.5652,
            [(0.664, 0.748, 0.591), (0.596, 0.769, 0.571), (0.571, 0.772, 0.568), (0.55, 0.77, 0.574)],
        ),
        "liber": (
            0.7798,
            0.5587,
            [(0.655, 0.753, 0.585), (0.588, 0.776, 0.564), (0.56, 0.779, 0.559), (0.54, 0.775, 0.566)],
        ),
    }
    return {
        "data": {
            "name": "ml-100k",
            "origin": "MovieLens-100K, as GroupLens publishes it",
            "users": 943,
            "items": 1682,
            "behaviors": 100_000,
            "eligible_users": 911,
            "samples": 81_140,
            "train_samples": 73_026,
            "test_samples": 8_114,
        },
        "memory": {
            "partitions": 4600,
            "calls_per_user": 8.9649,
            "partitions_per_user": {str(count): max(1, int(280 * 0.83**count)) for count in (*range(30), 34, 36)},
        },
        "quality": {
            name: {
                "auc": auc,
                "logloss": logloss,
                "validation_auc": epochs[2][1],
                "validation_logloss": epochs[2][2],
                "best_epoch": 3,
                "epochs": [
                    {"loss": loss, "auc": auc, "logloss": logloss, "seconds": 9.1} for loss, auc, logloss in epochs
                ],
            }
            for name, (auc, logloss, epochs) in quality.items()
        },
        "serving": {
            "samples": 8114,
            "max_abs_diff_vs_offline": 1.2e-7,
            "auc": 0.7798,
            "seconds_per_1000": {
                "one_user": {"p50": 0.0091, "p99": 0.0148, "users": 1, "candidates": 1000},
                "distinct_users": {"p50": 0.0612, "p99": 0.0931, "users": 943, "candidates": 1000},
            },
        },
        "writer": "statistical",
        "encoder": "all-MiniLM-L6-v2",
        "backbone": "DIEN",
        "seed": 1,
        "machine": {"cpu": "Some CPU @ 2.1 GHz", "cores": 2, "memory_gib": 23.5, "platform": "Linux-6.1-x86_64"},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": "2.51.0", "numpy": "1.26.4"},
        "seconds": {"load": 0.5, "ingest": 3.1, "texts": 6.2, "encode": 66.4, "train_base": 31.9, "serve": 44.0},
        "illustration": {
            "user_id": "239",
            "profile": {"age": 39, "occupation": "artist"},
            "item_noun": "movie",
            "partitions": [
                {
                    "number": number,
                    "start": begin + gap * number**1.5,
                    "end": begin + gap * number**1.5 + 300_000.0 * (number % 3),
                    "behaviors": 20,
                    "mean_feedback": 3.4 + 0.2 * (number * 5 % 7),
                    "summary": f'Level: 20 movies, liked on the whole.\n- genre "Drama {number}": 9 movies',
                    "shift": "" if number == 1 else f'Rising: genre "Comedy {number}"',
                }
                for number in range(1, partitions + 1)
            ],
            "attention": make_attention(partitions),
        },
    }


class Page(HTMLParser):
    """What of a page matters here: its elements with attributes, its ids, and its words."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value is not None]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def attributes(self) -> set[str]:
        return {name for _, pairs in self.elements for name in pairs}

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


_DRAWN: dict[tuple[str, str], str] = {}


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot of the same figures is drawn once for all tests, but for the one that compares two drawings."""

    def remember(name: str, draw: Callable[..., str]) -> Callable[..., str]:
        def drawn(*arguments: Any) -> str:
            key = name, json.dumps(arguments)
            if key not in _DRAWN:
                _DRAWN[key] = draw(*arguments)
            return _DRAWN[key]

        return drawn

    for name in [name for name in vars(plots) if name.startswith("draw_")]:
        monkeypatch.setattr(plots, name, remember(name, getattr(plots, name)))


@pytest.fixture(scope="module")
def html() -> str:
    return render(make_report())


@pytest.fixture(scope="module")
def plain(html: str) -> Page:
    return Page(html)


def references(html: str) -> list[str]:
    """Every place from which a browser would fetch something."""
    attributes = [
        value
        for _, pairs in Page(html).elements
        for name, value in pairs.items()
        if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"} and value
    ]
    return attributes + re.findall(r"url\(([^)]*)\)", html) + re.findall(r"@import[^;]*", html)


def test_page_fetches_nothing(html: str) -> None:
    found = references(html)
    assert found, "the plots refer to their own clip paths and markers"
    assert [reference for reference in found if not reference.startswith("#")] == []


def test_references_stay_within_their_plot(html: str, plain: Page) -> None:
    ids = plain.ids
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in references(html)} <= set(ids)


def test_same_report_gives_the_same_bytes(html: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert render(make_report()) == html


def test_untrusted_text_stays_text(plain: Page) -> None:
    report = make_report()
    report["data"]["name"] = report["data"]["origin"] = report["writer"] = report["encoder"] = ATTACK
    report["backbone"] = ATTACK
    report["versions"][ATTACK] = ATTACK
    report["machine"]["cpu"] = ATTACK
    report["seconds"][ATTACK] = 1.0
    illustration = report["illustration"]
    illustration["user_id"] = illustration["item_noun"] = ATTACK
    illustration["profile"] = {ATTACK: ATTACK}
    illustration["partitions"][0]["summary"] = illustration["partitions"][1]["shift"] = ATTACK
    page = Page(render(report))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert page.attributes == plain.attributes
    assert page.text.count(ATTACK) > 10


def test_dollar_signs_are_not_read_as_formulas() -> None:
    report = make_report()
    report["seconds"] = {r"$\broken{$": 1.0, "b$": 2.0}
    assert r"$\broken{$" in Page(render(report)).text


def test_statistical_writer_is_never_called_an_llm(plain: Page) -> None:
    assert "statistical writer made the texts" in plain.text
    assert "not an LLM" in plain.text
    assert "generated" not in plain.text


def test_other_writers_are_named() -> None:
    report = make_report()
    report["writer"] = "gpt-test"
    text = Page(render(report)).text
    assert "The texts are gpt-test's; the paper's are Llama2-13B's." in text
    assert "not an LLM" not in text


def test_writers_beside_the_statistical_one_do_not_hide_it() -> None:
    report = make_report()
    report["writer"] = "gpt-test, statistical"
    assert "not an LLM" in Page(render(report)).text


def test_generated_data_are_called_generated() -> None:
    report = make_report()
    report["data"]["name"] = "sample"
    assert "The data are generated" in Page(render(report)).text


def test_other_data_are_not_set_beside_the_papers() -> None:
    report = make_report()
    report["data"]["name"] = "our-shop"
    assert "another data set than this run's" in Page(render(report)).text


def test_papers_figures_stand_beside_this_runs(plain: Page) -> None:
    for figure in ("0.7988", "0.5178", "0.8225", "0.4908", "8.96", "8.9649", "83.8 ms", "91.2 ms", "96.1 ms", "9.96 s"):
        assert figure in plain.text
    assert "not comparable across machines" in plain.text


def test_backbone_decides_which_of_the_papers_figures() -> None:
    report = make_report()
    report["backbone"] = "DIN"
    text = Page(render(report)).text
    assert f"{paper.LIBER['DIN'].auc:.4f}" in text
    assert "0.8225" not in text


def test_backbone_unknown_to_the_paper_gets_no_figures_of_it() -> None:
    report = make_report()
    report["backbone"] = "DCNv3"
    text = Page(render(report)).text
    assert "0.8225" not in text
    assert "0.7798" in text


def test_every_plot_and_table_can_be_heard(plain: Page) -> None:
    plots = [attributes for attributes in plain.find("div") if attributes.get("class") == "plot"]
    assert len(plots) == len(plain.find("svg")) == 7
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert len(plain.find("caption")) == len(plain.find("table"))
    assert all(cell.get("scope") in {"row", "col"} for cell in plain.find("th"))


def test_plots_take_their_colors_from_the_page(html: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert {color for svg in svgs for color in re.findall(r"#[0-9a-fA-F]{6}\b", svg)} == set()
    used = set(re.findall(r"var\((--[a-z]+)\)", " ".join(svgs)))
    dark = html[html.index("prefers-color-scheme: dark") : html.index("* { box-sizing")]
    assert {"--ink", "--liber"} <= used <= set(re.findall(r"(--[a-z]+):", dark))


@pytest.mark.parametrize("partitions", [0, 1, 2, 150])
def test_memories_of_any_length(partitions: int) -> None:
    page = Page(render(make_report(partitions)))
    assert len(page.find("details")) == partitions
    assert len(page.find("svg")) == (7 if partitions else 5)
    assert ("The newest 60 of 150 are shown." in page.text) == (partitions == 150)


def test_partitions_within_one_instant_are_drawn() -> None:
    report = make_report(2)
    for partition in report["illustration"]["partitions"]:
        partition["start"] = partition["end"] = 881_250_949.0
    assert "1997-12-04 15:55" in Page(render(report)).text


def test_texts_not_written_yet_are_said_to_be() -> None:
    report = make_report()
    report["illustration"]["partitions"][-1].update(summary="", shift="")
    report["illustration"]["attention"].pop()
    page = Page(render(report))
    assert page.text.count("Not written yet.") == 2
    assert "weight now" not in page.text


def test_one_epoch_is_enough() -> None:
    report = make_report()
    for result in report["quality"].values():
        result["epochs"], result["best_epoch"] = result["epochs"][:1], 1
    assert len(Page(render(report)).find("svg")) == 7


def test_write_round_trips_in_order(tmp_path: Path) -> None:
    report = make_report()
    write(report, tmp_path / "runs" / "demo")
    text = (tmp_path / "runs" / "demo" / "report.json").read_text(encoding="utf-8")
    back = json.loads(text)
    assert back == report
    assert list(back["seconds"]) == list(report["seconds"])
    assert text.startswith('{\n  "data": {\n')
    assert (tmp_path / "runs" / "demo" / "report.html").read_text(encoding="utf-8") == render(back)


def test_write_leaves_what_was_there_when_it_fails(tmp_path: Path) -> None:
    report = make_report()
    write(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["report.html", "report.json"]
    broken = copy.deepcopy(report)
    broken["quality"]["base"]["auc"] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        write(broken, tmp_path)
    del report["serving"]
    with pytest.raises(KeyError, match="serving"):
        write(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
