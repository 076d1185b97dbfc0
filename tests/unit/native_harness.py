"""What the tests of compiled kernels share."""

from __future__ import annotations

import pytest

from liber_runtime.exceptions import ConfigurationError
from liber_runtime.native import load_kernels
from liber_runtime.native.compile import compile_kernels, targets

needs_compiler = pytest.mark.skipif(not compile_kernels(), reason="there is no C++ compiler")


def runnable() -> list[str]:
    """The instruction sets that there are kernels for and that this processor has."""
    found = []
    for target in targets():
        try:
            load_kernels(target, 1)
        except ConfigurationError:
            continue
        found.append(target)
    return found


every_target = pytest.mark.parametrize("target", runnable() or ["none"])
