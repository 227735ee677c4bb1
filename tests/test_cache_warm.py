"""A cache with a warmer: pages are ready before they are wanted, and never stand in the way."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

from tests.caches import fill, layout_of
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.cache import KVCache
from vattn.layout import LayoutError


def warmers() -> int:
    return sum(thread.name == "vattn-warmer" for thread in threading.enumerate())


def test_pages_are_warm_before_they_are_wanted() -> None:
    rng = torch.Generator().manual_seed(5)
    layout = layout_of("all_layers")
    ahead = 32 * layout.page
    with KVCache(layout, slots=2, budget_bytes=64 * layout.page, warm_bytes=ahead) as cache:
        assert cache.warmer is not None
        assert cache.warmer.settle(timeout=30)
        before = cache.stats(huge=True)
        assert (before.warm_bytes, before.mapped_bytes) == (ahead, 0)
        assert before.huge_bytes is not None
        sequence = cache.open()
        written = fill(cache, [sequence], 100, rng)
        assert torch.equal(sequence.k[0], written[0][0][0])
        mapped = cache.stats().mapped_bytes
        assert 0 < mapped <= ahead
        assert cache.stats().resident_bytes == before.resident_bytes, "new bytes were made"
        cache.advance()
        assert cache.warmer.settle(timeout=30)
        assert cache.stats().warm_bytes == ahead
        cache.check()
    assert warmers() == 0


def test_a_dropped_cache_ends_its_warmer() -> None:
    cache = KVCache(layout_of("all_layers"), slots=2, budget_bytes=1 << 20, warm_bytes=1 << 18)
    assert warmers() == 1
    del cache
    gc.collect()
    until = time.monotonic() + 30
    while warmers() and time.monotonic() < until:
        time.sleep(0.01)
    assert warmers() == 0


def test_a_shared_pool_is_warmed_by_its_maker() -> None:
    layout = layout_of("all_layers")
    pool = Pool(HostBackend(layout.page), budget_bytes=1 << 20)
    with pytest.raises(LayoutError, match="warm_bytes need a pool of the cache's own"):
        KVCache(layout, pool=pool, warm_bytes=1 << 16)
    pool.close()
