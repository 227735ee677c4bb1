"""Where the mapped run of each lane begins and ends, and what follows from it: pure arithmetic.

Page numbers (``pages``) count through the whole arena, frontiers (``first``, ``last``, ``full``)
within a lane.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import OutOfRange, PageStateError
from .quarantine import PageIds
from .record import NONE, Ints


class GrowPlan(NamedTuple):
    """Pages to map so that some slots reach a length: addresses (page numbers) by lane."""

    slots: Ints
    to: Ints
    pages: Ints  # page numbers in the arena, ascending within each lane
    last: Ints  # frontiers that the plan starts from


@dataclass(frozen=True)
class Moves:
    """What `Arena.permute` does: alias ``ids`` at ``pages``, copy ``copies`` to ``fresh``, unmap
    ``drop``; then lanes reach from ``first`` to ``last``."""

    pages: Ints
    ids: PageIds
    fresh: Ints
    copies: PageIds
    drop: Ints
    first: Ints
    last: Ints


class Frontiers:
    """Slots of lanes of pages, of which ``first .. last`` are mapped.

    Attributes: ``shared_to[slot]``: pages from there on have no other holder; ``pins[slot]``: live
    views; ``entry``: the record of what is mapped.
    """

    def __init__(self, slots: int, lanes: int, lane_pages: int) -> None:
        if min(slots, lanes, lane_pages) < 1:
            raise OutOfRange(
                f"an arena needs slots, lanes, lane_pages >= 1, got {slots}, {lanes}, {lane_pages}"
            )
        self.slots, self.lanes, self.lane_pages = slots, lanes, lane_pages
        self.slot_pages = lanes * lane_pages
        self.pages = slots * self.slot_pages
        self.entry: Ints = NONE  # until there is a record
        self.first = np.zeros((slots, lanes), np.int64)
        self.last = np.zeros((slots, lanes), np.int64)
        self.last_flat = self.last.reshape(-1)  # the same memory
        self.shared_to = np.zeros(slots, np.int64)
        self.pins = np.zeros(slots, np.int64)
        self._slot_base = np.arange(slots, dtype=np.int64) * self.slot_pages
        self._lane_base = np.arange(lanes, dtype=np.int64) * lane_pages

    def ids(self, pages: Ints) -> PageIds:
        """Ids of the pages mapped at page numbers ``pages``."""
        return self.entry[pages] - 1

    def span(
        self, slot: int, first: Ints | int, last: Ints | int, lanes: Ints | None = None
    ) -> Ints:
        """Page numbers ``first .. last`` of each lane of a slot, lane after lane."""
        lane_base = self._lane_base if lanes is None else lanes * self.lane_pages
        base = slot * self.slot_pages + lane_base
        return spans(base + first, np.maximum(last - np.asarray(first) + 0 * base, 0))

    def mapped(self, slot: int) -> Ints:
        """Page numbers mapped in a slot."""
        return self.span(slot, self.first[slot], self.last[slot])

    def within(self, slot: int, first: int, last: int) -> Ints:
        """Those of a slot's pages ``first .. last`` that are mapped."""
        low, high = np.maximum(first, self.first[slot]), np.minimum(last, self.last[slot])
        return self.span(slot, low, high)

    def mapped_pages(self, slot: int) -> int:
        """How many pages are mapped in a slot."""
        return int((self.last[slot] - self.first[slot]).sum())

    def plan_grow(self, slots: Ints, to: Ints) -> GrowPlan | None:
        """What mapping pages up to ``to`` (per slot, in every lane) takes; None if nothing.

        Raises:
            OutOfRange: a slot would outgrow its lanes.
        """
        if not len(slots):
            return None
        # ufunc.reduce, not ndarray.max: planning runs at every step, and half of it is call cost.
        longest = int(np.maximum.reduce(to))
        if longest > self.lane_pages:
            raise OutOfRange(
                f"{longest} pages wanted in a lane of {self.lane_pages}: the sequence would "
                "outgrow its reservation. Reserve more (max_tokens) when the cache is made."
            )
        if self.lanes == 1:  # the case of one row for all layers: keep it flat
            last = self.last_flat[slots]
            need = to - last
            base = slots * self.slot_pages + last
        else:
            last = self.last[slots]
            need = (to[:, None] - last).ravel()
            base = ((slots * self.slot_pages)[:, None] + self._lane_base + last).ravel()
        if np.minimum.reduce(need) == 1 == np.maximum.reduce(need):
            return GrowPlan(slots, to, base, last)
        wanted = need > 0
        if not wanted.any():
            return None
        return GrowPlan(slots, to, spans(base[wanted], need[wanted]), last)

    def run_at(self, slot: int, pages: int) -> int | None:
        """First id of a slot's first ``pages`` pages if those are one run of ids (one lane)."""
        if not 0 < pages <= self.last_flat.item(slot) or self.first.item(slot, 0):
            return None
        start = slot * self.slot_pages
        entries = self.entry[start : start + pages]
        return None if (entries[1:] - entries[:-1] != 1).any() else entries.item(0) - 1

    def plan_next(self, slots: Ints, ahead: int) -> GrowPlan | None:
        """One more page in every lane of ``slots`` (at least one), and one ahead for each ``ahead``
        pages that are mapped. None if a slot has come to its end."""
        last = self.last_flat[slots] if self.lanes == 1 else self.last[slots].min(axis=1)
        # A few slots a step: Python's max of a list is quicker than a reduction.
        longest = max(last.tolist())
        if longest >= self.lane_pages:
            return None
        if self.lanes > 1 or longest >= ahead:
            return self.plan_grow(slots, np.minimum(last + last // ahead + 1, self.lane_pages))
        return GrowPlan(slots, last + 1, self._slot_base[slots] + last, last)

    def plan_permute(self, slots: Ints, order: Ints, full: Ints, tail_bytes: Ints) -> Moves:
        """What it takes that slot ``slots[i]`` gets the contents of slot ``slots[order[i]]``.

        Raises:
            OutOfRange: a source holds less than ``full`` pages and its tail.
            PageStateError: as `surplus`.
        """
        moved: list[tuple[Ints, PageIds]] = []
        copied: list[tuple[Ints, PageIds]] = []
        drops: list[Ints] = []
        new_first, new_last = self.first[slots], self.last[slots]
        kept = {int(j) for i, j in enumerate(order) if int(j) == i}  # these keep their own tails
        for i, j in enumerate(order.tolist()):
            if i == j:
                continue
            source, target, whole = int(slots[j]), int(slots[i]), int(full[j])
            self.check_holds(source, whole + int(tail_bytes[j] > 0))
            first = np.minimum(self.first[source], whole)
            moved.append(
                (self.span(target, first, whole), self.ids(self.span(source, first, whole)))
            )
            lanes = np.flatnonzero((self.first[source] <= whole) & (tail_bytes[j] > 0))
            into = self.span(target, whole, whole + 1, lanes)
            tail = self.ids(self.span(source, whole, whole + 1, lanes))
            (copied if j in kept else moved).append((into, tail))
            kept.add(j)
            end = np.full(self.lanes, whole)
            end[lanes] += 1
            new_first[i] = first
            drop, new_last[i] = self.surplus(target, first, end)
            drops.append(drop)
        pages, ids = join(p for p, _ in moved), join(d for _, d in moved)
        change = self.entry[pages] != ids + 1
        return Moves(
            pages[change],
            ids[change],
            join(p for p, _ in copied),
            join(d for _, d in copied),
            join(drops),
            new_first,
            new_last,
        )

    def surplus(self, slot: int, first: Ints, end: Ints) -> tuple[Ints, Ints]:
        """When pages ``first .. end`` of each lane get new contents: which of the pages mapped now
        must go, so that each lane stays one run, and where the runs end then.

        Raises:
            PageStateError: a live view looks at pages that must go.
        """
        old_first, old_last = self.first[slot], self.last[slot]
        # Pages mapped behind ``end`` stay if nothing lies between; pages before ``first`` go.
        stays = (old_last > old_first) & (old_first <= end)
        front = np.clip(first, old_first, old_last)
        drop = self.span(slot, old_first, np.where(stays, front, old_last))
        if len(drop):
            self.check_unpinned(slot)
        return drop, np.where(stays, np.maximum(old_last, end), end)

    def check_unpinned(self, slot: int) -> None:
        """Raise `PageStateError` if a live view looks at the slot."""
        if self.pins[slot]:
            raise PageStateError(
                f"slot {slot} has {int(self.pins[slot])} live views; nothing unmapped"
            )

    def check_holds(self, slot: int, pages: int) -> None:
        """Raise `OutOfRange` unless each lane of the slot is mapped up to ``pages``."""
        if int(self.last[slot].min()) < pages:
            raise OutOfRange(
                f"slot {slot} has {int(self.last[slot].min())} pages mapped, {pages} wanted"
            )


def spans(starts: Ints, counts: Ints) -> Ints:
    """Concatenated ranges ``start .. start+count``."""
    total = int(counts.sum())
    if total == len(starts) == int(np.count_nonzero(counts)):
        return starts
    skip = np.cumsum(counts) - counts
    return np.repeat(starts - skip, counts) + np.arange(total)


def join(parts: Iterable[Ints]) -> Ints:
    """All parts, one after the other."""
    return np.concatenate([NONE, *parts])
