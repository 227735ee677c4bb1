"""KVCache side by side with plain tensors: after any history both hold the same rows."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.caches import HEADS, LAYERS, LAYOUTS, assert_same, layout_of, rows, state
from vattn.allocator.errors import OutOfPages, OutOfRange, PageStateError, VattnError
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.cache import KVCache, PrefixError

# ---- side by side with a model -------------------------------------------------------------------
REFUSED = {
    "negative": lambda cache, sequence: cache.commit([sequence], -1),
    "too many": lambda cache, sequence: cache.extend([sequence], 401),
    "not mapped": lambda cache, sequence: cache.commit([sequence], 400),
    "truncate": lambda cache, sequence: sequence.truncate(sequence.length + 1),
    "prefix": lambda cache, sequence: sequence.share(401),
    "order": lambda cache, sequence: cache.reorder([sequence], [1]),
    "twice": lambda cache, sequence: cache.extend([sequence, sequence], 1),
    "layer": lambda cache, sequence: sequence.release_before(LAYERS, 0),
    "span": lambda cache, sequence: cache.tensor([sequence.slot], 0, 0, span=(0, 401)),
    "empty": lambda cache, sequence: cache.view([]),
}


class CacheAndModel(RuleBasedStateMachine):
    """Two caches over one pool, and a model: sequence, K of each layer, start of each layer."""

    @initialize(
        names=st.lists(
            st.sampled_from(sorted(set(LAYOUTS) - {"shared_layers"})), min_size=2, max_size=2
        ),
        pages=st.integers(30, 400),
        retain=st.sampled_from([None, 0, 40960]),
    )
    def start(self, names, pages, retain):
        self.pool = Pool(self.open_backend(), budget_bytes=pages * 4096)
        self.caches = [
            KVCache(layout_of(name), slots=5, pool=self.pool, retain_bytes=retain) for name in names
        ]
        self.model: list[tuple] = []
        self.rng = torch.Generator().manual_seed(99)
        self.views: list[tuple[torch.Tensor, torch.Tensor]] = []

    def open_backend(self):
        return HostBackend(4096)

    def assert_gone(self):
        assert self.pool.backend.fd == -1

    def pick(self, data):
        return data.draw(st.sampled_from(self.model))

    @rule(which=st.integers(0, 1), tenant=st.sampled_from([None, "a", "b"]))
    def open(self, which, tenant):
        try:
            sequence = self.caches[which].open(tenant=tenant)
        except OutOfRange:
            return
        except OutOfPages:  # foreign pages that are still held are exchanged
            return
        empty = [rows(self.rng, HEADS, 0) for _ in range(LAYERS)]
        self.model.append((sequence, empty, [0] * LAYERS))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 150), both=st.booleans())
    def append(self, data, count, both):
        entry = self.pick(data)
        batch = [entry]
        if both:  # several sequences in one call, whatever their tenants and lengths
            batch = [other for other in self.model if other[0].cache is entry[0].cache]
        new = [rows(self.rng, len(batch), HEADS, count) for _ in range(LAYERS)]
        for layer, more in enumerate(new):
            try:
                entry[0].cache.append(layer, more, -more, [other[0] for other in batch])
            except (OutOfPages, OutOfRange):
                assert layer == 0, "the first layer maps for all of them"
                return
            for i, (_, model, _) in enumerate(batch):
                model[layer] = torch.cat([model[layer], more[i]], 1)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 100))
    def extend(self, data, count):
        sequence = self.pick(data)[0]
        try:
            sequence.cache.extend([sequence], count)
        except (OutOfPages, OutOfRange):
            return
        slot = sequence.slot
        assert sequence.cache.room[slot] >= sequence.cache.tokens[slot] + count

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
        first = self.pick(data)[0]
        many = [
            entry
            for entry in self.model
            if (entry[0].cache, entry[0].tenant) == (first.cache, first.tenant)
        ]
        order = [data.draw(st.integers(0, len(many) - 1)) for _ in many]
        try:
            first.cache.reorder([entry[0] for entry in many], order)
        except OutOfPages:
            return
        except PageStateError:  # windows that slid apart, under a view
            assert self.views
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
    @rule(data=st.data(), what=st.sampled_from(sorted(REFUSED)))
    def refuse(self, data, what):
        sequence = self.pick(data)[0]
        before = state(sequence.cache)
        with pytest.raises(VattnError):
            REFUSED[what](sequence.cache, sequence)
        assert_same(before, state(sequence.cache))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def look(self, data, layer):
        tensor = self.pick(data)[0].k[layer]
        self.views = [*self.views[-2:], (tensor, tensor.clone())]

    @rule()
    def blink(self):
        self.views = []

    @rule(which=st.integers(0, 1))
    def advance(self, which):
        self.caches[which].advance()

    @rule(pages=st.integers(0, 400))
    def budget(self, pages):
        self.pool.set_budget(pages * 4096)

    @rule(which=st.integers(0, 1))
    def trim(self, which):
        self.caches[which].trim()

    @invariant()
    def both_hold_the_same(self):
        if not hasattr(self, "caches"):
            return
        for cache in self.caches:
            cache.check()
        for sequence, model, starts in self.model:
            for layer in range(LAYERS):
                assert torch.equal(sequence.k[layer], model[layer][:, starts[layer] :])
                assert torch.equal(sequence.v[layer], -model[layer][:, starts[layer] :])
        mapped = 0
        for cache in self.caches:
            stats = cache.stats()
            mapped += stats.mapped_bytes
            total = stats.used_bytes + stats.wasted_bytes + stats.retained_bytes
            assert stats.mapped_bytes == total
        assert mapped == self.pool.mapped * 4096

    def teardown(self):
        if hasattr(self, "caches"):
            for cache in self.caches:
                cache.close()
            self.views = []
            gc.collect()
            self.pool.close()
            self.assert_gone()


CacheAndModel.TestCase.settings = settings(max_examples=24, stateful_step_count=30, deadline=None)
TestCacheAndModel = CacheAndModel.TestCase


@pytest.mark.fuzz
def test_long_histories():
    run_state_machine_as_test(
        CacheAndModel,
        settings=settings(max_examples=500, stateful_step_count=100, deadline=None),
    )
