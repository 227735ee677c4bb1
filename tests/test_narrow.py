"""ThinK: old tokens give up channels of K, the memory of these comes back, and the rest is as if
they were zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from tests.models import PAGE, dynamic_cache, model, prompts, run, step
from tests.places import PLACES
from vattn import hf
from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import DriverError, OutOfPages, OutOfRange
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.eviction import Eviction
from vattn.evictor import EvictorError
from vattn.evictors import Merging, Protected, SnapKV, ThinK
from vattn.heads import HeadCache, KeepError
from vattn.heads_order import reorder, selected
from vattn.keeps import KeepLog
from vattn.kernels import stream
from vattn.kernels.contract import reference
from vattn.kernels.merge import merge
from vattn.layout import LayoutError
from vattn.narrow_attention import launched, rebuilt

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, HEADS, GROUPS, DIM, RECENT = 2, 2, 3, 32, 32
DTYPES = [torch.float32, torch.bfloat16]
numba = pytest.mark.skipif(stream.available() is not None, reason=str(stream.available()))


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


def rows(tokens: int, dtype: torch.dtype, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """A query, K and V; channels of K and of queries differ in size."""
    heavy = torch.rand(2, HEADS, 1, DIM) ** 3 * 2 + 0.05
    query = torch.randn(batch, HEADS, GROUPS, tokens, DIM) * heavy[0][:, None]
    key = torch.randn(batch, HEADS, tokens, DIM) * heavy[1]
    value = torch.randn(batch, HEADS, tokens, DIM)
    return query.flatten(1, 2).to(dtype), key.to(dtype), value.to(dtype)


class Told:
    """An eviction, and all that it was told."""

    def __init__(self, policy: SnapKV, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        batch = options.pop("batch", BATCH)
        name, layers = str(dtype).removeprefix("torch."), options.pop("layers", 1)
        options = {"page_bytes": PAGE, **options}
        self.heads = HeadCache(layers, HEADS, DIM, 1024, batch=batch, dtype=name, **options)
        self.eviction, self.dtype = Eviction(self.heads, policy), dtype
        self.query, self.key, self.value = rows(0, dtype, batch)

    def read(self, tokens: int) -> Tensor:
        new = rows(tokens, self.dtype, self.heads.batch)
        self.eviction.append(0, *new[1:])
        out = self.eviction.attend(new[0], 0)
        names = ("query", "key", "value")
        for name, more in zip(names, new, strict=True):
            setattr(self, name, torch.cat([getattr(self, name), more], 2))
        return out

    def attended(self, length: int, places: Tensor, narrow: np.ndarray) -> Tensor:
        """Float64 attention of the last queries to the tokens at ``places``, of which the first
        ``narrow`` have zeros for the channels they gave up."""
        channels = self.heads.narrowed.channels(0)
        out = []
        for b in range(len(self.key)):
            for h in range(HEADS):
                at, few = places[b, h], int(narrow[b, h])
                key = self.key[b, h, at].double()
                gone = torch.ones(DIM, dtype=torch.bool)
                gone[channels[b, h]] = False
                key[:few, gone] = 0.0
                query = self.query[b, h * GROUPS : (h + 1) * GROUPS, -length:].double()
                last = self.key.shape[2] - length + torch.arange(length)
                scores = query @ key.T * DIM**-0.5
                scores = scores.masked_fill(at > last[:, None], -torch.inf)
                out.append(scores.softmax(-1) @ self.value[b, h, at].double())
        return torch.stack(out).view(len(self.key), -1, length, DIM)


def sure(heads: HeadCache) -> None:
    heads.cache.check()
    if heads.narrowed is not None:
        heads.narrowed.check()


def state(heads: HeadCache) -> list[Any]:
    """All that is held: places, K and V, and pages."""
    found: list[Any] = [heads.tokens.tolist(), heads.cache.pool.free]
    for layer in range(heads.layers):
        held = heads.held(layer)
        found += [held.tolist(), heads.lengths(layer).tolist()]
        places, kv = heads.places(layer), heads.kv(layer)
        narrowed = heads.narrowed
        if narrowed is not None and narrowed.channels(layer) is not None:
            kv = rebuilt(kv, narrowed, layer)
            sides = [side.view(*held.shape, *side.shape[2:]) for side in (kv.key, kv.value)]
        else:
            slots = kv.slots.view(held.shape)
            sides = [side[slots, 0, : int(held.max())] for side in (kv.key, kv.value)]
        for (b, h), many in np.ndenumerate(held):
            found.append(places[b, h, :many].tolist())
            found += [side[b, h, :many].numpy().tobytes() for side in sides]
    return found


# ---- what is computed ----------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_without_channels_to_drop_it_is_snapkv(budget: float):
    ours, theirs = Told(ThinK(budget=budget, channels=0.0)), Told(SnapKV(budget=budget))
    for tokens in (200, 1, 40, 3):
        torch.manual_seed(tokens)
        out = ours.read(tokens)
        torch.manual_seed(tokens)
        assert torch.equal(theirs.read(tokens), out)
    assert ours.heads.narrowed is None
    assert state(ours.heads)[2:] == state(theirs.heads)[2:]
    if budget == 1.0:
        dense = HeadCache(1, HEADS, DIM, 1024, batch=BATCH, dtype="float32", page_bytes=PAGE)
        dense.append(0, theirs.key, theirs.value)
        last = ours.query[:, :, -3:].contiguous()
        assert torch.equal(dense.attend_lse(last, 0)[0], out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [0.4, 1.0])
def test_channels_are_those_that_the_last_queries_use(seed: int, budget: float, dtype: torch.dtype):
    told = Told(ThinK(budget=budget), dtype)
    told.read(300)
    narrowed = told.heads.narrowed
    kept = narrowed.channels(0)
    # 32 - 12 = 20 channels: five times 16 bytes in float32, and 24 in bfloat16.
    assert kept.shape == (BATCH, HEADS, 20 if dtype == torch.float32 else 24)
    places = told.heads.places(0)
    for b in range(BATCH):
        for h in range(HEADS):
            query = told.query[b, h * GROUPS : (h + 1) * GROUPS, -32:].double()
            key = told.key[b, h, places[b, h]].double()
            worth = query.pow(2).sum((0, 1)) * key.pow(2).sum(0)
            stays = torch.zeros(DIM, dtype=torch.bool)
            stays[kept[b, h]] = True
            assert worth[stays].min() >= worth[~stays].max() * (1 - 1e-5), seed
            assert kept[b, h].tolist() == sorted(set(kept[b, h].tolist()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [0.4, 1.0])
def test_results_are_those_of_zeroed_channels(seed: int, budget: float, dtype: torch.dtype):
    told = Told(ThinK(budget=budget), dtype)
    told.read(300)
    held = int(300 * budget)
    for length in (1, 3, 1):
        out = told.read(length).double()
        held += length
        assert (told.heads.held(0) == held).all()
        narrow = told.heads.narrowed.counts(0)
        assert (narrow == int(300 * budget) - RECENT).all()
        want = told.attended(length, told.heads.places(0), narrow)
        assert (out - want.to(dtype).double()).norm() < 1e-3 * want.norm(), (seed, length)
        whole = told.attended(length, told.heads.places(0), narrow * 0)
        assert (whole - want).norm() > 1e-2 * want.norm(), "channels do not matter"
    sure(told.heads)


def test_scores_are_off_by_what_was_dropped_at_most(seed: int):
    told = Told(ThinK(budget=0.5))
    told.read(200)
    narrow, places = told.heads.narrowed, told.heads.places(0)
    kv, query = narrow.kv(0), torch.randn(GROUPS, DIM).double()
    for b, h in np.ndindex(BATCH, HEADS):
        few, channels = int(narrow.counts(0)[b, h]), narrow.channels(0)[b, h]
        mine = query[:, channels] @ kv.key[kv.slots[b * HEADS + h], 0, :few].double().T
        key = told.key[b, h, places[b, h, :few]].double()
        gone = torch.ones(DIM, dtype=torch.bool)
        gone[channels] = False
        bound = (query[:, None] * key).abs()[..., gone].sum(-1)
        assert ((mine - query @ key.T).abs() <= bound + 1e-9).all(), seed
        assert bound.min() > 1e-6, "nothing was dropped: the test says nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_prompt_reads_narrow_rows_and_adds_to_them(seed: int, dtype: torch.dtype):
    told = Told(ThinK(budget=0.5), dtype)
    told.read(200)
    channels = told.heads.narrowed.channels(0).clone()
    before = told.heads.places(0)[:, :, : 100 - RECENT]
    told.read(1)
    narrow = told.heads.narrowed.counts(0).copy()
    places = torch.cat([told.heads.places(0), torch.arange(201, 281).expand(BATCH, HEADS, -1)], 2)
    out = told.read(80).double()
    want = told.attended(80, places, narrow)
    # Half precision: as far off as torch's own kernel for prompts.
    assert (out - want).norm() < (1e-3 if dtype == torch.float32 else 6e-3) * want.norm(), seed
    heads = told.heads
    assert (heads.held(0) == 140).all()  # half of 281, to even
    assert (heads.narrowed.counts(0) == 140 - RECENT).all()
    assert torch.equal(heads.narrowed.channels(0), channels)
    assert torch.equal(heads.places(0)[:, :, : 100 - RECENT], before)
    assert (heads.positions(0) == torch.arange(249, 281)).all()
    out = told.read(1)
    want = told.attended(1, heads.places(0), heads.narrowed.counts(0))
    assert (out - want.to(dtype).double()).norm() < 1e-3 * want.norm(), seed
    sure(heads)


def test_without_the_compiled_kernel_results_are_the_same(monkeypatch: pytest.MonkeyPatch):
    told = Told(ThinK(budget=0.5))
    told.read(200)
    query = told.query[:, :, -3:].contiguous()
    one, lse = told.heads.attend_lse(query, 0)
    monkeypatch.setattr(stream, "available", lambda: "not today")
    other, log = told.heads.attend_lse(query, 0)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, log, rtol=1e-5, atol=1e-5)


def test_a_padded_batch_is_its_sequences_alone():
    query, key, value = rows(150, torch.float32)
    lengths, policy = (20, 150), ThinK(budget=0.5)
    many = HeadCache(1, HEADS, DIM, 1024, batch=2, dtype="float32")
    eviction = Eviction(many, policy)
    eviction.append(0, key, value, np.array(lengths))
    eviction.attend(query, 0, attended=query)
    assert many.narrowed.counts(0).tolist() == [[0] * HEADS, [75 - RECENT] * HEADS]
    step = rows(1, torch.float32)
    eviction.append(0, *step[1:])
    out = eviction.attend(step[0], 0)
    for b, length in enumerate(lengths):
        heads = HeadCache(1, HEADS, DIM, 1024, dtype="float32")
        alone = Eviction(heads, policy)
        alone.append(0, key[b : b + 1, :, -length:], value[b : b + 1, :, -length:])
        alone.attend(query[b : b + 1, :, -length:].contiguous(), 0)
        alone.append(0, *(x[b : b + 1] for x in step[1:]))
        got = alone.attend(step[0][b : b + 1].contiguous(), 0)
        torch.testing.assert_close(got, out[b : b + 1], rtol=1e-5, atol=1e-6)
        assert heads.places(0)[0].tolist() == many.places(0)[b, :, : heads.held(0).max()].tolist()


@numba
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_the_stream_kernel_takes_rows_of_two_widths(
    dtype: torch.dtype, exact: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stream, "CHUNK", 48)
    for dim, width in ((24, 32), (16, 40), (7, 16), (20, 20)):
        lengths = np.array([100, 0, 31, 257])
        key, value = (torch.randn(4, 257, n).to(dtype) for n in (dim, width))
        query = torch.randn(4, 3, 2, dim).to(dtype)
        item = dtype.itemsize
        k, v = (x.data_ptr() + np.arange(4) * x.stride(0) * item for x in (key, value))
        places = stream.Rows(
            k, v, lengths, 1, 0, dim * item, value_dim=width, value_bytes=width * item
        )
        out, lse = stream.stream_ragged(query, places, scale=0.3, causal=False, exact=exact)
        assert out.dtype == (torch.float32 if exact else dtype)
        close = 1e-5 if exact or dtype == torch.float32 else 1e-2
        for i, length in enumerate(lengths.tolist()):
            some = (x[i, None, None, :length] for x in (key, value))
            want, log = reference(query[i : i + 1], *some, scale=0.3)
            torch.testing.assert_close(out[i].double(), want[0].double(), rtol=close, atol=close)
            torch.testing.assert_close(lse[i].double(), log[0].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_the_kernels_of_a_device_join_the_same(place: str):
    query, key, value = rows(82, torch.float32)
    size = {"cpu": PAGE, "cuda": 2 << 20}[place]
    options: dict[str, Any] = {"batch": BATCH, "dtype": "float32"}
    heads = HeadCache(1, HEADS, DIM, 256, page_bytes=size, device=place, **options)
    host = HeadCache(1, HEADS, DIM, 256, page_bytes=PAGE, **options)
    for cache in (heads, host):
        eviction = Eviction(cache, ThinK(budget=0.8))
        for part in (slice(0, 80), slice(80, 82)):
            some = [x[:, :, part].contiguous().to(cache.device) for x in (query, key, value)]
            eviction.append(0, *some[1:])
            eviction.attend(some[0], 0, attended=some[0])
    assert (heads.narrowed.counts(0) == 64 - RECENT).all()
    last = query[:, :, -2:].contiguous()
    want = host.attend_lse(last, 0)
    if place == "cpu":
        parts = launched(heads.rows_of(last), heads.kv(0), heads.narrowed, 0, DIM**-0.5)
        got = merge(*(torch.stack(pair) for pair in zip(*parts, strict=True)))
    else:
        got = heads.attend_lse(last.to(place), 0)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu().view(other.shape), other, rtol=1e-4, atol=1e-5)


# ---- memory --------------------------------------------------------------------------------------
def test_the_bytes_of_dropped_channels_come_back():
    tokens, layers = 1024, 3
    with HeadCache(layers, HEADS, DIM, tokens, dtype="float32", page_bytes=PAGE) as heads:
        eviction = Eviction(heads, ThinK(budget=1.0, channels=0.5))
        whole = layers * HEADS * tokens * DIM * 4  # of K
        for layer in range(layers):
            query, key, value = rows(tokens, torch.float32, 1)
            eviction.append(layer, key, value)
            heads.release()
            before, free = heads.stats(), heads.cache.pool.free
            eviction.attend(query, layer)
            after = heads.stats()
            gone = before.mapped_bytes - after.mapped_bytes
            assert gone == (heads.cache.pool.free - free) * PAGE
            share = HEADS * (tokens - RECENT) * DIM * 4 // 2
            assert share - 4 * HEADS * PAGE <= gone <= share
        narrow = heads.narrowed
        assert narrow.width == DIM // 2
        assert after.used_bytes == 2 * whole - layers * share
        assert after.tokens == layers * HEADS * tokens
        assert after.mapped_bytes == after.used_bytes + after.wasted_bytes + after.retained_bytes
        assert after.mapped_bytes == heads.cache.pool.mapped * PAGE
        pages = int((narrow.key.arena.last - narrow.key.arena.first).sum())
        assert pages == layers * HEADS * -(-(tokens - RECENT) * DIM * 2 // PAGE)
        kept = eviction.kept()
        assert [layer.held for layer in kept] == [tokens] * layers
        assert [layer.evicted for layer in kept] == [0] * layers
        log = KeepLog(eviction)
        log.note()
        assert log.rows == [tokens]
        heads.clear(0)
        heads.release()
        assert heads.stats().mapped_bytes < after.mapped_bytes * 0.7
        pool = heads.cache.pool
    assert narrow.key.arena.closed
    assert narrow.value.arena.closed
    assert pool.closing or pool.mapped == 0
    heads.close()


def test_a_budget_that_does_not_reach_leaves_everything_as_it_was():
    """Pages are taken away one after the other; what is refused has not happened."""
    refused = 0
    for missing in range(0, 60, 3):
        told = Told(ThinK(budget=1.0), batch=1)
        told.heads.append(0, *rows(200, torch.float32, 1)[1:])
        heads = told.heads
        heads.release()
        channels = torch.arange(20).expand(1, HEADS, -1).contiguous()
        keep = torch.ones(1, HEADS, 200, dtype=torch.bool)
        old = keep.clone()
        old[..., 150:] = False
        pool = heads.cache.pool
        pool.set_budget((pool.mapped + missing) * PAGE)
        before = state(heads)
        try:
            heads.narrow(0, keep, old, channels)
        except OutOfPages:
            refused += 1
            assert state(heads) == before
            sure(heads)
            pool.set_budget(1 << 24)
            heads.narrow(0, keep, old, channels)
        sure(heads)
        assert heads.narrowed.counts(0).tolist() == [[150] * HEADS]
        assert heads.lengths(0).tolist() == [[50] * HEADS]
        heads.close()
    assert 1 < refused < 20


ACTS: dict[str, Callable[[HeadCache], object]] = {
    "narrow": lambda heads: heads.narrow(0, *masks(heads)),
    "again": lambda heads: heads.narrow(0, *masks(heads)),
    "share": lambda heads: reorder(heads, [1, 1]),
    "narrow what is shared": lambda heads: heads.narrow(0, *masks(heads)),
    "swap": lambda heads: reorder(heads, [1, 0]),
    "copy": lambda heads: selected(heads, [1, 0, 1]),
}


def masks(heads: HeadCache) -> tuple[Tensor, Tensor, Tensor]:
    """Keep two of three, and narrow all but 20."""
    longest = int(heads.lengths(0).max())
    keep = torch.arange(longest) % 3 > 0
    old = keep & (torch.arange(longest) < longest - 20)
    shape = (heads.batch, heads.kv_heads, -1)
    return keep.expand(shape), old.expand(shape), torch.arange(0, 32, 2).expand(shape)


def test_every_driver_call_fails_once_and_nothing_has_changed(seed: int):
    backend = CheckedBackend(HostBackend(PAGE))
    pool = Pool(backend, budget_bytes=400 * PAGE)
    heads = HeadCache(1, HEADS, DIM, 512, batch=2, dtype="float32", page_bytes=PAGE, pool=pool)
    failures, made = 0, None
    for name, act in ACTS.items():
        heads.append(0, *rows(70, torch.float32)[1:])
        for index in range(400):
            before = state(heads)
            backend.fail_at = backend.count + index
            try:
                made = act(heads)
                break
            except DriverError:
                failures += 1
                backend.fail_at = None
                pool.advance()
                assert state(heads)[2:] == before[2:], (seed, name, index)
                sure(heads)
        backend.fail_at = None
        sure(heads)
        if isinstance(made, HeadCache):
            made.close()
    assert failures > 20
    heads.close()
    pool.advance()
    assert pool.mapped == 0


# ---- orders, crops, clears -----------------------------------------------------------------------
@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 0], [2, 2, 1]])
def test_sequences_change_places(order: list[int]):
    told = Told(ThinK(budget=0.5), batch=3)
    told.read(200)
    heads = told.heads
    before, query = state(heads), torch.randn(3, HEADS * GROUPS, 1, DIM)
    free = heads.cache.pool.free
    twin = selected(heads, order)
    got = twin.attend_lse(query[order], 0)[0]
    expected = heads.attend_lse(query, 0)[0][order]
    assert state(heads)[2:] == before[2:]
    twin.close()
    heads.cache.pool.advance()
    assert heads.cache.pool.free == free
    reorder(heads, order)
    sure(heads)
    assert torch.equal(got, expected)
    assert torch.equal(heads.attend_lse(query[order], 0)[0], expected)
    # What follows is each one's own, though they share pages.
    eviction = told.eviction.picked(heads, order)
    more = rows(120, torch.float32, 3)
    others = [Told(ThinK(budget=0.5), batch=1) for _ in order]
    eviction.append(0, *more[1:])
    eviction.attend(more[0], 0)
    sure(heads)
    for i, (source, other) in enumerate(zip(order, others, strict=True)):
        one = [x[source : source + 1] for x in (told.query, told.key, told.value)]
        next_ = [x[i : i + 1] for x in more]
        for some in (one, next_):
            other.eviction.append(0, *some[1:])
            other.eviction.attend(some[0].contiguous(), 0)
        out = heads.attend_lse(query, 0)[0][i]
        alone = other.heads.attend_lse(query[i : i + 1], 0)[0][0]
        torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-6)


def test_crop_refuses_narrow_rows_and_takes_others_back():
    told = Told(ThinK(budget=1.0))
    told.read(100)
    told.read(3)
    heads = told.heads
    heads.crop(0, 10)
    assert heads.held(0).tolist() == [[93] * HEADS] * BATCH
    before = state(heads)
    with pytest.raises(KeepError, match="some of them are narrow rows of layer 0"):
        heads.crop(0, 26)
    assert state(heads) == before
    heads.crop(0, 25)
    assert (heads.lengths(0) == 0).all()
    told.query, told.key, told.value = (x[:, :, :68] for x in (told.query, told.key, told.value))
    out = told.read(1)
    want = told.attended(1, heads.places(0), heads.narrowed.counts(0))
    assert (out - want).abs().max() < 1e-5


def test_a_cleared_layer_starts_anew_with_other_channels():
    told = Told(ThinK(budget=0.5), layers=2)
    told.read(200)
    reorder(told.heads, [0, 0])
    first = told.heads.narrowed.channels(0).clone()
    told.heads.clear(0)
    told.eviction.clear(0)
    assert told.heads.narrowed.channels(0) is None
    assert told.heads.held(0).tolist() == [[0] * HEADS] * BATCH
    told.query, told.key, told.value = (x[:, :, :0] for x in (told.query, told.key, told.value))
    told.read(200)
    assert not torch.equal(told.heads.narrowed.channels(0), first)
    out = told.read(1)
    want = told.attended(1, told.heads.places(0), told.heads.narrowed.counts(0))
    assert (out - want).abs().max() < 1e-5, "what was shared before is written over"
    sure(told.heads)


def test_what_cannot_be_is_refused_and_changes_nothing():
    with HeadCache(2, HEADS, DIM, 100, dtype="float32") as heads:
        heads.append(0, *rows(60, torch.float32, 1)[1:])
        keep = torch.ones(1, HEADS, 60, dtype=torch.bool)
        old, channels = keep.clone(), torch.arange(8).expand(1, HEADS, -1)
        old[..., 50:] = False
        before = state(heads)
        for words, args in {
            "must ascend": (keep, old, channels.flip(-1)),
            r"within 0\.\.31": (keep, old, channels + 28),
            "channels are": (keep, old, channels[..., :0]),
            "among those to keep": (old, keep, channels),
            "are masks of": (keep[..., :59], old[..., :59], channels),
        }.items():
            with pytest.raises(KeepError, match=words):
                heads.narrow(0, *args)
        assert state(heads) == before
        heads.narrow(0, keep, old, channels)
        for layer in (0, 1):
            heads.append(layer, *rows(60, torch.float32, 1)[1:])
        before = state(heads)
        with pytest.raises(LayoutError, match="one width"):
            heads.narrow(1, keep, old, channels[..., :4])
        more = torch.ones(1, HEADS, 70, dtype=torch.bool)
        with pytest.raises(OutOfRange, match="120 narrow rows wanted"):
            heads.narrow(0, more, more, channels)
        with pytest.raises(LayoutError, match="fewer than the 80 queries"):
            heads.attend_lse(torch.randn(1, HEADS, 80, DIM), 0)
        none, logs = torch.zeros(1, HEADS, 1, dtype=torch.int64), torch.zeros(1, HEADS, 70)
        with pytest.raises(KeepError, match="stand for several"):
            heads.replace(0, none, none[..., 0], logs[..., None], logs[..., None], logs)
        assert state(heads) == before
    for wrong in (-0.1, 1.0):
        with pytest.raises(EvictorError, match="channels must be >= 0 and < 1"):
            ThinK(channels=wrong)
    with HeadCache(1, HEADS, DIM, 64) as heads, pytest.raises(EvictorError, match="one of these"):
        Eviction(heads, Merging(ThinK()))


def test_a_protected_one_narrows_as_well():
    told = Told(Protected(ThinK(budget=0.5)))
    told.read(200)
    assert told.heads.narrowed.counts(0).tolist() == [[100 - RECENT] * HEADS] * BATCH


# ---- transformers --------------------------------------------------------------------------------
def test_a_model_generates_with_narrow_rows(seed: int):
    lm, ids = model("llama"), prompts(2, 120, seed)
    cache = hf.VattnCache(lm.config, 512, page_bytes=PAGE, policy=ThinK(budget=1.0))
    got = run(lm, ids, cache)
    heads = cache.store.kept.heads
    assert [layer.held for layer in cache.kept()] == [2 * 133.0] * 2
    assert (heads.narrowed.counts(1) == 120 - RECENT).all()
    assert got.sequences.shape[1] == 134
    sure(heads)
    twin, before = copy.deepcopy(cache), state(heads)
    more = prompts(2, 4, seed + 1)
    first = step(lm, more, cache)
    assert torch.equal(step(lm, more, twin), first)
    cache.crop(-4)
    assert state(heads)[2:] == before[2:]
    with pytest.raises(KeepError, match="narrow rows"):
        cache.crop(-60)
    assert state(heads)[2:] == before[2:]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
    sure(cache.store.kept.heads)
    again = step(lm, more[[1, 0, 1, 0]], cache)
    assert (again - first[[1, 0, 1, 0]]).abs().max() < 1e-3
    cache.reset()
    run(lm, ids, cache, num_beams=2)
    sure(cache.store.kept.heads)


def test_a_model_with_narrow_rows_is_one_with_zeroed_keys(seed: int):
    """A stock cache is made to hold zeros where ours has given channels up."""
    lm, ids = model("llama"), prompts(1, 90, seed)
    ours, stock, dense = filled(lm, ids, ThinK(budget=1.0)), dynamic_cache(lm), dynamic_cache(lm)
    for cache in (stock, dense):
        step(lm, ids, cache)
    narrowed = ours.store.kept.heads.narrowed
    for layer, held in enumerate(stock.layers):
        for h, channels in enumerate(narrowed.channels(layer)[0].tolist()):
            gone = [c for c in range(DIM) if c not in channels]
            held.keys[0, h, : 90 - RECENT, gone] = 0.0
    apart, unlike = [], []
    for token in ids[:, :5].split(1, 1):
        got, want, other = (step(lm, token, cache) for cache in (ours, stock, dense))
        apart.append((got - want).abs().max().item())
        unlike.append((other - want).abs().max().item())
    assert max(apart) < 1e-3, (seed, apart)
    assert max(unlike) > 20 * max(apart), (seed, unlike)


def test_a_crop_that_one_layer_refuses_cuts_none():
    lm, ids = model("llama"), prompts(1, 90)
    cache = filled(lm, ids, ThinK(budget=1.0, dense_layers=(0,)))
    heads = cache.store.kept.heads
    assert heads.narrowed.counts(0).tolist() == [[0, 0]]
    before = state(heads)
    with pytest.raises(KeepError, match="narrow rows of layer 1"):
        cache.crop(-40)
    assert state(heads) == before
    assert cache.get_seq_length() == 90
    cache.crop(-20)
    assert heads.held(0).tolist() == heads.held(1).tolist() == [[70, 70]]


def test_grad_modes_may_change_between_steps():
    lm, ids = model("llama"), prompts(2, 60)
    found = []
    for modes in ([torch.no_grad] * 4, [torch.inference_mode, torch.no_grad] * 2):
        cache = hf.VattnCache(lm.config, 512, page_bytes=PAGE, policy=ThinK(budget=0.7))
        for mode, tokens in zip(modes, (ids, ids[:, :1], ids[:, :40], ids[:, :2]), strict=True):
            with mode():
                logits = lm(tokens, past_key_values=cache).logits
        assert (cache.store.kept.heads.narrowed.counts(0) == 71 - RECENT).all()
        cache.reorder_cache(torch.tensor([1, 1]))
        found.append((logits.clone(), step(lm, ids[:, :1], cache)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def filled(lm: Any, ids: Tensor, policy: SnapKV) -> hf.VattnCache:
    cache = hf.VattnCache(lm.config, 512, page_bytes=PAGE, policy=policy)
    step(lm, ids, cache)
    return cache
