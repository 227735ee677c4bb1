"""The verbs of virtual memory, and nothing else.

A *page* is one physical unit of ``page_bytes`` bytes, named by an integer id; ids are dense, so a
run of pages is ``(page, count)``. An *address* is virtual. The life of a page:

    create ──► map ──► unmap ──► destroy          pages may be mapped at any number of addresses
                 ▲        │
                 └────────┘

Every verb does one thing, raises `DriverError` when the system refuses, having done nothing, and
never retries. Who may call what when is not decided here but in `pool`, `quarantine` and `arena`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol


class Backend(Protocol):
    """Physical pages and virtual ranges of one device (`host.HostBackend`, `cuda.CudaBackend`)."""

    page_bytes: int
    granularity: int
    calls: Counter[str]  # verbs that reached the system, by name
    devices: tuple[str, ...]  # that read the pages, as torch names them; where they lie first

    @property
    def maps(self) -> int:
        """Kernel maps of our reservations."""

    @property
    def map_limit(self) -> int:
        """Most kernel maps that the process may have, everybody's included."""

    def reserve(self, pages: int, *, home: int, zero_backed: bool = False) -> int:
        """Reserve ``pages`` pages of address space; return the address.

        ``home`` is the id of the page that belongs at the first address: a page mapped at its home
        is the cheap case, because neighbours then merge into one kernel map. With ``zero_backed``
        unmapped addresses read as zeros instead of faulting.
        """

    def release(self, address: int, pages: int) -> None:
        """Give a whole reservation back. Nothing may be mapped or read there any more."""

    def create(self, page: int, count: int) -> None:
        """Make ``count`` pages from id ``page`` exist (bytes may be committed at first touch). May
        run on another thread, next to all other verbs, for pages that nobody else knows of."""

    def destroy(self, page: int, count: int) -> None:
        """Return the bytes of ``count`` pages to the system; created again, they read as zeros."""

    def warm(self, page: int, count: int) -> None:
        """Commit the bytes of existing pages now, by huge pages where the system will. Contents
        stay. As `create`, on any thread."""

    def map(self, address: int, page: int, count: int) -> None:
        """Back ``count`` pages of address space with pages ``page .. page+count``, read-write."""

    def unmap(self, address: int, page: int, count: int) -> None:
        """Undo `map` with the same arguments: the addresses fault (or read zero) again."""

    def remap(self, address: int, page: int, count: int) -> None:
        """Like `map`, over addresses that may be mapped already. A reader of the old pages sees the
        old or the new bytes, never a fault, where the system can do so."""

    def zero(self, address: int, nbytes: int) -> None:
        """Overwrite mapped bytes with zeros (scrub on change of tenant)."""

    def duplicate(self, source: int, target: int, nbytes: int) -> None:
        """Copy the first ``nbytes`` bytes of page ``source`` to page ``target``."""

    def fence(self) -> Callable[[], bool] | None:
        """Something to ask whether all work submitted until now, which may still read a page that
        was just unmapped, is done; None where none can be. Neither this nor what it returns ever
        raises."""

    def admit_maps(self, extra: int) -> None:
        """Raise `MapLimitError` unless ``extra`` more kernel maps are within the limit."""

    def note_maps(self, change: int) -> None:
        """Record that the number of kernel maps changed by ``change``."""

    def resident_bytes(self) -> int:
        """Bytes that the system really holds for the pages."""

    def huge_bytes(self) -> int:
        """Bytes of the pages that this process maps by huge pages. Slow."""

    def descriptor(self) -> int:
        """A new file descriptor, open for reading, in which page ``p`` lies at
        ``p * page_bytes``; the caller closes it."""

    def close(self) -> None:
        """Give everything back. Idempotent."""


class TieredBackend(Backend, Protocol):
    """A backend with pages of a second, larger and slower kind: a file, or host memory. All other
    verbs take their ids, too; `map` puts them under any address."""

    def add_tier(self, first: int, pages: int, place: str | int | None = None) -> None:
        """Let ids ``first .. first + pages`` be pages of the second kind. Once.

        Args:
            place: on the host a path, None for a file without a name; on a device the NUMA node,
                None for the first.
        """

    def settle(self) -> None:
        """Wait until what was submitted before has written what it writes."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy ``count`` whole pages from id ``source`` on to ``target`` on. Nobody writes the
        sources or knows of the targets. May run on another thread, next to all other verbs."""

    def tier_bytes(self) -> int:
        """Bytes that the system really holds for pages of the second kind."""
