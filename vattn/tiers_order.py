"""Which pages leave the fast tier first: what is known of their use, and the orders made of it.

InfiniGen's host pool (arXiv 2406.19707) has three: first in first out, least recently fetched, and
a count of fetches, halved for all when one saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .batch import Ints

Order = Literal["fifo", "lru", "counter"]
SATURATED = 255  # uses of a page


@dataclass(frozen=True)
class Candidates:
    """Physical pages that may leave, one entry each; of a page with several addresses, one of them.

    All int64 [pages].
    """

    slot: Ints
    lane: Ints
    index: Ints  # of the page in its lane: tokens index * page / row_bytes and following
    arrived: Ints  # when it came to the fast tier, or was filled there
    used: Ints  # when it was used last; 0: never
    uses: Ints  # how often, halved now and then


Score = Callable[[Candidates], NDArray]  # the lowest leave first

ORDERS: dict[str, Score] = {
    "fifo": lambda pages: pages.arrived,
    "lru": lambda pages: np.maximum(pages.used, pages.arrived),
    "counter": lambda pages: pages.uses * (1 << 32) + pages.used,
}


class Uses:
    """What is known of each page of an arena, by page number.

    Attributes: ``clock`` grows with every use.
    """

    def __init__(self, slots: int, lanes: int, lane_pages: int) -> None:
        self.shape = slots, lanes, lane_pages
        self.clock = 1
        pages = slots * lanes * lane_pages
        # Untouched zeros cost nothing.
        self.arrived: Ints = np.zeros(pages, np.int64)
        self.used: Ints = np.zeros(pages, np.int64)
        self.uses = np.zeros(pages, np.int32)
        self._top = np.zeros(slots, np.int64)  # pages of a lane that may hold something

    def arrive(self, pages: Ints) -> None:
        """These came to the fast tier."""
        self.clock += 1
        self.arrived[pages] = self.clock
        self._reach(pages)

    def notice(self, pages: Ints) -> None:
        """`arrive` for those of the pages that were never seen."""
        fresh = pages[self.arrived[pages] == 0]
        if len(fresh):
            self.arrive(fresh)

    def use(self, pages: Ints) -> None:
        """These (each named once) are read now."""
        self.clock += 1
        self.used[pages] = self.clock
        self.uses[pages] += 1
        self._reach(pages)
        if len(pages) and int(self.uses[pages].max()) > SATURATED:
            for slot in np.flatnonzero(self._top).tolist():
                self._rows(self.uses)[slot, :, : self._top[slot]] //= 2

    def forget(self, slot: int, first: int = 0) -> None:
        """Pages of a slot from index ``first`` on hold something else."""
        top = self._top.item(slot)
        for array in (self.arrived, self.used, self.uses):
            self._rows(array)[slot, :, first:top] = 0
        self._top[slot] = min(top, first)

    def permute(self, slots: Ints, source: Ints) -> None:
        """``slots[i]`` holds what ``slots[source[i]]`` held."""
        top = int(self._top[slots].max())
        for array in (self.arrived, self.used, self.uses):
            rows = self._rows(array)
            rows[slots, :, :top] = rows[slots[source], :, :top]
        self._top[slots] = self._top[slots[source]]

    def candidates(self, pages: Ints, ids: Ints) -> Candidates:
        """One entry for each of ``ids``, each of which lies at one of ``pages`` or at several."""
        ids, first, which = np.unique(ids, return_index=True, return_inverse=True)
        arrived, used = self.arrived[pages], self.used[pages]
        uses = self.uses[pages].astype(np.int64)
        if len(ids) < len(pages):
            merged = [np.zeros(len(ids), np.int64) for _ in range(3)]
            np.maximum.at(merged[0], which, arrived)
            np.maximum.at(merged[1], which, used)
            np.add.at(merged[2], which, uses)
            arrived, used, uses = merged
        else:
            arrived, used, uses = arrived[first], used[first], uses[first]
        _, lanes, lane_pages = self.shape
        lane, index = np.divmod(pages[first], lane_pages)
        return Candidates(lane // lanes, lane % lanes, index, arrived, used, uses)

    def page_numbers(self, pages: Candidates) -> Ints:
        """Where the candidates lie."""
        _, lanes, lane_pages = self.shape
        return (pages.slot * lanes + pages.lane) * lane_pages + pages.index

    def _reach(self, pages: Ints) -> None:
        _, lanes, lane_pages = self.shape
        np.maximum.at(self._top, pages // (lanes * lane_pages), pages % lane_pages + 1)

    def _rows(self, array: NDArray) -> NDArray:
        return array.reshape(self.shape)
