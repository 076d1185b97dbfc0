"""A plain deep network, and the deep part of other backbones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from builders.models.features import Features, FeatureSchema
from builders.models.layers import FoldedMLP


class DNN(nn.Module):
    """MLP over all fields and numbers (the deep part of Wide & Deep, https://arxiv.org/abs/1606.07792, Eq. 1).

    Its first layer reads the fields of a user once, however many candidates the user has.

    Args:
        schema: of the features.
        mlp_sizes: [200, 80] in the paper (section 4.1.3).
        dropout: of the MLP.
    """

    def __init__(self, schema: FeatureSchema, *, mlp_sizes: Sequence[int] = (200, 80), dropout: float = 0.3) -> None:
        super().__init__()
        size = schema.embedding_dim
        fields = len(schema.candidate) + len(schema.pair)
        self.mlp = FoldedMLP(len(schema.user) * size, fields * size + len(schema.numbers), mlp_sizes, dropout)

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        candidate = torch.cat((features.candidate.flatten(1), features.pair.flatten(1), features.numbers), dim=1)
        logits: Tensor = self.mlp(features.user.flatten(1), candidate, features.user_index)
        return logits
