"""`stream_tiles` for rows that lie anywhere: row t of a block is the one at a listed position.

    places   int64 [tokens]   positions; row t lies at  rows + places[t] * row

While a block is computed, rows of the other operand are asked for: V's of this block by `listed`,
K's of the next block by `add`, which finds its positions `BLOCK` behind. Addresses and strides are
in bytes.
"""

from __future__ import annotations

from typing import Any

from vattn.kernels import lanes as v
from vattn.kernels.stream_tiles import ROWS, STEP_BYTES, jit, pad, scores, steps_of

BLOCK = 64  # tokens whose scores are held at once; even


@jit
def gather(rows: int, row: int, places: int, tokens: int, dim: int, item: int, target: int) -> None:
    """Copy the rows of a block one behind the other, each with zeros up to a whole step."""
    for t in range(tokens):
        source = rows + v.integer(places + 8 * t) * row
        pad(source, target + t * steps_of(dim) * 16 * item, dim, item)


@jit
def listed(
    tag: Any,
    q: int,
    rows: int,
    row: int,
    places: int,
    tokens: int,
    steps: int,
    s: int,
    ahead: int,
    ahead_row: int,
) -> None:
    """Scores of a block, two tokens at a time; behind an odd last token they are -inf."""
    step = 16 * v.size(tag)
    for t in range(0, tokens, 2):
        first, second = v.integer(places + 8 * t), v.integer(places + 8 * t + 8)
        k0, gap = rows + first * row, (second - first) * row
        next0, next_gap = ahead + first * ahead_row, (second - first) * ahead_row
        some = min(2, tokens - t)
        scores(tag, q, k0, gap, some, steps, s + t * ROWS * 4, next0, next_gap, step)


@jit
def add(
    tag: Any,
    s: int,
    rows: int,
    row: int,
    places: int,
    tokens: int,
    steps: int,
    o: int,
    factor: Any,
    ahead: int,
    ahead_row: int,
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
        value, after = rows + step * stride, ahead + step * stride
        for t in range(tokens):
            place = places + 8 * t
            v.prefetch(after + v.integer(place + 8 * BLOCK) * ahead_row)
            low, high = v.pair_load(tag, value + v.integer(place) * row)
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
