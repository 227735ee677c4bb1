"""dK and dV of attention: one program holds a tile of keys and goes over the queries that see them.

    dv = sum over queries of p^T do      dk = scale * sum over queries of ds^T q

The queries are those of every head that the KV head serves, one head after another: no head is
expanded and nothing is added to memory, so that the order of the sums, and with it the result, is
always the same. Tiles of scores lie [keys, queries]: p and ds are the left operand as they are.
Contract, layouts and source: backward.py. Bytes moved: K, V, dK and dV once; Q and dO once for each
tile of keys that they see. Multiply-adds a score: 2 D + 2 Dv.
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
def key_kernel(
    grad,
    query,
    key,
    value,
    dk,
    dv,
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
    tiles = tl.cdiv(length, BLOCK_N)
    # The first keys are seen by most queries: they start first. Neighbours find Q and dO in L2.
    kv_head = tl.program_id(0) // tiles
    b, kv_h = kv_head // (heads // groups), kv_head % (heads // groups)
    j0 = (tl.program_id(0) % tiles) * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)

    # The queries from ``first`` to ``stop`` see a key of the tile.
    first = 0
    stop = tokens
    if offset is not None:
        first = tl.maximum(j0 - offset, 0) // BLOCK_M * BLOCK_M
    if window is not None:
        last = tl.minimum(j0 + BLOCK_N, length) - 1 + window - offset
        stop = tl.where(j0 < sink_tokens, tokens, tl.minimum(tl.maximum(last, 0), tokens))
    steps = tl.cdiv(tl.maximum(stop - first, 0), BLOCK_M)

    k = read_rows(matrix(key, b, kv_h), j, length, D, BLOCK_D)
    v = read_rows(matrix(value, b, kv_h), j, length, DV, BLOCK_DV)
    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(groups * steps):
        h = kv_h * groups + step // steps
        i0 = first + step % steps * BLOCK_M
        i = i0 + tl.arange(0, BLOCK_M)
        q = read_rows(matrix(query, b, h), i, tokens, D, BLOCK_D)
        do = read_rows(matrix(grad, b, h), i, tokens, DV, BLOCK_DV)
        # Weights of queries beyond the last are exp2(s - inf) = 0.
        at = terms + (b * heads + h).to(tl.int64) * tokens + i
        lse = tl.load(at, mask=i < tokens, other=float("inf"))
        delta = tl.load(at + count, mask=i < tokens, other=0.0)
        rule = (scale, softcap, offset, window, sink_tokens, slope_of(alibi, b, h))
        p, ds = passed_back(
            dot(k, tl.trans(q), zeros, PRECISION),
            dot(v, tl.trans(do), zeros, PRECISION),
            lse[None, :],
            delta[None, :],
            i[None, :],
            j[:, None],
            is_edge(i0, i0 + BLOCK_M - 1, j0, j0 + BLOCK_N - 1, length, rule),
            tokens,
            length,
            rule,
            mask_of(mask, b, h),
        )
        dv_sum = dot(p.to(do.dtype), do, dv_sum, PRECISION)
        dk_sum = dot(ds.to(q.dtype), q, dk_sum, PRECISION)
    write_rows(matrix(dk, b, kv_h), j, length, dk_sum * scale, D, BLOCK_D)
    write_rows(matrix(dv, b, kv_h), j, length, dv_sum, DV, BLOCK_DV)
