"""DIEN, the backbone of the paper's Tables 1 and 7, with the interest as one more feature (Eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.models.backbone import Backbone, ItemEmbedding, ProfileEmbedding
from builders.models.layers import (
    AUGRU,
    GRU,
    FieldEmbedding,
    FoldedMLP,
    InterestAttention,
    gather_users,
    masked_softmax,
    sequence_mask,
)
from liber_runtime.vocabulary import Field


class DIEN(Backbone):
    """Deep Interest Evolution Network (https://arxiv.org/abs/1809.03672) over rated histories.

    A GRU extracts an interest state per behavior, attention weighs the states for the candidate, and an AUGRU evolves
    the final interest; an MLP reads it with the item, the profile, the mean of the history and its product with the
    item (both from DIEN's implementation), and r̂.
    No user id: most users that are scored were never trained on.

    Args:
        item_table: see `ItemEmbedding`.
        item_fields: attributes of an item.
        user_fields: attributes of a user.
        feedback: buckets of the history's feedback.
        history_size: T.
        interest_size: d of the interest; 0 builds the model without LIBER.
        embedding_dim: E per field, 32 in the paper (section 4.1.3).
        hidden_size: H of both recurrences.
        attention_size: hidden units of the attention.
        mlp_sizes: [200, 80] in the paper.
        dropout: of the MLP.
        embedding_dropout: of the item, feedback, profile embeddings and the interest.
        id_dropout: see `ItemEmbedding`; above 0 for catalogues where many candidates are new (it did not lower
            the validation log loss on MovieLens-100K with the other defaults).
    """

    def __init__(
        self,
        item_table: npt.NDArray[np.int32],
        item_fields: Sequence[Field],
        user_fields: Sequence[Field],
        feedback: Field,
        *,
        history_size: int,
        interest_size: int = 0,
        embedding_dim: int = 32,
        hidden_size: int = 64,
        attention_size: int = 32,
        mlp_sizes: Sequence[int] = (200, 80),
        dropout: float = 0.3,
        embedding_dropout: float = 0.2,
        id_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.history_size = history_size
        self.feedback_size = feedback.size
        self.profile_sizes = tuple(field.size for field in user_fields)
        self.interest_size = interest_size
        item_embedding = ItemEmbedding(item_table, item_fields, embedding_dim, id_dropout)
        self.item_embedding: ItemEmbedding | nn.Embedding = item_embedding
        self.feedback_embedding = FieldEmbedding(feedback.size, embedding_dim)
        self.profile_embedding = ProfileEmbedding(user_fields, embedding_dim)
        item_size = item_embedding.output_size
        step_size = item_size + embedding_dim
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.extractor = GRU(step_size, hidden_size)
        self.query = nn.Linear(item_size, hidden_size)
        self.attention = InterestAttention(hidden_size, attention_size)
        self.evolution = AUGRU(hidden_size, hidden_size)
        self.taste = nn.Linear(step_size, item_size)
        self.mlp = FoldedMLP(
            self.profile_embedding.output_size + step_size + interest_size,
            2 * item_size + hidden_size,
            mlp_sizes,
            dropout,
        )

    def forward(
        self,
        item_index: Tensor,
        user_index: Tensor | None,
        history_item: Tensor,
        history_feedback: Tensor,
        history_length: Tensor,
        profile: Tensor,
        interest: Tensor | None = None,
    ) -> Tensor:
        """Logits float32[N]; see `Backbone.forward`."""
        steps, mask = self._embed_history(history_item, history_feedback, history_length)
        return self._rank(item_index, user_index, steps, self.extractor(steps), mask, profile, interest)

    def forward_with_auxiliary(
        self,
        item_index: Tensor,
        user_index: Tensor | None,
        history_item: Tensor,
        history_feedback: Tensor,
        history_length: Tensor,
        profile: Tensor,
        interest: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits float32[N] and DIEN's auxiliary loss float32[] (its Eq. 6-7)."""
        steps, mask = self._embed_history(history_item, history_feedback, history_length)
        states = self.extractor(steps)
        logits = self._rank(item_index, user_index, steps, states, mask, profile, interest)
        return logits, self._auxiliary_loss(steps, states, mask)

    def _embed_history(self, item: Tensor, feedback: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Steps float[T, U, S] and their mask bool[T, U]."""
        steps = torch.cat((self.item_embedding(item.t()), self.feedback_embedding(feedback.t().unsqueeze(-1))), dim=-1)
        # One dropout mask for all steps of a row: what is dropped stays unknown to the whole recurrence.
        return steps * self.embedding_dropout(torch.ones_like(steps[:1])), sequence_mask(length, self.history_size)

    def _rank(
        self,
        item_index: Tensor,
        user_index: Tensor | None,
        steps: Tensor,
        states: Tensor,
        mask: Tensor,
        profile: Tensor,
        interest: Tensor | None,
    ) -> Tensor:
        item = self.embedding_dropout(self.item_embedding(item_index))
        scores = self.attention(self.query(item), states, user_index)
        attention = masked_softmax(scores, gather_users(mask, user_index, dim=1), dim=0)
        evolved = self.evolution(states, attention, user_index)
        valid = mask.unsqueeze(-1).to(steps.dtype)
        history = (steps * valid).sum(0) / valid.sum(0).clamp(min=1)
        user = [self.embedding_dropout(self.profile_embedding(profile)), history]
        if interest is not None:
            user.append(self.embedding_dropout(interest))
        match = item * gather_users(self.taste(history), user_index)
        logits: Tensor = self.mlp(torch.cat(user, dim=1), torch.cat((item, evolved, match), dim=1), user_index)
        return logits

    def _auxiliary_loss(self, steps: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Each state must tell the user's next behavior from another user's, drawn from the batch."""
        if steps.shape[0] < 2:
            return steps.new_zeros(())
        target = self.query(steps[1:, :, : self.query.in_features])
        other = torch.randperm(target.shape[1], device=target.device)
        real = mask[1:].to(steps.dtype)
        positive = functional.softplus(-(states[:-1] * target).sum(-1)) * real
        negative = functional.softplus((states[:-1] * target[:, other]).sum(-1)) * real * real[:, other]
        return (positive + negative).sum() / (2 * real.sum()).clamp(min=1)
