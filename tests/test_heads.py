"""Ranges of their own for every KV head: what is kept stays, the rest is given back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from vattn import heads_attention
from vattn.allocator.errors import ClosedError, OutOfPages, OutOfRange
from vattn.heads import HeadCache, KeepError
from vattn.heads_order import reorder, selected
from vattn.kernels import stream
from vattn.kernels.compact import as_rows
from vattn.kernels.contract import EMPTY
from vattn.layout import LayoutError

BATCH, HEADS, DIM = 2, 3, 16


class Mirror:
    """What a layer should hold: rows of K and V and their positions, by sequence and head."""

    def __init__(self, cache: HeadCache, layer: int) -> None:
        self.cache, self.layer = cache, layer
        self.rows: dict[tuple[int, int], list[tuple[int, Tensor, Tensor]]] = {
            (b, h): [] for b in range(BATCH) for h in range(HEADS)
        }
        self.tokens = [0] * BATCH

    def append(self, n: int, counts: list[int] | None = None) -> None:
        k, v = torch.randn(2, BATCH, HEADS, n, DIM).unbind(0)
        self.cache.append(self.layer, k, v, None if counts is None else np.array(counts))
        for b, count in enumerate(counts or [n] * BATCH):
            for h in range(HEADS):
                self.rows[b, h] += [
                    (self.tokens[b] + i, k[b, h, n - count + i], v[b, h, n - count + i])
                    for i in range(count)
                ]
            self.tokens[b] += count

    def keep(self, share: float) -> None:
        longest = int(self.cache.lengths(self.layer).max())
        keep = torch.rand(BATCH, HEADS, longest) < share
        for (b, h), rows in self.rows.items():
            keep[b, h, len(rows) :] = False
            self.rows[b, h] = [row for row, stays in zip(rows, keep[b, h], strict=False) if stays]
        self.cache.keep(self.layer, *as_rows(keep))

    def check(self) -> None:
        cache = self.cache
        cache.ranges.check_laws()
        kv, positions = cache.kv(self.layer), cache.positions(self.layer)
        lengths = cache.lengths(self.layer)
        assert cache.tokens[self.layer].tolist() == self.tokens
        for (b, h), rows in self.rows.items():
            slot = int(kv.slots[b * HEADS + h])
            assert lengths[b, h] == len(rows)
            for i, (position, k, v) in enumerate(rows):
                assert positions[b, h, i] == position
                assert torch.equal(kv.key[slot, 0, i], k)
                assert torch.equal(kv.value[slot, 0, i], v)

    def attended(self, query: Tensor) -> Tensor:
        """The definition in float64, causal for the last queries."""
        groups, length = query.shape[1] // HEADS, query.shape[2]
        out = torch.empty(query.shape, dtype=torch.float64)
        for (b, h), rows in self.rows.items():
            keys, values = (torch.stack([row[i] for row in rows]).double() for i in (1, 2))
            heads = slice(h * groups, (h + 1) * groups)
            scores = query[b, heads].double() @ keys.T / DIM**0.5
            at = torch.arange(len(rows))
            last = len(rows) - length + torch.arange(length)
            scores.masked_fill_(at > last[:, None], EMPTY)
            out[b, heads] = scores.softmax(-1) @ values
        return out


@pytest.fixture(params=[1, HEADS], ids=["a head a range", "all heads"])
def cache(request: pytest.FixtureRequest):
    fresh_seed()
    each = {"heads_per_range": request.param}
    with HeadCache(2, HEADS, DIM, 512, batch=BATCH, dtype="float32", **each) as cache:
        yield cache


def test_heads_keep_tokens_of_their_own(cache: HeadCache):
    mirrors = [Mirror(cache, layer) for layer in range(2)]
    for mirror in mirrors:
        mirror.append(90)
    for share in (0.7, 0.4, 0.9):
        for mirror in mirrors:
            mirror.keep(share)
            mirror.append(1)
            mirror.append(17, [17, 5])
            mirror.check()
    lengths = cache.lengths(0)
    assert len(set(lengths.flatten().tolist())) > 2, "heads differ in what they keep"


@pytest.mark.parametrize("length", [1, 3, 40])
def test_queries_read_what_each_head_has_kept(cache: HeadCache, length: int):
    mirror = Mirror(cache, 1)
    mirror.append(120)
    mirror.keep(0.5)
    mirror.append(length)
    query = torch.randn(BATCH, 2 * HEADS, length, DIM)
    out, lse = cache.attend_lse(query, 1)
    assert (out.double() - mirror.attended(query)).abs().max() < 2e-6
    assert lse.shape == query.shape[:3]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("way", ["stream", "looked at again", "triton"])
def test_logits_by_any_way(cache: HeadCache, way: str, length: int, monkeypatch):
    mirror = Mirror(cache, 1)
    mirror.append(40)
    mirror.keep(0.6)
    mirror.append(length)
    query = torch.randn(BATCH, 2 * HEADS, length, DIM)
    out, lse = cache.attend_lse(query, 1, scale=0.3)
    if way == "looked at again":
        monkeypatch.setattr(heads_attention, "streams", lambda rows: False)
    elif way == "triton":
        monkeypatch.setattr(heads_attention, "streamed", heads_attention.launched)
    found = cache.attend_logits(query, 1, scale=0.3)
    torch.testing.assert_close(found[0], out, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], lse, atol=1e-5, rtol=0)
    for (b, h), rows in mirror.rows.items():
        keys = torch.stack([k for _, k, _ in rows])
        exact = 0.3 * query[b, 2 * h : 2 * h + 2].double() @ keys.double().T
        hidden = torch.arange(len(rows)) > len(rows) - length + torch.arange(length)[:, None]
        exact = exact.masked_fill(hidden, EMPTY).flatten(0, 1)
        line = found[2][b, h].double()
        torch.testing.assert_close(line[:, : len(rows)], exact, atol=1e-5, rtol=0)
        assert bool((line[:, len(rows) :] == EMPTY).all())


@pytest.mark.parametrize("way", ["mask", "rows", "rows, in torch"])
def test_forgetting_one_row_moves_the_last_into_its_place(cache: HeadCache, way: str, monkeypatch):
    if way == "rows, in torch":
        monkeypatch.setattr(stream, "available", lambda: "not wanted")
    mirror = Mirror(cache, 0)
    mirror.append(30)
    for _ in range(5):
        calls = dict(cache.stats().calls)
        gone = torch.tensor([[len(mirror.rows[b, h]) for h in range(HEADS)] for b in range(BATCH)])
        gone = (torch.rand(BATCH, HEADS) * gone).long()
        gone[torch.rand(BATCH, HEADS) < 0.3] = -1
        drop = torch.zeros(BATCH, HEADS, int(cache.lengths(0).max()), dtype=torch.bool)
        for (b, h), rows in mirror.rows.items():
            if gone[b, h] < 0:
                continue
            drop[b, h, gone[b, h]] = True
            rows[gone[b, h]] = rows[-1]
            rows.pop()
        if way == "mask":
            cache.forget(0, drop)
        else:
            cache.forget_one(0, gone)
        mirror.check()
        assert cache.stats().calls == calls, "no page was mapped or unmapped"


def test_one_row_goes_where_a_track_is_shorter_than_the_rows(cache: HeadCache):
    mirror = Mirror(cache, 0)
    mirror.append(5)
    cache.track(0, "late").fill_(1.0)
    mirror.append(300)
    rows = torch.zeros(BATCH, HEADS, dtype=torch.int64)
    for held in mirror.rows.values():
        held[0] = held.pop()
    cache.forget_one(0, rows)
    mirror.check()
    expected = torch.tensor([0.0, 1, 1, 1, 1] + 299 * [0.0]).expand(BATCH, HEADS, -1)
    assert torch.equal(cache.track(0, "late"), expected)
    with pytest.raises(KeepError, match=r"int32 .*must be torch\.int64"):
        cache.forget_one(0, rows.int())
    mirror.check()


@pytest.mark.parametrize("way", ["loops", "torch"])
def test_a_range_without_a_row_is_not_read(
    cache: HeadCache, way: str, monkeypatch: pytest.MonkeyPatch
):
    if way == "torch":
        monkeypatch.setattr(stream, "available", lambda: "not wanted")
    mirror = Mirror(cache, 0)
    mirror.append(6, [6, 0])
    rows = torch.tensor([[2] * HEADS, [-1] * HEADS])
    for h in range(HEADS):
        mirror.rows[0, h][2] = mirror.rows[0, h].pop()
    cache.forget_one(0, rows)
    mirror.check()


def test_many_rows_go_and_as_many_move(cache: HeadCache):
    mirror = Mirror(cache, 0)
    mirror.append(60)
    mirror.append(9, [9, 4])
    for share in (0.1, 0.5, 0.9, 1.0):
        drop = torch.rand(BATCH, HEADS, int(cache.lengths(0).max())) < share
        for (b, h), rows in mirror.rows.items():
            drop[b, h, len(rows) :] = False
            left = len(rows) - int(drop[b, h].sum())
            stay = [row for i, row in enumerate(rows) if i >= left and not drop[b, h, i]]
            here = [i for i in range(left) if drop[b, h, i]]
            for i, row in zip(here, stay, strict=True):
                rows[i] = row
            del rows[left:]
        cache.forget(0, drop)
        mirror.check()
    mirror.append(5)
    mirror.check()


def test_rows_that_another_sequence_shares_stay_its_own(cache: HeadCache):
    """Beam search aliases pages: what one sequence drops, the other still has."""
    for shrink in ("keep", "forget"):
        cache.clear(0)
        mirror = Mirror(cache, 0)
        mirror.append(300)
        reorder(cache, [0, 0])
        for h in range(HEADS):
            mirror.rows[1, h] = list(mirror.rows[0, h])
        drop = torch.zeros(BATCH, HEADS, 300, dtype=torch.bool)
        drop[0, :, 10:250:3] = True
        if shrink == "keep":
            cache.keep(0, *as_rows(~drop))
            for h in range(HEADS):
                mirror.rows[0, h] = [
                    r for r, gone in zip(mirror.rows[0, h], drop[0, h], strict=True) if not gone
                ]
        else:
            first = [cache.kv(0).key[int(s), 0, :300].clone() for s in cache.kv(0).slots[HEADS:]]
            cache.forget(0, drop)
            for h, rows in enumerate(first):
                slot = int(cache.kv(0).slots[HEADS + h])
                assert torch.equal(cache.kv(0).key[slot, 0, :300], rows)
            continue
        mirror.check()


def test_pages_come_back_and_a_prompt_holds_one_whole_layer():
    with HeadCache(4, 2, 64, 4096, dtype="float32") as cache:
        whole = 4 * 2 * 2 * 2048 * 64 * 4
        for layer in range(4):
            cache.append(layer, *torch.randn(2, 1, 2, 2048, 64).unbind(0))
            held = cache.stats().mapped_bytes
            assert held <= whole * (1 / 4 + 0.02 + 0.25 * layer / 4)
            keep = torch.zeros(1, 2, 2048, dtype=torch.bool)
            keep[0, :, ::4] = True
            cache.keep(layer, *as_rows(keep))
            cache.release()
        usage = cache.stats()
        assert usage.used_bytes == whole // 4
        assert usage.mapped_bytes <= 1.02 * usage.used_bytes


def test_crop_takes_back_what_is_still_held(cache: HeadCache):
    mirror = Mirror(cache, 0)
    mirror.append(50)
    mirror.keep(0.6)
    mirror.append(6)
    cache.crop(0, 10)
    mirror.tokens = [46] * BATCH
    for key, rows in mirror.rows.items():
        mirror.rows[key] = [row for row in rows if row[0] < 46]
    mirror.check()
    mirror.append(3)
    mirror.check()
    cache.clear(0)
    mirror = Mirror(cache, 0)
    mirror.append(9)
    mirror.check()


def test_rows_count_as_often_as_their_weights_say(cache: HeadCache):
    """Twins merged into one row with weight 2 give what the twins gave."""
    k, v = torch.randn(2, BATCH, HEADS, 20, DIM).unbind(0)
    cache.append(0, *(x.repeat_interleave(2, 2) for x in (k, v)))
    query = torch.randn(BATCH, HEADS, 1, DIM)
    before, lse = cache.attend_lse(query, 0)
    keep = torch.zeros(BATCH, HEADS, 40, dtype=torch.bool)
    keep[..., ::2] = True
    rows, counts = as_rows(keep)
    cache.keep(0, rows, counts)
    double = [x.repeat_interleave(2, 2) for x in (k, v)]
    cache.replace(0, rows, counts, *double, torch.full((BATCH, HEADS, 40), 2.0).log())
    after, merged = cache.attend_lse(query, 0)
    assert torch.allclose(after, before, atol=1e-6)
    assert torch.allclose(merged, lse, atol=1e-6)
    # Heads that keep less leave no weight behind for rows to come.
    keep = torch.rand(BATCH, HEADS, 20) < 0.5
    keep[0, 0] = True
    rows, counts = as_rows(keep)
    cache.keep(0, rows, counts)
    cache.replace(0, rows, counts, k, v, torch.full((BATCH, HEADS, 20), 3.0))
    cache.append(0, *torch.randn(2, BATCH, HEADS, 20, DIM).unbind(0))
    weights = cache.track(0, "log_weight")
    for b, h in torch.cartesian_prod(torch.arange(BATCH), torch.arange(HEADS)).tolist():
        assert (weights[b, h, : counts[b, h]] == 3.0).all()
        assert (weights[b, h, counts[b, h] :] == 0.0).all()


def test_what_cannot_be_is_refused_and_changes_nothing(cache: HeadCache):
    mirror = Mirror(cache, 0)
    mirror.append(12)
    one = torch.ones(BATCH, HEADS, dtype=torch.int64)
    with pytest.raises(KeepError, match="below each sequence's length"):
        cache.keep(0, torch.full((BATCH, HEADS, 1), 12), one)
    for wrong in (torch.ones(BATCH, HEADS, 13), torch.ones(BATCH, HEADS, 11)):
        with pytest.raises(KeepError, match="to forget"):
            cache.forget(0, wrong.bool())
    with pytest.raises(KeepError, match="count must lie"):
        cache.keep(0, torch.zeros(BATCH, HEADS, 1, dtype=torch.int64), -one)
    for tokens in (13, -1):
        with pytest.raises(KeepError, match=f"cannot crop {tokens} tokens"):
            cache.crop(0, tokens)
    with pytest.raises(LayoutError, match="fewer than the 20 queries"):
        cache.attend_lse(torch.randn(BATCH, HEADS, 20, DIM), 0)
    with pytest.raises(LayoutError, match="layer 2 does not exist"):
        cache.lengths(2)
    with pytest.raises(LayoutError, match="k and v must be"):
        cache.append(0, torch.randn(1, HEADS, 2, DIM), torch.randn(1, HEADS, 2, DIM))
    with pytest.raises(LayoutError, match="counts must be"):
        cache.append(0, *torch.randn(2, BATCH, HEADS, 2, DIM).unbind(0), np.array([3, 1]))
    with pytest.raises(OutOfRange):
        cache.append(0, *torch.randn(2, BATCH, HEADS, 501, DIM).unbind(0))
    with pytest.raises(LayoutError, match="query is"):
        cache.attend_lse(torch.randn(BATCH, 4, 1, DIM), 0)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(cache)
    with pytest.raises(LayoutError, match="batch must be"):
        HeadCache(1, 1, 8, 64, batch=0)
    mirror.check()


def test_a_budget_that_does_not_reach_changes_nothing():
    with HeadCache(1, 2, 64, 4096, dtype="float32", budget_bytes=1 << 20) as cache:
        cache.append(0, *torch.randn(2, 1, 2, 512, 64).unbind(0))
        with pytest.raises(OutOfPages):
            cache.append(0, *torch.randn(2, 1, 2, 3000, 64).unbind(0))
        assert cache.lengths(0).tolist() == [[512, 512]]
        assert cache.tokens[0].tolist() == [512]
        cache.append(0, *torch.randn(2, 1, 2, 100, 64).unbind(0))
        assert cache.positions(0)[0, 0].tolist() == list(range(612))


@pytest.mark.parametrize(("dim", "page"), [(20, 4096), (16, 8192), (80, 4096)])
@pytest.mark.parametrize("way", ["loops", "torch"])
@pytest.mark.parametrize("each", [2, 4])
def test_ranges_of_several_heads_hold_what_those_of_one_hold(
    each: int, way: str, dim: int, page: int, monkeypatch: pytest.MonkeyPatch
):
    """Whatever happens to them: the same rows, results of the same bits, and a twin of each."""
    fresh_seed()
    if way == "torch":
        monkeypatch.setattr(stream, "available", lambda: "not wanted")
    options = {"batch": 2, "page_bytes": page}
    with (
        HeadCache(2, 4, dim, 600, **options) as one,
        HeadCache(2, 4, dim, 600, heads_per_range=each, **options) as several,
    ):
        pair = (one, several)

        def do(act) -> None:
            found = [act(heads) for heads in pair]
            several.ranges.check_laws()
            for layer in range(2):
                same(one, several, layer)
            if isinstance(found[0], tuple):
                assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

        for step in range(6):
            layer, n = step % 2, (70, 1, 33, 1, 1, 2)[step]
            k, v = torch.randn(2, 2, 4, n, dim).to(torch.bfloat16).unbind(0)
            counts = np.array([n, max(1, n - 5)])
            do(lambda heads, layer=layer, k=k, v=v, c=counts: heads.append(layer, k, v, c))
            longest = int(one.lengths(layer).max())
            mask = torch.rand(2, 4, longest) < 0.7
            mask &= torch.arange(longest) < one.counts(layer)[..., None]
            mask[..., 0] = True
            if step % 3:
                do(lambda heads, layer=layer, mask=mask: heads.keep(layer, *as_rows(mask)))
            k, v = torch.randn(2, 2, 4, 1, dim).to(torch.bfloat16).unbind(0)
            do(lambda heads, layer=layer, k=k, v=v: heads.append(layer, k, v))
            query = torch.randn(2, 8, 1, dim).to(torch.bfloat16)
            do(lambda heads, layer=layer, query=query: heads.attend_logits(query, layer))
            gone = torch.randint(-1, 5, (2, 4)).clamp_max(one.counts(layer) - 1)
            do(lambda heads, layer=layer, gone=gone: heads.forget_one(layer, gone))
        do(lambda heads: reorder(heads, [1, 1]))
        do(lambda heads: heads.crop(0, 1))
        with selected(one, [1, 0, 1]) as a, selected(several, [1, 0, 1]) as b:
            assert b.ranges.heads == each
            b.ranges.check_laws()
            for layer in range(2):
                same(a, b, layer)
        do(HeadCache.release)
        do(lambda heads: heads.clear(1))


def same(a: HeadCache, b: HeadCache, layer: int) -> None:
    """Both hold the same."""
    assert (a.lengths(layer) == b.lengths(layer)).all()
    for (i, h), count in np.ndenumerate(a.lengths(layer)):
        assert torch.equal(a.positions(layer)[i, h, :count], b.positions(layer)[i, h, :count])
    x, y = a.kv(layer), b.kv(layer)
    for m, n, count in zip(x.slots.tolist(), y.slots.tolist(), x.lengths.tolist(), strict=True):
        assert torch.equal(x.key[m, 0, :count], y.key[n, 0, :count])
        assert torch.equal(x.value[m, 0, :count], y.value[n, 0, :count])


def test_pages_of_a_device_come_back_where_heads_share_them():
    """2 MiB: 8,192 rows of a head, or 1,024 tokens of eight heads."""
    held = {}
    for each in (1, 8):
        with HeadCache(2, 8, 128, 4096, heads_per_range=each, page_bytes=2 << 20) as heads:
            keep = torch.zeros(1, 8, 4096, dtype=torch.bool)
            keep[..., ::4] = True
            for layer in range(2):
                rows = torch.zeros(1, 8, 4096, 128, dtype=torch.bfloat16)
                heads.append(layer, rows, rows)
                heads.keep(layer, *as_rows(keep))
            heads.release()
            held[each] = heads.stats().mapped_bytes
    assert held == {1: 64 << 20, 8: 8 << 20}, "bytes, of 32 MiB that dense pages would take"


def test_ranges_refuse_what_does_not_fit():
    with pytest.raises(LayoutError, match="heads_per_range is 3: must divide the 8 KV heads"):
        HeadCache(1, 8, 16, 64, heads_per_range=3)
    heads = HeadCache(1, 2, 16, 64, dtype="float32", heads_per_range=2)
    query = torch.randn(1, 2, 1, 16, requires_grad=True)
    heads.append(0, query.detach(), query.detach())
    with pytest.raises(LayoutError, match="no gradients"):
        heads.attend_lse(query, 0)
    heads.close()
    for touch in (heads.kv, heads.rows, lambda layer: heads.attend_lse(query.detach(), layer)):
        with pytest.raises(ClosedError, match="make a new"):
            touch(0)
    assert heads.lengths(0).tolist() == [[1, 1]]


def test_rows_are_replaced_where_there_are_any(cache: HeadCache):
    mirror = Mirror(cache, 0)
    mirror.append(300)
    reorder(cache, [0, 0])
    for h in range(HEADS):
        mirror.rows[1, h] = list(mirror.rows[0, h])
    rows = torch.arange(300).expand(BATCH, HEADS, -1)
    k, v = torch.randn(2, BATCH, HEADS, 300, DIM).unbind(0)
    for counts in (torch.full((BATCH, HEADS), 3000), torch.full((BATCH * HEADS,), 300)):
        with pytest.raises(KeepError, match="must be what the heads hold"):
            cache.replace(0, rows, counts, k, v, None)
    with pytest.raises(KeepError, match="rows to keep are"):
        cache.keep(0, rows, torch.full((BATCH * HEADS,), 300))
    with pytest.raises(KeepError, match="to forget are a mask"):
        cache.forget(0, torch.ones(BATCH, HEADS, 300, dtype=torch.int64))
    for wrong in (torch.zeros(BATCH, HEADS, dtype=torch.int32), torch.full((BATCH, HEADS), 3000)):
        with pytest.raises(KeepError, match=r"must be torch\.int64|are not in 0"):
            cache.forget_one(0, wrong, trusted=True)
    mirror.check()
    cache.replace(0, rows, torch.full((BATCH, HEADS), 300), k, v, None)
    for (b, h), held in mirror.rows.items():
        mirror.rows[b, h] = [(at, k[b, h, i], v[b, h, i]) for i, (at, _, _) in enumerate(held)]
    mirror.check()
    cache.append(0, k[:, :, :3], v[:, :, :3], np.array([3, 1], np.uint64))
    assert cache.tokens[0].tolist() == [303, 301]


def test_a_closed_cache_is_not_copied():
    pool = HeadCache(1, 2, 16, 64, dtype="float32")
    heads = HeadCache(1, 2, 16, 64, dtype="float32", pool=pool.cache.pool)
    heads.append(0, *torch.randn(2, 1, 2, 5, 16).unbind(0))
    heads.close()
    with pytest.raises(ClosedError, match="make a new"):
        selected(heads, [0])
    pool.close()
