"""From scores to a selection on a device: what `choose` defines, in one launch.

    scores  [B, Hkv, R, n] float32   of n pages for the R query rows that share a KV head; -inf
                                     where there is no page
    pages   [B] int32 or int64       pages of each sequence, the growing one included; None: n
    ids     [B, Hkv, K] int32        ascending; n behind ``count``
    count   [B, Hkv] int32

A program is one KV head of one sequence. It joins the rows, marks what is forced, and maps floats
to unsigned keys of the same order (a negative number's bits are inverted, another's sign is set).
How many are to be taken is known first (`top_k`), counted (`threshold`), or found by bisection over
the bits of the key down to which the mass is just short of p (`top_p`). Four histograms of 8 bits,
from the upper end on, then find the key of the last one taken; those above it, and of its equals
the lowest pages, are written in the order of the pages. No atomics, no order of arrival: the same
scores give the same pages, with `choose`'s ties.

With up to `HELD` pages the keys stay in registers; beyond, they lie in a workspace of 4 bytes a
page, read six times (42 times for `top_p`). Bytes moved: the scores once, or twice where keys are
not held. Grid and workspace depend on shapes alone: a captured CUDA graph serves any scores and
counts of pages. Source: radix selection, Alabi et al., https://doi.org/10.1145/2133803.2345676.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.choose import Join
from vattn.kernels.contract import check_row
from vattn.kernels.gpu import current, device_of
from vattn.kernels.online import LOG2E
from vattn.kernels.top_keys import (
    EMPTY_KEY,
    FORCED_KEY,
    best_of,
    bound_of,
    count_above,
    float_of,
    key_of,
    share,
    write,
)

JOINS: dict[Join | None, int] = {None: 0, "sum": 1, "max": 2}
# (pages, warps): keys that a program holds in registers; beyond them, blocks of a workspace.
HELD = ((2048, 8), (4096, 16))
STREAMED = (4096, 16)
Chosen = tuple[Tensor, Tensor]


def top_k(
    scores: Tensor,
    k: int,
    *,
    join: Join | None = "sum",
    pages: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    starts: Tensor | None = None,
) -> Chosen:
    """The ``k`` best pages: ids [B, Hkv, min(k, n)] and count [B, Hkv], as `choose.top_k` of
    `choose.joined` and `choose.force`.

    Args:
        scores: [B, Hkv, R, n] float32, the last stride 1.
        k: pages to take, the forced ones included.
        join: how rows are joined; None: there is one, and it is taken as it is.
        pages: of each sequence; pages at or behind it are none.
        first, last: of these pages, taken in any case.
        starts: [B] int32 or int64, the first page of each sequence that there is; None: 0.

    Raises:
        ValueError: shapes, dtypes or numbers are none of these.
    """
    return _select(scores, k, 0, 0.0, "top_k", join, (starts, pages), first, last)


def top_p(
    scores: Tensor,
    p: float,
    least: int,
    most: int,
    *,
    join: Join | None = "sum",
    pages: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    starts: Tensor | None = None,
) -> Chosen:
    """The fewest best pages that hold the share ``p``, and the forced ones: `choose.top_p`. Masses
    are sums in float32: at the very edge of p they may differ by a page. Otherwise as `top_k`."""
    return _select(scores, most, least, p, "top_p", join, (starts, pages), first, last)


def threshold(
    scores: Tensor,
    alpha: float,
    least: int,
    most: int,
    *,
    join: Join | None = "sum",
    pages: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    starts: Tensor | None = None,
) -> Chosen:
    """Pages that score more than the best one that is not forced less ``alpha``, and the forced
    ones: `choose.threshold`. Otherwise as `top_k`."""
    return _select(scores, most, least, alpha, "threshold", join, (starts, pages), first, last)


# ---- the kernel: scores are read around L1, other programs may have written them just now ----


@triton.jit
def _fold(s, m, total):
    """Take scores s into the elements' maximum m and sum of exp2(s - m)."""
    m_new = tl.maximum(m, s)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, total * tl.exp2(m - shift) + tl.exp2(s - shift)


@triton.jit
def _log_sum(m, total):
    """log2 of the sum over all elements that were folded; 0 if there are none."""
    top = tl.max(m, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    whole = tl.sum(total * tl.exp2(m - shift), 0)
    return tl.where(whole == 0.0, 0.0, shift + tl.log2(tl.where(whole == 0.0, 1.0, whole)))


@triton.jit
def _row_sum(line, n, BLOCK: tl.constexpr):
    """`_log_sum` of a row of scores."""
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        s = tl.load(line + at, mask=at < n, other=float("-inf"), cache_modifier=".cg")
        m, total = _fold(s * LOG2E, m, total)
    return _log_sum(m, total)


@triton.jit
def _joined(
    lines, sums, at, rows, scores_r, n,
    BLOCK: tl.constexpr, JOIN: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Pages ``at`` of all rows joined, in units of log2."""
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        line = lines + row * scores_r + at
        s = tl.load(line, mask=at < n, other=float("-inf"), cache_modifier=".cg") * LOG2E
        whole = _log_sum(s, tl.full([BLOCK], 1.0, tl.float32)) if HELD else tl.load(sums + row)
        if JOIN == 1:
            m, total = _fold(s - whole, m, total)
        else:
            m = tl.maximum(m, s - whole)
    if JOIN == 1:
        m += tl.log2(tl.where(total == 0.0, 1.0, total))
    return m


@triton.jit
def select_one(
    index, scores, starts, pages, ids, counts, keys, sums, scores_b, scores_h, scores_r,
    rows, n, most, least, first, last, number,
    HEADS: tl.constexpr, JOIN: tl.constexpr, RULE: tl.constexpr,
    BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Choose for KV head ``index`` [int64] of the batch."""
    b = index // HEADS
    lines = scores + b * scores_b + index % HEADS * scores_h
    start = 0
    if starts is not None:
        start = tl.load(starts + b).to(tl.int32)
    end = n
    if pages is not None:
        end = tl.minimum(n, tl.load(pages + b).to(tl.int32))
    if not HELD:
        keys += index * n
        sums += index * rows
        if JOIN != 0:
            for row in range(rows):
                tl.store(sums + row, _row_sum(lines + row * scores_r, n, BLOCK))
            tl.debug_barrier()

    # ---- the keys ----
    held = tl.zeros([BLOCK], tl.uint32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        if JOIN == 0:
            x = tl.load(lines + at, mask=at < n, other=float("-inf"), cache_modifier=".cg")
        else:
            x = _joined(lines, sums, at, rows, scores_r, n, BLOCK, JOIN, HELD)
        x = tl.where((at < start + first) | (at >= end - last), float("inf"), x)
        x = tl.where((at >= start) & (at < end), x, float("-inf"))
        held = tl.where(at < n, key_of(x), 0)
        if not HELD:
            tl.store(keys + at, held.to(tl.int32, bitcast=True), mask=at < n)
    if not HELD:
        tl.debug_barrier()

    # ---- how many ----
    UNIT: tl.constexpr = 1.0 if JOIN else LOG2E  # of scores in units of log2
    some = count_above(held, keys, EMPTY_KEY, n, BLOCK, HELD)
    k = tl.minimum(most, some)
    if RULE != "top_k":
        best = best_of(held, keys, n, BLOCK, HELD)
        if RULE == "top_p":
            wanted = share(held, keys, best, number, n, UNIT, BLOCK, HELD)
            wanted += count_above(held, keys, FORCED_KEY - 1, n, BLOCK, HELD)
        else:
            level = float_of(best) - number * (LOG2E / UNIT)
            bound = tl.maximum(key_of(level), EMPTY_KEY)
            wanted = count_above(held, keys, bound, n, BLOCK, HELD)
        k = tl.minimum(k, tl.maximum(wanted, least))

    # ---- which ----
    bound, left = bound_of(held, keys, k, n, BLOCK, HELD)
    write(held, keys, ids + index * most, bound, left, n, most, BLOCK, HELD)
    tl.store(counts + index, k)


@triton.jit(do_not_specialize=["rows", "n", "most", "least", "first", "last"])
def select_pages(
    scores, starts, pages, ids, counts, keys, sums, scores_b, scores_h, scores_r,
    rows, n, most, least, first, last, number,
    HEADS: tl.constexpr, JOIN: tl.constexpr, RULE: tl.constexpr,
    BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    select_one(
        tl.program_id(0).to(tl.int64), scores, starts, pages, ids, counts, keys, sums,
        scores_b, scores_h, scores_r, rows, n, most, least, first, last, number,
        HEADS, JOIN, RULE, BLOCK, HELD,
    )  # fmt: skip


# ---- the launcher ----


def _select(
    scores: Tensor,
    most: int,
    least: int,
    number: float,
    rule: str,
    join: Join | None,
    ends: tuple[Tensor | None, Tensor | None],
    first: int,
    last: int,
) -> Chosen:
    _check(scores, join)
    ends = dense_ends(scores, ends)
    if most < 0 or least < 0 or first < 0 or last < 0:
        raise ValueError(f"k or most is {most}, least {least}, first {first}, last {last}: >= 0")
    batch, heads, rows, n = scores.shape
    most = min(most, n)
    ids = scores.new_empty((batch, heads, most), dtype=torch.int32)
    counts = scores.new_empty((batch, heads), dtype=torch.int32)
    device_of(scores)  # raises where nothing can be launched
    if not batch * heads * n:
        return ids, counts.zero_()
    held = next((shape for shape in HELD if n <= shape[0]), None)
    block, warps = held or STREAMED
    keys = sums = None
    if held is None:
        keys = ids.new_empty((batch * heads, n))
        sums = scores.new_empty((batch * heads, rows))
    with current(scores):
        select_pages[(batch * heads,)](
            scores, *ends, ids, counts, keys, sums,
            *scores.stride()[:3], rows, n, most, least, first, last, float(number),
            HEADS=heads, JOIN=JOINS[join], RULE=rule, BLOCK=block, HELD=held is not None,
            num_warps=warps, maxnreg=min(255, (64 << 10) // (32 * warps)),
        )  # fmt: skip
    return ids, counts


def dense_ends(
    like: Tensor, ends: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """First pages and numbers of pages of the sequences of ``like`` [B, ...], side by side. Raises
    ValueError for others than int32 or int64 [B] on its device."""
    for name, line in zip(("starts", "pages"), ends, strict=True):
        if line is None:
            continue
        right = line.dtype in (torch.int32, torch.int64) and line.device == like.device
        if line.shape != like.shape[:1] or not right:
            raise ValueError(
                f"{name} is {line.dtype} {tuple(line.shape)} on {line.device}: must be int32 or "
                f"int64 ({like.shape[0]},) on {like.device}"
            )
    starts, pages = (None if line is None else line.contiguous() for line in ends)
    return starts, pages


def _check(scores: Tensor, join: Join | None) -> None:
    if scores.dim() != 4 or scores.dtype != torch.float32:
        raise ValueError(
            f"scores is {scores.dtype} {tuple(scores.shape)}: must be float32 [batch, KV heads, "
            "rows, pages]"
        )
    check_row("scores", scores)
    if join not in JOINS or (join is None and scores.shape[2] != 1):
        raise ValueError(
            f"join={join!r} of {scores.shape[2]} rows: must be 'sum' or 'max', or None for one row"
        )
