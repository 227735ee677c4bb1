"""Index arithmetic of prefill: how large a tile is, which one a program takes, what it reads.

`placed` runs in Python as well as in the kernel: ``placed.fn(...)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton
import triton.language as tl

from vattn.kernels.gpu import Device, padded

# K and V of the heads that run together should stay in L2: 40 MB on an A100, 50 MB on an H100.
L2_BYTES = 32 << 20


@dataclass(frozen=True)
class Tile:
    """Rows of query and key that a program takes at a time, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


Kind = Literal["plain", "busy", "costly"]
# Tiles by compute capability and dimension of heads: among the largest that compile without a
# spilled register. Busy are calls with a window, several heads in a tile, ragged queries or heads
# whose dimension is padded; costly are scores that go through a softcap, ALiBi or a mask.
PLAIN = {
    80: {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
    90: {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    100: {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
}
COSTLY = {
    80: {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    90: {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    100: {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
}
BUSY = {**PLAIN, 80: {**PLAIN[80], 128: COSTLY[80][128]}}
TILES = {"plain": PLAIN, "busy": BUSY, "costly": COSTLY}
FLOAT = {64: Tile(32, 32, 4, 2), 128: Tile(32, 16, 4, 2), 256: Tile(32, 16, 8, 2)}


def tile_of(device: Device, dim: int, itemsize: int, rows: int, kind: Kind = "plain") -> Tile:
    """The tile for ``rows`` query rows that a program could take, heads of ``dim`` elements of
    ``itemsize`` bytes, and a ``kind`` of call; no larger than shared memory."""
    wide = 64 if dim <= 64 else 128 if dim <= 128 else 256
    full = FLOAT[wide] if itemsize == 4 else TILES[kind][_family(device)][wide]
    fewer = min(full.rows, padded(rows))
    keys, stages = full.keys, full.stages
    while (fewer + 2 * stages * keys) * wide * itemsize > device.shared_bytes:
        keys, stages = (keys, stages - 1) if stages > 1 else (keys // 2, 1)
    return Tile(fewer, keys, full.warps, stages)


def _family(device: Device) -> int:
    """Whose matrix instructions a device has: 120, the consumer's Blackwell, has Ampere's."""
    return 100 if 100 <= device.arch < 120 else 90 if device.arch == 90 else 80


def packed_heads(groups: int, tokens: int, rows: int, ragged: bool) -> int:
    """Query heads that share a program's tile of ``rows`` rows: 1, or all ``groups``.

    All where that needs a tenth fewer tiles, and for sequences whose lengths the host does not
    know; else heads of a group are neighbours in the grid, and share K and V through L2.
    """
    apart = groups * -(-tokens // rows)
    together = -(-groups * tokens // rows)
    return groups if ragged or 10 * together <= 9 * apart else 1


def worth_finding(device: Device, programs: int, key_tiles: int) -> bool:
    """Whether a call is long enough for tiles of its mask to be found first.

    Two launches more, which a program of 16 tiles one after another should outlast: an estimate,
    not a measurement.
    """
    return max(1, programs // device.processors) * key_tiles >= 16


def section_of(kv_heads: int, groups: int, kv_bytes: int) -> int:
    """Planes that run side by side: all that share K and V, of so many KV heads of ``kv_bytes``
    each as stay in L2, of ``kv_heads`` in the batch."""
    return groups * min(kv_heads, max(1, L2_BYTES // max(1, kv_bytes)))


@triton.jit
def placed(program, section, q_tiles, batch_heads):
    """Which of ``batch_heads`` planes and which tile a program takes: the last tile of every plane
    of a section first, as it is the longest under a causal mask. Plain integers do as well."""
    first = program // (section * q_tiles) * section
    inside = min(section, batch_heads - first)
    rank = program - first * q_tiles
    return first + rank % inside, q_tiles - 1 - rank // inside


@triton.jit
def span(
    p_first,
    p_last,
    start,
    length,
    window,
    sink_tokens,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Tiles of keys for rows at positions p_first to p_last: [low, high) hold all that some row
    sees beside the sinks, in [inner, outer) every row sees every key, [first, last) hold sinks."""
    begin = start
    whole = start
    end = length
    if CAUSAL:
        end = tl.minimum(length, p_last + 1)
    if WINDOW:
        begin = tl.maximum(start, p_first - window + 1)
        whole = tl.maximum(start, p_last - window + 1)
    end = tl.maximum(end, begin)
    low = begin // KEYS
    # Without a key to see [low, high) is empty.
    high = tl.where(end > begin, tl.cdiv(end, KEYS), low)
    inner = tl.minimum(tl.cdiv(whole, KEYS), high)
    outer = length
    if CAUSAL:
        outer = tl.minimum(length, p_first + 1)
    outer = tl.maximum(tl.minimum(tl.maximum(outer, 0) // KEYS, high), inner)
    first = start // KEYS
    last = first
    if WINDOW:
        reach = tl.minimum(tl.minimum(sink_tokens, length), tl.maximum(p_last + 1, 0))
        last = tl.maximum(tl.minimum(tl.cdiv(reach, KEYS), low), first)
    return low, inner, outer, high, first, last
