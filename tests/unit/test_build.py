from __future__ import annotations

import pytest

from builders.build import BuildSettings
from liber_runtime.exceptions import ConfigurationError


def test_no_bundle_looks_back_less_than_its_backbone_reads() -> None:
    assert BuildSettings(history_length=30, lookback=30).lookback == 30
    with pytest.raises(ConfigurationError, match=r"lookback 29 is less than the history of 30 .*; give at least that"):
        BuildSettings(history_length=30, lookback=29)
