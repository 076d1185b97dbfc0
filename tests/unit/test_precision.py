"""The benchmark of int8 weights compares like with like."""

from __future__ import annotations

import numpy as np
import pytest

from bench import precision
from bench.precision import compare_times, resample


def test_times_are_compared_on_the_same_engine() -> None:
    p50 = {"fp32_kernels": 2.0, "int8_kernels": 3.0, "fp32_onnxruntime": 8.0, "int8_onnxruntime": 6.0}
    times = {"one_user": {name: {"p50": value} for name, value in p50.items()}}
    assert compare_times(times) == {"one_user": {"kernels": 1.5, "onnxruntime": 0.75}}


def test_an_interval_holds_what_the_samples_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "RESAMPLES", 20)
    draw = np.random.default_rng(0)
    label = draw.integers(2, size=400).astype(np.float32)
    good = (label + draw.normal(size=400)).astype(np.float32)
    assert resample(label, good, good, seed=1) == (0.0, 0.0)
    low, high = resample(label, good, draw.normal(size=400).astype(np.float32), seed=1)
    assert -0.5 < low < high < -0.1
