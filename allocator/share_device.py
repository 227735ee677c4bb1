"""Pages of a device, seen read-only by another process: a descriptor a page, over a UNIX socket.

    exporter                                     importer
    export_pages(arena, pages) -> Export
      .send(socket)  ── magic, version, size ──► receive(socket, backend) -> Import
                     ── count as JSON ─────────►   .address: contiguous, read-only, zero copy
                     ── descriptors, 200 a time ►
      .close()                                     .close()

What holds on the host (`share`) holds here: exported pages stay referenced until the export is
closed, and the owner's next write to them copies first. The memory itself lives as long as either
process has a handle: killing one leaves the other as it was. The exporter must have finished
writing (a stream that is waited for) before it sends: a descriptor carries no order.

Driver: cuMemExportToShareableHandle, cuMemImportFromShareableHandle; descriptors travel as
SCM_RIGHTS, of which Linux takes 253 in one message.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

from .arena import Arena
from .context import current
from .cuda import CudaBackend
from .errors import ClosedError, DriverError, ShareError, VattnError
from .record import Ints
from .share import HEADER, MAGIC, MAX_JSON_BYTES, Closing, Kept, mapped_ids, receive_exactly

VERSION = 101  # the host's versions are below
AT_ONCE = 200  # descriptors in a message
MAX_PAGES = 1 << 20
# Page ids of imports: no pool counts that far.
_ids = count(1 << 40, MAX_PAGES)


class Export(Kept):
    """Pages that are kept for other processes; made by `export_pages`. Close it."""

    def __init__(self, arena: Arena, pages: Ints) -> None:
        self._backend = arena.backend
        with arena.turn:
            super().__init__(arena, pages, mapped_ids(arena, pages))

    @property
    def nbytes(self) -> int:
        """Bytes that the importer sees."""
        return len(self.ids) * self.page_bytes

    def send(self, connection: socket.socket) -> None:
        """Send a descriptor of every page; any number of times.

        Raises:
            ClosedError: the export is closed. ShareError: the connection broke, or pages of this
            kind have no descriptors. DriverError: the driver refused one.
        """
        if self.closed:
            raise ClosedError("the export is closed")
        ids = self.ids.tolist()
        body = json.dumps({"page_bytes": self.page_bytes, "pages": len(ids)}).encode()
        try:
            connection.sendall(HEADER.pack(MAGIC, VERSION, len(body)) + body)
            for first in range(0, len(ids), AT_ONCE):
                with self._descriptors(ids[first : first + AT_ONCE]) as fds:
                    socket.send_fds(connection, [b"."], fds)
        except OSError as error:
            raise ShareError(f"cannot send the pages: {error}") from error

    @contextmanager
    def _descriptors(self, ids: list[int]) -> Iterator[list[int]]:
        """A descriptor of each page for the time of sending them."""
        fds: list[int] = []
        try:
            for page in ids:
                fds.append(self._backend.export_page(page))  # type: ignore[attr-defined]
            yield fds
        finally:
            for fd in fds:
                os.close(fd)


def export_pages(arena: Arena, pages: Ints) -> Export:
    """Export mapped ``pages`` (page numbers of the arena), in the order in which they will be seen.

    Raises:
        ShareError: a page is not mapped, or pages of this kind have no descriptors.
        ClosedError: the arena is closed.
    """
    if arena.closed:
        raise ClosedError("the arena is closed")
    kind = getattr(arena.backend, "kind", None)
    if kind is None or kind.export != "fd":
        why = "they lie in host memory: use share.export_pages" if kind is None else f"are {kind}"
        raise ShareError(f"pages have no descriptors of their own: {why}")
    return Export(arena, pages)


class Import(Closing):
    """Another process's pages, mapped side by side on ``backend``'s device, to be read only.

    ``address`` .. ``address + nbytes`` is valid until `close`; `vattn.tensor.imported` makes a
    tensor of it that keeps it open.
    """

    def __init__(self, backend: CudaBackend, page_bytes: int, fds: list[int]) -> None:
        self.backend, self.context, self.page_bytes = backend, backend.context, page_bytes
        self.pages, self.nbytes = len(fds), len(fds) * page_bytes
        self._first, self._imported = next(_ids), 0
        self.closed = True  # until everything below has worked
        self.address = 0
        try:
            self._open(fds)
        except BaseException:
            self._release()
            raise
        self.closed = False

    @current
    def _open(self, fds: list[int]) -> None:
        backend, mapped = self.backend, self.backend.mappings
        for page, fd in enumerate(fds, self._first):
            backend.import_page(page, fd)
            self._imported += 1
        self.address = backend.reserve(self.pages, home=0)
        handles = backend.handles.run(self._first, self.pages)
        backend.driver.map_run(self.address, self.page_bytes, handles, mapped.read_access)
        mapped.keep(self.address, handles)

    def close(self) -> None:
        """Wait for the device's work, then unmap and let go of the memory. Idempotent.

        Raises:
            DriverError: the driver refused to unmap; the import is as it was.
        """
        if not self.closed:
            self._release()
            self.closed = True

    def _release(self) -> None:
        if self.address:
            self.backend.release(self.address, self.pages)
            self.address = 0
        if self._imported:
            self.backend.destroy(self._first, self._imported)
            self._imported = 0

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            with suppress(DriverError):
                self.close()


def receive(connection: socket.socket, backend: CudaBackend) -> Import:
    """Map what another process's `Export.send` sent, on the device of ``backend``.

    Raises:
        ShareError: no descriptors, another schema, pages of another size than the backend's, or
            the driver refused them. Nothing is left behind.
    """
    fds: list[int] = []
    try:
        pages = _announced(connection, backend.page_bytes)
        while len(fds) < pages:
            data, some, _, _ = socket.recv_fds(connection, 1, AT_ONCE)
            fds += some
            if not some:
                what = "a message without descriptors came" if data else "the connection ended"
                raise ShareError(f"{what} after {len(fds)} of {pages} pages")
        return Import(backend, backend.page_bytes, fds)
    except ShareError:
        raise
    except (OSError, ValueError, KeyError, TypeError, VattnError) as error:
        raise ShareError(f"cannot map what was sent: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)


def _announced(connection: socket.socket, page_bytes: int) -> int:
    """How many pages are to come."""
    magic, version, length = HEADER.unpack(receive_exactly(connection, HEADER.size))
    if (magic, version) != (MAGIC, VERSION):
        raise ShareError(
            f"schema {magic!r} version {version} was sent, {MAGIC!r} {VERSION} is known: pages of "
            "host memory are received by share.receive"
        )
    if length > MAX_JSON_BYTES:
        raise ShareError(f"a description of {length} bytes was announced")
    sent = json.loads(receive_exactly(connection, length))
    pages, size = sent["pages"], sent["page_bytes"]
    if size != page_bytes:
        raise ShareError(f"pages of {size} bytes were sent, the backend's are {page_bytes}")
    if type(pages) is not int or not 0 < pages <= MAX_PAGES:
        raise ShareError(f"{pages!r} pages were announced: must be 1 to {MAX_PAGES}")
    return pages
