"""The kernels of `append`, whose contract they share: one writes the rows, one counts them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr):
    """The bits of float32 x as a float of 8 bits: nearest, ties to even, saturated."""
    DROP: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    rounded = size + ((1 << (DROP - 1)) - 1) + ((size >> DROP) & 1)
    normal = (rounded >> DROP) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number, 2^(1 - BIAS): next to a number whose last bit is worth as
    # much as theirs, float32 addition does the rounding.
    ALIGN: tl.constexpr = (127 + 23 + 1 - BIAS - MANTISSA) << 23
    align = tl.full(x.shape, ALIGN, tl.uint32)
    beside = size.to(tl.float32, bitcast=True) + align.to(tl.float32, bitcast=True)
    small = beside.to(tl.uint32, bitcast=True) - align
    number = tl.minimum(tl.where(size < ((128 - BIAS) << 23), small, normal), TOP)
    number = tl.where(size > 0x7F800000, 0x7F, number)
    return (number | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def wide(x):
    """x in float32, exactly."""
    if x.dtype == tl.bfloat16:  # the interpreter's conversion is not exact
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x in another dtype of 16 or 32 bits: nearest, ties to even."""
    if x.dtype != DTYPE:
        x = wide(x).to(DTYPE)
    return x


@triton.jit
def encoded(x, scale, at, live, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr):
    """Rows x [R, D] as they are stored; ``scale + at`` [R] are the addresses of their scales."""
    x = wide(x)
    if scale is not None:
        by = tl.load(scale + at, mask=live, other=1.0)
        x = tl.div_rn(x, tl.broadcast_to(by[:, None], x.shape))
    return narrow(x, MANTISSA, BIAS, TOP)


@triton.jit
def owner(t, starts, batch, steps):
    """The last sequence that starts at or before packed token t."""
    b = tl.zeros_like(t)
    for step in range(steps):
        after = b + (1 << (steps - 1 - step))
        first = tl.load(starts + after, mask=after < batch, other=2147483647)
        b = tl.where(first <= t, after, b)
    return b


@triton.jit(do_not_specialize=["rows", "tokens", "batch", "steps", "capacity"])
def append_rows(
    new_key,
    new_value,
    key,
    value,
    lengths,
    starts,
    counts,
    room,
    slots,
    key_scale,
    value_scale,
    new_key_b,
    new_key_h,
    new_key_s,
    new_value_b,
    new_value_h,
    new_value_s,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    lengths_b,
    key_scale_h,
    value_scale_h,
    rows,
    tokens,
    batch,
    steps,
    capacity,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TOP: tl.constexpr,
):
    # A row of the tile is one head of one new token.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    t, h = row // HEADS, (row % HEADS).to(tl.int64)
    if starts is None:
        b, i = t // tokens, t % tokens
        place = i
        if counts is not None:
            live = live & (i < tl.load(counts + b, mask=live, other=0))
    else:
        b = owner(t, starts, batch, steps)
        first = tl.load(starts + b, mask=live, other=0)
        last = tl.load(starts + b + 1, mask=live, other=0)
        live = live & (first <= t) & (t < last)
        i, place = t - first, t
    at = tl.load(lengths + b.to(tl.int64) * lengths_b, mask=live, other=0).to(tl.int64) + i
    live = live & (at < capacity)
    if room is not None:
        live = live & (at < tl.load(room + b, mask=live, other=0))
    slot = b.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + b, mask=live, other=0).to(tl.int64)
    source = b.to(tl.int64)
    if starts is not None:
        source = tl.zeros_like(source)
    place = place.to(tl.int64)

    # K is a tile of ROWS x BLOCK_D, V one of ROWS x BLOCK_DV.
    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    k_mask, v_mask = live[:, None] & (d < D), live[:, None] & (dv < DV)
    p_new_key = new_key + (source * new_key_b + h * new_key_h + place * new_key_s)[:, None] + d
    p_new_value = (
        new_value + (source * new_value_b + h * new_value_h + place * new_value_s)[:, None] + dv
    )
    k = tl.load(p_new_key, mask=k_mask)
    v = tl.load(p_new_value, mask=v_mask)
    if MANTISSA > 0:
        k = encoded(k, key_scale, h * key_scale_h, live, MANTISSA, BIAS, TOP)
        v = encoded(v, value_scale, h * value_scale_h, live, MANTISSA, BIAS, TOP)
    else:
        k = cast(k, key.dtype.element_ty)
        v = cast(v, value.dtype.element_ty)
    tl.store(key + (slot * key_b + h * key_h + at * key_s)[:, None] + d, k, mask=k_mask)
    tl.store(value + (slot * value_b + h * value_h + at * value_s)[:, None] + dv, v, mask=v_mask)


@triton.jit(do_not_specialize=["tokens", "batch", "capacity"])
def count_rows(
    lengths,
    starts,
    counts,
    room,
    dropped,
    lengths_b,
    tokens,
    batch,
    capacity,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = b < batch
    p_lengths = lengths + b.to(tl.int64) * lengths_b
    length = tl.load(p_lengths, mask=live, other=0).to(tl.int64)
    count = tl.zeros_like(length) + tokens
    if counts is not None:
        count = tl.minimum(count, tl.maximum(tl.load(counts + b, mask=live, other=0), 0))
    if starts is not None:
        first = tl.load(starts + b, mask=live, other=0)
        count = (tl.load(starts + b + 1, mask=live, other=0) - first).to(tl.int64)
    limit = tl.zeros_like(length) + capacity
    if room is not None:
        limit = tl.minimum(limit, tl.load(room + b, mask=live, other=0))
    written = tl.maximum(tl.minimum(count, limit - length), 0)
    if dropped is not None:
        before = tl.load(dropped + b, mask=live, other=0)
        tl.store(dropped + b, before + (count - written), mask=live)
    if ADVANCE:
        tl.store(p_lengths, length + written, mask=live)
