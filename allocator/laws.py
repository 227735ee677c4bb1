"""The laws of pool and arena, as equations over every page. For tests: each costs a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .table import MAPPED, QUARANTINED, WARM

if TYPE_CHECKING:
    from .arena import Arena
    from .pool import Pool


def check_pool(pool: Pool) -> None:
    """States are what the counts say, and the conservation law holds."""
    table, used = pool.table, pool.table.state[: pool.table.size]
    counts = np.bincount(used, minlength=4)
    assert counts[MAPPED] == pool.mapped, (counts, pool.mapped)
    assert counts[WARM] == pool.warm, (counts, pool.warm)
    assert counts[QUARANTINED] == pool.pending, (counts, pool.pending)
    assert pool.free + pool.mapped + pool.pending == pool.total + pool.over
    assert pool.created <= pool.total + pool.over
    refs = table.refs[: table.size]
    assert refs.min(initial=0) >= 0, "a page was given back too often"
    assert bool(((refs > 0) == (used == MAPPED)).all()), "referenced pages are the mapped ones"
    spare = table.spare
    assert len(spare) == len(set(spare)), "a spare id is listed twice"
    assert not table.state[spare].any(), "a spare id is in use"
    queued = np.concatenate([*pool.queue.runs, np.zeros(0, np.int64)])
    assert bool(np.isin(np.flatnonzero(used == WARM), queued).all()), "a warm page is lost"


def check_arena(arena: Arena) -> None:
    """Frontiers, record, references and map count agree."""
    page = np.arange(arena.lane_pages)
    inside = (page >= arena.first[..., None]) & (page < arena.last[..., None])
    mapped = np.flatnonzero(inside)
    assert bool((inside.ravel() == (arena.entry != 0)).all()), "first/last agree with the record"
    assert bool((arena.first >= 0).all()), "a frontier below the lane"
    assert bool((arena.first <= arena.last).all()), "a lane ends before it begins"
    ids, counts = np.unique(arena.ids(mapped), return_counts=True)
    assert bool((arena.pool.refs(ids) >= counts).all()), "every mapping holds a reference"
    many = mapped[arena.pool.refs(arena.ids(mapped)) > 1]
    below = many % arena.lane_pages < arena.shared_to[many // arena.slot_pages]
    assert bool(below.all()), "a page with other holders lies above shared_to"
    arena.record.check()
