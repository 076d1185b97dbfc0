"""From the indices that training and serving share to what a backbone reads: the typed schema, and what fills it.

A backbone sees embeddings, never ids. Everything that is the same for all backbones is here, so that they differ in how
features meet, and in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.models import functions
from builders.models.layers import FieldEmbedding, gather_users, newest_steps, sequence_mask
from builders.models.meeting import Meeting
from builders.models.numbers import Numbers
from liber_runtime.vocabulary import Vocabulary


class Inputs(NamedTuple):
    """A folded batch of U users and N candidates, as indices of a vocabulary.

    Attributes:
        item_index: int32[N], the candidates; 0 if out of vocabulary.
        user_index: int32[N], whose candidate each is; None if N = U in order (training).
        history_item: int32[U, L], item indices, oldest first, post-padded with 0. L is at least the T steps that a
            backbone reads; the numbers look back further.
        history_feedback: int32[U, L], feedback buckets, post-padded with 0.
        history_length: int32[U], real steps.
        profile: int32[U, P], indices of the profile fields.
        interest: float32[U, d]; None for a model without LIBER.
        numbers: float32[N, M], what `Numbers` gives for these, L being as long as it looks back; None to have it
            computed. Training gives it, because its samples see other tables than those that are served (see
            `builders.statistics`).
    """

    item_index: Tensor
    user_index: Tensor | None
    history_item: Tensor
    history_feedback: Tensor
    history_length: Tensor
    profile: Tensor
    interest: Tensor | None = None
    numbers: Tensor | None = None


@dataclass(frozen=True)
class FeatureSchema:
    """What a backbone is given; its names, order and sizes.

    Attributes:
        candidate: fields of an item: its id, then its attributes.
        user: fields of a user: the profile's, then the mean of the history in every field of an item and in its
            feedback, then how feedback went with every field of an item; last the interest, if there is one.
        pair: fields of a candidate together with its user: how r̂ meets the candidate's own knowledge, if there is any.
        numbers: what each number says, see `Numbers`.
        history_length: T, steps of a padded history.
        embedding_dim: E, of every field.
    """

    candidate: tuple[str, ...]
    user: tuple[str, ...]
    pair: tuple[str, ...]
    numbers: tuple[str, ...]
    history_length: int
    embedding_dim: int

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields, in the order of `Features.fields`."""
        return self.candidate + self.pair + self.user

    @property
    def step_size(self) -> int:
        """Size of a step of the history: the item's fields and the feedback, E each."""
        return (len(self.candidate) + 1) * self.embedding_dim


class Lookup(NamedTuple):
    """Steps of histories as what they are looked up from; a step is its item's row beside its feedback's.

    Attributes:
        item_table: float[I+1, A].
        feedback_table: float[F, B].
        history_item: int[U, T].
        history_feedback: int[U, T].
    """

    item_table: Tensor
    feedback_table: Tensor
    history_item: Tensor
    history_feedback: Tensor


@dataclass(frozen=True)
class Features:
    """What a backbone reads of U users and N candidates; sizes are those of the `FeatureSchema`.

    Attributes:
        candidate: float[N, C, E], fields of the candidate.
        user: float[U, F, E], fields of the user.
        pair: float[N, K, E], fields of both; K may be 0.
        numbers: float[N, M], of mean 0 and variance 1 over the training samples.
        history: float[T, U, S], time-major steps, oldest first: the item's fields as in `candidate`, then the feedback.
        history_mask: bool[T, U], True for real steps.
        history_length: int[U], how many they are.
        history_mean: float[U, S], their mean.
        user_index: int[N], whose candidate each is; None if N = U in order.
    """

    candidate: Tensor
    user: Tensor
    pair: Tensor
    numbers: Tensor
    history: Tensor
    history_mask: Tensor
    history_length: Tensor
    history_mean: Tensor
    user_index: Tensor | None

    def map_history(self, weight: Tensor, bias: Tensor) -> Tensor:
        """float[T, U, H]: a linear map of every step, weight float[H, S] and bias float[H]."""
        return functional.linear(self.history, weight, bias)

    def fields(self) -> Tensor:
        """float[N, C + K + F, E]: all fields of every candidate, those of its user repeated."""
        return torch.cat((self.candidate, self.pair, gather_users(self.user, self.user_index)), dim=1)


@dataclass(frozen=True)
class ServedFeatures(Features):
    """Features whose history is looked up in a catalogue: a map of it is looked up too, its steps are never made."""

    lookup: Lookup

    def map_history(self, weight: Tensor, bias: Tensor) -> Tensor:
        """See `Features.map_history`."""
        return functions.map_history(*self.lookup, weight, bias)


class ItemEmbedding(nn.Module):
    """Embeds item indices: [id, field 1, field 2, ...], one `embedding_dim` each.

    The attributes come from `item_table`, a buffer, so a caller knows an item by its index alone.

    Args:
        item_table: int32[I+1, W]: row of the id embedding (0: out of vocabulary), then `Field.width` columns per field.
        vocabulary: its item fields are the table's, in order.
        embedding_dim: E, per field.
        id_dropout: share of lookups that see the out-of-vocabulary row in place of the id, in training: it learns
            what to say of an item never seen, and the other fields cannot lean on memorised ids.
    """

    item_table: Tensor

    def __init__(
        self,
        item_table: npt.NDArray[np.int32],
        vocabulary: Vocabulary,
        embedding_dim: int,
        id_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [field.width for field in vocabulary.item_fields]
        if item_table.shape[1] != 1 + sum(widths):
            raise ValueError(
                f"item_table has {item_table.shape[1]} columns; 1 + {sum(widths)} are needed for the id and {widths}"
            )
        self.num_embeddings = len(item_table)
        self.widths = widths
        self.id_dropout = id_dropout
        self.register_buffer("item_table", torch.from_numpy(np.ascontiguousarray(item_table)))
        self.id = FieldEmbedding(int(item_table[:, 0].max()) + 1, embedding_dim)
        self.fields = nn.ModuleList(
            FieldEmbedding(field.size, embedding_dim, field.width) for field in vocabulary.item_fields
        )

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
        vocabulary: its user fields; single-valued.
        embedding_dim: E, per field.
    """

    def __init__(self, vocabulary: Vocabulary, embedding_dim: int) -> None:
        super().__init__()
        self.fields = nn.ModuleList(FieldEmbedding(field.size, embedding_dim) for field in vocabulary.user_fields)

    def forward(self, profile: Tensor) -> Tensor:
        """int[U, P] -> float[U, P * E]."""
        embedded = [field(profile[:, column, None]) for column, field in enumerate(self.fields)]
        return torch.cat(embedded, dim=1) if embedded else profile.new_zeros((profile.shape[0], 0), dtype=torch.float32)


class FeatureEmbedding(nn.Module):
    """Fills a `FeatureSchema`.

    Args:
        vocabulary: maps raw values to the indices that come in.
        item_table: int32[I+1, W], see `ItemEmbedding`.
        numbers: computes what is a number and not a field.
        history_length: T.
        lookback: L, steps of the histories that are served; None for T.
        embedding_dim: E.
        interest_size: d of r̂; 0 for a model without LIBER.
        meeting: how r̂ meets the candidate's own knowledge; None for the paper's form, where r̂ is one more field and
            nothing else.
        item_knowledge: float32[I+1, d], for a meeting: the items' own texts through the writer, the encoder and the PCA
            that r̂ is made of.
        dropout: of whole fields' entries, the interest included.
        id_dropout: see `ItemEmbedding`.
    """

    item_knowledge: Tensor

    def __init__(
        self,
        vocabulary: Vocabulary,
        item_table: npt.NDArray[np.int32],
        numbers: Numbers,
        *,
        history_length: int,
        lookback: int | None = None,
        embedding_dim: int = 32,
        interest_size: int = 0,
        meeting: Meeting | None = None,
        item_knowledge: npt.NDArray[np.float32] | None = None,
        dropout: float = 0.2,
        id_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if meeting is not None and (item_knowledge is None or item_knowledge.shape != (len(item_table), interest_size)):
            shape = None if item_knowledge is None else item_knowledge.shape
            raise ValueError(f"item_knowledge has shape {shape}; {(len(item_table), interest_size)} is needed")
        self.lookback = lookback or history_length
        self.num_items = len(item_table)
        self.feedback_size = vocabulary.feedback.size
        self.profile_sizes = tuple(field.size for field in vocabulary.user_fields)
        self.interest_size = interest_size
        self.item_embedding: ItemEmbedding | nn.Embedding = ItemEmbedding(
            item_table, vocabulary, embedding_dim, id_dropout
        )
        self.feedback_embedding = FieldEmbedding(vocabulary.feedback.size, embedding_dim)
        self.profile_embedding = ProfileEmbedding(vocabulary, embedding_dim)
        self.numbers = numbers
        self.dropout = nn.Dropout(dropout)
        self.meeting = meeting
        has_interest = bool(interest_size) and (meeting is None or meeting.reads_interest_alone)
        self.interest = nn.Linear(interest_size, embedding_dim) if has_interest else None
        if meeting is not None:
            self.register_buffer("item_knowledge", torch.from_numpy(item_knowledge))
        candidate = ("id", *(field.name for field in vocabulary.item_fields))
        profile = tuple(field.name for field in vocabulary.user_fields)
        history = tuple(f"{what} of the history" for what in (*candidate, "feedback"))
        tastes = tuple(f"taste in {what}" for what in candidate)
        self.schema = FeatureSchema(
            candidate=candidate,
            user=profile + history + tastes + (("interest",) if has_interest else ()),
            pair=meeting.fields if meeting is not None else (),
            numbers=numbers.names,
            history_length=history_length,
            embedding_dim=embedding_dim,
        )

    def forward(self, inputs: Inputs) -> Features:
        """See `Inputs` and `Features`.

        Raises:
            ValueError: an interest is missing, or given to a model without LIBER.
        """
        if (inputs.interest is None) == bool(self.interest_size):
            given = "none is given" if inputs.interest is None else "one is given"
            raise ValueError(f"the features take an interest of {self.interest_size}, but {given}")
        size = self.schema.embedding_dim
        steps, length = self.schema.history_length, inputs.history_length
        history_item = newest_steps(inputs.history_item, length, steps)
        history_feedback = newest_steps(inputs.history_feedback, length, steps)
        length = length.clamp(max=steps)
        items = self.item_embedding(history_item.t())
        feedback = self.feedback_embedding(history_feedback.t().unsqueeze(-1))
        history = torch.cat((items, feedback), dim=-1)
        mask = sequence_mask(length, steps)
        value = self.numbers.centered_feedback(history_feedback, length)
        lookup = None
        if isinstance(self.item_embedding, nn.Embedding):
            lookup = Lookup(
                self.item_embedding.weight, self.feedback_embedding.table.weight, history_item, history_feedback
            )
            pooled = functions.pool_history(*lookup, length, value)
            mean, tastes = pooled[:, : self.schema.step_size], pooled[:, self.schema.step_size :]
        else:
            valid = mask.unsqueeze(-1).to(history.dtype)
            count = valid.sum(0).clamp(min=1)
            mean = (history * valid).sum(0) / count
            tastes = (items * (valid * value.t().unsqueeze(-1))).sum(0) / count
        user = [self.profile_embedding(inputs.profile), mean, tastes]
        if self.training:
            # One dropout mask for all steps of a row: what is dropped stays unknown to a whole recurrence.
            kept = self.dropout(torch.ones_like(history[:1]))
            history, mean = history * kept, mean * kept.squeeze(0)
        if self.interest is not None:
            user.append(self.interest(inputs.interest))
        candidate = self.item_embedding(inputs.item_index)
        numbers = inputs.numbers if inputs.numbers is not None else self.numbers(inputs)
        # Not `unflatten`: its result has the size of the example wherever an exported backbone asks for its shape.
        filled = {
            "candidate": self.dropout(candidate).view(-1, len(self.schema.candidate), size),
            "user": self.dropout(torch.cat(user, dim=1)).view(-1, len(self.schema.user), size),
            "pair": self.dropout(self._meet(inputs, candidate)),
            "numbers": numbers,
            "history": history,
            "history_mask": mask,
            "history_length": length,
            "history_mean": mean,
        }
        if lookup is None:
            return Features(**filled, user_index=inputs.user_index)
        return ServedFeatures(**filled, user_index=inputs.user_index, lookup=lookup)

    def _meet(self, inputs: Inputs, candidate: Tensor) -> Tensor:
        """float[N, K, E]: fields of r̂ and the candidate's own knowledge."""
        if self.meeting is None:
            return candidate.new_zeros((candidate.shape[0], 0, self.schema.embedding_dim))
        knowledge = functional.embedding(inputs.item_index, self.item_knowledge)
        fields: Tensor = self.meeting(inputs.interest, knowledge, inputs.user_index)
        return fields
