"""dQ of attention: one program holds a tile of queries and goes over the keys that they see.

    s = scores of q k^T      p = exp2(s - lse)      ds = p (do v^T - delta)      dq = scale * ds k

Contract, layouts and source: backward.py. Bytes moved: Q, dO and dQ once; K and V once for each
tile of queries that sees them. Multiply-adds a score: D + Dv + D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn.kernels.backward_scores import (
    COUNTS,
    is_edge,
    mask_of,
    matrix,
    passed_back,
    read_rows,
    slope_of,
    write_rows,
)
from vattn.kernels.online import dot


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    grad,
    query,
    key,
    value,
    dq,
    terms,
    mask,
    alibi,
    heads,
    groups,
    tokens,
    length,
    count,
    scale,
    softcap,
    offset,
    window,
    sink_tokens,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_M)
    head = tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    # The last queries see most keys: they start first. Neighbours find K and V in L2.
    i0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    i1 = tl.minimum(i0 + BLOCK_M, tokens) - 1

    # Keys that a query of the tile sees: ``sinks`` tiles at the front, then ``first`` to ``stop``.
    first = 0
    stop = length
    sinks = 0
    if offset is not None:
        stop = tl.minimum(length, i1 + offset + 1)
    if window is not None:
        first = tl.maximum(i0 + offset - window + 1, 0) // BLOCK_N * BLOCK_N
        sinks = tl.cdiv(tl.minimum(tl.minimum(sink_tokens, first), length), BLOCK_N)
    steps = tl.cdiv(tl.maximum(stop - first, 0), BLOCK_N)

    q = read_rows(matrix(query, b, h), i, tokens, D, BLOCK_D)
    do = read_rows(matrix(grad, b, h), i, tokens, DV, BLOCK_DV)
    at = terms + head.to(tl.int64) * tokens + i
    lse = tl.load(at, mask=i < tokens, other=float("inf"))
    delta = tl.load(at + count, mask=i < tokens, other=0.0)
    rule = (scale, softcap, offset, window, sink_tokens, slope_of(alibi, b, h))
    dq_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(sinks + steps):
        j0 = tl.where(step < sinks, step * BLOCK_N, first + (step - sinks) * BLOCK_N)
        j = j0 + tl.arange(0, BLOCK_N)
        k = read_rows(matrix(key, b, h // groups), j, length, D, BLOCK_D)
        v = read_rows(matrix(value, b, h // groups), j, length, DV, BLOCK_DV)
        _, ds = passed_back(
            dot(q, tl.trans(k), zeros, PRECISION),
            dot(do, tl.trans(v), zeros, PRECISION),
            lse[:, None],
            delta[:, None],
            i[:, None],
            j[None, :],
            is_edge(i0, i1, j0, j0 + BLOCK_N - 1, length, rule),
            tokens,
            length,
            rule,
            mask_of(mask, b, h),
        )
        dq_sum = dot(ds.to(k.dtype), k, dq_sum, PRECISION)
    write_rows(matrix(dq, b, h), i, tokens, dq_sum * scale, D, BLOCK_D)
