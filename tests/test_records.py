"""Law: records are what a selector makes of the cache's own keys, whatever happened to the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vattn import KVCache, Layout
from vattn.allocator.errors import OutOfPages
from vattn.kernels.index import Part
from vattn.records import Records

SIZE, HEADS, DIM, LAYERS = 8, 2, 16, 2
PARTS = (Part(DIM, torch.float32), Part(2, torch.float16))


def summarise(layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return keys.mean(2) + values.mean(2) + layer, torch.stack(
        [keys.amax((2, 3)), keys.amin((2, 3))], -1
    ).half()


def make(budget: int = 1 << 24, **options) -> tuple[KVCache, Records]:
    layout = Layout(LAYERS, HEADS, DIM, 2000, dtype="float32", page_bytes=4096)
    cache = KVCache(layout, slots=8, budget_bytes=budget, **options)
    return cache, Records(cache, PARTS, SIZE, summarise)


def fill(cache: KVCache, sequences: list, tokens: int, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        shape = (2, len(sequences), HEADS, tokens, DIM)
        cache.append(layer, *torch.randn(shape, generator=draw), sequences)


def assert_records(cache: KVCache, records: Records, sequences: list) -> None:
    """Every record of every sequence and layer is what its keys say now."""
    records.check()
    batch = cache.batch(sequences)
    for layer in range(LAYERS):
        records.keep(batch, layer)
        index = records.index(batch, layer)
        assert index.counts.tolist() == [s.length // SIZE for s in sequences]
        for b, sequence in enumerate(sequences):
            n = sequence.length // SIZE
            sides = (sequence.k[layer], sequence.v[layer])
            pages = [side[:, : n * SIZE].unflatten(1, (n, SIZE)) for side in sides]
            got, count = index.read(b, n)
            assert count == n
            for part, want in zip(got, summarise(layer, *pages), strict=True):
                assert torch.equal(part, want)
    records.check()


def test_prompt_and_generated_tokens_are_recorded_when_their_page_is_full():
    cache, records = make()
    with cache:
        a, b = cache.open_batch(2)
        fill(cache, [a, b], 37)
        assert_records(cache, records, [a, b])
        for step in range(3 * SIZE):
            fill(cache, [a], 1, seed=step)
            assert_records(cache, records, [a, b])


def test_a_fork_shares_records_and_keeps_its_own_from_there_on():
    cache, records = make()
    with cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 1600)
        assert_records(cache, records, [a])
        mapped = records.nbytes
        made = []
        records._summarise = lambda layer, *kv: made.append(layer) or summarise(layer, *kv)
        child = cache.fork(a, 1500)
        fill(cache, [child], 100, seed=1)
        assert_records(cache, records, [a, child])
        assert len(made) == LAYERS  # only the new ones
        assert records.nbytes <= 2 * mapped
        fill(cache, [a], 50, seed=2)
        assert_records(cache, records, [a, child])


def test_truncated_and_rewritten_rows_have_new_records():
    cache, records = make()
    with cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 400)
        assert_records(cache, records, [a])
        a.truncate(101)
        fill(cache, [a], 200, seed=5)
        assert_records(cache, records, [a])
        a.truncate(50, layer=1)
        with pytest.raises(AssertionError):  # the layers differ in length now
            assert_records(cache, records, [a])
        assert records.counts[a.slot].tolist() == [300 // SIZE, 50 // SIZE]


def test_reordered_sequences_take_their_records_along():
    cache, records = make()
    with cache:
        many = cache.open_batch(3)
        for i, sequence in enumerate(many):
            fill(cache, [sequence], 100 + 30 * i, seed=i)
        assert_records(cache, records, many)
        cache.reorder(many, [2, 0, 0])
        assert_records(cache, records, many)
        fill(cache, many, 40, seed=9)
        assert_records(cache, records, many)


def test_a_slot_of_another_tenant_shows_nothing_of_the_last():
    cache, records = make()
    with cache:
        a = cache.open(tenant="a")
        fill(cache, [a], 300)
        assert_records(cache, records, [a])
        slot = a.slot
        a.close()
        b = cache.open(slot=slot, tenant="b")
        fill(cache, [b], 40, seed=3)
        assert_records(cache, records, [b])
        for column in records.columns:
            rest = column.rows(0, slot, 40 // SIZE, 20)
            assert not rest.any(), "what the last tenant wrote is still there"


def test_records_count_in_the_budget_and_come_back():
    cache, records = make()
    with cache:
        before = cache.pool.mapped
        (a,) = cache.open_batch(1)
        fill(cache, [a], 1000)
        rows = cache.pool.mapped - before
        assert_records(cache, records, [a])
        assert cache.pool.mapped > before + rows
        assert records.nbytes == (cache.pool.mapped - before - rows) * 4096
        a.close()
        cache.trim()
        assert records.nbytes == 0
        assert cache.pool.mapped == 0
        cache.check()


def test_no_memory_for_records_is_an_error_that_changes_nothing():
    cache, records = make(budget=4096 * LAYERS * HEADS * 2 * 8)
    with cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 8 * 64)
        batch = cache.batch([a])
        with pytest.raises(OutOfPages):
            records.keep(batch, 0)
        assert not records.counts.any()
        records.check()
        a.truncate(256)
        cache.trim()
        assert_records(cache, records, [a])


def test_a_fork_without_memory_for_its_records_makes_them_anew():
    cache, records = make()
    with cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 1001)
        assert_records(cache, records, [a])

        def refuse(*args, **kwargs):
            raise OutOfPages(1, 0, 0, 4096)

        records.columns[1].arena.alias = refuse
        child = cache.fork(a)
        assert not records.counts[child.slot].any()
        assert_records(cache, records, [a, child])


def test_nothing_is_retained_where_the_cache_retains_nothing():
    cache, records = make(retain_bytes=0)
    with cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 500)
        assert_records(cache, records, [a])
        a.close()
        cache.advance()
        assert records.nbytes == 0


def test_closing_gives_everything_back():
    cache, records = make()
    with cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 500)
        assert_records(cache, records, [a])
        records.close()
        records.close()
        assert records not in cache.followers
        a.close()
        cache.trim()
        assert cache.pool.mapped == 0
        cache.check()


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["append", "truncate", "fork", "reorder", "close", "keep", "advance"]),
        st.integers(0, 1 << 16),
        st.floats(0, 1),
    ),
    max_size=30,
)


@settings(max_examples=25, deadline=None)
@given(ACTS)
def test_records_follow_any_history(acts):
    cache, records = make()
    with cache:
        live = [cache.open()]
        for step, (act, number, part) in enumerate(acts):
            one = live[number % len(live)]
            if act == "append" and one.length < 1500:
                fill(cache, [one], 1 + number % 200, seed=step)
            elif act == "truncate":
                one.truncate(int(part * one.length))
            elif act == "fork" and len(live) < 6:
                live.append(one.share(int(part * one.length)))
            elif act == "reorder":
                cache.reorder(live, np.random.default_rng(number).integers(0, len(live), len(live)))
            elif act == "close" and len(live) > 1:
                live.remove(one)
                one.close()
            elif act == "keep":
                records.keep(cache.batch([one]), number % LAYERS)
            elif act == "advance":
                cache.advance()
        assert_records(cache, records, live)
        cache.check()


def test_a_fork_takes_the_records_that_some_layers_have():
    cache, records = make()
    with cache:
        (a,) = cache.open_batch(1)
        fill(cache, [a], 400)
        records.keep(cache.batch([a]), 1)
        child = cache.fork(a, 300)
        assert records.counts[child.slot].tolist() == [0, 300 // SIZE]
        assert_records(cache, records, [a, child])


def test_a_fork_into_another_tenants_slot_owns_all_its_records():
    cache, records = make()
    with cache:
        b = cache.open(slot=0, tenant="b")
        a = cache.open(slot=1, tenant="a")
        fill(cache, [a], 1900)
        assert_records(cache, records, [a])
        a.close()
        for slot in range(2, 8):
            cache.open(slot=slot, tenant="b")
        fill(cache, [b], 300, seed=2)
        assert_records(cache, records, [b])
        child = cache.fork(b)
        assert child.slot == 1
        fill(cache, [child], 1000, seed=3)
        assert_records(cache, records, [b, child])
        for column in records.columns:
            owners = cache.pool.owners(column.arena.ids(column.arena.mapped(1)))
            assert (owners == child.tenant).all()


def test_records_of_a_slot_that_began_anew_come_back():
    cache, records = make()
    with cache:
        a = cache.open(slot=0)
        fill(cache, [a], 1900)
        assert_records(cache, records, [a])
        held = records.nbytes
        a.close()
        a = cache.open(slot=0)
        fill(cache, [a], 100)
        cache.trim()
        assert records.nbytes < held / 3
        assert_records(cache, records, [a])
        cache.check()
