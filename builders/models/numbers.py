"""What a backbone reads as numbers: how a user rates, how an item is rated, and what the users who rated both say.

Nothing here is learned by gradient: the tables come from `builders.statistics`. So training computes the numbers of its
samples once, each from tables that its own user had no part in, and the exported graph computes them from the tables of
all users. It is one module in both places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.models import functions
from builders.models.layers import gather_users, newest_steps, sequence_mask

if TYPE_CHECKING:
    from builders.models.features import Inputs

SHARPNESS = 4.0
"""Of the softmax over the likeness (cosine) of a candidate's attributes to those of the items of the history."""

EVIDENCE = 0.01
"""Squared similarity that counts as much as all items of the history that are like the candidate, if they are few."""

KNOWLEDGE_SHARPNESS = (4.0, 12.0)
"""The same for the items' own texts: what is somewhat like the candidate, and what is much like it."""


@dataclass(frozen=True)
class ItemStatistics:
    """What the behaviors of some users say of every item; fitted by `builders.statistics`.

    Attributes:
        level: mean feedback.
        feedback: float32[B], value of each feedback bucket; entry 0 is the level.
        mean: float32[I+1], by how much the item's mean feedback is above the level and its raters' own, shrunk to 0.
        count: float32[I+1], behaviors with the item.
        vectors: float32[I+1, D], factors of the item, scaled so that the users' have covariance 1; row 0 is zero.
        similarity: float32[I+1, R], vectors whose products say how alike two items are rated; row 0 is zero.
        attributes: float32[I+1, A], the item's attributes, of length 1; row 0 is zero.
        noise: variance of feedback around what the factors say.
        bias: variance of the users' own levels.
    """

    level: float
    feedback: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    count: npt.NDArray[np.float32]
    vectors: npt.NDArray[np.float32]
    similarity: npt.NDArray[np.float32]
    attributes: npt.NDArray[np.float32]
    noise: float
    bias: float


class Numbers(nn.Module):
    r"""Numbers of a candidate and its user, standardised.

    The taste of a user is folded into the items' factors by ridge regression over the history (the posterior mean of
    Bayesian matrix factorisation, https://dl.acm.org/doi/10.1145/1390156.1390267):

    .. math::
        w = \Big(\sum_t x_t x_t^T + \sigma^2 I\Big)^{-1} \sum_t x_t \rho_t, \qquad x = [\sqrt{\beta}, v],

    with :math:`\rho_t` the feedback above the item's mean, :math:`v` the item's factors, :math:`\sigma^2` the noise and
    :math:`\beta` the variance of the users' levels. Feedback to similar items is that of item-based collaborative
    filtering (https://dl.acm.org/doi/10.1145/371920.372071), weighted by the squared similarity.

    Args:
        statistics: of the items.
        recent: newest behaviors that tell levels and taste; feedback to similar items is looked up in all.
        knowledge: float32[I+1, d], the items' own texts as vectors, row 0 zero: more numbers then say how feedback went
            with items of like knowledge, however long ago. None for a model without LIBER.
        mean: float32[M], subtracted from the numbers; None for 0.
        scale: float32[M], then divides them; None for 1.
    """

    STATISTICAL = (
        "level of the user",
        "spread of the user",
        "behaviors of the user",
        "level of the item",
        "behaviors with the item",
        "bias of the user",
        "taste for the item",
        "expected feedback",
        "feedback to similar items",
        "similar items",
        "feedback times similarity",
        "feedback to items of like attributes",
        "likeness of attributes",
    )
    KNOWING = (
        "feedback to items of like knowledge",
        "feedback to items of much like knowledge",
        "items of much like knowledge",
    )

    level: Tensor
    feedback: Tensor
    item_mean: Tensor
    item_count: Tensor
    vectors: Tensor
    similarity: Tensor
    attributes: Tensor
    sharpness: Tensor
    knowledge: Tensor
    knowledge_sharpness: Tensor
    noise: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        statistics: ItemStatistics,
        recent: int,
        knowledge: npt.NDArray[np.float32] | None = None,
        mean: npt.NDArray[np.float32] | None = None,
        scale: npt.NDArray[np.float32] | None = None,
    ) -> None:
        super().__init__()
        self.recent = recent
        self.names = self.STATISTICAL + (self.KNOWING if knowledge is not None else ())
        items = len(statistics.mean)
        vectors = torch.from_numpy(statistics.vectors)
        bias = torch.full((items, 1), statistics.bias**0.5)
        held = {
            "level": torch.tensor(statistics.level, dtype=torch.float32),
            "feedback": torch.from_numpy(statistics.feedback).unsqueeze(1),
            "item_mean": torch.from_numpy(statistics.mean).unsqueeze(1),
            "item_count": torch.from_numpy(statistics.count).log1p().unsqueeze(1),
            "vectors": torch.cat((bias, vectors), dim=1),
            "similarity": torch.from_numpy(statistics.similarity),
            "attributes": torch.from_numpy(statistics.attributes),
            "sharpness": torch.tensor([SHARPNESS]),
            "noise": torch.tensor(statistics.noise, dtype=torch.float32),
            "mean": torch.from_numpy(mean) if mean is not None else torch.zeros(len(self.names)),
            "scale": torch.from_numpy(scale) if scale is not None else torch.ones(len(self.names)),
        }
        if knowledge is not None:
            # Around their mean, for all texts of a catalogue are somewhat alike; the unknown item stays at zero.
            centered = torch.from_numpy(knowledge - knowledge[1:].mean(0))
            centered[0] = 0
            held["knowledge"] = functional.normalize(centered, dim=1)
            held["knowledge_sharpness"] = torch.tensor(KNOWLEDGE_SHARPNESS)
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    def centered_feedback(self, history_feedback: Tensor, history_length: Tensor) -> Tensor:
        """float[U, T]: the feedback of a history above the level of all users; 0 where it is padded."""
        value = functional.embedding(history_feedback, self.feedback).squeeze(-1) - self.level
        return value * sequence_mask(history_length, history_feedback.shape[1]).t()

    def forward(self, inputs: Inputs) -> Tensor:
        """float[N, M], in the order of `names`; see `Inputs`."""
        user_index, item = inputs.user_index, inputs.item_index
        distant = self._residuals(inputs.history_item, inputs.history_feedback, inputs.history_length)
        known = inputs.history_item, inputs.history_length, distant, user_index
        weight, weighed, product = functions.similar_feedback(self.similarity, item, *known).unbind(1)

        history = newest_steps(inputs.history_item, inputs.history_length, self.recent)
        given = newest_steps(inputs.history_feedback, inputs.history_length, self.recent)
        steps = inputs.history_length.clamp(max=self.recent)
        value = self.centered_feedback(given, steps)
        centered = self._residuals(history, given, steps)
        valid = sequence_mask(steps, history.shape[1]).t().to(value.dtype)
        length = valid.sum(1)
        average = value.sum(1) / (length + functions.PRIOR_BEHAVIORS)
        spread = ((value - average[:, None]).square() * valid).sum(1) / (length + functions.PRIOR_BEHAVIORS)
        residual = (value - functional.embedding(history, self.item_mean).squeeze(-1)) * valid
        taste = functions.fold_in(self.vectors, history, steps, residual, self.noise)

        candidate = functional.embedding(item, self.vectors)
        item_mean = functional.embedding(item, self.item_mean).squeeze(-1)
        products = gather_users(taste, user_index) * candidate
        bias, match = products[:, 0], products[:, 1:].sum(1)
        likeness, *attributes = functions.alike_feedback(
            self.attributes, item, history, steps, centered, user_index, self.sharpness
        ).unbind(1)
        columns = [
            gather_users(average, user_index),
            gather_users(spread.sqrt(), user_index),
            gather_users(length.log1p(), user_index),
            item_mean,
            functional.embedding(item, self.item_count).squeeze(-1),
            bias,
            match,
            item_mean + bias + match,
            weighed / (weight + EVIDENCE),
            (weight + EVIDENCE).log(),
            product,
            _mean(*attributes),
            likeness / gather_users(length, user_index).clamp(min=1),
        ]
        if len(self.names) > len(self.STATISTICAL):
            _, *alike = functions.alike_feedback(self.knowledge, item, *known, self.knowledge_sharpness).unbind(1)
            columns += [_mean(*alike[:2]), _mean(*alike[2:]), (alike[2] + EVIDENCE).log()]
        numbers = torch.stack(columns, dim=1)
        return (numbers - self.mean) / self.scale

    def _residuals(self, history: Tensor, given: Tensor, length: Tensor) -> Tensor:
        return functions.residuals(self.item_mean, self.feedback, self.level, history, given, length)


def _mean(weight: Tensor, weighed: Tensor) -> Tensor:
    """float[N]: a weighted mean; 0 where nothing has a weight."""
    return weighed / weight.clamp(min=1e-30)
