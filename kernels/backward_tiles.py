"""The tiles of the backward kernels: a table found by ahead-of-time compilation, not by timing.

A tile spills no register and fits into shared memory, on its architecture and in every form of
scores (`make aot`); of those that do it is the one that reads K and V, or Q and dO, the fewest
times. Masks, ALiBi and softcap need registers, so that some tiles are smaller with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vattn.kernels.gpu import A100, Device


class Tile(NamedTuple):
    """Queries and keys of a program's tile of scores, its warps, and the stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """The arguments of a launch."""
        return {
            "BLOCK_M": self.queries,
            "BLOCK_N": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Tiles(NamedTuple):
    """The tile of dQ and that of dK and dV."""

    query: Tile
    key: Tile


# By architecture and the next power of two of the head dimension, 64 at least.
PLAIN = {
    (80, 64): Tiles(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (80, 128): Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (80, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (90, 64): Tiles(Tile(128, 128, 8, 2), Tile(64, 128, 8, 2)),
    (90, 128): Tiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (90, 256): Tiles(Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (100, 64): Tiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (100, 128): Tiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (100, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
}
RICH = {
    **PLAIN,
    (80, 128): Tiles(Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    (80, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    (90, 64): Tiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (90, 128): Tiles(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (90, 256): Tiles(Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
    (100, 64): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    (100, 128): Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (100, 256): Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
}
# Products of float32 run without matrix instructions, unless torch allows tf32.
SMALL = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
SMALLEST = Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 4, 1))
FLOAT32 = {
    **{(arch, 64): SMALL for arch in (80, 90, 100)},
    **{(arch, 128): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)) for arch in (80, 90)},
    (100, 128): Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    **{(arch, 256): SMALLEST for arch in (80, 90, 100)},
}


def tiles_of(device: Device, dim: int, dtype: torch.dtype, plain: bool) -> Tiles:
    """The tiles for rows of ``dim`` elements, the larger of D and Dv; ``plain`` scores have no
    mask, ALiBi or softcap."""
    wide = max(64, 1 << (dim - 1).bit_length())
    # What pads 80 or 96 elements takes registers, too; the tiles of 256 have them to spare.
    plain = plain and (dim == wide or wide == 256)
    # Consumer devices of any generation have an Ampere's matrix instructions and less memory.
    arch = 80 if device.shared_bytes <= A100.shared_bytes else min(device.arch // 10 * 10, 100)
    table = FLOAT32 if dtype == torch.float32 else PLAIN if plain else RICH
    query, key = table[arch, wide]
    room = device.shared_bytes // (2 * wide * dtype.itemsize)
    if query.queries + query.stages * query.keys > room:
        query = query._replace(stages=1)
    if key.keys + key.stages * key.queries > room:
        key = key._replace(stages=1)
    return Tiles(query, key)
