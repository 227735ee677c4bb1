"""One more 2 MiB page: take it from the pool, map it, write to it.

    warm       its bytes are there, as one huge page; mapped at its home for the first time
    again      the same, but mapped there before: the page table survived
    elsewhere  a warm page that is mapped far from its home: another system call
    cold       its bytes are made by the write, 4 KiB at a time

`floor` is a warm page's one system call and the write, without pool, record and turn. `ready` is
the time until the first byte is written, `filled` until all 2 MiB are: a memset, which
on a cold page is 512 page faults. Rivals are new anonymous memory (mmap) and a new torch tensor,
kept alive as a growing cache would. Wall clock, so a busy machine shows in the 99th percentile.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.harness import Bench, Sample
from vattn.allocator.arena import Arena
from vattn.allocator.errors import DriverError
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool

PAGE = 2 << 20
PAGES = 32  # of an arena; then it starts anew
TARGET = "<= 10"
KINDS = ("warm", "again", "elsewhere", "cold")


def run(bench: Bench) -> None:
    repeat = bench.pick(4000, 400)
    for name, kinds, nbytes in (("ready", KINDS, 1), ("filled", ("warm", "cold"), PAGE)):
        rivals = {
            rival: bench.measure(make(nbytes), setup=turns(), repeat=repeat // 4)
            for rival, make in (("mmap", anonymous), ("torch.empty", tensors))
        }
        for kind in kinds:
            for rival, sample in rivals.items():
                if rival == "torch.empty" and name == "ready":
                    continue
                bench.figure(
                    f"page/{name}/{kind}" + ("/beside_torch" if rival != "mmap" else ""),
                    partial(growing, bench, kind, nbytes, repeat),
                    "us",
                    gate=partial(contents, bench, kind),
                    target=TARGET if (name, kind) == ("ready", "warm") else None,
                    stat="p99",
                    peer=rival,
                    peer_value=sample.p99 * 1e6,
                    huge_share=huge_share(kind),
                )
    bench.figure(
        "page/ready/floor",
        partial(growing, bench, "warm", 1, repeat, Source.map_alone),
        "us",
        gate=maps,
        stat="p99",
    )


class Source:
    """Pages of one kind, one after the other; starts anew after the last of them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.pool = Pool(HostBackend(PAGE), budget_bytes=4 * PAGES * PAGE)
        self.refused = ""
        self.arena = self._arena()
        self.other = self._arena() if kind == "elsewhere" else None
        if kind != "cold":
            self._warm()
        self.next = 0
        self._start()

    def close(self) -> None:
        for arena in (self.arena, self.other):
            if arena is not None:
                arena.close()
        self.pool.close()

    def turn(self, *_: object) -> int:
        """Make everything ready for one more page; returns its number. Not timed."""
        if self.next == PAGES:
            self._start()
        self.next += 1
        return self.next

    def grow(self, nbytes: int, to: int) -> None:
        """What is timed: page ``to - 1`` is taken, mapped and written."""
        self.arena.grow_to(0, to)
        ctypes.memset(self.arena.address + (to - 1) * PAGE, to, nbytes)

    def map_alone(self, nbytes: int, to: int) -> None:
        """What no allocator can leave out of `grow`. Nothing is recorded, so `turn` starts anew."""
        address = self.arena.address + (to - 1) * PAGE
        self.pool.backend.map(address, self.arena.home + to - 1, 1)
        ctypes.memset(address, to, nbytes)

    def _arena(self) -> Arena:
        return Arena(self.pool, slots=1, lanes=1, lane_pages=PAGES)

    def _start(self) -> None:
        """Nothing is mapped, and all pages are of the kind."""
        self.next = 0
        if self.kind in ("again", "elsewhere"):
            self.arena.drop(0)
            self.pool.advance()
        else:  # a new reservation of the same home pages: no page table
            self.arena.close()
            self.pool.advance()
            if self.kind == "cold":
                self.pool.trim()
            self.arena = self._arena()

    def _warm(self) -> None:
        """Make all pages huge where the kernel will, and give them back."""
        source = self.arena if self.other is None else self.other
        source.grow_to(0, PAGES)
        for page in source.ids(source.mapped(0)).tolist():
            try:
                self.pool.backend.warm(page, 1)
            except DriverError as error:
                self.refused = str(error)
        source.drop(0)
        self.pool.advance()


def growing(
    bench: Bench,
    kind: str,
    nbytes: int,
    repeat: int,
    grow: Callable[[Source, int, int], None] = Source.grow,
) -> Sample:
    """Time one page after the other."""
    with closing(Source(kind)) as source:
        return bench.measure(
            partial(grow, source, nbytes), setup=source.turn, warmup=PAGES, repeat=repeat
        )


# ---- rivals --------------------------------------------------------------------------------------
def turns() -> Callable[[], int]:
    """Numbers from 1 to `PAGES`, again and again."""
    count = 0

    def turn() -> int:
        nonlocal count
        count = count % PAGES + 1
        return count

    return turn


def anonymous(nbytes: int) -> Callable[[int], None]:
    """New anonymous memory; what was made is kept until the next round of pages."""
    kept: list[mmap.mmap] = []
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ones = b"\1" * nbytes

    def grow(turn: int) -> None:
        if turn == 1:
            kept.clear()
        memory = mmap.mmap(-1, PAGE, flags)
        memory[:nbytes] = ones
        kept.append(memory)

    return grow


def tensors(nbytes: int) -> Callable[[int], None]:
    """New torch tensors."""
    kept: list[torch.Tensor] = []

    def grow(turn: int) -> None:
        if turn == 1:
            kept.clear()
        tensor = torch.empty(PAGE, dtype=torch.uint8)
        tensor[:nbytes].fill_(1)
        kept.append(tensor)

    return grow


# ---- gates ---------------------------------------------------------------------------------------
def contents(bench: Bench, kind: str) -> Any:
    """Pages hold what was written to them and no other's bytes; new ones read as zeros; and they
    are of the kind that the name says."""
    with closing(Source(kind)) as source:
        backend, arena = source.pool.backend, source.arena
        warm = source.pool.warm
        assert warm == (0 if kind == "cold" else PAGES), f"{warm} pages are warm"
        before = backend.resident_bytes()
        for _ in range(PAGES):
            to = source.turn()
            arena = source.arena
            arena.grow_to(0, to)
            page = bytes_of(arena, to - 1)
            assert kind != "cold" or not page.any(), "a new page is not zero"
            page[:] = to
        assert source.pool.warm == 0, "warm pages were left over"
        made = backend.resident_bytes() - before
        assert made == (PAGES * PAGE if kind == "cold" else 0), f"{made} bytes were made"
        for i in range(PAGES):
            assert bool((bytes_of(arena, i) == i + 1).all()), f"page {i} was overwritten"
        home = arena.ids(arena.mapped(0)) - arena.home == np.arange(PAGES)
        assert home.all() != (kind == "elsewhere"), "pages at home"
        if kind == "warm" and source.refused:
            bench.note(f"no huge pages here: {source.refused}")
        arena.check()
        source.pool.check()
    return True


def maps() -> bool:
    """The pages of `map_alone` can be written, and are the pool's."""
    with closing(Source("warm")) as source:
        for _ in range(PAGES):
            source.map_alone(1, source.turn())
        assert (source.pool.warm, source.pool.mapped) == (PAGES, 0), "pages were recorded"
        written = [int(bytes_of(source.arena, i)[0]) for i in range(PAGES)]
        assert written == list(range(1, PAGES + 1)), "pages hold other bytes"
    return True


def huge_share(kind: str) -> float:
    """Share of the bytes that the kernel maps by huge pages."""
    with closing(Source(kind)) as source:
        for _ in range(PAGES):
            source.grow(1, source.turn())
        return source.pool.backend.huge_bytes() / (PAGES * PAGE)


def bytes_of(arena: Arena, page: int) -> np.ndarray:
    """A mapped page as bytes."""
    address = arena.address + page * PAGE
    return np.ctypeslib.as_array((ctypes.c_ubyte * PAGE).from_address(address))
