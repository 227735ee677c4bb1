"""Scores, join and choice in one launch: `index_scores`, and `top_pages.top_k` of what they are.

The programs score a block of records each. The one that is the last of its KV head to arrive at a
counter has all scores of the head before it, in the second-level cache, and chooses; nobody waits.
The counters are 0 between the calls. What is chosen does not depend on who was last.

Bytes moved: those of the two kernels; a launch less. Grid and workspace depend on shapes alone: a
captured CUDA graph serves any records, counts and pages, one at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.choose import Join
from vattn.kernels.gpu import current
from vattn.kernels.index import Index
from vattn.kernels.index_scores import Kind, score_block, scoring
from vattn.kernels.top_pages import JOINS, dense_ends, select_one

# Pages that the last program holds in registers, its warps, and blocks where they are more.
HELD, WARPS = 2048, 8
COUNTS = [
    "rows",
    "records",
    "reserved",
    "scores_b",
    "scores_h",
    "most",
    "forced_first",
    "forced_last",
]


def arrived_for(query: Tensor, index: Index) -> Tensor:
    """Counters for calls with these shapes on one stream: zero them after a launch that was broken
    off."""
    return query.new_zeros(query.shape[0] * index.parts[0].shape[1], dtype=torch.int32)


def top_k(
    kind: Kind,
    query: Tensor,
    index: Index,
    records: int,
    k: int,
    *,
    scale: float | None = None,
    join: Join = "sum",
    pages: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    starts: Tensor | None = None,
    arrived: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` best of the first ``records`` pages: ids [B, Hkv, min(k, records)] and count.

    Args:
        kind: the format of the index.
        query, index, records, scale: as for `index_scores`.
        k, join, pages, first, last, starts: as for `top_pages.top_k`; the page that is growing has
            no record and is forced by ``last``.
        arrived: of `arrived_for`; None: new.

    Raises:
        ValueError: shapes, dtypes or numbers do not suit.
    """
    launch = scoring(kind, query, index, records, scale)
    batch, heads, rows, _ = launch.shape
    _check(query, arrived, batch * heads, (k, first, last))
    ends = dense_ends(query, (starts, pages))
    most = min(k, records)
    scores = query.new_empty(launch.shape, dtype=torch.float32)
    ids = query.new_empty((batch, heads, most), dtype=torch.int32)
    counts = query.new_empty((batch, heads), dtype=torch.int32)
    if not scores.numel():
        return ids, counts.zero_()
    held = records <= HELD
    keys = None if held else ids.new_empty((batch * heads, records))
    sums = None if held else scores.new_empty((batch * heads, rows))
    with current(query):
        score_select[(launch.programs,)](
            *launch.tensors, scores, *launch.numbers,
            *ends, ids, counts, keys, sums,
            arrived_for(query, index) if arrived is None else arrived,
            heads * rows * records, rows * records, most, first, last,
            JOIN=JOINS[join], BLOCK=HELD, HELD=held, **launch.constants,
            num_warps=WARPS, maxnreg=255,
        )  # fmt: skip
    return ids, counts


@triton.jit(do_not_specialize=COUNTS)
def score_select(
    query, first, second, counts, slots, scores,
    query_b, query_h, query_r, first_n, first_h, second_n, second_h,
    rows, records, reserved, scale,
    starts, pages, ids, chosen, keys, sums, arrived,
    scores_b, scores_h, most, forced_first, forced_last,
    HEADS: tl.constexpr, FIRST_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    KIND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    JOIN: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    blocks = (records + BLOCK_N - 1) // BLOCK_N
    index = tl.program_id(0) // blocks
    score_block(
        index, tl.program_id(0) % blocks, query, first, second, counts, slots, scores,
        query_b, query_h, query_r, first_n, first_h, second_n, second_h,
        rows, records, reserved, scale, HEADS, FIRST_ROW, SECOND_ROW, D,
        BLOCK_M, BLOCK_N, BLOCK_D, KIND, WIDE, PRECISION,
    )  # fmt: skip
    # The scores are written by all threads before one of them releases them.
    tl.debug_barrier()
    if tl.atomic_add(arrived + index, 1, sem="acq_rel", scope="gpu") == blocks - 1:
        tl.store(arrived + index, 0)
        select_one(
            index.to(tl.int64), scores, starts, pages, ids, chosen, keys, sums,
            scores_b, scores_h, records, rows, records, most, 0, forced_first, forced_last, 0.0,
            HEADS, JOIN, "top_k", BLOCK, HELD,
        )  # fmt: skip


def _check(
    query: Tensor, arrived: Tensor | None, indices: int, numbers: tuple[int, int, int]
) -> None:
    if min(numbers) < 0:
        raise ValueError(f"k, first, last are {numbers}: must be 0 or more")
    if arrived is None:
        return
    right = arrived.dtype == torch.int32 and arrived.device == query.device
    if arrived.shape != (indices,) or not right or not arrived.is_contiguous():
        raise ValueError(
            f"arrived is {arrived.dtype} {tuple(arrived.shape)} on {arrived.device}: must be "
            f"contiguous int32 ({indices},) on {query.device}, as arrived_for makes it"
        )
