"""The lower tier of a pool: pages of a larger, slower kind of memory, under a budget of their own.

    tier 0   the pool's own pages    host: memfd    device: its memory
    tier 1   these                   host: a file   device: host memory at the same addresses

Ids of a tier are one run, so that state, references, owner and quarantine, and with them sharing,
the record and the laws, are those of any page. A page of tier 0 may have a *twin*, an equal page
here:

    B demoted page,  promoted to A      entry = A    twin[A] = B    two pages, equal bytes
    A demoted again                     entry = B                   nothing is copied
    A written (`Arena.unshare` first),
    or given back                       entry = A    twin[A] = 0    B goes

Twins are kept while the budget has room, and dropped when it has none; ``refs[B] == 1`` is the
twin's hold.
"""

from __future__ import annotations

import numpy as np

from .errors import ClosedError, OutOfPages, OutOfRange, PageStateError
from .pool import Pool
from .quarantine import PageIds
from .stock import Stock
from .table import FREE, WARM, Taken
from .vmm import TieredBackend
from .warmqueue import runs


class Tier(Stock):
    """The second kind of pages of a pool.

    Args:
        pool: whose pages leave for here; it has no lower tier yet.
        budget_bytes: most bytes of pages here; also the most that `set_budget` may allow later.
        place: as `vmm.TieredBackend.add_tier`.

    Attributes: ``first .. end`` ids of its pages, ``copies`` twins.

    Raises:
        PageStateError: the pool has a lower tier, or a backend without one. ClosedError: the pool
        is closed. DriverError, ReserveError: the system refused.
    """

    def __init__(self, pool: Pool, *, budget_bytes: int, place: str | int | None = None) -> None:
        if pool.lower is not None:
            raise PageStateError("the pool has a lower tier: one a pool")
        if not hasattr(pool.backend, "add_tier"):
            raise PageStateError(f"{type(pool.backend).__name__} has one kind of pages only")
        super().__init__(pool.backend, pool.table, pool.turn, budget_bytes=budget_bytes)
        self.pool, self.copies, self.capacity = pool, 0, self.total
        self.tiered: TieredBackend = pool.backend  # type: ignore[assignment]
        with self.turn:
            if pool.closing:
                raise ClosedError("the pool is closed")
            # An id on either side is nobody's: ids that follow each other lie in one place.
            self.first = self.table.extent(self.capacity + 2) + 1
            self.end = self.first + self.capacity
            self.tiered.add_tier(self.first, self.capacity, place)
            pool.lower = self

    def holds(self, ids: PageIds) -> np.ndarray:
        """Which of the pages are of this tier."""
        return (ids >= self.first) & (ids < self.end)

    # ---- pages -------------------------------------------------------------------------------
    def take_any(self, tenants: PageIds) -> Taken:
        """Hand out one page for each tenant, with one reference each, ascending; those that have
        bytes already first. All or nothing.

        Raises:
            OutOfPages: fewer are free, twins dropped.
            DriverError: the backend refused. Nothing was taken, but twins may have gone.
        """
        n = len(tenants)
        if n > self.free:
            self.drop_twins(n - self.free)
        if n > self.free:
            raise OutOfPages(n, self.free, self.pending, self.page_bytes)
        state = self.table.state[self.first : self.end]
        warm = np.flatnonzero(state == WARM)[:n] if self.warm else np.zeros(0, np.int64)
        cold = np.flatnonzero(state == FREE)[: n - len(warm)] if n > len(warm) else warm[:0]
        ids = np.concatenate([warm, cold]) + self.first
        before = self.table.state[ids]
        owners = self.table.owner[ids]
        taken = Taken(ids, before, np.zeros(n, np.bool_), owners)
        self.hand_out(taken, tenants)
        return taken

    def make_ready(self, nbytes: int) -> None:
        """Commit the bytes of so many free pages now, so that moving there need not wait for it.

        Raises:
            DriverError: the system refused; what was committed before stays.
        """
        with self.turn:
            n = min(nbytes // self.page_bytes, self.free) - self.warm
            cold = np.flatnonzero(self.table.state[self.first : self.end] == FREE)[: max(n, 0)]
            ids, before = cold + self.first, np.full(len(cold), FREE, np.uint8)
            nobody = np.zeros(len(ids), np.int32)
            self.hand_out(Taken(ids, before, nobody > 0, nobody), 0)
            try:
                for page, count in runs(ids):
                    self.backend.warm(page, count)
            finally:
                self.table.refs[ids] = 0
                self.bury(ids, quiesced=True)
                self.drain()

    # ---- twins -------------------------------------------------------------------------------
    def twins_of(self, ids: PageIds) -> PageIds:
        """Id of each page's twin; -1 where it has none."""
        return self.table.twin[ids] - 1

    def pair(self, ids: PageIds, twins: PageIds) -> None:
        """``twins``, pages of this tier with one reference, are equal to ``ids``."""
        self.table.twin[ids] = twins + 1
        self.copies += len(ids)

    def part(self, ids: PageIds) -> PageIds:
        """Pages are no longer equal to their twins, which the caller gets with their hold."""
        ids = ids[self.table.twin[ids] > 0]
        twins = self.table.twin[ids] - 1
        self.table.twin[ids] = 0
        self.copies -= len(ids)
        return twins

    def drop_twins(self, n: int) -> None:
        """Let go of up to ``n`` twins, lowest ids first."""
        if self.copies:
            size = self.table.size
            self.drop_twins_of(np.flatnonzero(self.table.twin[:size])[:n])
            self.drain()

    def drop_twins_of(self, ids: PageIds) -> None:
        """These pages are about to be written, or gone."""
        if not self.copies:
            return
        twins = self.part(ids)
        if len(twins):
            self.table.refs[twins] = 0
            self.bury(twins, quiesced=True)

    def take_leave(self, dead: PageIds, *, quiesced: bool) -> PageIds:
        """Of pages that nobody holds any more: bury those of this tier, drop the twins of the
        others, which are returned."""
        low = self.holds(dead)
        if low.any():
            self.bury(dead[low], quiesced=quiesced)
            dead = dead[~low]
        self.drop_twins_of(dead)
        return dead

    def check_budget(self, budget_bytes: int) -> None:
        """Raise OutOfRange beyond the ids that the tier was made with."""
        if budget_bytes // self.page_bytes > self.capacity:
            raise OutOfRange(
                f"{budget_bytes} bytes for a tier made for {self.capacity * self.page_bytes}: make "
                "it larger; a file's pages cost nothing until they are used"
            )

    def set_budget(self, budget_bytes: int) -> None:
        """As `Stock.set_budget`; twins go where they are too many.

        Raises:
            OutOfRange: negative, or beyond the budget that the tier was made with.
        """
        self.check_budget(budget_bytes)
        super().set_budget(budget_bytes)

    def _shrink(self, mapped: int) -> None:
        self.drop_twins(self.mapped - mapped)
        self._make_room()
