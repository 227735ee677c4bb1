"""One program's walk over a run of tiles of a job: the query's rows against keys and values.

    q [M, D] the G * L query rows of a KV head     k [N, D], v [N, Dv] a tile of its rows

Tiles that every query sees whole go through a loop without masks: it has two dots, a maximum, one
multiply-add and one exp2 an element, and two addresses that grow by constants (the distance of rows
is a constant of the compiled kernel). The others, at the ends of what is seen, go first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn.kernels.online import (
    LN2,
    LOG2E,
    dot,
    rows_before,
    scored,
    visible,
    weigh,
    weigh_whole,
    whole_rows,
    widen,
)
from vattn.kernels.pairs import halves
from vattn.kernels.splits import extent, rows_of


@triton.jit
def _query(
    rows, sequence, head, row, d, tokens,
    GROUPS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Elements ``d`` [W] of query rows ``row`` [M] of a KV head, zeros where there are none."""
    query, query_b, query_h, query_l = rows
    token = row // GROUPS
    at = (
        query
        + sequence.to(tl.int64) * query_b
        + (head * GROUPS + row % GROUPS).to(tl.int64)[:, None] * query_h
        + token[:, None] * query_l
        + d[None, :]
    )
    return tl.load(at, mask=(token < tokens)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _halved(even, odd):
    """Query rows in float16, and the powers of two [M] that they were divided by to fit."""
    even = even.to(tl.float32)
    odd = odd.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
    unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(unit == 0.0, 1.0, unit)
    return (even / unit[:, None]).to(tl.float16), (odd / unit[:, None]).to(tl.float16), unit


@triton.jit
def _products(q, odd, k, zeros, PRECISION: tl.constexpr, PAIRS: tl.constexpr, WIDEN: tl.constexpr):
    """<q, k> [M, N]; of pairs, ``q`` are the even elements."""
    if PAIRS is not None:
        k_even, k_odd = halves(k, PAIRS)
        s = dot(q, tl.trans(k_even), zeros, PRECISION)
        return dot(odd, tl.trans(k_odd), s, PRECISION)
    return dot(q, tl.trans(widen(k, q.dtype, WIDEN)), zeros, PRECISION)


@triton.jit
def _added(
    p, v, alpha, acc, odd,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc * alpha + p @ v; of pairs, ``acc`` are the even columns."""
    if PAIRS is not None:
        v_even, v_odd = halves(v, PAIRS)
        acc = dot(p.to(v_even.dtype), v_even, acc * alpha[:, None], PRECISION)
        odd = dot(p.to(v_odd.dtype), v_odd, odd * alpha[:, None], PRECISION)
    else:
        v = widen(v, DTYPE, WIDEN)
        acc = dot(p.to(DTYPE), v, acc * alpha[:, None], PRECISION)
    return acc, odd


@triton.jit
def _slanted(s, slope, position, j, ALIBI: tl.constexpr):
    if ALIBI:
        s -= slope[:, None] * tl.abs(position[:, None] - j[None, :])
    return s


@triton.jit
def _clear(
    tile, last, length, origin, low, high, sinks, tokens, window,
    TREE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """[first, end) of tiles ``tile`` to ``last`` that every query sees whole."""
    clear_low = low
    clear_high = high
    if RULE[0]:
        clear_high = tl.minimum(high, origin + 1)
    if RULE[1]:
        clear_low = tl.maximum(low, origin + tokens - window)
    if TREE:
        clear_high = tl.minimum(clear_high, length - tokens)
    first = sinks + (clear_low - low + RULE[2] - 1) // RULE[2]
    first = tl.minimum(tl.maximum(first, tile), last)
    end = sinks + tl.maximum(clear_high - low, 0) // RULE[2]
    return first, tl.minimum(tl.maximum(end, first), last)


@triton.jit
def walk(
    tile, last, sequence, head, mine, query, key, value, slots, key_scale, alibi, tree,
    query_b, query_h, query_l, key_n, key_h, value_n, value_h, key_scale_h, alibi_b, tree_b,
    scale, softcap, sequences, logits, longest,
    GROUPS: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAIRS: tl.constexpr, WIDEN: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """m, total [M], acc [M, Dv] of query rows ``mine`` [M] over tiles ``tile`` to ``last``. Rows
    of ``logits`` [G * L, longest] get what each query scores, where they are wanted."""
    CAUSAL: tl.constexpr = RULE[0]
    WINDOW: tl.constexpr = RULE[1]
    BLOCK: tl.constexpr = RULE[2]
    EACH: tl.constexpr = 1 if PAIRS is None else 2
    WIDTH: tl.constexpr = D // EACH
    WIDTH_V: tl.constexpr = DV // EACH
    BLOCK_V: tl.constexpr = BLOCK_DV // EACH
    PLAIN: tl.constexpr = (not SOFTCAP) and alibi is None
    _, _, _, _, _, tokens, window, sink_tokens = sequences
    n = tl.arange(0, BLOCK)
    length, start = rows_of(sequence, sequences)
    origin, sink_end, low, high = extent(length, start, sequences, RULE)
    if logits is not None:
        line = (mine % GROUPS * tokens + mine // GROUPS).to(tl.int64) * longest
        lines = logits + line[:, None]
        wanted = (mine < GROUPS * tokens)[:, None]
    sinks = 0
    if WINDOW:
        sinks = (sink_end - start + BLOCK - 1) // BLOCK
    clear, clear_end = _clear(
        tile, last, length, origin, low, high, sinks, tokens, window, tree is not None, RULE
    )

    # ---- the query ----
    token = mine // GROUPS
    d = tl.arange(0, BLOCK_D)
    rows = (query, query_b, query_h, query_l)
    factor = tl.full([mine.shape[0]], 0.0, tl.float32) + scale
    if key_scale is not None:
        factor *= tl.load(key_scale + head * key_scale_h)
    if PAIRS is not None:
        q = _query(rows, sequence, head, mine, 2 * d, tokens, GROUPS, D)
        odd = _query(rows, sequence, head, mine, 2 * d + 1, tokens, GROUPS, D)
        q, odd, unit = _halved(q, odd)
        factor *= unit
        if PAIRS == "e4m3":
            factor *= 256.0
    else:
        q = _query(rows, sequence, head, mine, d, tokens, GROUPS, D)
        odd = q
    # A negative factor would turn the maximum round: the query takes the sign.
    sign = tl.where(factor < 0, -1.0, 1.0)[:, None]
    q = (q.to(tl.float32) * sign).to(q.dtype)
    odd = (odd.to(tl.float32) * sign).to(odd.dtype)
    factor = tl.abs(factor)
    slope = tl.full([mine.shape[0]], 0.0, tl.float32)
    if alibi is not None:
        here = alibi + sequence * alibi_b + head * GROUPS + mine % GROUPS
        slope = tl.load(here, mask=token < tokens, other=0.0) * LOG2E
    position = length - tokens + token

    # ---- the keys ----
    slot = sequence
    if slots is not None:
        slot = tl.load(slots + sequence)
    keys = key + slot.to(tl.int64) * key_n + head.to(tl.int64) * key_h
    values = value + slot.to(tl.int64) * value_n + head.to(tl.int64) * value_h
    m = tl.full([mine.shape[0]], float("-inf"), tl.float32)
    total = tl.full([mine.shape[0]], 0.0, tl.float32)
    acc = tl.full([mine.shape[0], BLOCK_V], 0.0, tl.float32)
    acc_odd = acc
    zeros = tl.full([mine.shape[0], BLOCK], 0.0, tl.float32)
    for i in tl.range(0, last - tile - (clear_end - clear), num_stages=1):
        at_tile = tl.where(i < clear - tile, tile + i, clear_end + i - (clear - tile))
        j = low + (at_tile - sinks) * BLOCK + n
        limit = high
        if WINDOW:
            j = tl.where(at_tile < sinks, start + at_tile * BLOCK + n, j)
            limit = tl.where(at_tile < sinks, sink_end, high)
        k = rows_before(keys, j, limit, KEY_ROW, WIDTH, BLOCK_D)
        s = _products(q, odd, k, zeros, PRECISION, PAIRS, WIDEN)
        s = scored(s, factor[:, None], softcap, SOFTCAP)
        s = _slanted(s, slope, position, j, alibi is not None)
        seen = (j < limit)[None, :]
        if CAUSAL:
            seen = seen & visible(
                (origin + token)[:, None], j[None, :], window, sink_tokens, True, WINDOW
            )
        if tree is not None:
            nth = j - (length - tokens)
            leaf = tree + sequence * tree_b + (token[:, None] * tokens + nth[None, :])
            among = (nth >= 0)[None, :] & seen & (token < tokens)[:, None]
            seen = seen & (tl.load(leaf, mask=among, other=1) != 0)
        s = tl.where(seen, s, float("-inf"))
        if logits is not None:
            tl.store(lines + j[None, :], s * LN2, mask=wanted & (j < limit)[None, :])
        v = rows_before(values, j, limit, VALUE_ROW, WIDTH_V, BLOCK_V)
        m, alpha, p = weigh(s, m)
        total = total * alpha + tl.sum(p, 1)
        acc, acc_odd = _added(p, v, alpha, acc, acc_odd, q.dtype, PRECISION, PAIRS, WIDEN)
    first = (low + (clear - sinks) * BLOCK).to(tl.int64)
    keys += first * KEY_ROW
    values += first * VALUE_ROW
    # The total by column: a sum over columns goes through shared memory, one a program is enough.
    sums = tl.where((n == 0)[None, :], total[:, None], 0.0)
    by = factor * LOG2E
    if not PLAIN:
        by = tl.full([mine.shape[0]], 1.0, tl.float32)
    for i in tl.range(clear, clear_end, num_stages=STAGES):
        k = whole_rows(keys, KEY_ROW, BLOCK, WIDTH, BLOCK_D)
        s = _products(q, odd, k, zeros, PRECISION, PAIRS, WIDEN)
        if not PLAIN:
            s = scored(s, factor[:, None], softcap, SOFTCAP)
            s = _slanted(s, slope, position, low + (i - sinks) * BLOCK + n, alibi is not None)
        if logits is not None:
            natural = s * (factor[:, None] if PLAIN else LN2)
            tl.store(lines + (low + (i - sinks) * BLOCK + n)[None, :], natural, mask=wanted)
        v = whole_rows(values, VALUE_ROW, BLOCK, WIDTH_V, BLOCK_V)
        m, alpha, p = weigh_whole(s, by, m)
        sums = sums * alpha[:, None] + p
        acc, acc_odd = _added(p, v, alpha, acc, acc_odd, q.dtype, PRECISION, PAIRS, WIDEN)
        keys += BLOCK * KEY_ROW
        values += BLOCK * VALUE_ROW
    if PAIRS is not None:
        acc = tl.interleave(acc, acc_odd)
        if PAIRS == "e4m3":
            acc *= 256.0
    return m, tl.sum(sums, 1), acc
