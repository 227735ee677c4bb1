"""Whoever can give pages back is asked when a pool has too few."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

from .allocator.pool import Pool


class Reclaimer(Protocol):
    """What holds pages that nobody needs now."""

    def reclaim(self, pages: int) -> object:
        """Unmap up to ``pages`` of them."""


def enlist(pool: Pool, one: Reclaimer) -> Callable[[], object]:
    """Let a pool ask ``one`` for pages, without keeping it alive. It is asked no more when it is
    gone, or from when what is returned is called; idempotent."""
    ref = weakref.ref(one)

    def reclaim(pages: int) -> None:
        alive = ref()
        if alive is not None and leave.alive:
            alive.reclaim(pages)

    leave = weakref.finalize(one, _forget, pool.reclaimers, reclaim)
    pool.reclaimers.append(reclaim)
    return leave


def _forget(reclaimers: list[Callable[[int], None]], reclaim: Callable[[int], None]) -> None:
    if reclaim in reclaimers:
        reclaimers.remove(reclaim)
