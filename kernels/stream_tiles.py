"""What `stream_loops` does with a *tile*: four query rows and a block of tokens, all in float32.

    tile of q, o   [D / 16][4 rows][16]       lanes as `lanes.pair_load` leaves them
    tile of s      [tokens][4 rows]           scores, then weights
    m, l           8 lanes: the four rows twice; a row's l is the sum of its two lanes

    scores      s[t, r] = q[r] . k[t]                 two tokens at a time: eight sums
    weights     m' = max(m, s), s = exp(s - m'), l = l exp(m - m') + sum_t s
    accumulate  o[r] = o[r] exp(m - m') + sum_t s[t, r] v[t]     16 elements at a time: eight sums
    join        the same state after two disjoint sets of tokens

Sixteen AVX registers hold the eight sums and what goes into them. While one block is computed the
next is asked for: row ``t`` of it lies at ``ahead + t * ahead_row``, and a step's elements
``ahead_step`` behind those of the step before. Addresses and strides are in bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from vattn.kernels import lanes as v

ROWS = 4
ROW_BYTES = 64  # of one row's 16 elements
STEP_BYTES = ROWS * ROW_BYTES
STATE_BYTES = 64  # of m and l
EMPTY = np.float32(-np.inf)

# Only called from compiled code, and part of the code that is cached there.
INNER: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
jit = njit(**INNER)


@jit
def steps_of(dim: int) -> int:
    """Steps of 16 elements of a row, the last one perhaps padded."""
    return (dim + 15) // 16


@jit
def pad(source: int, target: int, dim: int, item: int) -> int:
    """Copy a row, with zeros up to a whole number of steps; returns where it is now."""
    v.clear(target + dim * item, (steps_of(dim) * 16 - dim) * item)
    v.copy(target, source, dim * item)
    return target


@jit
def pad_block(rows: int, stride: int, tokens: int, dim: int, item: int, target: int) -> int:
    """Copy the rows of a block as `pad` does, one behind the other."""
    for t in range(tokens):
        pad(rows + t * stride, target + t * steps_of(dim) * 16 * item, dim, item)
    return target


@jit
def clear(state: int, outs: int) -> None:
    """The state before any token."""
    for place in range(state, state + outs * STEP_BYTES + STATE_BYTES, 32):
        v.store(place, v.fill(np.float32(0.0)))
    v.store(state + outs * STEP_BYTES, v.fill(EMPTY))


@jit
def scores(
    tag: Any,
    q: int,
    rows: int,
    row: int,
    tokens: int,
    steps: int,
    s: int,
    ahead: int,
    ahead_row: int,
    ahead_step: int,
) -> None:
    """Scores of a block; behind an odd last token they are -inf."""
    stride = 16 * v.size(tag)
    for t in range(0, tokens, 2):
        k0 = rows + t * row
        k1 = k0 + row if t + 1 < tokens else k0
        next0 = ahead + t * ahead_row
        next1 = next0 + ahead_row
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = v.fill(np.float32(0.0))
        for step in range(steps):
            v.prefetch(next0 + step * ahead_step)
            v.prefetch(next1 + step * ahead_step)
            low0, high0 = v.pair_load(tag, k0 + step * stride)
            low1, high1 = v.pair_load(tag, k1 + step * stride)
            here = q + step * STEP_BYTES
            x = v.load(here)
            a0, b0 = v.fma(x, low0, a0), v.fma(x, low1, b0)
            x = v.load(here + 64)
            a1, b1 = v.fma(x, low0, a1), v.fma(x, low1, b1)
            x = v.load(here + 128)
            a2, b2 = v.fma(x, low0, a2), v.fma(x, low1, b2)
            x = v.load(here + 192)
            a3, b3 = v.fma(x, low0, a3), v.fma(x, low1, b3)
            x = v.load(here + 32)
            a0, b0 = v.fma(x, high0, a0), v.fma(x, high1, b0)
            x = v.load(here + 96)
            a1, b1 = v.fma(x, high0, a1), v.fma(x, high1, b1)
            x = v.load(here + 160)
            a2, b2 = v.fma(x, high0, a2), v.fma(x, high1, b2)
            x = v.load(here + 224)
            a3, b3 = v.fma(x, high0, a3), v.fma(x, high1, b3)
        v.store(s + t * ROWS * 4, v.sums(a0, a1, a2, a3, b0, b1, b2, b3))
    if tokens % 2:
        for r in range(ROWS):
            v.write(s + (tokens * ROWS + r) * 4, EMPTY)


@jit
def weights(s: int, tokens: int, ml: int) -> tuple[Any, bool]:
    """Scores to weights; returns the factor of the state so far, and whether any weight counts."""
    before = v.load(ml)
    top = before
    for place in range(s, s + tokens * ROWS * 4, 32):
        top = v.larger(v.load(place), top)
    top = v.larger(v.swap(top), top)
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    shift = v.zero_if_empty(top)
    total = v.fill(np.float32(0.0))
    for place in range(s, s + tokens * ROWS * 4, 32):
        p = v.exp(v.sub(v.load(place), shift))
        v.store(place, p)
        total = v.add(total, p)
    factor = v.exp(v.sub(before, shift))
    v.store(ml, top)
    v.store(ml + 32, v.fma(v.load(ml + 32), factor, total))
    return factor, not v.all_zero(total)


@jit
def accumulate(
    tag: Any,
    s: int,
    rows: int,
    row: int,
    tokens: int,
    steps: int,
    o: int,
    factor: Any,
    ahead: int,
    ahead_row: int,
    ahead_step: int,
) -> None:
    """Join a block's weighted values to the state."""
    stride = 16 * v.size(tag)
    f0, f1, f2, f3 = v.lane(factor, 0), v.lane(factor, 1), v.lane(factor, 2), v.lane(factor, 3)
    for step in range(steps):
        here = o + step * STEP_BYTES
        a0, b0 = v.mul(v.load(here), f0), v.mul(v.load(here + 32), f0)
        a1, b1 = v.mul(v.load(here + 64), f1), v.mul(v.load(here + 96), f1)
        a2, b2 = v.mul(v.load(here + 128), f2), v.mul(v.load(here + 160), f2)
        a3, b3 = v.mul(v.load(here + 192), f3), v.mul(v.load(here + 224), f3)
        value = rows + step * stride
        after = ahead + step * ahead_step
        for t in range(tokens):
            v.prefetch(after + t * ahead_row)
            low, high = v.pair_load(tag, value + t * row)
            p = s + t * ROWS * 4
            x = v.spread(p)
            a0, b0 = v.fma(x, low, a0), v.fma(x, high, b0)
            x = v.spread(p + 4)
            a1, b1 = v.fma(x, low, a1), v.fma(x, high, b1)
            x = v.spread(p + 8)
            a2, b2 = v.fma(x, low, a2), v.fma(x, high, b2)
            x = v.spread(p + 12)
            a3, b3 = v.fma(x, low, a3), v.fma(x, high, b3)
        v.store(here, a0)
        v.store(here + 32, b0)
        v.store(here + 64, a1)
        v.store(here + 96, b1)
        v.store(here + 128, a2)
        v.store(here + 160, b2)
        v.store(here + 192, a3)
        v.store(here + 224, b3)


@jit
def join(state: int, other: int, outs: int) -> None:
    """Merge the state of other tokens into this one."""
    ml, other_ml = state + outs * STEP_BYTES, other + outs * STEP_BYTES
    mine, theirs = v.load(ml), v.load(other_ml)
    top = v.larger(theirs, mine)
    shift = v.zero_if_empty(top)
    keep, take = v.exp(v.sub(mine, shift)), v.exp(v.sub(theirs, shift))
    v.store(ml, top)
    v.store(ml + 32, v.fma(v.load(ml + 32), keep, v.mul(v.load(other_ml + 32), take)))
    for r in range(ROWS):
        a, b = v.lane(keep, r), v.lane(take, r)
        for place in range(r * ROW_BYTES, outs * STEP_BYTES, STEP_BYTES):
            for half in (place, place + 32):
                some = v.mul(v.load(other + half), b)
                v.store(state + half, v.fma(v.load(state + half), a, some))
