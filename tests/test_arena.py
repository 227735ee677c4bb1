"""Laws of the arena: all or nothing, at every failing call; nothing is unmapped under a view."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.arenas import fill, first_words, grow, ints, make, state_of
from tests.mirror import PAGE, maps_within, open_things, words_at
from vattn.allocator.arena import Arena
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import (
    ClosedError,
    DriverError,
    MapLimitError,
    OutOfPages,
    OutOfRange,
    PageStateError,
)
from vattn.allocator.frontiers import Frontiers
from vattn.allocator.host import HostBackend, process_maps
from vattn.allocator.pool import Pool
from vattn.allocator.table import MAPPED


def test_reserve_failing_leaves_no_arena() -> None:
    backend = CheckedBackend(HostBackend(PAGE), fail_at=0)
    pool = Pool(backend, budget_bytes=PAGE)
    with pytest.raises(DriverError):
        Arena(pool, slots=1, lanes=1, lane_pages=4)
    arena = Arena(pool, slots=1, lanes=1, lane_pages=4)
    assert arena.home == 0  # the ids came back
    arena.close()
    pool.close()
    with pytest.raises(ClosedError):
        Arena(pool, slots=1, lanes=1, lane_pages=4)


# ---- views ---------------------------------------------------------------------------------------
def test_nothing_is_unmapped_under_a_view() -> None:
    arena = make()
    grow(arena, 0, 4)
    grow(arena, 1, 2)
    fill(arena, 0, 7)
    lease = arena.lease(0, 1)
    before = state_of(arena)
    for act in (
        lambda: arena.trim(0, 1, 4),
        lambda: arena.trim(0, 0, 3),
        lambda: arena.drop(0),
        lambda: arena.shift(0, 0, 1, 1),
    ):
        with pytest.raises(PageStateError, match="live view"):
            act()
        assert state_of(arena) == before
    arena.drop(1)
    arena.close()
    assert first_words(arena, 0) == [7, 8, 9, 10]
    del lease
    assert arena._torn_down
    assert arena.pool.mapped == 0


def test_alias_onto_a_viewed_slot_never_unmaps() -> None:
    arena = make()
    grow(arena, 0, 5)
    grow(arena, 1, 8)
    arena.trim(0, 3, 5)
    lease = arena.lease(1, 2)
    before = state_of(arena)
    with pytest.raises(PageStateError):
        arena.alias(0, 1, 4)  # pages 0 .. 3 of slot 1 would have to go
    with pytest.raises(PageStateError):
        arena.permute(ints(0, 1), ints(0, 0), ints(4, 4), ints(0, 0))
    assert state_of(arena) == before
    del lease
    arena.alias(0, 1, 4)
    assert (arena.first[1, 0], arena.last[1, 0]) == (3, 8)
    arena.check()


def test_a_view_may_die_on_any_thread() -> None:
    arena = make()
    grow(arena, 0, 2)
    leases = [arena.lease(0, 4) for _ in range(200)]
    threads = [threading.Thread(target=leases.pop) for _ in range(len(leases))]
    for thread in threads:
        thread.start()
        arena.lease(0, 4)
    for thread in threads:
        thread.join()
    assert not arena.pins.any()
    arena.drop(0)


def test_an_arena_that_nobody_closed_gives_everything_back() -> None:
    pool = Pool(HostBackend(PAGE), budget_bytes=10 * PAGE)
    gc.collect()  # what earlier tests have left
    maps = process_maps()
    arena = Arena(pool, slots=2, lanes=2, lane_pages=4)
    grow(arena, 0, 2)
    arena.cycle = arena  # type: ignore[attr-defined]
    del arena
    gc.collect()
    assert process_maps() == maps
    assert (pool.mapped, pool.pending, pool.free) == (0, 0, 10)
    pool.check()


def test_close_is_idempotent_and_use_after_close_is_typed() -> None:
    arena = make()
    grow(arena, 0, 2)
    plan = arena.plan_grow(ints(0), ints(3))
    arena.close()
    arena.close()
    for act in (
        lambda: arena.grow(plan),
        lambda: arena.grow_to(0, 4),
        lambda: arena.trim(0, 0, 1),
        lambda: arena.drop(0),
        lambda: arena.shift(0, 0, 0, 1),
        lambda: arena.alias(0, 1, 1),
        lambda: arena.permute(ints(0, 1), ints(1, 0), ints(0, 0), ints(0, 0)),
        lambda: arena.unshare(0, 0, 1),
        lambda: arena.retenant(0, 1),
        lambda: arena.refill(0, ints(0)),
        lambda: arena.lease(0, 1),
    ):
        with pytest.raises(ClosedError):
            act()


def test_close_leaves_no_descriptor_map_or_byte() -> None:
    before = open_things()
    for _ in range(3):
        pool = Pool(HostBackend(PAGE), budget_bytes=100 * PAGE)
        arena = Arena(pool, slots=4, lanes=2, lane_pages=4)
        for slot in range(3):
            grow(arena, slot, 4)
            fill(arena, slot, slot)
        arena.alias(0, 3, 2, 8)
        pool.close()  # waits for the arena
        assert pool.backend.resident_bytes() > 0
        arena.close()
        assert pool.backend.resident_bytes() == 0
    del pool, arena
    assert open_things() == before


# ---- limits --------------------------------------------------------------------------------------
def test_the_map_limit_is_refused_and_nothing_changes() -> None:
    pool = Pool(HostBackend(PAGE), budget_bytes=400 * PAGE)
    arena = Arena(pool, slots=60, lanes=1, lane_pages=8)
    backend = pool.backend
    assert isinstance(backend, HostBackend)
    backend.map_limit = process_maps() + 21

    def islands() -> None:  # two more maps each
        for slot in range(0, 60, 2):
            grow(arena, slot, 1)

    with pytest.raises(MapLimitError):
        islands()
    grown = pool.mapped
    assert 9 <= grown <= 11
    assert arena.maps == maps_within(arena.address, arena.pages * PAGE) == 2 * grown
    arena.check()
    for slot in range(0, 2 * grown, 2):
        grow(arena, slot, 3)  # at the limit, growth that merges goes on
        arena.grow_to(slot, 5)
    assert arena.maps == 2 * grown
    with pytest.raises(MapLimitError):
        arena.grow(arena.plan_grow(np.arange(31, 60, 2), np.full(15, 1)))
    with pytest.raises(MapLimitError):
        arena.grow_to(59, 1)
    arena.check()
    pool.check()


def test_growth_beyond_the_reservation_is_refused() -> None:
    arena = make()
    with pytest.raises(OutOfRange, match="9 pages wanted in a lane of 8"):
        arena.plan_grow(ints(0), ints(9))
    with pytest.raises(OutOfRange):
        arena.grow_to(0, 9)
    with pytest.raises(OutOfRange, match="slots, lanes, lane_pages"):
        make(slots=0)
    grow(arena, 0, 2)
    for act in (
        lambda: arena.alias(0, 1, 3),
        lambda: arena.alias(0, 1, 2, 8),
        lambda: arena.alias(0, 0, 1),
        lambda: arena.permute(ints(0, 1), ints(0, 0), ints(3, 0), ints(0, 0)),
        lambda: arena.shift(0, 0, 1, 2),
    ):
        with pytest.raises(OutOfRange):
            act()
    arena.check()


def test_a_slot_is_named_once() -> None:
    arena = make()
    with pytest.raises(PageStateError, match="twice"):
        arena.grow(arena.plan_grow(ints(0, 1, 0), ints(2, 2, 3)))
    with pytest.raises(PageStateError, match="twice"):
        arena.permute(ints(0, 0), ints(1, 0), ints(0, 0), ints(0, 0))
    assert arena.pool.mapped == 0
    arena.permute(ints(), ints(), ints(), ints())


# ---- plans ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_plan_that_went_stale_is_made_anew(lanes: int) -> None:
    arena = make(lanes=lanes)
    plan = arena.plan_grow(ints(0, 1), ints(3, 4))
    grow(arena, 0, 2)
    arena.grow(plan)
    assert (arena.mapped_pages(0), arena.mapped_pages(1)) == (3 * lanes, 4 * lanes)
    arena.grow(plan)  # nothing is left to do
    arena.trim(1, 0, 1)
    arena.grow(plan)
    arena.check()
    arena.pool.check()


def test_pages_reclaimed_from_the_growing_slot_itself_leave_no_hole() -> None:
    arena = make(pages=6)
    grow(arena, 0, 3)
    grow(arena, 1, 3)

    def reclaim(pages: int) -> None:
        arena.trim(0, 0, 1, quiesced=True)
        arena.drop(1, quiesced=True)
        arena.pool.drain()

    plan = arena.plan_grow(ints(0), ints(5))
    arena.pool.reclaimers.append(reclaim)
    arena.grow(plan)
    arena.check()
    assert arena.mapped_pages(0) == 5
    with pytest.raises(OutOfPages):
        grow(arena, 2, 8)
    arena.check()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5),
)
def test_a_plan_names_exactly_the_missing_pages(lanes: int, sizes: list[tuple[int, int]]) -> None:
    frontiers = Frontiers(len(sizes), lanes, 12)
    frontiers.last[:] = np.array([have for have, _ in sizes])[:, None]
    slots, to = np.arange(len(sizes)), np.array([want for _, want in sizes])
    missing = {
        (slot * lanes + lane) * 12 + page
        for slot, (have, want) in enumerate(sizes)
        for lane in range(lanes)
        for page in range(have, want)
    }
    plan = frontiers.plan_grow(slots, to)
    assert (set() if plan is None else set(plan.pages.tolist())) == missing
    assert plan is None or len(plan.pages) == len(missing)
    ahead = frontiers.plan_next(slots, 4)
    last = frontiers.last.min(axis=1)
    if ahead is None:
        assert last.max() == 12
    else:
        again = frontiers.plan_grow(slots, np.minimum(last + last // 4 + 1, 12))
        assert again is not None
        assert ahead.to.tolist() == again.to.tolist()
        assert sorted(ahead.pages.tolist()) == sorted(again.pages.tolist())
        assert ahead.last.tolist() == again.last.tolist()


# ---- tenants -------------------------------------------------------------------------------------
def test_no_byte_goes_from_tenant_to_tenant() -> None:
    arena = make(pages=8)
    for tenant in range(1, 6):
        slot = tenant % 4
        arena.grow_to(slot, 8, tenant=tenant)
        assert first_words(arena, slot) == [0] * 8, "another tenant's bytes"
        fill(arena, slot, 1 << 40)
        arena.drop(slot)
        arena.pool.advance()
    arena.grow_to(0, 8, tenant=5)
    assert 0 not in first_words(arena, 0)  # its own bytes are not scrubbed away


def test_a_failed_copy_leaves_no_bytes_for_others() -> None:
    arena = make()
    backend = arena.backend
    assert isinstance(backend, CheckedBackend)
    arena.grow_to(0, 2, tenant=1)
    fill(arena, 0, 1 << 40)
    resident = backend.resident_bytes()
    backend.fail_at = backend.count + 2  # create, duplicate, then the map
    with pytest.raises(DriverError):
        arena.alias(0, 1, 1, 512, tenant=1)
    assert backend.resident_bytes() == resident
    arena.grow_to(1, 2, tenant=2)
    assert first_words(arena, 1) == [0, 0]


def test_a_failed_copy_into_a_warm_page_leaves_no_bytes_for_its_owner() -> None:
    arena = make()
    backend = arena.backend
    assert isinstance(backend, CheckedBackend)
    arena.grow_to(0, 2, tenant=1)
    fill(arena, 0, 1 << 40)
    arena.grow_to(1, 1, tenant=2)
    arena.drop(1)
    arena.pool.advance()  # one warm page of tenant 2
    backend.fail_at = backend.count + 1  # duplicate, then the map
    with pytest.raises(DriverError):
        arena.alias(0, 1, 1, 512, tenant=1)
    arena.grow_to(1, 1, tenant=2)
    assert not words_at(arena.address + int(arena.mapped(1)[0]) * PAGE).any()


def test_a_page_shared_across_tenants_is_scrubbed_before_anybody_gets_it() -> None:
    arena = make()
    arena.grow_to(0, 2, tenant=1)
    fill(arena, 0, 1 << 40)
    arena.alias(0, 1, 1, 64, tenant=2)
    arena.drop(0)  # tenant 2 is left with pages that tenant 1 made, and writes
    arena.pool.advance()
    fill(arena, 1, 1 << 41)
    arena.drop(1)
    arena.pool.advance()
    for tenant in (1, 2):
        arena.grow_to(2, 8, tenant=tenant)
        words = [
            int(w) for p in arena.mapped(2).tolist() for w in words_at(arena.address + p * PAGE)
        ]
        assert max(words) < 1 << 41 if tenant == 1 else not any(words)
        arena.drop(2)
        arena.pool.advance()
        arena.pool.trim()


def test_retenant_never_zeroes_what_the_old_tenant_still_reads() -> None:
    arena = make()
    arena.grow_to(0, 4, tenant=1)
    fill(arena, 0, 50)
    arena.alias(0, 1, 2, tenant=1)
    arena.retenant(0, 2)
    assert first_words(arena, 1) == [50, 51]
    assert first_words(arena, 0) == [0, 0, 0, 0]
    fill(arena, 0, 9)
    arena.retenant(0, 2)  # its own: nothing to do
    assert first_words(arena, 0) == [9, 10, 11, 12]
    arena.check()


def test_zero_backed_rows_read_as_zeros_mapped_or_not() -> None:
    arena = make(zero_backed=True)
    whole = words_at(arena.address, arena.pages * 512)
    assert not whole.any()
    arena.grow_to(1, 6)
    fill(arena, 1, 1)
    arena.drop(1)
    assert not whole.any()
    arena.pool.advance()
    arena.grow_to(2, 6)
    assert arena.pool.table.state[arena.ids(arena.mapped(2))].tolist() == [MAPPED] * 6
    assert not whole.any()


def test_aliases_cost_no_page_and_the_tail_is_private() -> None:
    arena = make(lane_pages=8)
    arena.grow_to(0, 5)
    fill(arena, 0, 10)
    arena.alias(0, 1, 4, 64)
    assert arena.pool.mapped == 6
    assert arena.shared_to[:2].tolist() == [4, 4]
    tail = words_at(arena.address + int(arena.mapped(1)[4]) * PAGE)
    assert (tail[:8] == 14).all()
    tail[:] = 0
    words_at(arena.address)[0] = 99
    assert first_words(arena, 1) == [99, 11, 12, 13, 0]
    assert first_words(arena, 0) == [99, 11, 12, 13, 14]
    calls = sum(arena.backend.calls.values())
    arena.alias(0, 2, 4)  # one run: one call
    assert sum(arena.backend.calls.values()) == calls + 1


def test_slots_are_dropped_together_or_not_at_all() -> None:
    for fail_at in range(100):
        arena = make(lanes=2)
        backend = arena.backend
        assert isinstance(backend, CheckedBackend)
        for slot, pages in enumerate((3, 5, 0, 8)):
            grow(arena, slot, pages)
        before = state_of(arena)
        backend.fail_at = backend.count + fail_at
        try:
            gone = arena.drop_all(ints(0, 2, 3), quiesced=True)
        except DriverError:
            backend.fail_at = None
            assert state_of(arena) == before
            continue
        backend.fail_at = None
        assert (gone, arena.last.max(axis=1).tolist()) == (22, [0, 5, 0, 0])
        arena.check()
        arena.pool.drain()
        assert arena.pool.pending == 0
        lease = arena.lease(1, 2)
        with pytest.raises(PageStateError, match="live views"):
            arena.drop_all(ints(0, 1))
        assert arena.last[1, 0] == 5
        del lease
        break
    else:
        pytest.fail("it never succeeded")
    assert fail_at > 0
