"""KAR's hybrid-expert adaptor: the knowledge of a user and that of an item as two features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from builders.models.layers import gather_users
from builders.models.meeting import Meeting


class Experts(nn.Module):
    """Small MLPs side by side on one input.

    Args:
        size: d, of the input.
        hidden_size: of each expert's hidden layer.
        embedding_dim: E, of each expert's answer.
        experts: how many.
    """

    def __init__(self, size: int, hidden_size: int, embedding_dim: int, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, embedding_dim))
            for _ in range(experts)
        )

    def forward(self, knowledge: Tensor) -> Tensor:
        """float[B, d] -> float[B, experts, E]."""
        return torch.stack([expert(knowledge) for expert in self.experts], dim=1)


class HybridExpertAdaptor(Meeting):
    r"""Brings both kinds of knowledge into the backbone's space (KAR, https://arxiv.org/abs/2306.10933, section 3.3).

    Some experts are shared by users and items, others are one side's own; a side's gate mixes the shared ones and its
    own,

    .. math::
        \alpha^u = \mathrm{Softmax}(W^u r^u + b^u), \quad
        v^u = \sum_i \alpha^u_i E^{s}_i(r^u) + \sum_j \alpha^u_{n_s + j} E^{u}_j(r^u),

    and likewise :math:`v^v` of the item with its own gate and experts. The two stand side by side as fields; that they
    meet is left to the backbone. Sizes are those of KAR's implementation. A user without a text has the knowledge 0.

    Args:
        size: d, of r̂ and of an item's knowledge.
        embedding_dim: E.
        shared: experts of both sides.
        own: experts of each side alone.
        hidden_size: of every expert.

    Example::

        adaptor = HybridExpertAdaptor(32, 16)
        fields = adaptor(torch.randn(2, 32), torch.randn(5, 32), torch.tensor([0, 0, 1, 1, 1]))  # [5, 2, 16]
    """

    fields = ("knowledge of the user", "knowledge of the item")
    reads_interest_alone = False

    def __init__(self, size: int, embedding_dim: int, *, shared: int = 2, own: int = 5, hidden_size: int = 128) -> None:
        super().__init__()
        self.shared = Experts(size, hidden_size, embedding_dim, shared)
        self.user = Experts(size, hidden_size, embedding_dim, own)
        self.item = Experts(size, hidden_size, embedding_dim, own)
        self.user_gate = nn.Linear(size, shared + own)
        self.item_gate = nn.Linear(size, shared + own)

    def forward(self, interest: Tensor, knowledge: Tensor, user_index: Tensor | None) -> Tensor:
        """See `Meeting.forward`; K = 2, and what is the user's alone is computed once per user."""
        user = self._adapt(interest, self.user, self.user_gate)
        item = self._adapt(knowledge, self.item, self.item_gate)
        return torch.stack((gather_users(user, user_index), item), dim=1)

    def _adapt(self, knowledge: Tensor, own: Experts, gate: nn.Linear) -> Tensor:
        """float[B, d] -> float[B, E]."""
        answers = torch.cat((self.shared(knowledge), own(knowledge)), dim=1)
        weights: Tensor = gate(knowledge).softmax(dim=1)
        return (weights.unsqueeze(2) * answers).sum(1)
