"""The compiled loops of `evict`. Addresses and strides are in bytes.

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vattn.kernels import lanes as v
from vattn.kernels.calls import sources, write_integer
from vattn.kernels.stream_loops import kept

BEST = np.float32(np.inf)


def compiled(sources: int) -> Any:
    """Make `mass`, `least`, `fill` and `scatter`; see `calls.sources`."""

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
            mask = forced + b * forced_batch + h * forced_head
            count, end = v.integer(counts + 8 * i), v.integer(last + 8 * b)
            lowest, found = BEST, -1
            for row in range(count):
                value = v.read(v.F32, line + 4 * row)
                if value <= lowest and value < BEST:
                    at = v.integer(place + 8 * row)
                    if first <= at < end and not (forced and v.byte(mask + row)):
                        lowest, found = value, row
            if found < 0:
                found = 0
                for row in range(1, count):
                    if v.integer(place + 8 * row) < v.integer(place + 8 * found):
                        found = row
            write_integer(rows + 8 * i, found)

    @kept
    def fill(heads: int, sides: int, words: int, rows: int, last: int) -> None:
        """See `evict.fill`; of each side: base, bytes of a slot, a row and what moves of it, slots,
        and whether to clear."""
        if not sources:
            return
        for side in range(sides):
            of = words + 48 * side
            base, slot, row, size = (
                v.integer(of), v.integer(of + 8), v.integer(of + 16), v.integer(of + 24),
            )  # fmt: skip
            slots, clear = v.integer(of + 32), v.integer(of + 40)
            for i in range(heads):
                line = base + v.integer(slots + 8 * i) * slot
                target, source = v.integer(rows + 8 * i), v.integer(last + 8 * i)
                if 0 <= target != source:
                    v.copy(line + target * row, line + source * row, size)
                if clear and target >= 0:
                    v.clear(line + source * row, size)

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

    return mass, least, fill, scatter


mass, least, fill, scatter = compiled(sources())
