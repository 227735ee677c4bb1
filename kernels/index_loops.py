"""The compiled loops of `index_stream`: units of records, drawn by any number of threads.

A unit is a chunk of one KV head's records. Summaries and nibbles go through tiles of four query
rows, as `stream_tiles` says, a block of records at a time; sign codes through `index_signs`.

    memory of a unit   q tiles (with |q| behind them), scores, padded records

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vattn.kernels import index_lanes as w
from vattn.kernels import lanes as v
from vattn.kernels.calls import TAGS, counted, reader, sources
from vattn.kernels.index_lanes import TABLE_BYTES, TOKENS
from vattn.kernels.index_signs import signs
from vattn.kernels.stream_loops import kept
from vattn.kernels.stream_tiles import (
    EMPTY,
    ROW_BYTES,
    ROWS,
    STEP_BYTES,
    jit,
    pad,
    pad_block,
    scores,
    steps_of,
)

__all__ = ["BLOCK", "FORMATS", "ROWS", "STEP_BYTES", "TABLE_BYTES", "TAGS", "TOKENS", "Call", "run"]

SUMMARIES, SIGNS, NIBBLES = 0, 1, 2
FORMATS = {"summaries": SUMMARIES, "signs": SIGNS, "nibbles": NIBBLES}
BLOCK = 64  # records whose scores are held at once; whole groups of `TOKENS`
BLOCK_SCORES = BLOCK * ROWS * 4
ZERO = np.float32(0.0)


class Call(NamedTuple):
    """The words of one call, all int64; addresses (0 for none) and strides are in bytes."""

    format: int
    kv_heads: int
    rows: int  # query rows of a KV head
    dim: int
    q: int  # float32 [batch, kv_heads, rows, dim]
    records: int
    held: int  # records of every sequence, where there are no counts
    counted: int  # int64 [batch]
    slots: int  # int64 [batch]
    a: int  # the first part
    a_batch: int
    a_head: int
    a_row: int
    a_item: int
    b: int  # the second part, 0 for none
    b_batch: int
    b_head: int
    b_row: int
    b_item: int
    out: int  # float32 [batch, kv_heads, rows, records]
    chunk: int  # records of a unit
    chunks: int  # units of a KV head
    units: int
    scratch: int  # workspace of each thread
    scratch_bytes: int
    counts: int  # int64: next unit, finished units, threads


call_at = reader(Call._fields)


def compiled(sources: int) -> Any:
    """Make `run`; see `calls.sources`."""

    @kept
    def run(tag_a: Any, tag_b: Any, words: int, scale: float) -> None:
        """Draw units until there are none. Any number of threads may run the same call."""
        c = call_at(words)
        scratch = c.scratch + v.fetch_add(c.counts + 16, 1) * c.scratch_bytes
        while sources:
            unit = v.fetch_add(c.counts, 1)
            if unit >= c.units:
                break
            pair, first = unit // c.chunks, unit % c.chunks * c.chunk
            records = min(c.chunk, c.records - first)
            target = c.out + 4 * (pair * c.rows * c.records + first)
            fill(tag_a, tag_b, c, np.float32(scale), pair, first, records, target, scratch)
            v.fetch_add(c.counts + 8, 1)

    return run


@jit
def tiles_of(c: Any) -> int:
    return (c.rows + ROWS - 1) // ROWS


@jit
def fill(
    tag_a: Any,
    tag_b: Any,
    c: Any,
    scale: np.float32,
    pair: int,
    first: int,
    records: int,
    target: int,
    scratch: int,
) -> None:
    """Write the scores of records from ``first`` on, for all rows of a KV head, -inf behind those
    that there are; row r at ``target + r * 4 * c.records``."""
    batch, head = pair // c.kv_heads, pair % c.kv_heads
    there = max(0, min(records, counted(c.counted, batch, c.held) - first))
    slot = counted(c.slots, batch, batch)
    a = c.a + slot * c.a_batch + head * c.a_head + first * c.a_row
    b = c.b + slot * c.b_batch + head * c.b_head + first * c.b_row
    q = c.q + 4 * pair * c.rows * c.dim
    if there and c.format == SIGNS:
        signs(c, scale, q, a, b, there, target, scratch)
    elif there and c.format == NIBBLES:
        nibbles(c, scale, q, a, b, there, target, scratch)
    elif there:
        summaries(tag_a, tag_b, c, scale, q, a, b, there, target, scratch)
    for row in range(c.rows):
        for record in range(there, records):
            v.write(target + 4 * (row * c.records + record), EMPTY)


@jit
def ready(
    tag: Any, c: Any, scale: np.float32, q: int, absolute: bool, target: int, spare: int
) -> None:
    """Make the query tiles of a KV head, times scale; rows that fill up the last one are 0."""
    steps = steps_of(c.dim)
    factor, zero = v.fill(scale), v.fill(ZERO)
    for row in range(tiles_of(c) * ROWS):
        tile = target + row // ROWS * steps * STEP_BYTES + row % ROWS * ROW_BYTES
        source = q + 4 * row * c.dim
        if row < c.rows and c.dim % 16:
            source = pad(source, spare, c.dim, 4)
        for step in range(steps):
            low, high = zero, zero
            if row < c.rows:
                low, high = w.ordered(tag, source + 64 * step)
            if absolute:
                low, high = w.absolute(low), w.absolute(high)
            v.store(tile + step * STEP_BYTES, v.mul(low, factor))
            v.store(tile + step * STEP_BYTES + 32, v.mul(high, factor))


@jit
def spill(c: Any, tile: int, s: int, records: int, target: int) -> None:
    """Write a tile's block of scores [records][4 rows] as rows."""
    rows = min(ROWS, c.rows - tile * ROWS)
    target += 4 * tile * ROWS * c.records
    for record in range(0, records // 8 * 8, 8):
        here = s + record * ROWS * 4
        turned = w.turn(v.load(here), v.load(here + 32), v.load(here + 64), v.load(here + 96))
        v.store(target + 4 * record, turned[0])
        if rows > 1:
            v.store(target + 4 * (c.records + record), turned[1])
        if rows > 2:
            v.store(target + 4 * (2 * c.records + record), turned[2])
        if rows > 3:
            v.store(target + 4 * (3 * c.records + record), turned[3])
    for record in range(records // 8 * 8, records):
        for row in range(rows):
            found = v.read(v.F32, s + 4 * (record * ROWS + row))
            v.write(target + 4 * (row * c.records + record), found)


# ---- summaries -----------------------------------------------------------------------------------
@jit
def summaries(
    tag_a: Any,
    tag_b: Any,
    c: Any,
    scale: np.float32,
    q: int,
    a: int,
    b: int,
    records: int,
    target: int,
    scratch: int,
) -> None:
    """q . a, and |q| . b where there is a second part, a block of records at a time."""
    tiles, steps = tiles_of(c), steps_of(c.dim)
    size = tiles * steps * STEP_BYTES
    s, more, spare = scratch + 2 * size, scratch + 2 * size + BLOCK_SCORES, 0
    spare = more + BLOCK_SCORES
    ready(tag_a, c, scale, q, False, scratch, spare)
    if c.b:
        ready(tag_b, c, scale, q, True, scratch + size, spare)
    for block in range(0, records, BLOCK):
        some = min(BLOCK, records - block)
        rows, row = padded(a + block * c.a_row, c.a_row, some, c.dim, c.a_item, spare)
        others, other = b + block * c.b_row, c.b_row
        if c.b:
            behind = spare + BLOCK * steps * 64
            others, other = padded(others, other, some, c.dim, c.b_item, behind)
        for tile in range(tiles):
            here = scratch + tile * steps * STEP_BYTES
            after, after_step = rows + some * row, 16 * c.a_item
            scores(tag_a, here, rows, row, some, steps, s, after, row, after_step)
            if c.b:
                after, after_step = others + some * other, 16 * c.b_item
                scores(
                    tag_b, here + size, others, other, some, steps, more, after, other, after_step
                )
                for place in range(0, (some + 1) // 2 * 32, 32):
                    v.store(s + place, v.add(v.load(s + place), v.load(more + place)))
            spill(c, tile, s, some, target + 4 * block)


@jit
def padded(rows: int, row: int, count: int, dim: int, item: int, spare: int) -> tuple[int, int]:
    """Rows of whole steps: these, or a copy in ``spare``; where they lie, and their stride."""
    if dim % 16 == 0:
        return rows, row
    return pad_block(rows, row, count, dim, item, spare), steps_of(dim) * 16 * item


# ---- nibbles -------------------------------------------------------------------------------------
@jit
def nibbles(
    c: Any,
    scale: np.float32,
    q: int,
    a: int,
    b: int,
    records: int,
    target: int,
    scratch: int,
) -> None:
    """step * q . code + least * sum(q), a block of records at a time."""
    tiles, steps = tiles_of(c), steps_of(c.dim)
    s = scratch + tiles * steps * STEP_BYTES
    totals = s + BLOCK_SCORES
    spare = totals + tiles * 32
    ready(v.BF16, c, scale, q, False, scratch, spare)
    for tile in range(tiles):
        row_sums(scratch + tile * steps * STEP_BYTES, steps, totals + 32 * tile)
    for block in range(0, records, BLOCK):
        some = min(BLOCK, records - block)
        codes, row = a + block * c.a_row, c.a_row
        if c.dim % 16:
            for record in range(some):
                place = spare + record * steps * 8
                v.clear(place, steps * 8)
                v.copy(place, codes + record * c.a_row, c.dim // 2)
            codes, row = spare, steps * 8
        for tile in range(tiles):
            coded(scratch + tile * steps * STEP_BYTES, codes, row, some, steps, s)
            least = v.load(totals + 32 * tile)
            for record in range(0, some, 2):
                one = b + (block + record) * c.b_row
                two = one + c.b_row if record + 1 < some else one
                step = v.halves(v.read(v.F16, one), v.read(v.F16, two))
                base = v.halves(v.read(v.F16, one + 2), v.read(v.F16, two + 2))
                place = s + record * ROWS * 4
                v.store(place, v.fma(v.load(place), step, v.mul(base, least)))
            spill(c, tile, s, some, target + 4 * block)


@jit
def row_sums(q: int, steps: int, target: int) -> None:
    """The sum of each row of a tile, twice."""
    a0 = a1 = a2 = a3 = v.fill(ZERO)
    for here in range(q, q + steps * STEP_BYTES, STEP_BYTES):
        a0 = v.add(a0, v.add(v.load(here), v.load(here + 32)))
        a1 = v.add(a1, v.add(v.load(here + 64), v.load(here + 96)))
        a2 = v.add(a2, v.add(v.load(here + 128), v.load(here + 160)))
        a3 = v.add(a3, v.add(v.load(here + 192), v.load(here + 224)))
    v.store(target, v.sums(a0, a1, a2, a3, a0, a1, a2, a3))


@jit
def coded(q: int, rows: int, row: int, records: int, steps: int, s: int) -> None:
    """`stream_tiles.scores` of nibbles."""
    for t in range(0, records, 2):
        k0 = rows + t * row
        k1 = k0 + row if t + 1 < records else k0
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = v.fill(ZERO)
        for step in range(steps):
            low0, high0 = w.nibbles(k0 + step * 8)
            low1, high1 = w.nibbles(k1 + step * 8)
            here = q + step * STEP_BYTES
            x = v.load(here)
            a0, b0 = v.fma(x, low0, a0), v.fma(x, low1, b0)
            x = v.load(here + 64)
            a1, b1 = v.fma(x, low0, a1), v.fma(x, low1, b1)
            x = v.load(here + 128)
            a2, b2 = v.fma(x, low0, a2), v.fma(x, low1, b2)
            x = v.load(here + 192)
            a3, b3 = v.fma(x, low0, a3), v.fma(x, low1, b3)
            x = v.load(here + 32)
            a0, b0 = v.fma(x, high0, a0), v.fma(x, high1, b0)
            x = v.load(here + 96)
            a1, b1 = v.fma(x, high0, a1), v.fma(x, high1, b1)
            x = v.load(here + 160)
            a2, b2 = v.fma(x, high0, a2), v.fma(x, high1, b2)
            x = v.load(here + 224)
            a3, b3 = v.fma(x, high0, a3), v.fma(x, high1, b3)
        v.store(s + t * ROWS * 4, v.sums(a0, a1, a2, a3, b0, b1, b2, b3))


run = compiled(sources("index_lanes.py", "index_signs.py"))
