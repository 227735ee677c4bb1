"""Arenas over the CUDA backend on the driver emulator; the fixtures are in `conftest`."""

from __future__ import annotations

from typing import Any

from vattn.allocator.arena import Arena
from vattn.allocator.pool import Pool
from vattn.allocator.vmm import Backend

MEMORY, UNKNOWN = 2, 999  # CUresult


def make_arena(
    backend: Backend, *, slots: int = 4, lanes: int = 1, pages: int = 200, **options: Any
) -> Arena:
    pool = Pool(backend, budget_bytes=pages * backend.page_bytes)
    return Arena(pool, slots=slots, lanes=lanes, lane_pages=8, **options)


def shut(arena: Arena) -> None:
    arena.close()
    arena.pool.close()
