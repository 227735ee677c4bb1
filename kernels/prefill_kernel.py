"""The kernel of prefill.py, whose head is its contract."""

from __future__ import annotations

import triton
import triton.language as tl

from vattn.kernels.mask_tiles import EMPTY
from vattn.kernels.online import LOG2E, dot, fold, scored, settled, visible, widen
from vattn.kernels.prefill_tiles import placed, span

# Finite scores stay finite in units of log2.
LARGEST = tl.constexpr(3.0e38)
# Sizes that a compiled kernel need not know: a new one must not stall its first call.
# ``keys`` is not among them: a multiple of 16 makes loads of a mask wide.
SIZES = [
    "tokens",
    "tiles",
    "q_tiles",
    "section",
    "batch_heads",
    "window",
    "sink_tokens",
]


@triton.jit
def _keys(
    tensor,
    held,
    stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """KEYS rows of K or V from ``tensor`` on, as [KEYS, BLOCK]; 0 beyond DIM, and where a row of
    an edge is not ``held``."""
    d = tl.arange(0, BLOCK)
    row = tl.arange(0, KEYS).to(tl.int64)
    cells = tensor + (row * stride)[:, None] + d[None, :]
    if EDGE:
        if DIM == BLOCK:
            return tl.load(cells, mask=held[:, None], other=0)
        return tl.load(cells, mask=held[:, None] & (d < DIM)[None, :], other=0)
    if DIM == BLOCK:
        return tl.load(cells)
    return tl.load(cells, mask=(d < DIM)[None, :], other=0)


@triton.jit
def _fold_products(products, factor, v, m, total, acc, PRECISION: tl.constexpr):
    """`online.fold` of products [M, N], all visible, whose ``factor`` to scores is at least 0: one
    multiply-add and one exp2 an element."""
    m_new = tl.maximum(m, tl.max(products, 1) * factor)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - shift)
    p = tl.exp2(products * factor - shift[:, None])
    total = total * alpha + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)
    return m_new, total, acc


@triton.jit
def _masked(s, cells, there, BOOL: tl.constexpr):
    """Scores under a mask whose cells, [M, N] or [1, N], lie at ``cells``."""
    value = tl.load(cells, mask=there, other=0)
    if BOOL:
        return tl.where(value != 0, s, float("-inf"))
    value = value.to(tl.float32)
    # Not clamp: NaN must stay, and infinity.
    scaled = value * LOG2E
    scaled = tl.where((scaled > LARGEST) & (value < float("inf")), LARGEST, scaled)
    scaled = tl.where((scaled < -LARGEST) & (value > float("-inf")), -LARGEST, scaled)
    return s + scaled


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def prefill_kernel(
    query, key, value, out, lse, query_starts, lengths, starts, slots,
    key_scale, value_scale, alibi, sink_logits, mask, states, before, order,
    q_b, q_h, q_l, k_n, k_h, k_s, v_n, v_h, v_s, o_b, o_h, o_l, e_b, e_h, e_l,
    m_b, m_h, m_l, m_s, ks_h, vs_h, a_b, t_b, t_h, t_l,
    tokens, keys, tiles, q_tiles, section, batch_heads, heads,
    scale, softcap, window, sink_tokens,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PACK: tl.constexpr, SHARED: tl.constexpr,
    CAUSAL: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, LINEAR: tl.constexpr, BOOL: tl.constexpr, ONE_ROW: tl.constexpr,
    PRECISION: tl.constexpr, STORED: tl.constexpr,
):
    # fmt: on
    """One program a tile of ROWS rows: row r is query r // PACK of head h * PACK + r % PACK."""
    plane, tile = placed(tl.program_id(0), section, q_tiles, batch_heads)
    b, h = plane // heads, plane % heads
    base = b.to(tl.int64)
    if query_starts is not None:
        begin = tl.load(query_starts + b)
        tokens = tl.load(query_starts + b + 1) - begin
        query += begin.to(tl.int64) * q_l
        out += begin.to(tl.int64) * o_l
        lse += begin.to(tl.int64) * e_l
    if tile * ROWS >= tokens * PACK:
        return
    length = keys if lengths is None else tl.load(lengths + b).to(tl.int32)
    start = 0 if starts is None else tl.load(starts + b).to(tl.int32)
    slot = base if slots is None else tl.load(slots + b).to(tl.int64)
    key += slot * k_n + (h // SHARED).to(tl.int64) * k_h
    value += slot * v_n + (h // SHARED).to(tl.int64) * v_h

    row = tile * ROWS + tl.arange(0, ROWS)
    head = h * PACK + row % PACK
    line = row // PACK
    live = line < tokens
    wide, head_wide = line.to(tl.int64), head.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    cells = query + base * q_b + (head_wide * q_h + wide * q_l)[:, None] + d[None, :]
    q = tl.load(cells, mask=live[:, None] & (d < D)[None, :], other=0.0)

    shift = length - tokens if BOTTOM_RIGHT else 0
    low, inner, outer, high, sink, sunk = span(
        tile * ROWS // PACK + shift,
        tl.minimum((tile * ROWS + ROWS - 1) // PACK, tokens - 1) + shift,
        start, length, window, sink_tokens, KEYS, CAUSAL, WINDOW,
    )  # fmt: skip
    whole, sinks, left = outer - inner, sunk - sink, inner - low
    mixed, mixed_first = 0, 0
    whole_first = inner
    if mask is not None:
        mask += base * m_b
        mask_row = head_wide * m_h + wide * m_l
        if states is None:
            left, outer, whole = high - low, high, 0
        else:
            strip = base * t_b + h * t_h + tile * t_l
            states += strip * tiles
            order += strip * tiles
            before += strip * 2 * (tiles + 1)
            whole_first = tl.load(before + inner)
            whole = tl.load(before + outer) - whole_first
            mixed_first = tl.load(before + tiles + 1 + inner)
            mixed = tl.load(before + tiles + 1 + outer) - mixed_first
    if alibi is not None:
        slope = tl.load(alibi + b * a_b + head) * LOG2E
    factor = scale if key_scale is None else scale * tl.load(key_scale + h // SHARED * ks_h)

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sink_logits is not None:
        m = tl.load(sink_logits + head) * LOG2E
        total += 1.0
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for EDGE in tl.static_range(2):
        for i in range(sinks + left + mixed + high - outer if EDGE else whole):
            if EDGE:
                k = i - sinks - left
                n = tl.where(i < sinks, sink + i, low + i - sinks)
                n = tl.where(k >= mixed, outer + k - mixed, n)
                if states is not None:
                    listed = (k >= 0) & (k < mixed)
                    n_mixed = tl.load(order + tiles - 1 - mixed_first - k, mask=listed, other=0)
                    n = tl.where(listed, n_mixed, n)
            elif states is not None:
                n = tl.load(order + whole_first + i)
            else:
                n = whole_first + i
            j = n * KEYS + tl.arange(0, KEYS)
            held = (j >= start) & (j < length)
            if EDGE and states is not None:
                held = held & (tl.load(states + n) != EMPTY)
            n_wide = n.to(tl.int64)
            k_tile = _keys(key + n_wide * KEYS * k_s, held, k_s, D, BLOCK_D, KEYS, EDGE)
            k_tile = widen(k_tile, q.dtype, STORED)
            products = dot(q, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32), PRECISION)
            v_tile = _keys(value + n_wide * KEYS * v_s, held, v_s, DV, BLOCK_DV, KEYS, EDGE)
            v_tile = widen(v_tile, q.dtype, STORED)
            if LINEAR and not EDGE:
                m, total, acc = _fold_products(
                    products, factor * LOG2E, v_tile, m, total, acc, PRECISION
                )
            else:
                s = scored(products, factor, softcap, SOFTCAP)
                if alibi is not None:
                    s -= slope[:, None] * tl.abs(j[None, :] - (line + length - tokens)[:, None])
                if EDGE:
                    seen = held[None, :]
                    if mask is not None:
                        places = mask + (j.to(tl.int64) * m_s)[None, :]
                        there = (j < keys)[None, :]
                        if ONE_ROW:
                            s = _masked(s, places + h.to(tl.int64) * m_h, there, BOOL)
                        else:
                            s = _masked(s, places + mask_row[:, None], there & live[:, None], BOOL)
                    if CAUSAL:
                        p = (line + shift)[:, None]
                        seen = seen & visible(p, j[None, :], window, sink_tokens, CAUSAL, WINDOW)
                    s = tl.where(seen, s, float("-inf"))
                m, total, acc = fold(s, v_tile, m, total, acc, PRECISION)

    result, natural = settled(m, total, acc)
    if value_scale is not None:
        result *= tl.load(value_scale + h // SHARED * vs_h)
    d_v = tl.arange(0, BLOCK_DV)
    cells = out + base * o_b + (head_wide * o_h + wide * o_l)[:, None] + d_v[None, :]
    stored = live[:, None] & (d_v < DV)[None, :]
    tl.store(cells, result.to(out.dtype.element_ty), mask=stored)
    rows = base * e_b + head_wide * e_h + wide * e_l
    tl.store(lse + rows, natural, mask=live)
