"""The compiled loops of `evict`. Addresses and strides are in bytes.

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vattn.kernels import lanes as v
from vattn.kernels.calls import reader, sources, write_integer
from vattn.kernels.stream_loops import kept
from vattn.kernels.stream_tiles import jit

BEST = np.float32(np.inf)


# What `drop_least` is told, as int64 words.
WORDS = (
    "batch",
    "heads",
    "counts",  # int64 [batch, heads], rows of each; written
    "limits",  # int64 [batch, heads]
    "tokens",  # int64 [batch], of the text
    "recent",  # int64 [batch], of these the last that stay
    "first",  # the first position that may go
    "within",  # of the tokens before the recent ones, how many may go; 0: all
    "score",  # float32 [batch, heads, rows]
    "score_batch",
    "score_head",
    "positions",  # int64 [batch, heads, rows]
    "positions_batch",
    "positions_head",
    "ahead",  # float32 [batch, heads, ahead_tokens], scores of tokens to come; 0 for none
    "ahead_from",  # int64 [batch], position of the first of them
    "ahead_tokens",
    "sides",
    "lines",  # of each side, see `drop_of`
    "rows",  # int64 [batch, heads], which went
)
call_at = reader(WORDS)


@jit
def least_of(score: int, positions: int, forced: int, count: int, first: int, end: int) -> int:
    """The row that a head drops: the least of those that may go, or the oldest."""
    lowest, found = BEST, -1
    for row in range(count):
        value = v.read(v.F32, score + 4 * row)
        if value <= lowest and value < BEST:
            at = v.integer(positions + 8 * row)
            if first <= at < end and not (forced and v.byte(forced + row)):
                lowest, found = value, row
    if found < 0:
        found = 0
        for row in range(1, count):
            if v.integer(positions + 8 * row) < v.integer(positions + 8 * found):
                found = row
    return found


@jit
def drop_of(sides: int, words: int, head: int, target: int, count: int) -> None:
    """Move a head's last row of every side to ``target``; of each side there are six words: base,
    bytes of a slot, a row and what moves of it, slots, and whether to clear the row that moved."""
    last = v.integer(count) - 1
    for side in range(sides):
        of = words + 48 * side
        row, size = v.integer(of + 16), v.integer(of + 24)
        slot = v.integer(v.integer(of + 32) + 8 * head)
        line = v.integer(of) + slot * v.integer(of + 8)
        if target != last:
            v.copy(line + target * row, line + last * row, size)
        if v.integer(of + 40):
            v.clear(line + last * row, size)
    write_integer(count, last)


def compiled(sources: int) -> Any:
    """Make the loops; see `calls.sources`."""

    @kept
    def mass(heads: int, lines: int, n: int, logits: int, lse: int, shares: int, out: int) -> None:
        """See `evict.mass`: eight rows at a time, the last eight perhaps once more; n >= 8."""
        if not sources:
            return
        for head in range(heads):
            for eight in range(0, n, 8):
                row = min(eight, n - 8)
                total = v.fill(np.float32(0.0))
                for line in range(head * lines, head * lines + lines):
                    shift = v.fill(v.read(v.F32, lse + 4 * line))
                    share = v.fill(v.read(v.F32, shares + 4 * (line - head * lines)))
                    weight = v.exp(v.sub(v.load(logits + 4 * (line * n + row)), shift))
                    total = v.fma(weight, share, total)
                v.store(out + 4 * (head * n + row), total)

    @kept
    def least(
        batch: int,
        heads: int,
        score: int,
        score_batch: int,
        score_head: int,
        positions: int,
        positions_batch: int,
        positions_head: int,
        forced: int,
        forced_batch: int,
        forced_head: int,
        counts: int,
        first: int,
        last: int,
        rows: int,
    ) -> None:
        """See `evict.least`; ``forced`` is 0 where no mask is."""
        if not sources:
            return
        for i in range(batch * heads):
            b, h = i // heads, i % heads
            line = score + b * score_batch + h * score_head
            place = positions + b * positions_batch + h * positions_head
            mask = forced and forced + b * forced_batch + h * forced_head
            count, end = v.integer(counts + 8 * i), v.integer(last + 8 * b)
            write_integer(rows + 8 * i, least_of(line, place, mask, count, first, end))

    @kept
    def drop(heads: int, sides: int, words: int, rows: int, counts: int) -> bool:
        """See `evict.drop`. False, and nothing moves, where a head has no such row."""
        if not sources:
            return False
        for i in range(heads):
            if not -1 <= v.integer(rows + 8 * i) < v.integer(counts + 8 * i):
                return False
        for i in range(heads):
            row = v.integer(rows + 8 * i)
            if row >= 0:
                drop_of(sides, words, i, row, counts + 8 * i)
        return True

    @kept
    def drop_least(words: int, draft: int) -> int:
        """See `evict.DropLeast`: rows that went, or -1."""
        c = call_at(words)
        many, gone = c.batch * c.heads, 0
        if not sources:
            return -1
        for i in range(many):
            count = v.integer(c.counts + 8 * i)
            excess = count - v.integer(c.limits + 8 * i) - draft
            if excess > 1 or (excess > 0 and count < 1):
                return -1
            gone += 1 if excess > 0 else 0
        if gone == 0:
            return 0
        for i in range(many):
            b, h = i // c.heads, i % c.heads
            line = c.score + b * c.score_batch + h * c.score_head
            place = c.positions + b * c.positions_batch + h * c.positions_head
            count, tokens = v.integer(c.counts + 8 * i), v.integer(c.tokens + 8 * b)
            if c.ahead and count > 0:
                at = tokens - 1 - v.integer(c.ahead_from + 8 * b)
                if not 0 <= at < c.ahead_tokens:
                    return -1
                known = v.read(v.F32, c.ahead + 4 * (i * c.ahead_tokens + at))
                v.write(line + 4 * (count - 1), known)
            row = -1
            if count - v.integer(c.limits + 8 * i) - draft > 0:
                end = tokens - draft - v.integer(c.recent + 8 * b)
                first = max(c.first, end - c.within) if c.within else c.first
                row = least_of(line, place, 0, count, first, end)
                if c.within and not first <= v.integer(place + 8 * row) < end:
                    return -1
            write_integer(c.rows + 8 * i, row)
        for i in range(many):
            row = v.integer(c.rows + 8 * i)
            if row >= 0:
                drop_of(c.sides, c.lines, i, row, c.counts + 8 * i)
        return gone

    @kept
    def scatter(
        batch: int, heads: int, source: int, source_batch: int, source_head: int, places: int,
        size: int,
    ) -> None:  # fmt: skip
        """See `evict.scatter`."""
        if not sources:
            return
        for i in range(batch * heads):
            row = source + i // heads * source_batch + i % heads * source_head
            v.copy(v.integer(places + 8 * i), row, size)

    return mass, least, drop, drop_least, scatter


mass, least, drop, drop_least, scatter = compiled(sources())
