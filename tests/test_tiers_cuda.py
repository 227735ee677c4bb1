"""Laws of tiers on a CUDA backend over the driver emulator: those of `test_tiers` that are not of
the host alone, and what a device adds: work that runs late, NUMA nodes, calls that fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import test_tiers
from tests.caches import fill
from tests.emulator.control import Emulator
from tests.mirror import PAGE, words_at
from tests.test_cache_cuda import emulated
from vattn import tensor
from vattn.allocator.arena import Arena
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.errors import DriverError, NoDeviceError, OutOfRange
from vattn.allocator.hosttier import LOT
from vattn.allocator.pool import Pool
from vattn.allocator.tier import Tier
from vattn.tiers import SLOW, Tiers

# Of a backend whose copies wait for a gate, of a file, or of a cache that opens its own pool.
NOT_HERE = {
    name
    for name, law in vars(test_tiers).items()
    if name.startswith("test_")
    and ("held" in law.__code__.co_varnames or name.endswith(("keep_nobody_alive", "is_named")))
}
globals().update(
    {
        name: law
        for name, law in vars(test_tiers).items()
        if name.startswith("test_") and name not in NOT_HERE
    }
)
cache, rng = test_tiers.cache, test_tiers.rng
HOST_NUMA_SUPPORTED = 141  # CUdevice_attribute


@pytest.fixture(autouse=True)
def over_the_emulator(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_tiers, "HostBackend", emulated)
    monkeypatch.setitem(tensor.MAKERS, "cpu", tensor.from_capsule)


def arena_of(backend: CudaBackend, pages: int = 40) -> Arena:
    pool = Pool(backend, budget_bytes=200 * PAGE)
    Tier(pool, budget_bytes=100 * PAGE)
    arena = Arena(pool, slots=1, lanes=1, lane_pages=pages)
    arena.grow_to(0, pages)
    for page in range(pages):
        words_at(arena.address + page * PAGE)[:] = page
    return arena


def test_kernels_read_a_page_wherever_it_lies(emulator: Emulator) -> None:
    """Work submitted before, between and after: it never sees an address without a page."""
    backend = CudaBackend(PAGE)
    arena = arena_of(backend)
    emulator.set(delay=1)
    every = np.arange(2 * LOT + 3)
    for down in (True, False, True):
        emulator.kernel(arena.address, 40 * PAGE)
        transfer = arena.begin(every, down=down)
        backend.settle()
        list(arena.carry(transfer, 7))
        emulator.kernel(arena.address, 40 * PAGE)
        assert arena.finish(transfer).tolist() == every.tolist()
        emulator.kernel(arena.address, 40 * PAGE)
    emulator.set(delay=0)
    emulator.run()
    assert emulator.faults == 0, emulator.fault
    assert [int(words_at(arena.address + p * PAGE)[0]) for p in range(40)] == list(range(40))
    arena.check()
    arena.pool.check()
    arena.close()
    arena.pool.close()


def test_the_device_gets_its_memory_back(emulator: Emulator) -> None:
    """Demoted pages count as host memory, and what they leave can be destroyed."""
    emulator.set(memory=40 * PAGE)
    backend = CudaBackend(PAGE)
    arena = arena_of(backend)
    assert backend.available_bytes() == 0
    arena.move(np.arange(30), down=True)
    arena.pool.trim()
    assert backend.available_bytes() == 30 * PAGE
    assert (backend.resident_bytes(), backend.tier_bytes()) == (10 * PAGE, 30 * PAGE)
    arena.close()
    arena.pool.close()


def test_every_driver_call_fails_once(emulator: Emulator) -> None:
    """And a move happened whole or not at all, with every word in its place."""
    backend = CudaBackend(PAGE)
    arena = arena_of(backend, 6)
    failures = 0
    for down in (True, False, True):
        for n in range(1, 100):
            entry = arena.entry.copy()
            emulator.fail(n, 999)
            try:
                arena.move(np.arange(1, 5), down=down)
                break
            except DriverError:
                failures += 1
                assert (arena.entry == entry).all(), n
            finally:
                emulator.fail(0)
                arena.check()
                arena.pool.check()
            assert [int(words_at(arena.address + p * PAGE)[0]) for p in range(6)] == [*range(6)]
    assert failures > 10
    arena.close()
    arena.pool.close()


def test_a_node_or_a_device_without_host_pages_is_named(emulator: Emulator) -> None:
    pool = Pool(CudaBackend(PAGE), budget_bytes=8 * PAGE)
    with pytest.raises(OutOfRange, match="NUMA node"):
        Tier(pool, budget_bytes=PAGE, place="/tmp/file")
    with pytest.raises(NoDeviceError, match="node 3"):
        Tier(pool, budget_bytes=PAGE, place=3)
    emulator.attribute(HOST_NUMA_SUPPORTED, 0)
    with pytest.raises(NoDeviceError, match="HOST_NUMA"):
        Tier(pool, budget_bytes=PAGE)
    assert pool.lower is None
    pool.close()


def test_copies_run_beside_the_verbs(emulator: Emulator, rng: torch.Generator) -> None:
    """A move in the background, next to growing, forking and closing."""
    with test_tiers.plain(slots=4) as cache:
        tiers = Tiers(cache)
        tiers.mover.piece_pages = 3
        first = cache.open()
        written = fill(cache, [first], 390, rng)
        move = tiers.start_demote(first)
        for _ in range(10):
            other = cache.open()
            fill(cache, [other], 100, rng)
            other.fork().close()
            other.close()
            cache.advance()
        assert move.wait(30)
        assert (tiers.resident(first, 1)[:, :6] == SLOW).all()
        test_tiers.same(first, written)
    assert emulator.faults == 0, emulator.fault
