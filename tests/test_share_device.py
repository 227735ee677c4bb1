"""Laws of sharing a device's pages with another process, over the driver emulator."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.devices import MEMORY, UNKNOWN, make_arena, shut
from tests.emulator.control import Emulator
from tests.mirror import PAGE, open_things, words_at
from vattn.allocator.arena import Arena
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.errors import ClosedError, DriverError, ShareError
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.allocator.share import HEADER, MAGIC
from vattn.allocator.share_device import AT_ONCE, VERSION, export_pages, receive

ROOT = Path(__file__).parents[1]
MANY = AT_ONCE * 2 + 3


@pytest.fixture
def arena(emulator: Emulator) -> Iterator[Arena]:
    arena = make_arena(CudaBackend(PAGE), slots=2, lanes=2, pages=64)
    arena.grow_to(0, 4)
    for page in arena.mapped(0).tolist():
        words_at(arena.address + page * PAGE)[:] = 1000 + page
    yield arena
    shut(arena)


@pytest.fixture
def importer(emulator: Emulator) -> Iterator[CudaBackend]:
    """Another backend, as another process would have one."""
    backend = CudaBackend(PAGE)
    yield backend
    backend.close()


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def firsts(address: int, pages: int) -> list[int]:
    """The first word of each page."""
    return [int(words_at(address + i * PAGE)[0]) for i in range(pages)]


def test_pages_are_seen_in_the_order_they_were_named(arena: Arena, importer: CudaBackend) -> None:
    ours, theirs = pair()
    with export_pages(arena, np.array([3, 0, 1, 8, 10])) as export:
        export.send(ours)
        with receive(theirs, importer) as seen:
            assert seen.nbytes == export.nbytes == 5 * PAGE
            assert firsts(seen.address, 5) == [1003, 1000, 1001, 1008, 1010]
            words_at(arena.address)[0] = 5
            assert firsts(seen.address, 5)[1] == 5
            assert importer.resident_bytes() == 0
        export.close()
        with pytest.raises(ClosedError):
            export.send(ours)


def test_exported_pages_outlive_their_slot_and_the_owners_next_write(
    arena: Arena, importer: CudaBackend
) -> None:
    ours, theirs = pair()
    with export_pages(arena, np.array([0, 1])) as export:
        export.send(ours)
        with receive(theirs, importer) as seen:
            arena.unshare(0, 0, 1)
            words_at(arena.address)[:] = 7
            assert firsts(seen.address, 2) == [1000, 1001]
            arena.drop(0)
            arena.pool.advance()
            assert arena.pool.mapped == 2
            arena.pool.check()
    assert arena.pool.mapped == 0


def test_more_pages_than_one_message_takes(emulator: Emulator, importer: CudaBackend) -> None:
    backend = CudaBackend(PAGE)
    pool = Pool(backend, budget_bytes=MANY * PAGE)
    arena = Arena(pool, slots=1, lanes=1, lane_pages=MANY)
    arena.grow_to(0, MANY)
    for page in range(MANY):
        words_at(arena.address + page * PAGE)[0] = page
    ours, theirs = pair()
    with export_pages(arena, np.arange(MANY)) as export:
        export.send(ours)
        with receive(theirs, importer) as seen:
            assert firsts(seen.address, MANY) == list(range(MANY))
    shut(arena)


IMPORTER = """
import os, socket, sys
from tests.emulator.control import ready
from tests.mirror import PAGE, words_at
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.share_device import receive
ready(granularity=PAGE)
connection = socket.socket(fileno=int(sys.argv[1]))
seen = receive(connection, CudaBackend(PAGE))
connection.sendall(repr([int(words_at(seen.address + i * PAGE)[0]) for i in (0, 1)]).encode())
connection.recv(1)
if sys.argv[2] == "write": words_at(seen.address)[0] = 1
if sys.argv[2] == "crash": os.kill(os.getpid(), 9)
seen.close()
"""


@pytest.mark.parametrize(
    ("end", "code"), [("close", 0), ("crash", -signal.SIGKILL), ("write", -signal.SIGSEGV)]
)
def test_another_process_reads_and_cannot_write(arena: Arena, end: str, code: int) -> None:
    ours, theirs = pair()
    command = [sys.executable, "-c", IMPORTER, str(theirs.fileno()), end]
    other = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
    theirs.close()
    with export_pages(arena, np.array([8, 2])) as export:
        export.send(ours)
        assert ours.recv(100) == b"[1008, 1002]"
        ours.sendall(b".")
        assert other.wait(timeout=60) == code
    assert firsts(arena.address, 1) == [1000]
    arena.check()
    arena.pool.check()


EXPORTER = """
import os, socket, sys
import numpy as np
from tests.devices import make_arena
from tests.emulator.control import ready
from tests.mirror import PAGE, words_at
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.share_device import export_pages
ready(granularity=PAGE)
arena = make_arena(CudaBackend(PAGE), pages=8)
arena.grow_to(0, 2)
words_at(arena.address + PAGE)[0] = 42
export_pages(arena, np.array([1, 0])).send(socket.socket(fileno=int(sys.argv[1])))
os.kill(os.getpid(), 9)
"""


def test_what_was_imported_outlives_its_exporter(importer: CudaBackend) -> None:
    ours, theirs = pair()
    command = [sys.executable, "-c", EXPORTER, str(ours.fileno())]
    other = subprocess.Popen(command, cwd=ROOT, pass_fds=[ours.fileno()])
    ours.close()
    assert other.wait(timeout=60) == -signal.SIGKILL
    with receive(theirs, importer) as seen:
        assert firsts(seen.address, 1) == [42]


def test_whichever_call_fails_nothing_is_left(
    arena: Arena, importer: CudaBackend, emulator: Emulator
) -> None:
    ours, theirs = pair()
    failures = 0
    with export_pages(arena, np.arange(3)) as export:
        export.send(ours)  # the emulator keeps exported pages in files of their own from now on
        receive(theirs, importer).close()
        before, things = emulator.live, open_things()
        for index in range(1, 100):
            export.send(ours)
            emulator.fail(index, MEMORY if index % 2 else UNKNOWN)
            try:
                seen = receive(theirs, importer)
            except ShareError:
                failures += 1
                assert emulator.live == before, index
                continue
            break
        emulator.fail(0)
        seen.close()
    assert failures > 6
    assert (emulator.live, open_things()) == (before, things)


def test_what_cannot_be_exported_is_refused(arena: Arena) -> None:
    with pytest.raises(ShareError, match="mapped"):
        export_pages(arena, np.array([0, 7]))
    host = Arena(Pool(HostBackend(PAGE), budget_bytes=4 * PAGE), slots=1, lanes=1, lane_pages=4)
    with pytest.raises(ShareError, match=r"share\.export_pages"):
        export_pages(host, np.array([0]))
    shut(host)
    private = make_arena(CudaBackend(PAGE, export=None), pages=4)
    private.grow_to(0, 1)
    with pytest.raises(ShareError, match="private"):
        export_pages(private, np.array([0]))
    shut(private)
    with pytest.raises(ClosedError):
        export_pages(private, np.array([0]))


@pytest.mark.parametrize(
    ("header", "body", "why"),
    [
        ((b"EVIL", VERSION), b'{"pages": 1, "page_bytes": %d}' % PAGE, "schema"),
        ((MAGIC, 1), b'{"pages": 1, "page_bytes": %d}' % PAGE, r"share\.receive"),
        ((MAGIC, VERSION), b'{"pages": 0, "page_bytes": %d}' % PAGE, "announced"),
        ((MAGIC, VERSION), b'{"pages": "1", "page_bytes": %d}' % PAGE, "announced"),
        ((MAGIC, VERSION), b'{"pages": 1, "page_bytes": 7}', "the backend's are"),
        ((MAGIC, VERSION), b'{"pages": 2, "page_bytes": %d}' % PAGE, "ended after 0 of 2"),
        ((MAGIC, VERSION), b"{", "cannot map"),
        ((MAGIC, VERSION), b"[]", "cannot map"),
    ],
)
def test_a_wrong_description_is_refused(
    importer: CudaBackend, header: tuple[bytes, int], body: bytes, why: str
) -> None:
    ours, theirs = pair()
    ours.sendall(HEADER.pack(*header, len(body)) + body)
    ours.close()
    with pytest.raises(ShareError, match=why):
        receive(theirs, importer)


def test_descriptors_of_something_else_are_refused(importer: CudaBackend) -> None:
    before = open_things()
    ours, theirs = pair()
    body = b'{"pages": 1, "page_bytes": %d}' % PAGE
    ours.sendall(HEADER.pack(MAGIC, VERSION, len(body)) + body)
    with open(os.devnull) as other:
        socket.send_fds(ours, [b"."], [other.fileno()])
    with pytest.raises(ShareError, match="cuMemImportFromShareableHandle"):
        receive(theirs, importer)
    ours.close()
    theirs.close()
    assert open_things() == before


def test_closing_that_the_driver_refuses_can_be_tried_again(
    arena: Arena, importer: CudaBackend, emulator: Emulator
) -> None:
    ours, theirs = pair()
    with export_pages(arena, np.array([0])) as export:
        export.send(ours)
        seen = receive(theirs, importer)
        emulator.fail(1, UNKNOWN, "cuMemUnmap")
        with pytest.raises(DriverError):
            seen.close()
        assert firsts(seen.address, 1) == [1000]
        seen.close()
        seen.close()


def test_a_tensor_keeps_the_pages_mapped(
    arena: Arena, importer: CudaBackend, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator's memory is the processor's: a host tensor over it stands for a device's."""
    import torch

    from vattn import tensor

    monkeypatch.setitem(tensor.MAKERS, "cuda", on_host)
    ours, theirs = pair()
    with export_pages(arena, np.array([2])) as export:
        export.send(ours)
        seen = receive(theirs, importer)
        words = tensor.imported(seen, torch.int64)
        part = words[:3]
        live = emulator.live
        del words, seen
        assert part.tolist() == [1002] * 3
        assert emulator.live == live
        del part
        assert emulator.live.mappings == live.mappings - 1


def on_host(buffer: ctypes.Array, device: object, dtype: object, count: int, offset: int) -> object:
    from vattn.tensor import torch

    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
