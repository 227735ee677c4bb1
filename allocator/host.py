"""The verbs on Linux memory: one memfd holds every page, and mapping is `mmap` or `mprotect`.

Page ``p`` is the file range ``[p * page_bytes, (p + 1) * page_bytes)``. The file is sparse, so ids
cost nothing until a page is touched. A reservation is a ``PROT_NONE`` map of the *home* pages:

    address of page i   base + i*page_bytes          file offset  (home + i)*page_bytes
    unmapped            PROT_NONE, home offset       any access faults
    mapped at home      PROT_READ|PROT_WRITE, same offset: one mprotect, page tables survive
    mapped elsewhere    MAP_FIXED map of another offset (alias, shift, warm page)

Adjacent home pages have adjacent offsets, so the kernel merges them into one map (VMA); that keeps
a process far from ``vm.max_map_count``. Real aliasing, real faults, no GPU.
Calls: memfd_create(2), ftruncate(2), fcntl(2) and those of `libc`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from . import libc
from .errors import ClosedError, DriverError, MapLimitError, OutOfRange, ReserveError
from .huge import HUGE_BYTES, make_ready, mapped_huge_bytes
from .process import forks
from .tierfile import TierFile
from .windows import Windows, copy

# The share of vm.max_map_count that we may use up: beyond it, other code of the process (even
# starting a thread) begins to fail in ways that nobody can recover from.
MAP_LIMIT_SHARE = 0.8
SHARED = libc.MAP_SHARED | libc.MAP_NORESERVE | libc.MAP_FIXED
ZEROS = libc.MAP_PRIVATE | libc.MAP_ANON | libc.MAP_NORESERVE | libc.MAP_FIXED
MAX_BYTES = 1 << 62  # beyond any address space: refused before it can overflow a C integer


def max_map_count() -> int:
    """The kernel's limit of maps per process (``vm.max_map_count``)."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())


def process_maps() -> int:
    """Maps that this process has now, of everybody (lines of ``/proc/self/maps``)."""
    return Path("/proc/self/maps").read_bytes().count(b"\n")


class HostBackend:
    """`vmm.Backend` over a memfd.

    Args:
        page_bytes: size of a page, a multiple of 4 KiB. 64 KiB by default: small enough to waste
            little, large enough that one map call covers many tokens.
        map_limit: most kernel maps the process may have, everybody's included;
            80% of ``vm.max_map_count`` by default.

    Raises:
        OutOfRange: ``page_bytes`` is not a positive multiple of the granularity.
    """

    granularity = mmap.PAGESIZE
    devices: tuple[str, ...] = ("cpu",)

    def __init__(self, page_bytes: int = 64 << 10, *, map_limit: int | None = None) -> None:
        if page_bytes <= 0 or page_bytes % self.granularity:
            raise OutOfRange(
                f"page_bytes must be a positive multiple of {self.granularity}, got {page_bytes}"
            )
        self.page_bytes = page_bytes
        self.maps = 0  # kernel maps of our reservations
        self._homes: dict[int, tuple[int, int]] = {}  # base -> (end, home file offset - base)
        self._zero_backed: set[int] = set()
        self.calls: Counter[str] = Counter()
        self._file_bytes, self._extending = 0, Lock()
        self.file: TierFile | None = None  # of the lower tier
        self._windows: Windows | None = None  # to our own pages, once some are copied
        self._pid, self._forks = os.getpid(), forks()
        try:
            self.map_limit = map_limit or int(max_map_count() * MAP_LIMIT_SHARE)
            self._other_maps = process_maps()
            self.fd = os.memfd_create("vattn", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise _no_descriptor(error) from error
        # Importers map this file (share.py): it must never shrink under them.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)

    # ---- address space -------------------------------------------------------------------
    def reserve(self, pages: int, *, home: int, zero_backed: bool = False) -> int:
        self._check_open()
        self.admit_maps(1)
        self.calls["reserve"] += 1
        nbytes = pages * self.page_bytes
        home_offset = home * self.page_bytes
        if home_offset + nbytes > MAX_BYTES:
            raise _refused(nbytes, errno.ENOMEM)
        self._extend_file(home + pages)
        try:
            address = libc.reserve_aligned(nbytes, HUGE_BYTES, home_offset % HUGE_BYTES)
        except DriverError as error:
            raise _refused(nbytes, error.code) from error
        try:
            if zero_backed:
                # Private anonymous memory that is only read is the kernel's one zero page. It may
                # be written, because compilers copy whole tensors back, zeros over zeros; that
                # costs memory, and what is written there is forgotten when a page is mapped.
                libc.map_memory(address, nbytes, libc.PROT_RW, ZEROS)
            else:
                libc.map_memory(address, nbytes, libc.PROT_NONE, SHARED, self.fd, home_offset)
        except DriverError as error:
            libc.unmap_memory(address, nbytes)
            raise _refused(nbytes, error.code) from error
        self._homes[address] = (address + nbytes, home_offset - address)
        if zero_backed:
            self._zero_backed.add(address)
        self.note_maps(1)
        return address

    def release(self, address: int, pages: int) -> None:
        if self.fd < 0:  # close() has released everything; finalizers run in any order
            return
        self._check_open()
        self.calls["release"] += 1
        nbytes = pages * self.page_bytes
        end = self._homes.get(address, (0, 0))[0]
        if end != address + nbytes:
            raise OutOfRange(f"no reservation of {nbytes:#x} bytes at {address:#x}")
        libc.unmap_memory(address, nbytes)
        del self._homes[address]
        self._zero_backed.discard(address)

    # ---- physical pages ------------------------------------------------------------------
    def create(self, page: int, count: int) -> None:
        self._check_open()
        if (file := self._lower(page)) is not None:
            file.create(page, count)
        else:
            self._extend_file(page + count)

    def destroy(self, page: int, count: int) -> None:
        self._check_open()  # above all in a fork: the file is the parent's, too
        self.calls["destroy"] += 1
        fd, offset = self._place(page)
        libc.punch_hole(fd, offset, count * self.page_bytes)

    def warm(self, page: int, count: int) -> None:
        self._check_open()
        self.calls["warm"] += 1
        if (file := self._lower(page)) is not None:
            file.commit(page, count)
        else:
            make_ready(self.fd, page * self.page_bytes, count * self.page_bytes)

    def descriptor(self) -> int:
        self._check_open()
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _no_descriptor(error) from error

    def resident_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512 if self.fd >= 0 else 0

    def huge_bytes(self) -> int:
        return mapped_huge_bytes(self.fd) if self.fd >= 0 else 0

    # ---- mapping -------------------------------------------------------------------------
    def map(self, address: int, page: int, count: int) -> None:
        self._check_open()
        self.calls["map"] += 1
        fd, offset = self._place(page)
        nbytes = count * self.page_bytes
        if fd == self.fd and offset - address == self._home_delta(address):
            libc.protect_memory(address, nbytes, libc.PROT_RW)
            return
        libc.map_memory(address, nbytes, libc.PROT_RW, SHARED, fd, offset)

    def remap(self, address: int, page: int, count: int) -> None:
        self._check_open()
        self.calls["remap"] += 1
        fd, offset = self._place(page)
        libc.map_memory(address, count * self.page_bytes, libc.PROT_RW, SHARED, fd, offset)

    def unmap(self, address: int, page: int, count: int) -> None:
        self._check_open()
        self.calls["unmap"] += 1
        fd, offset = self._place(page)
        nbytes, delta = count * self.page_bytes, self._home_delta(address)
        if delta is None:
            libc.map_memory(address, nbytes, libc.PROT_RW, ZEROS)
        elif fd == self.fd and offset - address == delta:
            libc.protect_memory(address, nbytes, libc.PROT_NONE)
        else:  # put the home pages back, closed
            libc.map_memory(address, nbytes, libc.PROT_NONE, SHARED, self.fd, address + delta)

    def zero(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0, nbytes)

    def duplicate(self, source: int, target: int, nbytes: int) -> None:
        self._check_open()
        self.calls["duplicate"] += 1
        (file, start), (into, end), done = self._place(source), self._place(target), 0
        try:
            while done < nbytes:  # through the files: neither page need be mapped
                data = os.pread(file, nbytes - done, start + done)
                if not data:
                    raise DriverError("pread", errno.EIO, start + done, nbytes - done)
                done += os.pwrite(into, data, end + done)
        except OSError as error:
            code = error.errno or errno.EIO
            raise DriverError("pwrite", code, start + done, nbytes - done) from error

    # ---- the lower tier ------------------------------------------------------------------
    def add_tier(self, first: int, pages: int, place: str | int | None = None) -> None:
        self._check_open()
        if isinstance(place, int):
            raise OutOfRange(f"the host's lower tier is a file: a path is wanted, got {place}")
        self.file = TierFile(first, pages, self.page_bytes, place)
        self._windows = Windows(self.fd)

    def settle(self) -> None:
        return None  # what this process wrote is written

    def copy(self, source: int, target: int, count: int) -> None:
        self._check_open()
        self.calls["copy"] += 1
        nbytes = count * self.page_bytes
        copy(self._pieces(source, nbytes), self._pieces(target, nbytes))

    def tier_bytes(self) -> int:
        return 0 if self.file is None or self.fd < 0 else self.file.resident_bytes()

    def fence(self) -> None:
        return None  # readers are this process's threads: an epoch is enough

    # ---- limits --------------------------------------------------------------------------
    def admit_maps(self, extra: int) -> None:
        self._check_open()
        if self._other_maps + self.maps + extra <= self.map_limit:
            return
        try:
            now = process_maps()  # the estimate says no: count before refusing
        except OSError as error:
            raise _no_descriptor(error) from error
        self._other_maps = max(0, now - self.maps)
        if now + extra > self.map_limit:
            raise MapLimitError(
                f"{extra} more maps would exceed the limit: {now} in use ({self.maps} ours), "
                f"limit {self.map_limit} of vm.max_map_count {max_map_count()}. Use larger pages, "
                "a layout with fewer lanes, fewer sequences, or raise vm.max_map_count."
            )

    def note_maps(self, change: int) -> None:
        self.maps += change

    def close(self) -> None:
        if self.fd < 0 or self._forks != forks():
            return
        for address, (end, _) in list(self._homes.items()):
            self.release(address, (end - address) // self.page_bytes)
        if self._windows is not None:
            self._windows.close()
        if self.file is not None:
            self.file.close()
        os.close(self.fd)
        self.fd = -1
        self.maps = 0

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()

    # ---- inside --------------------------------------------------------------------------
    def _check_open(self) -> None:
        if self.fd < 0:
            raise ClosedError("the host backend is closed")
        if self._forks != forks():
            raise ClosedError(
                f"this cache belongs to process {self._pid} and is not valid in its fork "
                f"{os.getpid()}; create it in the process that uses it"
            )

    def _lower(self, page: int) -> TierFile | None:
        """The file of the lower tier, if the page lies there."""
        file = self.file
        return file if file is not None and file.first <= page < file.end else None

    def _place(self, page: int) -> tuple[int, int]:
        """Descriptor and offset of a page."""
        file = self.file
        if file is not None and file.first <= page < file.end:
            return file.fd, file.offset(page)
        return self.fd, page * self.page_bytes

    def _pieces(self, page: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Where bytes from a page on are seen through windows."""
        file, windows = self._lower(page), self._windows
        if file is not None:
            return file.windows.pieces(file.offset(page), nbytes)
        assert windows is not None, "add_tier() first"
        return windows.pieces(page * self.page_bytes, nbytes)

    def _extend_file(self, pages: int) -> None:
        nbytes = pages * self.page_bytes
        if nbytes <= self._file_bytes:
            return
        with self._extending:  # the warmer creates pages on a thread of its own
            if nbytes > self._file_bytes:
                try:
                    os.ftruncate(self.fd, nbytes)
                except OSError as error:
                    raise DriverError("ftruncate", error.errno or errno.EIO, 0, nbytes) from error
                self._file_bytes = nbytes

    def _home_delta(self, address: int) -> int | None:
        """File offset minus address of the home pages at ``address``; None if zero-backed."""
        for base, (end, delta) in self._homes.items():
            if base <= address < end:
                return None if base in self._zero_backed else delta
        raise OutOfRange(f"{address:#x} lies in no reservation")


def _refused(nbytes: int, code: int) -> ReserveError:
    return ReserveError(
        f"cannot reserve {nbytes} bytes of address space: {os.strerror(code)}. Use fewer slots or "
        "a smaller max_tokens; `ulimit -v` may cap the address space."
    )


def _no_descriptor(error: OSError) -> MapLimitError:
    return MapLimitError(
        f"no file descriptor is left: {error.strerror}. Raise the limit of open files "
        "(ulimit -n) or close unused caches."
    )
