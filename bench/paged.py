"""What a block table costs: our decode over K and V in blocks of 16 tokens, as vLLM keeps them.

    query  [B, Hq, D]
    key    [P, 16, Hkv, D]     value [P, 16, Hkv, Dv]    blocks, in any order
    table  [B, N] int32        token t of sequence b is row t % 16 of block table[b, t // 16]
    out    [B, Hq, Dv] of query's dtype

The loop over whole tiles is that of `vattn.kernels.walk`: the same tile, the same two products, the
same exponentials, loads as wide and as many on their way. It differs in where rows lie: entries of
the table are read, and addresses are made from them. The distance of two blocks is an argument of
the kernel, as in vLLM's, or with ``constant`` a number that it is compiled for.
Parts of equal lengths are joined by `vattn.kernels.combine`. Kept to be compared with, by the
compile gate (``python -m bench aot``) and on a GPU; nothing of vattn calls it.
Source of the layout: PagedAttention, https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels import gpu
from vattn.kernels.combine import combine
from vattn.kernels.deals import tile_for
from vattn.kernels.online import LOG2E, dot, fold, settled, weigh_whole

BLOCK_TOKENS = 16


@triton.jit
def _tile(base, blocks, block_stride, ROW: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """Rows [N, D] of blocks [N], one each."""
    n = tl.arange(0, blocks.shape[0]) % TOKENS
    at = base + blocks.to(tl.int64) * block_stride + n * ROW
    return tl.load(at[:, None] + tl.arange(0, D)[None, :])


@triton.jit
def _rows(
    base, blocks, inside, block_stride, ROW: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr
):
    """Rows [N, D] of blocks [N], one each; zeros where not ``inside``."""
    n = tl.arange(0, blocks.shape[0]) % TOKENS
    at = base + blocks.to(tl.int64) * block_stride + n * ROW
    d = tl.arange(0, D)
    return tl.load(at[:, None] + d[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def paged_kernel(
    query, key, value, table, lengths, outs, lses,
    query_b, query_h, key_p, key_h, value_p, value_h, table_b, heads, scale,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a sequence, KV head and part of the keys."""
    split = tl.program_id(0) % SPLITS
    head = tl.program_id(0) // SPLITS % heads
    b = tl.program_id(0) // SPLITS // heads
    length = tl.load(lengths + b)
    tiles = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS)
    first = tl.minimum(split * tiles * BLOCK, length)
    last = tl.minimum(first + tiles * BLOCK, length)
    whole = first + (last - first) // BLOCK * BLOCK
    if KEY_BLOCK is not None:
        key_p = KEY_BLOCK
        value_p = VALUE_BLOCK
    table += b.to(tl.int64) * table_b
    key += head.to(tl.int64) * key_h
    value += head.to(tl.int64) * value_h

    g = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    row = head * GROUPS + g
    mine = g < GROUPS
    at = query + b.to(tl.int64) * query_b + row.to(tl.int64)[:, None] * query_h + d[None, :]
    q = tl.load(at, mask=mine[:, None], other=0.0)
    factor = tl.full([ROWS], 0.0, tl.float32) + scale * LOG2E
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV], tl.float32)
    zeros = tl.zeros([ROWS, BLOCK], tl.float32)
    n = tl.arange(0, BLOCK)
    for start in tl.range(whole, last, BLOCK, num_stages=1):
        inside = start + n < last
        blocks = tl.load(table + (start + n) // TOKENS, mask=inside, other=0)
        k = _rows(key, blocks, inside, key_p, KEY_ROW, D, TOKENS)
        s = dot(q, tl.trans(k), zeros, "ieee") * factor[:, None]
        v = _rows(value, blocks, inside, value_p, VALUE_ROW, DV, TOKENS)
        s = tl.where(inside[None, :], s, float("-inf"))
        m, total, acc = fold(s, v, m, total, acc, "ieee")
    entry = table + first // TOKENS + n // TOKENS
    sums = tl.where((n == 0)[None, :], total[:, None], 0.0)
    for _ in tl.range(first, whole, BLOCK, num_stages=STAGES):
        blocks = tl.load(entry)
        k = _tile(key, blocks, key_p, KEY_ROW, D, TOKENS)
        s = dot(q, tl.trans(k), zeros, "ieee")
        v = _tile(value, blocks, value_p, VALUE_ROW, DV, TOKENS)
        m, alpha, p = weigh_whole(s, factor, m)
        sums = sums * alpha[:, None] + p
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None], "ieee")
        entry += BLOCK // TOKENS
    result, natural = settled(m, tl.sum(sums, 1), acc)
    batch = tl.num_programs(0) // SPLITS // heads
    place = (split * batch + b).to(tl.int64) * heads * GROUPS + row
    cells = outs + place[:, None] * DV + tl.arange(0, DV)[None, :]
    tl.store(cells, result.to(outs.dtype.element_ty), mask=mine[:, None])
    tl.store(lses + place, natural, mask=mine)


def paged_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    splits: int = 8,
    constant: bool = False,
) -> Tensor:
    """The result [B, Hq, Dv]; ``lengths`` int32 [B] on the device, D and Dv powers of two >= 16.

    Raises ValueError for tensors that do not fit together.
    """
    device = gpu.device_of(query)
    batch, heads, dim = query.shape
    _, tokens, kv_heads, value_dim = value.shape
    if tokens != BLOCK_TOKENS or (gpu.padded(dim), gpu.padded(value_dim)) != (dim, value_dim):
        raise ValueError(
            f"blocks of {tokens} tokens of {dim} and {value_dim}: must be {BLOCK_TOKENS} of powers "
            "of two from 16 on"
        )
    groups = heads // kv_heads
    tile = tile_for(device, groups, dim, value_dim, key.element_size())
    outs = query.new_empty((splits, batch, heads, value_dim), dtype=torch.float32)
    lses = query.new_empty((splits, batch, heads), dtype=torch.float32)
    with gpu.current(query):
        paged_kernel[(batch * kv_heads * splits,)](
            query, key, value, table, lengths, outs, lses,
            *query.stride()[:2], key.stride(0), key.stride(2), value.stride(0), value.stride(2),
            table.stride(0), kv_heads, dim**-0.5,
            SPLITS=splits, GROUPS=groups, KEY_ROW=key.stride(1), VALUE_ROW=value.stride(1),
            KEY_BLOCK=key.stride(0) if constant else None,
            VALUE_BLOCK=value.stride(0) if constant else None,
            D=dim, DV=value_dim, ROWS=tile.rows, BLOCK=tile.block, TOKENS=BLOCK_TOKENS,
            STAGES=tile.stages + 2,  # two of them are for the table's entries
            num_warps=tile.warps,
        )  # fmt: skip
    return combine(outs, lses)[0].to(query.dtype)
