"""A file of pages seen whole: mappings that stay, so that a copy between pages only copies.

A fresh mapping fills its page tables at the first touch, which for pages of 4 KiB costs as much as
the copy itself (12 GiB/s); a mapping that stays pays once. A window is address space for a large
piece of the file, opened when somebody copies there; bytes are committed only where pages are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock

from . import libc
from .errors import DriverError
from .huge import HUGE_BYTES

WINDOW_BYTES = 1 << 30
MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23


class Windows:
    """Windows to the file ``fd``. Any thread may look through them."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._at: dict[int, int] = {}  # number of a piece -> address
        self._lock = Lock()

    def pieces(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Where a range of the file is seen: addresses and lengths. It must lie in the file.

        Raises:
            DriverError: no address space or no map is left.
        """
        while nbytes:
            number, inside = divmod(offset, WINDOW_BYTES)
            length = min(nbytes, WINDOW_BYTES - inside)
            yield self._open(number) + inside, length
            offset, nbytes = offset + length, nbytes - length

    def commit(self, offset: int, nbytes: int) -> None:
        """Make the bytes of a range of the file exist, and seen without a fault; by huge pages
        where the file system can.

        Raises:
            DriverError: no memory or no room on the disk.
        """
        for address, length in self.pieces(offset, nbytes):
            libc.advise_memory(address, length, MADV_POPULATE_WRITE)
            low, high = address + -address % HUGE_BYTES, (address + length) // HUGE_BYTES
            if low < high * HUGE_BYTES:
                with suppress(DriverError):  # a disk's file has them already, or never
                    libc.advise_memory(low, high * HUGE_BYTES - low, libc.MADV_COLLAPSE)

    def close(self) -> None:
        """Nobody looks any more."""
        while self._at:
            libc.unmap_memory(self._at.popitem()[1], WINDOW_BYTES)

    def _open(self, number: int) -> int:
        at = self._at.get(number)
        if at is None:
            with self._lock:
                at = self._at.get(number) or self._map(number)
                self._at[number] = at
        return at

    def _map(self, number: int) -> int:
        address = libc.reserve_aligned(WINDOW_BYTES, HUGE_BYTES, 0)
        flags = libc.MAP_SHARED | libc.MAP_FIXED | libc.MAP_NORESERVE
        try:
            libc.map_memory(
                address, WINDOW_BYTES, libc.PROT_RW, flags, self.fd, number * WINDOW_BYTES
            )
        except BaseException:
            libc.unmap_memory(address, WINDOW_BYTES)
            raise
        # A file's pages, too, are read ahead and mapped by 2 MiB then, where the file system can.
        with suppress(DriverError):
            libc.advise_memory(address, WINDOW_BYTES, MADV_HUGEPAGE)
        return address


def copy(source: Iterator[tuple[int, int]], target: Iterator[tuple[int, int]]) -> None:
    """Copy what one iterator of `Windows.pieces` names to what another one does, equally long."""
    here, left = 0, 0
    for address, length in target:
        while length:
            if not left:
                here, left = next(source)
            some = min(left, length)
            ctypes.memmove(address, here, some)
            address, length, here, left = address + some, length - some, here + some, left - some
