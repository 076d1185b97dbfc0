"""How the knowledge of a user meets the knowledge of a candidate: fields of both together."""

from __future__ import annotations

import abc

from torch import Tensor, nn

from builders.models.layers import gather_users


class Meeting(nn.Module, abc.ABC):
    """Makes fields of r̂ and the candidate's own knowledge, which one writer, encoder and PCA made.

    Attributes:
        fields: names of the K fields.
        reads_interest_alone: whether r̂ is a field of its own beside them.
    """

    fields: tuple[str, ...]
    reads_interest_alone: bool

    @abc.abstractmethod
    def forward(self, interest: Tensor, knowledge: Tensor, user_index: Tensor | None) -> Tensor:
        """The fields.

        Args:
            interest: float[U, d], r̂.
            knowledge: float[N, d], the candidates' own.
            user_index: int[N], or None if N = U in order.

        Returns:
            float[N, K, E].
        """


class ProductMeeting(Meeting):
    """r̂ and the candidate's knowledge, each mapped to E numbers and multiplied: a bilinear form of rank one an entry.

    Args:
        size: d.
        embedding_dim: E.
    """

    fields = ("interest in the candidate",)
    reads_interest_alone = True

    def __init__(self, size: int, embedding_dim: int) -> None:
        super().__init__()
        self.user = nn.Linear(size, embedding_dim)
        self.candidate = nn.Linear(size, embedding_dim)

    def forward(self, interest: Tensor, knowledge: Tensor, user_index: Tensor | None) -> Tensor:
        """See `Meeting.forward`."""
        product: Tensor = self.candidate(knowledge) * gather_users(self.user(interest), user_index)
        return product.unsqueeze(1)
