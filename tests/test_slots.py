"""Laws of slots: who is adopted, and what goes back when memory is wanted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.caches import fill, layout_of
from vattn.allocator.errors import OutOfPages
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.cache import KVCache


@pytest.fixture
def cache() -> Iterator[KVCache]:
    with KVCache(layout_of("all_layers"), slots=6, budget_bytes=1 << 20) as made:
        yield made
        made.check()


def parked(cache: KVCache, *lengths: int) -> list[int]:
    """Slots of sequences of these lengths that have ended."""
    sequences = [cache.open(slot=i) for i in range(len(lengths))]
    for sequence, length in zip(sequences, lengths, strict=True):
        cache.extend([sequence], length)
    for sequence in sequences:
        sequence.close()
    cache.advance()
    return [sequence.slot for sequence in sequences]


@pytest.mark.parametrize(
    ("tokens", "chosen"),
    [
        (10, 1),  # the smallest that holds it
        (100, 0),
        (250, 2),
        (400, 3),  # none holds it: an empty one, so that every size stays there
        (0, 2),  # no length given: the roomiest
    ],
)
def test_the_slot_that_fits_best_is_adopted(cache: KVCache, tokens: int, chosen: int) -> None:
    parked(cache, 100, 20, 300)
    assert cache.open(tokens=tokens).slot == chosen


def test_without_an_empty_slot_the_roomiest_grows(cache: KVCache) -> None:
    parked(cache, 100, 20, 300, 20, 20, 20)
    assert cache.open(tokens=400).slot == 2


def test_a_lower_budget_takes_back_what_no_row_needs(cache: KVCache) -> None:
    rng = torch.Generator().manual_seed(3)
    live = cache.open(slot=5)
    written = fill(cache, [live], 100, rng)
    parked(cache, 100, 200, 300)
    fresh = cache.open(slot=4)
    cache.extend([fresh], 200)
    fresh.close()  # in this step: its pages wait for the next
    needed = cache.layout.pages(100)
    cache.set_budget(needed * cache.layout.page)
    assert cache.pool.mapped <= needed
    cache.advance()
    assert (cache.pool.over, cache.pool.mapped) == (0, needed)
    assert cache.pool.backend.resident_bytes() <= needed * cache.layout.page
    assert torch.equal(live.k[0], written[0][0][0])
    cache.set_budget(cache.layout.page)
    assert cache.pool.over == needed - 1
    with pytest.raises(OutOfPages, match="free 0"):
        cache.extend([live], 200)
    assert torch.equal(live.k[0], written[0][0][0])


def test_a_lower_budget_takes_no_more_than_it_must() -> None:
    layout = layout_of("all_layers")
    pool = Pool(HostBackend(layout.page), budget_bytes=1 << 20)
    with KVCache(layout, slots=3, pool=pool) as one, KVCache(layout, slots=3, pool=pool) as two:
        parked(one, 100, 100)
        parked(two, 100, 100)
        before = pool.mapped
        pool.set_budget((before - 1) * layout.page)
        assert before - layout.pages(101) <= pool.mapped < before
        assert two.arena.last.any(axis=1).tolist() == [True, True, False]
    pool.close()


def test_a_slot_that_is_looked_at_stays_mapped(cache: KVCache) -> None:
    rng = torch.Generator().manual_seed(4)
    sequence = cache.open(slot=0)
    written = fill(cache, [sequence], 100, rng)
    view = sequence.k[0]
    sequence.close()
    cache.advance()
    cache.set_budget(0)
    assert torch.equal(view, written[0][0][0])
    assert cache.pool.over == cache.layout.pages(100)
    del view
    cache.set_budget(0)
    assert cache.pool.over == 0
