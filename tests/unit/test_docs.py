"""What docs/backbones.md and docs/data.md say is run."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import typer.main
from model_harness import D, draw_inputs, make_features_module
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from builders.datasets import load
from builders.export import export_backbone
from builders.models import BACKBONES, find_backbone, make_backbone
from builders.models.backbone import Ranker
from builders.models.features import Features
from builders.models.fuser import AttentionFuser
from builders.replay import replay, split
from liber_runtime.cli import application
from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.partition import Count

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "backbones.md").read_text("utf-8")
DATA_PAGE = (DOCS / "data.md").read_text("utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EXAMPLE, AUXILIARY, CHECK = CODE
NAME = "my_model:MyModel"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """The class of the page, from a file as the page says; with its own loss, so that both are covered."""
    (tmp_path / "my_model.py").write_text(EXAMPLE + "\n" + AUXILIARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    return find_backbone(NAME)


def make_ranker(meeting: bool = True, interest_size: int = D) -> Ranker:
    features = make_features_module(meeting=meeting, interest_size=interest_size, dropout=0.0)
    torch.manual_seed(1)
    backbone = make_backbone(NAME, features.schema, {"hidden_size": 16})
    return Ranker(features, backbone, AttentionFuser(D) if interest_size else None)


def draw_knowledge(users: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(4) < torch.arange(users)[:, None] % 5
    return torch.randn(users, 4, D, generator=generator), mask


def test_the_example_is_short_and_complete() -> None:
    assert len(EXAMPLE.splitlines()) < 40
    imported = [node for node in ast.parse(EXAMPLE).body if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in imported} == {"torch", "builders.models.features", "builders.models.layers"}


@pytest.mark.usefixtures("example")
def test_the_example_learns_its_interest_by_both_losses() -> None:
    ranker = make_ranker().train()
    inputs, (representations, mask) = draw_inputs(ranker.features, 40), draw_knowledge(40)
    optimizer = torch.optim.Adam(ranker.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        logits, auxiliary = ranker.forward_with_auxiliary(inputs, representations, mask)
        torch.testing.assert_close(auxiliary, 1e-3 * logits.square().mean())
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.arange(40) % 2.0) + auxiliary
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert ranker.fuser is not None
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in ranker.fuser.parameters())


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize(
    ("meeting", "interest_size"), [pytest.param(True, D, id="matched"), (False, D), pytest.param(False, 0, id="base")]
)
def test_the_exported_example_equals_pytorch(meeting: bool, interest_size: int, tmp_path: Path) -> None:
    ranker = make_ranker(meeting, interest_size)
    export_backbone(ranker, tmp_path / "backbone.onnx")
    ranker.eval()
    session = onnxruntime.InferenceSession(str(tmp_path / "backbone.onnx"), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for users, candidates in ((1, 1), (4, 30), (30, 4)):
        inputs = draw_inputs(ranker.features, users, candidates, seed=users)
        with torch.inference_mode():
            expected = ranker(inputs).sigmoid().numpy()
        (found,) = session.run(None, {name: getattr(inputs, name).numpy() for name in names})
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
        assert candidates == 1 or expected.std() > 1e-3


@pytest.mark.usefixtures("example")
def test_the_check_of_the_page_passes() -> None:
    exec(compile(CHECK, "docs/backbones.md", "exec"), {})


def test_every_attribute_of_the_features_is_described_with_its_shape() -> None:
    features = make_features_module(meeting=True)
    schema = features.schema
    inputs = draw_inputs(features, 3, 5)
    made = features(inputs)
    sizes = {row[0]: eval(row[1].strip("`"), {"schema": schema, "len": len}) for row in table("size")}
    assert list(sizes) == ["C", "K", "F", "M", "T", "E", "S"]
    assert sizes["S"] == (sizes["C"] + 1) * sizes["E"]
    assert len(set(sizes.values())) > 4, "sizes that are alike would hide a wrong letter"
    described = {row[0].strip("`"): row[1:3] for row in table("attribute")}
    assert list(described) == [*(field.name for field in dataclasses.fields(Features)), "fields()"]
    for name, (kind, shape) in described.items():
        tensor = made.fields() if name == "fields()" else getattr(made, name)
        expected = eval(shape, {**sizes, "U": 3, "N": 5})
        assert list(tensor.shape) == expected, name
        assert {"float": tensor.is_floating_point(), "bool": tensor.dtype == torch.bool}.get(kind, "int" in kind)
    assert features(draw_inputs(features, 3)).user_index is None


def table(first: str) -> Iterator[list[str]]:
    """Cells of the rows of the page's table whose first column is called so."""
    lines = iter(PAGE.splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_commands_of_the_page_are_there() -> None:
    commands = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("liber ")]
    group = typer.main.get_command(application)
    assert [words[1] for words in commands] == ["build", "serve", "score"]
    for _, name, *words in commands:
        known = {option for parameter in group.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert {word for word in words if word.startswith("--")} <= known


def test_the_backbones_of_the_page_and_of_the_help_are_those_there_are() -> None:
    first = PAGE.split("\n\n")[1]
    ten = first[first.index("LIBER brings") : first.index("Any other")]
    assert re.findall(r"`(\w+)`", ten) == list(BACKBONES)
    build = typer.main.get_command(application).commands["build"]  # type: ignore[attr-defined]
    for command in (build, build.commands["re-encode"]):
        option = next(each for each in command.params if each.name == "backbone")
        assert re.split(r", (?:or .*)?", option.help) == [*BACKBONES, ""]


@pytest.mark.usefixtures("example")
def test_sizes_taken_from_a_tensor_are_those_of_the_batch(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def forward(self, features: Features) -> Tensor:
            candidates = [features.candidate, features.numbers, features.pair, features.fields()]
            size = sum(each.shape[0] for each in candidates) * 1.5 + features.user.shape[0]
            size = size - features.history.shape[1] / 3 + features.history_mask.shape[1] * 0.7
            return features.candidate.mean((1, 2)) + torch.full((features.candidate.shape[0],), 1.0) * size

    ranker = make_ranker()
    export_backbone(Ranker(ranker.features, Sized(), ranker.fuser), tmp_path / "backbone.onnx")


def test_a_backbone_that_keeps_the_size_of_its_example_is_refused(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def forward(self, features: Features) -> Tensor:
            return features.candidate.mean((1, 2))

    class Kept(nn.Module):
        def forward(self, features: Features) -> Tensor:
            return features.candidate.mean((1, 2)) + torch.zeros(int(features.candidate.shape[0]))

    class Frozen(nn.Module):
        def forward(self, features: Features) -> Tensor:
            return features.candidate.mean((1, 2)) * int(features.candidate.shape[0])

    features = make_features_module(interest_size=0)
    export_backbone(Ranker(features, Sized()), tmp_path / "sized.onnx")
    # What nothing reads is no input of the graph; serving gives it what it has.
    session = onnxruntime.InferenceSession(str(tmp_path / "sized.onnx"), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["item_index"]
    with (
        pytest.warns(TracerWarning),
        pytest.raises(ConfigurationError, match=r"frozen\.onnx .* on inputs of shapes .*; docs/backbones\.md says"),
    ):
        export_backbone(Ranker(features, Frozen()), tmp_path / "frozen.onnx")
    with (
        pytest.warns(TracerWarning),
        pytest.raises(
            ConfigurationError, match=r"kept\.onnx cannot be run on another batch .*; docs/backbones\.md says"
        ),
    ):
        export_backbone(Ranker(features, Kept()), tmp_path / "kept.onnx")


def test_backbones_that_cannot_be_are_named(example: type[nn.Module], tmp_path: Path) -> None:
    schema = make_features_module().schema
    (tmp_path / "others.py").write_text("class Plain: ...\nnumber = 3\n")
    for name, named in [
        ("DINE", r"backbone 'DINE' is unknown; there are LR, DNN, .*, or name your own as package.module:Class"),
        ("nowhere:Model", r"cannot be imported \(No module named 'nowhere'\); run from the directory that holds it"),
        ("others:Model", r"cannot be imported .*has no attribute 'Model'"),
        ("others:Plain", r"is no torch\.nn\.Module; name a class that derives from it"),
        ("others:number", r"is no torch\.nn\.Module"),
    ]:
        with pytest.raises(ConfigurationError, match=named):
            find_backbone(name)
    with pytest.raises(ConfigurationError, match="my_model:MyModel has no option depth; it has hidden_size"):
        make_backbone(NAME, schema, {"depth": 3})
    assert isinstance(make_backbone(NAME, schema), example)


def change_line(number: int, change: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    """A change of the cells of one line of a table."""

    def changed(text: str) -> str:
        lines = text.splitlines()
        lines[number - 1] = ",".join(change(lines[number - 1].split(",")))
        return "\n".join(lines) + "\n"

    return changed


BROKEN: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("behaviors.csv", lambda text: text.replace(",", ";")),
    ("behaviors.csv", change_line(3, lambda row: [*row[:3], "good"])),
    ("behaviors.csv", change_line(3, lambda row: [*row[:2], "14/11/2023", row[3]])),
    ("items.csv", change_line(3, lambda row: ["b0", *row[1:]])),
    ("items.csv", change_line(3, lambda row: [*row[:3], "nan", row[4]])),
    ("items.csv", lambda text: text.replace("\nb", "\nbook-")),
    ("domain.json", lambda text: text.replace('"feedback_range": [\n    1', '"feedback_range": [\n    2')),
    ("behaviors.csv", lambda text: "\n".join(text.splitlines()[:211]) + "\n"),
)


def test_the_errors_of_the_page_on_data_are_those_its_example_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", DATA_PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "docs/data.md", "exec"), {})
    split(replay(load("books"), Count(20)))
    found = []
    for name, change in BROKEN:
        path = Path("books", name)
        whole = path.read_bytes().decode()
        path.write_text(change(whole.replace("\r\n", "\n")))
        with pytest.raises(InvalidInputError) as caught:
            split(replay(load("books"), Count(20)))
        found.append(f"error: {caught.value}")
        path.write_text(whole)
    assert found == [line for line in DATA_PAGE.splitlines() if line.startswith("error: ")]
