"""How pages come to lie under a reservation: taken, copied, mapped and counted, all or nothing."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from .frontiers import Frontiers
from .pool import Pool
from .quarantine import PageIds
from .record import NONE, Ints, Record
from .table import MIXED
from .vmm import Backend
from .warmqueue import runs

FEW_RUNS = 16  # that are quicker mapped one by one than by arrays
WARM_MAPS = 16384  # kernel maps of a reservation from which on it prefers order to warmth


class Mapping(Frontiers):
    """Frontiers over a pool and a record. Every method is a step of somebody's turn."""

    pool: Pool
    backend: Backend
    record: Record
    home: int
    zero_backed: bool

    def install(
        self,
        pages: Ints,
        ids: PageIds,
        fresh: Ints,
        copies: PageIds,
        nbytes: int,
        tenant: int | Ints,
        drop: Ints = NONE,
    ) -> None:
        """Alias ``ids`` at ``pages``, map new pages at ``fresh``, each a copy of the first
        ``nbytes`` bytes of one of ``copies`` (if any), and unmap ``drop``. What was mapped there
        before is given back. All or nothing."""
        # Warm pages from elsewhere break runs of file offsets: not when maps are getting scarce.
        use_warm = self.record.maps < WARM_MAPS
        taken = self.pool.take(fresh + self.home, tenant=tenant, use_warm=use_warm)
        try:
            for source, target in zip(copies.tolist(), taken.ids.tolist(), strict=False):
                self.backend.duplicate(source, target, nbytes)
            where = np.concatenate([pages, fresh, drop])
            old = self.record.change(where, np.concatenate([ids + 1, taken.ids + 1, 0 * drop]))
            try:
                dirty = taken.before > 0 if self.zero_backed else taken.stale
                self.record.zero(fresh[dirty], nbytes)
                self.pool.share(ids)
            except BaseException:
                self.record.change(where, old)
                raise
        except BaseException:
            self.pool.untake(taken, written=len(copies) > 0)
            raise
        if len(ids):
            self.pool.mix(ids, tenant)
        if len(copies):  # a copy of another tenant's bytes is no more this one's than they are
            self.pool.assign(taken.ids[self.pool.owners(copies) != tenant], MIXED)
        self.pool.give(old[old > 0] - 1)

    def map_home(self, pages: Ints, tenant: int | Ints) -> bool:
        """Map a few runs of new pages, each at home: a decode step, a prompt. False, and nothing
        done, where some are to be had elsewhere only. All or nothing."""
        if self.zero_backed or self.lanes > FEW_RUNS:
            return False
        parts, at = list(runs(pages)), 0
        if len(parts) > FEW_RUNS:
            return False
        with ExitStack() as undo:
            for page, count in parts:
                if isinstance(tenant, int):
                    owner = tenant
                else:
                    owner = tenant.item(at)
                    if (tenant[at : at + count] != owner).any():
                        return False
                goal, at = self.home + page, at + count
                before = self.pool.take_run(goal, count, owner)
                if before is None:
                    return False
                undo.callback(self.pool.untake_run, goal, count, before)
            # Only now: what is undone because a page is elsewhere must not need the system.
            for page, count in parts:
                self.record.map_run(page, self.home + page, count)
                undo.callback(
                    self.record.change, np.arange(page, page + count), np.zeros(count, np.int64)
                )
            undo.pop_all()
        return True

    def alias_run(self, source: int, target: int, full: int, tenant: int) -> bool:
        """`alias` where one map call does it: one lane, whose prefix is one run of ids of this
        tenant's, into an empty slot. False where that is not so."""
        page = self.run_at(source, full)
        if page is None or self.last_flat.item(target):
            return False
        owner = self.pool.table.owner[page : page + full]
        if self.pool.tenants > 1 and (owner != tenant).any():
            return False
        start = source * self.slot_pages
        entries = self.entry[start : start + full]
        self.record.map_run(target * self.slot_pages, page, full, entries)
        self.pool.share_run(page, full)
        self.last_flat[target] = full
        self.shared_to[target] = full
        self.shared_to[source] = max(self.shared_to.item(source), full)
        return True
