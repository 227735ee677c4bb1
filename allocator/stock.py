"""Pages of one kind of memory under one budget: what `pool.Pool` and `tier.Tier` have in common.

A stock owns the counts, the warm pages, the budget and the quarantine of its pages; the table of
all pages (state, references, owner) and the turn are one for all stocks of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .errors import DriverError, OutOfRange
from .quarantine import PageIds, Quarantine
from .table import FREE, MAPPED, MIXED, QUARANTINED, WARM, PageTable, Taken
from .turn import Turn
from .vmm import Backend
from .warmqueue import WarmQueue, runs


class Stock:
    """Pages of ``backend`` in ``table``, of which at most ``budget_bytes`` exist at once.

    Args:
        warm_high_bytes: free pages whose bytes are kept for quick reuse; more are destroyed, oldest
            first. None keeps all that the budget allows.
    """

    def __init__(
        self,
        backend: Backend,
        table: PageTable,
        turn: Turn,
        *,
        budget_bytes: int,
        warm_high_bytes: int | None = None,
    ) -> None:
        self.backend, self.table, self.turn = backend, table, turn
        self.page_bytes = backend.page_bytes
        self.quarantine = Quarantine()
        self.mapped = self.warm = self.lent = 0
        self.warm_high = None if warm_high_bytes is None else warm_high_bytes // self.page_bytes
        self.total = self._budget_pages(budget_bytes)
        self.queue = WarmQueue(table)

    # ---- counts ----------------------------------------------------------------------------
    @property
    def pending(self) -> int:
        """Pages that come back at a step boundary: in quarantine, or lent to the warmer."""
        return self.quarantine.pages + self.lent

    @property
    def free(self) -> int:
        """Pages that can be handed out now."""
        return max(0, self.total - self.mapped - self.pending)

    @property
    def over(self) -> int:
        """Pages in use beyond a budget that was lowered."""
        return max(0, self.mapped + self.pending - self.total)

    @property
    def created(self) -> int:
        """Pages that hold bytes."""
        return self.warm + self.mapped + self.pending

    # ---- handing out and taking back -------------------------------------------------------
    def hand_out(self, taken: Taken, tenant: int | PageIds) -> None:
        """Free pages, cold or warm, become mapped ones with one reference. All or nothing.

        Raises:
            DriverError: the backend refused.
        """
        ids, before = taken.ids, taken.before
        warm = int(np.count_nonzero(before))
        self.table.state[ids] = MAPPED
        self.table.refs[ids] = 1
        self.table.owner[ids] = tenant
        self.mapped += len(ids)
        self.warm -= warm
        try:
            self._make_room()
            if warm < len(ids):
                self._create(ids if warm == 0 else ids[before == FREE])
        except BaseException:
            self._put_back(taken)
            raise

    def untake(self, taken: Taken, *, written: bool = False) -> None:
        """Undo `hand_out`: counts, states, references and owners are as they were; pages that had
        no bytes have none again. What the system will not destroy stays warm. Such pages, and warm
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

    def bury(self, dead: PageIds, *, quiesced: bool) -> None:
        """Mapped pages that nobody holds any more enter quarantine."""
        self.table.state[dead] = QUARANTINED
        self.mapped -= len(dead)
        self.quarantine.hold(dead, quiesced=quiesced, fence=self.backend.fence())

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
        """Change the budget now. Warm pages go at once; pages in use stay until given back, and
        `over` counts them.

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
                # What a larger budget had room for, and could not be destroyed, waits on.
                while (excess := self.created - max(old, self.mapped + self.pending)) > 0:
                    self._wait_on(self.queue.pop(excess))
                raise

    # ---- inside ----------------------------------------------------------------------------
    def _budget_pages(self, budget_bytes: int) -> int:
        if budget_bytes < 0:
            raise OutOfRange(f"budget must not be negative, got {budget_bytes} bytes")
        return budget_bytes // self.page_bytes

    def _shrink(self, mapped: int) -> None:
        """Bring it about, if that can be, that no more than ``mapped`` pages are mapped."""

    def _make_room(self, arrived: Sequence[PageIds] = ()) -> None:
        """Destroy warm pages beyond the budget; if refused, pages that just arrived wait on."""
        if self.created <= self.total or not self.warm:
            return
        try:
            self.trim(max(0, self.total - self.mapped - self.pending))
        except BaseException:
            for ids in arrived:
                self._wait_on(ids[self.table.state[ids] == WARM])
            raise

    def _wait_on(self, ids: PageIds) -> None:
        """Warm pages enter quarantine: they are tried again at the next `drain`."""
        self.table.state[ids] = QUARANTINED
        self.warm -= len(ids)
        self.quarantine.hold(ids, quiesced=True)

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
