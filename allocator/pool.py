"""Physical pages under a budget, with a conservation law.

              take()                  give(), last reference          drain()
    FREE ───────────────► MAPPED ───────────────────────► QUARANTINED ───────► FREE
    (cold: no bytes,         │ ▲ share(): one more address, no new page           │
     warm: bytes kept)       └─┘ give(): one address fewer                        │
         └──────────────── lend() ──────────► QUARANTINED, until return_warm() ───┘

    free + mapped + pending == total + over       (total: the budget in pages)
    created == warm + mapped + pending <= total + over
    pending == quarantined + lent

``over`` is 0 unless the budget was lowered below what is in use: then that many pages too many
exist until they are given back.

A page has a *goal*: the id whose home is the wanted address. Goals keep file-contiguous runs, so
that the kernel merges maps; a warm page elsewhere is dearer in maps but cheaper in page faults.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import ClosedError, OutOfPages, PageStateError
from .laws import check_pool
from .quarantine import PageIds
from .stock import Stock
from .table import FREE, MAPPED, MIXED, QUARANTINED, WARM, PageTable, Taken, distinct
from .turn import Turn
from .vmm import Backend

if TYPE_CHECKING:
    from .tier import Tier


class Pool(Stock):
    """Pages of one backend, counted against one budget that may change at run time.

    Args:
        backend: the verbs.
        budget_bytes: most bytes of pages that may exist at once.
        warm_high_bytes: free pages whose bytes are kept for quick reuse; more are destroyed, oldest
            first. None keeps all that the budget allows.

    `take`, `untake`, `share`, `give` and `assign` are steps of a change and are called within
    ``with pool.turn``; everything else takes a turn by itself.
    """

    def __init__(
        self, backend: Backend, *, budget_bytes: int, warm_high_bytes: int | None = None
    ) -> None:
        super().__init__(
            backend,
            PageTable(),
            Turn(),
            budget_bytes=budget_bytes,
            warm_high_bytes=warm_high_bytes,
        )
        self.lower: Tier | None = None  # where pages go that leave, see `tier`
        self.reclaimers: list[Callable[[int], None]] = []  # asked for pages before we refuse
        self.evictors: list[Callable[[int], None]] = []  # asked then, to move pages to ``lower``
        self.boundary: Callable[[], None] | None = None  # told of every step boundary
        self.recall: Callable[[], None] | None = None  # whoever was lent pages: give them back
        self._tenants: dict[Hashable, int] = {None: 0}
        self._arenas = 0
        self.closing = False

    # ---- looking ---------------------------------------------------------------------------
    def refs(self, ids: PageIds) -> NDArray[np.int32]:
        """Number of addresses (and exports) that hold each page."""
        return self.table.refs[ids]

    def owners(self, ids: PageIds) -> NDArray[np.int32]:
        """Tenant whose bytes each page carries; `table.MIXED` for several."""
        return self.table.owner[ids]

    # ---- homes -----------------------------------------------------------------------------
    def extent(self, pages: int) -> int:
        """A run of ids to be the homes of ``pages`` pages; returns the first. `forget` ends it."""
        if self.closing:
            raise ClosedError("the pool is closed")
        first = self.table.extent(pages)
        self._arenas += 1
        return first

    def forget(self, first: int, pages: int) -> None:
        """The run of an extent is nobody's home any more."""
        self._arenas -= 1
        self.table.forget(first, pages)
        self._settle()

    # ---- take and give ---------------------------------------------------------------------
    def reclaim(self, n: int) -> bool:
        """Ask the reclaimers for pages if fewer than ``n`` are free: for those beyond the budget,
        too. True if any was asked: what was looked up before may have been unmapped."""
        asked = False
        if n > self.free and self.lent and self.recall is not None:
            self.recall()
        for reclaimer in (*self.reclaimers, *self.evictors):
            if n > self.free:
                asked = True
                reclaimer(n - self.free + self.over)
        return asked

    def tenant(self, name: Hashable) -> int:
        """The number of a tenant: the same for all caches over this pool."""
        return self._tenants.setdefault(name, len(self._tenants))

    @property
    def tenants(self) -> int:
        """How many tenants have been seen."""
        return len(self._tenants)

    def take(self, goals: PageIds, *, tenant: int | PageIds = 0, use_warm: bool = True) -> Taken:
        """Hand out one page for each goal, each with one reference. All or nothing.

        A page gets its goal's own id if that is free; a warm page elsewhere instead of a cold goal
        if ``use_warm``; some other id if the goal is in use.

        Raises:
            OutOfPages: fewer than ``len(goals)`` pages are free.
            PageStateError: a goal is named twice.
            DriverError: the backend refused. Nothing was taken.
        """
        n = len(goals)
        if n > self.free:
            raise OutOfPages(n, self.free, self.pending, self.page_bytes)
        if len(distinct(goals)) < n:
            raise PageStateError("one page was asked for twice in one call")
        ids, before = goals, self.table.state[goals]
        if before.any() or (self.warm and use_warm):
            ids, before = self.queue.choose(goals, before, use_warm)
        owners = self.table.owner[ids]
        taken = Taken(ids, before, (before == WARM) & (owners != tenant), owners)
        self.hand_out(taken, tenant)
        return taken

    def take_run(self, goal: int, count: int, tenant: int) -> int | None:
        """`take` in its usual form, at the price of a few scalars: ``count`` pages from ``goal``
        on, all at their goal, and all cold or all warm with the tenant's own bytes. Returns their
        state before, for `untake_run`; None where that is not so: then `take` finds others."""
        end, table = goal + count, self.table
        before = table.state.item(goal)
        used = self.mapped + self.quarantine.pages + self.lent
        if before > WARM or used + count > self.total or (before == FREE and self.warm):
            return None
        if before == WARM and table.owner.item(goal) != tenant:
            return None
        if count > 1:
            if (table.state[goal:end] != before).any():
                return None
            if before == WARM and (table.owner[goal:end] != tenant).any():
                return None
        if before == FREE:
            self.backend.create(goal, count)
        else:
            self.warm -= count
        self.mapped += count
        where = goal if count == 1 else slice(goal, end)
        table.state[where] = MAPPED
        table.refs[where] = 1
        table.owner[where] = tenant
        return before

    def untake_run(self, goal: int, count: int, before: int) -> None:
        """Undo `take_run`."""
        ids = np.arange(goal, goal + count)
        owners = self.table.owner[ids] * np.int32(before == WARM)
        states = np.full(count, before, np.uint8)
        self.untake(Taken(ids, states, states > WARM, owners))

    def share_run(self, page: int, count: int) -> None:
        """`share` for consecutive ids that the caller sees mapped."""
        self.table.refs[page : page + count] += 1

    def share(self, ids: PageIds) -> None:
        """One more holder for each page (an id may repeat)."""
        self._check_mapped(ids, "shared")
        if len(ids) and int(ids[-1]) - int(ids[0]) == len(ids) - 1 and (ids[1:] > ids[:-1]).all():
            self.table.refs[ids[0] : ids[-1] + 1] += 1
        else:
            np.add.at(self.table.refs, ids, 1)

    def give(self, ids: PageIds, *, quiesced: bool = False) -> None:
        """One holder fewer for each page; pages that reach none enter quarantine, once each."""
        self._check_mapped(ids, "given back")
        np.subtract.at(self.table.refs, ids, 1)
        left = self.table.refs[ids]
        dead = distinct(ids[left <= 0])
        if not len(dead):
            return
        if int(left.min()) < 0:
            np.add.at(self.table.refs, ids, 1)
            raise PageStateError("a page was given back more often than it was taken")
        if self.lower is not None:
            dead = self.lower.take_leave(dead, quiesced=quiesced)
        if len(dead):
            self.bury(dead, quiesced=quiesced)

    def assign(self, ids: PageIds, tenant: int) -> None:
        """Hand mapped pages, scrubbed by the caller, to ``tenant``."""
        self.table.owner[ids] = tenant

    def mix(self, ids: PageIds, tenant: int | PageIds) -> None:
        """``tenant`` may write these pages, too: the next owner gets them scrubbed."""
        owner = self.table.owner[ids]
        self.table.owner[ids] = np.where(owner == tenant, owner, MIXED)

    # ---- step boundary ---------------------------------------------------------------------
    def advance(self) -> None:
        """Step boundary: the next epoch begins and pages whose wait is over become free."""
        with self.turn:
            self.quarantine.advance()
            if self.lower is not None:
                self.lower.quarantine.advance()
            self.drain()
        if self.boundary is not None:
            self.boundary()

    def drain(self) -> None:
        """Free the pages whose quarantine is over, in the lower tier, too; keep their bytes up to
        the watermark.

        Raises:
            DriverError: the system refused to destroy pages. They wait for the next `drain`.
        """
        super().drain()
        if self.lower is not None:
            self.lower.drain()

    def lend(self, n: int) -> PageIds:
        """Lend up to ``n`` cold ids, as far as the budget has room for more bytes, to a thread that
        creates them and makes them warm, outside of any turn. Until `return_warm` they count as
        pending, created or not."""
        with self.turn:
            n = min(n, self.total - self.created)
            ids = self.table.take_spare(max(n, 0))
            self.table.state[ids] = QUARANTINED
            self.lent += len(ids)
            return ids

    def return_warm(self, ids: PageIds, made: int) -> None:
        """Take lent pages back: the first ``made`` of them exist and are free and warm, the others
        are free and cold, as they were."""
        with self.turn:
            self.lent -= len(ids)
            self._keep_warm(ids[:made])
            self.table.state[ids[made:]] = FREE
            self.table.recycle(ids[made:])
            self._make_room([ids[:made]])

    # ---- the end ---------------------------------------------------------------------------
    def close(self) -> None:
        """Close the backend once the last arena over this pool is gone. Idempotent."""
        if not self.turn.foreign:
            with self.turn:
                self.closing = True
                self._settle()

    def check(self) -> None:
        """Assert every law, see `laws.check_pool`. For tests; costs a scan."""
        check_pool(self)

    # ---- inside ----------------------------------------------------------------------------
    def _shrink(self, mapped: int) -> None:
        """Ask the reclaimers until no more than ``mapped`` pages are mapped, as far as they can."""
        if self.lent and self.recall is not None:
            self.recall()
            self._make_room()
        for reclaimer in (*self.reclaimers, *self.evictors):
            if self.over and self.mapped > mapped:
                reclaimer(self.mapped - max(mapped, 0))

    def _check_mapped(self, ids: PageIds, what: str) -> None:
        if len(ids) and not (self.table.state[ids] == MAPPED).all():
            raise PageStateError(f"only mapped pages can be {what}")

    def _settle(self) -> None:
        if self.closing and self._arenas == 0:
            self.backend.close()
