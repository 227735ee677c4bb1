"""The kernel of `cascade`: query rows of all members of a group against the rows that they share.

    rows of a tile   (member, token, head of a KV head's group), the head fastest
    keys             rows [begins[g], ends[g]) of the group's first member, in ``splits`` parts

Grid: [groups] x [KV heads] x [splits] x [row tiles], row tiles fastest: programs that read the same
K and V run side by side, and all but the first find them in L2. Positions are each member's own,
so that causality, windows, ALiBi and released rows are what they are without sharing. Tiles of keys
that every row sees whole go through a loop without comparisons, as in `vattn.kernels.walk`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn.kernels.online import (
    LOG2E,
    dot,
    fold,
    rows_before,
    scored,
    settled,
    visible,
    whole_rows,
    widen,
)

FAR = tl.constexpr(1 << 30)
# What a compiled kernel need not know: a new number must not stall a step that serves.
# Query tokens are not among them: the kernel of one token needs fewer registers.
COUNTS = ["batch", "reserved", "row_tiles", "splits", "window", "sink_tokens"]


@triton.jit
def _reach(
    begin, end, real, origin, start, window, sink_tokens,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RELEASED: tl.constexpr,
):  # fmt: skip
    """(low, high, clear_low, clear_high): keys that some row sees, and keys that all rows see."""
    low = begin
    high = end
    clear_low = begin
    clear_high = end
    if RELEASED:
        low = tl.maximum(low, tl.min(tl.where(real, start, FAR)))
        clear_low = tl.maximum(clear_low, tl.max(tl.where(real, start, 0)))
    if CAUSAL:
        first = tl.min(tl.where(real, origin, FAR))
        last = tl.max(tl.where(real, origin, -1))
        high = tl.minimum(high, last + 1)
        clear_high = tl.minimum(clear_high, first + 1)
        if WINDOW:
            clear_low = tl.maximum(clear_low, last - window + 1)
            if sink_tokens <= begin:
                low = tl.maximum(low, first - window + 1)
    return low, high, tl.maximum(clear_low, low), clear_high


@triton.jit(do_not_specialize=COUNTS)
def attend_prefix(
    query, key, value, outs, lses, tails, members, firsts, begins, ends,
    lengths, starts, slots, key_scale, value_scale, alibi,
    query_b, query_h, query_l, key_n, key_h, value_n, value_h, key_scale_h, value_scale_h, alibi_b,
    batch, reserved, tokens, row_tiles, splits, scale, softcap, window, sink_tokens,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    STORED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = query.dtype.element_ty
    # ---- which rows ----
    program = tl.program_id(0)
    row_tile = program % row_tiles
    split = program // row_tiles % splits
    head = program // (row_tiles * splits) % HEADS
    group = program // (row_tiles * splits * HEADS)
    first = tl.load(firsts + group)
    count = tl.load(firsts + group + 1) - first
    if row_tile * BLOCK_M >= count * tokens * GROUPS:
        return
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    member = row // (tokens * GROUPS)
    token = row // GROUPS % tokens
    query_head = head * GROUPS + row % GROUPS
    real = member < count
    b = tl.load(members + first + member, mask=real, other=0)
    length = tl.full([BLOCK_M], reserved, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + b, mask=real, other=0).to(tl.int32)
    start = tl.zeros([BLOCK_M], tl.int32)
    if starts is not None:
        start = tl.load(starts + b, mask=real, other=0).to(tl.int32)
    begin = tl.load(begins + group)
    end = tl.load(ends + group)
    one = real & (row % (tokens * GROUPS) == 0) & (head + split == 0)
    tl.store(tails + b, tl.maximum(start, end), mask=one)

    # ---- which keys ----
    position = length - tokens + token
    origin = position
    if CAUSAL == 1:
        origin = token
    low, high, clear_low, clear_high = _reach(
        begin, end, real, origin, start, window, sink_tokens, CAUSAL, WINDOW, starts is not None
    )
    tiles = (tl.maximum(high - low, 0) + BLOCK_N - 1) // BLOCK_N
    share = (tiles + splits - 1) // splits
    at = split * share
    stop = tl.minimum(at + share, tiles)
    if at >= stop:
        return
    clear = tl.minimum(tl.maximum((clear_low - low + BLOCK_N - 1) // BLOCK_N, at), stop)
    clear_stop = tl.maximum(clear_high - low, 0) // BLOCK_N
    clear_stop = tl.minimum(tl.maximum(clear_stop, clear), stop)

    # ---- the query ----
    d = tl.arange(0, BLOCK_D)
    p_query = (
        query
        + (b.to(tl.int64) * query_b + query_head.to(tl.int64) * query_h + token * query_l)[:, None]
        + d[None, :]
    )
    q = tl.load(p_query, mask=real[:, None] & (d < D)[None, :], other=0.0)
    factor = scale
    if key_scale is not None:
        factor = scale * tl.load(key_scale + head * key_scale_h)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if alibi is not None:
        slope = tl.load(alibi + b * alibi_b + query_head, mask=real, other=0.0) * LOG2E

    # ---- keys that some rows do not see, then keys that all see ----
    slot = tl.load(members + first)
    if slots is not None:
        slot = tl.load(slots + slot)
    keys = key + slot.to(tl.int64) * key_n + head.to(tl.int64) * key_h
    values = value + slot.to(tl.int64) * value_n + head.to(tl.int64) * value_h
    n = tl.arange(0, BLOCK_N)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in tl.range(0, stop - at - (clear_stop - clear), num_stages=STAGES):
        tile = tl.where(i < clear - at, at + i, clear_stop + i - (clear - at))
        j = low + tile * BLOCK_N + n
        k = widen(rows_before(keys, j, high, KEY_ROW, D, BLOCK_D), DTYPE, STORED)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        s = scored(products, factor, softcap, SOFTCAP)
        if alibi is not None:
            s -= slope[:, None] * tl.abs(position[:, None] - j[None, :])
        seen = (j < high)[None, :] & (j[None, :] >= start[:, None])
        if CAUSAL:
            seen = seen & visible(origin[:, None], j[None, :], window, sink_tokens, True, WINDOW)
        v = rows_before(values, j, high, VALUE_ROW, DV, BLOCK_DV)
        s = tl.where(seen, s, float("-inf"))
        m, total, acc = fold(s, widen(v, DTYPE, STORED), m, total, acc, PRECISION)
    skip = (low + clear * BLOCK_N).to(tl.int64)
    keys += skip * KEY_ROW
    values += skip * VALUE_ROW
    for i in tl.range(clear, clear_stop, num_stages=STAGES):
        k = widen(whole_rows(keys, KEY_ROW, BLOCK_N, D, BLOCK_D), DTYPE, STORED)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        s = scored(products, factor, softcap, SOFTCAP)
        if alibi is not None:
            j = low + i * BLOCK_N + n
            s -= slope[:, None] * tl.abs(position[:, None] - j[None, :])
        v = whole_rows(values, VALUE_ROW, BLOCK_N, DV, BLOCK_DV)
        m, total, acc = fold(s, widen(v, DTYPE, STORED), m, total, acc, PRECISION)
        keys += BLOCK_N * KEY_ROW
        values += BLOCK_N * VALUE_ROW

    # ---- the part ----
    result, logs = settled(m, total, acc)
    if value_scale is not None:
        result = result * tl.load(value_scale + head * value_scale_h)
    here = ((split * batch + b).to(tl.int64) * (HEADS * GROUPS) + query_head) * tokens + token
    tl.store(lses + here, logs, mask=real)
    dv = tl.arange(0, BLOCK_DV)
    inside = real[:, None] & (dv < DV)[None, :]
    tl.store(outs + here[:, None] * DV + dv[None, :], result, mask=inside)
