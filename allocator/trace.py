"""Who did what to which address, and when: any backend, listened to.

A trace costs nothing where it is not asked for: without it there is no wrapper. With it, one event
per call is kept in a list of bounded length; the oldest are forgotten first. `vattn.show` turns a
trace into torch's memory-snapshot format.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

from .vmm import Backend, TieredBackend


class Event(NamedTuple):
    """One call. ``bytes`` of address space (or of pages, where ``address`` is 0)."""

    time_ns: int  # of time.time_ns()
    action: str  # a verb of vmm.Backend; a remap is written as an "unmap" and a "map"
    address: int
    bytes: int
    owner: str  # whose address it is, or the pages' ids


class Trace:
    """The last ``limit`` events, in order.

    Attributes: ``owner_of(address)`` names the owner of an address, ``count`` events so far.
    """

    def __init__(self, limit: int = 100_000) -> None:
        self.events: deque[Event] = deque(maxlen=limit)
        self.count = 0
        self.owner_of: Callable[[int], str] | None = None

    @property
    def dropped(self) -> int:
        """Events that no longer fit."""
        return self.count - len(self.events)

    def note(self, action: str, address: int, nbytes: int, page: int | None = None) -> None:
        """Keep one event of an address (0: none) and a first page."""
        self.count += 1
        if address and self.owner_of is not None:
            owner = self.owner_of(address)
        else:
            owner = "" if page is None else f"page {page}"
        self.events.append(Event(time.time_ns(), action, address, nbytes, owner))

    def __iter__(self) -> Iterator[Event]:
        return iter(list(self.events))

    def __len__(self) -> int:
        return len(self.events)


class TracedBackend:
    """`vmm.Backend` that forwards to another one and notes each call that succeeded.

    Args:
        inner: the backend that does the work.
        trace: where events go; a new `Trace` by default.
    """

    def __init__(self, inner: Backend, trace: Trace | None = None) -> None:
        self.inner = inner
        self.trace = Trace() if trace is None else trace
        self.page_bytes, self.granularity = inner.page_bytes, inner.granularity
        self.calls, self.devices = inner.calls, inner.devices

    @property
    def maps(self) -> int:
        return self.inner.maps

    @property
    def map_limit(self) -> int:
        return self.inner.map_limit

    # ---- address space and pages -------------------------------------------------------------
    def reserve(self, pages: int, *, home: int, zero_backed: bool = False) -> int:
        address = self.inner.reserve(pages, home=home, zero_backed=zero_backed)
        self.trace.note("reserve", address, pages * self.page_bytes, home)
        return address

    def release(self, address: int, pages: int) -> None:
        self.inner.release(address, pages)
        # Whatever was mapped there is not any more.
        self.trace.note("unmap", address, pages * self.page_bytes)
        self.trace.note("release", address, pages * self.page_bytes)

    def create(self, page: int, count: int) -> None:
        self.inner.create(page, count)
        self.trace.note("create", 0, count * self.page_bytes, page)

    def destroy(self, page: int, count: int) -> None:
        self.inner.destroy(page, count)
        self.trace.note("destroy", 0, count * self.page_bytes, page)

    def warm(self, page: int, count: int) -> None:
        self.inner.warm(page, count)
        self.trace.note("warm", 0, count * self.page_bytes, page)

    # ---- mapping -----------------------------------------------------------------------------
    def map(self, address: int, page: int, count: int) -> None:
        self.inner.map(address, page, count)
        self.trace.note("map", address, count * self.page_bytes, page)

    def remap(self, address: int, page: int, count: int) -> None:
        self.inner.remap(address, page, count)
        self.trace.note("unmap", address, count * self.page_bytes, page)
        self.trace.note("map", address, count * self.page_bytes, page)

    def unmap(self, address: int, page: int, count: int) -> None:
        self.inner.unmap(address, page, count)
        self.trace.note("unmap", address, count * self.page_bytes, page)

    def zero(self, address: int, nbytes: int) -> None:
        self.inner.zero(address, nbytes)
        self.trace.note("zero", address, nbytes)

    def duplicate(self, source: int, target: int, nbytes: int) -> None:
        self.inner.duplicate(source, target, nbytes)
        self.trace.note("duplicate", 0, nbytes, target)

    # ---- the lower tier ----------------------------------------------------------------------
    def add_tier(self, first: int, pages: int, place: str | int | None = None) -> None:
        cast(TieredBackend, self.inner).add_tier(first, pages, place)
        self.trace.note("add_tier", 0, pages * self.page_bytes, first)

    def settle(self) -> None:
        cast(TieredBackend, self.inner).settle()

    def copy(self, source: int, target: int, count: int) -> None:
        cast(TieredBackend, self.inner).copy(source, target, count)
        self.trace.note("copy", 0, count * self.page_bytes, target)

    def tier_bytes(self) -> int:
        return cast(TieredBackend, self.inner).tier_bytes()

    # ---- passed on ---------------------------------------------------------------------------
    def descriptor(self) -> int:
        return self.inner.descriptor()

    def fence(self) -> Callable[[], bool] | None:
        return self.inner.fence()

    def admit_maps(self, extra: int) -> None:
        self.inner.admit_maps(extra)

    def note_maps(self, change: int) -> None:
        self.inner.note_maps(change)

    def resident_bytes(self) -> int:
        return self.inner.resident_bytes()

    def huge_bytes(self) -> int:
        return self.inner.huge_bytes()

    def close(self) -> None:
        self.inner.close()
