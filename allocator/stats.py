"""What an allocator holds, in bytes, as one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .arena import Arena
from .pool import Pool


@dataclass(frozen=True)
class AllocatorStats:
    """One pool and its arenas at one moment.

    mapped + pending + warm == created;  created <= budget, unless the budget was lowered;
    mapped == used + wasted
    """

    page_bytes: int  # size of a page
    budget_bytes: int  # most bytes of pages that may exist
    reserved_bytes: int  # address space of the arenas
    mapped_bytes: int  # pages mapped (or exported), each physical page once
    used_bytes: int  # bytes of live rows, as the caller counts them
    wasted_bytes: int  # mapped, but no live row lies there
    pending_bytes: int  # pages in quarantine, or lent to the warmer
    warm_bytes: int  # free pages that keep their bytes for quick reuse
    resident_bytes: int  # what the system really holds for the pages (st_blocks)
    huge_bytes: int  # mapped by huge pages now; 0 unless asked for
    maps: int  # kernel maps of the arenas
    map_limit: int  # most kernel maps that the process may have, everybody's included
    calls: dict[str, int]  # backend verbs that reached the system, by name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def gather(
    pool: Pool, arenas: Iterable[Arena], *, used_bytes: int = 0, huge: bool = False
) -> AllocatorStats:
    """Count what a pool and its arenas hold.

    Args:
        used_bytes: bytes of live rows, each physical row once; only the caller knows.
        huge: also count huge pages, which reads /proc/self/smaps (milliseconds).
    """
    size, backend, arenas = pool.page_bytes, pool.backend, list(arenas)
    with pool.turn:
        return AllocatorStats(
            page_bytes=size,
            budget_bytes=pool.total * size,
            reserved_bytes=sum(arena.pages for arena in arenas if not arena.closed) * size,
            mapped_bytes=pool.mapped * size,
            used_bytes=used_bytes,
            wasted_bytes=pool.mapped * size - used_bytes,
            pending_bytes=pool.pending * size,
            warm_bytes=pool.warm * size,
            resident_bytes=backend.resident_bytes(),
            huge_bytes=backend.huge_bytes() if huge else 0,
            maps=sum(arena.maps for arena in arenas if not arena.closed),
            map_limit=backend.map_limit,
            calls=dict(backend.calls),
        )
