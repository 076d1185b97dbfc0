"""Layers of the backbones: embeddings in, embeddings out; no ids' meaning and no configuration reach them.

Sequences are time-major, [T, ...], because a recurrence reads one step of every row at a time. A batch is folded: what
depends on the user alone has U rows, what depends on the candidate has N, and ``user_index`` int[N] says whose
candidate each is. ``user_index=None`` means that row n belongs to user n, as in training: nothing is gathered then.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.models import functions


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


def newest_steps(rows: Tensor, length: Tensor, steps: int) -> Tensor:
    """The newest steps of post-padded histories, post-padded with 0 again.

    Args:
        rows: int[U, T], oldest first.
        length: int[U], real steps.
        steps: how many to keep, S.

    Returns:
        int[U, S]; `rows` itself if T is not more than S.
    """
    if rows.shape[1] <= steps:
        return rows
    place = (length - steps).clamp(min=0)[:, None] + torch.arange(steps, device=rows.device, dtype=length.dtype)
    kept: Tensor = rows.gather(1, place.long().clamp(max=rows.shape[1] - 1))
    return kept * (place < length[:, None])


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
    """Weights shared by `GRU` and `AUGRU`."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.gates_input = nn.Linear(input_size, 2 * hidden_size)
        self.candidate_input = nn.Linear(input_size, hidden_size)
        self.recurrent = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        for block in self.recurrent.weight.chunk(3):
            nn.init.orthogonal_(block)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the input float[3H, D], its bias float[3H], of the state float[3H, H]; update, reset, candidate."""
        inputs = torch.cat((self.gates_input.weight, self.candidate_input.weight))
        biases = torch.cat((self.gates_input.bias, self.candidate_input.bias))
        return inputs, biases, self.recurrent.weight


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

    def forward(self, inputs: Tensor, length: Tensor) -> Tensor:
        """float[T, U, D], real steps int[U] -> float[T, U, H]."""
        weight, bias, recurrent = self.weights()
        return functions.gru(functional.linear(inputs, weight, bias), length, recurrent)


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
        return functions.augru(inputs, attention, user_index, *self.weights())


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

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of `functions.local_activation`."""
        query, key, product, score = self.query, self.key, self.product, self.score
        return query.weight, query.bias, key.weight, product.weight, self.activation.weight, score.weight, score.bias

    def forward(self, query: Tensor, keys: Tensor, user_index: Tensor | None = None) -> Tensor:
        """Unnormalised scores.

        Args:
            query: float[N, H], one per candidate.
            keys: float[T, U, H], one sequence per user.
            user_index: int[N], or None if N = U in order.

        Returns:
            float[T, N].
        """
        weights = self.weights()
        return functions.activation_scores(query, keys, user_index, *weights[:6]) + weights[6]


class CrossNet(nn.Module):
    r"""Crosses of bounded degree, one vector of weights a layer (DCN, https://arxiv.org/abs/1708.05123, Eq. 3).

    .. math::
        x_{l+1} = x_0 x_l^T w_l + b_l + x_l

    Args:
        size: of a row.
        num_layers: L; the degree is L + 1.
    """

    def __init__(self, size: int, num_layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(size) * (2 / (size + 1)) ** 0.5 for _ in range(num_layers))
        self.biases = nn.ParameterList(torch.zeros(size) for _ in range(num_layers))

    def forward(self, rows: Tensor) -> Tensor:
        """float[N, size] -> float[N, size]."""
        crossed = rows
        for weight, bias in zip(self.weights, self.biases, strict=True):
            crossed = rows * (crossed @ weight).unsqueeze(-1) + bias + crossed
        return crossed


class CrossNetV2(nn.Module):
    r"""Crosses of bounded degree, one matrix a layer (DCN V2, https://arxiv.org/abs/2008.13535, Eq. 1 and 2).

    .. math::
        x_{l+1} = x_0 \circ (W_l x_l + b_l) + x_l, \quad W_l = U_l V_l^T \text{ if there is a rank}

    Args:
        size: of a row.
        num_layers: L; the degree is L + 1.
        rank: of every :math:`W_l`; None for full matrices.
    """

    def __init__(self, size: int, num_layers: int, rank: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(size, size)
            if rank is None
            else nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size))
            for _ in range(num_layers)
        )

    def forward(self, rows: Tensor) -> Tensor:
        """float[N, size] -> float[N, size]."""
        crossed = rows
        for layer in self.layers:
            crossed = rows * layer(crossed) + crossed
        return crossed


class FactorizationMachine(nn.Module):
    r"""Second-order term of a factorization machine (https://doi.org/10.1109/ICDM.2010.127, Eq. 1), in linear time.

    .. math::
        \sum_{i<j} v_i^T v_j = \frac12 \sum_e \Big(\big(\sum_i v_{ie}\big)^2 - \sum_i v_{ie}^2\Big)
    """

    def forward(self, fields: Tensor) -> Tensor:
        """float[N, F, E] -> float[N]."""
        return 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1)


class CompressedInteraction(nn.Module):
    r"""CIN: crosses of whole vectors (xDeepFM, https://arxiv.org/abs/1803.05170, Eq. 6 and the sum pooling after it).

    .. math::
        x^k_h = \sum_{i,j} W^k_{hij} (x^{k-1}_i \circ x^0_j), \quad p^k_h = \sum_e x^k_{he}

    The activation is the identity, which the paper finds best. Of every layer but the last, the first
    half of the maps goes on and only the other half is read, as in xDeepFM's implementation. What is read is a sum, and
    with the identity the sum can be taken before the weights,

    .. math::
        p^k_h = \sum_{i,j} W^k_{hij} \langle x^{k-1}_i, x^0_j \rangle,

    so only maps that go on are ever made: of two layers of one size, a quarter.

    Args:
        num_fields: F.
        sizes: maps of each layer; even but for the last.

    Attributes:
        output_size: maps that are read.

    Raises:
        ValueError: there is no layer, or one of an odd size to be halved.
    """

    def __init__(self, num_fields: int, sizes: Sequence[int]) -> None:
        super().__init__()
        if not sizes or any(size % 2 for size in sizes[:-1]):
            raise ValueError(f"sizes of the CIN are {list(sizes)}; at least one, and even but for the last, are needed")
        self.kept = [size // 2 for size in sizes[:-1]]
        self.output_size = sum(sizes) - sum(self.kept)
        self.weights = nn.ParameterList()
        for inputs, size in zip([num_fields, *self.kept], sizes, strict=True):
            weight = nn.Parameter(torch.empty(size, inputs * num_fields))
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
            self.weights.append(weight)

    def forward(self, fields: Tensor) -> Tensor:
        """float[N, F, E] -> float[N, output_size], in the order of the layers."""
        # Fields first: the outer product then runs over rows of N * E entries, which is what a CPU likes.
        base = fields.transpose(0, 1).flatten(1)
        maps, read = base, []
        for weight, kept in zip(self.weights, [*self.kept, 0], strict=True):
            number = weight.shape[1] // fields.shape[1]
            products = maps.reshape(number, -1, fields.shape[2]).transpose(0, 1) @ fields.transpose(1, 2)
            read.append(products.flatten(1) @ weight[kept:].t())
            if kept:
                maps = weight[:kept] @ (maps.unsqueeze(1) * base).flatten(0, 1)
        return torch.cat(read, dim=1)


class InteractingLayer(nn.Module):
    r"""Multi-head self-attention among fields (AutoInt, https://arxiv.org/abs/1810.11921, Eq. 5-8).

    .. math::
        \tilde v_i = \Vert_h \sum_j \mathrm{Softmax}_j\big((W^h_Q v_i)^T W^h_K v_j\big) W^h_V v_j, \quad
        v'_i = \mathrm{ReLU}(\tilde v_i + W_R v_i)

    As in the paper, the scores are not scaled.

    Args:
        size: of a field.
        num_heads: H.
        head_size: S.
    """

    def __init__(self, size: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = head_size
        self.query_key_value = nn.Linear(size, 3 * num_heads * head_size, bias=False)
        self.residual = nn.Linear(size, num_heads * head_size, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        """float[N, F, size] -> float[N, F, H * S]."""
        heads = self.query_key_value(fields).unflatten(2, (3, self.num_heads, self.head_size))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        # Keys before queries: a softmax over anything but the last dimension is vectorised, and rows here are short.
        attention = (key @ query.transpose(2, 3)).softmax(2)
        attended = attention.transpose(2, 3) @ value
        gathered: Tensor = (attended.transpose(1, 2).flatten(2) + self.residual(fields)).relu()
        return gathered


class SqueezeExcitation(nn.Module):
    r"""SENET: weighs the fields by all fields' means (FiBiNET, https://arxiv.org/abs/1905.09433, "SENET Layer").

    .. math::
        z_f = \frac1E \sum_e v_{fe}, \quad a = \mathrm{ReLU}(W_2 \mathrm{ReLU}(W_1 z)), \quad v'_f = a_f v_f

    Args:
        num_fields: F.
        reduction: the squeeze has F // reduction units, at least one.
    """

    def __init__(self, num_fields: int, reduction: int) -> None:
        super().__init__()
        size = max(1, num_fields // reduction)
        self.squeeze = nn.Linear(num_fields, size, bias=False)
        self.excite = nn.Linear(size, num_fields, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        """float[N, F, E] -> float[N, F, E]."""
        weights = self.excite(self.squeeze(fields.mean(2)).relu()).relu()
        weighed: Tensor = fields * weights.unsqueeze(2)
        return weighed


class BilinearInteraction(nn.Module):
    r"""Every two fields in a bilinear form, entry by entry (FiBiNET, https://arxiv.org/abs/1905.09433).

    .. math::
        p_{ij} = (W_i v_i) \circ v_j, \quad i < j

    A matrix for every pair, the paper's third kind, is left out: with F fields it has F / 2 times the weights.

    Args:
        num_fields: F.
        size: E, of a field.
        kind: ``all`` fields share one W, or ``each`` has its own.

    Raises:
        ValueError: another kind.
    """

    def __init__(self, num_fields: int, size: int, kind: str) -> None:
        super().__init__()
        if kind not in ("all", "each"):
            raise ValueError(f"the kind of bilinear interaction is {kind!r}; there are 'all' and 'each'")
        self.num_fields = num_fields
        bound = size**-0.5
        self.weight = nn.Parameter(torch.empty(1 if kind == "all" else num_fields - 1, size, size))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, fields: Tensor) -> Tensor:
        """float[N, F, E] -> float[N, F * (F - 1) / 2, E], in the order (0, 1), (0, 2), ..., (F - 2, F - 1)."""
        mapped = (fields[:, :-1].transpose(0, 1) @ self.weight.transpose(1, 2)).unbind()
        later = (fields[:, first:] for first in range(1, self.num_fields))
        return torch.cat([one.unsqueeze(1) * others for one, others in zip(mapped, later, strict=True)], dim=1)


def _after_first(hidden_sizes: Sequence[int], dropout: float) -> nn.Sequential:
    """What follows the first linear map of an MLP, down to one logit."""
    layers: list[nn.Module] = [nn.PReLU(), nn.Dropout(dropout)]
    for size, next_size in itertools.pairwise(hidden_sizes):
        layers += [nn.Linear(size, next_size), nn.PReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden_sizes[-1], 1))


class MLP(nn.Module):
    """MLP over features of a candidate with its user, none of which depends on the user alone.

    Args:
        size: of the features.
        hidden_sizes: of the hidden layers, [200, 80] in the paper (section 4.1.3).
        dropout: after every hidden layer.
    """

    def __init__(self, size: int, hidden_sizes: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(size, hidden_sizes[0])
        self.rest = _after_first(hidden_sizes, dropout)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits: float[N, size] -> float[N]."""
        logits: Tensor = self.rest(self.first(rows))
        return logits.squeeze(-1)


class FoldedLinear(nn.Module):
    """Linear map of [user features, candidate features] that reads the user features once per user.

    Args:
        user_size: size of the features of a user.
        candidate_size: size of the features of a candidate (with the user).
        out_features: size of the result.
    """

    def __init__(self, user_size: int, candidate_size: int, out_features: int) -> None:
        super().__init__()
        self.user = nn.Linear(user_size, out_features, bias=False)
        self.candidate = nn.Linear(candidate_size, out_features)
        bound = (user_size + candidate_size) ** -0.5
        for weight in (self.user.weight, self.candidate.weight):
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, user: Tensor, candidate: Tensor, user_index: Tensor | None = None) -> Tensor:
        """The map.

        Args:
            user: float[U, user_size].
            candidate: float[N, candidate_size].
            user_index: int[N], or None if N = U in order.

        Returns:
            float[N, out_features].
        """
        mapped: Tensor = self.candidate(candidate) + gather_users(self.user(user), user_index)
        return mapped


class FoldedMLP(FoldedLinear):
    """MLP over [user features, candidate features] whose first layer reads the user features once per user.

    Args:
        user_size: size of the features of a user.
        candidate_size: size of the features of a candidate (with the user).
        hidden_sizes: of the hidden layers, [200, 80] in the paper (section 4.1.3).
        dropout: after every hidden layer.
    """

    def __init__(self, user_size: int, candidate_size: int, hidden_sizes: Sequence[int], dropout: float) -> None:
        super().__init__(user_size, candidate_size, hidden_sizes[0])
        self.rest = _after_first(hidden_sizes, dropout)

    def forward(self, user: Tensor, candidate: Tensor, user_index: Tensor | None = None) -> Tensor:
        """Logits float[N]; arguments as in `FoldedLinear.forward`."""
        if self.training:
            logits: Tensor = self.rest(super().forward(user, candidate, user_index))
            return logits.squeeze(-1)
        # Without dropout: the same map as one function.
        layers = [self.candidate.weight, self.candidate.bias]
        layers += [weight for layer in self.rest for weight in layer.parameters()]
        return functions.folded_mlp(candidate, self.user(user), user_index, *layers)
