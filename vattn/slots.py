"""Which slots of a cache are taken, which one the next sequence gets, and giving pages back.

    EMPTY ──take──► OPEN ──close──► PARKED ──take──► OPEN          (adopted: still mapped)
      ▲               │                │
      │               └─close─► HELD   │      HELD: pages are shared, or wait for a view to die
      └──────collect()───────────┴─────┘      reclaim(): a parked slot is needed elsewhere

A parked slot with a live view is not handed out: its rows may not change under the view.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from .allocator.arena import Arena
from .allocator.errors import OutOfRange
from .lengths import Lengths


class Slots:
    """The slots of an arena. ``generation[slot]`` is odd while the slot is open, and grows at every
    opening and closing, so that a handle knows when it is out of date."""

    def __init__(self, arena: Arena, lengths: Lengths) -> None:
        self.arena, self.lengths, self.count = arena, lengths, arena.slots
        self.generation = np.zeros(self.count, np.int64)
        self.tenant = np.zeros(self.count, np.int64)  # by number, see Pool.tenant
        self.closings = 0
        self.names: dict[int, Hashable] = {}  # tenant of each open slot
        self._closed_at = np.zeros(self.count, np.int64)  # epoch
        # Ordered sets, the lowest slot last: popitem() is then the lowest, and costs nothing.
        self._empty: dict[int, None] = dict.fromkeys(reversed(range(self.count)))
        self._parked: dict[int, None] = {}  # longest parked first
        self._dirty: set[int] = set()  # pages to give back at a step boundary

    def is_open(self, slot: int) -> bool:
        """Is a sequence in the slot?"""
        return bool(self.generation.item(slot) & 1)

    def open_slots(self) -> list[int]:
        """Slots with a sequence, ascending."""
        return np.flatnonzero(self.generation & 1).tolist()

    def choose(self, tokens: int, *, empty: bool) -> int:
        """The smallest parked slot with room for ``tokens`` tokens. Where none has, an empty slot:
        growing a parked one that is too small would leave none of its size for the next sequence
        of that size. The roomiest parked slot where no length is given, or no slot is empty. With
        ``empty``, an empty slot first.

        Raises:
            OutOfRange: every slot is open, or seen by a live view.
        """
        if empty and self._empty:
            return next(reversed(self._empty))
        room = self.lengths.room
        parked = [(room.item(slot), slot) for slot in self._parked if self.is_free(slot)]
        if parked:
            fitting = [entry for entry in parked if entry[0] >= tokens] if tokens else []
            if fitting:
                return min(fitting)[1]
            if not (tokens and self._empty):
                return max(parked, key=lambda e: (e[0], -e[1]))[1]
        if self._empty:
            return next(reversed(self._empty))
        raise OutOfRange(
            f"all {self.count} slots are open or still seen by a view; close sequences or make the "
            "cache with more slots (they cost address space only)"
        )

    def choose_run(self, length: int) -> range:
        """The first ``length`` consecutive slots that are free.

        Raises:
            OutOfRange: there is no such run.
        """
        run = 0
        for slot in range(self.count):
            run = run + 1 if self.is_free(slot) else 0
            if run == length:
                return range(slot - length + 1, slot + 1)
        raise OutOfRange(
            f"no {length} consecutive slots are free of {self.count}; close sequences or make the "
            "cache with more slots (they cost address space only)"
        )

    def is_free(self, slot: int) -> bool:
        """May the slot be taken now?"""
        return slot in self._empty or (slot in self._parked and not self.arena.pins.item(slot))

    # ---- opening -----------------------------------------------------------------------------
    def take(self, slot: int, tenant: Hashable) -> None:
        """Open a free slot for a tenant: no gap in front, no other tenant's bytes."""
        owner = self.arena.pool.tenant(tenant)
        if slot in self._parked:
            if self.arena.first[slot].any():
                self.arena.drop(slot)
            elif self.arena.pool.tenants > 1:
                self.arena.retenant(slot, owner)
            self.lengths.measure_one(slot)
            del self._parked[slot]
        else:
            del self._empty[slot]
        self.tenant[slot], self.names[slot] = owner, tenant
        self.generation[slot] += 1

    # ---- closing -----------------------------------------------------------------------------
    def close(self, slot: int) -> None:
        """Park an open slot, still mapped; let go of pages that other slots share."""
        self.generation[slot] += 1
        self.closings += 1
        self.lengths.clear(slot)
        self._closed_at[slot] = self.arena.pool.quarantine.epoch
        if self.arena.shared_to.item(slot) or slot in self._dirty:
            self._dirty.add(slot)
            self.collect(slot)
        elif self.lengths.room.item(slot):
            self._parked[slot] = None
        else:
            self._empty[slot] = None

    def discard(self, slot: int) -> None:
        """Close a slot that nobody has seen: its pages need no quarantine."""
        self.arena.drop(slot, quiesced=True)
        self.lengths.room[slot] = 0
        self.close(slot)
        self.arena.pool.drain()

    # ---- giving back -------------------------------------------------------------------------
    def mark(self, slot: int) -> None:
        """The slot has pages to give back at a later step boundary."""
        self._dirty.add(slot)

    def collect(self, slot: int | None = None) -> None:
        """Give back what a slot, or every marked one, does not need and no view looks at."""
        for dirty in list(self._dirty) if slot is None else [slot]:
            if self.arena.pins.item(dirty):
                continue
            if self.is_open(dirty):
                first = self.lengths.first_pages(dirty)
                self.arena.trim(dirty, first, self.arena.last[dirty])
            else:
                self.arena.drop(dirty)
                self.lengths.room[dirty] = 0
                self._empty[dirty] = None
            self._dirty.discard(dirty)  # only now: what the system refuses is tried again

    def retained(self) -> int:
        """Pages that are mapped without a live token."""
        arena = self.arena
        kept = np.maximum(arena.first, self.lengths.needed_pages()[:, None])
        return int(np.maximum(arena.last - kept, 0).sum())

    def reclaim(self, pages: int) -> int:
        """Unmap up to ``pages`` pages without a live token, parked slots first."""
        arena, gone = self.arena, 0
        chosen: dict[bool, list[int]] = {True: [], False: []}  # unread for a whole epoch?
        held = (arena.last - arena.first).sum(axis=1)
        for slot in self._parked:
            if gone >= pages:
                break
            if not arena.pins.item(slot):
                gone += held.item(slot)
                chosen[self._closed_at.item(slot) < arena.pool.quarantine.epoch].append(slot)
        for quiesced, slots in chosen.items():
            if slots:
                self._empty_parked(sorted(slots), quiesced=quiesced)
        if gone < pages:
            needed = self.lengths.needed_pages()
            roomy = (arena.last > needed[:, None]).any(axis=1) & (self.generation & 1 == 1)
            for slot in np.flatnonzero(roomy & (arena.pins == 0)).tolist():
                if gone < pages:
                    gone += arena.trim(slot, 0, needed.item(slot))
                    self.lengths.measure_one(slot)
        arena.pool.drain()
        return gone

    def _empty_parked(self, slots: list[int], *, quiesced: bool) -> None:
        """Unmap parked slots, all or none."""
        self.arena.drop_all(np.array(slots), quiesced=quiesced)
        self.lengths.room[slots] = 0
        for slot in slots:
            del self._parked[slot]
            self._empty[slot] = None
