"""Laws of pages that change tiers under an arena: bytes stay, addresses stay, all or nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.arenas import fill, first_words, grow, ints, make, state_of
from tests.contract import emulated
from tests.mirror import PAGE, words_at
from vattn.allocator.arena import Arena
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import (
    ClosedError,
    DriverError,
    OutOfPages,
    OutOfRange,
    PageStateError,
    ShareError,
)
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.allocator.share import export_pages
from vattn.allocator.tier import Tier
from vattn.allocator.windows import WINDOW_BYTES, Windows, copy

BACKENDS = {"host": lambda: HostBackend(PAGE), "cuda": emulated}


def arena_of(
    kind: str = "host",
    *,
    slots: int = 4,
    lanes: int = 1,
    lane_pages: int = 8,
    pages: int = 200,
    low_pages: int = 100,
    zero_backed: bool = False,
) -> Arena:
    pool = Pool(CheckedBackend(BACKENDS[kind]()), budget_bytes=pages * PAGE)
    Tier(pool, budget_bytes=low_pages * PAGE)
    return Arena(pool, slots=slots, lanes=lanes, lane_pages=lane_pages, zero_backed=zero_backed)


def low(arena: Arena, slot: int = 0) -> list[bool]:
    """Which of a slot's mapped pages lie in the lower tier."""
    return arena.tier.holds(arena.ids(arena.mapped(slot))).tolist()


def check(arena: Arena) -> None:
    arena.check()
    arena.pool.check()


def everything(arena: Arena) -> list[Any]:
    tier, table = arena.tier, arena.pool.table
    return [
        state_of(arena),
        (tier.free, tier.mapped, tier.pending, tier.total, tier.copies),
        [(i, table.twin[i]) for i in np.flatnonzero(table.twin).tolist()],
    ]


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_page_moves_and_nothing_else_changes(kind: str) -> None:
    arena = arena_of(kind, lanes=2)
    grow(arena, 0, 5)
    fill(arena, 0, 70)
    words, pool, tier = first_words(arena, 0), arena.pool, arena.tier
    assert arena.move(ints(1, 2, 9), down=True) == 3 * PAGE
    assert low(arena) == [False, True, True, False, False, False, True, False, False, False]
    assert (pool.mapped, pool.pending, tier.mapped) == (7, 0, 3)
    assert first_words(arena, 0) == words
    check(arena)
    assert arena.move(ints(1, 2, 9), down=True) == 0  # they are there
    assert arena.move(ints(2), down=False) == PAGE
    assert low(arena)[:4] == [False, True, False, False]
    assert first_words(arena, 0) == words
    assert (pool.mapped, tier.mapped, tier.copies) == (8, 3, 1)
    check(arena)
    arena.close()
    assert (pool.mapped, tier.mapped) == (0, 0)
    pool.check()
    pool.close()


@pytest.mark.parametrize("kind", BACKENDS)
def test_an_unchanged_page_leaves_for_nothing_and_a_written_one_is_copied(kind: str) -> None:
    arena = arena_of(kind)
    grow(arena, 0, 4)
    fill(arena, 0, 5)
    every, words = np.arange(4), first_words(arena, 0)
    assert arena.move(every, down=True) == 4 * PAGE
    assert arena.move(every, down=False) == 4 * PAGE
    calls = arena.backend.calls["copy"]
    assert arena.move(every, down=True) == 0
    assert arena.backend.calls["copy"] == calls
    assert first_words(arena, 0) == words
    arena.move(every, down=False)
    arena.unshare(0, 2, 3)
    words_at(arena.address + 2 * PAGE)[0] = 999
    check(arena)
    assert arena.tier.copies == 3
    assert arena.move(every, down=True) == PAGE
    assert first_words(arena, 0) == [*words[:2], 999, words[3]]
    check(arena)
    arena.close()
    arena.pool.close()


@pytest.mark.parametrize("kind", BACKENDS)
def test_aliases_move_together_and_writing_parts_them(kind: str) -> None:
    arena = arena_of(kind)
    grow(arena, 0, 4)
    fill(arena, 0, 30)
    arena.alias(0, 1, 3)
    words = first_words(arena, 0)
    assert arena.move(ints(0, 1), down=True) == 2 * PAGE
    assert low(arena, 1) == [True, True, False]
    assert (first_words(arena, 0), first_words(arena, 1)) == (words, words[:3])
    check(arena)
    arena.unshare(1, 0, 1)
    words_at(arena.address + 8 * PAGE)[0] = 777
    assert first_words(arena, 0) == words
    assert (low(arena, 0)[0], low(arena, 1)[0]) == (True, False)
    check(arena)
    arena.move(np.arange(4), down=False)
    assert low(arena, 1) == [False, False, False]
    assert first_words(arena, 1) == [777, *words[1:3]]
    arena.drop(0)
    arena.alias(1, 2, 2)
    assert first_words(arena, 2) == [777, words[1]]
    check(arena)
    arena.close()
    arena.pool.close()


def test_a_write_to_a_demoted_page_brings_it_back_first() -> None:
    arena = arena_of()
    grow(arena, 0, 3)
    fill(arena, 0, 1)
    words = first_words(arena, 0)
    arena.move(np.arange(3), down=True)
    arena.unshare(0, 1, 2)
    assert low(arena) == [True, False, True]
    assert first_words(arena, 0) == words
    check(arena)


def test_pages_held_elsewhere_are_refused_and_nothing_moves() -> None:
    arena = arena_of()
    grow(arena, 0, 4)
    fill(arena, 0, 1)
    export = export_pages(arena, ints(2))
    before = everything(arena)
    with pytest.raises(PageStateError, match=r"1 of 4 pages.*page 2"):
        arena.move(np.arange(4), down=True)
    assert everything(arena) == before
    export.close()
    arena.move(np.arange(4), down=True)
    with pytest.raises(ShareError, match="promote"):
        export_pages(arena, ints(2))
    check(arena)


def test_each_tier_has_a_budget_and_twins_give_way() -> None:
    arena = arena_of(pages=6, low_pages=4)
    grow(arena, 0, 6)
    fill(arena, 0, 1)
    words = first_words(arena, 0)
    before = everything(arena)
    with pytest.raises(OutOfPages, match="needed 5, free 4"):
        arena.move(np.arange(5), down=True)
    assert everything(arena) == before
    arena.move(np.arange(4), down=True)
    arena.move(np.arange(4), down=False)
    assert (arena.tier.mapped, arena.tier.copies) == (4, 4)
    assert arena.move(ints(4, 5), down=True) == 2 * PAGE  # two twins went
    assert (arena.tier.mapped, arena.tier.copies) == (4, 2)
    check(arena)
    grow(arena, 1, 2)
    with pytest.raises(OutOfPages):
        arena.move(ints(4), down=False)
    assert first_words(arena, 0) == words
    arena.tier.set_budget(3 * PAGE)
    assert (arena.tier.copies, arena.tier.over) == (1, 0)
    arena.tier.set_budget(1 * PAGE)
    assert (arena.tier.copies, arena.tier.over) == (0, 1)
    with pytest.raises(OutOfRange, match="made for"):
        arena.tier.set_budget(5 * PAGE)
    check(arena)


@pytest.mark.parametrize("kind", BACKENDS)
def test_what_happens_to_a_page_on_its_way(kind: str) -> None:
    """Each on its own: written, dropped, aliased, moved up in its lane, left alone."""
    arena = arena_of(kind, lane_pages=12)
    grow(arena, 0, 6)
    grow(arena, 1, 2)
    fill(arena, 0, 40)
    fill(arena, 1, 90)
    words = first_words(arena, 0)
    transfer = arena.begin(ints(0, 1, 4, 12, 13), down=True)
    assert not len(arena.begin(ints(0), down=True).source)  # it is on its way
    list(arena.carry(transfer, 2))
    arena.unshare(0, 1, 2)
    words_at(arena.address + PAGE)[0] = 555
    arena.alias(0, 2, 1)
    arena.drop(1)
    grow(arena, 1, 2)  # the same addresses, other pages
    fill(arena, 1, 10)
    arena.shift(0, 0, 2, 1)
    moved = arena.finish(transfer)
    assert moved.tolist() == [0, 3, 24]
    assert low(arena) == [True, False, False, True, False]
    assert first_words(arena, 0) == [words[0], 555, *words[3:]]
    assert first_words(arena, 1) == [10 + 12, 10 + 13]
    assert first_words(arena, 2) == words[:1]
    check(arena)
    assert arena.tier.mapped == 2
    arena.close()
    arena.pool.advance()
    assert (arena.pool.mapped, arena.tier.mapped) == (0, 0)
    arena.pool.close()


def test_an_abandoned_move_leaves_nothing() -> None:
    arena = arena_of()
    grow(arena, 0, 3)
    fill(arena, 0, 1)
    for down in (True, False):
        before = (arena.entry.tolist(), arena.pool.mapped, arena.tier.mapped, first_words(arena, 0))
        transfer = arena.begin(np.arange(3), down=down)
        next(arena.carry(transfer, 1))
        arena.abandon(transfer)
        now = (arena.entry.tolist(), arena.pool.mapped, arena.tier.mapped, first_words(arena, 0))
        assert now == before
        check(arena)
        arena.move(np.arange(3), down=True)


def test_a_closed_arena_installs_nothing() -> None:
    arena = arena_of()
    grow(arena, 0, 3)
    transfer = arena.begin(np.arange(3), down=True)
    list(arena.carry(transfer, 3))
    arena.close()
    assert not len(arena.finish(transfer))
    assert (arena.pool.mapped, arena.tier.mapped) == (0, 0)
    arena.pool.check()
    with pytest.raises(ClosedError):
        arena.move(np.arange(3), down=True)


SCRIPT: list[tuple[str, Callable[[Arena], Any]]] = [
    ("demote some", lambda a: a.move(ints(0, 1, 3, 8), down=True)),
    ("alias over tiers", lambda a: a.alias(0, 2, 3, 64)),
    ("promote some", lambda a: a.move(ints(1, 3), down=False)),
    ("demote twins and others", lambda a: a.move(np.arange(6), down=True)),
    ("write", lambda a: a.unshare(0, 0, 6, tenant=1)),
    ("demote again", lambda a: a.move(np.arange(6), down=True)),
    ("permute", lambda a: a.permute(ints(0, 1, 2), ints(2, 0, 1), ints(3, 3, 3), ints(8, 8, 8))),
    ("another tenant", lambda a: a.retenant(1, 2)),
    ("promote all", lambda a: a.move(np.flatnonzero(a.entry), down=False)),
    ("trim", lambda a: a.trim(0, 1, 3)),
]


@pytest.mark.parametrize("zero_backed", [False, True], ids=["closed", "zero-backed"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_every_call_fails_once_and_is_undone_exactly(kind: str, zero_backed: bool) -> None:
    arena = arena_of(kind, zero_backed=zero_backed)
    for slot, pages in ((0, 6), (1, 4)):
        grow(arena, slot, pages, tenant=1)
        fill(arena, slot, 100 * slot)
    backend, failures = arena.backend, 0
    assert isinstance(backend, CheckedBackend)
    for name, act in SCRIPT:
        for index in range(1000):
            before = everything(arena)
            backend.fail_at = backend.count + index
            try:
                act(arena)
                break
            except DriverError:
                failures += 1
                backend.fail_at = None
                check(arena)
                assert everything(arena) == before, f"{name}: call {index} was not undone"
        backend.fail_at = None
        check(arena)
    assert failures > 20
    arena.close()
    arena.pool.close()


def test_a_tier_is_one_and_needs_a_place(tmp_path: Path) -> None:
    arena = arena_of()
    with pytest.raises(PageStateError, match="one a pool"):
        Tier(arena.pool, budget_bytes=PAGE)
    plain = make()
    with pytest.raises(PageStateError, match="one tier"):
        plain.move(ints(0), down=True)
    for path in (tmp_path, tmp_path / "none" / "file"):
        pool = Pool(HostBackend(PAGE), budget_bytes=8 * PAGE)
        with pytest.raises(DriverError, match="name another path"):
            Tier(pool, budget_bytes=PAGE, place=str(path))
        assert pool.lower is None
        pool.check()
    with pytest.raises(OutOfRange, match="path"):
        Tier(pool, budget_bytes=PAGE, place=1)
    pool.close()
    with pytest.raises(ClosedError):
        Tier(pool, budget_bytes=PAGE)


def test_a_named_file_holds_the_bytes_and_goes_with_the_tier(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    pool = Pool(HostBackend(PAGE), budget_bytes=8 * PAGE)
    tier = Tier(pool, budget_bytes=4 * PAGE, place=str(path))
    arena = Arena(pool, slots=1, lanes=1, lane_pages=8)
    grow(arena, 0, 2)
    fill(arena, 0, 41)
    assert path.stat().st_size == 0
    arena.move(ints(1), down=True)
    assert path.stat().st_size == PAGE
    assert np.fromfile(path, np.int64)[0] == 42
    tier.make_ready(3 * PAGE)
    assert (tier.warm, tier.mapped, path.stat().st_size) == (3, 1, 4 * PAGE)
    pool.check()
    arena.close()
    pool.close()
    assert not path.exists()


def test_a_file_without_room_is_an_error_and_nothing_moves() -> None:
    pool = Pool(HostBackend(PAGE), budget_bytes=200 * PAGE)
    Tier(pool, budget_bytes=100 * PAGE)
    arena = Arena(pool, slots=1, lanes=1, lane_pages=8)
    grow(arena, 0, 8)
    fill(arena, 0, 3)
    arena.move(ints(0, 1), down=True)
    words, entry = first_words(arena, 0), arena.entry.tolist()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * PAGE, hard))
    try:
        with pytest.raises(DriverError, match="a disk with more room"):
            arena.move(np.arange(8), down=True)
        assert (arena.entry.tolist(), first_words(arena, 0)) == (entry, words)
        check(arena)
        arena.move(np.arange(5), down=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    arena.move(np.arange(8), down=True)
    assert first_words(arena, 0) == words
    arena.close()
    pool.close()


def test_a_copy_over_the_edges_of_windows() -> None:
    fds = [os.memfd_create("test") for _ in range(2)]
    for fd in fds:
        os.ftruncate(fd, WINDOW_BYTES + (1 << 20))
    at = WINDOW_BYTES - 3000
    os.pwrite(fds[0], bytes(range(250)) * 30, at)
    first, second = map(Windows, fds)
    copy(first.pieces(at, 7500), second.pieces(at + 2000, 7500))
    assert os.pread(fds[1], 7500, at + 2000) == bytes(range(250)) * 30
    for windows in (first, second):
        windows.close()
        os.close(windows.fd)
