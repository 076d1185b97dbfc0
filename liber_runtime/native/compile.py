"""Compiles the kernels, once for each instruction set a server may have: ``python -m liber_runtime.native.compile``.

The standard library alone is used: this also runs while the package is installed. Without a C++ compiler nothing is
compiled; the graphs then run in ONNX Runtime as they are.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DIRECTORY = Path(__file__).parent

TARGETS = {
    "x86_64": ("x86-64-v4", "x86-64-v3", "x86-64"),
    "aarch64": ("armv8-a",),
}
"""What is compiled for each kind of machine, by the compiler's names, the fastest first."""

_OPTIONS = (
    *("-O3", "-std=gnu++17", "-shared", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math"),
    # Statically, so that the library needs nothing but the C library of where it runs.
    *("-static-libstdc++", "-static-libgcc"),
)


def library_path(target: str) -> Path:
    """Where the kernels for `target` lie."""
    return DIRECTORY / f"kernels.{target}.so"


def targets() -> Sequence[str]:
    """Of this kind of machine, the fastest first; none if it is of another kind."""
    return TARGETS.get(platform.machine(), ())


def compile_kernels() -> list[Path]:
    """Compiles what is missing or older than the source; returns the libraries there are, none without a compiler.

    Raises:
        subprocess.CalledProcessError: there is a compiler, and it failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return []
    changed = max(path.stat().st_mtime for path in (*DIRECTORY.glob("*.cpp"), *DIRECTORY.glob("*.h")))
    wanted = [library_path(target) for target in targets()]
    missing = [path for path in wanted if not path.exists() or path.stat().st_mtime < changed]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(functools.partial(_compile, compiler), missing))
    return wanted


def _compile(compiler: str, path: Path) -> None:
    target = path.name.split(".", 1)[1].removesuffix(".so")
    # Beside its place, and moved there when it is whole: another process may be loading or making the same.
    building = path.with_suffix(f".{os.getpid()}")
    wide = ["-mprefer-vector-width=512"] if target == "x86-64-v4" else []
    sources = sorted(map(str, DIRECTORY.glob("*.cpp")))
    try:
        subprocess.run([compiler, *_OPTIONS, f"-march={target}", *wide, *sources, "-o", str(building)], check=True)
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


if __name__ == "__main__":
    if not compile_kernels():
        print("no C++ compiler was found: graphs run in ONNX Runtime, without kernels", file=sys.stderr)
