"""From scores to a selection on a CPU: what `choose` defines, one KV head at a time. Needs numba.

    top_k          from scores [B, Hkv, R, n] float32
    top_k_index    from an index: a head's scores are made, used, and made room of by the next's

Ties go to the lower page, as in `choose`; joined scores are float32, so that pages whose scores
agree but for the last bits may change places with those of another device. Bytes moved: the scores
three times, mostly from the processor's cache; of an index, its records. Loops: `choose_loops`.
"""

from __future__ import annotations

from array import array
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vattn.kernels import crew, index_stream
from vattn.kernels.choose import Join
from vattn.kernels.contract import check_row
from vattn.kernels.index import Index

# Work of a thread, in scores.
THREAD_SCORES = 16 << 10
Chosen = tuple[Tensor, Tensor]
Words = tuple[int, ...]


def top_k(
    scores: Tensor,
    k: int,
    *,
    join: Join = "sum",
    pages: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    starts: Tensor | None = None,
) -> Chosen:
    """The ``k`` best pages: ids [B, Hkv, min(k, n)] and count [B, Hkv], int32, as `choose.top_k` of
    `choose.joined` and `choose.force`.

    Args:
        scores: [B, Hkv, R, n] float32, the last stride 1.
        k: pages to take, the forced ones included.
        join: how rows are joined.
        pages: [B] int32 or int64, pages of each sequence; None: n.
        first, last: of the pages starts .. pages, taken in any case.
        starts: [B], the first page of each sequence; None: 0.

    Raises:
        ValueError: scores of another shape or dtype; the message names them.
        RuntimeError: the compiled loops cannot run here.
    """
    if scores.dim() != 4 or scores.dtype != torch.float32 or not scores.is_cpu:
        raise ValueError(
            f"scores is {scores.dtype} {tuple(scores.shape)} on {scores.device}: must be float32 "
            "[batch, KV heads, rows, pages] on the CPU"
        )
    check_row("scores", scores)
    batch, kv_heads, rows, n = scores.shape
    where = (scores.data_ptr(), *(4 * step for step in scores.stride()[:3]), 0, 0)
    code = crew.loops("choose_loops")
    shape, given = (batch, kv_heads, rows, n), (k, join, pages, first, last, starts)
    return _choose(shape, where, 0, code.run, (), given, (scores,))


def top_k_index(
    form: index_stream.Form,
    query: Tensor,
    index: Index,
    n: int,
    k: int,
    *,
    scale: float | None = None,
    join: Join = "sum",
    pages: Tensor | None = None,
    first: int = 0,
    last: int = 0,
    starts: Tensor | None = None,
) -> Chosen:
    """`top_k` of the scores of the first ``n`` records for ``query`` [B, Hq, L, D], which are never
    written down as a whole, unless there are many more threads than KV heads: see
    `index_stream.scores`."""
    index_stream.check(form, query, index)
    if torch.get_num_threads() > 2 * index.batch * index.parts[0].shape[1]:
        scores = index_stream.scores(form, query, index, n, scale=scale)
        return top_k(scores, k, join=join, pages=pages, first=first, last=last, starts=starts)
    code = crew.loops("choose_loops")
    found = index_stream.reading(form, query, index, n)
    # The words of `index_loops.Call` behind the records are not asked for here.
    words = array("q", (*found.words, *([0] * 7)))
    _, kv_heads, rows, dim = found.words[:4]
    where = (0, 0, 0, 0, words.buffer_info()[0], found.scratch)
    extra = found.scratch + 4 * rows * n
    shape, given = (index.batch, kv_heads, rows, n), (k, join, pages, first, last, starts)
    run = partial(code.run_index, *found.tags)
    factor = dim**-0.5 if scale is None else float(scale)
    return _choose(shape, where, extra, run, (factor,), given, (words, found))


def _choose(
    shape: tuple[int, int, int, int],
    where: Words,
    extra: int,
    run: Any,
    factor: tuple[float, ...],
    given: tuple[int, Join, Tensor | None, int, int, Tensor | None],
    alive: tuple[object, ...],
) -> Chosen:
    """Describe the call, make its workspace, and run it on as many threads as it is worth.

    ``where``: the words about scores and index; ``extra``: bytes that scoring needs of a thread.
    """
    batch, kv_heads, rows, n = shape
    k, join, pages, first, last, starts = given
    width = min(k, n)
    ids = torch.empty((batch, kv_heads, width), dtype=torch.int32)
    count = torch.zeros((batch, kv_heads), dtype=torch.int32)
    units = batch * kv_heads
    if units == 0 or width == 0 or rows == 0:
        return ids.fill_(n), count
    code = crew.loops("choose_loops")
    scratch = extra + (rows + 8) * 4 + rows * 32 + 32 + code.DIGITS + (n + 8) * (12 + 4 * rows)
    scratch += -scratch % 64
    threads = crew.threads(units, units * rows * n, THREAD_SCORES)
    space = torch.empty(threads * scratch, dtype=torch.uint8)
    lines = crew.line(starts), crew.line(pages)
    counts = array("q", bytes(8 * crew.COUNTS))
    words = array(
        "q",
        (
            *(kv_heads, rows, n, *where, code.JOINS[join], k, first, last),
            *map(crew.address, lines),
            *(ids.data_ptr(), width, count.data_ptr(), units),
            *(space.data_ptr(), scratch, counts.buffer_info()[0]),
        ),
    )
    call = partial(run, words.buffer_info()[0], *factor)
    crew.work(call, counts, units, threads, words, space, lines, ids, count, *alive)
    return ids, count
