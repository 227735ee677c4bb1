"""For `testing_storm`: what one thread knows of its arena, in arrays, so that checking is cheap.

    group[slot, lane, page]   which physical page lies there, by a number of ours; -1: none
    want[slot, lane, page]    what its probes hold: a few words, spread over the page

A page is written as soon as it is mapped, so every probe is known. A word names its writer, by the
tenant, the thread and the serial number of the ledger, then a number that is never used again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arena import Arena
from .record import Ints
from .testing_mirror import words_at

PROBES = 4
TENANT_SHIFT, THREAD_SHIFT, SERIAL_SHIFT = 56, 48, 32
COUNTING = np.arange(4096, dtype=np.uint64)


class Frozen(NamedTuple):
    """An arena before an operation, and its slots that other threads may change."""

    parked: set[int]
    arrays: tuple[Ints, Ints, Ints, Ints]


class Ledger:
    """The model of one arena, driven by one thread.

    Attributes: ``tenant`` of each slot; ``parked`` slots, without rows, and the epoch since when: a
    reclaimer may unmap them on any thread, so they are changed within a turn.
    """

    def __init__(self, arena: Arena, thread: int, serial: int) -> None:
        self.arena, self._writer = arena, thread << THREAD_SHIFT | serial << SERIAL_SHIFT
        self.slots, self.lanes = range(arena.slots), range(arena.lanes)
        self.lane_pages = arena.lane_pages
        shape = arena.slots, arena.lanes, arena.lane_pages
        page_words = arena.page_bytes // 8
        self.words = words_at(arena.address, arena.pages * page_words).reshape(*shape, page_words)
        self.probe_bytes = arena.page_bytes // PROBES
        self.probes = self.words[..., :: page_words // PROBES]
        self.entry = arena.entry.reshape(shape)
        self.group = np.full(shape, -1, np.int64)
        self.want: NDArray[np.uint64] = np.zeros((*shape, PROBES), np.uint64)
        self.tenant = np.zeros(arena.slots, np.int64)
        self.parked: dict[int, int] = {}
        self.aliased = False  # has any page been shared?
        self._groups = self._stamp = 0

    # ---- looking -----------------------------------------------------------------------------
    def frontiers(self, slot: int) -> list[tuple[int, int]]:
        """First and last page of each lane."""
        first, last = self.arena.first[slot].tolist(), self.arena.last[slot].tolist()
        return list(zip(first, last, strict=True))

    def top(self, slot: int) -> int:
        """Pages that every lane of a slot reaches."""
        return min(self.arena.last[slot].tolist())

    def has_rows(self, slot: int) -> bool:
        """Is anything of the slot mapped?"""
        return bool((self.group[slot] >= 0).any())

    def freeze(self) -> Frozen:
        """What a failed operation must leave alone."""
        arena, parked = self.arena, set(self.parked)  # first: these may change under us
        arrays = arena.entry.copy(), arena.first.copy(), arena.last.copy(), arena.shared_to.copy()
        return Frozen(parked, arrays)

    def assert_frozen(self, before: Frozen) -> None:
        """Nothing changed since then; what was parked may have been reclaimed."""
        ours = [slot for slot in self.slots if slot not in before.parked]
        for old, new in zip(before.arrays, self.freeze().arrays, strict=True):
            rows = len(self.slots), -1
            same = old.reshape(rows)[ours] == new.reshape(rows)[ours]
            assert same.all(), "a failed operation changed its arena"

    def assert_kept(self, before: Frozen, slot: int) -> None:
        """Nothing of the slot was unmapped since then."""
        old = before.arrays[0].reshape(self.entry.shape)[slot]
        assert self.entry[slot][old > 0].all(), f"slot {slot} was unmapped under a live view"

    def verify(self, slot: int) -> None:
        """The slot is mapped where the model says, and every probe reads as written."""
        # As bytes: a tenth of what small arrays cost to compare.
        mapped, here = self.entry[slot] > 0, self.group[slot] >= 0
        assert mapped.tobytes() == here.tobytes(), f"slot {slot} is mapped elsewhere"
        for lane, (first, last) in enumerate(self.frontiers(slot)):
            if last > first:
                read = self.probes[slot, lane, first:last].tobytes()
                same = read == self.want[slot, lane, first:last].tobytes()
                assert same, f"slot {slot}, lane {lane}: a written word changed"

    def verify_all(self) -> None:
        """`verify` all slots; pages of ours are one if and only if their ids are. Within a turn."""
        for slot in self.slots:
            self.verify(slot)
        inside = self.group >= 0
        groups, ids = self.group[inside], self.entry[inside] - 1
        _, first, counts = np.unique(groups, return_index=True, return_counts=True)
        assert len(np.unique(ids)) == len(first), "aliases came apart, or pages together"
        assert (self.arena.pool.refs(ids[first]) == counts).all(), "references are the mappings"
        pairs = np.unique(np.stack([groups, ids]), axis=1).shape[1]
        assert pairs == len(first), "an alias is another page"

    # ---- what an operation did ---------------------------------------------------------------
    def write(self, slot: int, lane: int, first: int, last: int) -> None:
        """New words, in pages that nobody shares."""
        count = max(last - first, 0) * PROBES
        tenant = (self.tenant.item(slot) + 1) << TENANT_SHIFT
        values = COUNTING[:count] + np.uint64(tenant + self._writer + self._stamp)
        self._stamp += count
        self.probes[slot, lane, first:last] = values.reshape(-1, PROBES)
        self.want[slot, lane, first:last] = values.reshape(-1, PROBES)

    def scribble(self, slot: int, lane: int, page: int) -> None:
        """New words through one address of a page: all its addresses show them."""
        self.write(slot, lane, page, page + 1)
        same = self.group == self.group[slot, lane, page]
        self.want[same] = self.want[slot, lane, page]

    def begin(self, slot: int, lane: int, first: int, last: int) -> None:
        """Pages that are new: nobody else's words are in them; then they are written."""
        if last <= first:
            return
        words = self.words[slot, lane, first:last]
        if np.bitwise_or.reduce(words, axis=None):
            assert not self.arena.zero_backed, "a new page is not zeroed"
            strangers = words[words >> np.uint64(TENANT_SHIFT) != self.tenant[slot] + 1]
            assert not strangers.any(), f"words of a stranger: {strangers[strangers > 0][0]:#x}"
        self.renumber(slot, lane, first, last)
        self.write(slot, lane, first, last)

    def begin_copy(self, slot: int, lane: int, page: int, nbytes: int) -> None:
        """A page that is new but for the first bytes, which ``want`` names already."""
        probes = nbytes // self.probe_bytes
        copied = self.probes[slot, lane, page, :probes] == self.want[slot, lane, page, :probes]
        assert copied.all(), "a copy is another page's"
        self.words[slot, lane, page, : nbytes // 8] = 0
        self.begin(slot, lane, page, page + 1)

    def renumber(self, slot: int, lane: int, first: int, last: int) -> None:
        """These are physical pages of their own."""
        self._groups += last - first
        self.group[slot, lane, first:last] = np.arange(self._groups - last + first, self._groups)

    def shared_pages(self, slot: int, first: int, last: int) -> list[tuple[int, int]]:
        """Lane and page of those mapped pages ``first .. last`` that have other holders."""
        if not self.aliased:
            return []
        groups = self.group[slot, :, first:last]
        many = (groups[..., None] == self.group.reshape(-1)).sum(axis=-1) > 1
        lanes, pages = np.nonzero(many & (groups >= 0))
        return list(zip(lanes.tolist(), (pages + first).tolist(), strict=True))

    def keep(self, slot: int, lane: int, first: int, last: int) -> None:
        """Only pages ``first .. last`` of a lane stay."""
        self.group[slot, lane, :first] = -1
        self.group[slot, lane, max(first, last) :] = -1

    def shift(self, slot: int, lane: int, gap: int, count: int, last: int) -> None:
        """The pages behind a gap move down."""
        for array in (self.group, self.want):
            array[slot, lane, gap : last - count] = array[slot, lane, gap + count : last].copy()
        self.keep(slot, lane, 0, last - count)


class Share(NamedTuple):
    """What one slot gets from another: whole pages, and the first bytes of the next one."""

    target: int
    group: Ints
    want: NDArray[np.uint64]
    copies: list[tuple[int, int]]  # lane and page


def share(
    ledger: Ledger, source: int, target: int, full: int, tail_bytes: int, *, whole: bool
) -> Share:
    """The effect of `Arena.alias`, and of one move of `Arena.permute`: with ``whole`` the tail page
    itself is shared, otherwise copied."""
    group, want = ledger.group[target].copy(), ledger.want[target].copy()
    copies = []
    frontiers = zip(ledger.frontiers(source), ledger.frontiers(target), strict=True)
    for lane, ((low, _), (old_first, old_last)) in enumerate(frontiers):
        first, end = min(low, full), full
        if tail_bytes and low <= full:
            end += 1
            if not whole:
                copies.append((lane, full))
        touching = old_last > old_first and old_first <= end
        group[lane, : first if touching else None] = -1
        group[lane, first:end] = ledger.group[source, lane, first:end]
        want[lane, first:end] = ledger.want[source, lane, first:end]
    return Share(target, group, want, copies)


def take(ledger: Ledger, shares: list[Share], copied_bytes: int) -> None:
    """The model after that: all from the state before."""
    ledger.aliased = True
    for target, group, want, _ in shares:
        ledger.group[target], ledger.want[target] = group, want
    for target, _, _, copies in shares:
        for lane, page in copies:
            ledger.begin_copy(target, lane, page, copied_bytes)
