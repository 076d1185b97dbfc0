"""Fusers as they are served: the partitions of all users one after another, without padding between them."""

from __future__ import annotations

from torch import Tensor, nn

from builders.models.functions import fuse_partitions, pad_partitions
from builders.models.fuser import AttentionFuser, Fuser


class RaggedFuser(nn.Module):
    """Any fuser over partitions one after another.

    Args:
        fuser: what fuses them; shared, not copied.
    """

    def __init__(self, fuser: Fuser) -> None:
        super().__init__()
        self.fuser = fuser

    def forward(self, representations: Tensor, partition_count: Tensor) -> Tensor:
        """The interest of each user.

        Args:
            representations: see `fuse_partitions`.
            partition_count: see `fuse_partitions`.

        Returns:
            float[U, d]; zeros for a user without partitions.
        """
        interest: Tensor = self.fuser(*pad_partitions(representations, partition_count))
        return interest


class RaggedAttention(nn.Module):
    r"""`AttentionFuser` for service: the same interest in fewer operations.

    Query and key meet in one matrix, :math:`R W^Q (R W^K)^T = (R A) R^T` with :math:`A = W^Q {W^K}^T / \sqrt d`, and
    the mean over the attention's rows is a product with the vector of the rows' weights.

    Args:
        fuser: a trained one; its weights are read once.
    """

    scores: Tensor
    value: Tensor

    def __init__(self, fuser: AttentionFuser) -> None:
        super().__init__()
        # nn.Linear keeps the transpose of what Eq. 6 calls W. In double precision, so that only the result is rounded.
        query, key = fuser.query.weight.detach().double(), fuser.key.weight.detach().double()
        self.register_buffer("scores", (query.T @ key * fuser.size**-0.5).float())
        self.register_buffer("value", fuser.value.weight.detach().T.clone())

    def forward(self, representations: Tensor, partition_count: Tensor) -> Tensor:
        """See `RaggedFuser.forward`."""
        return fuse_partitions(representations, partition_count, self.scores, self.value)


def make_ragged(fuser: Fuser) -> nn.Module:
    """What is exported of a fuser."""
    return RaggedAttention(fuser) if isinstance(fuser, AttentionFuser) else RaggedFuser(fuser)
