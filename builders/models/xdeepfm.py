"""xDeepFM: crosses of whole vectors beside a deep network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from builders.models.dnn import DNN
from builders.models.features import Features, FeatureSchema
from builders.models.layers import CompressedInteraction
from builders.models.lr import LR


class XDeepFM(nn.Module):
    """xDeepFM (https://arxiv.org/abs/1803.05170): first order + `CompressedInteraction` + deep network.

    The numbers are in the first order and in the deep part; they have no embedding, so no cross has them.

    Args:
        schema: of the features.
        cin_sizes: feature maps of each layer of the CIN.
        mlp_sizes: of the deep part; [200, 80] in the paper (section 4.1.3).
        dropout: of the deep part.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        cin_sizes: Sequence[int] = (64, 64),
        mlp_sizes: Sequence[int] = (200, 80),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.linear = LR(schema)
        self.crosses = CompressedInteraction(len(schema.fields), cin_sizes)
        self.output = nn.Linear(self.crosses.output_size, 1, bias=False)
        self.deep = DNN(schema, mlp_sizes=mlp_sizes, dropout=dropout)

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        crosses = self.output(self.crosses(features.fields())).squeeze(-1)
        logits: Tensor = self.linear(features) + crosses + self.deep(features)
        return logits
