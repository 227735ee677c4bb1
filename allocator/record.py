"""What is mapped where in one reservation: the only record of it, and the only caller of map verbs.

``entry[v]`` is 0 where page ``v`` of the address space is unmapped, else the page id plus one.
Kernel maps are counted from it: one for each maximal run of equal kind and adjacent ids.

    entry   0 0 0 | 8 9 10 | 31 | 0 0        4 maps: closed, pages 7..9, page 30, closed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from .errors import MapLimitError
from .quarantine import PageIds
from .table import distinct
from .vmm import Backend

Ints = NDArray[np.int64]
Call = tuple[int, int, Callable[[int, int, int], None], int, int]
NONE: Ints = np.zeros(0, np.int64)


class Record:
    """The record of ``pages`` pages from ``address`` on.

    Args:
        backend: the verbs. A verb that raises has done nothing.
        address: of page number 0.
        pages: length of the reservation.
    """

    def __init__(self, backend: Backend, address: int, pages: int) -> None:
        self.backend, self.address, self.pages = backend, address, pages
        self.page_bytes = backend.page_bytes
        # Large zero arrays are untouched kernel memory: a terabyte's record costs what is used.
        self.entry: Ints = np.zeros(pages, np.int64)
        self.maps = 1

    def ids(self, pages: Ints) -> PageIds:
        """Ids of the pages mapped at page numbers ``pages``; -1 where none is."""
        return self.entry[pages] - 1

    def change(self, pages: Ints, entries: Ints) -> Ints:
        """Map, remap and unmap until ``pages`` (each named once) hold ``entries``; returns the old
        entries. All or nothing.

        Raises:
            MapLimitError: too many kernel maps. DriverError: a call failed.
        """
        old: Ints = self.entry[pages]
        done = 0
        self._admit(pages, old, entries)
        try:
            for first, end, verb, address, page in self._calls(pages, old, entries):
                verb(address, page, end - first)
                done = end
        except BaseException:
            for first, end, verb, address, page in self._calls(
                pages[:done], entries[:done], old[:done]
            ):
                verb(address, page, end - first)
            raise
        before = self._borders(pages)
        self.entry[pages] = entries
        self._count(self._borders(pages) - before)
        return old

    def map_run(self, page: int, first: int, count: int, entries: Ints | None = None) -> None:
        """`change` for ``count`` unmapped pages from ``page`` on, which get the ids ``first ..``:
        one call, and only the two ends can be borders.

        Raises:
            MapLimitError, DriverError: nothing changed.
        """
        entry, end, change = self.entry, page + count, 0
        if page:
            left = entry.item(page - 1)
            change += (left == 0 or left != first) - (left != 0)
        if end < self.pages:
            right = entry.item(end)
            change += (right != first + count + 1) - (right != 0)
        if change > 0:
            self.backend.admit_maps(change)
        self.backend.map(self.address + page * self.page_bytes, first, count)
        if count == 1:
            entry[page] = first + 1
        else:
            # The caller may have those entries at hand: an alias copies its source's.
            known = np.arange(first + 1, first + count + 1) if entries is None else entries
            entry[page:end] = known
        if change:
            self._count(change)

    def zero(self, pages: Ints, keep_bytes: int = 0) -> None:
        """Zero mapped pages, but for the first ``keep_bytes`` bytes of each."""
        if not len(pages) or keep_bytes == self.page_bytes:
            return
        cuts = np.flatnonzero((np.diff(pages) != 1) | (keep_bytes > 0)) + 1
        starts = np.concatenate([[0], cuts])
        counts = np.diff(np.concatenate([starts, [len(pages)]]))
        for page, count in zip(pages[starts].tolist(), counts.tolist(), strict=True):
            at = self.address + page * self.page_bytes + keep_bytes
            self.backend.zero(at, count * self.page_bytes - keep_bytes)

    def forget(self) -> None:
        """The reservation is gone."""
        self._count(-self.maps)

    def check(self) -> None:
        """Assert that the map count is what the entries say. For tests; costs a scan."""
        assert self.maps == 1 + self._borders(np.arange(self.pages, dtype=np.int64)), "map count"

    # ---- inside ------------------------------------------------------------------------------
    def _calls(self, pages: Ints, old: Ints, new: Ints) -> Iterator[Call]:
        """The fewest calls that turn ``old`` into ``new``: first, end, verb, address, page id."""
        if not len(pages):
            return
        verbs = (None, self.backend.map, self.backend.unmap, self.backend.remap)
        kind = (new > 0) + 2 * (old > 0)
        key = np.where(new > 0, new, old)  # the ids that a call names
        cuts = (np.diff(pages) != 1) | (np.diff(key) != 1) | (np.diff(kind) != 0)
        starts = [0, *(np.flatnonzero(cuts) + 1).tolist()]
        for first, end in zip(starts, [*starts[1:], len(pages)], strict=True):
            verb = verbs[kind[first]]
            if verb is not None:
                at = self.address + int(pages[first]) * self.page_bytes
                yield first, end, verb, at, int(key[first]) - 1

    def _admit(self, pages: Ints, old: Ints, new: Ints) -> None:
        """Ask for the maps that a change may add: each call splits at most one map into three."""
        key = np.where(new > 0, new, old)
        calls = 1 + int(np.count_nonzero((np.diff(pages) != 1) | (np.diff(key) != 1)))
        if not new.any():
            return  # giving back is never refused
        try:
            self.backend.admit_maps(2 * calls)
        except MapLimitError:  # that was a bound; near the limit, count
            before = self._borders(pages)
            self.entry[pages] = new
            extra = self._borders(pages) - before
            self.entry[pages] = old
            if extra > 0:
                self.backend.admit_maps(extra)

    def _count(self, change: int) -> None:
        self.maps += change
        self.backend.note_maps(change)

    def _borders(self, pages: Ints) -> int:
        """Borders of kernel maps before or behind any of ``pages``."""
        if not len(pages):
            return 0
        pages = distinct(pages)
        heads = pages[np.concatenate([[True], pages[1:] - 1 != pages[:-1]])]
        left = np.concatenate([heads - 1, pages])
        left = left[(left >= 0) & (left < self.pages - 1)]
        a, b = self.entry[left], self.entry[left + 1]
        return int(np.count_nonzero(((a | b) != 0) & ((a == 0) | (b == 0) | (b - a != 1))))
