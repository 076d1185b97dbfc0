"""Logistic regression: the floor under every other backbone, and the first-order part of some."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from builders.models.features import Features, FeatureSchema
from builders.models.layers import FoldedLinear


class LR(nn.Module):
    r"""Logistic regression over all fields and numbers.

    .. math::
        z = b + \sum_f w_f^T v_f + \sum_m c_m x_m

    A field that looks its embedding :math:`v_f` up has the weight :math:`w_f^T v_f` for each of its indices: one weight
    per index as in the textbook, factorised into what other parts of a model share and what they do not.

    Args:
        schema: of the features.
    """

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        size = schema.embedding_dim
        fields = len(schema.candidate) + len(schema.pair)
        self.linear = FoldedLinear(len(schema.user) * size, fields * size + len(schema.numbers), 1)

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        candidate = torch.cat((features.candidate.flatten(1), features.pair.flatten(1), features.numbers), dim=1)
        logits: Tensor = self.linear(features.user.flatten(1), candidate, features.user_index)
        return logits.squeeze(-1)
