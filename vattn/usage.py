"""What a cache holds, in bytes: the figures every report, picture and bench is made of.

    mapped = used + wasted + retained            reserved >= mapped

``used`` rows of live tokens, an aliased page once; ``wasted`` the rest of pages with live rows;
``retained`` mapped pages without any live row (parked, or mapped ahead): reclaimable at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .cache import KVCache


@dataclass(frozen=True)
class Usage:
    """Memory of one cache. Sizes in bytes; ``pages``, ``maps`` and ``calls`` are counts."""

    reserved_bytes: int
    mapped_bytes: int
    used_bytes: int
    wasted_bytes: int
    retained_bytes: int
    pending_bytes: int
    warm_bytes: int  # free pages that keep their bytes for quick reuse
    huge_bytes: int | None  # behind huge pages; None unless asked for
    resident_bytes: int
    budget_bytes: int
    shared_bytes: int  # saved by aliasing: mapped at more addresses than one
    pages: int
    maps: int
    map_limit: int
    sequences: int
    tokens: int
    calls: dict[str, int]

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)


def measure(cache: KVCache, *, huge: bool = False) -> Usage:
    """Count the bytes of a cache; costs a pass over its mapped pages."""
    layout, arena, pool = cache.layout, cache.arena, cache.pool
    ids, live = page_rows(cache)
    order = np.lexsort((live, ids))
    ids, live = ids[order], live[order]
    last = np.flatnonzero(np.diff(ids, append=-1) != 0)  # the fullest mapping of each page
    used, held = int(live[last].sum()), int(np.count_nonzero(live[last]))
    backend = pool.backend
    return Usage(
        reserved_bytes=arena.pages * layout.page,
        mapped_bytes=len(last) * layout.page,
        used_bytes=used,
        wasted_bytes=held * layout.page - used,
        retained_bytes=(len(last) - held) * layout.page,
        pending_bytes=pool.pending * layout.page,
        warm_bytes=pool.warm * layout.page,
        huge_bytes=backend.huge_bytes() if huge else None,
        resident_bytes=backend.resident_bytes(),
        budget_bytes=pool.total * layout.page,
        shared_bytes=(len(ids) - len(last)) * layout.page,
        pages=len(last),
        maps=arena.maps,
        map_limit=getattr(backend, "map_limit", 0),
        sequences=int((cache.opened % 2).sum()),
        tokens=int(cache.tokens.sum()),
        calls=dict(backend.calls),
    )


def page_rows(cache: KVCache) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Id of every mapped page and the bytes of live rows in it, mapping by mapping."""
    layout, arena = cache.layout, cache.arena
    ids: list[NDArray[np.int64]] = []
    live: list[NDArray[np.int64]] = []
    for slot in np.flatnonzero((arena.last > arena.first).any(axis=1)).tolist():
        pages = arena.mapped(slot)
        lane, index = np.divmod(pages - slot * arena.slot_pages, arena.lane_pages)
        start, end = _live_bytes(cache, slot)
        begin, stop = index * layout.page, (index + 1) * layout.page
        inside = np.minimum(end[lane], stop) - np.maximum(start[lane], begin)
        ids.append(arena.ids(pages))
        live.append(np.maximum(inside, 0))
    none = [np.zeros(0, np.int64)]
    return np.concatenate(ids or none), np.concatenate(live or none)


def _live_bytes(cache: KVCache, slot: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last live byte of each lane of a slot."""
    layout = cache.layout
    group = np.arange(layout.physical_layers) // layout.group_layers
    start = np.full(layout.groups, np.iinfo(np.int64).max)
    end = np.zeros(layout.groups, np.int64)
    np.minimum.at(start, group, cache.starts[slot])
    np.maximum.at(end, group, cache.lengths[slot])
    lanes = np.repeat(np.arange(layout.groups), layout.lanes_per_group)
    return start[lanes] * layout.row_bytes, end[lanes] * layout.row_bytes
