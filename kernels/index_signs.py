"""Scores of sign codes by tables, for `index_loops`.

    table of row r, nibble m   sums of four channels of q with all sixteen patterns of signs
    score                      sum over m of table[nibble m of the code], times the token's scale

Tables are of 14 bits, in steps of 2 max_m(sum |q_c|) / 16383: a score is off by half a step a
nibble at most. Codes of 32 tokens are turned such that a register holds one nibble of each; a table
is then looked up 32 times by one instruction, for its seven low bits and for its seven high ones.

    workspace   tables [rows][nibbles], (step, offset) [rows], scales [32], codes [nibbles][32], and
                codes of whole sixteens, or a group's scores

Imports numba at the top: import this module only where numba is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vattn.kernels import index_lanes as w
from vattn.kernels import lanes as v
from vattn.kernels.index_lanes import TABLE_BYTES, TOKENS
from vattn.kernels.stream_tiles import jit

LEVELS = np.float32(16383)
ZERO = np.float32(0.0)


@jit
def nibbles_of(dim: int) -> int:
    """Nibbles of a code, those of a last byte that is not full included."""
    return (dim + 7) // 8 * 2


@jit
def signs(
    c: Any,
    scale: np.float32,
    q: int,
    a: int,
    b: int,
    records: int,
    target: int,
    scratch: int,
) -> None:
    """Sums of table entries, 32 records at a time."""
    count, width = nibbles_of(c.dim), nibbles_of(c.dim) // 2
    steps = scratch + c.rows * count * TABLE_BYTES
    factors = steps + c.rows * 8
    turned = factors + 4 * TOKENS
    spare = turned + TOKENS * (count + 31)
    tables(c, scale, q, scratch, steps, spare)
    for block in range(0, records, TOKENS):
        some = min(TOKENS, records - block)
        scales(b + block * c.b_row, c.b_row, some, factors)
        turn(a + block * c.a_row, c.a_row, width, some, turned, spare)
        for row in range(c.rows):
            place = target + 4 * (row * c.records + block)
            step, offset = v.read(v.F32, steps + 8 * row), v.read(v.F32, steps + 8 * row + 4)
            table = scratch + row * count * TABLE_BYTES
            summed(table, turned, count, step, offset, factors, place if some == TOKENS else spare)
            if some < TOKENS:
                v.copy(place, spare, 4 * some)


@jit
def tables(c: Any, scale: np.float32, q: int, target: int, steps: int, spare: int) -> None:
    """The tables of each row, and what a sum of their entries is to be multiplied by and added."""
    count = nibbles_of(c.dim)
    for row in range(c.rows):
        v.clear(spare + 4 * c.dim, 4 * (count * 4 - c.dim))
        largest = total = ZERO
        for m in range(count):
            length = ZERO
            for i in range(m * 4, min(m * 4 + 4, c.dim)):
                number = v.read(v.F32, q + 4 * (row * c.dim + i)) * scale
                v.write(spare + 4 * i, number)
                length += abs(number)
            largest, total = max(largest, length), total + length
        inverse = LEVELS / (largest + largest) if largest > ZERO else ZERO
        for m in range(count):
            here = spare + 16 * m
            length = abs(v.read(v.F32, here)) + abs(v.read(v.F32, here + 4))
            length += abs(v.read(v.F32, here + 8)) + abs(v.read(v.F32, here + 12))
            w.tabulate(here, length, inverse, target + (row * count + m) * TABLE_BYTES)
        v.write(steps + 8 * row, (largest + largest) / LEVELS)
        v.write(steps + 8 * row + 4, -total)


@jit
def scales(b: int, row: int, records: int, target: int) -> None:
    """A group's scales as float32."""
    if row == 2 and records == TOKENS:
        for half in (0, 1):
            low, high = v.pair_load(v.F16, b + 32 * half)
            v.store(target + 64 * half, low)
            v.store(target + 64 * half + 32, high)
        return
    for record in range(records):
        v.write(target + 4 * record, v.read(v.F16, b + record * row))


@jit
def turn(a: int, row: int, width: int, records: int, target: int, spare: int) -> None:
    """A group's nibbles as [nibble][token]; nothing is read behind ``width`` or ``records``."""
    whole = (width + 15) // 16 * 16
    if records < TOKENS or width < whole:
        for record in range(records):
            v.copy(spare + record * whole, a + record * row, width)
        a, row = spare, whole
    for byte in range(0, width, 16):
        w.turn_codes(a + byte, row, target + 2 * TOKENS * byte)


@jit
def summed(
    table: int,
    turned: int,
    count: int,
    step: np.float32,
    offset: np.float32,
    factors: int,
    target: int,
) -> None:
    """One row's scores of a group. Two entries of seven bits are added before they are widened."""
    low = low_odd = high = high_odd = w.no_sums()
    for m in range(0, count, 2):
        here, there = table + m * TABLE_BYTES, turned + m * TOKENS
        one, two = w.load_bytes(there), w.load_bytes(there + TOKENS)
        some = w.lookup(w.load_bytes(here), one)
        some = w.add_bytes(some, w.lookup(w.load_bytes(here + TABLE_BYTES), two))
        low, low_odd = w.add_both(low, some), w.add_odd(low_odd, some)
        some = w.lookup(w.load_bytes(here + 32), one)
        some = w.add_bytes(some, w.lookup(w.load_bytes(here + TABLE_BYTES + 32), two))
        high, high_odd = w.add_both(high, some), w.add_odd(high_odd, some)
    w.settle(low, low_odd, high, high_odd, step, offset, factors, target)
