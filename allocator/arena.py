"""One reservation cut into slots and lanes: grow, trim, shift, alias, adopt.

    arena   = slots at one constant stride; a slot holds one sequence
    slot    = lanes at one constant stride; a lane is a run of bytes that grows at its end
    lane    = pages; mapped are the pages ``first .. last`` of each lane

         slot 0                          slot 1
       ┌ lane 0 ────┬ lane 1 ────┐     ┌ lane 0 ────┬ lane 1 ────┐
       │████████░░░░│████████░░░░│ ... │██░░░░░░░░░░│██░░░░░░░░░░│     █ mapped   ░ reserved
       └────────────┴────────────┘     └────────────┴────────────┘

    entry[v] != 0  <=>  page v lies in first .. last of its lane
    a page of a slot that has another holder, or lies in the lower tier, or has a twin there, lies
    below shared_to of that slot: who writes below it calls `unshare` first

Every public method is one turn, and all or nothing: pages are charged before anything is mapped,
and a failing call is undone exactly before its error leaves. Nothing is unmapped under a *pin* (a
live view); a remap leaves readers with the old or the new bytes.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from .errors import ClosedError, DriverError, OutOfRange, PageStateError, ReserveError
from .frontiers import GrowPlan, join
from .laws import check_arena
from .lease import Lease
from .moves import Moves
from .pool import Pool
from .record import NONE, Ints, Record

MAX_RESERVE_BYTES = 1 << 47  # what x86-64 and AArch64 Linux give a process


class Arena(Moves):
    """A reservation of ``slots * lanes * lane_pages`` pages backed by a pool's pages on demand.

    Args:
        pool: where pages come from.
        slots, lanes, lane_pages: the geometry above.
        zero_backed: unmapped addresses read as zeros instead of faulting (for static shapes), and
            so do freshly mapped pages.

    Raises:
        ReserveError: the system refused the address space.
        MapLimitError: no kernel map is left. ClosedError: the pool is closed.
    """

    def __init__(
        self, pool: Pool, *, slots: int, lanes: int, lane_pages: int, zero_backed: bool = False
    ) -> None:
        nbytes = slots * lanes * lane_pages * pool.page_bytes
        if nbytes > MAX_RESERVE_BYTES:
            raise ReserveError(
                f"{nbytes} bytes of address space wanted, a process has {MAX_RESERVE_BYTES}: use "
                "fewer slots or a smaller max_tokens"
            )
        super().__init__(slots, lanes, lane_pages)
        self.pool, self.backend, self.page_bytes = pool, pool.backend, pool.page_bytes
        self.turn = pool.turn
        self.zero_backed = zero_backed
        with self.turn:
            self.home = pool.extent(self.pages)
            try:
                self.record = Record(self.backend, 0, self.pages)  # before there is what to undo
                self.address = self.record.address = self.backend.reserve(
                    self.pages, home=self.home, zero_backed=zero_backed
                )
            except BaseException:
                pool.forget(self.home, self.pages)
                raise
            self.entry = self.record.entry
            self.closed = self._torn_down = False

    # ---- looking -----------------------------------------------------------------------------
    @property
    def maps(self) -> int:
        """Kernel maps of this reservation."""
        return self.record.maps

    # ---- growing -----------------------------------------------------------------------------
    def grow(self, plan: GrowPlan, *, tenant: int | Ints = 0) -> None:
        """Map what a plan names; a plan that went out of date is made anew. All or nothing.

        Args:
            tenant: of all the pages, or one for each slot of the arena.

        Raises:
            OutOfPages, MapLimitError, DriverError, PageStateError (a slot is named twice): nothing
            changed, except that reclaimers may have unmapped pages without live rows.
        """
        with self.turn:
            self._check_open()
            self.pool.reclaim(len(plan.pages))
            now = self.last[plan.slots, 0] if self.lanes == 1 else self.last[plan.slots]
            if not np.array_equal(now, plan.last):
                again = self.plan_grow(plan.slots, plan.to)
                if again is None:
                    return
                plan = again
            if not isinstance(tenant, int):
                tenant = tenant[plan.pages // self.slot_pages]
            if not self.map_home(plan.pages, tenant):
                self.install(NONE, NONE, plan.pages, NONE, 0, tenant)
            self.last[plan.slots] = np.maximum(self.last[plan.slots], plan.to[:, None])

    def grow_to(self, slot: int, to: int, *, tenant: int = 0) -> None:
        """`plan_grow` and `grow` for one slot. One lane whose pages are at home, the usual case,
        costs little more than its one map call.

        Raises:
            OutOfRange: as `plan_grow`. Otherwise as `grow`.
        """
        if self.lanes == 1 and to <= self.lane_pages and not self.zero_backed:
            with self.turn:
                self._check_open()
                last = self.last_flat.item(slot)
                if to <= last:
                    return
                page = slot * self.slot_pages + last
                before = self.pool.take_run(self.home + page, to - last, tenant)
                if before is not None:
                    try:
                        self.record.map_run(page, self.home + page, to - last)
                    except BaseException:
                        self.pool.untake_run(self.home + page, to - last, before)
                        raise
                    self.last_flat[slot] = to
                    return
        plan = self.plan_grow(np.array([slot]), np.array([to]))
        if plan is not None:
            self.grow(plan, tenant=tenant)

    def refill(self, slot: int, lanes: Ints, *, tenant: int = 0) -> None:
        """Map the front pages of some lanes again that were trimmed before: the slot starts anew.

        Raises:
            OutOfPages, MapLimitError, DriverError: nothing changed.
        """
        with self.turn:
            self._check_open()
            self.pool.reclaim(int(self.first[slot, lanes].sum()))
            pages = self.span(slot, 0, self.first[slot, lanes], lanes)
            self.install(NONE, NONE, pages, NONE, 0, tenant)
            self.first[slot, lanes] = 0

    # ---- giving back -------------------------------------------------------------------------
    def trim(
        self, slot: int, first: Ints | int, last: Ints | int, *, quiesced: bool = False
    ) -> int:
        """Keep only pages ``first .. last`` of each lane mapped; returns how many were given back.

        Raises:
            PageStateError: a live view pins the slot. DriverError: nothing changed.
        """
        with self.turn:
            self._check_open()
            old_first, old_last = self.first[slot], self.last[slot]
            new_first = np.clip(first, old_first, old_last)
            new_last = np.clip(last, new_first, old_last)
            front = self.span(slot, old_first, new_first)
            pages = np.concatenate([front, self.span(slot, new_last, old_last)])
            if not len(pages):
                return 0
            self.check_unpinned(slot)
            old = self.record.change(pages, np.zeros(len(pages), np.int64))
            self.pool.give(old - 1, quiesced=quiesced)
            self.first[slot], self.last[slot] = new_first, new_last
            if not (new_last > new_first).any():
                self.shared_to[slot] = 0
            return len(pages)

    def drop(self, slot: int, *, quiesced: bool = False) -> int:
        """Unmap a whole slot; returns how many pages were given back. Raises: as `trim`."""
        with self.turn:
            gone = self.trim(slot, 0, 0, quiesced=quiesced)
            self.first[slot] = self.last[slot] = self.shared_to[slot] = 0
            return gone

    def drop_all(self, slots: Ints, *, quiesced: bool = False) -> int:
        """`drop` several slots (ascending) by one change. Raises: as `trim`; none was dropped."""
        with self.turn:
            self._check_open()
            for slot in slots[self.pins[slots] > 0].tolist():
                self.check_unpinned(slot)
            pages = join(self.mapped(slot) for slot in slots.tolist())
            if len(pages):
                old = self.record.change(pages, np.zeros(len(pages), np.int64))
                self.pool.give(old - 1, quiesced=quiesced)
            self.first[slots] = self.last[slots] = self.shared_to[slots] = 0
            return len(pages)

    def shift(self, slot: int, lane: int, gap: int, count: int) -> None:
        """Close a gap of ``count`` whole pages at page ``gap`` of a lane: the pages behind it move
        down by remapping, without a copy; the gap's pages are given back.

        Raises:
            OutOfRange: the gap is not inside of the mapped part.
            PageStateError: a live view pins the slot.
            MapLimitError, DriverError: nothing changed.
        """
        with self.turn:
            self._check_open()
            first, last = int(self.first[slot, lane]), int(self.last[slot, lane])
            if not (first <= gap and count >= 0 and gap + count <= last):
                raise OutOfRange(
                    f"gap {gap}..{gap + count} lies outside of the mapped {first}..{last}"
                )
            if count == 0:
                return
            self.check_unpinned(slot)
            base = slot * self.slot_pages + lane * self.lane_pages
            pages = np.arange(base + gap, base + last)
            old = self.entry[pages]
            self.record.change(pages, np.concatenate([old[count:], np.zeros(count, np.int64)]))
            self.pool.give(old[:count] - 1)
            self.last[slot, lane] = last - count

    # ---- sharing -----------------------------------------------------------------------------
    def alias(
        self, source: int, target: int, full: int, tail_bytes: int = 0, *, tenant: int = 0
    ) -> None:
        """Make ``target`` begin with ``source``'s first ``full`` pages of every lane, the same
        physical pages; with ``tail_bytes`` the next page is copied that far into a page of its own.
        Lanes whose front was trimmed are trimmed in the target, too.

        Raises:
            OutOfRange: ``source`` has fewer pages mapped, or is ``target``.
            PageStateError: pages of ``target`` would be unmapped under a live view.
            OutOfPages, MapLimitError, DriverError: nothing changed.
        """
        if source == target:
            raise OutOfRange(f"slot {source} cannot alias itself")
        with self.turn:
            self._check_open()
            if self.lanes == 1 and not tail_bytes and self.alias_run(source, target, full, tenant):
                return
            self.pool.reclaim(self.lanes if tail_bytes else 0)
            self.check_holds(source, full + (tail_bytes > 0))
            first = np.minimum(self.first[source], full)
            ids = self.ids(self.span(source, first, full))
            lanes = np.flatnonzero((self.first[source] <= full) & (tail_bytes > 0))
            copies = self.ids(self.span(source, full, full + 1, lanes))
            fresh = self.span(target, full, full + 1, lanes)
            end = np.full(self.lanes, full)
            end[lanes] += 1
            drop, last = self.surplus(target, first, end)
            pages = self.span(target, first, full)
            self.install(pages, ids, fresh, copies, tail_bytes, tenant, drop)
            self.first[target], self.last[target] = first, last
            self.shared_to[target] = max(int(self.shared_to[target]), full)
            self.shared_to[source] = max(int(self.shared_to[source]), full)

    def permute(
        self, slots: Ints, order: Ints, full: Ints, tail_bytes: Ints, *, tenant: int = 0
    ) -> None:
        """Slot ``slots[i]`` gets the contents of slot ``slots[order[i]]`` (beam search), in place.

        ``full[j]`` pages of slot j are aliased; its next page, filled ``tail_bytes[j]`` bytes, goes
        to one taker whole and is copied for the others. Only pages that change are remapped.
        Raises: as `alias`.
        """
        with self.turn:
            self._check_open()
            if not len(slots):
                return
            if len(np.unique(slots)) < len(slots):
                raise PageStateError("a slot is named twice in one call")
            moves = self.plan_permute(slots, order, full, tail_bytes)
            if self.pool.reclaim(len(moves.fresh)):
                moves = self.plan_permute(slots, order, full, tail_bytes)
            nbytes = int(tail_bytes.max(initial=0))
            self.install(
                moves.pages, moves.ids, moves.fresh, moves.copies, nbytes, tenant, moves.drop
            )
            self.first[slots], self.last[slots] = moves.first, moves.last
            # A tail that moved may still be mapped in the surplus of the slot it came from.
            self.shared_to[slots] = max(self.shared_to[slots].max(), full.max() + 1)

    def unshare(self, slot: int, first: int, last: int, *, tenant: int = 0) -> None:
        """Make a slot's pages ``first .. last`` ready to be written: those that have other holders,
        or lie in the lower tier, are exchanged for private copies; twins are dropped.

        Raises:
            OutOfPages, MapLimitError, DriverError: nothing changed.
        """
        with self.turn:
            self._check_open()
            if first >= self.shared_to[slot]:
                return
            shared = self._shared(slot, first, last)
            if self.pool.reclaim(len(shared)):
                shared = self._shared(slot, first, last)
            self.install(NONE, NONE, shared, self.ids(shared), self.page_bytes, tenant)
            if self.pool.lower is not None:
                self.pool.lower.drop_twins_of(self.ids(self.within(slot, first, last)))

    def retenant(self, slot: int, tenant: int) -> None:
        """Hand a slot's mapped pages to another tenant: what another one wrote is zeroed, or, where
        the page has other holders, exchanged for a fresh page.

        Raises:
            OutOfPages, MapLimitError, DriverError: nothing changed hands.
        """
        with self.turn:
            self._check_open()
            pages = self._foreign(slot, tenant)
            if self.pool.reclaim(int(np.count_nonzero(self._held(pages)))):
                pages = self._foreign(slot, tenant)
            held = self._held(pages)
            if held.any():
                self.install(NONE, NONE, pages[held], NONE, 0, tenant)
            self.record.zero(pages[~held])
            if self.pool.lower is not None:
                self.pool.lower.drop_twins_of(self.ids(pages[~held]))
            self.pool.assign(self.ids(pages[~held]), tenant)

    # ---- closing -----------------------------------------------------------------------------
    def lease(self, first: int, last: int) -> Lease:
        """Pin slots ``first .. last`` until the lease dies, on whatever thread. Not a turn: it
        changes no mapping, and happens twice a layer and step."""
        self._check_open()
        return Lease(self, first, last)

    def settle_quietly(self) -> None:
        """`settle` for a destructor: nobody to tell of an error, close() tries again."""
        with suppress(DriverError):
            self.settle()

    def close(self) -> None:
        """Give everything back; with live views, as soon as the last of them dies. Idempotent."""
        if not self.turn.foreign:
            with self.turn:
                self.closed = True
                self.settle()

    def settle(self) -> None:
        """Tear down if closed and nobody looks any more."""
        if not self.closed or self._torn_down or self.pins.any():
            return
        ids = join(
            self.ids(self.mapped(slot)) for slot in range(self.slots) if self.last[slot].any()
        )
        self.backend.release(self.address, self.pages)
        self._torn_down = True
        self.record.forget()
        self.pool.give(ids, quiesced=True)
        with suppress(DriverError):  # the pool tries again at the next step boundary
            self.pool.drain()
        self.pool.forget(self.home, self.pages)

    def __del__(self) -> None:
        if not getattr(self, "_torn_down", True):
            self.closed = True
            self.turn.soon(self.settle_quietly)

    def check(self) -> None:
        """Assert every law, see `laws.check_arena`. For tests; costs a scan."""
        check_arena(self)

    # ---- inside ------------------------------------------------------------------------------
    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the arena is closed; make a new one")

    def _shared(self, slot: int, first: int, last: int) -> Ints:
        """Which of the mapped pages ``first .. last`` of a slot may not be written."""
        pages = self.within(slot, first, last)
        return pages[self._held(pages)]

    def _held(self, pages: Ints) -> np.ndarray:
        """Which pages have other holders, or lie in the lower tier."""
        ids = self.ids(pages)
        held: np.ndarray = self.pool.refs(ids) > 1
        return held if self.pool.lower is None else held | self.pool.lower.holds(ids)

    def _foreign(self, slot: int, tenant: int) -> Ints:
        """Mapped pages of a slot that carry another tenant's bytes."""
        pages = self.mapped(slot)
        return pages[self.pool.owners(self.ids(pages)) != tenant]
