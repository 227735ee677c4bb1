"""A decode step at its budget: what attention each row got, the row that each head drops, and its
last row in that place.

    mass    logits [B, H, R, n] and lse [B, H, R] float32, shares [R] -> [B, H, n] float32:
            sum over r of shares[r] * exp(logits[r] - lse[r])
    least   score [B, H, n] float32, counts [B, H], positions [B, H, n] int64
            -> rows [B, H] int64: of the first `counts` the lowest score of those that may go, the
            last of equals; where none may (or all are +inf), the lowest position
    scatter rows [B, H, 1, D] -> each to an address [B, H] int64
    drop    rows [B, H] int64, counts [B, H]: the last row of each head takes the place of its row
            `rows`, and counts one less; nothing where that is -1

On a CPU with numba in loops (`evict_loops`): a step has a dozen of heads with some thousand rows,
and each of torch's operations on so little takes longer to call than to run. Elsewhere in torch's
operations, none of which waits for a device. Bytes moved: logits, scores and masks once; the rows
that move.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import NoReturn

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


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines of rows that `drop` moves in: [N, S, D], elements of a row side by side, of which
    ``slots`` [B, H], side by side, say where each head's lie; ``clear``: the last row leaves
    zeros."""

    rows: Tensor
    slots: Tensor
    clear: bool = False

    @cached_property
    def words(self) -> tuple[int, ...]:
        """What the loops read."""
        slot, row, item = *self.rows.stride()[:2], self.rows.itemsize
        width = self.rows.shape[2] * item
        places = self.rows.data_ptr(), slot * item, row * item, width
        return *places, self.slots.data_ptr(), self.clear


def drop(
    lines: Sequence[Lines], rows: Tensor, counts: NDArray[np.int64], *, trusted: bool = False
) -> None:
    """Drop one row of each head from all lines; ``counts``, side by side, becomes what is left. A
    device is not waited for where ``trusted`` says that rows are there, one of each head.

    Raises ValueError where a head has no such row; nothing has changed.
    """
    _check(torch.int64, rows=(rows, counts.shape))
    code = _loops(rows)
    if code is None:
        _drop(lines, rows, counts, trusted)
        return
    rows, words = rows.contiguous(), array("q")
    for each in lines:
        words.extend(each.words)
    given = words.buffer_info()[0], rows.data_ptr(), counts.ctypes.data
    if not code.drop(rows.numel(), len(lines), *given):
        _raise_missing(rows, counts)


@dataclass(frozen=True, eq=False)
class Rule:
    """Who goes at a step where heads hold one row more than their limits.

    Args:
        limits: [B, H] rows that a head is to hold.
        recent: [B] last tokens of the text that stay.
        sinks: first tokens of the text that stay.
        within: of those before the last ones only so many may go; 0: all.
        ahead: [B, H, m] float32, side by side: scores of the tokens from ``ahead_from`` [B] on,
            where they are known before they come; else those of new rows are recorded by now.
    """

    limits: NDArray[np.int64]
    recent: NDArray[np.int64]
    sinks: int
    within: int = 0
    ahead: Tensor | None = None
    ahead_from: NDArray[np.int64] | None = None


class DropLeast:
    """`least` by a `Rule` and `drop`, of the same tensors at many steps by one compiled call each.
    On the host with numba alone.

    Args:
        rule: who goes.
        counts: [B, H] rows of each head; written.
        tokens: [B] of the text so far.
        score, positions: [B, H, n], see `least`; the caller sees to it that counts are at most n.
        lines: what moves.

    Raises:
        ValueError: another shape or type.
    """

    def __init__(
        self,
        rule: Rule,
        counts: NDArray[np.int64],
        tokens: NDArray[np.int64],
        score: Tensor,
        positions: Tensor,
        lines: Sequence[Lines],
    ) -> None:
        batch, heads = counts.shape
        shape = batch, heads, score.shape[-1]
        _check(score=(score, shape))
        _check(torch.int64, positions=(positions, shape))
        _check_numbers((batch, heads), counts=counts, limits=rule.limits)
        _check_numbers((batch,), tokens=tokens, recent=rule.recent)
        ahead = 0, 0, 0
        if rule.ahead is not None and rule.ahead_from is not None:
            _check(ahead=(rule.ahead, (batch, heads, rule.ahead.shape[-1])))
            _check_numbers((batch,), ahead_from=rule.ahead_from)
            ahead = rule.ahead.data_ptr(), rule.ahead_from.ctypes.data, rule.ahead.shape[2]
        if score.stride(2) != 1 or positions.stride(2) != 1:
            raise ValueError("score and positions must have their rows side by side")
        sides = array("q", [word for side in lines for word in side.words])
        numbers = [x.ctypes.data for x in (counts, rule.limits, tokens, rule.recent)]
        places = *_lies(score), *_lies(positions), *ahead
        rows = array("q", bytes(8 * counts.size))
        moves = len(lines), sides.buffer_info()[0], rows.buffer_info()[0]
        self._words = array("q", (batch, heads, *numbers, rule.sinks, rule.within, *places, *moves))
        # All of it must outlive the words.
        self._alive = rule, counts, tokens, score, positions, tuple(lines), sides, rows
        self._run = crew.loops("evict_loops").drop_least
        self._at = self._words.buffer_info()[0]

    def __call__(self, draft: int = 0) -> int:
        """Drop a row of each head that holds one too many, the last ``draft`` tokens apart, which
        are held beyond the limits. Returns how many went; -1, and no row has moved, where a head
        holds more than one too many, where ``ahead`` does not reach as far, or where there is
        nothing ``within``."""
        return int(self._run(self._at, draft))


def _drop(lines: Sequence[Lines], rows: Tensor, counts: NDArray[np.int64], trusted: bool) -> None:
    """`drop` in torch's operations."""
    gone = np.ones(counts.shape, np.bool_)
    if not (trusted and rows.is_cuda):  # on the host a look costs nothing
        found = rows.cpu().numpy()
        if ((found < -1) | (found >= counts)).any():
            _raise_missing(rows, counts)
        gone = found >= 0
    last = torch.from_numpy(counts - 1).to(rows.device)
    some = None if gone.all() else torch.from_numpy(gone).to(rows.device)
    if some is not None:  # a head without a row may have no page: it is not to be read
        rows, last = rows[some], last[some]
    for each in lines:
        slots = each.slots.view(counts.shape)
        slots = slots if some is None else slots[some]
        each.rows[slots, rows] = each.rows[slots, last]
        if each.clear:
            each.rows[slots, last] = 0
    counts -= gone


def _raise_missing(rows: Tensor, counts: NDArray[np.int64]) -> NoReturn:
    limits = (counts - 1).tolist()
    raise ValueError(f"rows {rows.tolist()} to drop are not in 0..{limits}, or -1")


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


def _check_numbers(shape: tuple[int, ...], **given: NDArray[np.int64]) -> None:
    """Raise ValueError unless arrays are int64 of a shape, side by side."""
    for name, each in given.items():
        if each.shape != shape or each.dtype != np.int64 or not each.flags.c_contiguous:
            raise ValueError(
                f"{name} is {each.dtype} {each.shape} of strides {each.strides}: must be int64 "
                f"{shape}, side by side"
            )


def _lies(t: Tensor) -> tuple[int, int, int]:
    """Where lines [B, H, n] begin, and from one to the next of each, in bytes."""
    return t.data_ptr(), t.stride(0) * t.itemsize, t.stride(1) * t.itemsize


def _loops(tensor: Tensor) -> ModuleType | None:
    return crew.loops("evict_loops") if stream.serves(tensor) else None
