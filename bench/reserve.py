"""Making 1 TiB of address space ready: backend, pool and arena, and whole KV caches.

A reservation is one map of a sparse file and some untouched arrays, so it costs no memory for its
pages; `memory` is what the process grew by. Wall clock, opening only; closing is not timed. The
rival is the bare system call, a private inaccessible map of 1 TiB, which says how little there is
to gain.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bench.harness import Bench
from vattn.allocator.arena import Arena
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool

if TYPE_CHECKING:
    from vattn import KVCache, Layout

TIB = 1 << 40
PAGE = 2 << 20
SLOTS = 64
TARGET = "<= 5"
MARK = 0xA5
ROOT = Path(__file__).resolve().parent.parent


class Closes(Protocol):
    """Anything that is given back."""

    def close(self) -> None: ...


class Bare:
    """The rival: 1 TiB that nobody may read or write."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, TIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)

    def close(self) -> None:
        self._map.close()


class Reservation:
    """1 TiB as 64 slots of one lane, without a KV cache on top."""

    def __init__(self) -> None:
        self.pool = Pool(HostBackend(PAGE), budget_bytes=TIB)
        self.arena = Arena(self.pool, slots=SLOTS, lanes=1, lane_pages=TIB // PAGE // SLOTS)

    def close(self) -> None:
        self.arena.close()
        self.pool.close()


def run(bench: Bench) -> None:
    from vattn import KVCache  # here, not above: the processes of the gate do without torch

    repeat = bench.pick(200, 30)
    bare = opening(bench, Bare, repeat)
    makers: list[tuple[str, Callable[[], Closes], Callable[[], bool]]] = [
        ("arena", Reservation, usable)
    ]
    for layout in (all_layers(), head_major()):
        cache = partial(KVCache, layout, slots=SLOTS, budget_bytes=TIB)
        kind = "all_layers" if layout.lanes == 1 else layout.rows
        makers.append((f"cache/{kind}", cache, partial(ends_work, cache)))
    for name, make, gate in makers:
        bench.figure(
            f"reserve/{name}",
            partial(opening, bench, make, repeat),
            "ms",
            gate=gate,
            target=TARGET,
            peer="mmap",
            peer_value=bare.p50 * 1e3,
            memory_bytes=grown_by(make),
            reserved_bytes=TIB,
        )


def all_layers() -> Layout:
    """128 KiB a token in one lane: 2^23 tokens are 1 TiB."""
    from vattn import Layout

    return Layout.all_layers(32, 8, 128, TIB // SLOTS // (128 << 10))


def head_major() -> Layout:
    """The default: 512 lanes a sequence, pages of 8 KiB, so 256 times as many pages to know of."""
    from vattn import Layout

    return Layout(32, 8, 128, TIB // SLOTS // (128 << 10))


def opening(bench: Bench, make: Callable[[], Closes], repeat: int):  # type: ignore[no-untyped-def]
    """Time ``make``; what it made is closed before the next call."""
    made: list[Closes] = []

    def close() -> None:
        while made:
            made.pop().close()

    sample = bench.measure(lambda _: made.append(make()), setup=close, repeat=repeat)
    close()
    return sample


def grown_by(make: Callable[[], Closes]) -> int:
    """Bytes of memory that the process holds more after ``make``."""
    before = resident()
    made = make()
    after = resident()
    made.close()
    return after - before


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


# ---- gates ---------------------------------------------------------------------------------------
def usable() -> bool:
    """First and last page can be mapped, written and read; an unmapped one faults."""
    for mapped in (True, False):
        code = f"from bench.reserve import touch; touch(mapped={mapped})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        wanted = 0 if mapped else -signal.SIGSEGV
        assert done.returncode == wanted, f"{done.returncode}, not {wanted}: {done.stderr[-300:]!r}"
    return True


def touch(*, mapped: bool) -> None:
    """Write and read the first and the last page of 1 TiB, or read one that is not mapped."""
    reservation = Reservation()
    arena = reservation.arena
    arena.grow_to(0, 1)
    arena.grow_to(SLOTS - 1, arena.lane_pages)
    first, last = arena.address, arena.address + TIB - 1
    for address in (first, last):
        byte = ctypes.c_ubyte.from_address(address)
        assert byte.value == 0
        byte.value = MARK
        assert byte.value == MARK
    if not mapped:
        print(ctypes.c_ubyte.from_address(first + PAGE).value)
        os._exit(0)  # a fault was expected
    reservation.close()


def ends_work(make: Callable[[], KVCache]) -> bool:
    """Tokens at both ends of the cache can be written and read: the first of the first slot, and of
    the last slot the last one where that takes one map call, else the first."""
    with make() as cache:
        assert cache.stats().reserved_bytes == TIB
        first, last = cache.open(slot=0), cache.open(slot=SLOTS - 1)
        for sequence in (first, last):
            most = sequence is last and cache.layout.lanes == 1
            tokens = cache.layout.max_tokens if most else 1
            cache.extend([sequence], tokens)
            cache.commit([sequence], tokens)
            for side in (sequence.k, sequence.v):
                row = side[-1][-1, -1]
                row.fill_(MARK)
                assert bool((side[-1][-1, -1] == MARK).all())
                assert 0 <= row.data_ptr() - cache.arena.address < TIB
    return True
