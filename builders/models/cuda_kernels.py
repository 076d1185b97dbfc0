"""The recurrences of DIEN as one kernel, in the language of OpenAI's Triton, which is no relation of the server.

A program keeps the states of a block of rows and the weights between states on its processor for all steps, and reads
only what differs from step to step. In PyTorch every step is a dozen kernels that each read and write the states.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def recur(
    inputs,
    attention,
    user_index,
    recurrent,
    out,
    steps,
    rows,
    users,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_ATTENDED: tl.constexpr,
    IS_FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A GRU that gives every state, or an AUGRU that gives the last one, for `BLOCK_ROWS` rows.

    Args:
        inputs: float[T, U, 3H], contiguous as all tensors; mapped for the gates update, reset, candidate.
        attention: float[T, N]; not read unless `IS_ATTENDED`.
        user_index: int[N], a row's user; not read unless `IS_FOLDED`: row n is then user n's.
        recurrent: float[3H, H].
        out: float32[T, N, H], or float32[N, H] if `IS_ATTENDED`.
        steps: T.
        rows: N.
        users: U.
        SIZE: H.
        BLOCK_ROWS: rows of a program, at least 16.
        BLOCK_SIZE: the power of two that is not less than H and 16.
        IS_ATTENDED: whether it is an AUGRU.
        IS_FOLDED: whether rows pick their user.
        PRECISION: of products of float32, see `triton.language.dot`.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    unit = tl.arange(0, BLOCK_SIZE)
    is_row, is_unit = row < rows, unit < SIZE
    is_entry = is_row[:, None] & is_unit[None, :]
    user = row
    if IS_FOLDED:
        user = tl.load(user_index + row, mask=is_row, other=0)

    # Entry (k, h) of a block is the weight from unit k of the old state to unit h of the new one.
    is_weight = is_unit[:, None] & is_unit[None, :]
    weight = recurrent + unit[None, :] * SIZE + unit[:, None]
    to_update = tl.load(weight, mask=is_weight, other=0.0)
    to_reset = tl.load(weight + SIZE * SIZE, mask=is_weight, other=0.0)
    to_candidate = tl.load(weight + 2 * SIZE * SIZE, mask=is_weight, other=0.0)

    place = inputs + user[:, None] * (3 * SIZE) + unit[None, :]
    update_input = tl.load(place, mask=is_entry, other=0.0).to(tl.float32)
    reset_input = tl.load(place + SIZE, mask=is_entry, other=0.0).to(tl.float32)
    candidate_input = tl.load(place + 2 * SIZE, mask=is_entry, other=0.0).to(tl.float32)
    state = tl.full((BLOCK_ROWS, BLOCK_SIZE), 0.0, dtype=tl.float32)
    for step in range(steps):
        # The next step's inputs are under way while this one is computed.
        place += users * 3 * SIZE
        is_next = is_entry & (step + 1 < steps)
        next_update = tl.load(place, mask=is_next, other=0.0).to(tl.float32)
        next_reset = tl.load(place + SIZE, mask=is_next, other=0.0).to(tl.float32)
        next_candidate = tl.load(place + 2 * SIZE, mask=is_next, other=0.0).to(tl.float32)

        known = state.to(to_update.dtype)
        update = 1.0 / (1.0 + tl.exp(-update_input - tl.dot(known, to_update, input_precision=PRECISION)))
        reset = 1.0 / (1.0 + tl.exp(-reset_input - tl.dot(known, to_reset, input_precision=PRECISION)))
        candidate = candidate_input + reset * tl.dot(known, to_candidate, input_precision=PRECISION)
        if IS_ATTENDED:
            update *= tl.load(attention + step * rows + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
        # The hyperbolic tangent of the candidate, less the state.
        state += update * (2.0 / (1.0 + tl.exp(-2.0 * candidate)) - 1.0 - state)
        if not IS_ATTENDED:
            tl.store(out + (step * rows + row)[:, None] * SIZE + unit[None, :], state, mask=is_entry)
        update_input = next_update
        reset_input = next_reset
        candidate_input = next_candidate
    if IS_ATTENDED:
        tl.store(out + row[:, None] * SIZE + unit[None, :], state, mask=is_entry)
