"""AutoInt: fields attend to each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from builders.models.dnn import DNN
from builders.models.features import Features, FeatureSchema
from builders.models.layers import InteractingLayer
from builders.models.lr import LR


class AutoInt(nn.Module):
    """AutoInt+ (https://arxiv.org/abs/1810.11921): first order + `InteractingLayer`s + deep network.

    The numbers are in the first order and in the deep part: as fields of their own (as in the paper) each would cost
    as much attention as a whole field.

    Args:
        schema: of the features.
        num_layers: interacting layers.
        num_heads: of each.
        head_size: of each head.
        mlp_sizes: of the deep part; [200, 80] in the paper (section 4.1.3).
        dropout: of the deep part.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        num_layers: int = 2,
        num_heads: int = 2,
        head_size: int = 16,
        mlp_sizes: Sequence[int] = (200, 80),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        sizes = [schema.embedding_dim] + num_layers * [num_heads * head_size]
        self.linear = LR(schema)
        self.interactions = nn.Sequential(*(InteractingLayer(size, num_heads, head_size) for size in sizes[:-1]))
        self.output = nn.Linear(len(schema.fields) * sizes[-1], 1, bias=False)
        self.deep = DNN(schema, mlp_sizes=mlp_sizes, dropout=dropout)

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        interactions = self.output(self.interactions(features.fields()).flatten(1)).squeeze(-1)
        logits: Tensor = self.linear(features) + interactions + self.deep(features)
        return logits
