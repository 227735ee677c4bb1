"""Floats as unsigned keys of the same order, and what `top_pages` finds out about many of them.

A negative number's bits are inverted, another's sign is set; both zeros are one. Keys lie in
registers (HELD), ``n`` of a block, or in a workspace that is read a block at a time; what is beyond
n has key 0. ``held, keys, n`` are the two forms, of which one is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Keys of -inf and +inf.
EMPTY_KEY = tl.constexpr(0x007FFFFF)
FORCED_KEY = tl.constexpr(0xFF800000)


@triton.jit
def key_of(x):
    """Floats as unsigned numbers of the same order; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def float_of(key):
    """`key_of` turned round."""
    bits = tl.where(key >> 31 == 1, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _keys(held, keys, at, n, HELD: tl.constexpr):
    """The keys of pages ``at``, 0 beyond n: in registers, or from the workspace."""
    key = held
    if not HELD:
        key = tl.load(keys + at, mask=at < n, other=0).to(tl.uint32, bitcast=True)
    return key


@triton.jit
def count_above(held, keys, bound, n, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """Keys above ``bound``."""
    above = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, n, BLOCK):
        key = _keys(held, keys, begin + tl.arange(0, BLOCK), n, HELD)
        above += (key > bound).to(tl.int32)
    return tl.sum(above, 0)


@triton.jit
def best_of(held, keys, n, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """The largest key that is not forced, at least that of -inf."""
    top = tl.full([BLOCK], EMPTY_KEY, tl.uint32)
    for begin in range(0, n, BLOCK):
        key = _keys(held, keys, begin + tl.arange(0, BLOCK), n, HELD)
        top = tl.maximum(top, tl.where(key < FORCED_KEY, key, EMPTY_KEY))
    return tl.max(top, 0)


@triton.jit
def _mass(key, shift, UNIT: tl.constexpr):
    """exp2 of keys less ``shift``; 0 of those forced or empty."""
    counts = (key > EMPTY_KEY) & (key < FORCED_KEY)
    return tl.where(counts, tl.exp2((tl.where(counts, float_of(key), shift) - shift) * UNIT), 0.0)


@triton.jit
def _mass_from(
    held, keys, bound, shift, n, UNIT: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """Mass of the keys from ``bound`` on."""
    mass = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        key = _keys(held, keys, begin + tl.arange(0, BLOCK), n, HELD)
        mass += tl.where(key >= bound, _mass(key, shift, UNIT), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _parts(
    held, keys, bound, shift, n, UNIT: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """Keys of some mass above ``bound``, those equal to it, and the mass of those above."""
    above = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        key = _keys(held, keys, begin + tl.arange(0, BLOCK), n, HELD)
        each = _mass(key, shift, UNIT)
        above += ((key > bound) & (each > 0.0)).to(tl.int32)
        equal += ((key == bound) & (each > 0.0)).to(tl.int32)
        mass += tl.where(key > bound, each, 0.0)
    return tl.sum(above, 0), tl.sum(equal, 0), tl.sum(mass, 0)


@triton.jit
def share(held, keys, top, p, n, UNIT: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """How many keys that are not forced hold the share ``p`` of their mass."""
    shift = tl.where(top > EMPTY_KEY, float_of(top), 0.0)
    wanted = p * _mass_from(held, keys, top * 0, shift, n, UNIT, BLOCK, HELD)
    # The last key down to which the mass is not short of what is wanted.
    bound = top * 0
    bit = bound + 0x80000000
    for _ in range(32):
        enough = _mass_from(held, keys, bound | bit, shift, n, UNIT, BLOCK, HELD) >= wanted
        bound = tl.where(enough, bound | bit, bound)
        bit = bit >> 1
    above, equal, mass = _parts(held, keys, bound, shift, n, UNIT, BLOCK, HELD)
    counts = (bound > EMPTY_KEY) & (bound < FORCED_KEY)
    each = tl.where(counts, tl.exp2((tl.where(counts, float_of(bound), shift) - shift) * UNIT), 1.0)
    some = tl.ceil((wanted - mass) / each).to(tl.int32)
    return above + tl.minimum(tl.maximum(some, 0), equal)


@triton.jit
def bound_of(held, keys, k, n, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """(the k-th largest key, how many of its equals are among the k)."""
    bin = tl.arange(0, 256)
    left = k
    bound = (k * 0).to(tl.uint32)
    for digit in tl.static_range(4):
        found = tl.zeros([256], tl.int32)
        for begin in range(0, n, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            key = _keys(held, keys, at, n, HELD)
            among = at < n
            if digit > 0:
                among = among & (key >> (32 - 8 * digit) == bound >> (32 - 8 * digit))
            value = ((key >> (24 - 8 * digit)) & 255).to(tl.int32)
            found += tl.histogram(value, 256, mask=among)
        from_here = tl.cumsum(found, 0, reverse=True)
        place = tl.sum((from_here >= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(bin > place, found, 0), 0)
        bound = bound | (place.to(tl.uint32) << (24 - 8 * digit))
    return bound, left


@triton.jit
def write(held, keys, ids, bound, left, n, most, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """Pages of the keys above ``bound`` and the first ``left`` equal to it, ascending; n behind."""
    placed = left * 0
    equals = left * 0
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        key = _keys(held, keys, at, n, HELD)
        equal = (key == bound) & (at < n)
        rank = equals + tl.cumsum(equal.to(tl.int32), 0)
        taken = (key > bound) | (equal & (rank <= left))
        place = placed + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(ids + place, at, mask=taken)
        placed += tl.sum(taken.to(tl.int32), 0)
        equals += tl.sum(equal.to(tl.int32), 0)
    for begin in range(0, most, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        tl.store(
            ids + place, tl.zeros([BLOCK], tl.int32) + n, mask=(place >= placed) & (place < most)
        )
