"""The heavy parts of a ranker, as functions of tensors: comparisons with a history, recurrences, attention.

In PyTorch each is what its body says. In an exported graph each is one node, an ONNX model-local function of domain
``liber`` (https://onnx.ai/onnx/repo-docs/IR.html#functions) with the same body, so that any ONNX Runtime computes it
from standard operators, and one with compiled kernels (`liber_runtime.native`) runs those instead.

A batch is folded: U users, N candidates, and ``user_index`` int[N] says whose candidate each is; None means that row n
belongs to user n, as in training.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

DOMAIN = "liber"


def similar_feedback(
    table: Tensor, item: Tensor, history: Tensor, length: Tensor, feedback: Tensor, user_index: Tensor | None
) -> Tensor:
    r"""How much of a history is similar to a candidate, and what feedback that had.

    .. math::
        \sum_t \max(s_t, 0)^2, \quad \sum_t \max(s_t, 0)^2 f_t, \quad \sum_t s_t f_t, \qquad s_t = x_n^T x_{h_t}

    Args:
        table: float[I+1, D], :math:`x` of every item.
        item: int[N], the candidates.
        history: int[U, L], items, post-padded.
        length: int[U], real steps.
        feedback: float[U, L], :math:`f`.
        user_index: int[N] or None.

    Returns:
        float[N, 3], the sums over the real steps.
    """
    return _call("SimilarFeedback", (table, item, history, length, feedback, user_index))


def alike_feedback(
    table: Tensor,
    item: Tensor,
    history: Tensor,
    length: Tensor,
    feedback: Tensor,
    user_index: Tensor | None,
    sharpness: Tensor,
) -> Tensor:
    r"""The feedback to what is like a candidate, by the cosine of what describes them.

    .. math::
        \sum_t c_t, \quad \sum_t e^{a_k (c_t - 1)}, \quad \sum_t e^{a_k (c_t - 1)} f_t, \qquad c_t = x_n^T x_{h_t}

    The third sum over the second is the mean of the feedback under a softmax of :math:`a_k c`; as no cosine exceeds 1,
    no largest one has to be found first.

    Args:
        table: float[I+1, D], of rows of length 1 or 0.
        item: int[N].
        history: int[U, L].
        length: int[U].
        feedback: float[U, L].
        user_index: int[N] or None.
        sharpness: float[K], :math:`a`.

    Returns:
        float[N, 1 + 2K]: the first sum, then the other two for every sharpness.
    """
    arguments = (table, item, history, length, feedback, user_index, sharpness)
    return _call("AlikeFeedback", arguments)


PRIOR_BEHAVIORS = 3.0
"""Behaviors at the level of all users that a user is believed to have had before the first."""


def residuals(
    item_mean: Tensor, feedback: Tensor, level: Tensor, history: Tensor, given: Tensor, length: Tensor
) -> Tensor:
    r"""Feedback above the levels of item and user.

    .. math::
        \rho_t = f_t - l - m_{h_t}, \qquad \rho_t - \frac{\sum_s \rho_s}{n + p}

    with :math:`n` real steps and :math:`p` = `PRIOR_BEHAVIORS`.

    Args:
        item_mean: float[I+1, 1], :math:`m`.
        feedback: float[F, 1], :math:`f` of each bucket.
        level: float[], :math:`l`.
        history: int[U, L], items, post-padded.
        given: int[U, L], feedback buckets.
        length: int[U], real steps.

    Returns:
        float[U, L]; 0 where it is padded.
    """
    return _call("Residuals", (item_mean, feedback, level, history, given, length))


ITERATIONS = 10
"""Steps of conjugate gradients; as many as there are unknowns solve a ridge regression exactly."""


def fold_in(vectors: Tensor, history: Tensor, length: Tensor, residual: Tensor, noise: Tensor) -> Tensor:
    r"""The taste of every user: the ridge regression of a history's residuals on the vectors of its items.

    .. math::
        w = \Big(\sum_t x_t x_t^T + \sigma^2 I\Big)^{-1} \sum_t x_t \rho_t

    Args:
        vectors: float[I+1, D], :math:`x` of every item.
        history: int[U, T], items, post-padded.
        length: int[U], real steps.
        residual: float[U, T], :math:`\rho`.
        noise: float[], :math:`\sigma^2`.

    Returns:
        float[U, D].
    """
    return _call("FoldIn", (vectors, history, length, residual, noise))


def pool_history(
    item_table: Tensor,
    feedback_table: Tensor,
    history: Tensor,
    given: Tensor,
    length: Tensor,
    value: Tensor,
) -> Tensor:
    """Means over the real steps of histories: of the items, of the feedback, and of the items weighted by a value.

    Args:
        item_table: float[I+1, A].
        feedback_table: float[F, B].
        history: int[U, T], items, post-padded.
        given: int[U, T], feedback buckets.
        length: int[U], real steps.
        value: float[U, T].

    Returns:
        float[U, 2A + B], in this order; zeros for a user without real steps.
    """
    arguments = (item_table, feedback_table, history, given, length, value)
    return _call("PoolHistory", arguments)


def map_history(
    item_table: Tensor, feedback_table: Tensor, history: Tensor, given: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """A linear map of every step of histories, a step being its item's row beside its feedback's.

    Args:
        item_table: float[I+1, A].
        feedback_table: float[F, B].
        history: int[U, T], items.
        given: int[U, T], feedback buckets.
        weight: float[H, A + B].
        bias: float[H].

    Returns:
        float[T, U, H].
    """
    arguments = (item_table, feedback_table, history, given, weight, bias)
    return _call("MapHistory", arguments)


def gru(inputs: Tensor, length: Tensor, recurrent_weight: Tensor) -> Tensor:
    """Every state of a GRU, see `builders.models.layers.GRU`; gates in the order update, reset, candidate.

    Args:
        inputs: float[T, U, 3H], mapped for the gates.
        length: int[U], real steps: states behind them mean nothing, and need not be computed.
        recurrent_weight: float[3H, H].

    Returns:
        float[T, U, H].
    """
    return _call("GRU", (inputs, length, recurrent_weight))


def folded_mlp(candidate: Tensor, user: Tensor, user_index: Tensor | None, *layers: Tensor) -> Tensor:
    r"""An MLP with PReLUs whose first layer adds what is the user's alone.

    .. math::
        z_n = w_L^T p_{L-1}(\dots p_1(W_1 x_n + b_1 + u_{i(n)}) \dots) + b_L, \quad
        p_l(x) = \max(x, 0) + a_l \min(x, 0)

    Args:
        candidate: float[N, C], :math:`x`.
        user: float[U, H1], :math:`u`.
        user_index: int[N] or None, :math:`i`.
        layers: for every hidden layer the weight float[H, in], the bias float[H] and the slope float[1]; then the
            weight float[1, H] and the bias float[1] of the logit.

    Returns:
        float[N], logits.
    """
    return _call("FoldedMLP", (candidate, user, user_index, *layers))


def fuse_partitions(representations: Tensor, partition_count: Tensor, scores: Tensor, value: Tensor) -> Tensor:
    r"""The mean over a user's partitions of their self-attention (LIBER, Eq. 5-6), for all users.

    .. math::
        \hat r = \mathrm{mean}\left(\mathrm{Softmax}(R A R^T) R\right) V

    Args:
        representations: float[R, d], R >= 1; the users' partitions in the order of the users, then anything.
        partition_count: int[U], how many of the rows are each user's.
        scores: float[d, d], :math:`A`.
        value: float[d, d], :math:`V`.

    Returns:
        float[U, d]; zeros for a user without partitions.
    """
    return _call("FusePartitions", (representations, partition_count, scores, value))


def pad_partitions(representations: Tensor, partition_count: Tensor) -> tuple[Tensor, Tensor]:
    """Partitions one after another -> what a fuser reads.

    Args:
        representations: float[R, d], R >= 1; the users' partitions in the order of the users, then anything.
        partition_count: int[U], how many of the rows are each user's.

    Returns:
        float[U, J, d] and bool[U, J], J being the largest count. Masked rows are copies of the first row.
    """
    count = partition_count.long()
    # A tensor for its end, so that a graph does not fix how many there were in the example.
    place = torch.arange(count.amax(), device=count.device)  # type: ignore[call-overload]
    mask = place < count[:, None]
    row = (count.cumsum(0) - count)[:, None] + place
    return representations[torch.where(mask, row, 0)], mask


def _fuse_partitions(representations: Tensor, partition_count: Tensor, scores: Tensor, value: Tensor) -> Tensor:
    partitions, mask = pad_partitions(representations, partition_count)
    valid = mask.to(partitions.dtype)
    # A finite floor for what is no partition; such rows get no weight below.
    attention = (partitions @ scores @ partitions.transpose(1, 2) + (valid - 1)[:, None, :] * 1e9).softmax(2)
    rows = valid / valid.sum(1, keepdim=True).clamp(min=1)
    weights = torch.bmm(rows[:, None, :], attention)
    return torch.bmm(weights, partitions).squeeze(1) @ value


def interest_evolution(
    query: Tensor,
    states: Tensor,
    length: Tensor,
    user_index: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    product_weight: Tensor,
    slope: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    input_weight: Tensor,
    input_bias: Tensor,
    recurrent_weight: Tensor,
) -> Tensor:
    """The last state of an AUGRU under the softmax of a local activation unit (DIEN's interest evolving layer).

    See `builders.models.layers.InterestAttention` and `builders.models.layers.AUGRU`.

    Args:
        query: float[N, H], one per candidate.
        states: float[T, U, H], one sequence per user.
        length: int[U], real steps.
        user_index: int[N] or None.
        query_weight: float[A, H].
        query_bias: float[A].
        key_weight: float[A, H].
        product_weight: float[A, H].
        slope: float[1], of the PReLU.
        score_weight: float[1, A].
        score_bias: float[1]; what all steps have in common, the softmax does not see.
        input_weight: float[3H, H], of the AUGRU; gates in the order update, reset, candidate.
        input_bias: float[3H].
        recurrent_weight: float[3H, H].

    Returns:
        float[N, H]; zeros for a user without real steps.
    """
    activation = (query_weight, query_bias, key_weight, product_weight, slope, score_weight, score_bias)
    arguments = (query, states, length, user_index, *activation, input_weight, input_bias, recurrent_weight)
    return _call("InterestEvolution", arguments)


def local_activation(
    query: Tensor,
    states: Tensor,
    length: Tensor,
    user_index: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    product_weight: Tensor,
    slope: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    *,
    softmax: bool,
) -> Tensor:
    """The sum of a sequence's steps, each weighted by a local activation unit (DIN, its Eq. 3).

    See `builders.models.layers.InterestAttention`.

    Args:
        query: float[N, H], one per candidate.
        states: float[T, U, H], one sequence per user.
        length: int[U], real steps.
        user_index: int[N] or None.
        query_weight: float[A, H].
        query_bias: float[A].
        key_weight: float[A, H].
        product_weight: float[A, H].
        slope: float[1], of the PReLU.
        score_weight: float[1, A].
        score_bias: float[1].
        softmax: whether the weights are the softmax of the scores, or the scores as they are.

    Returns:
        float[N, H]; zeros for a user without real steps.
    """
    activation = (query_weight, query_bias, key_weight, product_weight, slope, score_weight, score_bias)
    name = "SoftmaxActivation" if softmax else "LocalActivation"
    return _call(name, (query, states, length, user_index, *activation))


def _pick(rows: Tensor, user_index: Tensor | None, dim: int = 0) -> Tensor:
    return rows if user_index is None else rows.index_select(dim, user_index)


def _real(length: Tensor, steps: int) -> Tensor:
    """bool[U, steps]."""
    return torch.arange(steps, device=length.device, dtype=length.dtype) < length[:, None]


def _likeness(table: Tensor, item: Tensor, history: Tensor, user_index: Tensor | None) -> Tensor:
    """float[N, L]."""
    steps = _pick(functional.embedding(history, table), user_index)
    return (steps @ functional.embedding(item, table).unsqueeze(-1)).squeeze(-1)


def _similar_feedback(
    table: Tensor, item: Tensor, history: Tensor, length: Tensor, feedback: Tensor, user_index: Tensor | None
) -> Tensor:
    real = _pick(_real(length, history.shape[1]), user_index)
    similarity = _likeness(table, item, history, user_index) * real
    given, weight = _pick(feedback, user_index), similarity.clamp(min=0).square()
    return torch.stack((weight.sum(1), (weight * given).sum(1), (similarity * given).sum(1)), dim=1)


def _alike_feedback(
    table: Tensor,
    item: Tensor,
    history: Tensor,
    length: Tensor,
    feedback: Tensor,
    user_index: Tensor | None,
    sharpness: Tensor,
) -> Tensor:
    real = _pick(_real(length, history.shape[1]), user_index)
    cosine = _likeness(table, item, history, user_index)
    given = _pick(feedback, user_index)
    weight = (sharpness[:, None] * (cosine[:, None] - 1)).exp() * real[:, None]
    sums = torch.stack((weight.sum(2), (weight * given[:, None]).sum(2)), dim=2)
    return torch.cat(((cosine * real).sum(1, keepdim=True), sums.flatten(1)), dim=1)


def _residuals(
    item_mean: Tensor, feedback: Tensor, level: Tensor, history: Tensor, given: Tensor, length: Tensor
) -> Tensor:
    real = _real(length, history.shape[1]).to(feedback.dtype)
    value = functional.embedding(given, feedback).squeeze(-1) - level
    residual = (value - functional.embedding(history, item_mean).squeeze(-1)) * real
    own = residual.sum(1, keepdim=True) / (real.sum(1, keepdim=True) + PRIOR_BEHAVIORS)
    return (residual - own) * real


def _fold_in(vectors: Tensor, history: Tensor, length: Tensor, residual: Tensor, noise: Tensor) -> Tensor:
    real = _real(length, history.shape[1]).to(residual.dtype)
    rows = functional.embedding(history, vectors) * real[:, :, None]
    gram = rows.transpose(1, 2) @ rows
    rest = (rows.transpose(1, 2) @ (residual * real).unsqueeze(-1)).squeeze(-1)
    solution, direction = torch.zeros_like(rest), rest
    squared = rest.square().sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        image = (gram @ direction.unsqueeze(-1)).squeeze(-1) + noise * direction
        along = squared / (direction * image).sum(1, keepdim=True).clamp(min=1e-12)
        solution = solution + along * direction
        rest = rest - along * image
        shorter = rest.square().sum(1, keepdim=True)
        direction = rest + shorter / squared.clamp(min=1e-12) * direction
        squared = shorter
    return solution


def augru(
    inputs: Tensor,
    attention: Tensor,
    user_index: Tensor | None,
    input_weight: Tensor,
    input_bias: Tensor,
    recurrent_weight: Tensor,
) -> Tensor:
    """float[N, H]: see `builders.models.layers.AUGRU`."""
    state = inputs.new_zeros(attention.shape[1], recurrent_weight.shape[1])
    projected = functional.linear(inputs, input_weight, input_bias)
    # unbind, not indexing: the gradient of one stack instead of T sums into zeros of the full size.
    for step, weight in zip(projected.unbind(), attention.unsqueeze(-1).unbind(), strict=True):
        state = _step(_pick(step, user_index), recurrent_weight, state, weight)
    return state


def activation_scores(
    query: Tensor,
    keys: Tensor,
    user_index: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    product_weight: Tensor,
    slope: Tensor,
    score_weight: Tensor,
) -> Tensor:
    """float[T, N]: see `builders.models.layers.InterestAttention`; without the scores' common bias."""
    product = functional.linear(query * _pick(keys, user_index, 1), product_weight)
    hidden = functional.linear(query, query_weight, query_bias) + product
    hidden = hidden + _pick(functional.linear(keys, key_weight), user_index, 1)
    return functional.linear(functional.prelu(hidden, slope), score_weight).squeeze(-1)


def _step(inputs: Tensor, recurrent_weight: Tensor, state: Tensor, attention: Tensor | None) -> Tensor:
    update, reset, candidate = inputs.chunk(3, dim=1)
    update_state, reset_state, candidate_state = (state @ recurrent_weight.t()).chunk(3, dim=1)
    update = (update + update_state).sigmoid()
    change = (candidate + (reset + reset_state).sigmoid() * candidate_state).tanh() - state
    next_state: Tensor = state + (update if attention is None else attention * update) * change
    return next_state


def _pool_history(
    item_table: Tensor,
    feedback_table: Tensor,
    history: Tensor,
    given: Tensor,
    length: Tensor,
    value: Tensor,
) -> Tensor:
    real = _real(length, history.shape[1]).to(value.dtype)
    items = functional.embedding(history, item_table)
    means = torch.stack((real, real * value), dim=1) @ items
    feedback = real.unsqueeze(1) @ functional.embedding(given, feedback_table)
    pooled = torch.cat((means[:, 0], feedback.squeeze(1), means[:, 1]), dim=1)
    return pooled / real.sum(1, keepdim=True).clamp(min=1)


def _map_history(
    item_table: Tensor, feedback_table: Tensor, history: Tensor, given: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    steps = functional.embedding(history.t(), item_table), functional.embedding(given.t(), feedback_table)
    return functional.linear(torch.cat(steps, dim=-1), weight, bias)


def _gru(inputs: Tensor, _: Tensor, recurrent_weight: Tensor) -> Tensor:
    state = inputs.new_zeros(inputs.shape[1], recurrent_weight.shape[1])
    states = []
    for step in inputs.unbind():
        state = _step(step, recurrent_weight, state, None)
        states.append(state)
    return torch.stack(states)


def _folded_mlp(candidate: Tensor, user: Tensor, user_index: Tensor | None, *layers: Tensor) -> Tensor:
    *hidden, weight, bias = layers
    rows = functional.linear(candidate, hidden[0], hidden[1]) + _pick(user, user_index)
    rows = functional.prelu(rows, hidden[2])
    for place in range(3, len(hidden), 3):
        rows = functional.prelu(functional.linear(rows, hidden[place], hidden[place + 1]), hidden[place + 2])
    return functional.linear(rows, weight, bias).squeeze(-1)


def _softmax(scores: Tensor, real: Tensor) -> Tensor:
    """float[T, N]; a finite floor, for -inf would turn rows without any real step into NaN."""
    return scores.masked_fill(~real, -1e9).softmax(0) * real


def _interest_evolution(
    query: Tensor,
    states: Tensor,
    length: Tensor,
    user_index: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    product_weight: Tensor,
    slope: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    input_weight: Tensor,
    input_bias: Tensor,
    recurrent_weight: Tensor,
) -> Tensor:
    activation = (query_weight, query_bias, key_weight, product_weight, slope, score_weight)
    scores = activation_scores(query, states, user_index, *activation) + score_bias
    attention = _softmax(scores, _pick(_real(length, states.shape[0]), user_index).t())
    return augru(states, attention, user_index, input_weight, input_bias, recurrent_weight)


def _pool(
    query: Tensor, states: Tensor, length: Tensor, user_index: Tensor | None, *activation: Tensor, softmax: bool
) -> Tensor:
    *weights, bias = activation
    scores = activation_scores(query, states, user_index, *weights)
    real = _pick(_real(length, states.shape[0]), user_index).t()
    attention = _softmax(scores, real) if softmax else (scores + bias) * real
    return (attention.unsqueeze(-1) * _pick(states, user_index, 1)).sum(0)


def _local_activation(*arguments: Any) -> Tensor:
    return _pool(*arguments, softmax=False)


def _softmax_activation(*arguments: Any) -> Tensor:
    return _pool(*arguments, softmax=True)


BODIES: Mapping[str, Callable[..., Tensor]] = {
    "SimilarFeedback": _similar_feedback,
    "AlikeFeedback": _alike_feedback,
    "Residuals": _residuals,
    "FoldIn": _fold_in,
    "PoolHistory": _pool_history,
    "MapHistory": _map_history,
    "GRU": _gru,
    "InterestEvolution": _interest_evolution,
    "LocalActivation": _local_activation,
    "SoftmaxActivation": _softmax_activation,
    "FoldedMLP": _folded_mlp,
    "FusePartitions": _fuse_partitions,
}
"""What each function computes, by its name in a graph; tensors in the order of its inputs there."""


_USERS, _ROWS, _STEPS, _ITEMS = "users", "rows", "steps", "items"
_COMPARED = ({0: _ITEMS}, {0: _ROWS}, {0: _USERS, 1: _STEPS}, {0: _USERS}, {0: _USERS, 1: _STEPS}, {0: _ROWS})
_ATTENDED = ({0: _ROWS}, {1: _USERS}, {0: _USERS}, {0: _ROWS})
AXES: Mapping[str, Sequence[Mapping[int, str]]] = {
    "SimilarFeedback": _COMPARED,
    "AlikeFeedback": _COMPARED,
    "Residuals": ({0: _ITEMS}, {}, {}, {0: _USERS, 1: _STEPS}, {0: _USERS, 1: _STEPS}, {0: _USERS}),
    "FoldIn": ({0: _ITEMS}, {0: _USERS, 1: _STEPS}, {0: _USERS}, {0: _USERS, 1: _STEPS}),
    "PoolHistory": ({0: _ITEMS}, {}, {0: _USERS}, {0: _USERS}, {0: _USERS}, {0: _USERS}),
    "MapHistory": ({0: _ITEMS}, {}, {0: _USERS}, {0: _USERS}),
    "GRU": ({1: _USERS}, {0: _USERS}),
    "InterestEvolution": _ATTENDED,
    "LocalActivation": _ATTENDED,
    "SoftmaxActivation": _ATTENDED,
    "FoldedMLP": ({0: _ROWS}, {0: _USERS}, {0: _ROWS}),
    "FusePartitions": ({0: _ROWS}, {0: _USERS}),
}
"""Sizes that a graph leaves open, by dimension of a function's first inputs; the others are fixed by the export."""


class Recorder:
    """Which functions the graph being exported calls, each with tensors that it was called with.

    Attributes:
        calls: (function, its tensors) by the name of the node's type; a function that is called with other fixed sizes
            is another type.
    """

    def __init__(self) -> None:
        self.calls: dict[str, tuple[str, tuple[Tensor, ...]]] = {}

    def type_of(self, name: str, tensors: tuple[Tensor, ...]) -> str:
        """The type of the node that calls `name` with `tensors`."""
        for type_name, (known, example) in self.calls.items():
            if known == name and fixed_sizes(name, example) == fixed_sizes(name, tensors):
                return type_name
        same = sum(known == name for known, _ in self.calls.values())
        type_name = f"{name}_{same + 1}" if same else name
        self.calls[type_name] = (name, tensors)
        return type_name


def fixed_sizes(name: str, tensors: tuple[Tensor, ...]) -> list[list[int | None]]:
    """Sizes of a function's inputs; None where a graph leaves them open."""
    axes = [*AXES[name], *[{}] * (len(tensors) - len(AXES[name]))]
    return [
        [None if axis in open_axes else size for axis, size in enumerate(tensor.shape)]
        for tensor, open_axes in zip(tensors, axes, strict=True)
    ]


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """While it lasts, an export by tracing writes a node for each call of a function of this module."""
    recorder = Recorder()
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


class _Node(torch.autograd.Function):
    """One node of an exported graph."""

    @staticmethod
    def forward(_: Any, name: str, type_name: str, rank: int, *tensors: Tensor) -> Tensor:
        return BODIES[name](*tensors)

    @staticmethod
    def symbolic(graph: Any, name: str, type_name: str, rank: int, *values: Any) -> Any:
        result = graph.op(f"{DOMAIN}::{type_name}", *values)
        # Without a rank, the operators behind this node could not be exported.
        result.setType(torch._C.TensorType.get().with_dtype(torch.float32).with_sizes([None] * rank))
        return result


def _call(name: str, arguments: tuple[Tensor | None, ...]) -> Tensor:
    recorder = _recorder.get()
    tensors = tuple(argument for argument in arguments if argument is not None)
    if recorder is None or len(tensors) < len(arguments):
        return BODIES[name](*arguments)
    with _untraced():
        type_name = recorder.type_of(name, tensors)
        rank = BODIES[name](*tensors).ndim
    result: Tensor = _Node.apply(name, type_name, rank, *tensors)  # type: ignore[no-untyped-call]
    return result


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """What is computed within is not part of the graph; sizes are plain numbers."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
