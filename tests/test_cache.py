"""KVCache: what is read is what was written, whatever else happens; and failing changes nothing."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import ClosedError, DriverError, OutOfPages, OutOfRange
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.cache import KVCache, PrefixError
from vattn.layout import Layout, LayoutError

LAYERS, HEADS, DIM = 3, 2, 16
LAYOUTS = {
    "per_layer": {},
    "token_major": {"rows": "token_major"},
    "grouped": {"group_layers": 2},
    "all_layers": {"rows": "token_major", "group_layers": 3},
    "shared_layers": {"layer_map": (0, 1, 0)},
}


def layout_of(name: str, max_tokens: int = 400, dtype: str = "float32") -> Layout:
    return Layout(LAYERS, HEADS, DIM, max_tokens, dtype=dtype, page_bytes=4096, **LAYOUTS[name])


def rows(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=rng)


def fill(cache: KVCache, sequences, tokens: int, rng: torch.Generator) -> list[torch.Tensor]:
    """Append to every physical layer; returns K and V by physical layer."""
    out = []
    for physical in range(cache.layout.physical_layers):
        k, v = rows(rng, len(sequences), HEADS, tokens), rows(rng, len(sequences), HEADS, tokens)
        layer = (
            physical if cache.layout.layer_map is None else cache.layout.layer_map.index(physical)
        )
        cache.append(layer, k.to(cache.dtype), v.to(cache.dtype), sequences)
        out.append((k, v))
    return out


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
    files, maps = len(os.listdir("/proc/self/fd")), own_maps()
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
    gc.collect()
    assert own_maps() == maps
    assert len(os.listdir("/proc/self/fd")) == files


def own_maps() -> int:
    with open("/proc/self/maps") as lines:
        return sum("memfd:vattn" in line for line in lines)


def test_a_dropped_cache_leaves_nothing(rng):
    maps = own_maps()
    cache = KVCache(layout_of("all_layers"), slots=2, budget_bytes=1 << 20)
    fill(cache, [cache.open()], 100, rng)
    del cache
    gc.collect()
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
def state(cache: KVCache) -> dict[str, object]:
    """Everything that a failing call must leave as it was."""
    return {
        "lengths": cache.lengths.tolist(),
        "starts": cache.starts.tolist(),
        "tokens": cache.tokens.tolist(),
        "open": (cache.opened % 2).tolist(),  # a failed fork opened and closed a slot
        "mapped": [cache.arena.ids(cache.arena.mapped(s)).tolist() for s in range(cache.slots)],
        "counts": (cache.pool.free, cache.pool.mapped, cache.pool.pending),
        "maps": cache.arena.maps,
        "bytes": [
            sequence.k[layer].clone() for sequence in cache.sequences for layer in range(LAYERS)
        ],
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for name in before:
        if name == "bytes":
            assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
        else:
            assert before[name] == after[name], name


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


# ---- side by side with a model -------------------------------------------------------------------
class CacheAndModel(RuleBasedStateMachine):
    """A cache against plain tensors: after any history both hold the same rows."""

    @initialize(
        name=st.sampled_from(sorted(set(LAYOUTS) - {"shared_layers"})), pages=st.integers(30, 400)
    )
    def start(self, name, pages):
        self.cache = KVCache(layout_of(name), slots=5, budget_bytes=pages * 4096)
        self.model: list[tuple] = []  # (sequence, [k of each layer], [start of each layer])
        self.rng = torch.Generator().manual_seed(99)
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []

    def pick(self, data):
        return data.draw(st.sampled_from(self.model))

    @rule(tenant=st.sampled_from([None, "a", "b"]))
    def open(self, tenant):
        try:
            sequence = self.cache.open(tenant=tenant)
        except OutOfRange:
            return
        self.model.append(
            (sequence, [rows(self.rng, HEADS, 0) for _ in range(LAYERS)], [0] * LAYERS)
        )

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 150))
    def append(self, data, count):
        sequence, model, _ = self.pick(data)
        new = [rows(self.rng, HEADS, count) for _ in range(LAYERS)]
        for layer, more in enumerate(new):
            try:
                self.cache.append(layer, more[None], -more[None], [sequence])
            except (OutOfPages, OutOfRange):
                assert layer == 0, "the first layer maps for all of them"
                return
            model[layer] = torch.cat([model[layer], more], 1)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), part=st.floats(0, 1))
    def truncate(self, data, part):
        sequence, model, starts = self.pick(data)
        keep = int(part * sequence.length)
        try:
            sequence.truncate(keep)
        except (OutOfRange, OutOfPages):
            assert keep < max(starts) or keep == 0
            return
        model[:] = [rows_[:, :keep] for rows_ in model]
        if keep == 0:
            starts[:] = [0] * LAYERS

    @precondition(lambda self: self.model)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1), part=st.floats(0, 1))
    def release(self, data, layer, part):
        sequence, model, starts = self.pick(data)
        token = int(part * model[layer].shape[1])
        sequence.release_before(layer, token)
        starts[layer] = max(starts[layer], token)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), part=st.floats(0, 1))
    def fork(self, data, part):
        sequence, model, starts = self.pick(data)
        tokens = max([int(part * sequence.length), *starts])
        try:
            child = sequence.share(tokens)
        except (OutOfPages, OutOfRange, PrefixError):
            return
        self.model.append((child, [rows_[:, :tokens] for rows_ in model], list(starts)))

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def reorder(self, data):
        many = [entry for entry in self.model if entry[0].tenant == self.model[0][0].tenant]
        order = [data.draw(st.integers(0, len(many) - 1)) for _ in many]
        try:
            self.cache.reorder([entry[0] for entry in many], order)
        except OutOfPages:
            return
        old = [(list(entry[1]), list(entry[2])) for entry in many]
        for entry, source in zip(many, order, strict=True):
            entry[1][:], entry[2][:] = old[source]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def close(self, data):
        entry = self.pick(data)
        entry[0].close()
        self.model = [other for other in self.model if other is not entry]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def look(self, data, layer):
        tensor = self.pick(data)[0].k[layer]
        self.views = [*self.views[-2:], (tensor, tensor.clone())]

    @rule()
    def blink(self):
        self.views = []

    @rule()
    def advance(self):
        self.cache.advance()

    @rule(pages=st.integers(0, 400))
    def budget(self, pages):
        self.cache.pool.set_budget(pages * 4096)

    @rule()
    def trim(self):
        self.cache.trim()

    @invariant()
    def both_hold_the_same(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        for sequence, model, starts in self.model:
            for layer in range(LAYERS):
                assert torch.equal(sequence.k[layer], model[layer][:, starts[layer] :])
                assert torch.equal(sequence.v[layer], -model[layer][:, starts[layer] :])
        stats = self.cache.stats()
        total = stats.used_bytes + stats.wasted_bytes + stats.retained_bytes
        assert stats.mapped_bytes == total == self.cache.pool.mapped * 4096

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.close()
            self.views = []
            gc.collect()
            assert self.cache.pool.backend.fd == -1


CacheAndModel.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCacheAndModel = CacheAndModel.TestCase


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
