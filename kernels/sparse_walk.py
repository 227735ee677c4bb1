"""One program's walk over a run of chosen pages of a job: the query's rows against their tokens.

lanes     of a tile: tokens of consecutive entries of ids, a power of two for each page; those
          behind the end of a page, of the count or of the sequence read nothing
chunks    tiles of a page that is longer than a tile
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from vattn.kernels.online import LOG2E, dot, scored, weigh, widen


@dataclass(frozen=True)
class Lanes:
    """How pages lie in a tile: ``entries`` of ids with ``lanes`` each, or one of ``chunks`` of an
    entry's."""

    entries: int
    lanes: int
    chunks: int


def lanes_for(block: int, page_tokens: int) -> Lanes:
    """Pages of ``page_tokens`` in a tile of ``block`` tokens."""
    if page_tokens >= block:
        return Lanes(1, block, -(-page_tokens // block))
    lanes = triton.next_power_of_2(page_tokens)
    return Lanes(block // lanes, lanes, 1)


@triton.jit
def _rows_at(base, token, there, ROW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``token`` from ``base`` on where they are ``there``; zeros for others."""
    d = tl.arange(0, BLOCK_D)
    at = base + token.to(tl.int64)[:, None] * ROW + d[None, :]
    return tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def walk_chosen(
    tile, last, b, head, index, mine, query, key, value, ids, log_weights, sums_of,
    lengths, starts, slots, key_scale, count, most,
    query_b, query_h, query_l, key_n, key_h, value_n, value_h, ids_b, ids_h, key_scale_h,
    reserved, tokens, scale,
    GROUPS: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, PAGE: tl.constexpr,
    LANES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """m, total [M], acc [M, Dv] of query rows ``mine`` [M] over tiles ``tile`` to ``last``."""
    DTYPE: tl.constexpr = query.dtype.element_ty
    ENTRIES: tl.constexpr = LANES[0]
    EACH: tl.constexpr = LANES[1]
    CHUNKS: tl.constexpr = LANES[2]
    ROWS: tl.constexpr = mine.shape[0]
    length = reserved
    if lengths is not None:
        length = tl.load(lengths + b).to(tl.int32)
    start = 0
    if starts is not None:
        start = tl.load(starts + b).to(tl.int32)
    slot = b.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + b).to(tl.int64)
    factor = scale
    if key_scale is not None:
        factor = scale * tl.load(key_scale + head * key_scale_h)
    row = mine // GROUPS
    d = tl.arange(0, BLOCK_D)
    at_query = (
        query
        + b.to(tl.int64) * query_b
        + (head * GROUPS + mine % GROUPS).to(tl.int64)[:, None] * query_h
        + row[:, None] * query_l
        + d[None, :]
    )
    q = tl.load(at_query, mask=(row < tokens)[:, None] & (d < D)[None, :], other=0.0)
    keys = key + slot * key_n + head.to(tl.int64) * key_h
    values = value + slot * value_n + head.to(tl.int64) * value_h
    chosen = b.to(tl.int64) * ids_b + head.to(tl.int64) * ids_h
    reach = (length - tokens + row)[:, None]

    n = tl.arange(0, BLOCK)
    lane = tl.arange(0, ENTRIES)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    acc = tl.full([ROWS, BLOCK_DV], 0.0, tl.float32)
    first = tile * ENTRIES + n // EACH
    page = tl.load(ids + chosen + first, mask=first < count, other=0)
    for i in tl.range(tile * CHUNKS, last * CHUNKS, num_stages=STAGES):
        entry = i // CHUNKS * ENTRIES + n // EACH
        offset = i % CHUNKS * BLOCK + n % EACH
        token = page * PAGE + offset
        # The ids of the next tile are on their way while this one's rows are asked for.
        coming = (i + 1) // CHUNKS * ENTRIES + n // EACH
        page = tl.load(ids + chosen + coming, mask=coming < count, other=0)
        there = (entry < count) & (offset < PAGE) & (token >= start) & (token < length)
        k = widen(_rows_at(keys, token, there, KEY_ROW, D, BLOCK_D), DTYPE, WIDEN)
        s = dot(q, tl.trans(k), tl.zeros([ROWS, BLOCK], tl.float32), PRECISION)
        s = scored(s, factor, 1.0, False)
        if log_weights is not None:
            at_weight = log_weights + index.to(tl.int64) * most + entry
            s += tl.load(at_weight, mask=entry < count, other=0.0)[None, :] * LOG2E
        v = widen(_rows_at(values, token, there, VALUE_ROW, DV, BLOCK_DV), DTYPE, WIDEN)
        seen = there[None, :] & (token[None, :] <= reach)
        m, alpha, p = weigh(tl.where(seen, s, float("-inf")), m)
        sums = sums * alpha[:, None] + p
        acc = dot(p.to(DTYPE), v, acc * alpha[:, None], PRECISION)
        if sums_of is not None:
            # The log of each page's sum; -inf where it is 0, and where m is -inf too.
            page_sum = tl.sum(tl.reshape(p, [ROWS, ENTRIES, EACH]), 2)
            at_sum = index.to(tl.int64) * tokens * GROUPS * most * CHUNKS
            place = i * ENTRIES + lane
            at_sum += mine.to(tl.int64)[:, None] * (most * CHUNKS) + place[None, :]
            inside = (row < tokens)[:, None] & (place < count * CHUNKS)[None, :]
            tl.store(sums_of + at_sum, m[:, None] + tl.log2(page_sum), mask=inside)
    return m, tl.sum(sums, 1), acc
