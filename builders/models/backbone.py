"""What a backbone is, and a backbone with its features and the fuser as one trained model (paper, Eq. 5-7)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from builders.models.features import FeatureEmbedding, Features, FeatureSchema, Inputs
from builders.models.fuser import Fuser


@runtime_checkable
class Backbone(Protocol):
    """A CTR model over `Features` (paper, Eq. 7): a `torch.nn.Module` made from a `FeatureSchema` alone.

    A backbone may also have ``forward_with_auxiliary(features) -> (logits float[N], loss float[])`` for a loss of its
    own beside the click's.
    """

    def __init__(self, schema: FeatureSchema) -> None: ...

    def __call__(self, features: Features) -> Tensor:
        """Logits float[N] of the candidates."""
        ...


class Ranker(nn.Module):
    """Features, backbone and, with LIBER, the fuser: trained end to end.

    Args:
        features: fills the schema that the backbone was made from.
        backbone: see `Backbone`; a module.
        fuser: r_1..r_J -> r̂; None for a model without LIBER.
    """

    def __init__(self, features: FeatureEmbedding, backbone: nn.Module, fuser: Fuser | None = None) -> None:
        super().__init__()
        size = fuser.size if fuser is not None else 0
        if features.interest_size != size:
            raise ValueError(f"the features take an interest of {features.interest_size}, the fuser gives {size}")
        self.features = features
        self.backbone = backbone
        self.fuser = fuser

    def forward(
        self, inputs: Inputs, representations: Tensor | None = None, partition_mask: Tensor | None = None
    ) -> Tensor:
        """Logits float[N].

        Args:
            inputs: of U users and N candidates; its interest is not looked at if there is a fuser.
            representations: float32[U, J, d], if there is a fuser.
            partition_mask: bool[U, J], with them.
        """
        logits: Tensor = self.backbone(self.embed(inputs, representations, partition_mask))
        return logits

    def forward_with_auxiliary(
        self, inputs: Inputs, representations: Tensor | None = None, partition_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the backbone's own loss: (float[N], float[]); zero unless it has one."""
        features = self.embed(inputs, representations, partition_mask)
        with_auxiliary = getattr(self.backbone, "forward_with_auxiliary", None)
        if with_auxiliary is None:
            logits = self.backbone(features)
            return logits, logits.new_zeros(())
        both: tuple[Tensor, Tensor] = with_auxiliary(features)
        return both

    def embed(
        self, inputs: Inputs, representations: Tensor | None = None, partition_mask: Tensor | None = None
    ) -> Features:
        """What the backbone reads; arguments as in `forward`."""
        if self.fuser is not None and representations is not None:
            inputs = inputs._replace(interest=self.fuser(representations, partition_mask))
        features: Features = self.features(inputs)
        return features
