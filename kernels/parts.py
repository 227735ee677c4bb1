"""Parts of a decode step's results: how they are kept, joined in a fixed order, and finished.

    partials [P, rows, Dv] float32    sum of exp2(s - m) v
    tops     [P, 2, rows] float32     m, total

A part is [M] maxima, [M] sums and [M, Dv] weighted values as `vattn.kernels.online.fold` leaves
them: not divided, so that no logarithm lies between a part and the whole. `join` is the kernel of
the second launch, where there is one: [jobs] x [chunks of results] programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vattn.kernels.online import LN2, LOG2E
from vattn.kernels.splits import base_of, deal, parts_of, pieces_in

# Parts that are on their way at a time: a read takes as long as a few hundred instructions.
AT_ONCE = tl.constexpr(8)
# Results that a program joins at a time: with AT_ONCE parts, 16 numbers a thread.
ELEMENTS = 256


@triton.jit
def keep(m, total, acc, partials, tops, slot, ROWS: tl.constexpr, DV: tl.constexpr):
    """Write a part to ``slot``."""
    row = tl.arange(0, acc.shape[0])
    d = tl.arange(0, acc.shape[1])
    here = slot.to(tl.int64) * ROWS
    top = tops + 2 * here + row
    tl.store(top, m, mask=row < ROWS)
    tl.store(top + ROWS, total, mask=row < ROWS)
    inside = (row < ROWS)[:, None] & (d < DV)[None, :]
    tl.store(partials + here * DV + row[:, None] * DV + d[None, :], acc, mask=inside)


@triton.jit
def join_elements(
    element, partials, tops, places, rows_before, sequence, head, results,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Join the parts of a job and write its results ``element`` [E] of ROWS * DV.

    places: how many parts there are, then where: part 0, part 1, and from one to the next.
    Parts are read AT_ONCE together, around L1: other programs wrote them just now.
    """
    parts, zeroth, first, step = places
    row = element // DV
    inside = element < ROWS * DV
    m = tl.full([element.shape[0]], float("-inf"), tl.float32)
    total = tl.full([element.shape[0]], 0.0, tl.float32)
    acc = tl.full([element.shape[0]], 0.0, tl.float32)
    for i in range(0, parts, AT_ONCE):
        part = i + tl.arange(0, AT_ONCE)
        place = tl.where(part == 0, zeroth, first + (part - 1) * step).to(tl.int64)
        read = (part < parts)[:, None] & inside[None, :]
        top = tops + (place * (2 * ROWS))[:, None] + row[None, :]
        tip = tl.load(top, mask=read, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(top + ROWS, mask=read, other=0.0, cache_modifier=".cg")
        value = partials + (place * (ROWS * DV))[:, None] + element[None, :]
        values = tl.load(value, mask=read, other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m, tl.max(tip, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - shift)
        weight = tl.exp2(tip - shift[None, :])
        total = total * alpha + tl.sum(sums * weight, 0)
        acc = acc * alpha + tl.sum(values * weight, 0)
        m = m_new
    finish(
        m, total, acc, rows_before + row, element % DV, inside, element % DV == 0,
        sequence, head, results, GROUPS, HEADS,
    )  # fmt: skip


@triton.jit
def finish(
    m, total, acc, row, d, inside, once, sequence, head, results,
    GROUPS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write elements ``d`` of result rows ``row`` (= l * GROUPS + g) of a KV head, and the rows'
    log-sum-exp where ``once``. Shapes are any that go together."""
    out, lse, value_scale, sink_logits, out_b, out_h, out_l, value_scale_h, tokens = results
    token = row // GROUPS
    query_head = head * GROUPS + row % GROUPS
    there = token < tokens
    if sink_logits is not None:
        sink = tl.load(sink_logits + query_head, mask=there, other=0.0) * LOG2E
        m_new = tl.maximum(m, sink)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.exp2(sink - shift)
        acc = acc * alpha
        m = m_new
    whole = tl.where(total == 0.0, 1.0, total)
    result = acc / whole
    if value_scale is not None:
        result = result * tl.load(value_scale + head * value_scale_h)
    here = sequence.to(tl.int64)
    logs = m * LN2 + tl.log(whole)
    line = (here * HEADS * GROUPS + query_head) * tokens + token
    tl.store(lse + line, logs, mask=there & once)
    at = out + here * out_b + query_head.to(tl.int64) * out_h + token * out_l + d
    tl.store(at, result.to(out.dtype.element_ty), mask=there & inside)


@triton.jit(
    do_not_specialize=[
        "batch",
        "reserved",
        "tokens",
        "window",
        "sink_tokens",
        "programs",
        "least",
        "most",
    ]
)
def join(
    partials, tops, out, lse, lengths, starts, value_scale, sink_logits,
    out_b, out_h, out_l, value_scale_h,
    batch, reserved, tokens, window, sink_tokens, programs, least, most,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, ROW_TILES: tl.constexpr, ROWS: tl.constexpr,
    DV: tl.constexpr, ELEMENTS: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Join the parts of ELEMENTS results of a job that has several; leave others alone."""
    sequences = (batch, HEADS * ROW_TILES, lengths, starts, reserved, tokens, window, sink_tokens)
    results = (out, lse, value_scale, sink_logits, out_b, out_h, out_l, value_scale_h, tokens)
    CHUNKS: tl.constexpr = (ROWS * DV + ELEMENTS - 1) // ELEMENTS
    index = tl.program_id(0) // CHUNKS
    sequence = index // (HEADS * ROW_TILES)
    job = index % (HEADS * ROW_TILES)
    dealt = deal(programs, least, sequences, RULE)
    pieces = pieces_in(sequence, sequences, RULE)
    begin = base_of(sequence, sequences, RULE) + job * pieces
    places = parts_of(begin, pieces, index, most, dealt, RULE)
    if places[0] > 1:
        element = tl.program_id(0) % CHUNKS * ELEMENTS + tl.arange(0, ELEMENTS)
        join_elements(
            element, partials, tops, places, job % ROW_TILES * ROWS, sequence,
            job // ROW_TILES, results, ROWS, GROUPS, HEADS, DV,
        )  # fmt: skip
