"""What the paper reports, in one place: arXiv 2411.14713, "LIBER: Lifelong User Behavior Modeling Based on LLMs".

Every figure is on MovieLens-100K. Where a table prints Llama2-13B, that is the writer; the paper states no hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "arXiv 2411.14713"

DATA = "MovieLens-100K"

DATA_NAME = "ml-100k"
"""The paper's data set as reports name it: figures on any other cannot be set beside the paper's."""

USERS = 910
"""Section 4.1.1."""

WRITER = "Llama2-13B"

ENCODER = "BERT"

BACKBONE = "DIEN"
"""The backbone of every table but Table 2."""


@dataclass(frozen=True, slots=True)
class Quality:
    """AUC (higher is better) and log loss (lower is better, natural logarithm) on the test part."""

    auc: float
    logloss: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What the LLM costs per user, means over users.

    Attributes:
        calls_per_user: LLM calls.
        tokens_per_prompt: tokens in one prompt.
        seconds_per_user: LLM processing time.
    """

    calls_per_user: float
    tokens_per_prompt: float
    seconds_per_user: float


BASE: Mapping[str, Quality] = {
    "DCN": Quality(0.7932, 0.5288),
    "DeepFM": Quality(0.7919, 0.5296),
    "xDeepFM": Quality(0.7937, 0.5285),
    "AutoInt": Quality(0.7944, 0.5282),
    "FiBiNet": Quality(0.7899, 0.5308),
    "DIN": Quality(0.7956, 0.5259),
    "DIEN": Quality(0.7988, 0.5178),
}
"""Table 2: each backbone alone (the same figures as in Table 1)."""

LIBER: Mapping[str, Quality] = {
    "DCN": Quality(0.8112, 0.5091),
    "DeepFM": Quality(0.8137, 0.5073),
    "xDeepFM": Quality(0.8148, 0.5047),
    "AutoInt": Quality(0.8150, 0.5042),
    "FiBiNet": Quality(0.8107, 0.5098),
    "DIN": Quality(0.8154, 0.5037),
    "DIEN": Quality(0.8225, 0.4908),
}
"""Table 2: each backbone with LIBER; DIEN's is LIBER's row of Table 1."""

KAR = Quality(0.8072, 0.5132)
"""Table 1: KAR, the strongest of the methods that read an LLM's texts besides LIBER."""

ABLATION_AUC: Mapping[str, float] = {
    "LIBER": 0.8225,
    "w/o shift": 0.8153,
    "length=100": 0.8057,
    "length=20": 0.8083,
}
"""Table 6, by variant. Figure 4 has the log loss too, and the other two ablations, but prints no figures."""

LLM_COST: Mapping[str, Cost] = {
    "LIBER": Cost(8.96, 1246.6, 227.8),
    "w/o shift": Cost(4.98, 967.1, 115.0),
    "length=100": Cost(89.06, 1958.9, 2223.8),
    "length=20": Cost(89.06, 967.1, 2056.4),
}
"""Table 6, by variant."""

SECONDS_PER_1000: Mapping[str, float] = {"TALLRec": 9.96, "DIEN": 8.38e-2, "KAR": 9.12e-2, "LIBER": 9.61e-2}
"""Table 7: inference seconds per 1000 samples; hardware unstated, so not comparable across machines."""
