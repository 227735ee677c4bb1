"""The compiled loops of `columns`. Addresses and strides are in bytes.

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np

from vattn.kernels import lanes as v
from vattn.kernels.calls import reader, sources
from vattn.kernels.stream_loops import kept
from vattn.kernels.stream_tiles import jit

# What a call is made of, as int64 words.
WORDS = (
    "heads",  # of a sequence
    "rows",  # queries in this block
    "scores",  # float32 [batch, heads, rows, width], overwritten
    "width",
    "ends",  # int64 [batch], keys that the block's first row sees
    "total",  # float32 [batch, heads, n], added to, as are the next two
    "square",
    "n",
    "entropy",  # float32 [batch, heads]
    "units",
    "counts",
)
NOTHING, LOWEST = np.float32(0.0), np.float32(-3e38)
call_at = reader(WORDS)


@jit
def summed(lanes: Any) -> Any:
    """The sum of eight numbers."""
    found = v.lane(lanes, 0)
    for i in range(1, 8):
        found = v.add(found, v.lane(lanes, i))
    return v.number(found)


@jit
def highest(lanes: Any) -> Any:
    """The largest of eight numbers."""
    found = v.lane(lanes, 0)
    for i in range(1, 8):
        found = v.larger(found, v.lane(lanes, i))
    return v.number(found)


@jit
def row(line: int, seen: int, total: int, square: int) -> Any:
    """Add a row's weights; returns its entropy. ``line`` holds ``seen`` scores."""
    eights = seen - seen % 8
    tops = v.fill(LOWEST)
    for at in range(0, eights, 8):
        tops = v.larger(v.load(line + 4 * at), tops)
    top = highest(tops)
    for at in range(eights, seen):
        value = v.read(v.F32, line + 4 * at)
        top = value if value > top else top
    # Less than nothing times its weight of zero is to be zero.
    shift, least = v.fill(top), v.fill(LOWEST)
    mass, product = v.fill(NOTHING), v.fill(NOTHING)
    for at in range(0, eights, 8):
        below = v.larger(least, v.sub(v.load(line + 4 * at), shift))
        weight = v.exp(below)
        v.store(line + 4 * at, weight)
        mass, product = v.add(mass, weight), v.fma(weight, below, product)
    whole, mixed = summed(mass), summed(product)
    for at in range(eights, seen):
        below = v.larger(least, v.sub(v.fill(v.read(v.F32, line + 4 * at)), shift))
        weight = v.exp(below)
        v.write(line + 4 * at, v.number(weight))
        whole += v.number(weight)
        mixed += v.number(v.mul(weight, below))
    # Scores that are all -inf have no weights; a division by zero would raise.
    share = np.float32(1.0) / whole if whole != NOTHING else np.float32(np.nan)
    each = v.fill(share)
    for at in range(0, eights, 8):
        weight = v.mul(v.load(line + 4 * at), each)
        v.store(total + 4 * at, v.add(v.load(total + 4 * at), weight))
        v.store(square + 4 * at, v.fma(weight, weight, v.load(square + 4 * at)))
    for at in range(eights, seen):
        part = v.read(v.F32, line + 4 * at) * share
        v.write(total + 4 * at, v.read(v.F32, total + 4 * at) + part)
        v.write(square + 4 * at, v.read(v.F32, square + 4 * at) + part * part)
    return log(whole) - mixed * share


def compiled(sources: int) -> Any:
    """Make `run`; see `calls.sources`."""

    @kept
    def run(words: int) -> None:
        """Draw heads until there are none. Any number of threads may run the same call."""
        c = call_at(words)
        while sources:
            unit = v.fetch_add(c.counts, 1)
            if unit >= c.units:
                return
            seen = v.integer(c.ends + 8 * (unit // c.heads))
            line = c.scores + 4 * unit * c.rows * c.width
            total, square = c.total + 4 * unit * c.n, c.square + 4 * unit * c.n
            entropy = 0.0
            for r in range(c.rows):
                entropy += row(line + 4 * r * c.width, seen + r, total, square)
            place = c.entropy + 4 * unit
            v.write(place, v.read(v.F32, place) + np.float32(entropy))
            v.fetch_add(c.counts + 8, 1)

    return run


run = compiled(sources())
