"""The compiled loops of `stream`: one call is a list of *units*, drawn by any number of threads.

A unit is a chunk of one sequence's tokens, for a *span* of its KV heads. It walks blocks of tokens;
for each block and head, each tile of four query rows is taken through `stream_tiles`. A sequence of
one chunk writes its result; of several, each unit leaves its state in the workspace, and the last
of them to arrive joins all. Chunks do not depend on the number of threads or on the batch: neither
does any bit of the result.

    memory of a unit   q tiles [heads][tiles], states [heads][tiles], scores [tiles], padded rows

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numba
import numpy as np
from llvmlite import ir
from numba import njit

from vattn.kernels import lanes as v
from vattn.kernels.stream_tiles import (
    EMPTY,
    ROW_BYTES,
    ROWS,
    STATE_BYTES,
    STEP_BYTES,
    accumulate,
    clear,
    jit,
    join,
    pad,
    pad_block,
    scores,
    steps_of,
    weights,
)

BOOL, FLOAT32, BFLOAT16 = 1, 2, 3
TAGS = (v.F32, v.BF16, v.F16)


class Call(NamedTuple):
    """The words of one call, all int64; addresses (0 for none) and strides are in bytes."""

    batch: int
    kv_heads: int
    groups: int
    length: int  # query positions
    keys: int  # tokens of every sequence, where there are no lengths
    dim: int
    value_dim: int
    item: int  # bytes of an element
    q: int
    q_batch: int
    q_head: int
    q_row: int
    k: int
    k_batch: int
    k_head: int
    k_row: int
    v: int
    v_batch: int
    v_head: int
    v_row: int
    k_rows: int  # int64 [batch], addresses of each sequence's K and V, in place of k and v
    v_rows: int
    lengths: int  # int64 [batch]
    firsts: int  # int64 [batch + 1], first unit of each sequence
    causal: int  # 1: the queries are the last tokens
    window: int  # tokens a causal query sees, itself included; 0 for all
    out: int
    out_batch: int
    out_head: int
    out_row: int
    out_item: int  # bytes of an element: of the query's dtype, or float32
    lse: int  # float32 [batch, heads, length]
    logits: int  # float32 [batch, kv_heads, groups * length, tokens]
    logits_head: int
    logits_row: int
    mask: int
    mask_kind: int
    mask_batch: int
    mask_head: int
    mask_row: int
    mask_key: int
    span: int  # KV heads of a unit
    chunk: int  # tokens of a unit
    units: int
    block: int  # tokens whose scores are held at once
    states: int  # workspace of all units
    scratch: int  # workspace of each thread
    scratch_bytes: int
    counts: int  # int64: next unit, finished units, threads, arrivals [batch, spans]


# The words as the loops see them: a record goes from function to function as one pointer.
WORDS = numba.from_dtype(np.dtype([(name, np.int64) for name in Call._fields]))
POINTER = ir.ArrayType(ir.IntType(8), 8 * len(Call._fields)).as_pointer()


def kept(function: Any) -> Any:
    """Compile a function that Python calls; the code is kept on disk where that is possible."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that numba may write to: compiled anew in every process
        return njit(nogil=True)(function)


@v.word(WORDS, v.address)
def call_at(b: Any, place: Any) -> Any:
    """The call whose words lie at an address."""
    return b.inttoptr(place, POINTER)


def compiled(sources: int) -> Any:
    """Make `run`. numba finds kept code by this file's time and by what a function encloses: by
    ``sources``, a sum over all files that the code is made of."""

    @kept
    def run(tag: Any, words: int, scale: float) -> None:
        """Draw units until there are none. Any number of threads may run the same call."""
        c = call_at(words)
        scratch = c.scratch + v.fetch_add(c.counts + 16, 1) * c.scratch_bytes
        while sources:
            unit = v.fetch_add(c.counts, 1)
            if unit >= c.units:
                break
            work(tag, c, np.float32(scale), unit, scratch)
            v.fetch_add(c.counts + 8, 1)

    return run


@kept
def finished(words: int, spins: int) -> bool:
    """Whether all units are done; looks up to ``spins`` times."""
    c = call_at(words)
    while spins > 0 and v.fetch_add(c.counts + 8, 0) < c.units:
        spins -= 1
    return spins > 0


@jit
def tiles_of(c: Any) -> int:
    return (c.groups * c.length + ROWS - 1) // ROWS


@jit
def state_bytes(c: Any) -> int:
    return steps_of(c.value_dim) * STEP_BYTES + STATE_BYTES


@jit
def units_of(c: Any, unit: int) -> tuple[int, int, int]:
    """The sequence that a unit belongs to, and that sequence's first and last unit."""
    if c.firsts == 0:
        each = c.units // c.batch
        return unit // each, unit // each * each, unit // each * each + each
    batch = 0
    while v.integer(c.firsts + 8 * (batch + 1)) <= unit:
        batch += 1
    return batch, v.integer(c.firsts + 8 * batch), v.integer(c.firsts + 8 * (batch + 1))


@jit
def work(tag: Any, c: Any, scale: np.float32, unit: int, scratch: int) -> None:
    """Do one unit."""
    batch, first, last = units_of(c, unit)
    spans = (c.kv_heads + c.span - 1) // c.span
    chunks = (last - first) // spans
    span, chunk = (unit - first) // chunks, (unit - first) % chunks
    head = span * c.span
    heads = min(c.span, c.kv_heads - head)
    keys = c.keys if c.lengths == 0 else v.integer(c.lengths + 8 * batch)
    seen = max(0, keys - c.length + 1 - c.window) if c.window > 0 else 0
    start = (seen // c.chunk + chunk) * c.chunk
    stop = min(keys, start + c.chunk)
    tiles, each = heads * tiles_of(c), state_bytes(c)
    q, state = scratch, scratch + tiles * steps_of(c.dim) * STEP_BYTES
    spare = state + tiles * each
    if chunks > 1:
        state = c.states + unit * c.span * tiles_of(c) * each
    for i in range(heads):
        ready(tag, c, scale, batch, head + i, i, q, spare)
    for tile in range(tiles):
        clear(state + tile * each, steps_of(c.value_dim))
    for block in range(max(start, seen), stop, c.block):
        tokens = min(c.block, stop - block)
        for i in range(heads):
            attend(tag, c, batch, head, i, keys, block, tokens, q, state, spare)
    if chunks > 1:
        if v.fetch_add(c.counts + 24 + 8 * (batch * spans + span), 1) < chunks - 1:
            return
        state = c.states + (first + span * chunks) * c.span * tiles_of(c) * each
        for other in range(1, chunks):
            for tile in range(tiles):
                there = state + (other * c.span * tiles_of(c) + tile) * each
                join(state + tile * each, there, steps_of(c.value_dim))
    for i in range(heads):
        for tile in range(tiles_of(c)):
            there = state + (i * tiles_of(c) + tile) * each
            finish(tag, c, batch, head + i, tile, there, spare)


@jit
def ready(
    tag: Any, c: Any, scale: np.float32, batch: int, head: int, i: int, q: int, spare: int
) -> None:
    """Make the query tiles of a KV head, times scale; rows that fill up the last one are 0."""
    steps = steps_of(c.dim)
    factor, zero = v.fill(scale), v.fill(np.float32(0.0))
    for row in range(tiles_of(c) * ROWS):
        tile = q + (i * tiles_of(c) + row // ROWS) * steps * STEP_BYTES + row % ROWS * ROW_BYTES
        exists = row < c.groups * c.length
        source = c.q + batch * c.q_batch + (head * c.groups + row // c.length) * c.q_head
        source += row % c.length * c.q_row
        if exists and c.dim % 16:
            source = pad(source, spare, c.dim, c.item)
        for step in range(steps):
            low, high = zero, zero
            if exists:
                low, high = v.pair_load(tag, source + step * 16 * c.item)
            v.store(tile + step * STEP_BYTES, v.mul(low, factor))
            v.store(tile + step * STEP_BYTES + 32, v.mul(high, factor))


@jit
def attend(
    tag: Any,
    c: Any,
    batch: int,
    first: int,
    i: int,
    keys: int,
    block: int,
    tokens: int,
    q: int,
    state: int,
    spare: int,
) -> None:
    """Join a block of tokens to the states of the span's KV head ``i``; ``first`` is its first."""
    tiles, steps, outs = tiles_of(c), steps_of(c.dim), steps_of(c.value_dim)
    k, values = c.k + batch * c.k_batch, c.v + batch * c.v_batch
    if c.k_rows != 0:
        k, values = v.integer(c.k_rows + 8 * batch), v.integer(c.v_rows + 8 * batch)
    k, k_row = k + first * c.k_head + block * c.k_row, c.k_row
    values, v_row = values + first * c.v_head + block * c.v_row, c.v_row
    step = 16 * c.item
    side_by_side = c.k_row == c.span * c.dim * c.item and c.dim == c.value_dim
    if side_by_side and (c.span == 1 or c.k_head == c.dim * c.item):
        # Rows of all heads follow each other: each head asks for its share of the next block.
        share = tokens * c.dim * c.item
        v_ahead, v_ahead_row = values + tokens * v_row + i * share, c.dim * c.item
        k_ahead, k_ahead_row, k_ahead_step = k + tokens * k_row + i * share, step, tokens * step
    else:
        v_ahead, v_ahead_row = values + i * c.v_head, v_row
        k_ahead, k_ahead_row, k_ahead_step = k + tokens * k_row + i * c.k_head, k_row, step
    k, values = k + i * c.k_head, values + i * c.v_head
    s, spare = spare, spare + tiles * c.block * ROWS * 4
    if c.dim % 16:
        k, k_row = pad_block(k, k_row, tokens, c.dim, c.item, spare), steps * step
    for tile in range(tiles):
        here, some = s + tile * c.block * ROWS * 4, q + (i * tiles + tile) * steps * STEP_BYTES
        scores(tag, some, k, k_row, tokens, steps, here, v_ahead, v_ahead_row, step)
        if c.mask_kind:
            bias(c, batch, first + i, tile, block, tokens, here)
        if c.causal:
            fence(c, keys, tile, block, tokens, here)
        if c.logits:
            tell(c, batch, first + i, tile, block, tokens, here)
    if c.value_dim % 16:
        values, v_row = pad_block(values, v_row, tokens, c.value_dim, c.item, spare), outs * step
    for tile in range(tiles):
        here, there = s + tile * c.block * ROWS * 4, state + (i * tiles + tile) * state_bytes(c)
        factor, counts = weights(here, tokens, there + outs * STEP_BYTES)
        if counts:
            accumulate(
                tag,
                here,
                values,
                v_row,
                tokens,
                outs,
                there,
                factor,
                k_ahead,
                k_ahead_row,
                k_ahead_step,
            )


@jit
def fence(c: Any, keys: int, tile: int, block: int, tokens: int, s: int) -> None:
    """-inf for tokens behind a causal row's position, or before its window."""
    for r in range(ROWS):
        position = keys - c.length + (tile * ROWS + r) % c.length
        for t in range(max(0, position + 1 - block), tokens):
            v.write(s + (t * ROWS + r) * 4, EMPTY)
        if c.window > 0:
            for t in range(0, min(tokens, position + 1 - c.window - block)):
                v.write(s + (t * ROWS + r) * 4, EMPTY)


@jit
def tell(c: Any, batch: int, head: int, tile: int, block: int, tokens: int, s: int) -> None:
    """Write a tile of scores where the caller wants to see them."""
    target = c.logits + (batch * c.kv_heads + head) * c.logits_head + block * 4
    target += tile * ROWS * c.logits_row
    rows = min(ROWS, c.groups * c.length - tile * ROWS)
    eights = tokens // 8 * 8 if rows == ROWS else 0
    for t in range(0, eights, 8):
        v.turn(target + t * 4, s + t * ROWS * 4, c.logits_row)
    for r in range(rows):
        for t in range(eights, tokens):
            v.write(target + r * c.logits_row + t * 4, v.read(v.F32, s + (t * ROWS + r) * 4))


@jit
def bias(c: Any, batch: int, head: int, tile: int, block: int, tokens: int, s: int) -> None:
    """Add the mask to a tile of scores."""
    base = c.mask + batch * c.mask_batch + block * c.mask_key
    if c.mask_head == 0 and c.mask_row == 0:
        for t in range(0, tokens, 2):
            here = base + t * c.mask_key
            second = added(c, here + c.mask_key) if t + 1 < tokens else np.float32(0.0)
            both = v.halves(added(c, here), second)
            v.store(s + t * ROWS * 4, v.add(v.load(s + t * ROWS * 4), both))
        return
    for r in range(ROWS):
        row = min(tile * ROWS + r, c.groups * c.length - 1)
        here = base + (head * c.groups + row // c.length) * c.mask_head
        here += row % c.length * c.mask_row
        for t in range(tokens):
            place = s + (t * ROWS + r) * 4
            v.write(place, v.read(v.F32, place) + added(c, here + t * c.mask_key))


@jit
def added(c: Any, place: int) -> np.float32:
    """One element of the mask as what is added to a score."""
    if c.mask_kind == BOOL:
        return np.float32(0.0) if v.byte(place) else EMPTY
    if c.mask_kind == FLOAT32:
        return v.read(v.F32, place)
    if c.mask_kind == BFLOAT16:
        return v.read(v.BF16, place)
    return v.read(v.F16, place)


@jit
def finish(tag: Any, c: Any, batch: int, head: int, tile: int, state: int, spare: int) -> None:
    """Divide by the sums, round, write the rows and their log-sum-exp."""
    outs = steps_of(c.value_dim)
    ml = state + outs * STEP_BYTES
    for r in range(min(ROWS, c.groups * c.length - tile * ROWS)):
        row = tile * ROWS + r
        query_head, position = head * c.groups + row // c.length, row % c.length
        top = v.read(v.F32, ml + r * 4)
        total = v.read(v.F32, ml + 32 + r * 4) + v.read(v.F32, ml + 48 + r * 4)
        target = c.out + batch * c.out_batch + query_head * c.out_head + position * c.out_row
        here = spare if c.value_dim % 16 else target
        inverse = v.fill(np.float32(0.0) if total == 0.0 else np.float32(1.0) / total)
        for step in range(outs):
            place = state + step * STEP_BYTES + r * ROW_BYTES
            low, high = v.mul(v.load(place), inverse), v.mul(v.load(place + 32), inverse)
            if c.out_item == c.item:
                v.pair_store(tag, here + step * 16 * c.item, low, high)
            else:
                v.wide_store(tag, here + step * 16 * 4, low, high)
        if c.value_dim % 16:
            v.copy(target, spare, c.value_dim * c.out_item)
        if c.lse:
            place = (batch * c.kv_heads * c.groups + query_head) * c.length + position
            log = EMPTY if total == 0.0 else top + np.float32(np.log(total))
            v.write(c.lse + 4 * place, log)


FILES = [Path(__file__).with_name(name) for name in ("lanes.py", "stream_tiles.py")]
run = compiled(1 + crc32(b"".join(file.read_bytes() for file in FILES)))
