"""Pages change tiers under addresses that stay: copied first, remapped then.

    begin    sources are *held* (one reference more), targets are taken        within a turn
    carry    bytes are copied, by any thread, next to everything else          no turn
    finish   wherever a source is mapped still, its target is mapped instead   within a turn

What makes that safe is the rule for shared pages: who wants to write a page that has another holder
copies it first (`Arena.unshare`). A held page has one, so nobody writes it while it is carried; who
would have, got a page of his own, and `finish` finds the source at one address fewer. A page that
was truncated, written, closed or reordered away meanwhile is therefore not installed there, without
anybody having to say so. A held page is not used again either: no id means two things on the way.

Readers see the old bytes or the same bytes elsewhere. Nothing that could read the old page by its
address is left when the remap returns (the backend waits for submitted work first), so what was
left behind is free at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from .errors import ClosedError, DriverError, PageStateError
from .frontiers import join
from .mapping import WARM_MAPS, Mapping
from .quarantine import PageIds
from .record import Ints
from .table import Taken, distinct
from .tier import Tier
from .turn import Turn
from .vmm import TieredBackend


@dataclass(frozen=True, eq=False)
class Transfer:
    """Pages on their way: ``source[i]``, first seen at page number ``pages[i]``, to ``target[i]``.

    Attributes: ``down`` to the lower tier; ``copied`` which targets are new: the others are twins
    of their sources, and need no copy; ``taken`` how the new ones were got; ``skipped`` pages with
    other holders, which stay.
    """

    down: bool
    pages: Ints
    source: PageIds
    target: PageIds
    copied: NDArray[np.bool_]
    taken: Taken
    skipped: Ints

    @property
    def fresh(self) -> PageIds:
        """Targets that are new."""
        return self.target[self.copied]

    def split(self, pages: int) -> list[Transfer]:
        """The same in pieces of at most ``pages`` pages, to be ended one by one."""
        return [
            self.part(slice(first, first + pages)) for first in range(0, len(self.source), pages)
        ]

    def part(self, where: slice) -> Transfer:
        """Some of the pages."""
        return replace(
            self,
            pages=self.pages[where],
            source=self.source[where],
            target=self.target[where],
            copied=self.copied[where],
            skipped=self.skipped[:0],
        )

    @staticmethod
    def joined(parts: Sequence[Transfer]) -> Transfer:
        """Parts of one transfer, to be ended at once."""
        if len(parts) == 1:
            return parts[0]
        return replace(
            parts[0],
            pages=np.concatenate([part.pages for part in parts]),
            source=np.concatenate([part.source for part in parts]),
            target=np.concatenate([part.target for part in parts]),
            copied=np.concatenate([part.copied for part in parts]),
        )

    def runs(self) -> list[tuple[int, int, int]]:
        """What is to be copied: source, target, and how many pages that follow each other."""
        source, target = self.source[self.copied], self.target[self.copied]
        if not len(source):
            return []
        cuts = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
        starts = [0, *cuts.tolist()]
        return [
            (source.item(start), target.item(start), end - start)
            for start, end in zip(starts, [*starts[1:], len(source)], strict=True)
        ]


class Moves(Mapping):
    """A mapping whose pages may change tiers."""

    turn: Turn
    page_bytes: int
    closed: bool

    @property
    def tier(self) -> Tier:
        """The pool's lower tier. Raises PageStateError where there is none."""
        if self.pool.lower is None:
            raise PageStateError("the pool has one tier only: make a Tier over it first")
        return self.pool.lower

    def move(self, pages: Ints, *, down: bool) -> int:
        """Move mapped pages to the lower tier or back, with all their addresses; those that are
        there stay. Returns how many bytes were copied: none for a page whose twin is there. All or
        nothing.

        Raises:
            PageStateError: a page is exported, or mapped by another arena as well; or there is no
            lower tier.
            OutOfPages, MapLimitError, DriverError: nothing changed, except that reclaimers may have
            unmapped pages without live rows, or moved others.
        """
        with self.turn:
            fence = self.shared_to.copy()
            transfer = self.begin(pages, down=down)
            try:
                if len(transfer.skipped):
                    raise PageStateError(
                        f"{len(transfer.skipped)} of {len(pages)} pages have holders outside of "
                        f"this arena, page {transfer.skipped[0]} is the first: close exports and "
                        "other caches' sequences, or wait for moves under way"
                    )
                cast(TieredBackend, self.backend).settle()
                for _ in self.carry(transfer, len(pages)):
                    pass
                self._install(transfer)
            except BaseException:
                self.pool.table.refs[transfer.source] -= 1
                (self.tier if down else self.pool).untake(transfer.taken, written=True)
                self.shared_to[:] = fence
                raise
            self._free()
            return int(np.count_nonzero(transfer.copied)) * self.page_bytes

    # ---- step by step ------------------------------------------------------------------------
    def begin(self, pages: Ints, *, down: bool) -> Transfer:
        """Hold pages that are to move, and take where they go. `finish` or `abandon` ends it.

        Raises:
            ClosedError, PageStateError: the arena is closed, or there is no lower tier.
            OutOfPages, DriverError: nothing changed.
        """
        with self.turn:
            if self.closed:
                raise ClosedError("the arena is closed; make a new one")
            tier, table = self.tier, self.pool.table
            if not down:
                self.pool.reclaim(len(pages))
            pages = distinct(pages)
            ids = self.ids(pages)
            other = (ids >= 0) & (tier.holds(ids) != down)
            pages, ids = pages[other], ids[other]
            skipped, refs = pages[:0], table.refs[ids]
            if (refs > 1).any():
                _, first = np.unique(ids, return_index=True)
                first.sort()  # in the order of addresses, that runs stay runs
                pages, ids = pages[first], ids[first]
                _, _, counts = self._addresses(pages, ids, table.refs[ids])
                ours = counts == table.refs[ids]
                skipped, pages, ids = pages[~ours], pages[ours], ids[ours]
            target = tier.twins_of(ids)
            copied = target < 0
            owners = table.owner[ids[copied]].astype(np.int64)
            if down:
                taken = tier.take_any(owners)
            else:
                use_warm = self.record.maps < WARM_MAPS
                goals = pages[copied] + self.home
                taken = self.pool.take(goals, tenant=owners, use_warm=use_warm)
            target[copied] = taken.ids
            self.pool.share(ids)
            self._fence(pages)
            return Transfer(down, pages, ids, target, copied, taken, skipped)

    def carry(self, transfer: Transfer, most: int) -> Iterator[int]:
        """Copy, at most ``most`` pages at a time; yields how many. Needs no turn. What was
        submitted before `begin` must have been written: see `vmm.TieredBackend.settle`.

        Raises:
            DriverError: abandon the transfer.
        """
        backend = cast(TieredBackend, self.backend)
        for source, target, count in transfer.runs():
            for done in range(0, count, most):
                some = min(most, count - done)
                backend.copy(source + done, target + done, some)
                yield some

    def finish(self, transfer: Transfer, *, keep_twins: bool = True) -> Ints:
        """Map what was carried wherever its sources are mapped still; returns these page numbers.
        With ``keep_twins`` promoted pages leave theirs in the lower tier.

        Raises:
            MapLimitError, DriverError: nothing changed; try again or abandon.
        """
        with self.turn:
            pages = self._install(transfer, keep_twins=keep_twins)
            self._free()
            return pages

    def abandon(self, transfer: Transfer) -> None:
        """Let go of sources and targets."""
        with self.turn:
            self.pool.give(transfer.source, quiesced=True)
            self.pool.give(transfer.fresh, quiesced=True)
            self._free()

    # ---- inside ------------------------------------------------------------------------------
    def _install(self, transfer: Transfer, *, keep_twins: bool = True) -> Ints:
        tier, table = self.tier, self.pool.table
        source, target = transfer.source, transfer.target
        held = table.refs[source] - 1
        pages, which, counts = self._addresses(transfer.pages, source, held)
        good = (counts == held) & (counts > 0)
        if self.closed:
            good[:] = False
        if not good.all():
            pages, which = pages[good[which]], which[good[which]]
        if (pages[1:] < pages[:-1]).any():
            order = np.argsort(pages)
            pages, which = pages[order], which[order]
        self.record.change(pages, target[which] + 1)
        self._fence(pages)
        new, old, many = target[good], source[good], counts[good]
        table.owner[new] = table.owner[old]
        if transfer.down:
            tier.part(old)
        table.refs[new] = many
        if transfer.down or not keep_twins:
            self.pool.give(np.repeat(old, many + 1), quiesced=True)
        else:
            table.refs[old] = 1
            tier.pair(new, old)
        self.pool.give(source[~good], quiesced=True)
        self.pool.give(target[transfer.copied & ~good], quiesced=True)
        return pages

    def _addresses(
        self, pages: Ints, ids: PageIds, holders: NDArray[np.int32]
    ) -> tuple[Ints, Ints, Ints]:
        """Every page number that maps one of ``ids``, of which ``pages`` names one each: page
        numbers, the index of their id, and how many there are for each id."""
        plain = (holders == 1) & (self.ids(pages) == ids)
        if plain.all():
            return pages, np.arange(len(ids)), np.ones(len(ids), np.int64)
        where, which = pages[plain], np.flatnonzero(plain)
        rest = np.flatnonzero(~plain)
        if len(rest):
            # Pages with other holders lie below shared_to.
            slots = np.flatnonzero(self.shared_to)
            seen = join(self.within(s, 0, self.shared_to.item(s)) for s in slots.tolist())
            here = self.ids(seen)
            sought = ids[rest]
            order = np.argsort(sought)
            at = np.minimum(np.searchsorted(sought[order], here), len(rest) - 1)
            found = sought[order[at]] == here
            where = np.concatenate([where, seen[found]])
            which = np.concatenate([which, rest[order[at[found]]]])
        return where, which, np.bincount(which, minlength=len(ids))

    def _fence(self, pages: Ints) -> None:
        """These pages are not written without `Arena.unshare`."""
        if len(pages):
            slots, index = pages // self.slot_pages, pages % self.lane_pages + 1
            np.maximum.at(self.shared_to, slots, index)

    def _free(self) -> None:
        with suppress(DriverError):  # the pool tries again at the next step boundary
            self.pool.drain()
