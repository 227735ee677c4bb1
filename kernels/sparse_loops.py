"""The compiled loops of `sparse_stream`: units of chosen tokens, drawn by any number of threads.

A unit is a chunk of one KV head's list of pages. Its tokens, cut to those that are there, are
listed by position; blocks of them go through `stream_tiles`, each row read where it lies, and the
next block is asked for. A head of one chunk writes its result; of several, each leaves its state in
the workspace, and the last to arrive joins all. Chunks do not depend on the number of threads or
on the batch: neither does any bit of the result.

    memory of a unit   q tiles, states, scores [tiles][BLOCK], padded rows, positions, log-weights
    logits             [B, Hkv][tiles][chunks][tokens of a chunk][ROWS], where the mass is wanted

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vattn.kernels import lanes as v
from vattn.kernels.calls import TAGS, counted, int32, reader, sources, write_integer
from vattn.kernels.sparse_tiles import BLOCK, add, gather, listed
from vattn.kernels.stream_loops import kept
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
    scores,
    steps_of,
    weights,
)

__all__ = ["BLOCK", "ROWS", "STATE_BYTES", "STEP_BYTES", "TAGS", "Call", "run"]

BLOCK_SCORES = BLOCK * ROWS * 4
LINE = 64  # bytes of a line of the processor's cache


class Call(NamedTuple):
    """The words of one call, all int64; addresses (0 for none) and strides are in bytes."""

    kv_heads: int
    groups: int
    length: int  # query positions
    keys: int  # tokens of a sequence, where there are no lengths
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
    slots: int  # int64 [batch], as the next two
    starts: int
    lengths: int
    key_scale: int  # float32, as the next but one
    key_scale_step: int
    value_scale: int
    value_scale_step: int
    ids: int  # int32 [batch, kv_heads, entries]
    filled: int  # int32 [batch, kv_heads], entries that count
    log_weights: int  # float32 as ids
    entries: int
    page_tokens: int
    out: int
    out_batch: int
    out_head: int
    out_row: int
    lse: int  # float32 [batch, heads, length]
    mass: int  # float32 as ids
    chunk: int  # entries of a unit
    chunks: int  # units of a KV head
    units: int
    states: int  # workspace of all units
    logits: int
    scratch: int  # workspace of each thread
    scratch_bytes: int
    counts: int  # int64: next unit, finished units, threads, arrivals [batch, kv_heads]


call_at = reader(Call._fields)


def compiled(sources: int) -> Any:
    """Make `run`; see `calls.sources`."""

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


@jit
def tiles_of(c: Any) -> int:
    return (c.groups * c.length + ROWS - 1) // ROWS


@jit
def state_bytes(c: Any) -> int:
    return steps_of(c.value_dim) * STEP_BYTES + STATE_BYTES


@jit
def even(tokens: int) -> int:
    """Tokens come in pairs."""
    return (tokens + 1) // 2 * 2


@jit
def logits_at(c: Any, pair: int, tile: int, chunk: int) -> int:
    """Where the logits of a chunk lie."""
    tokens = even(c.chunk * c.page_tokens)
    return c.logits + ((pair * tiles_of(c) + tile) * c.chunks + chunk) * tokens * ROWS * 4


@jit
def weights_at(c: Any, places: int) -> int:
    """Where the log-weights of listed tokens lie."""
    return places + 8 * (c.chunk * c.page_tokens + BLOCK)


@jit
def entry_at(c: Any, base: int, pair: int, entry: int) -> int:
    """Where an entry of ids, or of a tensor of their shape, lies."""
    return base + 4 * (pair * c.entries + entry)


@jit
def span(c: Any, batch: int) -> tuple[int, int]:
    """The positions of a sequence that may be read."""
    return counted(c.starts, batch, 0), counted(c.lengths, batch, c.keys)


@jit
def page(c: Any, pair: int, entry: int, start: int, end: int) -> tuple[int, int]:
    """The positions of an entry's page, cut to those that are there."""
    first = int32(entry_at(c, c.ids, pair, entry)) * c.page_tokens
    return max(first, start), min(first + c.page_tokens, end)


@jit
def work(tag: Any, c: Any, scale: np.float32, unit: int, scratch: int) -> None:
    """Do one unit."""
    pair, chunk = unit // c.chunks, unit % c.chunks
    batch, head = pair // c.kv_heads, pair % c.kv_heads
    count = max(0, min(c.entries, int32(c.filled + 4 * pair)))
    chunks = max(1, (count + c.chunk - 1) // c.chunk)
    if chunk >= chunks:
        return
    slot, end = counted(c.slots, batch, batch), counted(c.lengths, batch, c.keys)
    k = c.k + slot * c.k_batch + head * c.k_head
    values = c.v + slot * c.v_batch + head * c.v_head
    tiles, each = tiles_of(c), state_bytes(c)
    q = scratch
    state = q + tiles * steps_of(c.dim) * STEP_BYTES
    s = state + tiles * each
    spare = s + tiles * BLOCK_SCORES
    places = spare + BLOCK * max(steps_of(c.dim), steps_of(c.value_dim)) * 16 * c.item
    tokens, last = expand(c, pair, chunk, count, places)
    for t in range(min(tokens, BLOCK)):
        ask(k + v.integer(places + 8 * t) * c.k_row, c.dim * c.item)
    ready(tag, c, scale, batch, head, q, spare)
    if chunks > 1:
        state = c.states + unit * tiles * each
    for tile in range(tiles):
        clear(state + tile * each, steps_of(c.value_dim))
    for block in range(0, tokens, BLOCK):
        some = min(BLOCK, tokens - block)
        attend(tag, c, k, values, end, pair, chunk, block, some, last, places, q, state, s, spare)
    if chunks > 1:
        if v.fetch_add(c.counts + 24 + 8 * pair, 1) < chunks - 1:
            return
        state = c.states + pair * c.chunks * tiles * each
        for other in range(1, chunks):
            for tile in range(tiles):
                there = state + (other * tiles + tile) * each
                join(state + tile * each, there, steps_of(c.value_dim))
    for tile in range(tiles):
        finish(tag, c, pair, tile, state + tile * each, spare)
        if c.mass:
            shares(c, pair, tile, count, spare)


@jit
def expand(c: Any, pair: int, chunk: int, count: int, places: int) -> tuple[int, int]:
    """List the positions of a chunk's tokens and their log-weights: how many there are, and the
    last position. Behind them stands a block that may be asked for in vain."""
    start, end = span(c, pair // c.kv_heads)
    weight, tokens, last = weights_at(c, places), 0, start
    for entry in range(chunk * c.chunk, min(count, (chunk + 1) * c.chunk)):
        first, stop = page(c, pair, entry, start, end)
        for position in range(first, stop):
            write_integer(places + 8 * tokens, position)
            if c.log_weights:
                v.write(weight + 4 * tokens, v.read(v.F32, entry_at(c, c.log_weights, pair, entry)))
            tokens += 1
        last = max(last, stop - 1)
    for t in range(tokens, tokens + BLOCK):
        write_integer(places + 8 * t, last)
    v.write(weight + 4 * tokens, np.float32(0.0))
    return tokens, last


@jit
def ask(row: int, size: int) -> None:
    """Ask for the lines of a row."""
    for place in range(row, row + size, LINE):
        v.prefetch(place)


@jit
def ready(tag: Any, c: Any, scale: np.float32, batch: int, head: int, q: int, spare: int) -> None:
    """Make the query tiles of a KV head, times scale; rows that fill up the last one are 0."""
    steps = steps_of(c.dim)
    if c.key_scale:
        scale *= v.read(v.F32, c.key_scale + head * c.key_scale_step)
    factor, zero = v.fill(scale), v.fill(np.float32(0.0))
    for row in range(tiles_of(c) * ROWS):
        tile = q + row // ROWS * steps * STEP_BYTES + row % ROWS * ROW_BYTES
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
    k: int,
    values: int,
    end: int,
    pair: int,
    chunk: int,
    block: int,
    tokens: int,
    last: int,
    places: int,
    q: int,
    state: int,
    s: int,
    spare: int,
) -> None:
    """Join a block of a chunk's tokens, the last of them at ``last`` or before, to the states."""
    tiles, steps, outs = tiles_of(c), steps_of(c.dim), steps_of(c.value_dim)
    step, each, here = 16 * c.item, state_bytes(c), places + 8 * block
    if c.dim % 16:
        gather(k, c.k_row, here, tokens, c.dim, c.item, spare)
    for tile in range(tiles):
        some, at = q + tile * steps * STEP_BYTES, s + tile * BLOCK_SCORES
        if c.dim % 16:
            scores(tag, some, spare, steps * step, tokens, steps, at, values, 0, step)
        else:
            listed(tag, some, k, c.k_row, here, tokens, steps, at, values, c.v_row)
        if c.log_weights:
            weigh(weights_at(c, places) + 4 * block, tokens, at)
        if last > end - c.length:
            fence(c, end, tile, here, tokens, at)
        if c.mass:
            target = logits_at(c, pair, tile, chunk) + block * ROWS * 4
            v.copy(target, at, even(tokens) * ROWS * 4)
    if c.value_dim % 16:
        gather(values, c.v_row, here, tokens, c.value_dim, c.item, spare)
    for tile in range(tiles):
        at, there = s + tile * BLOCK_SCORES, state + tile * each
        factor, counts = weights(at, tokens, there + outs * STEP_BYTES)
        if counts and c.value_dim % 16:
            row = outs * step
            accumulate(tag, at, spare, row, tokens, outs, there, factor, k, 0, step)
        elif counts:
            add(tag, at, values, c.v_row, here, tokens, outs, there, factor, k, c.k_row)


@jit
def weigh(weight: int, tokens: int, s: int) -> None:
    """Add each token's log-weight to its scores; the one behind an odd last token is 0."""
    for t in range(0, tokens, 2):
        both = v.halves(v.read(v.F32, weight + 4 * t), v.read(v.F32, weight + 4 * t + 4))
        v.store(s + t * ROWS * 4, v.add(v.load(s + t * ROWS * 4), both))


@jit
def fence(c: Any, end: int, tile: int, places: int, tokens: int, s: int) -> None:
    """-inf for tokens behind a row's own position."""
    for r in range(ROWS):
        position = end - c.length + (tile * ROWS + r) % c.length
        for t in range(tokens):
            if v.integer(places + 8 * t) > position:
                v.write(s + (t * ROWS + r) * 4, EMPTY)


@jit
def finish(tag: Any, c: Any, pair: int, tile: int, state: int, spare: int) -> None:
    """Divide by the sums, round, write the rows and their log-sum-exp; leave the latter in
    ``spare``, twice a row, +inf for rows that count in no mass."""
    batch, head = pair // c.kv_heads, pair % c.kv_heads
    outs = steps_of(c.value_dim)
    ml = state + outs * STEP_BYTES
    factor = np.float32(1.0)
    if c.value_scale:
        factor = v.read(v.F32, c.value_scale + head * c.value_scale_step)
    v.store(spare, v.fill(-EMPTY))
    for r in range(min(ROWS, c.groups * c.length - tile * ROWS)):
        row = tile * ROWS + r
        query_head, position = head * c.groups + row // c.length, row % c.length
        top = v.read(v.F32, ml + r * 4)
        total = v.read(v.F32, ml + 32 + r * 4) + v.read(v.F32, ml + 48 + r * 4)
        target = c.out + batch * c.out_batch + query_head * c.out_head + position * c.out_row
        here = spare + ROW_BYTES if c.value_dim % 16 else target
        inverse = v.fill(np.float32(0.0) if total == 0.0 else factor / total)
        for step in range(outs):
            place = state + step * STEP_BYTES + r * ROW_BYTES
            low, high = v.mul(v.load(place), inverse), v.mul(v.load(place + 32), inverse)
            v.pair_store(tag, here + step * 16 * c.item, low, high)
        if c.value_dim % 16:
            v.copy(target, here, c.value_dim * c.item)
        log = EMPTY
        if total != 0.0:
            log = top + np.float32(np.log(total))
            v.write(spare + 4 * r, log)
            v.write(spare + 16 + 4 * r, log)
        v.write(c.lse + 4 * ((pair * c.groups + row // c.length) * c.length + position), log)


@jit
def shares(c: Any, pair: int, tile: int, count: int, norm: int) -> None:
    """Add a tile's softmax weights to the mass of each entry; ``norm`` is as `finish` leaves it."""
    start, end = span(c, pair // c.kv_heads)
    lse = v.load(norm)
    for chunk in range((count + c.chunk - 1) // c.chunk):
        entries = range(chunk * c.chunk, min(count, (chunk + 1) * c.chunk))
        base, tokens = logits_at(c, pair, tile, chunk), 0
        for entry in entries:
            first, stop = page(c, pair, entry, start, end)
            tokens += max(0, stop - first)
        for place in range(base, base + even(tokens) * ROWS * 4, 32):
            v.store(place, v.exp(v.sub(v.load(place), lse)))
        place = base
        for entry in entries:
            first, stop = page(c, pair, entry, start, end)
            target = entry_at(c, c.mass, pair, entry)
            total = v.read(v.F32, target)
            for _ in range(max(0, stop - first) * ROWS):
                total += v.read(v.F32, place)
                place += 4
            v.write(target, total)


run = compiled(sources("sparse_tiles.py"))
