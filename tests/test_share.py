"""Laws of sharing with another process: same bytes, read-only, nothing left behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.mirror import PAGE, open_things, words_at
from vattn.allocator.arena import Arena
from vattn.allocator.errors import ClosedError, ShareError
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.allocator.share import HEADER, MAGIC, VERSION, export_pages, receive

ROOT = Path(__file__).parents[1]


@pytest.fixture
def arena() -> Arena:
    arena = Arena(Pool(HostBackend(PAGE), budget_bytes=64 * PAGE), slots=2, lanes=2, lane_pages=8)
    arena.grow(arena.plan_grow(np.array([0]), np.array([4])))
    for page in arena.mapped(0).tolist():
        words_at(arena.address + page * PAGE)[:] = 1000 + page
    return arena


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


IMPORTER = """
import mmap, os, socket, sys
from vattn.allocator.share import receive
import vattn.allocator.share as share
connection = socket.socket(fileno=int(sys.argv[1]))
real, kept = share.Import, []
def keep(fd, *rest):
    kept.append(os.dup(fd))
    return real(fd, *rest)
share.Import = keep
with receive(connection, page_bytes=4096) as pages:
    words = pages.view.cast("Q")
    connection.sendall(repr([words[i] for i in range(0, len(words), 512)]).encode() + b"\\n")
    try: mmap.mmap(kept[0], 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except PermissionError: connection.sendall(b"refused\\n")
    try: pages.view[0] = 1
    except TypeError: connection.sendall(b"read-only\\n")
    connection.recv(1)
    connection.sendall(repr(words[0]).encode() + b"\\n")
    if sys.argv[2] == "crash": os.kill(os.getpid(), 9)
    connection.recv(1)
"""


@pytest.mark.parametrize("end", ["orderly", "crash"])
@pytest.mark.parametrize("sealed", [False, True])
def test_another_process_reads_the_pages_and_cannot_write(
    arena: Arena, sealed: bool, end: str
) -> None:
    pages = np.array([3, 0, 1, 8, 10])
    ours, theirs = pair()
    command = [sys.executable, "-c", IMPORTER, str(theirs.fileno()), end]
    importer = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
    theirs.close()
    reply = ours.makefile()
    export = export_pages(arena, pages, sealed=sealed)
    export.send(ours)
    assert json.loads(reply.readline()) == [1000 + page for page in pages.tolist()]
    assert reply.readline() == "refused\n"
    assert reply.readline() == "read-only\n"
    words_at(arena.address + 3 * PAGE)[0] = 5  # in place: a plain export sees it, a copy does not
    ours.sendall(b".")
    assert reply.readline() == ("1003\n" if sealed else "5\n")
    if end == "crash":
        assert importer.wait(timeout=30) == -signal.SIGKILL
    else:
        ours.sendall(b".")
        assert importer.wait(timeout=30) == 0
    export.close()
    arena.drop(0)
    arena.pool.advance()
    assert arena.pool.mapped == 0
    arena.check()
    arena.pool.check()


def test_exported_pages_outlive_their_slot(arena: Arena) -> None:
    ours, theirs = pair()
    with export_pages(arena, np.arange(4)) as export:
        arena.check()
        arena.drop(0)
        arena.pool.advance()
        assert arena.pool.mapped == 4
        arena.grow_to(0, 8)
        arena.grow_to(1, 8)
        export.send(ours)
        imported = receive(theirs)
        assert [imported.view.cast("Q")[i * 512] for i in range(4)] == [1000, 1001, 1002, 1003]
        arena.pool.check()
    assert arena.pool.pending == 4
    with pytest.raises(ClosedError):
        export.send(ours)
    export.close()
    arena.close()
    arena.pool.close()


def test_the_owners_next_write_leaves_the_export_alone(arena: Arena) -> None:
    ours, theirs = pair()
    with export_pages(arena, np.array([0, 1])) as export:
        export.send(ours)
        imported = receive(theirs)
        arena.unshare(0, 0, 1)
        words_at(arena.address)[:] = 7
        words = imported.view.cast("Q")
        assert (words[0], words[512]) == (1000, 1001)
        arena.check()


def test_a_forgotten_export_gives_its_pages_back(arena: Arena) -> None:
    export = export_pages(arena, np.array([0]))
    assert arena.pool.refs(arena.ids(np.array([0]))) == 2
    del export
    assert arena.pool.refs(arena.ids(np.array([0]))) == 1


def test_nothing_is_left_behind(arena: Arena) -> None:
    before = open_things()
    for sealed in (False, True):
        ours, theirs = pair()
        with export_pages(arena, np.arange(3), sealed=sealed) as export:
            export.send(ours)
            export.send(ours)
            with receive(theirs) as first, receive(theirs) as second:
                assert first.view == second.view
                assert first.view.readonly
                part = first.view[:8]
        assert int.from_bytes(part, sys.byteorder) == 1000  # a slice keeps the mapping
        with pytest.raises(ClosedError):
            first.view  # noqa: B018
        del part
        ours.close()
        theirs.close()
    assert open_things() == before


def test_only_mapped_pages_are_exported(arena: Arena) -> None:
    for pages in (np.array([0, 7]), np.zeros(0, np.int64)):
        with pytest.raises(ShareError, match="mapped"):
            export_pages(arena, pages)
    arena.close()
    with pytest.raises(ClosedError):
        export_pages(arena, np.array([0]))


def body(**changes: object) -> bytes:
    return json.dumps({"page_bytes": PAGE, "runs": [[0, 1]], **changes}).encode()


@pytest.mark.parametrize(
    ("header", "payload", "why"),
    [
        ((b"EVIL", VERSION), body(), "schema"),
        ((MAGIC, VERSION + 1), body(), "version 2"),
        ((MAGIC, VERSION), body(runs=[]), "no runs"),
        ((MAGIC, VERSION), body(runs=[[0, 99999999]]), "outside"),
        ((MAGIC, VERSION), body(runs=[[-1, 1]]), "outside"),
        ((MAGIC, VERSION), body(runs=[[0, 0]]), "outside"),
        ((MAGIC, VERSION), body(runs=[["0", 1]]), "no runs"),
        ((MAGIC, VERSION), body(runs=3), "cannot map"),
        ((MAGIC, VERSION), body(page_bytes=1000), "1000 bytes"),
        ((MAGIC, VERSION), body(page_bytes=2 * PAGE, runs=[[0, 1]]), "are wanted"),
        ((MAGIC, VERSION), b"{", "cannot map"),
        ((MAGIC, VERSION), b"{}", "cannot map"),
    ],
)
def test_a_wrong_description_is_refused(
    arena: Arena, header: tuple[bytes, int], payload: bytes, why: str
) -> None:
    before = open_things()
    ours, theirs = pair()
    fd = arena.backend.descriptor()
    socket.send_fds(ours, [HEADER.pack(*header, len(payload))], [fd])
    ours.sendall(payload)
    with pytest.raises(ShareError, match=why):
        receive(theirs, page_bytes=PAGE)
    os.close(fd)
    ours.close()
    theirs.close()
    assert open_things() == before


def test_a_broken_connection_is_refused(arena: Arena) -> None:
    ours, theirs = pair()
    ours.sendall(HEADER.pack(MAGIC, VERSION, 9))
    with pytest.raises(ShareError, match="no file descriptor"):
        receive(theirs)
    ours, theirs = pair()
    with export_pages(arena, np.array([0])) as export:
        theirs.close()
        with pytest.raises(ShareError, match="cannot send"):
            export.send(ours)
    ours, theirs = pair()
    fd = arena.backend.descriptor()
    socket.send_fds(ours, [HEADER.pack(MAGIC, VERSION, 50)], [fd])
    ours.close()
    with pytest.raises(ShareError, match="ended after 0 of 50"):
        receive(theirs)
    os.close(fd)


def test_a_file_that_could_shrink_is_refused() -> None:
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.truncate(fd, PAGE)
    ours, theirs = pair()
    socket.send_fds(ours, [HEADER.pack(MAGIC, VERSION, len(body()))], [fd])
    ours.sendall(body())
    with pytest.raises(ShareError, match="shrink"):
        receive(theirs)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    os.close(fd)
