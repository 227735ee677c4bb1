"""Small arenas over a checked backend, and all that can be said about one."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.mirror import PAGE, words_at
from vattn.allocator.arena import Arena
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.allocator.table import WARM


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def make(
    slots: int = 4, lanes: int = 1, lane_pages: int = 8, pages: int = 200, **options: Any
) -> Arena:
    pool = Pool(CheckedBackend(HostBackend(PAGE)), budget_bytes=pages * PAGE)
    return Arena(pool, slots=slots, lanes=lanes, lane_pages=lane_pages, **options)


def grow(arena: Arena, slot: int, to: int, tenant: int = 0) -> None:
    plan = arena.plan_grow(ints(slot), ints(to))
    if plan is not None:
        arena.grow(plan, tenant=tenant)


def fill(arena: Arena, slot: int, value: int) -> None:
    """Write ``value`` + page number to every mapped page of a slot."""
    for page in arena.mapped(slot).tolist():
        words_at(arena.address + page * PAGE)[:] = value + page


def first_words(arena: Arena, slot: int) -> list[int]:
    return [int(words_at(arena.address + p * PAGE)[0]) for p in arena.mapped(slot).tolist()]


def state_of(arena: Arena) -> list[Any]:
    """Everything that a failed call must leave as it was, the bytes included."""
    pool, table = arena.pool, arena.pool.table
    used = np.flatnonzero(table.state > WARM)
    record = (arena.entry, arena.first, arena.last, arena.shared_to, arena.pins)
    mapped = np.flatnonzero(arena.entry).tolist()
    return [
        *(x.tolist() for x in record),
        arena.maps,
        (pool.free, pool.mapped, pool.pending, pool.warm, pool.total),
        used.tolist(),
        table.refs[used].tolist(),
        table.owner[used].tolist(),
        dict(pool.backend.at),  # type: ignore[attr-defined]
        [words_at(arena.address + page * PAGE).tobytes() for page in mapped],
    ]
