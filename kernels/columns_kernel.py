"""How much attention each key has had, on a device: what `columns` defines.

Two launches. The first takes a block of query rows past all keys and leaves the log-sum-exp of each
row; the second holds a block of keys of one KV head, takes all rows of its query heads past it, and
adds up. A key belongs to one program, whose rows come in order: no atomics, the same bits always.

Bytes moved: K once for each block of rows and once more, the query once for each block of keys, 4
bytes a row, 8 bytes a key and query head. Only rows [0, lengths) of K need be mapped. The recipe is
that of FlashAttention's backward pass (arXiv 2307.08691): weights are made again from their
log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.columns import Columns, check
from vattn.kernels.gpu import current, device_of, padded, precision
from vattn.kernels.kv import FP8, KV
from vattn.kernels.online import LN2, LOG2E, dot, rows_before

BLOCKS, BLOCKS_WIDE = (32, 64), (16, 16)  # rows and keys; of float32, which has no instruction


@triton.jit
def _scores(
    q, keys, n, row, length, rows, scale,
    ROW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of query rows and keys in units of log2, -inf where a row does not see a key."""
    k = rows_before(keys, n, length, ROW, D, BLOCK_D).to(q.dtype)
    zero = tl.zeros([q.shape[0], n.shape[0]], tl.float32)
    s = dot(q, tl.trans(k), zero, PRECISION) * scale
    seen = (n[None, :] <= (length - rows + row)[:, None]) & (row < rows)[:, None]
    return tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize=["rows"])
def row_sums(
    query, key, lengths, slots, lse,
    query_b, query_h, key_n, key_h, rows, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, QUERY_ROW: tl.constexpr, ROW: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Log2 of the sum of exponentials of each row of a block, for one query head."""
    index = tl.program_id(1).to(tl.int64)
    b, head = index // HEADS, index % HEADS
    slot = tl.load(slots + b).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = rows_before(query + b * query_b + head * query_h, row, rows, QUERY_ROW, D, BLOCK_D)
    keys = key + slot * key_n + (head // GROUPS) * key_h
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, length, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        s = _scores(q, keys, n, row, length, rows, scale, ROW, D, BLOCK_D, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = new
    found = tl.where(total > 0, top + tl.log2(total), 0.0)
    tl.store(lse + index * rows + row, found, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "longest"])
def key_sums(
    query, key, lengths, slots, lse, total, square, entropy,
    query_b, query_h, key_n, key_h, rows, longest, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, QUERY_ROW: tl.constexpr, ROW: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over rows for a block of keys of one KV head, and the block's part of the entropy."""
    index = tl.program_id(1).to(tl.int64)
    b, kv_head = index // (HEADS // GROUPS), index % (HEADS // GROUPS)
    slot = tl.load(slots + b).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = key + slot * key_n + kv_head * key_h
    for group in range(GROUPS):
        head = kv_head * GROUPS + group
        line = b * HEADS + head
        sums = tl.zeros([BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        mixed = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, rows, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            q = rows_before(query + b * query_b + head * query_h, row, rows, QUERY_ROW, D, BLOCK_D)
            s = _scores(q, keys, n, row, length, rows, scale, ROW, D, BLOCK_D, PRECISION)
            logs = s - tl.load(lse + line * rows + row, mask=row < rows, other=0.0)[:, None]
            weight = tl.exp2(logs)
            sums += tl.sum(weight, 0)
            squares += tl.sum(weight * weight, 0)
            mixed -= tl.sum(tl.where(weight > 0, weight * logs, 0.0), 0)
        tl.store(total + line * longest + n, sums, mask=n < longest)
        tl.store(square + line * longest + n, squares, mask=n < longest)
        blocks = (longest + BLOCK_N - 1) // BLOCK_N
        tl.store(entropy + line * blocks + tl.program_id(0), tl.sum(mixed, 0) * LN2)


def columns(query: Tensor, kv: KV, *, scale: float | None = None) -> Columns:
    """See `vattn.kernels.columns.columns`.

    Raises:
        ValueError: as there; K of 8 bits; a device that no kernel can be launched on.
    """
    return launch(query, kv, max(check(query, kv)), scale)


def launch(query: Tensor, kv: KV, longest: int, scale: float | None) -> Columns:
    """`columns` for a caller that has checked, and knows the longest sequence.

    Raises:
        ValueError: K of 8 bits; a device that no kernel can be launched on.
    """
    if kv.key.dtype in FP8:
        raise ValueError(f"key is {kv.key.dtype}: sums over keys take 16 or 32 bits")
    if query.stride(3) != 1:
        query = query.contiguous()
    device_of(query)  # raises where nothing can be launched
    kv = kv.dense()
    batch, heads, rows, dim = query.shape
    kv_heads, device = kv.key.shape[1], query.device
    lengths, slots = kv.lengths, kv.slots
    if lengths is None:
        lengths = torch.full((batch,), kv.key.shape[2], device=device)
    if slots is None:
        slots = torch.arange(batch, device=device)
    scale = (dim**-0.5 if scale is None else float(scale)) * LOG2E.value
    make = {"dtype": torch.float32, "device": device}
    wide = query.dtype == torch.float32
    block_m, block_n = BLOCKS_WIDE if wide else BLOCKS
    blocks = triton.cdiv(longest, block_n)
    lse = torch.empty(batch, heads, rows, **make)  # type: ignore[call-overload]
    total = torch.empty(batch, heads, longest, **make)  # type: ignore[call-overload]
    square, entropy = torch.empty_like(total), total.new_empty(batch, heads, blocks)
    strides = (*query.stride()[:2], *kv.key.stride()[:2])
    constants = {
        "HEADS": heads,
        "GROUPS": heads // kv_heads,
        "QUERY_ROW": query.stride(2),
        "ROW": kv.key.stride(2),
        "D": dim,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": padded(dim),
        "PRECISION": precision(query),
    }
    with current(query):
        row_sums[(triton.cdiv(rows, block_m), batch * heads)](
            query,
            kv.key,
            lengths,
            slots,
            lse,
            *strides,
            rows,
            scale,
            **constants,
            num_warps=8 if wide else 4,
        )
        key_sums[(blocks, batch * kv_heads)](
            query, kv.key, lengths, slots, lse, total, square, entropy, *strides, rows, longest,
            scale, **constants, num_warps=8 if wide else 4,
        )  # fmt: skip
    return Columns(total, square, entropy.sum(-1), rows)
