"""The compiled loops of `choose_stream`: a unit is one KV head of one sequence.

    share[r, p]   exp(score[r, p] - shift of row r)
    joined[p]     sum_r (or max_r) share[r, p] / sum_p share[r, p]

This orders pages as the logarithm that `choose` joins them by, as long as nothing underflows: where
the last page taken would have a share below `LEAST`, logarithms are made after all.

The k best of a long line are first guessed by a bound from a sample; a guess that lets too few pass
is not used. The last of the best is found by its bits, in three digits; of its equals the first are
taken.

    memory of a unit   sums [rows], eight pages of all rows, digits, joined [n + 8], values [n + 8],
                       pages [n + 8], shares [rows][n + 8], scores [rows][n] where they are made
                       here, and the workspace that these need

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vattn.kernels import index_lanes as w
from vattn.kernels import lanes as v
from vattn.kernels.calls import (
    TAGS,
    counted,
    int32,
    reader,
    sources,
    write_int32,
    write_integer,
)
from vattn.kernels.index_loops import call_at as index_at
from vattn.kernels.index_loops import fill
from vattn.kernels.stream_loops import kept
from vattn.kernels.stream_tiles import EMPTY, jit

__all__ = ["DIGITS", "JOINS", "TAGS", "Call", "run", "run_index"]

SUM, MAX = 0, 1
JOINS = {"sum": SUM, "max": MAX}
SAMPLE = 4096  # pages of a sample; lines up to four times as long are looked at whole
DIGITS = 2048 * 8  # bytes of a digit's counts
ZERO, ONE = np.float32(0.0), np.float32(1.0)
GUESSES = 64  # eights of a row that its shift is guessed from
ABOVE = np.float32(60.0)  # how far a score may lie above that: exp overflows at 88
LEAST = np.float32(1e-34)  # shares below are not told apart: float32 ends at 1e-38


class Call(NamedTuple):
    """The words of one call, all int64; addresses (0 for none) and strides are in bytes."""

    kv_heads: int
    rows: int
    n: int
    scores: int  # float32 [batch, kv_heads, rows, n]; 0: made here, as `reads` says
    scores_batch: int
    scores_head: int
    scores_row: int
    reads: int  # the words of an `index_loops.Call`
    reads_bytes: int  # workspace of that
    join: int
    k: int
    first: int
    last: int
    starts: int  # int64 [batch]
    pages: int  # int64 [batch]
    ids: int  # int32 [batch, kv_heads, width]
    width: int
    filled: int  # int32 [batch, kv_heads], pages chosen
    units: int
    scratch: int  # workspace of each thread
    scratch_bytes: int
    counts: int  # int64: next unit, finished units, threads


call_at = reader(Call._fields)


def compiled(sources: int) -> Any:
    """Make `run`; see `calls.sources`."""

    @kept
    def run(words: int) -> None:
        """Draw units until there are none. Any number of threads may run the same call."""
        c = call_at(words)
        scratch = c.scratch + v.fetch_add(c.counts + 16, 1) * c.scratch_bytes
        while sources:
            pair = v.fetch_add(c.counts, 1)
            if pair >= c.units:
                break
            batch, head = pair // c.kv_heads, pair % c.kv_heads
            scores = c.scores + batch * c.scores_batch + head * c.scores_head
            choose(c, pair, scores, c.scores_row, scratch)
            v.fetch_add(c.counts + 8, 1)

    return run


def compiled_index(sources: int) -> Any:
    """Make `run_index`; see `calls.sources`."""

    @kept
    def run_index(tag_a: Any, tag_b: Any, words: int, scale: float) -> None:
        """`run`, with scores that are made on the way: no more than one head's at a time."""
        c = call_at(words)
        read = index_at(c.reads)
        scratch = c.scratch + v.fetch_add(c.counts + 16, 1) * c.scratch_bytes
        scores = scratch + c.reads_bytes
        while sources:
            pair = v.fetch_add(c.counts, 1)
            if pair >= c.units:
                break
            fill(tag_a, tag_b, read, np.float32(scale), pair, 0, c.n, scores, scratch)
            choose(c, pair, scores, 4 * c.n, scores + 4 * c.n * c.rows)
            v.fetch_add(c.counts + 8, 1)

    return run_index


@jit
def choose(c: Any, pair: int, scores: int, row: int, scratch: int) -> None:
    """Choose one KV head's pages."""
    sums, eight = scratch, scratch + (c.rows + 8) * 4
    digits = eight + c.rows * 32 + 32
    line = digits + DIGITS
    values = line + (c.n + 8) * 4
    found = values + (c.n + 8) * 4
    shares = found + (c.n + 8) * 4
    batch, n = pair // c.kv_heads, c.n
    start = min(n, max(0, counted(c.starts, batch, 0)))
    end = max(start, min(n, counted(c.pages, batch, n)))
    low = min(end, start + c.first)
    high = max(low, end - c.last)
    want, m = min(high - low, c.k - (low - start) - (end - high)), 0
    if want > 0:
        for r in range(c.rows):
            total = exponents(scores + r * row, n, shares + r * (n + 8) * 4, eight)
            v.write(sums + 4 * r, ONE / total if total != ZERO else ZERO)
        join(c, shares, sums, low, high, line)
        m = best(line, low, high, want, LEAST, digits, values, found)
        if m < want:
            join_logs(c, scores, row, shares, sums, low, high, eight, line)
            m = best(line, low, high, want, EMPTY, digits, values, found)
    ids, filled = c.ids + 4 * pair * c.width, 0
    for page in range(start, low):
        filled = put(ids, filled, c.width, page)
    for i in range(m):
        filled = put(ids, filled, c.width, int32(found + 4 * i))
    for page in range(high, end):
        filled = put(ids, filled, c.width, page)
    write_int32(c.filled + 4 * pair, filled)
    for i in range(filled, c.width):
        write_int32(ids + 4 * i, n)


@jit
def put(ids: int, filled: int, width: int, page: int) -> int:
    """Write one more page, where there is room; how many there are."""
    if filled >= width:
        return filled
    write_int32(ids + 4 * filled, page)
    return filled + 1


@jit
def exponents(row: int, n: int, target: int, spare: int) -> np.float32:
    """Write exp(score - shift) of a row's pages, and 0 up to a whole number of eights; their sum, 0
    where all are -inf. The shift is the largest of a sample, unless that is too far below all."""
    most = v.fill(EMPTY)
    for i in range(0, n, 8 * max(1, n // 8 // GUESSES)):
        most = v.larger(some_of(row, i, n, spare), most)
    guess, top = most_of(most), EMPTY
    while True:
        shift, sums = v.zero_if_empty(v.fill(guess)), v.fill(ZERO)
        for i in range(0, n, 8):
            some = some_of(row, i, n, spare)
            most = v.larger(some, most)
            share = v.exp(v.sub(some, shift))
            v.store(target + 4 * i, share)
            sums = v.add(sums, share)
        top = most_of(most)
        if (guess > EMPTY and top - guess <= ABOVE) or top == guess:
            break
        guess = top
    total = ZERO
    for i in range(8):
        total += w.pick(sums, i)
    return total


@jit
def most_of(lanes: Any) -> np.float32:
    """The largest lane."""
    top = w.pick(lanes, 0)
    for i in range(1, 8):
        top = max(top, w.pick(lanes, i))
    return top


@jit
def some_of(row: int, i: int, n: int, spare: int) -> Any:
    """Eight scores of a row, -inf behind its end."""
    if i + 8 <= n:
        return v.load(row + 4 * i)
    v.store(spare, v.fill(EMPTY))
    v.copy(spare, row + 4 * i, 4 * (n - i))
    return v.load(spare)


@jit
def join(c: Any, shares: int, factors: int, low: int, high: int, line: int) -> None:
    """Join the rows of pages low .. high, and a few more up to a whole number of eights."""
    each = (c.n + 8) * 4
    for i in range(low, high, 8):
        found = v.fill(ZERO)
        for r in range(c.rows):
            share, factor = v.load(shares + r * each + 4 * i), v.spread(factors + 4 * r)
            if c.join == SUM:
                found = v.fma(share, factor, found)
            else:
                found = v.larger(v.mul(share, factor), found)
        v.store(line + 4 * i, found)


@jit
def join_logs(
    c: Any,
    scores: int,
    row: int,
    shares: int,
    factors: int,
    low: int,
    high: int,
    eight: int,
    line: int,
) -> None:
    """`join`, as logarithms: where shares underflow. ``shares`` and ``factors`` are lost."""
    for r in range(c.rows):
        most, sums, total = v.fill(EMPTY), v.fill(ZERO), ZERO
        for i in range(0, c.n, 8):
            most = v.larger(some_of(scores + r * row, i, c.n, eight), most)
        shift = v.zero_if_empty(v.fill(most_of(most)))
        for i in range(0, c.n, 8):
            sums = v.add(sums, v.exp(v.sub(some_of(scores + r * row, i, c.n, eight), shift)))
        for i in range(8):
            total += w.pick(sums, i)
        log = np.float32(np.log(total)) if total != ZERO else ZERO
        v.write(factors + 4 * r, w.pick(shift, 0) + log)
    for i in range(low, high, 8):
        top, total = v.fill(EMPTY), v.fill(ZERO)
        for r in range(c.rows):
            there = some_of(scores + r * row, i, high, eight)
            share = v.sub(there, v.spread(factors + 4 * r))
            v.store(shares + 32 * r, share)
            top = v.larger(share, top)
        shift = v.zero_if_empty(top)
        for r in range(c.rows):
            total = v.add(total, v.exp(v.sub(v.load(shares + 32 * r), shift)))
        for lane in range(8):
            whole = np.log(w.pick(total, lane)) if c.join == SUM else 0.0
            v.write(line + 4 * (i + lane), w.pick(top, lane) + np.float32(whole))


@jit
def best(
    line: int,
    low: int,
    high: int,
    want: int,
    floor: np.float32,
    digits: int,
    values: int,
    found: int,
) -> int:
    """Write the ``want`` best above ``floor`` of pages low .. high to ``found``, ascending; how
    many there are."""
    n = high - low
    bound = floor
    if n > 4 * SAMPLE:
        stride, held = n // SAMPLE * 8, 0
        for i in range(low, high - 8, stride):
            v.store(values + 4 * held, v.load(line + 4 * i))
            held += 8
        # With room for chance: the guess should let more pages pass, not fewer.
        rank = want * held // n * 5 // 4 + 32
        if rank < held:
            bound = max(floor, value_of(kth(values, held, rank, digits)))
    m = passing(line, low, high, bound, values, found)
    if m < want and bound > floor:
        m = passing(line, low, high, floor, values, found)
    return m if m <= want else cut(values, found, m, want, digits)


@jit
def passing(line: int, low: int, high: int, bound: np.float32, values: int, found: int) -> int:
    """Write values above ``bound`` and their pages; how many there are."""
    limit, m = v.fill(bound), 0
    for i in range(low, high, 8):
        if not w.any_above(v.load(line + 4 * i), limit):
            continue
        for page in range(i, min(i + 8, high)):
            value = v.read(v.F32, line + 4 * page)
            # Written in any case, and kept by the next place: whether it counts is hard to foresee.
            v.write(values + 4 * m, value)
            write_int32(found + 4 * m, page)
            m += value > bound
    return m


@jit
def cut(values: int, found: int, m: int, want: int, digits: int) -> int:
    """Keep the ``want`` best of m > want pages, of equals the first."""
    last = kth(values, m, want, digits)
    equal = want
    for i in range(m):
        equal -= key_of(values + 4 * i) > last
    kept_ones = 0
    for i in range(m):
        key = key_of(values + 4 * i)
        if key > last or (key == last and equal > 0):
            equal -= key == last
            write_int32(found + 4 * kept_ones, int32(found + 4 * i))
            kept_ones += 1
    return kept_ones


@jit
def key_of(place: int) -> int:
    """A float32 as a number from 0 to 2^32 of the same order."""
    bits = int32(place)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 0x80000000


@jit
def value_of(key: int) -> np.float32:
    """The float32 of a key."""
    bits = key - 0x80000000
    return w.float_of(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@jit
def kth(values: int, m: int, k: int, digits: int) -> int:
    """The key of the k-th largest of m float32, 1 <= k <= m: eleven, eleven and ten bits of it."""
    prefix, left = 0, k
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        size, above = 1 << width, shift + width
        v.clear(digits, size * 8)
        for i in range(m):
            key = key_of(values + 4 * i)
            if key >> above == prefix:
                place = digits + 8 * ((key >> shift) & (size - 1))
                write_integer(place, v.integer(place) + 1)
        digit = size - 1
        while v.integer(digits + 8 * digit) < left:
            left -= v.integer(digits + 8 * digit)
            digit -= 1
        prefix = prefix << width | digit
    return prefix


FILES = sources("index_lanes.py", "index_signs.py", "index_loops.py")
run, run_index = compiled(FILES), compiled_index(FILES)
