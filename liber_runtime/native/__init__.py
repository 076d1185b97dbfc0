"""The compiled kernels of a ranker's heavy parts, called through C.

A kernel computes what the function of the same name in `builders/models/functions.py` defines, to rounding. Which
library is loaded follows from the instructions that this processor has; where there is none, a graph is run as it is.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from liber_runtime.exceptions import ConfigurationError, InvalidInputError
from liber_runtime.native.compile import library_path, targets

Array: TypeAlias = npt.NDArray[Any]
Kernel: TypeAlias = "Callable[[Sequence[Array]], Array]"
"""A function of a graph: its inputs as arrays, in order, to its output."""

_NEEDS: Mapping[str, frozenset[str]] = {
    "x86-64-v4": frozenset(("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "bmi2")),
    "x86-64-v3": frozenset(("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe")),
}
"""What /proc/cpuinfo has to say of a processor before it is given a library; nothing is needed for the others."""

_LANES = 16
"""Tables are padded to whole vectors of the widest kind."""


class Kernels:
    """One compiled library.

    Args:
        target: one of `liber_runtime.native.compile.targets`.
        threads: of every kernel.

    Raises:
        ConfigurationError: the library is not there or cannot be loaded.
    """

    def __init__(self, target: str, threads: int) -> None:
        self.target = target
        self.threads = threads
        path = library_path(target)
        try:
            self._library = ctypes.CDLL(str(path))
            for name in ("recurrence", "recurrent", "activation", "mlp", "fuser", "index"):
                getattr(self._library, f"liber_{name}_new").restype = ctypes.c_void_p
        except (OSError, AttributeError) as error:
            raise ConfigurationError(
                f"the kernels {path} cannot be loaded ({error}); compile them with "
                "`python -m liber_runtime.native.compile`, or set LIBER_KERNELS=none"
            ) from None

    def make(self, function: str, constants: Mapping[int, Array], inputs: int) -> Kernel | None:
        """A kernel for a node of a graph; None if there is none for such a node.

        Args:
            function: the type of the node, with or without a number behind it.
            constants: its inputs that never change, by their place; they may be memory-mapped.
            inputs: how many it has.
        """
        makers: Mapping[str, tuple[Callable[[Mapping[int, Array]], Kernel | None], Sequence[int]]] = {
            "SimilarFeedback": (self._similar_feedback, (0,)),
            "AlikeFeedback": (self._alike_feedback, (0, 6)),
            "Residuals": (self._residuals, (0, 1, 2)),
            "FoldIn": (self._fold_in, (0, 4)),
            "PoolHistory": (self._pool_history, (0, 1)),
            "MapHistory": (self._map_history, (0, 1, 4, 5)),
            "GRU": (self._gru, (2,)),
            "InterestEvolution": (self._interest_evolution, range(4, 14)),
            "LocalActivation": (self._local_activation, range(4, 11)),
            "SoftmaxActivation": (functools.partial(self._local_activation, normalized=True), range(4, 11)),
            "FoldedMLP": (self._folded_mlp, range(3, inputs)),
            "FusePartitions": (self._fuse_partitions, (2, 3)),
        }
        maker, needed = makers.get(function.partition("_")[0], (None, ()))
        if maker is None or any(place not in constants for place in needed):
            return None
        return maker(constants)

    def _similar_feedback(self, constants: Mapping[int, Array]) -> Kernel:
        table = _whole_vectors(constants[0])

        def run(inputs: Sequence[Array]) -> Array:
            compared = _Compared(inputs)
            similar = np.empty((compared.rows, 3), np.float32)
            self._call("similar_feedback", table, *compared.arrays, *table.shape, *compared.sizes, similar)
            return similar

        return run

    def _alike_feedback(self, constants: Mapping[int, Array]) -> Kernel:
        table, sharpness = _whole_vectors(constants[0]), _floats(constants[6])
        kinds = len(sharpness)

        def run(inputs: Sequence[Array]) -> Array:
            compared = _Compared(inputs)
            alike = np.empty((compared.rows, 1 + 2 * kinds), np.float32)
            self._call(
                "alike_feedback", table, *compared.arrays, sharpness, kinds, *table.shape, *compared.sizes, alike
            )
            return alike

        return run

    def _residuals(self, constants: Mapping[int, Array]) -> Kernel:
        item_mean, feedback = _floats(constants[0]), _floats(constants[1] - constants[2])

        def run(inputs: Sequence[Array]) -> Array:
            history, given, length = (_indices(each) for each in inputs[3:6])
            residual = np.empty(history.shape, np.float32)
            arrays = (item_mean, feedback, history, given, length, PRIOR_BEHAVIORS)
            self._call("residuals", *arrays, len(item_mean), len(feedback), *history.shape, residual)
            return residual

        return run

    def _fold_in(self, constants: Mapping[int, Array]) -> Kernel:
        vectors, noise = _floats(constants[0]), float(constants[4])
        items, size = vectors.shape

        def run(inputs: Sequence[Array]) -> Array:
            history, length, residual = _indices(inputs[1]), _indices(inputs[2]), _floats(inputs[3])
            users, steps = history.shape
            taste = np.empty((users, size), np.float32)
            arrays = (vectors, history, length, residual, noise)
            self._call("fold_in", *arrays, items, size, FOLD_IN_ITERATIONS, users, steps, taste)
            return taste

        return run

    def _pool_history(self, constants: Mapping[int, Array]) -> Kernel:
        item_table, feedback_table = _floats(constants[0]), _floats(constants[1])
        width = 2 * item_table.shape[1] + feedback_table.shape[1]

        def run(inputs: Sequence[Array]) -> Array:
            history, given, length = (_indices(each) for each in inputs[2:5])
            pooled = np.empty((len(history), width), np.float32)
            arrays = (item_table, feedback_table, history, given, length, _floats(inputs[5]))
            self._call("pool_history", *arrays, *item_table.shape, *feedback_table.shape, *history.shape, pooled)
            return pooled

        return run

    def _map_history(self, constants: Mapping[int, Array]) -> Kernel | None:
        item_table, feedback_table, weight, bias = (constants[place] for place in (0, 1, 4, 5))
        if 4 * len(item_table) * len(weight) > MAPPED_BYTES:
            return None
        size = item_table.shape[1]
        items = _floats(item_table @ weight[:, :size].T)
        feedback = _floats(feedback_table @ weight[:, size:].T + bias)

        def run(inputs: Sequence[Array]) -> Array:
            history, given = _indices(inputs[2]), _indices(inputs[3])
            users, steps = history.shape
            mapped = np.empty((steps, users, items.shape[1]), np.float32)
            sizes = (len(items), len(feedback), items.shape[1], users, steps)
            self._call("map_history", items, feedback, history, given, *sizes, mapped)
            return mapped

        return run

    def _gru(self, constants: Mapping[int, Array]) -> Kernel:
        recurrent = _floats(constants[2])
        hidden = recurrent.shape[1]
        layer = _Weights(self._library, "recurrence", (recurrent, hidden), hidden)

        def run(inputs: Sequence[Array]) -> Array:
            mapped, length = _floats(inputs[0]), _indices(inputs[1])
            steps, users, _ = mapped.shape
            states = np.zeros((steps, users, hidden), np.float32)
            self._call("gru", layer, mapped, length, steps, users, states)
            return states

        return run

    def _interest_evolution(self, constants: Mapping[int, Array]) -> Kernel:
        activation, layer = self._activation(constants), self._recurrent(constants, 11)

        def run(inputs: Sequence[Array]) -> Array:
            arrays, sizes = _attended(inputs)
            evolved = np.empty((sizes[0], layer.hidden), np.float32)
            self._call("interest_evolution", activation, layer, *arrays, *sizes, evolved)
            return evolved

        return run

    def _local_activation(self, constants: Mapping[int, Array], *, normalized: bool = False) -> Kernel:
        activation, bias = self._activation(constants), float(constants[10].reshape(()))

        def run(inputs: Sequence[Array]) -> Array:
            arrays, sizes = _attended(inputs)
            pooled = np.empty((sizes[0], activation.hidden), np.float32)
            self._call("local_activation", activation, bias, int(normalized), *arrays, *sizes, pooled)
            return pooled

        return run

    def _folded_mlp(self, constants: Mapping[int, Array]) -> Kernel:
        weights = [_floats(constants[place]) for place in sorted(constants) if place > 2]
        hidden = weights[:-2:3]
        sizes = np.array([hidden[0].shape[1], *map(len, hidden)], np.int32)
        addresses = np.array([each.ctypes.data for each in weights], np.uintp)
        mlp = _Weights(self._library, "mlp", (addresses, sizes, len(hidden)), 0)

        def run(inputs: Sequence[Array]) -> Array:
            candidate, user, user_index = _floats(inputs[0]), _floats(inputs[1]), _indices(inputs[2])
            logits = np.empty(len(candidate), np.float32)
            self._call("folded_mlp", mlp, candidate, user, user_index, len(candidate), len(user), logits)
            return logits

        return run

    def _fuse_partitions(self, constants: Mapping[int, Array]) -> Kernel:
        scores, value = _floats(constants[2]), _floats(constants[3])
        fuser = _Weights(self._library, "fuser", (scores, value, len(scores)), len(scores))

        def run(inputs: Sequence[Array]) -> Array:
            representations, count = _floats(inputs[0]), _indices(inputs[1])
            interest = np.empty((len(count), fuser.hidden), np.float32)
            self._call("fuse_partitions", fuser, representations, count, len(representations), len(count), interest)
            return interest

        return run

    def index(self, ids: Sequence[str]) -> Index:
        """An index of ids, none of which holds a line feed."""
        return Index(self._library, ids, self._call)

    def levels(self, feedback: bytes, held: Array, skipped: Array, boundaries: Sequence[float], steps: int) -> Array:
        """The buckets of the feedback of many users, 1 + how many boundaries are at most it.

        Args:
            feedback: of all users, little-endian float64.
            held: see `Index.find`; so for `skipped` and `steps`.
            skipped: see `held`.
            boundaries: ascending.
            steps: see `held`.

        Returns:
            int32[U, L], padded with zeros.
        """
        levels = np.zeros((len(held), steps), np.int32)
        limits = np.array(boundaries, np.float64)
        given = (feedback, _indices(held), _indices(skipped), limits, len(limits), len(held), steps)
        self._call("levels", *given, levels)
        return levels

    def _recurrent(self, constants: Mapping[int, Array], first: int) -> _Weights:
        inputs, bias, recurrent = (_floats(constants[first + place]) for place in range(3))
        hidden = recurrent.shape[1]
        return _Weights(self._library, "recurrent", (inputs, bias, recurrent, hidden), hidden)

    def _activation(self, constants: Mapping[int, Array]) -> _Weights:
        arrays = [_floats(constants[place]) for place in range(4, 10)]
        units, hidden = arrays[0].shape
        return _Weights(self._library, "activation", (*arrays, hidden, units), hidden)

    def _call(self, name: str, *arguments: Any) -> None:
        """Runs a kernel; the last argument is its output, the threads go before it."""
        *given, output = arguments
        if getattr(self._library, f"liber_{name}")(*map(_as_c, (*given, self.threads, output))):
            raise InvalidInputError(
                "an index of an item or a user lies outside of the catalogue or of the request's users; send what "
                "user_memory gives"
            )


MAPPED_BYTES = 1 << 26
"""Largest catalogue, mapped for a layer, that is kept in memory; larger ones are mapped request by request."""

PRIOR_BEHAVIORS = 3.0
"""As the definition of Residuals has them."""

FOLD_IN_ITERATIONS = 10
"""Steps of conjugate gradients, as the definition of FoldIn has them."""


class _Weights:
    """Weights laid out for the kernels; freed with the object."""

    def __init__(self, library: ctypes.CDLL, kind: str, arguments: Sequence[Any], hidden: int) -> None:
        self.hidden = hidden
        self.handle = ctypes.c_void_p(getattr(library, f"liber_{kind}_new")(*map(_as_c, arguments)))
        weakref.finalize(self, getattr(library, f"liber_{kind}_free"), self.handle)


class Index:
    """Ids and their numbers, from 1; made by `Kernels.index`."""

    def __init__(self, library: ctypes.CDLL, ids: Sequence[str], call: Callable[..., None]) -> None:
        joined = "\n".join(ids).encode()
        sizes = (ctypes.c_int64(len(joined)), ctypes.c_int64(len(ids)))
        self._table = _Weights(library, "index", (joined, *sizes), 0)
        self._call = call

    def find(self, joined: bytes, held: Array, skipped: Array, steps: int) -> Array:
        """The numbers of the ids of many users, 0 for an id that is not there.

        Args:
            joined: ids of all users, parted by line feeds.
            held: int32[U], how many of them are each user's, in order.
            skipped: int32[U], how many of those are left out, from the first.
            steps: L; no user has more that are not left out.

        Returns:
            int32[U, L], padded with zeros.
        """
        numbers = np.zeros((len(held), steps), np.int32)
        size = ctypes.c_int64(len(joined))
        self._call(
            "index_find", self._table, joined, size, _indices(held), _indices(skipped), len(held), steps, numbers
        )
        return numbers


class _Compared:
    """The inputs of a comparison: candidates, histories, lengths, feedback and whose candidate each is."""

    def __init__(self, inputs: Sequence[Array]) -> None:
        item, history, length, feedback, user_index = inputs[1:6]
        users, steps = history.shape
        self.rows = len(item)
        self.arrays = (_indices(item), _indices(history), _indices(length), _floats(feedback), _indices(user_index))
        self.sizes = (self.rows, users, steps)


def _attended(inputs: Sequence[Array]) -> tuple[tuple[Array, ...], tuple[int, int, int]]:
    query, states, length, user_index = inputs[:4]
    steps, users, _ = states.shape
    return (_floats(query), _floats(states), _indices(length), _indices(user_index)), (len(query), users, steps)


def _floats(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)


def _indices(array: Array) -> Array:
    return np.ascontiguousarray(array, np.int32)


def _whole_vectors(table: Array) -> Array:
    """A table with zeros behind its columns where they are no whole vectors; otherwise itself, as it is mapped."""
    missing = -table.shape[1] % _LANES
    return np.pad(_floats(table), ((0, 0), (0, missing))) if missing else _floats(table)


def _as_c(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, _Weights):
        return argument.handle
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


def load_kernels(wanted: str, threads: int) -> Kernels | None:
    """The kernels for this processor.

    Args:
        wanted: ``auto`` for the fastest there are, if there are any; ``none``; or one of `targets`.
        threads: of every kernel.

    Raises:
        ConfigurationError: kernels that are asked for by name are not there, or this processor cannot run them.
    """
    if wanted == "none":
        return None
    flags = _processor_flags()
    if wanted != "auto":
        missing = _NEEDS.get(wanted, frozenset()) - flags
        if wanted not in targets() or missing:
            lacks = f"; it lacks {', '.join(sorted(missing))}" if missing else ""
            raise ConfigurationError(
                f"LIBER_KERNELS={wanted!r}: this processor ({platform.machine()}) does not run such kernels{lacks}; "
                "set it to auto or none"
            )
        return _load(wanted, threads)
    for target in targets():
        if _NEEDS.get(target, frozenset()) <= flags and library_path(target).exists():
            return _load(target, threads)
    return None


def _load(target: str, threads: int) -> Kernels:
    with _loading:
        if (target, threads) not in _loaded:
            _loaded[target, threads] = Kernels(target, threads)
        return _loaded[target, threads]


_loading = threading.Lock()
_loaded: dict[tuple[str, int], Kernels] = {}


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
