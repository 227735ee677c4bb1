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

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .errors import ClosedError, DriverError, OutOfPages, OutOfRange, PageStateError
from .laws import check_pool
from .quarantine import PageIds, Quarantine
from .table import FREE, MAPPED, MIXED, QUARANTINED, WARM, PageTable, Taken, distinct
from .turn import Turn
from .vmm import Backend
from .warmqueue import WarmQueue, runs


class Pool:
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
        self.backend = backend
        self.page_bytes = backend.page_bytes
        self.quarantine = Quarantine()
        self.turn = Turn()
        self.mapped = self.warm = self.lent = 0
        self.warm_high = None if warm_high_bytes is None else warm_high_bytes // self.page_bytes
        self.total = self._budget_pages(budget_bytes)
        self.reclaimers: list[Callable[[int], None]] = []  # asked for pages before we refuse
        self.boundary: Callable[[], None] | None = None  # told of every step boundary
        self.recall: Callable[[], None] | None = None  # whoever was lent pages: give them back
        self.table = PageTable()
        self._tenants: dict[Hashable, int] = {None: 0}
        self._arenas = 0
        self._closing = False
        self.queue = WarmQueue(self.table)

    # ---- counts ----------------------------------------------------------------------------
    @property
    def pending(self) -> int:
        """Pages that come back at a step boundary: in quarantine, or lent to the warmer."""
        return self.quarantine.pages + self.lent

    @property
    def free(self) -> int:
        """Pages that `take` can hand out now."""
        return max(0, self.total - self.mapped - self.pending)

    @property
    def over(self) -> int:
        """Pages in use beyond a budget that was lowered."""
        return max(0, self.mapped + self.pending - self.total)

    @property
    def created(self) -> int:
        """Pages that hold bytes."""
        return self.warm + self.mapped + self.pending

    def refs(self, ids: PageIds) -> NDArray[np.int32]:
        """Number of addresses (and exports) that hold each page."""
        return self.table.refs[ids]

    def owners(self, ids: PageIds) -> NDArray[np.int32]:
        """Tenant whose bytes each page carries; `table.MIXED` for several."""
        return self.table.owner[ids]

    # ---- homes -----------------------------------------------------------------------------
    def extent(self, pages: int) -> int:
        """A run of ids to be the homes of ``pages`` pages; returns the first. `forget` ends it."""
        if self._closing:
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
        for reclaimer in self.reclaimers:
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
        warm = int(np.count_nonzero(before))
        self.table.state[ids] = MAPPED
        self.table.refs[ids] = 1
        self.table.owner[ids] = tenant
        self.mapped += n
        self.warm -= warm
        try:
            self._make_room()
            if warm < n:
                self._create(ids if warm == 0 else ids[before == FREE])
        except BaseException:
            self._put_back(taken)
            raise
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

    def untake(self, taken: Taken, *, written: bool = False) -> None:
        """Undo `take`: counts, states, references and owners are as they were; pages that had no
        bytes have none again. What the system will not destroy stays warm. Such pages, and warm
        ones that were ``written`` meanwhile, are scrubbed before anybody gets them."""
        before, owners = taken.before.copy(), taken.owners.copy()
        if written:
            owners[before == WARM] = MIXED
        cold = np.flatnonzero(before == FREE)
        done = 0
        for page, count in runs(taken.ids[cold]):
            try:
                self.backend.destroy(page, count)
            except DriverError:
                before[cold[done : done + count]] = WARM
                owners[cold[done : done + count]] = MIXED
            done += count
        self._put_back(replace(taken, before=before, owners=owners))

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
        self.table.state[dead] = QUARANTINED
        self.mapped -= len(dead)
        self.quarantine.hold(dead, quiesced=quiesced, fence=self.backend.fence())

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
            self.drain()
        if self.boundary is not None:
            self.boundary()

    def drain(self) -> None:
        """Free the pages whose quarantine is over; keep their bytes up to the watermark.

        Raises:
            DriverError: the system refused to destroy pages. They wait for the next `drain`.
        """
        with self.turn:
            over = self.quarantine.drain()
            for ids in over:
                self._keep_warm(ids)
            self._make_room(over)
            if self.warm_high is not None and self.warm > self.warm_high:
                self.trim(self.warm_high)

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

    # ---- giving memory back ----------------------------------------------------------------
    def trim(self, keep_pages: int = 0) -> int:
        """Destroy warm pages, oldest first, until ``keep_pages`` are left; returns how many went.

        Raises:
            DriverError: the system refused; what was destroyed before stays so.
        """
        gone = 0
        with self.turn:
            while self.warm > keep_pages:
                ids = self.queue.pop(self.warm - keep_pages)
                done = 0
                try:
                    for page, count in runs(ids):
                        self.backend.destroy(page, count)
                        done += count
                finally:
                    self.queue.unpop(ids[done:])
                    self._forget_bytes(ids[:done])
                gone += done
        return gone

    def set_budget(self, budget_bytes: int) -> None:
        """Change the budget now. Warm pages go at once, and what reclaimers find without a live
        row; pages in use stay until given back, and `over` counts them.

        Raises:
            OutOfRange: negative. DriverError: the budget is as before.
        """
        with self.turn:
            old, self.total = self.total, self._budget_pages(budget_bytes)
            try:
                self._make_room()
                if self.over:
                    self._shrink(self.mapped - self.over)
            except BaseException:
                self.total = old
                raise

    def close(self) -> None:
        """Close the backend once the last arena over this pool is gone. Idempotent."""
        if not self.turn.foreign:
            with self.turn:
                self._closing = True
                self._settle()

    def check(self) -> None:
        """Assert every law, see `laws.check_pool`. For tests; costs a scan."""
        check_pool(self)

    # ---- inside ----------------------------------------------------------------------------
    def _budget_pages(self, budget_bytes: int) -> int:
        if budget_bytes < 0:
            raise OutOfRange(f"budget must not be negative, got {budget_bytes} bytes")
        return budget_bytes // self.page_bytes

    def _shrink(self, mapped: int) -> None:
        """Ask the reclaimers until no more than ``mapped`` pages are mapped, as far as they can."""
        if self.lent and self.recall is not None:
            self.recall()
            self._make_room()
        for reclaimer in self.reclaimers:
            if self.over and self.mapped > mapped:
                reclaimer(self.mapped - max(mapped, 0))

    def _check_mapped(self, ids: PageIds, what: str) -> None:
        if len(ids) and not (self.table.state[ids] == MAPPED).all():
            raise PageStateError(f"only mapped pages can be {what}")

    def _settle(self) -> None:
        if self._closing and self._arenas == 0:
            self.backend.close()

    def _make_room(self, arrived: Sequence[PageIds] = ()) -> None:
        """Destroy warm pages beyond the budget; if refused, pages that just arrived wait on."""
        if self.created <= self.total or not self.warm:
            return
        try:
            self.trim(max(0, self.total - self.mapped - self.pending))
        except BaseException:
            for ids in arrived:
                back = ids[self.table.state[ids] == WARM]
                self.table.state[back] = QUARANTINED
                self.warm -= len(back)
                self.quarantine.hold(back, quiesced=True)
            raise

    def _keep_warm(self, ids: PageIds) -> None:
        self.table.state[ids] = WARM
        self.warm += len(ids)
        self.queue.push(ids)

    def _forget_bytes(self, ids: PageIds) -> None:
        self.table.state[ids] = FREE
        self.table.owner[ids] = 0
        self.warm -= len(ids)
        self.table.recycle(ids)

    def _create(self, ids: PageIds) -> None:
        """All or nothing."""
        done = 0
        try:
            for page, count in runs(ids):
                self.backend.create(page, count)
                done += count
        except BaseException:
            for page, count in runs(ids[:done]):
                self.backend.destroy(page, count)
            raise

    def _put_back(self, taken: Taken) -> None:
        """The bookkeeping of `untake`."""
        ids = taken.ids
        self.table.state[ids] = taken.before
        self.table.refs[ids] = 0
        self.table.owner[ids] = taken.owners
        self.mapped -= len(ids)
        warm = ids[taken.before == WARM]
        if len(warm):
            self._keep_warm(warm)
        self.table.recycle(ids[taken.before == FREE])
