"""Laws of warmth: pages are made ahead and counted, huge where the kernel will, correct anyway."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.mirror import PAGE, words_at
from vattn.allocator.arena import Arena
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import ClosedError, DriverError
from vattn.allocator.host import HostBackend
from vattn.allocator.huge import HUGE_BYTES
from vattn.allocator.pool import Pool
from vattn.allocator.stats import gather
from vattn.allocator.warm import REST_STEPS, Warmer


def can_collapse() -> bool:
    backend = HostBackend(HUGE_BYTES)
    backend.create(0, 1)
    try:
        backend.warm(0, 1)
    except DriverError:
        return False
    return True


huge_pages = pytest.mark.skipif(not can_collapse(), reason="the kernel collapses no memfd pages")


def test_pages_are_made_ahead_up_to_the_watermark() -> None:
    pool = Pool(CheckedBackend(HostBackend(PAGE)), budget_bytes=20 * PAGE)
    with Warmer(pool, low_bytes=12 * PAGE) as warmer:
        assert warmer.settle(timeout=30)
        assert (pool.warm, pool.pending, pool.free) == (12, 0, 20)
        assert pool.backend.resident_bytes() == 12 * PAGE
        pool.check()
        home = pool.extent(20)
        with pool.turn:
            taken = pool.take(home + np.arange(16))
        pool.advance()  # wakes it
        assert warmer.settle(timeout=30)
        assert pool.warm == 4  # as far as the budget goes
        with pool.turn:
            pool.give(taken.ids)
        pool.advance()
        assert warmer.settle(timeout=30)
        pool.check()
    assert pool.boundary is None
    assert not any(t.name == "vattn-warmer" for t in threading.enumerate())
    pool.close()


def test_the_main_thread_goes_on_meanwhile() -> None:
    pool = Pool(CheckedBackend(HostBackend(PAGE)), budget_bytes=64 * PAGE)
    arena = Arena(pool, slots=4, lanes=1, lane_pages=16)
    rng = np.random.default_rng(0)
    with Warmer(pool, low_bytes=30 * PAGE):
        for step in range(150):
            slot = int(rng.integers(4))
            if rng.random() < 0.3:
                arena.drop(slot)
            elif int(arena.last[slot, 0]) < 8 and pool.free:
                last = int(arena.last[slot, 0])
                arena.grow_to(slot, last + 1)
                words_at(arena.address + (slot * 16 + last) * PAGE)[:] = slot + 1
            pool.advance()
            if step % 10 == 0:
                pool.trim(int(rng.integers(20)))
                pool.set_budget(int(rng.integers(40, 64)) * PAGE)
            for other in range(4):
                for page in arena.mapped(other).tolist():
                    assert (words_at(arena.address + page * PAGE) == other + 1).all()
    pool.check()
    arena.check()


def test_a_refusal_is_told_and_harmless() -> None:
    class Refusing(HostBackend):
        def warm(self, page: int, count: int) -> None:
            super().warm(page, count)
            raise DriverError("madvise(25)", 22, 0, 0)

    pool = Pool(Refusing(PAGE), budget_bytes=8 * PAGE)
    with Warmer(pool, low_bytes=4 * PAGE) as warmer:
        assert warmer.settle(timeout=30)
        assert "madvise(25) failed" in str(warmer.refused)
        assert pool.warm == 4
    pool.check()
    with pytest.raises(ClosedError):
        warmer.collapse(np.arange(2))


def test_it_ends_with_the_pool() -> None:
    pool = Pool(HostBackend(PAGE), budget_bytes=8 * PAGE)
    with Warmer(pool, low_bytes=4 * PAGE) as warmer:
        assert warmer.settle(timeout=30)
        pool.close()
        warmer.low = 8
        warmer.wake()
        warmer._thread.join(timeout=30)
        assert not warmer._thread.is_alive()


@huge_pages
def test_warm_pages_are_huge_and_stay_so_when_mapped() -> None:
    pool = Pool(HostBackend(HUGE_BYTES), budget_bytes=4 * HUGE_BYTES)
    arena = Arena(pool, slots=2, lanes=1, lane_pages=2)
    with Warmer(pool, low_bytes=2 * HUGE_BYTES) as warmer:
        assert warmer.settle(timeout=60)
        assert (warmer.made, warmer.refused) == (2, None)
    arena.grow_to(0, 2)
    assert pool.backend.huge_bytes() == 0
    words = words_at(arena.address, 2 * HUGE_BYTES // 8)
    assert not words[:: PAGE // 8].any()
    assert pool.backend.huge_bytes() == 2 * HUGE_BYTES
    stats = gather(pool, [arena], used_bytes=HUGE_BYTES, huge=True)
    assert stats.huge_bytes == 2 * HUGE_BYTES


@huge_pages
def test_hot_extents_of_small_pages_are_collapsed_on_request() -> None:
    pool = Pool(HostBackend(64 << 10), budget_bytes=8 << 20)
    arena = Arena(pool, slots=1, lanes=1, lane_pages=128)
    arena.grow_to(0, 80)
    words = words_at(arena.address, 80 * 8192)
    words[:] = np.arange(80 * 8192, dtype=np.uint64)
    with Warmer(pool, low_bytes=0) as warmer:
        warmer.collapse(arena.ids(arena.mapped(0)))
        assert warmer.settle(timeout=60)
        assert warmer.collapsed == 2  # 80 pages of 64 KiB hold two whole extents
    assert (words == np.arange(80 * 8192, dtype=np.uint64)).all()
    assert pool.backend.huge_bytes() == 2 * HUGE_BYTES
    assert pool.backend.resident_bytes() == pool.mapped * (64 << 10)


def test_stats_add_up() -> None:
    pool = Pool(HostBackend(PAGE), budget_bytes=32 * PAGE)
    arena = Arena(pool, slots=2, lanes=2, lane_pages=4)
    arena.grow(arena.plan_grow(np.array([0]), np.array([3])))
    words_at(arena.address)[:] = 1
    arena.trim(0, 0, 2)
    stats = gather(pool, [arena], used_bytes=3 * PAGE)
    values: dict[str, Any] = stats.to_dict()
    assert values["reserved_bytes"] == 16 * PAGE
    assert values["mapped_bytes"] == 4 * PAGE == values["used_bytes"] + values["wasted_bytes"]
    assert values["pending_bytes"] == 2 * PAGE
    assert values["budget_bytes"] == 32 * PAGE
    assert values["resident_bytes"] == PAGE
    assert values["maps"] == arena.maps < values["map_limit"]
    assert values["calls"]["map"] == 2
    arena.close()
    assert gather(pool, [arena]).reserved_bytes == 0


@pytest.mark.parametrize("verb", ["create", "warm"])
def test_who_needs_the_budget_gets_lent_pages_back(verb: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(HostBackend):
        def create(self, page: int, count: int) -> None:
            self.wait("create")
            super().create(page, count)

        def warm(self, page: int, count: int) -> None:
            self.wait("warm")
            super().warm(page, count)

        def wait(self, where: str) -> None:
            if where == verb and threading.current_thread() is not threading.main_thread():
                begun.set()
                assert go_on.wait(timeout=30)

    pool = Pool(CheckedBackend(Slow(PAGE)), budget_bytes=8 * PAGE)
    arena = Arena(pool, slots=1, lanes=1, lane_pages=8)
    with Warmer(pool, low_bytes=8 * PAGE) as warmer:
        assert begun.wait(timeout=30)
        assert (pool.lent, pool.free) == (8, 0)
        threading.Timer(0.05, go_on.set).start()
        arena.grow_to(0, 8)  # waits for the page in hand, not for all eight
        assert (pool.lent, pool.mapped, warmer.made) == (0, 8, 1)
        arena.check()
        pool.check()
    arena.close()
    pool.close()


def test_pages_are_made_outside_of_any_turn() -> None:
    """Somebody else may change the pool while a handle is made."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(HostBackend):
        def create(self, page: int, count: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                begun.set()
                assert go_on.wait(timeout=30)
            super().create(page, count)

    pool = Pool(CheckedBackend(Slow(PAGE)), budget_bytes=20 * PAGE)
    arena = Arena(pool, slots=1, lanes=1, lane_pages=8)
    with Warmer(pool, low_bytes=8 * PAGE) as warmer:
        assert begun.wait(timeout=30)
        arena.grow_to(0, 8)  # while the thread stands in the middle of its first page
        assert (pool.lent, pool.mapped) == (8, 8)
        pool.check()
        go_on.set()
        assert warmer.settle(timeout=30)
        assert pool.warm == 8
    arena.close()
    pool.close()


def test_a_system_without_memory_is_not_asked_at_every_step() -> None:
    class Full(HostBackend):
        asked = 0

        def create(self, page: int, count: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                Full.asked += 1
                raise DriverError("cuMemCreate", 2, 0, count)
            super().create(page, count)

    pool = Pool(CheckedBackend(Full(PAGE)), budget_bytes=20 * PAGE)
    with Warmer(pool, low_bytes=8 * PAGE) as warmer:
        for _ in range(2 * REST_STEPS):
            assert warmer.settle(timeout=30)
            pool.advance()
        assert warmer.settle(timeout=30)
        assert (Full.asked, pool.lent, pool.warm) == (3, 0, 0)
        assert "cuMemCreate failed" in str(warmer.refused)
        pool.check()
    pool.close()
