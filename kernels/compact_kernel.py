"""Keep some rows of K and V and close the gaps, on a device: what `compact` defines.

A program takes one head of K, or of V, from its first kept row to its last, a tile at a time: all
of a tile is in registers before any of it is written, and rows come from behind the place they go
to, so that nothing is written which is still to be read. The same bits always; no second copy.

Bytes moved: each kept row once in and once out. Only rows [0, lengths) need be mapped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.compact import check
from vattn.kernels.gpu import current, device_of, padded
from vattn.kernels.kv import KV

TILE_BYTES = 16 << 10


@triton.jit
def _close(
    base, kept, many, ROW: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row kept[i] of a head becomes its row i, for i < many."""
    d = tl.arange(0, BLOCK_D)
    for first in range(0, many, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = n < many
        source = tl.load(kept + n, mask=inside, other=0)
        mask = inside[:, None] & (d < D)[None, :]
        tile = tl.load(base + source[:, None] * ROW + d[None, :], mask=mask, other=0)
        tl.debug_barrier()  # warps of this program read what others of it write
        tl.store(base + n.to(tl.int64)[:, None] * ROW + d[None, :], tile, mask=mask)


@triton.jit
def close_gaps(
    key, value, slots, kept, count, key_n, key_h, value_n, value_h, width,
    HEADS: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head: K in the first row of the grid, V in the second."""
    index = tl.program_id(0).to(tl.int64)
    b, head = index // HEADS, index % HEADS
    slot = tl.load(slots + b).to(tl.int64)
    many = tl.load(count + index).to(tl.int32)
    lines = kept + index * width
    if tl.program_id(1) == 0:
        _close(key + slot * key_n + head * key_h, lines, many, KEY_ROW, D, BLOCK_N, BLOCK_D)
    else:
        _close(
            value + slot * value_n + head * value_h, lines, many, VALUE_ROW, DV, BLOCK_N, BLOCK_D
        )


def compact(kv: KV, kept: Tensor, count: Tensor) -> None:
    """See `vattn.kernels.compact.compact`.

    Raises:
        ValueError: as there; a device that no kernel can be launched on.
    """
    check(kv, kept, count)
    launch(kv, kept, count)


def launch(kv: KV, kept: Tensor, count: Tensor) -> None:
    """`compact` for a caller that has checked.

    Raises:
        ValueError: a device that no kernel can be launched on.
    """
    device_of(kv.key)  # raises where nothing can be launched
    kv = kv.dense()
    slots = kv.slots
    if slots is None:
        slots = torch.arange(kv.batch, device=kv.key.device)
    key, value = kv.key, kv.value
    if key.element_size() == 1:  # numbers of 8 bits are moved as they are
        key, value = key.view(torch.uint8), value.view(torch.uint8)
    heads, widest = key.shape[1], padded(max(key.shape[3], value.shape[3]))
    kept, count = kept.contiguous(), count.contiguous()
    with current(key):
        close_gaps[(kv.batch * heads, 2)](
            key, value, slots, kept, count, *key.stride()[:2], *value.stride()[:2], kept.shape[2],
            HEADS=heads, KEY_ROW=key.stride(2), VALUE_ROW=value.stride(2),
            D=key.shape[3], DV=value.shape[3],
            BLOCK_N=max(16, TILE_BYTES // (widest * key.element_size())), BLOCK_D=widest,
            num_warps=4,
        )  # fmt: skip
