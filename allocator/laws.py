"""The laws of pool and arena, as equations over every page. For tests: each costs a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .table import MAPPED, QUARANTINED, WARM

if TYPE_CHECKING:
    from .arena import Arena
    from .pool import Pool
    from .quarantine import PageIds
    from .stock import Stock


def check_pool(pool: Pool) -> None:
    """States are what the counts say, and the conservation law holds in each tier."""
    table, tier = pool.table, pool.lower
    size = table.size
    assert table.refs[:size].min(initial=0) >= 0, "a page was given back too often"
    is_mapped = table.state[:size] == MAPPED
    assert bool(((table.refs[:size] > 0) == is_mapped).all()), "referenced pages are the mapped"
    spare = table.spare
    assert len(spare) == len(set(spare)), "a spare id is listed twice"
    assert not table.state[spare].any(), "a spare id is in use"
    everything = np.arange(size)
    if tier is None:
        check_stock(pool, everything)
        return
    low = tier.holds(everything)
    check_stock(pool, everything[~low])
    check_stock(tier, everything[low])
    fast = np.flatnonzero(table.twin[:size])
    copies = table.twin[fast] - 1
    assert bool((~low[fast] & is_mapped[fast]).all()), "only mapped pages of tier 0 have copies"
    assert bool((low[copies] & (table.refs[copies] == 1)).all()), "a copy has another holder"
    assert len(np.unique(copies)) == len(copies) == tier.copies, "copies are counted"


def check_stock(stock: Stock, ids: PageIds) -> None:
    """The counts and the conservation law of one stock, whose pages are ``ids``."""
    used = stock.table.state[ids]
    counts = np.bincount(used, minlength=4)
    assert counts[MAPPED] == stock.mapped, (counts, stock.mapped)
    assert counts[WARM] == stock.warm, (counts, stock.warm)
    assert counts[QUARANTINED] == stock.pending, (counts, stock.pending)
    assert stock.free + stock.mapped + stock.pending == stock.total + stock.over
    assert stock.created <= stock.total + stock.over
    queued = np.concatenate([*stock.queue.runs, np.zeros(0, np.int64)])
    assert bool(np.isin(ids[used == WARM], queued).all()), "a warm page is lost"


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
    ids = arena.ids(mapped)
    fenced = arena.pool.refs(ids) > 1
    if arena.pool.lower is not None:
        fenced |= arena.pool.lower.holds(ids) | (arena.pool.table.twin[ids] > 0)
    many = mapped[fenced]
    below = many % arena.lane_pages < arena.shared_to[many // arena.slot_pages]
    assert bool(below.all()), "a page with other holders lies above shared_to"
    arena.record.check()
