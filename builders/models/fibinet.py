"""FiBiNet: weighs the fields, then lets every two of them meet in a bilinear form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from builders.models.features import Features, FeatureSchema
from builders.models.layers import MLP, BilinearInteraction, SqueezeExcitation
from builders.models.lr import LR


class FiBiNet(nn.Module):
    """FiBiNET (https://arxiv.org/abs/1905.09433): first order + deep network over bilinear interactions.

    The deep network reads the interactions of the fields as they are, those of the fields as `SqueezeExcitation`
    weighs them, and the numbers. Both kinds share their matrices.

    Args:
        schema: of the features.
        field_size: entries of a field as the interactions see it: one map for all fields takes them from E to these, as
            the deep network's first layer grows with fields squared times entries (the paper embeds in 10 to 50).
        bilinear: ``all`` fields share one matrix, or ``each`` has its own.
        reduction: by how much the squeeze is smaller than the fields are many.
        mlp_sizes: of the deep part; [200, 80] in the paper (section 4.1.3).
        dropout: of the deep part.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        field_size: int = 16,
        bilinear: Literal["all", "each"] = "each",
        reduction: int = 3,
        mlp_sizes: Sequence[int] = (200, 80),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        fields = len(schema.fields)
        self.linear = LR(schema)
        self.mapping = nn.Linear(schema.embedding_dim, field_size, bias=False)
        self.weighing = SqueezeExcitation(fields, reduction)
        self.bilinear = BilinearInteraction(fields, field_size, bilinear)
        self.deep = MLP(fields * (fields - 1) * field_size + len(schema.numbers), mlp_sizes, dropout)

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        fields = self.mapping(features.fields())
        pairs = self.bilinear(fields).flatten(1), self.bilinear(self.weighing(fields)).flatten(1)
        logits: Tensor = self.linear(features) + self.deep(torch.cat((*pairs, features.numbers), dim=1))
        return logits
