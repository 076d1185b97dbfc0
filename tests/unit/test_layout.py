"""The rooms keep to themselves: what may import what."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import liber_runtime

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(module.name for module in pkgutil.walk_packages(liber_runtime.__path__, "liber_runtime."))

HEAVY = ("torch", "transformers", "onnx", "faiss", "sklearn", "polars", "matplotlib", "locust", "builders", "bench")

EDGES = {"socket", "sqlite3", "asyncio", "grpc", "tritonclient", "subprocess", "urllib.request"}


@pytest.mark.parametrize("served", [False, True])
def test_the_runtime_imports_nothing_heavy_and_no_builders(served: bool) -> None:
    """But for onnx, with which the models inside Triton, and nothing else, read their graphs."""
    modules = [name for name in MODULES if name.startswith("liber_runtime.served.") == served]
    heavy = [name for name in HEAVY if not (served and name == "onnx")]
    # An entry of None in sys.modules makes an import of that name fail.
    script = (
        f"import sys, importlib\nfor name in {heavy!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\nprint('imported', {len(modules)})"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(modules) >= (5 if served else 31)


def test_the_pure_core_does_no_input_or_output() -> None:
    def loaded(modules: str) -> str:
        script = f"import sys, {modules}\nprint(sorted({EDGES!r} & set(sys.modules)))"
        return subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    assert loaded("liber_runtime.partition, liber_runtime.interest, liber_runtime.behavior") == "[]\n"
    assert loaded("liber_runtime.memory.sqlite") == "['sqlite3']\n"


@pytest.mark.parametrize(
    "document", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
