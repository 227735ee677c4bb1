"""Pieces that both backward kernels share: rows of a tile, and what its scores pass back.

    x = scale * <q, k>      s = the score that softmax sees      p = exp(s - lse)
    dp = <do, v>            ds = p (dp - delta)                  dx = ds * ds/dx

Everything about scores is elementwise: a tile may lie [queries, keys] or [keys, queries], as long
as queries i, lse and delta come as one row or column and keys j as the other. Source: Dao,
FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn.kernels.online import LOG2E, scored, visible

# What a compiled kernel need not know: a new number must not stall a step.
COUNTS = ["heads", "groups", "tokens", "length", "count", "offset", "window", "sink_tokens"]


@triton.jit
def matrix(tensor, b, h):
    """Of (pointer, strides of batch, head and row): (first element of b and h, stride of rows)."""
    base, batch_stride, head_stride, row_stride = tensor
    return base + b.to(tl.int64) * batch_stride + h.to(tl.int64) * head_stride, row_stride


@triton.jit
def read_rows(at, n, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows n [R] of a matrix: [R, BLOCK_D], 0 from row ``limit`` and column D on."""
    base, stride = at
    d = tl.arange(0, BLOCK_D)
    inside = n[:, None] < limit
    if D < BLOCK_D:
        inside = inside & (d[None, :] < D)
    return tl.load(base + n.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def write_rows(at, n, limit, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write what `read_rows` reads."""
    base, stride = at
    d = tl.arange(0, BLOCK_D)
    inside = n[:, None] < limit
    if D < BLOCK_D:
        inside = inside & (d[None, :] < D)
    to = base + n.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(to, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def slope_of(alibi, b, h):
    """ALiBi's slope of (pointer, strides of batch and head), None for None."""
    slope = alibi
    if alibi is not None:
        base, batch_stride, head_stride = alibi
        slope = tl.load(base + b * batch_stride + h * head_stride)
    return slope


@triton.jit
def mask_of(mask, b, h):
    """A head's (first element, strides of queries and keys) of a mask, None for None."""
    found = mask
    if mask is not None:
        base, batch_stride, head_stride, i_stride, j_stride = mask
        first, i_stride = matrix((base, batch_stride, head_stride, i_stride), b, h)
        found = (first, i_stride, j_stride)
    return found


@triton.jit
def masked(s, mask, i, j, tokens, length):
    """Scores s under the matrix ``mask`` = (first element, strides of queries and keys)."""
    base, i_stride, j_stride = mask
    at = base + i.to(tl.int64) * i_stride + j.to(tl.int64) * j_stride
    held = tl.load(at, mask=(i < tokens) & (j < length), other=0)
    if base.dtype.element_ty == tl.uint8:
        return tl.where(held != 0, s, float("-inf"))
    # Finite numbers beyond float32 in units of log2 hide a key as -inf does.
    return s + held.to(tl.float32) * LOG2E


@triton.jit
def passed_back(products, dp, lse, delta, i, j, at_edge, tokens, length, rule, mask):
    """The weights p and gradients ds/dx of a tile, from its products <q, k> and dp = <do, v>.

    lse and delta are as `row_terms` writes them. ``rule`` is what scores go through: (scale,
    softcap, offset, window, sink_tokens, slope), None where there is no such thing; query i has
    position i + offset. ``mask`` is a matrix or None. A tile not ``at_edge`` is one where every
    query sees every key as far as positions go.
    """
    scale, softcap, offset, window, sink_tokens, slope = rule
    s = scored(products, scale, softcap, softcap is not None)
    dp -= delta
    if softcap is not None:
        tanh = s / (softcap * LOG2E)
        dp *= 1 - tanh * tanh
    if slope is not None:
        s -= (slope * LOG2E) * tl.abs(i + (length - tokens) - j).to(tl.float32)
    if mask is not None:
        s = masked(s, mask, i, j, tokens, length)
    if at_edge:
        seen = j < length
        if offset is not None:
            seen = seen & visible(i + offset, j, window, sink_tokens, True, window is not None)
        s = tl.where(seen, s, float("-inf"))
    shifted = s - lse
    if mask is not None:
        # Next to a large number in a mask lse is too coarse; a weight is at most 1.
        shifted = tl.minimum(shifted, 0.0)
    p = tl.exp2(shifted)
    return p, p * dp


@triton.jit
def is_edge(i0, i1, j0, j1, length, rule):
    """Whether one of queries i0 to i1 does not see one of keys j0 to j1."""
    _, _, offset, window, sink_tokens, _ = rule
    edge = j1 >= length
    if offset is not None:
        edge = edge | (j1 > i0 + offset)
        if window is not None:
            edge = edge | ((j0 <= i1 + offset - window) & (j1 >= sink_tokens))
    return edge
