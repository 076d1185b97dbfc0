"""What every CTR model of LIBER looks like from outside, and the end-to-end model that is trained (paper, Eq. 5-7)."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.models.fuser import AttentionFuser
from builders.models.layers import FieldEmbedding
from liber_runtime.vocabulary import Field


class ItemEmbedding(nn.Module):
    """Embeds item indices: [id, field 1, field 2, ...], one `embedding_dim` each.

    The attributes come from `item_table`, a buffer, so a caller knows an item by its index alone.

    Args:
        item_table: int32[I+1, W]: row of the id embedding (0: out of vocabulary), then `Field.width` columns per field.
        fields: of the items, in the table's order.
        embedding_dim: E, per field.
        id_dropout: share of lookups that see the out-of-vocabulary row in place of the id, in training: it learns
            what to say of an item never seen, and the other fields cannot lean on memorised ids.
    """

    item_table: Tensor

    def __init__(
        self, item_table: npt.NDArray[np.int32], fields: Sequence[Field], embedding_dim: int, id_dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [field.width for field in fields]
        if item_table.shape[1] != 1 + sum(widths):
            raise ValueError(
                f"item_table has {item_table.shape[1]} columns; 1 + {sum(widths)} are needed for the id and {widths}"
            )
        self.num_embeddings = len(item_table)
        self.widths = widths
        self.id_dropout = id_dropout
        self.output_size = embedding_dim * (1 + len(fields))
        self.register_buffer("item_table", torch.from_numpy(np.ascontiguousarray(item_table)))
        self.id = FieldEmbedding(int(item_table[:, 0].max()) + 1, embedding_dim)
        self.fields = nn.ModuleList(FieldEmbedding(field.size, embedding_dim, field.width) for field in fields)

    def forward(self, item_index: Tensor) -> Tensor:
        """int[...] in [0, I] -> float[..., E * (1 + fields)]."""
        if item_index.numel() < self.num_embeddings:
            rows = functional.embedding(item_index, self.item_table)
            return torch.cat((self.id(self._drop(rows[..., :1])), self._embed_fields(rows)), dim=-1)
        # A batch names an item of a small catalogue many times: embed the attributes of each once, then look up.
        ids = self._drop(functional.embedding(item_index, self.item_table[:, :1]))
        fields = functional.embedding(item_index, self._embed_fields(self.item_table))
        return torch.cat((self.id(ids), fields), dim=-1)

    def catalogue(self) -> Tensor:
        """float[I+1, E * (1 + fields)]: every item's embedding, for an exported graph to look up."""
        return torch.cat((self.id(self.item_table[:, :1]), self._embed_fields(self.item_table)), dim=-1)

    def _embed_fields(self, rows: Tensor) -> Tensor:
        columns = torch.split(rows[..., 1:], self.widths, dim=-1)
        embedded = [field(indices) for field, indices in zip(self.fields, columns, strict=True)]
        return torch.cat(embedded, dim=-1) if embedded else rows.new_zeros((*rows.shape[:-1], 0), dtype=torch.float32)

    def _drop(self, ids: Tensor) -> Tensor:
        if not self.training or not self.id_dropout:
            return ids
        return ids * (torch.rand(ids.shape, device=ids.device) >= self.id_dropout)


class ProfileEmbedding(nn.Module):
    """Embeds a user's profile: one `embedding_dim` per field, concatenated; there is no user id.

    Args:
        fields: of the users; single-valued.
        embedding_dim: E, per field.
    """

    def __init__(self, fields: Sequence[Field], embedding_dim: int) -> None:
        super().__init__()
        self.output_size = embedding_dim * len(fields)
        self.fields = nn.ModuleList(FieldEmbedding(field.size, embedding_dim) for field in fields)

    def forward(self, profile: Tensor) -> Tensor:
        """int[U, P] -> float[U, P * E]."""
        embedded = [field(profile[:, column, None]) for column, field in enumerate(self.fields)]
        return torch.cat(embedded, dim=1) if embedded else profile.new_zeros((profile.shape[0], 0), dtype=torch.float32)


class Backbone(nn.Module, abc.ABC):
    """A CTR model f(x, h, r̂) that scores folded batches (paper, Eq. 7).

    What depends on the user alone is computed once per user and gathered by ``user_index``; eager and exported alike.

    Attributes:
        history_size: T, steps of a padded history.
        feedback_size: distinct feedback buckets, 0 included.
        profile_sizes: distinct indices of each of the P profile fields, 0 included.
        interest_size: d, or 0 for a model without LIBER, which then takes no interest.
        item_embedding: the only reader of item indices; an export replaces it by a table of the catalogue.
    """

    history_size: int
    feedback_size: int
    profile_sizes: tuple[int, ...]
    interest_size: int
    item_embedding: ItemEmbedding | nn.Embedding

    @abc.abstractmethod
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
        """Logits of the candidates.

        Args:
            item_index: int32[N], the candidates; 0 if out of vocabulary.
            user_index: int32[N], whose candidate each is; None if N = U in order (training).
            history_item: int32[U, T], item indices, oldest first, post-padded with 0.
            history_feedback: int32[U, T], feedback buckets, post-padded with 0.
            history_length: int32[U], real steps.
            profile: int32[U, P], indices of the profile fields.
            interest: float32[U, d], or None if `interest_size` is 0.

        Returns:
            float32[N].
        """

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
        """As `forward`, with the model's own loss beside the click's: (float32[N], float32[]).

        Zero unless a backbone has one.
        """
        logits = self(item_index, user_index, history_item, history_feedback, history_length, profile, interest)
        return logits, logits.new_zeros(())


class LiberModel(nn.Module):
    """Fuser and backbone as one model, trained end to end (paper, Eq. 5-7).

    Args:
        fuser: r_1..r_J -> r̂.
        backbone: with an `interest_size` equal to the fuser's size.
    """

    def __init__(self, fuser: AttentionFuser, backbone: Backbone) -> None:
        super().__init__()
        if backbone.interest_size != fuser.size:
            raise ValueError(
                f"the backbone takes an interest of {backbone.interest_size}, the fuser gives {fuser.size}"
            )
        self.fuser = fuser
        self.backbone = backbone

    def forward(
        self,
        representations: Tensor,
        partition_mask: Tensor,
        item_index: Tensor,
        user_index: Tensor | None,
        history_item: Tensor,
        history_feedback: Tensor,
        history_length: Tensor,
        profile: Tensor,
    ) -> Tensor:
        """Logits float32[N]; representations float32[U, J, d], partition_mask bool[U, J], the rest as in `Backbone`."""
        interest = self.fuser(representations, partition_mask)
        logits: Tensor = self.backbone(
            item_index, user_index, history_item, history_feedback, history_length, profile, interest
        )
        return logits

    def forward_with_auxiliary(
        self,
        representations: Tensor,
        partition_mask: Tensor,
        item_index: Tensor,
        user_index: Tensor | None,
        history_item: Tensor,
        history_feedback: Tensor,
        history_length: Tensor,
        profile: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the backbone's own loss: (float32[N], float32[])."""
        interest = self.fuser(representations, partition_mask)
        return self.backbone.forward_with_auxiliary(
            item_index, user_index, history_item, history_feedback, history_length, profile, interest
        )
