"""KVCache: what is read is what was written, whatever else happens; and failing changes nothing."""

from __future__ import annotations

import copy
import gc
import os
import pickle

import numpy as np
import pytest
import torch

from tests.caches import DIM, HEADS, LAYERS, LAYOUTS, assert_same, fill, layout_of, rows, state
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import ClosedError, DriverError, OutOfPages, OutOfRange
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.cache import CopyRefused, KVCache, PrefixError
from vattn.layout import Layout, LayoutError


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture(params=LAYOUTS)
def cache(request):
    with KVCache(layout_of(request.param), slots=6, budget_bytes=8 << 20) as made:
        yield made
        made.check()


# ---- reading and writing -----------------------------------------------------------------------
def test_views_are_zero_copy_and_never_move(cache, rng):
    pair = cache.open_batch(2)
    fill(cache, pair, 10, rng)
    before = pair[0].k[0]
    address = before.data_ptr()
    kept = before.clone()
    fill(cache, pair, 300, rng)
    after = pair[0].k[0]
    assert after.data_ptr() == address
    assert after.shape == (HEADS, 310, DIM)
    assert torch.equal(before, kept)
    after[:, :10] = 7.0
    assert bool((before == 7.0).all())
    batch = cache.view(pair).k[0]
    assert batch.shape == (2, HEADS, 310, DIM)
    assert batch[0].data_ptr() == address


def test_shared_layers_read_one_kv(rng):
    with KVCache(layout_of("shared_layers"), slots=2, budget_bytes=1 << 20) as cache:
        sequence = cache.open()
        fill(cache, [sequence], 5, rng)
        assert sequence.k[0].data_ptr() == sequence.k[2].data_ptr()
        assert sequence.k[1].data_ptr() != sequence.k[0].data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_round_trips(dtype, rng):
    layout = layout_of("per_layer", dtype=dtype)
    with KVCache(layout, slots=1, budget_bytes=1 << 20) as cache:
        sequence = cache.open()
        written = fill(cache, [sequence], 33, rng)
        assert sequence.v[1].dtype == getattr(torch, dtype)
        assert torch.equal(sequence.v[1], written[1][1][0].to(cache.dtype))


def test_ragged_appends_and_views(cache, rng):
    many = [cache.open() for _ in range(3)]
    counts = [3, 0, 200]
    k, v = rows(rng, HEADS, sum(counts)), rows(rng, HEADS, sum(counts))
    cache.append(1, k, v, many, counts)
    ragged = cache.view(many).ragged(1)
    assert ragged.lengths.tolist() == counts
    for one, expected in zip(ragged.k, k.split(counts, dim=1), strict=True):
        assert torch.equal(one, expected)
    assert ragged.v_pointers[2] == ragged.v[2].data_ptr()
    with pytest.raises(LayoutError, match="ragged"):
        cache.view(many).k[1]


def test_nothing_is_copied_to_grow(cache, rng):
    sequence = cache.open()
    fill(cache, [sequence], 1, rng)
    for _ in range(200):
        fill(cache, [sequence], 1, rng)
    calls = cache.stats().calls
    assert calls.get("duplicate", 0) == 0
    assert calls.get("remap", 0) == 0


# ---- truncate, window, fork, reorder -----------------------------------------------------------
def test_truncate_then_append_is_a_rollback(cache, rng):
    sequence = cache.open()
    first = fill(cache, [sequence], 100, rng)
    sequence.truncate(40)
    second = fill(cache, [sequence], 30, rng)
    assert sequence.length == 70
    for physical in range(cache.layout.physical_layers):
        layer = physical
        expected = torch.cat([first[physical][0][0][:, :40], second[physical][0][0]], 1)
        assert torch.equal(sequence.k[layer], expected)


def test_a_window_gives_pages_back_one_step_later_and_never_under_a_view(rng):
    with KVCache(layout_of("per_layer"), slots=1, budget_bytes=1 << 20) as cache:
        sequence = cache.open()
        fill(cache, [sequence], 400, rng)
        mapped = cache.stats().mapped_bytes
        view = sequence.k[0]
        kept = view.clone()
        for layer in range(LAYERS):
            sequence.release_before(layer, 300)
        assert sequence.k[0].shape[1] == 100
        cache.advance()
        assert cache.stats().mapped_bytes == mapped
        assert torch.equal(view, kept)
        del view
        cache.advance()
        assert cache.stats().mapped_bytes < mapped
        assert torch.equal(sequence.k[0], kept[:, 300:])
        sequence.truncate(0)
        written = fill(cache, [sequence], 50, rng)
        assert torch.equal(sequence.k[0], written[0][0][0])


def test_forks_share_pages_and_part_on_write(cache, rng):
    parent = cache.open()
    written = fill(cache, [parent], 300, rng)
    before = cache.stats()
    child = parent.fork()
    assert cache.stats().used_bytes - before.used_bytes < cache.layout.lanes * cache.layout.page
    child.truncate(10)
    fill(cache, [child], 5, rng)
    assert torch.equal(parent.k[0], written[0][0][0])
    assert torch.equal(child.k[0][:, :10], written[0][0][0][:, :10])
    parent.close()
    assert torch.equal(child.v[1][:, :10], written[1][1][0][:, :10])


def test_a_prefix_of_whole_pages_costs_nothing(rng):
    with KVCache(layout_of("all_layers"), slots=3, budget_bytes=1 << 20) as cache:
        donor = cache.open()
        fill(cache, [donor], 300, rng)
        whole = cache.layout.room(3)
        before = cache.stats()
        sharer = donor.share(whole)
        after = cache.stats()
        assert after.calls.get("duplicate", 0) == 0
        assert after.mapped_bytes == before.mapped_bytes
        assert after.shared_bytes == 3 * cache.layout.page
        assert torch.equal(sharer.k[0], donor.k[0][:, :whole])


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 2, 2], [0, 0, 1], [1, 2, 0]])
def test_reorder_moves_contents(cache, rng, order):
    beams = cache.open_batch(3)
    written = fill(cache, beams, 70, rng)
    cache.reorder(beams, order)
    more = fill(cache, beams, 40, rng)
    for physical, (k, v) in enumerate(written):
        assert torch.equal(cache.view(beams).k[physical][:, :, :70], k[order])
        assert torch.equal(cache.view(beams).v[physical][:, :, :70], v[order])
        assert torch.equal(cache.view(beams).v[physical][:, :, 70:], more[physical][1])


def test_select_forks_into_consecutive_slots(cache, rng):
    pair = cache.open_batch(2)
    written = fill(cache, pair, 50, rng)
    grown = cache.select(pair, [1, 1, 0])
    assert torch.equal(cache.view(grown).k[0], written[0][0][[1, 1, 0]])


# ---- lifetimes ---------------------------------------------------------------------------------
def test_a_closed_slot_is_adopted_without_a_system_call(cache, rng):
    sequence = cache.open()
    fill(cache, [sequence], 200, rng)
    sequence.close()
    calls = cache.stats().calls
    again = cache.open()
    fill(cache, [again], 200, rng)
    assert cache.stats().calls == calls


def test_another_tenant_never_sees_old_bytes(cache):
    sequence = cache.open(tenant="a")
    ones = torch.ones(1, HEADS, 200, DIM)
    for layer in range(LAYERS):
        cache.append(layer, ones, ones, [sequence])
    sequence.close()
    other = cache.open(tenant="b")
    cache.extend([other], 100)
    cache.commit([other], 100)
    assert not other.k[0].any()
    assert not other.v[LAYERS - 1].any()


def test_use_after_close_raises(cache, rng):
    sequence, other = cache.open(), cache.open()
    fill(cache, [sequence, other], 5, rng)
    view = cache.view([sequence])
    kept = sequence.k[0]
    expected = kept.clone()
    sequence.truncate(3)
    with pytest.raises(ClosedError, match="truncated"):
        view.k[0]
    sequence.close()
    with pytest.raises(ClosedError):
        sequence.close()
    with pytest.raises(ClosedError):
        sequence.k[0]
    with pytest.raises(ClosedError):
        cache.append(0, kept[None], kept[None], [sequence])
    assert torch.equal(kept, expected)
    cache.close()
    cache.close()
    with pytest.raises(ClosedError):
        cache.open()
    with pytest.raises(ClosedError):
        other.k[0]


def test_a_view_outlives_everything_and_then_all_is_gone(rng):
    maps, files = own_maps(), len(os.listdir("/proc/self/fd"))
    cache = KVCache(layout_of("per_layer"), slots=2, budget_bytes=1 << 20)
    sequence = cache.open()
    fill(cache, [sequence], 100, rng)
    view = sequence.v[2][0, 5:]
    expected = view.clone()
    sequence.close()
    cache.close()
    del cache, sequence
    gc.collect()
    assert torch.equal(view, expected)
    assert own_maps() > maps
    del view
    assert own_maps() == maps
    assert len(os.listdir("/proc/self/fd")) == files


def own_maps() -> int:
    gc.collect()  # what earlier tests have left
    with open("/proc/self/maps") as lines:
        return sum("memfd:vattn" in line for line in lines)


def test_a_dropped_cache_leaves_nothing(rng):
    maps = own_maps()
    cache = KVCache(layout_of("all_layers"), slots=2, budget_bytes=1 << 20)
    fill(cache, [cache.open()], 100, rng)
    del cache
    assert own_maps() == maps


def test_memory_goes_back_on_request(cache, rng):
    sequence = cache.open()
    fill(cache, [sequence], 400, rng)
    resident = cache.stats().resident_bytes
    sequence.close()
    assert cache.stats().resident_bytes == resident
    assert cache.trim() >= resident
    assert cache.stats().resident_bytes == 0


# ---- refusals ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda c, s: c.append(LAYERS, k(1), k(1), [s]), LayoutError, "layer 3"),
        (lambda c, s: c.append(0, k(1, heads=3), k(1), [s]), LayoutError, "shape"),
        (lambda c, s: c.append(0, k(1), k(1)[..., :8], [s]), LayoutError, "shape"),
        (lambda c, s: c.append(0, k(1).half(), k(1), [s]), LayoutError, "float16"),
        (lambda c, s: c.append(0, k(1).to("meta"), k(1), [s]), LayoutError, "meta"),
        (lambda c, s: c.append(0, k(1)[0], k(1)[0], [s], [1, 2]), LayoutError, "counts"),
        (lambda c, s: c.append(0, k(1, batch=2), k(1, batch=2), [s, s]), LayoutError, "twice"),
        (lambda c, s: c.append(0, k(400), k(400), [s]), OutOfRange, "400"),
        (lambda c, s: c.extend([s], 1 << 40), OutOfRange, "max_tokens"),
        (lambda c, s: c.commit([s], 300), OutOfRange, "extend"),
        (lambda c, s: s.truncate(21), OutOfRange, "21"),
        (lambda c, s: s.truncate(-1), OutOfRange, "-1"),
        (lambda c, s: s.release_before(0, 21), OutOfRange, "21"),
        (lambda c, s: s.share(21), PrefixError, "21"),
        (lambda c, s: c.reorder([s], [1]), PrefixError, "order"),
        (lambda c, s: c.select([s], [0, 1]), PrefixError, "order"),
        (lambda c, s: c.open_batch(6), OutOfRange, "6 consecutive"),
        (lambda c, s: c.open(slot=s.slot), OutOfRange, "not free"),
        (lambda c, s: c.static_view([s]), LayoutError, "zero_backed"),
    ],
)
def test_a_refused_call_names_the_value_and_changes_nothing(cache, rng, change, error, named):
    sequence = cache.open()
    fill(cache, [sequence], 20, rng)
    before = state(cache)
    with pytest.raises(error, match=named):
        change(cache, sequence)
    assert_same(before, state(cache))


def k(tokens: int, *, heads: int = HEADS, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, heads, tokens, DIM)


def test_a_sequence_of_another_cache_is_refused(cache):
    with KVCache(cache.layout, slots=1, budget_bytes=1 << 20) as other:
        stranger = other.open()
        with pytest.raises(LayoutError, match="another cache"):
            cache.extend([stranger], 1)


def test_an_exhausted_budget_says_how_much_is_missing(rng):
    layout = layout_of("per_layer")
    pages = layout.lanes * 2
    with KVCache(layout, slots=3, budget_bytes=pages * layout.page) as cache:
        sequence = cache.open()
        fill(cache, [sequence], layout.room(2), rng)
        before = state(cache)
        with pytest.raises(OutOfPages) as caught:
            fill(cache, [sequence], 1, rng)
        assert (caught.value.needed, caught.value.free) == (layout.lanes, 0)
        assert_same(before, state(cache))
        cache.pool.set_budget(2 * pages * layout.page)
        fill(cache, [sequence], 1, rng)


def test_a_full_budget_takes_back_what_parked_sequences_hold(rng):
    layout = layout_of("per_layer")
    with KVCache(layout, slots=4, budget_bytes=layout.lanes * 2 * layout.page) as cache:
        first = cache.open(slot=0)
        fill(cache, [first], layout.room(2), rng)
        first.close()
        cache.advance()
        second = cache.open(slot=2)
        written = fill(cache, [second], layout.room(2), rng)
        assert torch.equal(second.k[0], written[0][0][0])


OPERATIONS = {
    "append": lambda c, a, b: c.append(0, k(150, batch=2), k(150, batch=2), [a, b]),
    "extend": lambda c, a, b: c.extend([a, b], 200),
    "fork": lambda c, a, b: a.fork(),
    "share": lambda c, a, b: b.share(90),
    "select": lambda c, a, b: c.select([a, b], [1, 0, 1]),
    "reorder": lambda c, a, b: c.reorder([a, b], [1, 1]),
    "swap": lambda c, a, b: c.reorder([a, b], [1, 0]),
    "restart": lambda c, a, b: a.truncate(0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["per_layer", "all_layers"])
def test_every_backend_call_may_fail_and_nothing_changes(name, operation, rng):
    layout = layout_of(name)
    for fail_at in range(1000):
        backend = CheckedBackend(HostBackend(layout.page))
        pool = Pool(backend, budget_bytes=8 << 20)
        with KVCache(layout, slots=6, pool=pool) as cache:
            pair = cache.open_batch(2)
            fill(cache, pair, 140, rng)
            if operation == "restart":
                for layer in range(LAYERS):
                    pair[0].release_before(layer, 140)
                cache.advance()
            before = state(cache)
            backend.fail_at = backend.count + fail_at
            try:
                OPERATIONS[operation](cache, *pair)
            except DriverError:
                cache.check()
                assert_same(before, state(cache))
                backend.fail_at = None
                OPERATIONS[operation](cache, *pair)
                cache.check()
            else:
                backend.fail_at = None
                assert fail_at > 0, "the operation made no call at all"
                break
        pool.close()
    else:
        pytest.fail("the operation never succeeded")


def test_a_step_in_steady_state_makes_no_system_call(rng):
    """Sequences come and go for a while; then nothing is mapped any more."""
    layout = layout_of("all_layers", max_tokens=128)
    generator = np.random.default_rng(5)
    with KVCache(layout, slots=8, budget_bytes=4 << 20) as cache:
        alive = {cache.open(): int(generator.choice([20, 60, 119])) for _ in range(8)}
        for step in range(2000):
            if step == 1500:
                calls = cache.stats().calls
            for sequence in list(alive):
                if sequence.length >= alive[sequence]:
                    sequence.close()
                    del alive[sequence]
                    alive[cache.open()] = int(generator.choice([20, 60, 119]))
            batch = cache.batch(list(alive))
            cache.extend(batch, 1)
            cache.commit(batch, 1)
            cache.advance()
        assert cache.stats().calls == calls


def test_a_trace_names_the_slot(rng):
    layout = layout_of("per_layer")
    with KVCache(layout, slots=3, budget_bytes=1 << 20, trace=True) as cache:
        fill(cache, [cache.open(slot=2)], 10, rng)
        maps = [event for event in cache.trace if event.action == "map"]
        assert {event.owner for event in maps} == {"slot 2"}
        assert sum(event.bytes for event in maps) == cache.stats().mapped_bytes
    with KVCache(layout, slots=1, budget_bytes=1 << 20) as cache:
        assert cache.trace is None


# ---- what a cache must not get wrong -------------------------------------------------------------
def test_a_batch_goes_out_of_date_with_its_sequences(cache, rng):
    old = cache.open(slot=0, tenant="a")
    batch = cache.batch([old])
    old.close()
    other = cache.open(slot=0, tenant="b")
    fill(cache, [other], 3, rng)
    with pytest.raises(ClosedError, match="new batch"):
        cache.append(0, k(1), k(1), batch)
    with KVCache(cache.layout, slots=2, budget_bytes=1 << 20) as stranger:
        stranger.open()
        with pytest.raises(ClosedError, match="another cache"):
            stranger.extend(cache.batch([other]), 1)


def test_tenants_in_one_batch_own_their_pages(cache):
    ones = torch.ones(2, HEADS, 200, DIM)
    first, second = cache.open(tenant="a"), cache.open(tenant="b")
    for layer in range(LAYERS):
        cache.append(layer, ones, ones, [first, second])
    with pytest.raises(PrefixError, match="tenants"):
        cache.reorder([first, second], [1, 0])
    slot = second.slot
    second.close()
    again = cache.open(slot=slot, tenant="a")
    cache.extend([again], 100)
    cache.commit([again], 100)
    assert not again.k[0].any()


def test_tenants_are_told_apart_over_a_shared_pool():
    layout = layout_of("per_layer")
    pool = Pool(HostBackend(4096), budget_bytes=layout.lanes * 2 * 4096)
    ones = torch.ones(1, HEADS, 60, DIM)
    with KVCache(layout, slots=2, pool=pool) as one, KVCache(layout, slots=2, pool=pool) as two:
        sequence = one.open(tenant="alice")
        for layer in range(LAYERS):
            one.append(layer, ones, ones, [sequence])
        sequence.close()
        one.trim()
        one.advance()
        other = two.open(tenant="bob")
        two.extend([other], 60)
        two.commit([other], 60)
        assert not other.k[0].any()
    pool.close()


def test_rows_leave_their_graph_behind_and_inference_mode_does_not_stick(rng):
    with torch.inference_mode():
        cache = KVCache(layout_of("per_layer"), slots=1, budget_bytes=1 << 20)
        sequence = cache.open()
        fill(cache, [sequence], 5, rng)
    with cache:
        new = rows(rng, 1, HEADS, 3).requires_grad_()
        for layer in range(LAYERS):
            cache.append(layer, new, new * 2, [sequence])
        assert sequence.k[0].shape[1] == 8
        assert not sequence.k[0].requires_grad
        assert cache._rows._window._whole.grad_fn is None


def test_a_fork_of_the_process_cannot_touch_the_rows(rng):
    with KVCache(layout_of("per_layer"), slots=1, budget_bytes=1 << 20) as cache:
        sequence = cache.open()
        fill(cache, [sequence], 5, rng)
        before = sequence.k[0].clone()
        child = os.fork()
        if child == 0:
            try:
                cache.append(0, k(1), k(1), [sequence])
            except ClosedError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert torch.equal(sequence.k[0], before)


def test_a_limit_on_retained_bytes_holds_after_each_step(rng):
    layout = layout_of("per_layer")
    with KVCache(layout, slots=4, budget_bytes=8 << 20, retain_bytes=0) as cache:
        many = [cache.open() for _ in range(3)]
        fill(cache, many, 300, rng)
        many[0].close()
        many[1].truncate(10)
        cache.advance()
        assert cache.stats().retained_bytes == 0
        cache.extend([many[1]], 200)
        cache.advance()
        assert cache.room[many[1].slot] >= 210, "what extend promised stays"


def test_two_caches_over_one_pool_take_nothing_that_is_in_use(rng):
    layout = layout_of("all_layers")
    pool = Pool(HostBackend(4096), budget_bytes=26 * 4096)
    with KVCache(layout, slots=3, pool=pool) as one, KVCache(layout, slots=3, pool=pool) as two:
        parked = two.open()
        fill(two, [parked], layout.room(12), rng)
        parked.close()
        donor = one.open()
        fill(one, [donor], layout.room(6), rng)
        child = donor.fork()
        child.truncate(layout.room(2))
        fill(one, [child], layout.room(5), rng)
        one.check()
        two.check()
    pool.close()


@pytest.mark.parametrize("tokens", [-1, 401, 2**63, 0.5, [1, 2]])
def test_token_counts_are_checked(cache, tokens):
    sequence = cache.open()
    before = state(cache)
    for call in (cache.extend, cache.commit):
        with pytest.raises((OutOfRange, LayoutError)):
            call([sequence], tokens)
    assert_same(before, state(cache))


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_is_not_copied_by_value(cache, act):
    with pytest.raises(CopyRefused, match="Fork its sequences"):
        act(cache)


def test_a_slot_whose_pages_would_not_go_is_emptied_later():
    layout = layout_of("per_layer")
    backend = CheckedBackend(HostBackend(layout.page))
    with KVCache(layout, slots=2, pool=Pool(backend, budget_bytes=8 << 20)) as cache:
        first = cache.open()
        fill(cache, [first], 200, torch.Generator().manual_seed(1))
        twin = cache.fork(first)
        backend.fail_at = backend.count
        with pytest.raises(DriverError, match="Injected"):
            twin.close()
        backend.fail_at = None
        assert twin.closed
        with pytest.raises(OutOfRange, match="all 2 slots"):
            cache.open()
        cache.advance()
        cache.open()
        cache.check()


def test_rows_made_writable_are_held_from_what_is_there_on():
    with KVCache(Layout(1, 1, 16, 512, dtype="float32"), slots=2) as cache:
        many = [cache.open(), cache.open()]
        first, ends = np.array([0, 0]), np.array([100, 40])
        with pytest.raises(OutOfRange, match="make_writable"):
            cache.hold(many, ends)
        cache.make_writable(many, first, ends)
        cache.hold(many, ends)
        assert [s.length for s in many] == [100, 40]
        fewer = np.array([99, 40])
        cache.make_writable(many, first, fewer)
        cache.hold(many, fewer)
        assert [s.length for s in many] == [100, 40]
        for low, high in ((-1, 40), (41, 40)):
            with pytest.raises(OutOfRange, match="cannot be written"):
                cache.make_writable(many, np.array([0, low]), np.array([99, high]))
        cache.release_before(many[0], 0, 64)
        with pytest.raises(OutOfRange, match="begin behind"):
            cache.make_writable(many, first, ends + 1)
        assert [s.length for s in many] == [100, 40]
        cache.check()
