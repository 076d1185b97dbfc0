"""DeepFM: a factorization machine and a deep network over the same embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from builders.models.dnn import DNN
from builders.models.features import Features, FeatureSchema
from builders.models.layers import FactorizationMachine
from builders.models.lr import LR


class DeepFM(nn.Module):
    """DeepFM (https://arxiv.org/abs/1703.04247, Eq. 1-2): first order + `FactorizationMachine` + deep network.

    The numbers are in the first order and in the deep part; they have no embedding, so no pair has them.

    Args:
        schema: of the features.
        mlp_sizes: of the deep part; [200, 80] in the paper (section 4.1.3).
        dropout: of the deep part.
    """

    def __init__(self, schema: FeatureSchema, *, mlp_sizes: Sequence[int] = (200, 80), dropout: float = 0.3) -> None:
        super().__init__()
        self.linear = LR(schema)
        self.pairs = FactorizationMachine()
        self.deep = DNN(schema, mlp_sizes=mlp_sizes, dropout=dropout)

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        logits: Tensor = self.linear(features) + self.pairs(features.fields()) + self.deep(features)
        return logits
