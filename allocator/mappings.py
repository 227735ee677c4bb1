"""What is mapped at which address of a device. Every change happens whole or not at all.

    at[address] = handle       a page
    zero-backed reservation    the one zero page wherever no page is, readable only
    elsewhere                  nothing: any access is a fault that kills the context

cuMemMap takes one whole handle and gives no access; cuMemSetAccess and cuMemUnmap take runs of
whole mappings. A change over several calls is undone in the reverse order when one of them fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any

from .driver import Driver
from .errors import DriverError

Run = tuple[int, list[int]]  # an address, and the handles mapped there side by side


class Mappings:
    """The mappings of one backend.

    Args:
        driver: the calls.
        page_bytes: size of every handle.
        access, read_access: what pages, and the zero page, are given.
    """

    def __init__(
        self, driver: Driver, page_bytes: int, access: list[Any], read_access: list[Any]
    ) -> None:
        self.driver, self.page_bytes = driver, page_bytes
        self.access, self.read_access = access, read_access
        self.at: dict[int, int] = {}
        self.zero_ranges: dict[int, int] = {}  # zero-backed reservations: address -> end
        self.zero_page: int | None = None
        self._scratch = Scratch(self, 2)

    # ---- looking -----------------------------------------------------------------------------
    def addresses(self, address: int, count: int) -> range:
        """The addresses of ``count`` pages."""
        return range(address, address + count * self.page_bytes, self.page_bytes)

    def zero_backed(self, address: int) -> bool:
        """Does an address lie in a zero-backed reservation?"""
        if not self.zero_ranges:
            return False
        return any(base <= address < end for base, end in self.zero_ranges.items())

    def runs(self, addresses: Iterable[int]) -> list[Run]:
        """What is mapped at ascending addresses, in runs without a hole and of one access."""
        runs: list[Run] = []
        end, was_zero = 0, False
        for at in addresses:
            handle = self.at.get(at)
            if handle is None and self.zero_backed(at):
                handle = self.zero_page
            if handle is None:
                continue
            if at == end and was_zero == (handle == self.zero_page):
                runs[-1][1].append(handle)
            else:
                runs.append((at, [handle]))
            end, was_zero = at + self.page_bytes, handle == self.zero_page
        return runs

    def within(self, address: int, count: int) -> list[Run]:
        """`runs` of a whole reservation, which may be far larger than what is mapped of it."""
        addresses = self.addresses(address, count)
        if self.zero_backed(address):
            return self.runs(addresses)
        return self.runs(sorted(at for at in self.at if address <= at < addresses.stop))

    # ---- writing down ------------------------------------------------------------------------
    def keep(self, address: int, handles: list[int]) -> None:
        """What `put` or `exchange` mapped is to stay."""
        at, size = self.at, self.page_bytes
        for handle in handles:
            at[address] = handle
            address += size

    def forget(self, address: int, count: int) -> None:
        """No pages are mapped here any more."""
        for at in self.addresses(address, count):
            self.at.pop(at, None)

    # ---- changing ----------------------------------------------------------------------------
    def put(self, address: int, handles: list[int], *, write: bool = False) -> None:
        """Map handles side by side over nothing, with access; the zero page, too, to be read only
        unless ``write``."""
        read = handles[0] == self.zero_page and not write
        access = self.read_access if read else self.access
        self.driver.map_run(address, self.page_bytes, handles, access)

    def fill(self, runs: list[Run]) -> None:
        """`put` every run."""
        done = 0
        try:
            for address, handles in runs:
                self.put(address, handles)
                done += 1
        except BaseException:
            for address, handles in reversed(runs[:done]):
                self.driver.unmap(address, len(handles) * self.page_bytes)
            raise

    def clear(self, runs: list[Run]) -> None:
        """Unmap every run. The caller has waited for whatever may read there."""
        done = 0
        try:
            for address, handles in runs:
                self.driver.unmap(address, len(handles) * self.page_bytes)
                done += 1
        except BaseException:
            self.fill(runs[:done])
            raise

    def exchange(self, address: int, old: list[Run], handles: list[int]) -> None:
        """Map handles where ``old`` is mapped."""
        self.clear(old)
        try:
            self.put(address, handles)
        except BaseException:
            self.fill(old)
            raise

    def undo(self, address: int, count: int) -> None:
        """Bring back what `at` says after a `put` or an `exchange` that is not to stay."""
        self.driver.unmap(address, count * self.page_bytes)
        self.fill(self.runs(self.addresses(address, count)))

    # ---- a place of our own ------------------------------------------------------------------
    def scratch(
        self, handles: list[int], stream: int, *, write: bool = False
    ) -> AbstractContextManager[int]:
        """Up to two pages at an address of our own, see `Scratch`."""
        return self._scratch(handles, stream, write=write)

    def close(self) -> None:
        """Give the scratch pages' addresses back."""
        self._scratch.close()


class Scratch:
    """Addresses of ``pages`` pages to work on what is mapped nowhere, or elsewhere."""

    def __init__(self, mappings: Mappings, pages: int) -> None:
        self.mappings, self.pages = mappings, pages
        self._address: int | None = None
        self._lock = Lock()

    @contextmanager
    def __call__(self, handles: list[int], stream: int, *, write: bool = False) -> Iterator[int]:
        """Map handles side by side. Work on them is submitted to ``stream`` and has been waited for
        at the end of the block; if the block raises, here."""
        driver, size = self.mappings.driver, self.mappings.page_bytes
        with self._lock:
            if self._address is None:
                self._address = driver.reserve(self.pages * size, 0)
            self.mappings.put(self._address, handles, write=write)
            try:
                yield self._address
            except BaseException:
                try:
                    driver.synchronize_stream(stream)
                finally:
                    self._leave(len(handles))
                raise
            self._leave(len(handles))

    def close(self) -> None:
        """Give the addresses back."""
        address, self._address = self._address, None
        if address is not None:
            self.mappings.driver.free(address, self.pages * self.mappings.page_bytes)

    def _leave(self, count: int) -> None:
        assert self._address is not None
        nbytes = count * self.mappings.page_bytes
        try:
            self.mappings.driver.unmap(self._address, nbytes)
        except DriverError:  # nobody else could undo this: once more
            self.mappings.driver.unmap(self._address, nbytes)
