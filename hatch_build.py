"""Compiles the kernels while the package is built or installed; without a C++ compiler it goes on without them."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling's hook for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, and gives the wheel the platform's tag if something was."""
        if self.target_name != "wheel":
            return
        module = runpy.run_path(str(Path(self.root, "liber_runtime", "native", "compile.py")))
        try:
            made = module["compile_kernels"]()
        except subprocess.CalledProcessError as error:
            self.app.display_warning(f"the kernels do not compile ({error}); graphs run in ONNX Runtime, without them")
            return
        if made:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform_tag()}"
            build_data["artifacts"].extend(str(path.relative_to(self.root)) for path in made)


def _platform_tag() -> str:
    from packaging.tags import platform_tags

    return next(iter(platform_tags()))
