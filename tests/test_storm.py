"""Law: two threads that compete for pages, views that die elsewhere, late kernels, failing calls:
millions of operations later memory holds what was written, and nothing has leaked.

The storm is a product: `vattn.allocator.testing`. `make fuzz` runs it for ten million operations.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter

import pytest

from tests.emulator.control import NOTHING, Emulator
from tests.mirror import PAGE
from tests.storms import BACKENDS, EmulatedDevice, everywhere
from vattn.allocator.arena import Arena
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.errors import OutOfPages
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.allocator.quarantine import Quarantine
from vattn.allocator.testing import StormError, storm
from vattn.allocator.testing_verbs import WEIGHTS

SHORT, OPERATIONS = 6_000, 10_000_000


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_memory_holds_what_was_written_by_two_threads(
    name: str, seed: int, emulator: Emulator
) -> None:
    done = BACKENDS[name](SHORT, seed)
    assert done.operations >= SHORT
    assert done.verbs.keys() >= WEIGHTS.keys() - {"reopen"}
    assert done.failures > 5
    assert done.refusals > 50
    assert done.reclaimed > 50
    assert f"seed {seed}" in str(done)


def test_one_thread_is_repeatable() -> None:
    once, again = (
        storm(lambda: HostBackend(PAGE), operations=2000, seed=7, threads=1) for _ in range(2)
    )
    assert once.verbs == again.verbs
    assert (once.failures, once.refusals) == (again.failures, again.refusals)


@pytest.mark.fuzz
def test_ten_million_operations(capsys: pytest.CaptureFixture[str]) -> None:
    seed, start, total = secrets.randbits(31), time.perf_counter(), Counter[str]()
    with capsys.disabled():
        print(f"\nstorm: seed {seed}")
        for name, done in everywhere(OPERATIONS, seed):
            print(f"  {name}: {done}", flush=True)
            total.update(operations=done.operations, failures=done.failures)
        print(
            f"storm: {total['operations']:,} operations over {len(BACKENDS)} backends, two threads "
            f"each, delayed events, {total['failures']:,} injected failures undone exactly: "
            f"0 faults, 0 leaks, 0 double owners; {time.perf_counter() - start:.0f} s, seed {seed}"
        )
    assert total["operations"] >= OPERATIONS


# ---- what it found -------------------------------------------------------------------------------
def test_reclaimers_are_asked_for_what_is_beyond_the_budget_too() -> None:
    """Else parked slots stay mapped while somebody is refused pages."""
    pool = Pool(HostBackend(PAGE), budget_bytes=10 * PAGE)
    arena = Arena(pool, slots=3, lanes=1, lane_pages=8)
    parked: list[int] = []

    def reclaim(pages: int) -> None:
        while parked and pages > 0:
            pages -= arena.drop(parked.pop(), quiesced=True)
        pool.drain()

    pool.reclaimers.append(reclaim)
    arena.grow_to(0, 5)
    arena.grow_to(1, 5)
    pool.set_budget(5 * PAGE)
    assert pool.over == 5
    parked.extend([0, 1])
    arena.grow_to(2, 2)
    assert not parked
    pool.check()
    arena.close()
    pool.close()


# ---- it can fail ---------------------------------------------------------------------------------
FLAWS = ["kept bytes", "wrong page", "late copy", "lost bytes"]


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flawed_backend_is_seen(flaw: str) -> None:
    class Flawed(HostBackend):
        def destroy(self, page: int, count: int) -> None:
            if flaw != "kept bytes":
                super().destroy(page, count)

        def map(self, address: int, page: int, count: int) -> None:
            if flaw == "wrong page" and page % 5 == 4:
                page -= 1  # the neighbour's bytes
            super().map(address, page, count)
            if flaw == "lost bytes" and page % 7 == 6:
                super().zero(address, 8)

        def duplicate(self, source: int, target: int, nbytes: int) -> None:
            if flaw != "late copy":
                super().duplicate(source, target, nbytes)

    with pytest.raises(StormError, match="seed 5"):
        storm(lambda: Flawed(PAGE), operations=20_000, seed=5)


def test_an_error_names_seed_thread_and_the_last_operations() -> None:
    class Flawed(HostBackend):
        def duplicate(self, source: int, target: int, nbytes: int) -> None:
            pass

    with pytest.raises(StormError) as seen:
        storm(lambda: Flawed(PAGE), operations=20_000, seed=3)
    said = str(seen.value)
    assert "seed 3, thread " in said
    assert ", operation " in said
    assert "'fork'" in said or "'write'" in said or "'permute'" in said
    assert isinstance(seen.value.__cause__, AssertionError)


def test_a_page_that_leaves_quarantine_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = Quarantine.hold
    monkeypatch.setattr(
        Quarantine, "hold", lambda self, ids, **options: hold(self, ids, quiesced=True)
    )
    with pytest.raises(StormError, match="before its time"):
        storm(lambda: HostBackend(PAGE), operations=20_000, seed=1)


def test_a_change_that_ignores_views_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arena, "check_unpinned", lambda self, slot: None)
    with pytest.raises(StormError, match="under a live view"):
        storm(lambda: HostBackend(PAGE), operations=20_000, seed=1)


def test_a_failure_that_is_not_undone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "untake_run", lambda self, *taken: None)
    with pytest.raises(StormError):
        storm(lambda: HostBackend(PAGE), operations=40_000, seed=1)


def test_a_refusal_without_a_reason_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Pool.take

    def strict(self: Pool, goals, **options):  # type: ignore[no-untyped-def]
        if len(goals) > self.free - 3:
            raise OutOfPages(len(goals), self.free, self.pending, self.page_bytes)
        return take(self, goals, **options)

    monkeypatch.setattr(Pool, "take", strict)
    with pytest.raises(StormError, match="refused without a reason"):
        storm(lambda: HostBackend(PAGE), operations=20_000, seed=1)


def test_a_device_that_does_not_wait_is_seen(emulator: Emulator) -> None:
    with pytest.raises(StormError, match=r"work that is not done|not accessible"):
        storm(
            lambda: CudaBackend(PAGE, streams=lambda: ()),  # nobody's work is waited for
            operations=20_000,
            seed=1,
            device=EmulatedDevice(emulator),
        )
    assert emulator.live == NOTHING
    emulator.reset(granularity=PAGE)  # forgets the faults that were asked for
