"""Index arithmetic of the Hopper prefill: tiles, the keys that a program goes through, its rings.

Functions marked ``gluon.jit`` are part of the kernel and plain integer arithmetic as well:
``function.fn(...)`` runs one in Python, where the reference of the schedule and the tests use it.
Integer division rounds to zero in the first and down in the second: nothing negative is divided.

    row l of program tile t  l = 128 t + 64 g + r   of consumer g, which holds 64 rows
    key j                    counted from the first row that may be read: row starts[b] + j of K, V
    keys                     lengths[b] - starts[b]
    visible                  j < keys;  causal: j <= l + diagonal;
                             window: j > l + diagonal - window
    diagonal                 lengths[b] - starts[b] - L (bottom_right), -starts[b] (top_left)
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon

ROWS = 64  # query rows of a consumer: M of one wgmma
CONSUMERS = 2
DIMS = (64, 128, 256)
SHARED_BYTES = 227 << 10  # that one program may use on compute capability 9.0
SPARE_BYTES = 1 << 10  # barriers, a descriptor in the making, what the roles are told
MOST_STAGES = 4
MOST_HELD = 176  # numbers that a thread of a consumer holds: with more, the compiler spilled


@dataclass(frozen=True)
class Tile:
    """Shapes of one program.

    Args:
        keys: of a tile of K or V; a power of 2 from 16 on.
        stages: tiles of K, and of V, that are in shared memory at once; at least 2.
        alternate: whether consumers take turns to issue products (FlashAttention-3's ping-pong).
    """

    keys: int
    stages: int
    alternate: bool


def shared_bytes(tile: Tile, dim: int) -> int:
    """Shared memory of a program: Q, the two rings, and what is spared for barriers and the like.

    Q        2 * 128 rows * dim
    a stage  2 * keys * dim of K and as much of V
                                                   bytes
    dim   keys  stages   Q        a stage          with what is spared
     64    128       4   16 KiB   32 KiB           145 KiB
    128    128       3   32 KiB   64 KiB           225 KiB
    256     64       2   64 KiB   64 KiB           193 KiB
    """
    return 2 * dim * (CONSUMERS * ROWS + 2 * tile.stages * tile.keys) + SPARE_BYTES


def held(tile: Tile, dim: int) -> int:
    """Registers of a consumer's thread for scores, packed weights and sums; it has 240."""
    return tile.keys // 2 + tile.keys // 4 + dim // 2


def tile_of(dim: int) -> Tile:
    """The tile for rows of ``dim`` elements of 2 bytes.

    Registers bound ``keys``, shared memory bounds stages. Turns are taken where FlashAttention-3
    takes them, which is up to 128.
    """
    keys = 128 if dim <= 128 else 64
    fixed = shared_bytes(Tile(keys, 0, False), dim)
    stages = min(MOST_STAGES, (SHARED_BYTES - fixed) // (4 * dim * keys))
    return Tile(keys, stages, alternate=dim <= 128)


@gluon.jit
def steps_of(row, rows, keys, diagonal, window, BLOCK):
    """How rows ``row`` to ``row + rows - 1`` go through the keys: (last, edge, inner, total).

    Step i takes the keys of tile ``last - i``. Steps edge to inner - 1 hold no key that a row does
    not see, and need no mask. total is 0 where no row sees a key. diagonal is None where queries
    are not causal, window where there is none.
    """
    end = keys
    whole = keys
    first = 0
    clear = 0
    if diagonal is not None:
        end = min(keys, max(row + rows + diagonal, 0))
        whole = min(keys, max(row + 1 + diagonal, 0))
    if window is not None:
        first = max(row + diagonal - window + 1, 0) // BLOCK
        clear = (max(row + rows + diagonal - window, 0) + BLOCK - 1) // BLOCK
    tiles = (end + BLOCK - 1) // BLOCK
    total = max(tiles - first, 0)
    edge = min(tiles - whole // BLOCK, total)
    inner = max(min(tiles - clear, total), edge)
    return tiles - 1, edge, inner, total


@gluon.jit
def turn(i, STAGES):
    """Slot of the i-th tile of a ring, and the parity of the phase that its barriers end then.

    A barrier waits for a phase by its parity, and before the first the one before it has ended: a
    wait for ``parity ^ 1`` returns at once in the ring's first turn.
    """
    return i % STAGES, i // STAGES % 2


@gluon.jit
def issue_parity(i, place):
    """What a consumer waits for on its turn's barrier before step i >= 1: the other's last issue.

    place 0 begins, and waits for step i - 1 of place 1; which waits for step i of place 0. A phase
    of a turn's barrier is ended by each step of the other.
    """
    return (i + place) % 2
