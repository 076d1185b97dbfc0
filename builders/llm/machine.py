"""What this machine has for building an engine: GPUs, versions, NVIDIA's scripts; nothing of them is loaded."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from builders.llm.engines import Tools
from liber_runtime.exceptions import ConfigurationError

EXAMPLES = (Path("/app/examples"), Path("/app/tensorrt_llm/examples"))
"""Where NVIDIA's Triton image and its TensorRT-LLM image have the scripts."""

_CONVERT = Path("models/core/llama/convert_checkpoint.py")
_QUANTIZE = Path("quantization/quantize.py")

_ENGINES_FROM, _ENGINES_BEFORE = (1, 0), (1, 3)

_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as ``nvidia-smi`` reports it: its name, bytes of memory, and compute capability as (major, minor)."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that a process started here would see, in its order; none without a driver.

    Raises:
        ConfigurationError: ``nvidia-smi`` is there and fails.
    """
    command = ("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ()
    if ran.returncode:
        said = (ran.stdout + ran.stderr).strip().splitlines() or [f"status {ran.returncode}"]
        raise ConfigurationError(f"nvidia-smi fails ({said[-1]}); repair the driver, or give the container its GPUs")
    rows = [[cell.strip() for cell in line.split(",")] for line in ran.stdout.splitlines() if line.strip()]
    try:
        found = [(row[0], row[1], _gpu(*row[2:])) for row in rows]
    except (ValueError, TypeError):
        raise ConfigurationError(f"nvidia-smi answers {ran.stdout.strip()!r}, which is no list of GPUs") from None
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return tuple(gpu for _, _, gpu in found)
    visible = []
    for each in filter(None, map(str.strip, wanted.split(","))):
        match = [gpu for index, uuid, gpu in found if each == index or uuid.startswith(each)]
        if not match:
            break  # CUDA itself reads no further
        visible.append(match[0])
    return tuple(visible)


def _gpu(name: str, total: str, free: str, capability: str) -> Gpu:
    major, _, minor = capability.partition(".")
    return Gpu(name, int(total) << 20, int(free) << 20, (int(major), int(minor or 0)))


def installed_versions() -> dict[str, str]:
    """Versions of TensorRT-LLM and TensorRT as installed for this interpreter; without those that are not.

    TensorRT-LLM is not imported: that needs a GPU's driver.
    """
    found = {}
    for name in ("tensorrt_llm", "tensorrt"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def require_engines(version: str | None) -> None:
    """Checks that a version of TensorRT-LLM builds engines.

    Raises:
        ConfigurationError: it is not installed, or has no engines.
    """
    if version is None:
        raise ConfigurationError(
            f"TensorRT-LLM is not installed for {sys.executable}; run this inside NVIDIA's image "
            "(nvcr.io/nvidia/tritonserver:26.06-trtllm-python-py3), or pass --dry-run to see the commands"
        )
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if release >= _ENGINES_BEFORE:
        raise ConfigurationError(
            f"TensorRT-LLM {version} builds no engines: the engine flow ends with 1.2; pass --layout llmapi, which "
            "serves the checkpoint itself and needs no engine, or use an image with TensorRT-LLM 1.2"
        )
    if release < _ENGINES_FROM:
        raise ConfigurationError(
            f"TensorRT-LLM {version} is older than the flags used here, which are those of 1.0 to 1.2; use an image "
            "with TensorRT-LLM 1.2"
        )


def find_tools(examples: Path | None, version: str | None) -> Tools:
    """Where the scripts and ``trtllm-build`` are, or would be in NVIDIA's image.

    Args:
        examples: directory of TensorRT-LLM's examples; None looks where NVIDIA's images have them.
        version: of TensorRT-LLM, if this interpreter sees it.

    The scripts are run by the Python that ``trtllm-build`` lies beside, for this one may have other versions of their
    packages in front of those they were installed with.
    """
    root = examples or next((path for path in EXAMPLES if path.is_dir()), EXAMPLES[0])
    beside = Path(sys.executable).parent
    build = shutil.which("trtllm-build", path=os.pathsep.join((str(beside), os.environ.get("PATH", ""))))
    python = Path(build).parent / "python3" if build else None
    return Tools(
        python=str(python) if python and python.is_file() else sys.executable if version else "python3",
        convert=root / _CONVERT,
        quantize=root / _QUANTIZE,
        build=build or "trtllm-build",
    )


def require_tools(tools: Tools, *, quantizes: bool) -> None:
    """Checks that what the commands run is there.

    Raises:
        ConfigurationError: a script or ``trtllm-build`` is missing.
    """
    script = tools.quantize if quantizes else tools.convert
    if not script.is_file():
        raise ConfigurationError(
            f"{script} is not there; name the directory of TensorRT-LLM's examples by --examples or "
            "LIBER_TENSORRT_LLM_EXAMPLES"
        )
    if shutil.which(tools.build) is None:
        raise ConfigurationError(
            "trtllm-build is not on the PATH; run this inside NVIDIA's image, which has it, or repair the installation"
        )


def free_disk(directory: Path) -> int:
    """Free bytes where `directory` is or will be."""
    there = directory
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
