"""How the keys of a decode step are dealt out to programs: in equal runs, whatever the lengths.

    extent  rows [start, sink_end) and [low, high) of a sequence: all that any query sees
    tile    ``block`` tokens of an extent, first the sinks', then from ``low`` on
    job     one sequence, one KV head, one tile of query rows: a run of tiles
    piece   what is dealt out: a tile, or with fixed splits ``fixed`` tiles

The pieces of all jobs are one line, jobs of a sequence side by side. It is cut into as many runs as
there are programs, which differ by at most one piece; where each job would be cut into parts of
fewer than ``least`` pieces, some programs get none and all others more. Where a run covers a job it
writes the result; any other part of a job goes to a partial, of which a program has at most two: of
the part that its run begins with and of the part that it ends with. With fixed splits each piece is
a part, cut without regard to other sequences and programs, so that the bits of a result depend on
its own sequence alone.

Everything is computed on the device from the lengths (`deal`, `find`, `owner`); `splits` is the
same rule in Python, for rooflines and tests.
Source: stream-K, https://arxiv.org/abs/2301.03598; LeanAttention, https://arxiv.org/abs/2405.10480.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import triton
import triton.language as tl

from vattn.kernels.scores import Scores


@dataclass(frozen=True)
class Deal:
    """What is fixed before the lengths are known.

    Args:
        programs: programs of the launch.
        jobs: KV heads times tiles of query rows.
        block: tokens of a tile.
        least: pieces that a program takes at least, if there are as many.
        fixed: tiles of a fixed split; 0: cut where it balances.
        most: with fixed splits, pieces of a job at most.
    """

    programs: int
    jobs: int
    block: int
    least: int
    fixed: int = 0
    most: int = 0


@dataclass(frozen=True)
class Split:
    """Tiles ``first`` to ``end`` of a job, and their partial: None if they are all of it."""

    program: int
    sequence: int
    job: int
    first: int
    end: int
    partial: int | None


def extent_of(length: int, start: int, tokens: int, scores: Scores) -> tuple[int, int, int]:
    """(sink_end, low, high) of a sequence that ``tokens`` queries look at."""
    first = 0 if scores.causal == "top_left" else length - tokens
    high = length if scores.causal is None else min(length, first + tokens)
    if scores.window is None:
        return start, start, high
    low = min(max(start, first - scores.window + 1), max(start, high))
    return max(start, min(scores.sink_tokens, low)), low, high


def tiles_of(length: int, start: int, tokens: int, scores: Scores, block: int) -> int:
    """Tiles of a job; one that sees nothing has one, in which its zeros are written."""
    sink_end, low, high = extent_of(length, start, tokens, scores)
    return max(1, -(-(sink_end - start) // block) - (-max(high - low, 0) // block))


def splits(tiles: Sequence[int], deal: Deal) -> list[Split]:
    """Who works on what, for sequences of so many ``tiles``; in the order of the keys."""
    pieces = [-(-count // deal.fixed) if deal.fixed else count for count in tiles]
    total = deal.jobs * sum(pieces)
    active = min(deal.programs, max(deal.jobs * len(tiles), total // deal.least))
    begins = [
        program * (total // active) + min(program, total % active) for program in range(active)
    ]
    owner = [
        p
        for p, (a, b) in enumerate(zip(begins, [*begins[1:], total], strict=True))
        for _ in range(b - a)
    ]
    ends = list(accumulate(count for count in pieces for _ in range(deal.jobs)))
    found = []
    for index, end in enumerate(ends):
        sequence, job = divmod(index, deal.jobs)
        begin = end - pieces[sequence]
        cuts = (
            range(begin, end)
            if deal.fixed
            else sorted({begin, *(b for b in begins if begin < b < end)})
        )
        for number, (at, stop) in enumerate(zip(cuts, [*cuts[1:], end], strict=True)):
            width = deal.fixed or 1
            partial = (
                index * deal.most + number
                if deal.fixed
                else 2 * owner[at] + (at != begins[owner[at]])
            )
            found.append(
                Split(
                    owner[at],
                    sequence,
                    job,
                    (at - begin) * width,
                    min((stop - begin) * width, tiles[sequence]),
                    None if len(cuts) == 1 else partial,
                )
            )
    return found


# The kernels' side. In all of these, `sequences` is the tuple of batch, jobs, lengths, starts,
# reserved, tokens, window and sink_tokens; RULE that of: causal (0 no, 1 top-left, 2 bottom-right),
# whether there is a window, block, fixed, and of how many sequences the lengths are read at once.


@triton.jit
def extent(length, start, sequences, RULE: tl.constexpr):
    """`extent_of`, of one sequence or a vector of them."""
    _, _, _, _, _, tokens, window, sink_tokens = sequences
    high = length
    first = length - tokens
    if RULE[0] == 1:
        first = length * 0
        high = tl.minimum(length, tokens)
    low = start
    sink_end = start
    if RULE[1]:
        low = tl.minimum(tl.maximum(start, first - window + 1), tl.maximum(start, high))
        sink_end = tl.maximum(start, tl.minimum(sink_tokens, low))
    return first, sink_end, low, high


@triton.jit
def rows_of(index, sequences):
    """Length and start of sequences ``index``; 0 beyond the batch."""
    batch, _, lengths, starts, reserved, _, _, _ = sequences
    inside = index < batch
    start = index * 0
    length = tl.where(inside, start + reserved, 0)
    if lengths is not None:
        length = tl.load(lengths + index, mask=inside, other=0).to(tl.int32)
    if starts is not None:
        start = tl.load(starts + index, mask=inside, other=0).to(tl.int32)
    return length, start


@triton.jit
def tiles_in(index, sequences, RULE: tl.constexpr):
    """`tiles_of` sequences ``index``; 0 beyond the batch."""
    length, start = rows_of(index, sequences)
    _, sink_end, low, high = extent(length, start, sequences, RULE)
    tiles = (tl.maximum(high - low, 0) + RULE[2] - 1) // RULE[2]
    if RULE[1]:
        tiles += (sink_end - start + RULE[2] - 1) // RULE[2]
    return tl.where(index < sequences[0], tl.maximum(tiles, 1), 0)


@triton.jit
def pieces_in(index, sequences, RULE: tl.constexpr):
    """Pieces of a job of sequences ``index``."""
    tiles = tiles_in(index, sequences, RULE)
    if RULE[3]:
        tiles = (tiles + RULE[3] - 1) // RULE[3]
    return tiles


@triton.jit
def deal(programs, least, sequences, RULE: tl.constexpr):
    """(active programs, pieces of each, how many of these have one more)."""
    batch, jobs, _, _, _, _, _, _ = sequences
    total = programs * 0
    for first in range(0, batch, RULE[4]):
        total += tl.sum(pieces_in(first + tl.arange(0, RULE[4]), sequences, RULE))
    total *= jobs
    active = tl.minimum(programs, tl.maximum(batch * jobs, total // least))
    return active, total // active, total % active


@triton.jit
def find(at, sequences, RULE: tl.constexpr):
    """(sequence of piece ``at``, where its first piece lies)."""
    batch, jobs, _, _, _, _, _, _ = sequences
    sequence = at * 0
    base = at * 0
    before = at * 0
    for first in range(0, batch, RULE[4]):
        index = first + tl.arange(0, RULE[4])
        pieces = jobs * pieces_in(index, sequences, RULE)
        ends = before + tl.cumsum(pieces, 0)
        passed = (ends <= at) & (index < batch)
        sequence += tl.sum(passed.to(tl.int32))
        base = tl.maximum(base, tl.max(tl.where(passed, ends, 0)))
        before += tl.sum(pieces)
    return sequence, base


@triton.jit
def base_of(sequence, sequences, RULE: tl.constexpr):
    """Where the first piece of a sequence lies."""
    base = sequence * 0
    for first in range(0, sequences[0], RULE[4]):
        index = first + tl.arange(0, RULE[4])
        pieces = pieces_in(index, sequences, RULE)
        base += tl.sum(tl.where(index < sequence, pieces, 0))
    return base * sequences[1]


@triton.jit
def begin_of(program, dealt):
    """The first piece of a program's run."""
    _, share, extra = dealt
    return program * share + tl.minimum(program, extra)


@triton.jit
def owner(at, dealt):
    """The program whose run piece ``at`` is in."""
    _, share, extra = dealt
    longer = extra * (share + 1)
    return tl.where(at < longer, at // (share + 1), extra + (at - longer) // tl.maximum(share, 1))


@triton.jit
def parts_of(begin, pieces, job, most, dealt, RULE: tl.constexpr):
    """Parts of a job whose pieces begin at ``begin``: (how many, partial of part 0, of part 1).

    Partials of further parts follow that of part 1 ``step`` by ``step``.
    """
    if RULE[3]:
        return pieces, job * most, job * most + 1, 1
    first = owner(begin, dealt)
    inner = (begin != begin_of(first, dealt)).to(tl.int32)
    return owner(begin + pieces - 1, dealt) - first + 1, 2 * first + inner, 2 * first + 2, 2
