"""Pages of an arena, seen read-only by another process: one file descriptor over a UNIX socket.

    exporter                                    importer
    export_pages(arena, pages) -> Export
      .send(socket)  ── magic, version, fd ──►  receive(socket) -> Import
                     ── runs as JSON ────────►    .view: contiguous, read-only, zero copy
      .close()                                    .close()

The pages stay referenced until the export is closed, also if their slot is dropped meanwhile; while
exported they have a second holder, so that the owner's next write to them copies first (`unshare`)
and the importer keeps seeing what was exported.

Two strengths of *read-only*. A plain export sends a descriptor opened for reading: mapping it
writable fails (EACCES), and so does mprotect; a hostile process of the same user could reopen
the file through /proc, as it could use ptrace. A *sealed* export sends a copy in a file of its own
that nobody can write, shrink or grow any more (F_SEAL_WRITE), and shows nothing but the pages.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import os
import socket
import struct
import weakref
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from . import libc
from .arena import Arena
from .errors import ClosedError, DriverError, ShareError
from .record import Ints
from .warmqueue import runs

MAGIC, VERSION = b"VATN", 1
HEADER = struct.Struct("!4sHI")  # magic, version, bytes of JSON that follow
MAX_JSON_BYTES = 64 << 20
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Closing(ABC):
    """What a `with` block closes."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class Kept(Closing):
    """Pages of an arena that stay referenced until `close`: their owner's next write copies first.
    Made within the arena's turn."""

    def __init__(self, arena: Arena, pages: Ints, ids: Ints) -> None:
        self.page_bytes, self.closed = arena.page_bytes, True
        self._pool, self.ids = arena.pool, ids
        self._pool.share(ids)
        for slot in set((pages // arena.slot_pages).tolist()):
            index = int((pages[pages // arena.slot_pages == slot] % arena.lane_pages).max())
            arena.shared_to[slot] = max(int(arena.shared_to[slot]), index + 1)
        self.closed = False

    def close(self) -> None:
        """Let go of the pages; importers keep what they mapped. Idempotent."""
        if not self.closed:
            self.closed = True
            with self._pool.turn:
                self._pool.give(self.ids)

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            self.closed, pool, ids = True, self._pool, self.ids
            pool.turn.soon(lambda: pool.give(ids))


class Export(Kept):
    """Pages that are kept for other processes; made by `export_pages`. Close it."""

    def __init__(self, arena: Arena, pages: Ints, *, sealed: bool) -> None:
        self.sealed, self._fd = sealed, -1
        with arena.turn:
            ids = mapped_ids(arena, pages)
            self.runs = list(runs(ids))
            if sealed:
                self._fd = _sealed_copy(arena, self.runs)
                self.runs = [(0, len(ids))]
                pages, ids = pages[:0], ids[:0]
            else:
                self._fd = arena.backend.descriptor()
            super().__init__(arena, pages, ids)

    @property
    def nbytes(self) -> int:
        """Bytes that the importer sees."""
        return sum(count for _, count in self.runs) * self.page_bytes

    def send(self, connection: socket.socket) -> None:
        """Send the descriptor and what to map of it; any number of times.

        Raises:
            ClosedError: the export is closed. ShareError: the connection broke.
        """
        if self._fd < 0:
            raise ClosedError("the export is closed")
        body = json.dumps({"page_bytes": self.page_bytes, "runs": self.runs}).encode()
        message = HEADER.pack(MAGIC, VERSION, len(body)) + body
        try:
            sent = socket.send_fds(connection, [message], [self._fd])  # one wake-up, if it fits
            connection.sendall(message[sent:])
        except OSError as error:
            raise ShareError(f"cannot send the pages: {error}") from error

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        super().close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1
        super().__del__()


def export_pages(arena: Arena, pages: Ints, *, sealed: bool = False) -> Export:
    """Export mapped ``pages`` (page numbers of the arena), in the order in which they will be seen.

    Args:
        sealed: send an immutable copy instead of the pages themselves.

    Raises:
        ShareError: a page is not mapped. ClosedError: the arena is closed.
        DriverError: no file descriptor is left.
    """
    if arena.closed:
        raise ClosedError("the arena is closed")
    return Export(arena, pages, sealed=sealed)


class Import(Closing):
    """Another process's pages, mapped side by side. Views keep the mapping alive."""

    def __init__(self, fd: int, page_bytes: int, where: list[tuple[int, int]]) -> None:
        self.page_bytes = page_bytes
        self.nbytes = sum(count for _, count in where) * page_bytes
        address = libc.reserve_aligned(self.nbytes, page_bytes, 0)
        try:
            at = address
            for page, count in where:
                flags = libc.MAP_SHARED | libc.MAP_FIXED | libc.MAP_NORESERVE
                size = count * page_bytes
                libc.map_memory(at, size, libc.PROT_READ, flags, fd, page * page_bytes)
                at += size
        except DriverError:
            libc.unmap_memory(address, self.nbytes)
            raise
        buffer = (ctypes.c_char * self.nbytes).from_address(address)
        # Whoever holds a slice holds the buffer: unmapped when the last one is gone.
        weakref.finalize(buffer, libc.unmap_memory, address, self.nbytes).atexit = False
        self._view: memoryview | None = memoryview(buffer).cast("B").toreadonly()

    @property
    def view(self) -> memoryview:
        """The bytes, read-only.

        Raises:
            ClosedError: the import is closed.
        """
        if self._view is None:
            raise ClosedError("the import is closed")
        return self._view

    def close(self) -> None:
        """Unmap, as soon as no slice of the view is left. Idempotent."""
        self._view = None


def receive(connection: socket.socket, *, page_bytes: int | None = None) -> Import:
    """Map what another process's `Export.send` sent.

    Args:
        page_bytes: refuse pages of another size.

    Raises:
        ShareError: no descriptor, another schema or page size, runs beyond the file, a file that
            could shrink under us, or no address space.
    """
    fd = -1
    try:
        fd, length = _receive_header(connection)
        sent = json.loads(receive_exactly(connection, length))
        size, where = _checked(sent, os.fstat(fd).st_size)
        if page_bytes is not None and size != page_bytes:
            raise ShareError(f"pages of {size} bytes were sent, pages of {page_bytes} are wanted")
        # A file that shrinks under a mapping kills the reader (SIGBUS).
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ShareError("the file is not sealed against shrinking")
        return Import(fd, size, where)
    except (OSError, ValueError, KeyError, TypeError, DriverError) as error:
        raise ShareError(f"cannot map what was sent: {error}") from error
    finally:
        if fd >= 0:
            os.close(fd)


def mapped_ids(arena: Arena, pages: Ints) -> Ints:
    """The pool's ids of an arena's pages. Raises ShareError unless all are mapped."""
    ids: Ints = arena.ids(pages)
    if not len(ids) or int(ids.min()) < 0:
        raise ShareError("only mapped pages can be exported, and at least one")
    lower = arena.pool.lower
    if lower is not None and lower.holds(ids).any():
        raise ShareError("pages of the lower tier cannot be exported: promote them first")
    return ids


def _sealed_copy(arena: Arena, where: list[tuple[int, int]]) -> int:
    source = arena.backend.descriptor()
    fd = -1
    try:
        fd = os.memfd_create("vattn-export", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        for page, count in where:
            offset, left = page * arena.page_bytes, count * arena.page_bytes
            while left:
                sent = os.sendfile(fd, source, offset, left)
                if not sent:
                    raise ShareError("the pool's file ended early")
                offset, left = offset + sent, left - sent
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShareError(f"cannot make a sealed copy: {error}") from error
    finally:
        os.close(source)
        if fd >= 0:
            os.close(fd)
    return reader


def _receive_header(connection: socket.socket) -> tuple[int, int]:
    data, fds, _, _ = socket.recv_fds(connection, HEADER.size, 1)
    try:
        if not fds:
            raise ShareError("no file descriptor was sent" if data else "nothing was sent")
        data += receive_exactly(connection, HEADER.size - len(data))
        magic, version, length = HEADER.unpack(data)
        if (magic, version) != (MAGIC, VERSION):
            raise ShareError(
                f"schema {magic!r} version {version} was sent, {MAGIC!r} {VERSION} is known"
            )
        if length > MAX_JSON_BYTES:
            raise ShareError(f"a description of {length} bytes was announced")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds[0], length


def receive_exactly(connection: socket.socket, length: int) -> bytes:
    """So many bytes. Raises ShareError if the connection ends before."""
    data = array.array("B")
    while len(data) < length:
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise ShareError(f"the connection ended after {len(data)} of {length} bytes")
        data.frombytes(part)
    return data.tobytes()


def _checked(sent: Any, file_bytes: int) -> tuple[int, list[tuple[int, int]]]:
    """Page size and runs of a description, if they make sense for a file of that size."""
    size = sent["page_bytes"]
    where = [(page, count) for page, count in sent["runs"]]
    numbers = [size, *(n for run in where for n in run)]
    if not where or not all(type(n) is int for n in numbers):
        raise ShareError("the description has no runs of pages")
    if size <= 0 or size % os.sysconf("SC_PAGE_SIZE"):
        raise ShareError(f"pages of {size} bytes cannot be mapped")
    for page, count in where:
        if page < 0 or count < 1 or (page + count) * size > file_bytes:
            raise ShareError(f"pages {page}..{page + count} lie outside of the file")
    return size, where
