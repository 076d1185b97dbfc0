"""DCN and DCN V2: explicit crosses of bounded degree beside a deep network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from builders.models.dnn import DNN
from builders.models.features import Features, FeatureSchema
from builders.models.layers import CrossNet, CrossNetV2


class _CrossAndDeep(nn.Module):
    """A cross over all fields, flattened, and the numbers, beside a deep network over the same.

    The last layer over both parts (DCN, Eq. 5) is linear, so it is kept as a sum of what each part adds to the logit.
    """

    def __init__(
        self, schema: FeatureSchema, cross: Callable[[int], nn.Module], mlp_sizes: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        size = len(schema.fields) * schema.embedding_dim + len(schema.numbers)
        self.cross = cross(size)
        self.output = nn.Linear(size, 1, bias=False)
        self.deep = DNN(schema, mlp_sizes=mlp_sizes, dropout=dropout)

    def forward(self, features: Features) -> Tensor:
        """Logits float[N]."""
        crossed = self.cross(torch.cat((features.fields().flatten(1), features.numbers), dim=1))
        logits: Tensor = self.output(crossed).squeeze(-1) + self.deep(features)
        return logits


class DCN(_CrossAndDeep):
    """Deep & Cross Network (https://arxiv.org/abs/1708.05123): `CrossNet` and a deep network side by side.

    Args:
        schema: of the features.
        num_layers: of the cross.
        mlp_sizes: of the deep part; [200, 80] in the paper (section 4.1.3).
        dropout: of the deep part.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        num_layers: int = 3,
        mlp_sizes: Sequence[int] = (200, 80),
        dropout: float = 0.3,
    ) -> None:
        super().__init__(schema, lambda size: CrossNet(size, num_layers), mlp_sizes, dropout)


class DCNv2(_CrossAndDeep):
    """DCN V2 (https://arxiv.org/abs/2008.13535), its parallel form: `CrossNetV2` and a deep network side by side.

    Args:
        schema: of the features.
        num_layers: of the cross.
        rank: of the cross' matrices, see `CrossNetV2`; None for full ones. The paper's mixture of low-rank experts is
            left out.
        mlp_sizes: of the deep part; [200, 80] in the paper (section 4.1.3).
        dropout: of the deep part.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        num_layers: int = 2,
        rank: int | None = 64,
        mlp_sizes: Sequence[int] = (200, 80),
        dropout: float = 0.3,
    ) -> None:
        super().__init__(schema, lambda size: CrossNetV2(size, num_layers, rank), mlp_sizes, dropout)
