"""The file behind the lower tier of the host backend: pages on a disk, or wherever a path leads.

The file is sparse and grows as pages are made. Without a path it has no name either (O_TMPFILE): it
goes with the process. With one it is removed when the tier is closed; its contents mean nothing
without the record of what is mapped. The kernel keeps the pages it can in memory (the page cache)
and writes them to the disk in the background.
"""

from __future__ import annotations

import errno
import os
import tempfile

from . import libc
from .errors import DriverError
from .windows import Windows

MADV_DONTNEED = 4


class TierFile:
    """Pages ``first .. first + pages`` at the offset of their number.

    Raises:
        DriverError: the file cannot be made (the path exists, no such folder, no descriptor left).
    """

    def __init__(self, first: int, pages: int, page_bytes: int, path: str | None) -> None:
        self.first, self.end, self.page_bytes, self.path = first, first + pages, page_bytes, path
        self.nbytes = 0
        try:
            if path is None:
                self.fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
            else:
                flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
                self.fd = os.open(path, flags, 0o600)
        except OSError as error:
            where = path or f"a file in {tempfile.gettempdir()} (TMPDIR)"
            remedy = f"The lower tier is {where}: name another path, in a folder that exists."
            raise DriverError("open", error.errno or errno.EIO, 0, 0, remedy) from error
        self.windows = Windows(self.fd)

    def offset(self, page: int) -> int:
        """Where a page lies."""
        return (page - self.first) * self.page_bytes

    def create(self, page: int, count: int) -> None:
        """Have room on the disk for pages: a write through a mapping that finds none would kill the
        process (SIGBUS).

        Raises:
            DriverError: the disk is full, or the file may not be so large.
        """
        offset, nbytes = self.offset(page), count * self.page_bytes
        try:
            os.posix_fallocate(self.fd, offset, nbytes)
        except OSError as error:
            remedy = "Give the lower tier less, or name a file on a disk with more room."
            code = error.errno or errno.EIO
            raise DriverError("fallocate", code, offset, nbytes, remedy) from error
        self.nbytes = max(self.nbytes, offset + nbytes)

    def commit(self, page: int, count: int) -> None:
        """Write pages to memory, and map them."""
        self.windows.commit(self.offset(page), count * self.page_bytes)

    def resident_bytes(self) -> int:
        """Bytes on the disk, or on their way there."""
        return os.fstat(self.fd).st_blocks * 512

    def forget_cache(self) -> None:
        """Write everything to the disk and let go of the memory behind it, as far as nobody maps
        it; for measurements.

        Raises:
            OSError: the disk refused.
        """
        os.fdatasync(self.fd)
        for address, length in self.windows.pieces(0, self.nbytes):
            libc.advise_memory(address, length, MADV_DONTNEED)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Give everything back."""
        self.windows.close()
        os.close(self.fd)
        if self.path is not None:
            os.unlink(self.path)
