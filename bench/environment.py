"""What a figure was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "liber-runtime",
    "numpy",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "faiss-cpu",
    "tritonclient",
    "nvidia-pytriton",
    "scikit-learn",
)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and platform."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform.platform(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the figures; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
