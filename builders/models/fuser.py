"""Fusers: a user's partition representations r_1..r_J into one interest (paper, section 3.4.2)."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from builders.models.layers import masked_softmax


class Fuser(nn.Module, abc.ABC):
    """Partitions in, one interest out.

    Args:
        size: d, of a representation and of the interest.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    @abc.abstractmethod
    def forward(self, representations: Tensor, partition_mask: Tensor) -> Tensor:
        """The interest of each user.

        Args:
            representations: float[U, J, d]; J may be 0. What stands in masked rows does not matter, as long as it is
                finite.
            partition_mask: bool[U, J], True for the partitions there are.

        Returns:
            float[U, d]; zeros for a user without partitions.
        """


class MeanFuser(Fuser):
    """The mean of the partitions: LIBER without its attention (paper, Figure 4)."""

    def forward(self, representations: Tensor, partition_mask: Tensor) -> Tensor:
        """See `Fuser.forward`."""
        valid = partition_mask.to(representations.dtype)
        return (representations * valid[:, :, None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


class AttentionFuser(Fuser):
    r"""Self-attention pooling of the partitions (LIBER, https://arxiv.org/abs/2411.14713, Eq. 5-6).

    .. math::
        \hat r = \mathrm{Aggr}\left(
            \mathrm{Softmax}\left(\frac{R W^Q (R W^K)^T}{\sqrt d}\right) R W^V\right),

    Aggr being the mean over the partitions. As it is linear, the mean of the attention's rows is taken first: one
    weight per partition, and :math:`W^V` is applied once per user, not once per partition.

    Args:
        size: d, of a representation and of the interest.

    Example::

        fuser = AttentionFuser(32)
        interest = fuser(torch.randn(2, 3, 32), torch.tensor([[True, True, True], [True, False, False]]))  # [2, 32]
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)

    def weights(self, representations: Tensor, partition_mask: Tensor) -> Tensor:
        """How much each partition counts in the interest.

        Args:
            representations: float[U, J, d]; what stands in masked rows does not matter, as long as it is finite.
            partition_mask: bool[U, J], True for the partitions there are.

        Returns:
            float[U, J], each row summing to one, or all zeros for a user without partitions.
        """
        scores = self.query(representations) @ self.key(representations).transpose(1, 2) * self.size**-0.5
        valid = partition_mask.to(representations.dtype)
        attention = masked_softmax(scores, partition_mask[:, None, :], dim=2)
        return (attention * valid[:, :, None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)

    def forward(self, representations: Tensor, partition_mask: Tensor) -> Tensor:
        """See `Fuser.forward`."""
        weights = self.weights(representations, partition_mask)
        interest: Tensor = self.value(torch.bmm(weights[:, None, :], representations).squeeze(1))
        return interest
