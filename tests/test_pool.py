"""Laws of the pool: pages are conserved, have one owner, and are scrubbed between tenants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror import PAGE
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import ClosedError, DriverError, OutOfPages, OutOfRange, PageStateError
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.allocator.table import CHUNK, FREE, MAPPED, QUARANTINED, WARM
from vattn.allocator.warmqueue import QUEUE_RUNS, WarmQueue


def make(pages: int = 16, **options: int) -> Pool:
    return Pool(CheckedBackend(HostBackend(PAGE)), budget_bytes=pages * PAGE, **options)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def life(pool: Pool) -> tuple[int, ...]:
    return pool.free, pool.mapped, pool.pending, pool.warm, pool.created


def test_the_life_of_a_page() -> None:
    pool = make(4)
    home = pool.extent(8)
    taken = pool.take(ids(home, home + 1))
    assert taken.ids.tolist() == [home, home + 1]
    assert life(pool) == (2, 2, 0, 0, 2)
    pool.share(taken.ids)
    pool.give(taken.ids)
    assert life(pool) == (2, 2, 0, 0, 2)
    pool.give(taken.ids)
    assert life(pool) == (2, 0, 2, 0, 2)
    pool.advance()
    assert life(pool) == (4, 0, 0, 2, 2)
    assert pool.trim() == 2
    assert life(pool) == (4, 0, 0, 0, 0)
    pool.check()


def test_out_of_pages_says_what_is_missing_and_takes_nothing() -> None:
    pool = make(4)
    first = pool.take(np.arange(pool.extent(8))[:0])
    home = pool.extent(8)
    pool.give(pool.take(home + np.arange(3)).ids)
    before = life(pool)
    with pytest.raises(OutOfPages, match=r"needed 3, free 1, pending 3.*advance\(\)") as error:
        pool.take(home + np.arange(3, 6))
    assert (error.value.needed, error.value.free, error.value.pending) == (3, 1, 3)
    assert life(pool) == before
    assert not len(first.ids)
    pool.advance()
    pool.take(home + np.arange(3, 6))
    pool.check()


def test_quarantined_pages_are_nobodys() -> None:
    pool = make()
    page = pool.take(ids(pool.extent(1))).ids
    pool.give(page)
    assert pool.table.state[page] == QUARANTINED
    for act in (pool.share, pool.give):
        with pytest.raises(PageStateError):
            act(page)
    assert pool.take(page).ids[0] != page[0]  # its goal is not free yet
    pool.check()


def test_giving_back_too_often_is_refused_and_undone() -> None:
    pool = make()
    page = pool.take(ids(pool.extent(2))).ids
    with pytest.raises(PageStateError, match="more often"):
        pool.give(np.concatenate([page, page]))
    assert pool.refs(page) == 1
    pool.check()


def test_a_page_is_not_taken_twice_in_one_call() -> None:
    pool = make()
    home = pool.extent(2)
    with pytest.raises(PageStateError, match="twice"):
        pool.take(ids(home, home + 1, home))
    assert life(pool) == (16, 0, 0, 0, 0)


def test_stale_marks_exactly_other_tenants_bytes() -> None:
    pool = make()
    home = pool.extent(4)
    for tenant in (1, 2):
        pool.give(pool.take(ids(home + tenant), tenant=tenant, use_warm=False).ids)
    pool.advance()
    taken = pool.take(home + np.arange(4), tenant=1, use_warm=False)
    assert taken.stale.tolist() == [False, False, True, False]
    pool.mix(taken.ids[:2], tenant=2)
    pool.give(taken.ids)
    pool.advance()
    again = pool.take(home + np.arange(4), tenant=1, use_warm=False)
    assert again.stale.tolist() == [True, True, False, False]  # mixed bytes are nobody's


@pytest.mark.parametrize("warm_first", [False, True])
def test_untake_restores_everything(warm_first: bool) -> None:
    pool = make()
    home = pool.extent(8)
    if warm_first:
        pool.give(pool.take(home + np.arange(2, 5), tenant=7).ids)
        pool.advance()
    before = life(pool), pool.table.state.copy(), pool.table.owner.copy()
    taken = pool.take(home + np.arange(6), tenant=3)
    assert pool.table.state[taken.ids].tolist() == [MAPPED] * 6
    pool.untake(taken)
    assert life(pool) == before[0]
    size = len(before[1])
    assert (pool.table.state[:size] == before[1]).all()
    assert (pool.table.owner[:size] == before[2]).all()
    assert not pool.table.refs.any()
    pool.check()
    pool.take(home + np.arange(6))
    pool.check()


def test_what_cannot_be_destroyed_in_a_rollback_stays_warm_and_is_scrubbed() -> None:
    pool = make()
    backend = pool.backend
    assert isinstance(backend, CheckedBackend)
    taken = pool.take(ids(pool.extent(1)), tenant=3)
    backend.fail_at = backend.count
    pool.untake(taken)
    assert life(pool) == (16, 0, 0, 1, 1)
    backend.fail_at = None
    assert pool.take(taken.ids, tenant=3).stale.all()


def test_lowering_the_budget_takes_warm_pages_at_once_and_used_ones_later() -> None:
    pool = make(8)
    home = pool.extent(8)
    used = pool.take(home + np.arange(8)).ids
    pool.give(used[:3])
    pool.advance()
    assert life(pool) == (3, 5, 0, 3, 8)
    pool.set_budget(4 * PAGE)
    assert life(pool) == (0, 5, 0, 0, 5)
    assert pool.over == 1
    with pytest.raises(OutOfPages):
        pool.take(ids(home))
    pool.give(used[3:])
    pool.advance()
    assert pool.over == 0
    assert pool.created <= 4
    pool.set_budget(100 * PAGE)
    assert pool.free == 100
    pool.check()
    with pytest.raises(OutOfRange, match="-1"):
        pool.set_budget(-1)


def test_the_watermark_bounds_warm_pages() -> None:
    pool = make(16, warm_high_bytes=2 * PAGE)
    pool.give(pool.take(pool.extent(8) + np.arange(8)).ids)
    pool.advance()
    assert life(pool) == (16, 0, 0, 2, 2)
    pool.check()


def test_memory_goes_back_to_the_system_on_request() -> None:
    pool = make(64)
    home = pool.extent(64)
    base = pool.backend.reserve(64, home=home)
    taken = pool.take(home + np.arange(64)).ids
    pool.backend.map(base, home, 64)
    pool.backend.zero(base, 64 * PAGE)
    pool.backend.unmap(base, home, 64)
    pool.give(taken)
    pool.advance()
    assert pool.backend.resident_bytes() == 64 * PAGE
    assert pool.trim(keep_pages=10) == 54
    assert pool.backend.resident_bytes() == 10 * PAGE
    pool.set_budget(0)
    assert pool.backend.resident_bytes() == 0


def test_a_failed_destroy_is_tried_again() -> None:
    for act in ("trim", "set_budget", "advance"):
        pool = make(8)
        backend = pool.backend
        assert isinstance(backend, CheckedBackend)
        used = pool.take(pool.extent(8) + 2 * np.arange(4)).ids
        pool.give(used)
        if act == "advance":
            pool.set_budget(PAGE)
        else:
            pool.advance()
        backend.fail_at = backend.count + 1
        with pytest.raises(DriverError):
            pool.set_budget(PAGE) if act == "set_budget" else getattr(pool, act)()
        pool.check()
        backend.fail_at = None
        pool.drain()
        pool.set_budget(PAGE)
        pool.trim()
        assert pool.created == 0
        pool.check()


def test_lent_pages_are_pending_and_come_back_warm() -> None:
    pool = make(4)
    page = pool.take(ids(pool.extent(1))).ids
    lent = lend(pool, 9)
    assert len(lent) == 3
    assert life(pool) == (0, 1, 3, 0, 4)
    pool.check()
    pool.set_budget(2 * PAGE)
    assert pool.over == 2
    pool.return_warm(lent, 3)
    assert life(pool) == (1, 1, 0, 1, 2)
    pool.give(page)
    pool.check()


@pytest.mark.parametrize("made", range(4))
def test_lent_ids_that_were_not_made_come_back_cold(made: int) -> None:
    pool = make(4)
    lent = pool.lend(3)
    for page in lent[:made].tolist():
        pool.backend.create(page, 1)
    assert life(pool) == (1, 0, 3, 0, 3)
    pool.return_warm(lent, made)
    assert life(pool) == (4, 0, 0, made, made)
    pool.check()
    taken = pool.take(pool.extent(4) + np.arange(4)).ids
    pool.check()
    pool.give(taken)


def lend(pool: Pool, n: int) -> np.ndarray:
    """Lend pages and make them, as the warmer does."""
    lent = pool.lend(n)
    for page in lent.tolist():
        pool.backend.create(page, 1)
    return lent


def test_reclaimers_are_asked_in_order_until_there_is_enough() -> None:
    pool, asked = make(4), []
    held = pool.take(pool.extent(4) + np.arange(4)).ids

    def give_two(n: int) -> None:
        asked.append(n)
        pool.give(held[:2], quiesced=True)
        pool.drain()

    pool.reclaimers += [lambda n: asked.append(n), give_two, lambda n: asked.append(-n)]
    assert pool.reclaim(2)
    assert asked == [2, 2]
    assert not pool.reclaim(2)


def test_a_closed_pool_takes_no_arena() -> None:
    pool = make()
    pool.close()
    pool.close()
    with pytest.raises(ClosedError):
        pool.extent(1)


def test_ids_of_terabytes_cost_nothing() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    pool, before = make(), resident()
    first = pool.extent((1 << 40) // PAGE)
    second = pool.extent((1 << 40) // PAGE)
    assert second > first
    assert resident() - before < 64 << 20  # the table of 2 TiB of pages would take more
    third = pool.extent(CHUNK)
    assert pool.take(ids(third, first, second)).ids.tolist() == [third, first, second]


def test_stale_entries_of_the_warm_queue_are_skipped() -> None:
    pool = make(8)
    queue = WarmQueue(pool.table)
    pool.extent(8)
    pool.table.state[:6] = WARM
    for i in range(6):
        queue.push(ids(i))
    queue.push(ids(0, 5))
    pool.table.state[2] = FREE
    assert queue.pop(5).tolist() == [0]
    assert queue.pop_many(3).tolist() == [1, 3, 4]
    for _ in range(QUEUE_RUNS + 1):
        queue.push(ids(5))
    assert len(queue.runs) < 10
    assert queue.pop_many(9).tolist()[:1] == [5]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["take", "give", "share", "advance", "trim", "budget", "lend", "back"]),
            st.integers(0, 11),
            st.integers(0, 2),
        ),
        max_size=40,
    ),
    st.none() | st.integers(0, 4),
)
def test_pages_are_conserved(script: list[tuple[str, int, int]], high: int | None) -> None:
    pool = make(10) if high is None else make(10, warm_high_bytes=high * PAGE)
    home, held, lent, made = pool.extent(12), [], [], []
    for verb, n, tenant in script:
        if verb == "take":
            goals = home + np.unique([n, (n * 5 + 2) % 12])
            if len(goals) <= pool.free:
                got = pool.take(goals, tenant=tenant).ids.tolist()
                assert not set(got) & set(held), "two owners"
                held += got
        elif held and verb in ("give", "share"):
            page = held[n % len(held)]
            getattr(pool, verb)(ids(page))
            held.remove(page) if verb == "give" else held.append(page)
        elif verb == "advance":
            pool.advance()
        elif verb == "trim":
            pool.trim(n)
        elif verb == "budget":
            pool.set_budget(n * PAGE)
        elif verb == "lend":
            lent.append(lend(pool, n) if tenant else pool.lend(n))
            made.append(len(lent[-1]) if tenant else 0)
        elif verb == "back" and lent:
            pool.return_warm(lent.pop(), made.pop())
        pool.check()
        assert pool.mapped == len(set(held))
        assert all(pool.refs(ids(page))[0] == held.count(page) for page in held)


def test_a_budget_that_could_not_be_raised_leaves_no_page_beyond_the_old_one() -> None:
    """Found by the storm: pages that the larger budget had room for were beyond the smaller."""
    pool = make(warm_high_bytes=0)
    taken = pool.take(np.arange(pool.extent(16), 10)).ids
    pool.set_budget(4 * PAGE)
    backend = pool.backend

    def give(pages: int) -> None:
        pool.reclaimers.clear()
        pool.give(taken[::2], quiesced=True)
        pool.give(taken[1:2], quiesced=True)
        assert isinstance(backend, CheckedBackend)
        destroy, calls = backend.destroy, []

        def third_fails(page: int, count: int) -> None:
            calls.append(page)
            if len(calls) == 3:
                raise DriverError("destroy", 5, 0, 0)
            destroy(page, count)

        backend.destroy = third_fails  # type: ignore[method-assign]
        try:
            pool.drain()
        finally:
            backend.destroy = destroy  # type: ignore[method-assign]

    pool.reclaimers.append(give)
    with pytest.raises(DriverError):
        pool.set_budget(8 * PAGE)
    assert pool.total == 4
    pool.check()
    pool.drain()
    pool.check()
    assert (pool.mapped, pool.warm, pool.pending) == (4, 0, 0)
