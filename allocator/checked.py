"""Any backend, watched: every legal edge asserted, every call counted, any call made to fail.

Three uses: tests assert that no verb is ever called out of turn; ``fail_at=n`` makes the n-th call
fail, so that a sweep over n proves each rollback; ``log`` says who did what, in order.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from typing import cast

from .errors import DriverError, PageStateError
from .vmm import Backend, TieredBackend


class CheckedBackend:
    """`vmm.Backend` that forwards to another one and keeps its own record of what is legal.

    Args:
        inner: the backend that does the work.
        fail_at: index of the call (counting from 0 over `FAILABLE` verbs) that raises
            `DriverError` before anything happens; None for none.

    Raises:
        PageStateError: a verb was called out of turn. The inner backend was not reached.
    """

    FAILABLE = (
        "reserve",
        "release",
        "create",
        "destroy",
        "map",
        "remap",
        "unmap",
        "zero",
        "duplicate",
        "warm",
        "descriptor",
        "add_tier",
        "copy",
    )

    def __init__(self, inner: Backend, *, fail_at: int | None = None) -> None:
        self.inner = inner
        self.page_bytes, self.granularity = inner.page_bytes, inner.granularity
        self.devices = inner.devices
        self.fail_at = fail_at
        self.calls: Counter[str] = Counter()
        self.count = 0  # failable calls so far
        self.at: dict[int, int] = {}  # address -> page mapped there
        self.reservations: dict[int, int] = {}  # address -> pages
        self.created: set[int] = set()

    @property
    def maps(self) -> int:
        return self.inner.maps

    @property
    def map_limit(self) -> int:
        return self.inner.map_limit

    # ---- address space ---------------------------------------------------------------------
    def reserve(self, pages: int, *, home: int, zero_backed: bool = False) -> int:
        self._call("reserve", 0, pages)
        address = self.inner.reserve(pages, home=home, zero_backed=zero_backed)
        self.reservations[address] = pages
        return address

    def release(self, address: int, pages: int) -> None:
        self._call("release", address, pages)
        self._legal(self.reservations.get(address) == pages, "release of no reservation", address)
        self.inner.release(address, pages)
        del self.reservations[address]
        end = address + pages * self.page_bytes
        for mapped in [a for a in self.at if address <= a < end]:
            del self.at[mapped]

    # ---- physical pages --------------------------------------------------------------------
    def create(self, page: int, count: int) -> None:
        self._call("create", 0, count)
        fresh = set(range(page, page + count))
        self._legal(not fresh & self.created, "create of an existing page", page)
        self.inner.create(page, count)
        self.created |= fresh

    def destroy(self, page: int, count: int) -> None:
        self._call("destroy", 0, count)
        gone = set(range(page, page + count))
        self._legal(gone <= self.created, "destroy of no page", page)
        self._legal(not gone & set(self.at.values()), "destroy of a mapped page", page)
        self.inner.destroy(page, count)
        self.created -= gone

    def warm(self, page: int, count: int) -> None:
        self._call("warm", 0, count)
        self._legal(self.created.issuperset(range(page, page + count)), "warm of no page", page)
        self.inner.warm(page, count)

    # ---- mapping ---------------------------------------------------------------------------
    def map(self, address: int, page: int, count: int) -> None:
        self._call("map", address, count)
        self._inside(address, page, count)
        for i in range(count):
            self._legal(address + i * self.page_bytes not in self.at, "map over a map", address)
        self.inner.map(address, page, count)
        self._set(address, page, count)

    def remap(self, address: int, page: int, count: int) -> None:
        self._call("remap", address, count)
        self._inside(address, page, count)
        self.inner.remap(address, page, count)
        self._set(address, page, count)

    def unmap(self, address: int, page: int, count: int) -> None:
        self._call("unmap", address, count)
        for i in range(count):
            here = self.at.get(address + i * self.page_bytes)
            self._legal(here == page + i, f"unmap of page {page + i} where {here} is", address)
        self.inner.unmap(address, page, count)
        for i in range(count):
            del self.at[address + i * self.page_bytes]

    def zero(self, address: int, nbytes: int) -> None:
        self._call("zero", address, nbytes)
        self._legal(self._is_mapped(address, nbytes), "zero of unmapped bytes", address)
        self.inner.zero(address, nbytes)

    def duplicate(self, source: int, target: int, nbytes: int) -> None:
        self._call("duplicate", 0, nbytes)
        self._legal({source, target} <= self.created, "copy between missing pages", source)
        self._legal(target not in self.at.values(), "copy into a mapped page", target)
        self.inner.duplicate(source, target, nbytes)

    # ---- the lower tier --------------------------------------------------------------------
    def add_tier(self, first: int, pages: int, place: str | int | None = None) -> None:
        self._call("add_tier", 0, pages)
        self._tiered.add_tier(first, pages, place)

    def settle(self) -> None:
        self._tiered.settle()

    def copy(self, source: int, target: int, count: int) -> None:
        self._call("copy", 0, count)
        there = set(range(target, target + count))
        self._legal(self.created.issuperset(range(source, source + count)), "copy of none", source)
        self._legal(there <= self.created, "copy to missing pages", target)
        self._legal(there.isdisjoint(self.at.values()), "copy into a mapped page", target)
        self._tiered.copy(source, target, count)

    def tier_bytes(self) -> int:
        return self._tiered.tier_bytes()

    # ---- passed on -------------------------------------------------------------------------
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

    def descriptor(self) -> int:
        self._call("descriptor", 0, 0)
        return self.inner.descriptor()

    def close(self) -> None:
        self.inner.close()
        self.at.clear()
        self.reservations.clear()
        self.created.clear()

    # ---- inside ----------------------------------------------------------------------------
    @property
    def _tiered(self) -> TieredBackend:
        return cast(TieredBackend, self.inner)

    def _call(self, verb: str, address: int, size: int) -> None:
        self.calls[verb] += 1
        if verb in self.FAILABLE:
            self.count += 1
            if self.fail_at is not None and self.count - 1 == self.fail_at:
                raise DriverError(verb, errno.ENOMEM, address, size, "Injected by CheckedBackend.")

    def _inside(self, address: int, page: int, count: int) -> None:
        end = address + count * self.page_bytes
        for base, pages in self.reservations.items():
            if base <= address and end <= base + pages * self.page_bytes:
                break
        else:
            raise PageStateError(f"map outside of every reservation at {address:#x}")
        wanted = set(range(page, page + count))
        self._legal(wanted <= self.created, f"map of missing pages {page}..{page + count}", address)

    def _is_mapped(self, address: int, nbytes: int) -> bool:
        base = next(
            a for a, n in self.reservations.items() if a <= address < a + n * self.page_bytes
        )
        first = address - (address - base) % self.page_bytes
        return all(page in self.at for page in range(first, address + nbytes, self.page_bytes))

    def _set(self, address: int, page: int, count: int) -> None:
        for i in range(count):
            self.at[address + i * self.page_bytes] = page + i

    def _legal(self, ok: bool, what: str, where: int) -> None:
        if not ok:
            raise PageStateError(f"{what} at {where:#x}")
