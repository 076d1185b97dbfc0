"""DIN: the candidate picks from the history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from builders.models import functions
from builders.models.features import Features, FeatureSchema
from builders.models.layers import FoldedMLP, InterestAttention, gather_users


class DIN(nn.Module):
    """Deep Interest Network (https://arxiv.org/abs/1706.06978) over rated histories.

    The steps of the history and the candidate are mapped to one size, the steps once per user. A local activation unit
    scores every step for the candidate, and an MLP reads the weighted sum of the steps (its Eq. 3) with all fields and
    numbers, and with the product of the candidate and the mean of the history (from DIN's implementation).

    Not taken over from the paper: Dice (`torch.nn.PReLU` stands in its place) and mini-batch aware regularization.

    Args:
        schema: of the features.
        attention_size: of the mapped steps and candidate.
        hidden_size: hidden units of the activation unit.
        softmax: whether the scores of a history are normalized to a sum of one. The paper does not, so that the sum
            tells how much of the history speaks for the candidate (section 4.3).
        mlp_sizes: [200, 80] in the paper (section 4.1.3).
        dropout: of the MLP.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        attention_size: int = 64,
        hidden_size: int = 32,
        softmax: bool = False,
        mlp_sizes: Sequence[int] = (200, 80),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        item_size = len(schema.candidate) * schema.embedding_dim
        self.softmax = softmax
        self.step = nn.Linear(schema.step_size, attention_size)
        self.query = nn.Linear(item_size, attention_size)
        self.attention = InterestAttention(attention_size, hidden_size)
        self.taste = nn.Linear(schema.step_size, item_size)
        pair_size = len(schema.pair) * schema.embedding_dim
        self.mlp = FoldedMLP(
            len(schema.user) * schema.embedding_dim,
            2 * item_size + pair_size + len(schema.numbers) + attention_size,
            mlp_sizes,
            dropout,
        )

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        item, user_index = features.candidate.flatten(1), features.user_index
        steps = features.map_history(self.step.weight, self.step.bias)
        attention = self.attention.weights()
        picked = functions.local_activation(
            self.query(item), steps, features.history_length, user_index, *attention, softmax=self.softmax
        )
        match = item * gather_users(self.taste(features.history_mean), user_index)
        candidate = torch.cat((item, match, features.pair.flatten(1), features.numbers, picked), dim=1)
        logits: Tensor = self.mlp(features.user.flatten(1), candidate, user_index)
        return logits
