"""Which tiles of an attention mask hide everything, nothing, or some of it: found on the device.

    mask     [B|1, Hq|1, L|1, S|1]  bool (True = attend) or float (added to the scores), any strides
    rows     r = l * pack + g, query l of the g-th of ``pack`` query heads that share a tile
    states   [PB, PH, M, N] int8    EMPTY: all False, or all -inf; a kernel skips the tile
                               FULL:  all True, or all 0; a kernel need not read the mask
                               MIXED: everything else, NaN among it
    before   [PB, PH, M, 2, N + 1] int32    FULL (0) and MIXED (1) tiles before tile n of the line
    order    [PB, PH, M, N] int32   FULL tiles from the front on, MIXED ones from the back

PB is B or 1, PH is Hq / pack or 1, M is 1 where all lines are the same: planes that differ. Cells
beyond L and S count for nothing. The tiles of any range a <= n < b are then two runs of ``order``,
``before[a]`` to ``before[b]``: a kernel's loops go over them without a branch, and nothing is read
back to the host.
Bytes moved: the mask once, and 17 bytes a tile. Source of the idea: FlexAttention's block masks,
https://arxiv.org/abs/2412.05496.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels import gpu

EMPTY = tl.constexpr(0)
MIXED = tl.constexpr(1)
FULL = tl.constexpr(2)


@dataclass(frozen=True)
class MaskTiles:
    """What `classify` found. Shapes: see the head of the file."""

    states: Tensor
    before: Tensor
    order: Tensor

    @property
    def steps(self) -> tuple[int, int, int]:
        """Lines of tiles from a batch, a head, a line to the next: 0 where there is one."""
        batch, heads, lines, _ = self.states.shape
        return lines * heads * (batch > 1), lines * (heads > 1), int(lines > 1)


def reference(mask: Tensor, pack: int, rows: int, cols: int) -> Tensor:
    """States [B, Hq / pack, M, N] of a mask [B, Hq, L, S], bool or float, with torch alone."""
    lines = mask.unflatten(1, (-1, pack)).movedim(2, 3).flatten(2, 3)
    one, zero = (True, False) if mask.dtype == torch.bool else (0.0, float("-inf"))
    seen, hidden = lines == one, lines == zero

    def whole(cells: Tensor) -> Tensor:
        """Whether all cells of a tile hold."""
        strips = torch.stack([s.all(-2) for s in cells.split(rows, -2)], -2)
        return torch.stack([s.all(-1) for s in strips.split(cols, -1)], -1)

    states = torch.where(whole(hidden), EMPTY.value, MIXED.value)
    return torch.where(whole(seen), FULL.value, states).to(torch.int8)


def four_dim(mask: Tensor, query_dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Tensor:
    """A mask as ``shape`` [B, Hq, L, S] with stride 0 where it is broadcast; bool as uint8.

    Raises ValueError for a mask of another dtype or shape.
    """
    if mask.dtype not in (torch.bool, torch.float32, query_dtype):
        raise ValueError(f"mask is {mask.dtype}: must be bool, float32 or {query_dtype}")
    full = mask[None, None] if mask.dim() == 2 else mask
    if full.dim() != 4 or any(a not in (1, b) for a, b in zip(full.shape, shape, strict=True)):
        raise ValueError(
            f"mask is {tuple(mask.shape)}: must be 2-D or 4-D and broadcast to {shape}"
        )
    full = full.expand(shape)
    return full.view(torch.uint8) if full.dtype == torch.bool else full


@triton.jit(do_not_specialize=["planes_h", "lines", "tiles", "queries"])
def states_kernel(
    mask,
    states,
    m_b,
    m_h,
    m_l,
    m_s,
    planes_h,
    lines,
    tiles,
    queries,
    keys,
    PACK: tl.constexpr,
    BOOL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program a tile. A multiple of 16 ``keys`` makes wide loads."""
    cell = tl.program_id(0).to(tl.int64)
    n = cell % tiles
    line = cell // tiles
    plane = line // lines
    row = (line % lines) * ROWS + tl.arange(0, ROWS)
    col = n * COLS + tl.arange(0, COLS)
    head = (plane % planes_h) * PACK + row % PACK
    row = row // PACK
    cells = ((plane // planes_h) * m_b + head * m_h + row * m_l)[:, None] + (col * m_s)[None, :]
    inside = (row < queries)[:, None] & (col < keys)[None, :]
    value = tl.load(mask + cells, mask=inside, other=0)
    if not BOOL:
        value = value.to(tl.float32)
    seen = value != 0 if BOOL else value == 0
    hidden = value == 0 if BOOL else value == float("-inf")
    full = tl.min((seen | ~inside).to(tl.int32)) == 1
    empty = tl.min((hidden | ~inside).to(tl.int32)) == 1
    tl.store(states + cell, tl.where(full, FULL, tl.where(empty, EMPTY, MIXED)).to(tl.int8))


@triton.jit(do_not_specialize=["tiles"])
def order_kernel(states, before, order, tiles, BLOCK: tl.constexpr):
    """One program a line of tiles: running counts, and the tiles that they number."""
    line = tl.program_id(0).to(tl.int64)
    states += line * tiles
    order += line * tiles
    before += line * 2 * (tiles + 1)
    full = tl.zeros([], tl.int32)
    mixed = tl.zeros([], tl.int32)
    for first in range(0, tiles + 1, BLOCK):
        n = first + tl.arange(0, BLOCK)
        state = tl.load(states + n, mask=n < tiles, other=EMPTY)
        is_full = (state == FULL).to(tl.int32)
        is_mixed = (state == MIXED).to(tl.int32)
        full_before = full + tl.cumsum(is_full, 0) - is_full
        mixed_before = mixed + tl.cumsum(is_mixed, 0) - is_mixed
        tl.store(before + n, full_before, mask=n <= tiles)
        tl.store(before + tiles + 1 + n, mixed_before, mask=n <= tiles)
        tl.store(order + full_before, n, mask=is_full == 1)
        tl.store(order + tiles - 1 - mixed_before, n, mask=is_mixed == 1)
        full += tl.sum(is_full, 0)
        mixed += tl.sum(is_mixed, 0)


def classify(mask: Tensor, pack: int, rows: int, cols: int) -> MaskTiles:
    """The tiles of ``rows`` x ``cols`` of a mask [B, Hq, L, S] from `four_dim` (L, S > 0).

    ``pack`` divides Hq; ``rows`` and ``cols`` are powers of two.
    """
    batch, heads, queries, keys = mask.shape
    m_b, m_h, m_l, m_s = mask.stride()
    planes_h = 1 if m_h == 0 else heads // pack
    planes_b = 1 if m_b == 0 else batch
    # Rows of one tile then differ in their head at most: any tile has the same cells.
    alike = m_l == 0 and (m_h == 0 or pack == 1)
    lines, tiles = 1 if alike else -(-queries * pack // rows), -(-keys // cols)
    shape = (planes_b, planes_h, lines, tiles)
    states = torch.empty(shape, dtype=torch.int8, device=mask.device)
    before = torch.empty((*shape[:3], 2, tiles + 1), dtype=torch.int32, device=mask.device)
    order = torch.empty(shape, dtype=torch.int32, device=mask.device)
    with gpu.current(mask):
        states_kernel[(states.numel(),)](
            mask,
            states,
            m_b,
            m_h,
            m_l,
            m_s,
            planes_h,
            lines,
            tiles,
            queries,
            keys,
            PACK=pack,
            BOOL=mask.dtype == torch.uint8,
            ROWS=rows,
            COLS=cols,
            num_warps=4,
        )
        block = min(1024, triton.next_power_of_2(tiles + 1))
        order_kernel[(states.numel() // tiles,)](
            states, before, order, tiles, BLOCK=block, num_warps=4
        )
    return MaskTiles(states, before, order)
