"""Prefill on Hopper: FlashAttention-3's schedule, in Gluon.

    query   [B, Hq, L, D]  bfloat16 or float16, D = Dv of 64, 128, 256
    kv      KV of the same dtype: [N, Hkv, S, D], lengths, starts, slots (kv.py)
    out     [B, Hq, L, D]  in the query's strides
    lse     [B, Hq, L]     float32, natural log of the sum of exp(score); -inf for a row that sees
                           nothing, which is exactly 0

Scores: scale of any sign, causal, window, softcap (scores.py); `why_not` names what is refused.
Weights are rounded to V's dtype before they meet V, sums are float32.

A program takes 128 query rows of a head. One warp copies tiles of K and V to shared memory by TMA;
two warpgroups of 64 rows multiply by wgmma, and each hides the softmax of a tile behind the product
of the tile before with V (prefill_hopper_roles.py; index arithmetic: prefill_hopper_tiles.py; the
same schedule in torch: prefill_hopper_reference.py). Programs with the most keys start first, heads
of a group side by side, in sections of heads whose K and V fit in L2 (`prefill_tiles.placed`).

Which rows must be mapped: rows ``starts[b] <= s < lengths[b]`` of K and V; no other is touched. TMA
reads boxes of whole tiles, and what lies outside of the descriptor's shape is written as zeros, not
read. A descriptor made by the host has one shape for all sequences, that of S reserved rows, and
would read rows behind the prefix, mapped or not. Here each program makes its own, with the address
of row starts[b] and a shape of lengths[b] - starts[b] rows, read on the device: also right when a
captured CUDA graph is replayed after lengths have grown. It costs 256 bytes of global memory a
program and about a microsecond, while the consumers load Q. No L2 promotion is asked for.

Bytes moved: Q and out once, K and V once for each 128 query rows of a head, mostly from L2.
Source: FlashAttention-3, https://arxiv.org/abs/2407.08608.

Nothing dispatches to this kernel: it has been compiled, not run (tests marked ``gpu`` compare it
with float64). A benchmark runs it beside `prefill`, same arguments, where `why_not` is None.
"""

from __future__ import annotations

from contextvars import copy_context
from functools import partial

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from vattn.kernels import gpu
from vattn.kernels.contract import rows_like, why_apart
from vattn.kernels.kv import HALF, KV
from vattn.kernels.prefill_hopper_roles import consume, new_order, new_ring, produce
from vattn.kernels.prefill_hopper_tiles import (
    CONSUMERS,
    DIMS,
    MOST_HELD,
    ROWS,
    SHARED_BYTES,
    Tile,
    held,
    shared_bytes,
    steps_of,
    tile_of,
)
from vattn.kernels.prefill_tiles import placed, section_of
from vattn.kernels.scores import LOG2E, Scores

# A thread of a consumer, of the producer; 3 warpgroups share 65,536 registers of a processor.
REGISTERS = gl.constexpr((240, 24))
COUNTS = ["heads", "tokens", "reserved", "planes", "section", "window"]
ROW_STRIDES = ["k_n", "k_h", "k_s", "v_n", "v_h", "v_s"]


@gluon.jit(
    do_not_specialize=[*COUNTS, *ROW_STRIDES],
    do_not_specialize_on_alignment=["lse", "lengths", "starts", "slots"],
)
def prefill_hopper_kernel(
    q,
    k,
    v,
    out,
    lse,
    lengths,
    starts,
    slots,
    q_b,
    q_h,
    q_l,
    k_n,
    k_h,
    k_s,
    v_n,
    v_h,
    v_s,
    o_b,
    o_h,
    o_l,
    heads,
    tokens,
    reserved,
    planes,
    section,
    window,
    factor,
    softcap,
    inside,
    sign,
    CAUSAL: gl.constexpr,
    GROUPS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    ALTERNATE: gl.constexpr,
    ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """One program a tile of ROWS * CONSUMERS query rows of one of ``planes`` heads."""
    TILE: gl.constexpr = ROWS * CONSUMERS
    DTYPE: gl.constexpr = k.dtype.element_ty
    IS_CAUSAL: gl.constexpr = CAUSAL is not None
    plane, tile = placed(gl.program_id(0), section, (tokens + TILE - 1) // TILE, planes)
    b = plane // heads
    h = (plane % heads).to(gl.int64)
    slot = b.to(gl.int64)
    keys = reserved
    start = 0
    if slots is not None:
        slot = gl.load(slots + b).to(gl.int64)
    if lengths is not None:
        keys = gl.load(lengths + b).to(gl.int32)
    if starts is not None:
        start = gl.load(starts + b).to(gl.int32)
        k += start.to(gl.int64) * k_s
        v += start.to(gl.int64) * v_s
    keys = max(keys - start, 0)
    row = tile * TILE
    diagonal = None
    position = row
    if CAUSAL == "top_left":
        diagonal = 0 - start
        position = row - start
    if CAUSAL == "bottom_right":
        diagonal = keys - tokens
        position = row + diagonal
    plan = steps_of(row, min(tokens - row, TILE), keys, diagonal, window, BLOCK)

    key = (k + slot * k_n + h // GROUPS * k_h, k_s)
    value = (v + slot * v_n + h // GROUPS * v_h, v_s)
    query = (q + b.to(gl.int64) * q_b + h * q_h, q_l)
    result = (out + b.to(gl.int64) * o_b + h * o_h, o_l)
    if lse is not None:
        lse += plane.to(gl.int64) * tokens
    key_ring = new_ring(DTYPE, STAGES, BLOCK, DIM, CONSUMERS)
    value_ring = new_ring(DTYPE, STAGES, BLOCK, DIM, CONSUMERS)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], DTYPE)
    tiles = gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, DIM], LAYOUT)

    upper = (None, None, 0)
    lower = (None, None, 1)
    if ALTERNATE:
        upper, lower = new_order()
    fence_async_shared()
    shared = (key_ring, value_ring, plan, keys, window, (factor, softcap, inside), sign)
    ends = (query, result, lse, tokens)
    below = position + ROWS
    gl.warp_specialize(
        [
            (consume, (ends, tiles.index(0), row, position, upper, shared, IS_CAUSAL)),
            (consume, (ends, tiles.index(1), row + ROWS, below, lower, shared, IS_CAUSAL)),
            (produce, (key, value, keys, key_ring, value_ring, plan)),
        ],
        [4, 1],
        REGISTERS,
    )


def prefill_hopper(
    query: Tensor,
    kv: KV,
    scores: Scores = Scores(),  # noqa: B008  frozen
    *,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of ``query`` over ``kv``; returns out. Contract: the head of this file.

    Args:
        tile: shapes of a program; None: `tile_of`.
        out: where to write, of the query's shape and dtype; None: a new tensor.

    Raises ValueError with `why_not`'s reason, or for shapes that do not go together.
    """
    return _attend(query, kv, scores, tile, out, None)


def prefill_hopper_lse(
    query: Tensor,
    kv: KV,
    scores: Scores = Scores(),  # noqa: B008  frozen
    *,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`prefill_hopper` and the log-sum-exp, float32 [B, Hq, L]."""
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    return _attend(query, kv, scores, tile, out, lse), lse


def why_not(query: Tensor, kv: KV, scores: Scores = Scores()) -> str | None:  # noqa: B008  frozen
    """Why the kernel refuses a call whose shapes go together, or None."""
    key, value = kv.key, kv.value
    if query.dim() != 4:
        return f"query is {tuple(query.shape)}: packed queries are for `prefill`"
    if query.dtype not in HALF or key.dtype != query.dtype:
        return f"query is {query.dtype} and key {key.dtype}: must both be bfloat16 or float16"
    if key.shape[3] not in DIMS or value.shape[3] != key.shape[3]:
        return f"head_dim is {key.shape[3]} and {value.shape[3]}: must be the same of {DIMS}"
    apart = why_apart("query", query)
    if apart is not None:
        return apart
    if kv.key_scale is not None or kv.value_scale is not None:
        return "K and V of 16 bits have no scales here: multiply scale and the result by them"
    for name in ("alibi", "sink_logits"):
        if getattr(scores, name) is not None:
            return f"{name} is for `prefill`"
    if scores.sink_tokens:
        return f"sink_tokens is {scores.sink_tokens}: must be 0 here"
    for name, rows in (("key", key), ("value", value)):
        why = _no_box(name, rows)
        if why is not None:
            return why
    return _no_device(query)


def _no_box(name: str, rows: Tensor) -> str | None:
    """Why TMA cannot copy these rows (CUDA driver API, cuTensorMapEncodeTiled), or None."""
    size = rows.element_size()
    if rows.data_ptr() % 16 or any(rows.stride(d) * size % 16 for d in range(3)):
        return (
            f"{name} lies at {rows.data_ptr():#x} with strides {rows.stride()}: TMA needs an "
            "address and strides that are multiples of 16 bytes"
        )
    if not 0 < rows.stride(2) * size < 1 << 40:
        return f"rows of {name} are {rows.stride(2)} elements apart: TMA needs 1 to 2**40 bytes"
    return None


def _no_device(query: Tensor) -> str | None:
    """Why no Hopper GPU would run it, or None."""
    why = gpu.cannot_launch(query)
    if why is not None:
        return why
    if gpu.interpreted():
        return "Triton interprets (TRITON_INTERPRET is set), and has no interpreter for Gluon"
    arch = gpu.device_of(query).arch
    if arch != 90:
        return f"the device has compute capability {arch / 10}: wgmma is of 9.0 alone"
    return None


def _attend(
    query: Tensor, kv: KV, scores: Scores, tile: Tile | None, out: Tensor | None, lse: Tensor | None
) -> Tensor:
    kv, scores = kv.dense(), scores.dense()
    kv.check_query(query)
    scores.check(query, kv.batch)
    why = why_not(query, kv, scores)
    if why is not None:
        raise ValueError(f"prefill_hopper: {why}")
    tile = tile_of(query.shape[3]) if tile is None else _checked_tile(tile, query.shape[3])
    out = rows_like(query) if out is None else _checked_out(out, query)
    if query.numel():
        with gpu.current(query):
            copy_context().run(_launch, query, kv, scores, tile, out, lse)
    return out


def _checked_tile(tile: Tile, dim: int) -> Tile:
    if tile.keys & (tile.keys - 1) or tile.keys < 16 or tile.stages < 2:
        raise ValueError(f"{tile}: keys must be a power of 2 from 16 on, and stages at least 2")
    for what, amount, limit in (
        ("bytes of shared memory", shared_bytes(tile, dim), SHARED_BYTES),
        ("registers a thread", held(tile, dim), MOST_HELD),
    ):
        if amount > limit:
            raise ValueError(f"{tile} holds {amount} {what} for head_dim {dim}: at most {limit}")
    return tile


def _checked_out(out: Tensor, query: Tensor) -> Tensor:
    alike = (out.shape, out.dtype, out.device) == (query.shape, query.dtype, query.device)
    if not alike or out.stride(3) != 1:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device} with strides {out.stride()}: "
            f"must be {query.dtype} {tuple(query.shape)} on {query.device}, with 1 as the last"
        )
    return out


def _launch(
    query: Tensor, kv: KV, scores: Scores, tile: Tile, out: Tensor, lse: Tensor | None
) -> None:
    """Launch in a context of its own: the allocator of descriptors is not left set for others."""
    triton.set_allocator(partial(_descriptors, query.device))
    batch, heads, tokens, dim = query.shape
    kv_heads, reserved = kv.key.shape[1:3]
    groups, planes = heads // kv_heads, batch * heads
    kv_bytes = 2 * dim * reserved * kv.key.element_size()
    scale = scores.factor(dim)
    # The sign goes into Q, where it is exact: scores then grow with the products. Of scale 0 too.
    sign, size = float((scale > 0) - (scale < 0)), abs(scale) or 1.0
    softcap = scores.softcap
    prefill_hopper_kernel[(planes * -(-tokens // (ROWS * CONSUMERS)),)](
        query,
        kv.key,
        kv.value,
        out,
        lse,
        kv.lengths,
        kv.starts,
        kv.slots,
        *query.stride()[:3],
        *kv.key.stride()[:3],
        *kv.value.stride()[:3],
        *out.stride()[:3],
        heads,
        tokens,
        reserved,
        planes,
        section_of(batch * kv_heads, groups, kv_bytes),
        scores.window,
        LOG2E if softcap is not None else size * LOG2E,
        softcap,
        None if softcap is None else 2 * LOG2E * size / softcap,
        sign,
        CAUSAL=scores.causal,
        GROUPS=groups,
        DIM=dim,
        BLOCK=tile.keys,
        STAGES=tile.stages,
        ALTERNATE=tile.alternate,
        ROWS=ROWS,
        CONSUMERS=CONSUMERS,
        num_warps=4,
    )


def _descriptors(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of a launch's descriptors: freed in the stream's order, and kept by a graph."""
    return torch.empty(size, dtype=torch.uint8, device=device)
