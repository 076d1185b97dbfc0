"""Layers of the backbones: embeddings in, embeddings out; no ids' meaning and no configuration reach them.

Sequences are time-major, [T, ...], because a recurrence reads one step of every row at a time. A batch is folded: what
depends on the user alone has U rows, what depends on the candidate has N, and ``user_index`` int[N] says whose
candidate each is. ``user_index=None`` means that row n belongs to user n, as in training: nothing is gathered then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def gather_users(rows: Tensor, user_index: Tensor | None, dim: int = 0) -> Tensor:
    """Repeats the users' rows for their candidates: [..., U, ...] -> [..., N, ...] along `dim`."""
    return rows if user_index is None else rows.index_select(dim, user_index)


def sequence_mask(length: Tensor, size: int) -> Tensor:
    """bool[size, U]: True where a time-major, post-padded sequence has a real step.

    Args:
        length: int[U], real steps of each row.
        size: T, steps of the padded sequence.
    """
    return torch.arange(size, device=length.device, dtype=length.dtype)[:, None] < length


def masked_softmax(scores: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Softmax over the entries of `dim` where `mask` is True; 0 elsewhere, and 0 everywhere if none is.

    Args:
        scores: float[...].
        mask: bool, broadcastable to `scores`.
        dim: dimension that sums to one; may have size 0.
    """
    # A finite floor: -inf would turn rows without any valid entry into NaN.
    return scores.masked_fill(~mask, -1e9).softmax(dim) * mask


class FieldEmbedding(nn.Module):
    """Embeds one categorical field, mean-pooled over its non-zero indices if it has several.

    A single-valued field has a row of its own for index 0 (unknown, starts at zero); a multi-valued one without any
    non-zero index gives zeros.

    Args:
        num_embeddings: distinct indices, index 0 included.
        embedding_dim: size E of the result.
        width: indices per row.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, width: int = 1) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Embedding(num_embeddings, embedding_dim, padding_idx=0 if width > 1 else None)
        nn.init.normal_(self.table.weight, std=0.05)
        with torch.no_grad():
            self.table.weight[0].zero_()

    def forward(self, indices: Tensor) -> Tensor:
        """int[..., width] -> float[..., E]."""
        if self.width == 1:
            embedded: Tensor = self.table(indices.squeeze(-1))
            return embedded
        count = (indices != 0).sum(-1, keepdim=True).clamp(min=1)
        # Row 0 is zero and stays so (padding_idx), hence the sum runs over the non-zero indices alone.
        pooled: Tensor = self.table(indices).sum(-2) / count
        return pooled


class _GatedRecurrence(nn.Module):
    """Weights and one step shared by `GRU` and `AUGRU`; input projections are one GEMM over all steps."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.gates_input = nn.Linear(input_size, 2 * hidden_size)
        self.candidate_input = nn.Linear(input_size, hidden_size)
        self.recurrent = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        for block in self.recurrent.weight.chunk(3):
            nn.init.orthogonal_(block)

    def _project(self, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        # unbind, not indexing: the gradient of one stack instead of T sums into zeros of the full size.
        return zip(self.gates_input(inputs).unbind(), self.candidate_input(inputs).unbind(), strict=True)

    def _step(self, gates: Tensor, candidate: Tensor, state: Tensor, attention: Tensor | None) -> Tensor:
        size = self.hidden_size
        gates_state, candidate_state = self.recurrent(state).split((2 * size, size), dim=1)
        update, reset = (gates + gates_state).sigmoid().split(size, dim=1)
        change = (candidate + reset * candidate_state).tanh() - state
        next_state: Tensor = state + (update if attention is None else attention * update) * change
        return next_state


class GRU(_GatedRecurrence):
    r"""The interest extractor: a GRU that returns every state (DIEN, https://arxiv.org/abs/1809.03672, Eq. 2-5).

    .. math::
        u_t &= \sigma(W^u i_t + U^u h_{t-1} + b^u), \quad r_t = \sigma(W^r i_t + U^r h_{t-1} + b^r) \\
        \tilde h_t &= \tanh(W^h i_t + b^h + r_t \circ U^h h_{t-1}), \quad
        h_t = (1 - u_t) \circ h_{t-1} + u_t \circ \tilde h_t

    It is causal, so the states of a row's real steps do not depend on its post-padding; those of padded steps mean
    nothing.

    Args:
        input_size: size D of a step.
        hidden_size: size H of a state.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """float[T, U, D] -> float[T, U, H]."""
        state = inputs.new_zeros(inputs.shape[1], self.hidden_size)
        states = []
        for gates, candidate in self._project(inputs):
            state = self._step(gates, candidate, state, None)
            states.append(state)
        return torch.stack(states)


class AUGRU(_GatedRecurrence):
    r"""GRU whose update gate is scaled by an attention weight (DIEN, https://arxiv.org/abs/1809.03672, Eq. 9-10).

    .. math::
        \tilde u_t = a_t u_t, \quad h_t = (1 - \tilde u_t) \circ h_{t-1} + \tilde u_t \circ \tilde h_t

    A step with :math:`a_t = 0` leaves the state as it is, so post-padding needs neither packed sequences nor a gather
    of the last real step.

    Args:
        input_size: size D of a step.
        hidden_size: size H of the state.

    Example::

        augru = AUGRU(8, 16)
        final = augru(torch.randn(20, 3, 8), torch.rand(20, 5), torch.tensor([0, 0, 1, 2, 2]))  # [5, 16]
    """

    def forward(self, inputs: Tensor, attention: Tensor, user_index: Tensor | None = None) -> Tensor:
        """The state after the last step.

        Args:
            inputs: float[T, U, D].
            attention: float[T, N], 0 at padded steps.
            user_index: int[N], or None if N = U in order.

        Returns:
            float[N, H]; zeros where all attention is 0.
        """
        state = inputs.new_zeros(attention.shape[1], self.hidden_size)
        for (gates, candidate), weight in zip(self._project(inputs), attention.unsqueeze(-1).unbind(), strict=True):
            state = self._step(gather_users(gates, user_index), gather_users(candidate, user_index), state, weight)
        return state


class InterestAttention(nn.Module):
    r"""Scores every step of a user's sequence for a candidate: a small MLP over [q, k, q - k, q * k].

    The local activation unit of DIN (https://arxiv.org/abs/1706.06978), as DIEN's implementation uses it in place of
    the bilinear form of its Eq. 8. The first layer is kept in its split form, which is the same map,

    .. math::
        W [q, k, q - k, q \circ k] = q (W_q + W_d) + k (W_k - W_d) + (q \circ k) W_p,

    so the key's part is computed once per user instead of once per candidate, and half of the multiplications go.

    Args:
        size: of a query and of a key, H.
        hidden_size: of the hidden layer, A.
    """

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, hidden_size)
        self.key = nn.Linear(size, hidden_size, bias=False)
        self.product = nn.Linear(size, hidden_size, bias=False)
        self.activation = nn.PReLU()
        self.score = nn.Linear(hidden_size, 1)

    def forward(self, query: Tensor, keys: Tensor, user_index: Tensor | None = None) -> Tensor:
        """Unnormalised scores.

        Args:
            query: float[N, H], one per candidate.
            keys: float[T, U, H], one sequence per user.
            user_index: int[N], or None if N = U in order.

        Returns:
            float[T, N].
        """
        product = self.product(query * gather_users(keys, user_index, dim=1))
        hidden = self.query(query) + gather_users(self.key(keys), user_index, dim=1) + product
        scores: Tensor = self.score(self.activation(hidden))
        return scores.squeeze(-1)


class FoldedMLP(nn.Module):
    """MLP over [user features, candidate features] whose first layer reads the user features once per user.

    Args:
        user_size: size of the features of a user; 0 if there are none.
        candidate_size: size of the features of a candidate (with the user).
        hidden_sizes: of the hidden layers, [200, 80] in the paper (section 4.1.3).
        dropout: after every hidden layer.
    """

    def __init__(self, user_size: int, candidate_size: int, hidden_sizes: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.user = nn.Linear(user_size, hidden_sizes[0], bias=False)
        self.candidate = nn.Linear(candidate_size, hidden_sizes[0])
        bound = (user_size + candidate_size) ** -0.5
        for weight in (self.user.weight, self.candidate.weight):
            nn.init.uniform_(weight, -bound, bound)
        layers: list[nn.Module] = [nn.PReLU(), nn.Dropout(dropout)]
        for size, next_size in itertools.pairwise(hidden_sizes):
            layers += [nn.Linear(size, next_size), nn.PReLU(), nn.Dropout(dropout)]
        self.rest = nn.Sequential(*layers, nn.Linear(hidden_sizes[-1], 1))

    def forward(self, user: Tensor, candidate: Tensor, user_index: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            user: float[U, user_size].
            candidate: float[N, candidate_size].
            user_index: int[N], or None if N = U in order.

        Returns:
            float[N].
        """
        logits: Tensor = self.rest(self.candidate(candidate) + gather_users(self.user(user), user_index))
        return logits.squeeze(-1)
