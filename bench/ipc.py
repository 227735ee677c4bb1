"""Pages in another process: the price of mapping them, and what a crash of either side leaves.

`map` times `share.receive` in a process that gets 12 GiB of a cache by descriptor: the description
is read and one mapping made; nothing is copied, and no byte becomes resident on either side.
`crash` kills one of two processes at a random moment (kill -9), in turns the importer and the
exporter. An importer that dies costs the exporter nothing: it sees the end of the connection, lets
go of the pages, and every page is free again, which is what is timed. An exporter that dies leaves
the importer's view as it was; once that is closed, nothing of the memory is mapped any more.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench.harness import Bench
from bench.timing import Sample
from vattn.allocator import share
from vattn.allocator.arena import Arena
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool

PAGE = 2 << 20
PAGES = (12 << 30) // PAGE
FEW = 64  # pages of a crash round
TARGET_US, TARGET_MS = 200, 100


def run(bench: Bench) -> None:
    arena = exporter(PAGES)
    took: list[float] = []
    bench.figure(
        "ipc/map/12GiB",
        lambda: Sample(tuple(took)),
        "us",
        gate=partial(maps, arena, bench.pick(200, 30), took),
        target=f"<= {TARGET_US}",
        copied_bytes=0,
        pages=PAGES,
    )
    close(arena)
    rounds = bench.pick(1000, 60)
    for side, act in {"importer": importer_dies, "exporter": exporter_dies}.items():
        after: list[float] = []
        bench.figure(
            f"ipc/crash/{side}",
            lambda after=after: Sample(tuple(after)),  # type: ignore[misc]
            "ms",
            gate=partial(survives, bench, act, rounds // 2, after),
            target=f"<= {TARGET_MS}",
            stat="max",
            kills=rounds // 2,
        )


# ---- two processes -------------------------------------------------------------------------------
def exporter(pages: int) -> Arena:
    """An arena with ``pages`` pages mapped, the first word of each its number."""
    arena = Arena(
        Pool(HostBackend(PAGE), budget_bytes=pages * PAGE), slots=1, lanes=1, lane_pages=pages
    )
    arena.grow_to(0, pages)
    stamps(arena, pages)[:] = np.arange(pages)
    return arena


def stamps(arena: Arena, pages: int) -> np.ndarray:
    """The first word of every page."""
    import ctypes

    words = (ctypes.c_int64 * (pages * PAGE // 8)).from_address(arena.address)
    return np.ctypeslib.as_array(words)[:: PAGE // 8]


def seen(view: memoryview) -> np.ndarray:
    """The first word of every page of an import."""
    return np.frombuffer(view, np.int64)[:: PAGE // 8]


def close(arena: Arena) -> None:
    arena.close()
    arena.pool.close()


def child(act: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """Fork a process that runs ``act`` with its end of a connection; its id, and our end."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    code = 1
    try:
        ours.close()
        act(theirs)
        code = 0
    finally:
        os._exit(code)


# ---- mapping -------------------------------------------------------------------------------------
def maps(arena: Arena, rounds: int, took: list[float]) -> bool:
    """Another process sees every page, and no byte was copied; appends seconds a round."""

    def importer(connection: socket.socket) -> None:
        for turn in range(rounds):
            connection.recv(1, socket.MSG_PEEK)  # what was sent is there: waiting is not timed
            begin = time.perf_counter()
            got = share.receive(connection, page_bytes=PAGE)
            seconds = time.perf_counter() - begin
            view = got.view
            step = 97 if turn % 10 else 1  # every page in every tenth round, some in the others
            right = bool((seen(view)[::step] == np.arange(PAGES)[::step]).all())
            right = right and len(view) == PAGES * PAGE
            del view
            got.close()
            connection.sendall(np.array([seconds, right]).tobytes())

    resident = arena.backend.resident_bytes()
    pid, connection = child(importer)
    with connection, share.export_pages(arena, np.arange(PAGES)) as export:
        for _ in range(rounds):
            export.send(connection)
            answer = connection.recv(16, socket.MSG_WAITALL)
            assert len(answer) == 16, "the importer died"
            seconds, right = np.frombuffer(answer)
            assert right, "the importer saw other bytes"
            took.append(float(seconds))
        assert arena.backend.resident_bytes() == resident, "bytes were copied"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    arena.pool.check()
    return True


# ---- crashes -------------------------------------------------------------------------------------
def survives(bench: Bench, act: Callable[[Bench], float], rounds: int, after: list[float]) -> bool:
    """Nothing is left of any round; appends seconds from the kill until all is accounted for."""
    files, mapped = len(os.listdir("/proc/self/fd")), own_maps()
    for _ in range(rounds):
        after.append(act(bench))
    assert len(os.listdir("/proc/self/fd")) == files, "descriptors were leaked"
    assert own_maps() == mapped, "mappings were leaked"
    return True


def own_maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:vattn")


def importer_dies(bench: Bench) -> float:
    """We export; the other side is killed while it receives, reads or closes."""
    arena = exporter(FEW)

    def importer(connection: socket.socket) -> None:
        while True:
            with share.receive(connection) as got:
                connection.send(b"." if (seen(got.view) == np.arange(FEW)).all() else b"!")

    pid, connection = child(importer)
    with connection:
        export = share.export_pages(arena, np.arange(FEW))
        # Half of its rows are dropped meanwhile: exported pages outlive their place in the arena.
        arena.trim(0, 0, FEW // 2)
        export.send(connection)
        assert connection.recv(1) == b".", "the importer saw other bytes"
        export.send(connection)
        begin = kill(pid, bench)
        while (answer := received(connection)) == b".":
            pass
        assert not answer, "the importer saw other bytes"
        export.close()
    kept = stamps(arena, FEW)[: FEW // 2]
    assert (kept == np.arange(FEW // 2)).all(), "rows of the survivor"
    arena.drop(0)
    arena.pool.advance()
    seconds = time.perf_counter() - begin
    os.waitpid(pid, 0)
    arena.pool.check()
    arena.check()
    assert (arena.pool.free, arena.pool.mapped, arena.pool.pending) == (FEW, 0, 0), "pages"
    close(arena)
    return seconds


def exporter_dies(bench: Bench) -> float:
    """The other side exports, and is killed while we read."""

    def source(connection: socket.socket) -> None:
        arena = exporter(FEW)
        with share.export_pages(arena, np.arange(FEW)) as export:
            while True:
                export.send(connection)
                connection.recv(1)
                stamps(arena, FEW)[:] = np.arange(FEW)  # the same again

    pid, connection = child(source)
    with connection:
        got = share.receive(connection)
        connection.send(b".")
        begin = kill(pid, bench)
        while received(connection):  # until its end is closed
            pass
        os.waitpid(pid, 0)
        view = got.view
        assert (seen(view) == np.arange(FEW)).all(), "the view of the survivor"
        del view
        got.close()
    return time.perf_counter() - begin


def kill(pid: int, bench: Bench) -> float:
    """Kill -9 after up to 2 ms; the moment."""
    time.sleep(float(bench.rng.uniform(0, 2e-3)))
    begin = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    return begin


def received(connection: socket.socket) -> bytes:
    """What the other side said; nothing once it is dead. Descriptors in flight are closed."""
    try:
        data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    except ConnectionResetError:
        return b""
    for fd in fds:
        os.close(fd)
    return data
