"""A decode step at its budget: what attention each row got, the row that each head drops, and its
last row in that place.

    mass    logits [B, H, R, n] and lse [B, H, R] float32, shares [R] -> [B, H, n] float32:
            sum over r of shares[r] * exp(logits[r] - lse[r])
    least   score [B, H, n] float32, counts [B, H], positions [B, H, n] int64
            -> rows [B, H] int64: of the first `counts` the lowest score of those that may go, the
            last of equals; where none may (or all are +inf), the lowest position
    scatter rows [B, H, 1, D] -> each to an address [B, H] int64
    fill    rows, last [B, H] int64: row `last` of each slot takes the place of its row `rows`,
            nothing where that is -1

On a CPU with numba in loops (`evict_loops`): a step has a dozen of heads with some thousand rows,
and each of torch's operations on so little takes longer to call than to run. Elsewhere in torch's
operations, none of which waits for a device. Bytes moved: logits, scores and masks once; the rows
that move.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vattn.kernels import crew, stream

WIDTH = 8  # numbers that the loops take at once


def mass(logits: Tensor, lse: Tensor, shares: Tensor) -> Tensor:
    """Attention that each row got, [B, H, n] float32."""
    batch, heads, lines, n = logits.shape
    _check(logits=(logits, logits.shape), lse=(lse, logits.shape[:3]), shares=(shares, (lines,)))
    code = _loops(logits)
    if code is None or n < WIDTH or not logits.is_contiguous():
        weights = (logits - lse[..., None]).exp_()
        return (weights * shares[:, None]).sum(2)
    out, lse, shares = logits.new_empty(batch, heads, n), lse.contiguous(), shares.contiguous()
    where = (t.data_ptr() for t in (logits, lse, shares, out))
    code.mass(batch * heads, lines, n, *where)
    return out


def least(
    score: Tensor,
    counts: Tensor,
    positions: Tensor,
    first: int,
    last: Tensor,
    forced: Tensor | None = None,
) -> Tensor:
    """The row that each head drops, [B, H] int64.

    Rows may go whose position is from ``first`` to before ``last`` [B] int64, and which are not
    ``forced`` [B, H, n] bool to stay. NaN is no score: such a row stays.

    Raises ValueError for another shape or type.
    """
    shape, int64 = score.shape, torch.int64
    _check(score=(score, (*counts.shape, shape[-1])))
    _check(int64, counts=(counts, shape[:2]), positions=(positions, shape), last=(last, shape[:1]))
    if forced is not None:
        _check(torch.bool, forced=(forced, shape))
    code = _loops(score)
    if code is None:
        return reference(score, counts, positions, first, last, forced)
    given = (score, positions) if forced is None else (score, positions, forced)
    lines = [t if t.stride(2) == 1 else t.contiguous() for t in given]
    words = [word for t in lines for word in _lies(t)] + [0] * (9 - 3 * len(lines))
    counts, last = counts.contiguous(), last.contiguous()
    rows = torch.empty_like(counts)
    ends = (counts.data_ptr(), first, last.data_ptr(), rows.data_ptr())
    code.least(*counts.shape, *words, *ends)
    return rows


def reference(
    score: Tensor,
    counts: Tensor,
    positions: Tensor,
    first: int,
    last: Tensor,
    forced: Tensor | None = None,
) -> Tensor:
    """`least` in torch's operations."""
    behind = torch.arange(score.shape[2], device=score.device) >= counts[..., None]
    stays = (positions < first) | (positions >= last[:, None, None]) | behind | score.isnan()
    others = score.masked_fill(stays if forced is None else stays | forced, torch.inf)
    lowest, found = others.flip(-1).min(-1)
    found = others.shape[-1] - 1 - found
    oldest = positions.masked_fill(behind, torch.iinfo(torch.int64).max).argmin(-1)
    return oldest.where(lowest == torch.inf, found)


class Side(NamedTuple):
    """Lines of rows that `fill` moves in: [N, S, D], elements of a row side by side, of which
    ``slots`` [B, H] say where each head's lie; ``clear``: the row moved leaves zeros."""

    lines: Tensor
    slots: Tensor
    clear: bool = False


def fill(sides: Sequence[Side], rows: Tensor, last: Tensor) -> None:
    """Move one row of each head of every side."""
    code = _loops(rows)
    if code is None:
        for side in sides:
            _fill(side, rows, last)
        return
    rows, last, words, slots = rows.contiguous(), last.contiguous(), array("q"), []
    for lines, where, clear in sides:
        slot, row, item = lines.stride(0), lines.stride(1), lines.itemsize
        slots.append(where.contiguous())  # must outlive the call
        words.extend((lines.data_ptr(), slot * item, row * item, lines.shape[2] * item))
        words.extend((slots[-1].data_ptr(), clear))
    code.fill(rows.numel(), len(sides), words.buffer_info()[0], rows.data_ptr(), last.data_ptr())


def _fill(side: Side, rows: Tensor, last: Tensor) -> None:
    """`fill` of a side in torch's operations."""
    lines, slots, some = side.lines, side.slots.view(rows.shape), rows >= 0
    moved = lines[slots, last]
    lines[slots, rows.where(some, last)] = moved
    if side.clear:
        bits = moved.view(torch.uint8).masked_fill(some[..., None], 0)
        lines[slots, last] = bits.view(lines.dtype)


def scatter(rows: Tensor, places: NDArray[np.int64], size: int) -> None:
    """Write rows [B, H, 1, D], of ``size`` bytes with elements side by side, to addresses [B, H].
    Host memory alone, with numba."""
    batch, head = (step * rows.itemsize for step in rows.stride()[:2])
    code, where = crew.loops("evict_loops"), places.ctypes.data
    code.scatter(*rows.shape[:2], rows.data_ptr(), batch, head, where, size)


def _check(dtype: torch.dtype = torch.float32, **given: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError unless tensors are of a type and their shapes: loops read by address."""
    for name, (tensor, shape) in given.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}: must be {dtype} {tuple(shape)}"
            )


def _lies(t: Tensor) -> tuple[int, int, int]:
    """Where lines [B, H, n] begin, and from one to the next of each, in bytes."""
    return t.data_ptr(), t.stride(0) * t.itemsize, t.stride(1) * t.itemsize


def _loops(tensor: Tensor) -> ModuleType | None:
    return crew.loops("evict_loops") if stream.serves(tensor) else None
