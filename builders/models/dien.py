"""DIEN, the backbone of the paper's Tables 1 and 7."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.models import functions
from builders.models.features import Features, FeatureSchema
from builders.models.layers import AUGRU, GRU, FoldedMLP, InterestAttention, gather_users


class DIEN(nn.Module):
    """Deep Interest Evolution Network (https://arxiv.org/abs/1809.03672) over rated histories.

    A GRU extracts an interest state per behavior, attention weighs the states for the candidate, and an AUGRU evolves
    the final interest; an MLP reads it with all fields and numbers, and with the product of the candidate and the mean
    of the history (from DIEN's implementation).

    Args:
        schema: of the features.
        hidden_size: H of both recurrences.
        attention_size: hidden units of the attention.
        mlp_sizes: [200, 80] in the paper (section 4.1.3).
        dropout: of the MLP.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        hidden_size: int = 64,
        attention_size: int = 32,
        mlp_sizes: Sequence[int] = (200, 80),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        item_size = len(schema.candidate) * schema.embedding_dim
        self.extractor = GRU(schema.step_size, hidden_size)
        self.query = nn.Linear(item_size, hidden_size)
        self.attention = InterestAttention(hidden_size, attention_size)
        self.evolution = AUGRU(hidden_size, hidden_size)
        self.taste = nn.Linear(schema.step_size, item_size)
        self.mlp = FoldedMLP(
            len(schema.user) * schema.embedding_dim,
            (2 * len(schema.candidate) + len(schema.pair)) * schema.embedding_dim + len(schema.numbers) + hidden_size,
            mlp_sizes,
            dropout,
        )

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        return self._rank(features, self._extract(features))

    def forward_with_auxiliary(self, features: Features) -> tuple[Tensor, Tensor]:
        """Logits float[N] and DIEN's auxiliary loss float[] (its Eq. 6-7)."""
        states = self._extract(features)
        return self._rank(features, states), self._auxiliary_loss(features, states)

    def _extract(self, features: Features) -> Tensor:
        weight, bias, recurrent = self.extractor.weights()
        return functions.gru(features.map_history(weight, bias), features.history_length, recurrent)

    def _rank(self, features: Features, states: Tensor) -> Tensor:
        item, user_index = features.candidate.flatten(1), features.user_index
        attention, evolution = self.attention.weights(), self.evolution.weights()
        evolved = functions.interest_evolution(
            self.query(item), states, features.history_length, user_index, *attention, *evolution
        )
        match = item * gather_users(self.taste(features.history_mean), user_index)
        candidate = torch.cat((item, match, features.pair.flatten(1), features.numbers, evolved), dim=1)
        logits: Tensor = self.mlp(features.user.flatten(1), candidate, user_index)
        return logits

    def _auxiliary_loss(self, features: Features, states: Tensor) -> Tensor:
        """Each state must tell the user's next behavior from another user's, drawn from the batch."""
        steps = features.history
        if steps.shape[0] < 2:
            return steps.new_zeros(())
        target = self.query(steps[1:, :, : self.query.in_features])
        other = torch.randperm(target.shape[1], device=target.device)
        real = features.history_mask[1:].to(steps.dtype)
        positive = functional.softplus(-(states[:-1] * target).sum(-1)) * real
        negative = functional.softplus((states[:-1] * target[:, other]).sum(-1)) * real * real[:, other]
        return (positive + negative).sum() / (2 * real.sum()).clamp(min=1)
