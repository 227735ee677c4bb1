"""The system calls, one function each: called with numbers, raising `DriverError` when refused.

mmap(2), munmap(2), mprotect(2), madvise(2) and fallocate(2) with FALLOC_FL_PUNCH_HOLE.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from .errors import DriverError

PROT_NONE, PROT_READ, PROT_RW = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANON, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
MADV_POPULATE_READ, MADV_COLLAPSE = 22, 25
PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
MAP_FAILED = ctypes.c_void_p(-1).value


def _call(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_libc, name)
    function.restype, function.argtypes = result, arguments
    return function


_libc = ctypes.CDLL(None, use_errno=True)
_int, _size, _address, _offset = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
_mmap = _call("mmap", _address, _address, _size, _int, _int, _int, _offset)
_munmap = _call("munmap", _int, _address, _size)
_mprotect = _call("mprotect", _int, _address, _size, _int)
_madvise = _call("madvise", _int, _address, _size, _int)
_fallocate = _call("fallocate", _int, _int, _int, _offset, _offset)


def map_memory(
    address: int | None, nbytes: int, prot: int, flags: int, fd: int = -1, offset: int = 0
) -> int:
    """mmap(2); returns the address."""
    got = _mmap(address, nbytes, prot, flags, fd, offset)
    if got == MAP_FAILED:
        raise DriverError("mmap", ctypes.get_errno(), address or 0, nbytes)
    return int(got)


def unmap_memory(address: int, nbytes: int) -> None:
    """munmap(2); nothing to do for no bytes."""
    if nbytes and _munmap(address, nbytes):
        raise DriverError("munmap", ctypes.get_errno(), address, nbytes)


def protect_memory(address: int, nbytes: int, prot: int) -> None:
    """mprotect(2)."""
    if _mprotect(address, nbytes, prot):
        raise DriverError("mprotect", ctypes.get_errno(), address, nbytes)


def advise_memory(address: int, nbytes: int, advice: int) -> None:
    """madvise(2)."""
    if _madvise(address, nbytes, advice):
        raise DriverError(f"madvise({advice})", ctypes.get_errno(), address, nbytes)


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """fallocate(2): return the bytes of a file range; it reads as zeros."""
    if _fallocate(fd, PUNCH_HOLE_KEEP_SIZE, offset, nbytes):
        raise DriverError("fallocate(PUNCH_HOLE)", ctypes.get_errno(), offset, nbytes)


def reserve_aligned(nbytes: int, align: int, remainder: int) -> int:
    """Closed anonymous address space whose address is ``remainder`` modulo ``align``."""
    flags = MAP_PRIVATE | MAP_ANON | MAP_NORESERVE
    start = map_memory(None, nbytes + align, PROT_NONE, flags)
    address = start + (remainder - start) % align
    unmap_memory(start, address - start)
    unmap_memory(address + nbytes, start + align - address)
    return address
