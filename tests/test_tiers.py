"""Laws of tiers over a cache: whatever lies where, every row reads as it was written."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import vattn
from tests.caches import DIM, HEADS, LAYERS, LAYOUTS, assert_same, fill, layout_of, rows, state
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import (
    ClosedError,
    DriverError,
    OutOfPages,
    OutOfRange,
    PageStateError,
)
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.cache import KVCache
from vattn.layout import LayoutError
from vattn.sequence import Sequence
from vattn.tiers import FAST, SLOW, TierError, Tiers

PAGE = 4096


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(params=sorted(LAYOUTS))
def cache(request: pytest.FixtureRequest) -> Iterator[KVCache]:
    pool = Pool(CheckedBackend(HostBackend(PAGE)), budget_bytes=400 * PAGE)
    with KVCache(layout_of(request.param), slots=5, pool=pool) as cache:
        yield cache
    pool.close()


def plain(name: str = "per_layer", pages: int = 400, slots: int = 5, **options) -> KVCache:
    pool = Pool(CheckedBackend(HostBackend(PAGE)), budget_bytes=pages * PAGE)
    return KVCache(layout_of(name, **options), slots=slots, pool=pool)


def same(
    sequence: Sequence, written: list[tuple[torch.Tensor, torch.Tensor]], row: int = 0
) -> None:
    """Every row of every layer is what was written."""
    layout = sequence.cache.layout
    for layer in range(LAYERS):
        k, v = written[layout.physical(layer)]
        assert torch.equal(sequence.k[layer], k[row])
        assert torch.equal(sequence.v[layer], v[row])
    sequence.cache.check()


def where(tiers: Tiers, sequence: Sequence, layer: int, pages: int) -> np.ndarray:
    """Of the first pages of a layer's lanes."""
    return tiers.resident(sequence, layer)[:, :pages]


def slow_pages(tiers: Tiers, sequence: Sequence) -> int:
    pages = tiers.arena.mapped(sequence.slot)
    return int(tiers.slow.holds(tiers.arena.ids(pages)).sum())


# ---- moving --------------------------------------------------------------------------------------
def test_a_sequence_leaves_and_comes_back(cache: KVCache, rng: torch.Generator) -> None:
    tiers = Tiers(cache)
    sequence = cache.open()
    written = fill(cache, [sequence], 150, rng)
    mapped = cache.pool.mapped
    views = [(sequence.k[1], sequence.k[1].clone())]
    copied = tiers.demote(sequence)
    assert copied == slow_pages(tiers, sequence) * PAGE > 0
    assert cache.pool.mapped + tiers.slow.mapped == mapped
    same(sequence, written)
    assert tiers.promote(sequence) == copied
    assert slow_pages(tiers, sequence) == 0
    same(sequence, written)
    assert tiers.demote(sequence) == 0  # nothing has changed
    same(sequence, written)
    more = fill(cache, [sequence], 40, rng)
    written = [
        (torch.cat([k, a], 2), torch.cat([v, b], 2))
        for (k, v), (a, b) in zip(written, more, strict=True)
    ]
    same(sequence, written)
    assert all(torch.equal(view, copy) for view, copy in views)
    stats = tiers.stats()
    assert stats.demoted_bytes == 2 * copied == 2 * stats.promoted_bytes == stats.copied_bytes


def test_layers_and_ranges(rng: torch.Generator) -> None:
    with plain() as cache:
        tiers = Tiers(cache)
        sequence = cache.open()
        written = fill(cache, [sequence], 256, rng)  # 64 tokens a page
        tiers.demote(sequence, layer=1)
        seen = [where(tiers, sequence, layer, 4) for layer in range(LAYERS)]
        assert [(w == SLOW).all() for w in seen] == [False, True, False]
        assert seen[0].shape == (2 * HEADS, 4)
        tiers.demote(sequence, 0, (10, 200))  # tokens 64..192 fill pages
        assert (where(tiers, sequence, 0, 4) == [FAST, SLOW, SLOW, FAST]).all()
        tiers.promote(sequence, 0, (127, 129))
        assert (where(tiers, sequence, 0, 4) == FAST).all()
        tiers.promote(sequence, 1, np.array([3, 250]))
        assert (where(tiers, sequence, 1, 4) == [FAST, SLOW, SLOW, FAST]).all()
        tiers.promote(sequence, 1, [np.array([100]), np.array([150])])
        assert where(tiers, sequence, 1, 4).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]] * 2
        same(sequence, written)
        for wrong in ((-1, 3), (5, 401)):
            with pytest.raises(OutOfRange, match=r"outside of 0\.\.400"):
                tiers.demote(sequence, 0, wrong)
        with pytest.raises(OutOfRange, match=r"0\.\.399"):
            tiers.touch(sequence, 0, np.array([400]))
        with pytest.raises(LayoutError, match="of 3 heads"):
            tiers.touch(sequence, 0, [np.array([4])] * 3)
        with pytest.raises(LayoutError, match="layer 3"):
            tiers.demote(sequence, 3)


def test_the_page_that_grows_stays_unless_asked_for(rng: torch.Generator) -> None:
    with plain() as cache:
        tiers = Tiers(cache)
        sequence = cache.open()
        written = fill(cache, [sequence], 100, rng)
        tiers.demote(sequence)
        assert (tiers.resident(sequence, 0)[:, :2] == [SLOW, FAST]).all()
        tiers.demote(sequence, tail=True)
        assert (where(tiers, sequence, 0, 2) == SLOW).all()
        more = fill(cache, [sequence], 1, rng)
        assert (tiers.resident(sequence, 0)[:, :2] == [SLOW, FAST]).all()
        same(
            sequence,
            [
                (torch.cat([k, a], 2), torch.cat([v, b], 2))
                for (k, v), (a, b) in zip(written, more, strict=True)
            ],
        )


def test_rows_written_anew_are_not_the_old_copy(cache: KVCache, rng: torch.Generator) -> None:
    tiers = Tiers(cache)
    sequence = cache.open()
    written = fill(cache, [sequence], 200, rng)
    tiers.demote(sequence)
    tiers.promote(sequence)
    sequence.truncate(70)
    more = fill(cache, [sequence], 130, rng)
    written = [
        (torch.cat([k[:, :, :70], a], 2), torch.cat([v[:, :, :70], b], 2))
        for (k, v), (a, b) in zip(written, more, strict=True)
    ]
    same(sequence, written)
    assert tiers.demote(sequence) > 0
    same(sequence, written)
    sequence.truncate(70)
    cache.append(0, *(rows(rng, 1, HEADS, 1) for _ in range(2)), [sequence])
    assert torch.equal(sequence.k[0][:, :70], written[cache.layout.physical(0)][0][0, :, :70])
    cache.check()


def test_forks_share_what_was_demoted(cache: KVCache, rng: torch.Generator) -> None:
    tiers = Tiers(cache)
    parent = cache.open()
    written = fill(cache, [parent], 150, rng)
    first = parent.fork()
    tiers.demote(parent)
    second = parent.fork()
    for sequence in (parent, first, second):
        same(sequence, written)
    tiers.promote(first)
    assert slow_pages(tiers, parent) == slow_pages(tiers, second) == 0
    tiers.demote(second)
    parent.close()
    first.truncate(40)
    fill(cache, [first], 80, rng)
    same(second, written)
    second.close()
    first.close()
    cache.advance()
    assert (tiers.slow.mapped, tiers.slow.copies) == (0, 0)
    cache.check()


def test_reordering_moves_what_is_known_and_where_it_lies(rng: torch.Generator) -> None:
    with plain() as cache:
        tiers = Tiers(cache)
        beams = cache.open_batch(3)
        written = fill(cache, beams, 150, rng)
        tiers.demote(beams[0])
        tiers.touch(beams[0], 0)
        cache.reorder(beams, [1, 0, 0])
        for sequence, row in zip(beams, (1, 0, 0), strict=True):
            same(sequence, written, row)
        assert (tiers.resident(beams[1], 0)[:, :2] == SLOW).all()
        tiers.promote(beams[2])
        assert (where(tiers, beams[1], 0, 2) == FAST).all()


def test_attention_over_tiers_is_bit_identical(rng: torch.Generator) -> None:
    with plain(pages=800) as cache:
        tiers = Tiers(cache)
        pair = cache.open_batch(2)
        fill(cache, pair, 300, rng)
        query = torch.randn(2, 2 * HEADS, 1, DIM, generator=rng)
        view = cache.view(pair)
        before = [
            (
                sdpa(query, view.k[layer], view.v[layer], enable_gqa=True),
                vattn.attend(query, view, layer),
            )
            for layer in range(LAYERS)
        ]
        tiers.demote(pair[0], 0)
        tiers.demote(pair[1], tokens=(0, 200))
        for layer, (plain_out, our_out) in enumerate(before):
            out = sdpa(query, view.k[layer], view.v[layer], enable_gqa=True)
            assert torch.equal(out, plain_out)
            assert torch.equal(vattn.attend(query, view, layer), our_out)


# ---- budgets -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["per_layer", "all_layers"])
def test_a_sequence_four_times_the_fast_tier(name: str, rng: torch.Generator) -> None:
    with plain(name, slots=2) as cache:
        fast = cache.layout.lanes * cache.layout.pages(100)
        tiers = Tiers(cache, fast_bytes=fast * PAGE)
        sequence = cache.open()
        parts = []
        for _ in range(40):
            parts.append(fill(cache, [sequence], 10, rng))
            assert cache.pool.mapped + cache.pool.pending <= fast
            cache.advance()
        written = [
            tuple(torch.cat([part[i][side] for part in parts], 2) for side in (0, 1))
            for i in range(cache.layout.physical_layers)
        ]
        same(sequence, written)
        assert slow_pages(tiers, sequence) >= 2 * fast
        stats = tiers.stats()
        assert stats.fast_bytes <= stats.fast_budget_bytes == fast * PAGE
        assert stats.slow_bytes + stats.copy_bytes <= stats.slow_budget_bytes


def test_full_tiers_say_so_and_change_nothing(rng: torch.Generator) -> None:
    with plain() as cache:
        lanes = cache.layout.lanes
        tiers = Tiers(cache, fast_bytes=3 * lanes * PAGE, slow_bytes=2 * lanes * PAGE)
        sequence = cache.open()
        for _ in range(4):
            fill(cache, [sequence], 64, rng)
        before = state(cache)
        with pytest.raises(OutOfPages):
            cache.append(0, *(rows(rng, 1, HEADS, 136) for _ in range(2)), [sequence])
        with pytest.raises(OutOfPages):
            tiers.demote(sequence)
        after = state(cache)
        for part in ("lengths", "bytes", "tokens"):
            assert_same({part: before[part]}, {part: after[part]})
        cache.check()


def test_twins_go_when_the_slow_tier_is_full(rng: torch.Generator) -> None:
    with plain() as cache:
        lanes = cache.layout.lanes
        tiers = Tiers(cache, slow_bytes=2 * lanes * PAGE)
        one, two = cache.open_batch(2)
        written = fill(cache, [one, two], 128, rng)
        tiers.demote(one)
        tiers.promote(one)
        assert tiers.slow.copies == 2 * lanes
        tiers.demote(two, tokens=(0, 64))
        assert tiers.slow.copies == lanes
        same(one, written)
        same(two, written, 1)


def test_closing_gives_everything_back_to_both_tiers(rng: torch.Generator) -> None:
    cache = plain()
    tiers = Tiers(cache)
    for _ in range(3):
        sequence = cache.open()
        fill(cache, [sequence], 150, rng)
        tiers.demote(sequence)
        sequence.close()
        cache.advance()
    assert (tiers.slow.mapped, tiers.slow.pending, cache.pool.mapped) == (0, 0, 0)
    sequence = cache.open()
    fill(cache, [sequence], 150, rng)
    tiers.demote(sequence)
    view = sequence.k[0]
    kept = view.clone()
    cache.close()
    with pytest.raises(ClosedError):
        tiers.demote(sequence)
    assert torch.equal(view, kept)
    del view
    assert cache.pool.mapped == tiers.slow.mapped == 0
    cache.pool.close()


def test_tiers_keep_nobody_alive(rng: torch.Generator) -> None:
    cache = KVCache(layout_of("per_layer"), slots=2, budget_bytes=1 << 20)
    tiers = Tiers(cache)
    fill(cache, [sequence := cache.open()], 150, rng)
    tiers.start_demote(sequence).wait()
    dead = weakref.ref(cache), weakref.ref(tiers)
    del cache, tiers, sequence
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


def test_what_there_is_none_of_is_named() -> None:
    with plain() as cache:
        with pytest.raises(TierError, match="'random'"):
            Tiers(cache, victims="random")  # type: ignore[arg-type]
        with pytest.raises(DriverError, match="name another path"):
            Tiers(cache, file="/nowhere/at/all")
        Tiers(cache)
        with pytest.raises(PageStateError, match="one a pool"):
            Tiers(cache)


# ---- victims -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("victims", "left"),
    [("fifo", [1, 2]), ("lru", [0, 2]), ("counter", [0, 1]), ("mine", [0, 2])],
)
def test_victims_leave_in_their_order(victims: str, left: list[int], rng: torch.Generator) -> None:
    """Three pages a lane, one has to go: the first that came, the one unused for longest, the one
    used least often, the one that a score names."""
    order = (lambda pages: np.where(pages.index == 1, -1, 0)) if victims == "mine" else victims
    with plain() as cache:
        lanes = cache.layout.lanes
        tiers = Tiers(cache, victims=order, fast_bytes=5 * lanes * PAGE)
        sequence = cache.open()
        for _ in range(3):
            fill(cache, [sequence], 64, rng)
            cache.advance()
        for page in (1, 1, 1, 0, 0, 2):
            for layer in range(LAYERS):
                tiers.touch(sequence, layer, (page * 64, page * 64 + 64))
        cache.set_budget(2 * lanes * PAGE)
        for layer in range(LAYERS):
            seen = where(tiers, sequence, layer, 3)
            assert (seen[:, left] == FAST).all()
            assert (seen == SLOW).sum() == seen.shape[0]


def test_a_saturated_counter_is_halved_for_all(rng: torch.Generator) -> None:
    with plain() as cache:
        tiers = Tiers(cache, victims="counter")
        sequence = cache.open()
        fill(cache, [sequence], 128, rng)
        for _ in range(100):
            tiers.touch(sequence, 0, (64, 128))
        for _ in range(256):
            tiers.touch(sequence, 0, (0, 64))
        uses = tiers.uses.uses[tiers.arena.span(sequence.slot, 0, 2, tiers.places.lanes(0))]
        assert uses.reshape(-1, 2).tolist() == [[128, 50]] * (2 * HEADS)
        assert (tiers.hits, tiers.misses) == (356 * 2 * HEADS, 0)
        sequence.close()
        again = cache.open()
        assert again.slot == sequence.slot
        assert not tiers.uses.uses.any()


def test_a_timeline_says_where_pages_lived(rng: torch.Generator) -> None:
    with plain() as cache:
        tiers = Tiers(cache)
        sequence = cache.open()
        fill(cache, [sequence], 192, rng)
        cache.advance()
        tiers.demote(sequence, 1, (0, 128))
        cache.advance()
        tiers.promote(sequence, 1, [np.array([0]), np.array([], np.int64)])
        steps, share = tiers.timeline(sequence, 1)
        assert steps.tolist() == [0, 1, 2]
        assert share[:, :3].tolist() == [[0, 0, 0], [1, 1, 0], [0.5, 1, 0]]
        assert tiers.timeline(sequence, 0)[1][:, :3].tolist() == [[0, 0, 0]]


# ---- in the background ---------------------------------------------------------------------------
def test_a_move_in_the_background(cache: KVCache, rng: torch.Generator) -> None:
    tiers = Tiers(cache)
    sequence = cache.open()
    written = fill(cache, [sequence], 200, rng)
    move = tiers.start_demote(sequence)
    assert move.wait(30)
    assert (move.done, move.progress, move.dropped, move.error) == (True, 1.0, 0, None)
    assert move.copied == move.nbytes == slow_pages(tiers, sequence) * PAGE
    same(sequence, written)
    move = tiers.prefetch(sequence, 0)
    assert move is not None
    assert move.wait(30)
    cache.advance()
    assert (tiers.resident(sequence, 0)[tiers.resident(sequence, 0) >= 0] == FAST).all()
    same(sequence, written)
    assert tiers.prefetch(sequence, 0) is None
    again = tiers.start_demote(sequence, 0)
    assert again.nbytes == 0
    assert again.wait(30)
    same(sequence, written)
    assert tiers.stats().copied_bytes == tiers.stats().demoted_bytes - again.installed * PAGE + (
        tiers.stats().promoted_bytes
    )


def test_what_is_read_at_this_step_does_not_leave_for_a_guess(rng: torch.Generator) -> None:
    """Room for two pages a lane of one layer, of which one is in use: one guess fits."""
    with plain() as cache:
        tiers = Tiers(cache)
        sequence = cache.open()
        written = fill(cache, [sequence], 192, rng)
        tiers.demote(sequence)
        lanes = 2 * HEADS
        cache.set_budget(cache.pool.mapped * PAGE + 2 * lanes * PAGE)
        for pages in ((0, 64), (64, 128)):
            move = tiers.read(sequence, 0, pages)
            assert move is not None
            assert move.wait(30)
        assert (where(tiers, sequence, 0, 3) == [FAST, FAST, SLOW]).all()
        cache.advance()
        assert tiers.read(sequence, 0, (0, 64)) is None
        move = tiers.read(sequence, 0, (128, 192))
        assert move is not None
        assert move.wait(30)
        assert (where(tiers, sequence, 0, 3) == [FAST, SLOW, FAST]).all()
        assert tiers.read(sequence, 0, (64, 128)) is None  # no page is idle
        assert (tiers.hits, tiers.misses) == (lanes, 4 * lanes)
        same(sequence, written)


class Held(HostBackend):
    """Copies wait for a gate, and one may fail."""

    def __init__(self) -> None:
        super().__init__(PAGE)
        self.gate, self.copying = threading.Event(), threading.Event()
        self.fails = False

    def copy(self, source: int, target: int, count: int) -> None:
        self.copying.set()
        assert self.gate.wait(30)
        if self.fails:
            raise DriverError("copy", 5, 0, count)
        super().copy(source, target, count)


@pytest.fixture
def held(rng: torch.Generator) -> Iterator[tuple[KVCache, Tiers, Sequence, list]]:
    backend = Held()
    pool = Pool(backend, budget_bytes=400 * PAGE)
    cache = KVCache(layout_of("per_layer"), slots=4, pool=pool)
    tiers = Tiers(cache)
    tiers.mover.piece_pages = 2
    sequence = cache.open()
    yield cache, tiers, sequence, fill(cache, [sequence], 200, rng)
    backend.gate.set()
    cache.close()
    pool.close()
    assert not any(t.name == "vattn-mover" for t in threading.enumerate())


def test_nothing_is_installed_before_it_is_copied(held) -> None:
    cache, tiers, sequence, written = held
    move = tiers.start_demote(sequence)
    assert not move.wait(0.01)
    cache.advance()
    assert slow_pages(tiers, sequence) == 0
    assert tiers.start_demote(sequence).nbytes == 0  # it is on its way
    same(sequence, written)
    cache.pool.backend.gate.set()
    assert move.wait(30)
    assert slow_pages(tiers, sequence) == move.installed == 36
    same(sequence, written)


def test_a_cancelled_move_ends_and_leaves_what_was_there(held) -> None:
    cache, tiers, sequence, written = held
    before = (cache.pool.mapped, tiers.slow.mapped)
    move = tiers.start_demote(sequence)
    assert cache.pool.backend.copying.wait(30)
    move.cancel()
    cache.pool.backend.gate.set()
    assert move.wait(30)
    assert (move.done, move.installed, move.dropped) == (True, 0, 36)
    assert move.copied <= 2 * PAGE
    assert (cache.pool.mapped, tiers.slow.mapped) == before
    same(sequence, written)


def test_a_failing_copy_is_told_and_leaves_what_was_there(held) -> None:
    cache, tiers, sequence, written = held
    before = (cache.pool.mapped, tiers.slow.mapped)
    cache.pool.backend.fails = True
    cache.pool.backend.gate.set()
    move = tiers.start_demote(sequence)
    assert move.wait(30)
    assert isinstance(move.error, DriverError)
    assert move.installed == 0
    assert (cache.pool.mapped, tiers.slow.mapped) == before
    same(sequence, written)
    cache.pool.backend.fails = False
    assert tiers.demote(sequence) == 36 * PAGE


def test_rows_written_under_way_stay(held, rng: torch.Generator) -> None:
    cache, tiers, sequence, written = held
    move = tiers.start_demote(sequence)
    sequence.truncate(100)
    more = fill(cache, [sequence], 90, rng)
    written = [
        (torch.cat([k[:, :, :100], a], 2), torch.cat([v[:, :, :100], b], 2))
        for (k, v), (a, b) in zip(written, more, strict=True)
    ]
    cache.pool.backend.gate.set()
    assert move.wait(30)
    same(sequence, written)
    assert (tiers.resident(sequence, 0)[:, :3] == [SLOW, FAST, FAST]).all()
    assert (move.installed, move.dropped) == (12, 24)


def test_a_sequence_closed_under_way_is_gone(held, rng: torch.Generator) -> None:
    cache, tiers, sequence, _ = held
    move = tiers.start_demote(sequence)
    sequence.close()
    other = cache.open(slot=0) if cache._slots.is_free(0) else cache.open()
    written = fill(cache, [other], 200, rng)
    cache.pool.backend.gate.set()
    assert move.wait(30)
    cache.advance()
    assert (move.installed, move.dropped) == (0, 36)
    same(other, written)
    assert tiers.slow.mapped == 0


def test_a_fork_and_a_reorder_under_way_follow(held) -> None:
    cache, tiers, sequence, written = held
    move = tiers.start_demote(sequence)
    child = sequence.fork()
    other = cache.open()
    cache.reorder([sequence, other], [1, 0])
    cache.pool.backend.gate.set()
    assert move.wait(30)
    assert move.installed == 36
    same(child, written)
    same(other, written)
    assert sequence.length == 0
    assert (tiers.resident(child, 2)[:, :3] == SLOW).all()


def test_closing_the_cache_ends_a_move(held) -> None:
    cache, tiers, sequence, _ = held
    move = tiers.start_demote(sequence)
    assert cache.pool.backend.copying.wait(30)
    threading.Timer(0.05, cache.pool.backend.gate.set).start()
    cache.close()
    assert move.done
    assert (cache.pool.mapped, tiers.slow.mapped) == (0, 0)
    with pytest.raises(ClosedError):
        tiers.start_demote(sequence)


def test_room_is_made_ahead(rng: torch.Generator) -> None:
    with plain() as cache:
        lanes = cache.layout.lanes
        tiers = Tiers(cache, fast_bytes=4 * lanes * PAGE, ahead_bytes=lanes * PAGE)
        sequence = cache.open()
        parts = []
        for _ in range(6):
            parts.append(fill(cache, [sequence], 64, rng))
            cache.advance()
            for move in list(tiers._moves):
                move.wait()
            assert cache.pool.free >= lanes
        same(
            sequence,
            [
                tuple(torch.cat([part[i][side] for part in parts], 2) for side in (0, 1))
                for i in range(LAYERS)
            ],
        )
