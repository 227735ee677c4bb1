"""What each policy promises: bounds that hold, subsets and shares, samples without bias."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vattn
from tests.attention import fresh_seed
from tests.looks import (
    BUDGET,
    DIM,
    FORCED,
    GROUPS,
    HEADS,
    KV_HEADS,
    PLAIN,
    TOKENS,
    every,
    inputs,
    look_at,
    pages,
    tokens,
)
from vattn.kernels import choose, nibbles, score, sparse
from vattn.kernels.contract import EMPTY
from vattn.kernels.selection import Selection, reference
from vattn.policies import (
    Clusters,
    Cuboid,
    Estimated,
    Exact,
    Landmark,
    MeanDeviation,
    Nibbles,
    Quest,
    Random,
    Sampled,
    Twilight,
    TwoStage,
    Window,
)
from vattn.policies.evidence import keys_themselves

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


def test_quest_never_scores_below_a_key() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        selector = Quest(page_tokens=8, dtype=dtype)
        query, key = inputs(count=160)
        look = look_at(selector, key)
        bound = selector.scores(query, look, 20)
        exact = Exact(page_tokens=1).scores(query, look, 160)
        assert bool((bound >= exact.unflatten(-1, (20, 8)).amax(-1) - 1e-5).all())


def test_mean_and_deviation_of_equal_keys_is_their_score() -> None:
    query, key = inputs(count=32)
    key[:] = key[:, :, :1]
    for selector in (MeanDeviation(dtype=torch.float32), Cuboid(dtype=torch.float32)):
        look = look_at(selector, key)
        found = selector.scores(query, look, 32 // selector.page_tokens)
        exact = score.summaries(query, keys_themselves(look), 1, scale=look.scale)
        torch.testing.assert_close(found, exact.expand_as(found))


def test_deviation_counts_by_its_weight() -> None:
    query, key = inputs(count=32)
    flat, steep = (MeanDeviation(weight=w, dtype=torch.float32) for w in (0.0, 2.0))
    a, b = (s.scores(query, look_at(s, key), 2) for s in (flat, steep))
    spread = key.unflatten(2, (2, 16)).std(3, correction=0)
    rows = query.reshape(1, KV_HEADS, GROUPS, DIM)
    torch.testing.assert_close(b - a, 2 * rows.abs() @ spread.mT * DIM**-0.5)


def test_exact_takes_what_weighs_most() -> None:
    query, key = inputs()
    for size in (1, 8):
        selector = Exact(page_tokens=size, sink_tokens=0, recent_tokens=0, budget_tokens=40)
        look = look_at(selector, key)
        selection = selector.select(query, look)
        everything = Selection(*every(look.kv.batch, TOKENS, size), size)
        _, _, mass = reference(query, look.kv, everything)
        taken = mass.gather(-1, selection.ids.long()).sum(-1)
        last = mass[..., -1:] * 0 + torch.inf  # forced: it holds the newest token
        mass = torch.cat([mass[..., :-1], last], -1)
        best = mass.sort(dim=-1, descending=True).indices[..., : 40 // size]
        mass[..., -1] = reference(query, look.kv, everything)[2][..., -1]
        torch.testing.assert_close(taken, mass.gather(-1, best).sum(-1))


def test_window_is_the_sinks_and_the_last_tokens() -> None:
    query, key = inputs(2)
    lengths = [TOKENS, 120]
    selector = Window(page_tokens=1, **PLAIN)
    selection = selector.select(query, look_at(selector, key, lengths=lengths))
    for b, count in enumerate(lengths):
        assert tokens(selection, b, 1, count) == {*range(4), *range(count - BUDGET + 4, count)}


def test_random_draws_anew_in_each_layer_and_step_and_evenly() -> None:
    query, key = inputs(count=400)
    selector = Random(page_tokens=4, sink_tokens=0, recent_tokens=0, budget_tokens=40)
    drawn = [selector.select(query, look_at(selector, key, step=s)) for s in range(200)]
    counts = torch.zeros(100)
    for selection in drawn:
        counts.index_add_(0, selection.ids[0, 0].long(), torch.ones(10))
    # 9 of 99 pages are drawn 200 times: within 5 sigma of a binomial, each of 99.
    assert float((counts[:99] - 200 * 9 / 99).abs().max()) <= 5 * (200 * 9 / 99 * 90 / 99) ** 0.5
    other = selector.select(query, look_at(selector, key, step=0, layer=1))
    assert not torch.equal(drawn[0].ids, other.ids)


def test_landmark_reads_pages_of_unlike_keys() -> None:
    query, key = inputs()
    key[:] = torch.randn(1, KV_HEADS, 1, DIM) + 0.1 * torch.randn_like(key)
    odd = [5, 11, 12]
    for page in odd:
        key[:, :, page * 8] = -key[:, :, page * 8]
    query = -query * 0  # every landmark scores alike
    selector = Landmark(outliers=3, budget_tokens=64, **FORCED)
    selection = selector.select(query, look_at(selector, key))
    assert {p * 8 for p in odd} <= tokens(selection, 0, 1, TOKENS)
    landmark = look_at(selector, key).index.parts[0][:, :, :18].float()
    exact = key[:, :, :144].unflatten(2, (18, 8)).mean(3)
    torch.testing.assert_close(landmark, exact, rtol=2e-3, atol=2e-3)


def test_clusters_take_halves_of_surviving_clusters() -> None:
    query, key = inputs(2, 300)
    lengths = [300, 200]
    selector = Clusters(page_tokens=16, keep=0.4, **PLAIN)
    look = look_at(selector, key, lengths=lengths)
    selection = selector.select(query, look)
    joined = selector.joined(score.summaries(query, look_parts(look, 0), 19, scale=look.scale))
    kept = selector.survivors(joined, query, look) > EMPTY
    assert selection.page_tokens == 8
    for b in range(2):
        for h in range(KV_HEADS):
            ids = selection.ids[b, h, : int(selection.count[b, h])].long()
            assert bool(kept[b, h, ids // 2].all())
    assert int(kept.sum(-1).max()) <= max(BUDGET // 16, int(0.4 * 19))


def look_parts(look: Any, part: int) -> Any:
    return dataclasses.replace(look.index, parts=look.index.parts[part : part + 1])


def test_clusters_at_half_score_by_their_centre() -> None:
    query, key = inputs(count=32)
    selector = Clusters(page_tokens=16, alpha=0.5, dtype=torch.float32)
    look = look_at(selector, key)
    blocks = key.unflatten(2, (2, 16))
    centre = (blocks.amin(3) + blocks.amax(3)) / 2
    exact = query.reshape(1, KV_HEADS, GROUPS, DIM) @ centre.mT * look.scale
    found = score.summaries(query, look_parts(look, 0), 2, scale=look.scale)
    torch.testing.assert_close(found, exact)


def test_neighbouring_layers_share_the_choice_itself() -> None:
    query, key = inputs()
    selector = Clusters(page_tokens=16, layers=2, **PLAIN)
    first = selector.select(query, look_at(selector, key, layer=0))
    earlier = {0: first}
    shared = selector.select(query, look_at(selector, key, layer=1, earlier=earlier))
    assert shared is first
    third = selector.select(query, look_at(selector, key, layer=2, earlier=earlier))
    assert third is not first
    alone = selector.select(query, look_at(selector, key, layer=1))
    assert torch.equal(alone.ids, first.ids)


def test_two_stages_choose_among_the_pages_of_the_first() -> None:
    query, key = inputs(2)
    base = pages(120)
    selector = TwoStage(page_tokens=8, base=base, **PLAIN)
    look = look_at(selector, key)
    selection = selector.select(query, look)
    first = base.select(query, look_at(base, key))
    for b in range(2):
        for h in range(KV_HEADS):
            assert tokens(selection, b, h, TOKENS) <= tokens(first, b, h, TOKENS)
    assert selection.count.unique().tolist() == [BUDGET]


def test_two_stages_of_all_pages_are_the_second_alone() -> None:
    query, key = inputs(2)
    selector = TwoStage(page_tokens=8, base=pages(TOKENS), code=Nibbles(), **PLAIN)
    plain = Nibbles(**PLAIN)
    found = selector.select(query, look_at(selector, key))
    exact = plain.select(query, look_at(plain, key))
    last = TOKENS // 8 * 8  # tokens of the growing page have no code yet, and are read
    for b in range(2):
        for h in range(KV_HEADS):
            a, b_ = (tokens(s, b, h, TOKENS) for s in (found, exact))
            assert {*range(last, TOKENS)} <= a
            assert len(a ^ b_) <= 2 * (TOKENS - last)


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_twilight_holds_its_share_with_as_few_tokens_as_can_be(p: float) -> None:
    query, key = inputs(2, 160)
    base = pages(136)
    options = {**FORCED, "budget_tokens": 136}
    selector = Twilight(page_tokens=8, base=base, p=p, **options)
    selection = selector.select(query, look_at(selector, key))
    first = base.select(query, look_at(base, key))
    code = Nibbles()
    estimate = code.scores(query, look_at(code, key), 160)
    for b in range(2):
        for h in range(KV_HEADS):
            there = sorted(tokens(first, b, h, 160))
            joined = choose.joined(estimate[b : b + 1, h : h + 1, :, there])[0, 0]
            forced = {t for t in there if t < 4 or t >= 152}
            free = {t: float(joined[i]) for i, t in enumerate(there) if t not in forced}
            weight = torch.tensor(list(free.values())).double().softmax(0)
            share = dict(zip(free, weight.tolist(), strict=True))
            taken = tokens(selection, b, h, 160)
            assert forced <= taken <= set(there)
            held = [share[t] for t in taken - forced]
            assert sum(held) >= p - 1e-6
            assert sum(held) - min(held) < p + 1e-6


def test_twilight_of_the_whole_share_is_its_base() -> None:
    query, key = inputs(2, 160)
    base = pages(136)
    selector = Twilight(page_tokens=8, base=base, p=1.0, **{**FORCED, "budget_tokens": 136})
    selection = selector.select(query, look_at(selector, key))
    first = base.select(query, look_at(base, key))
    for b in range(2):
        for h in range(KV_HEADS):
            assert tokens(selection, b, h, 160) == tokens(first, b, h, 160)


def test_a_sample_is_unbiased() -> None:
    torch.manual_seed(11)  # chance decides the rest: a fresh seed would fail now and then
    query, key = inputs()
    value = torch.randn_like(key)
    base = Exact(budget_tokens=48, **FORCED)
    selector = Sampled(base=base, sample=0.1, **PLAIN)
    exact = reference(query, look_at(base, key).kv, Selection(*every(1, TOKENS, 1)))[1].exp()
    totals, tops = [], []
    for step in range(300):
        look = look_at(selector, key, value, step=step)
        selection = selector.select(query, look)
        out, lse, _ = reference(query, look.kv, selection)
        totals.append(lse.exp())
        tops.append(out * lse.exp()[..., None])
    values = look_at(base, key, value).kv
    wanted = reference(query, values, Selection(*every(1, TOKENS, 1)))[0] * exact[..., None]
    assert_mean(torch.stack(totals), exact)
    assert_mean(torch.stack(tops), wanted)


def assert_mean(draws: Tensor, exact: Tensor) -> None:
    """The mean over draws is the exact number, as far as so many draws can tell."""
    sigma = draws.std(0) / len(draws) ** 0.5
    off = ((draws.mean(0) - exact) / sigma).abs()
    assert float(off.max()) <= 4
    assert float(off.square().mean().sqrt()) <= 1.6


def test_a_sample_is_as_large_as_its_error_asks() -> None:
    torch.manual_seed(12)
    query, key = inputs(count=600)
    options = {**FORCED, "budget_tokens": 500, "sample": 0.05}
    base = Exact(budget_tokens=40, **FORCED)
    exact = reference(query, look_at(base, key).kv, Selection(*every(1, 600, 1)))[1]
    sizes = []
    for error in (0.4, 0.1, 0.05):
        selector = Sampled(base=base, error=error, doubt=0.1, **options)
        missed, drawn = 0, 0
        for step in range(40):
            selection = selector.select(query, look_at(selector, key, step=step))
            lse = reference(query, look_at(base, key).kv, selection)[1]
            missed += int((((lse - exact).exp() - 1).abs() > error).sum())
            drawn += int(selection.count.sum())
        sizes.append(drawn)
        # The variance is itself estimated from a small sample: twice the doubt is allowed.
        assert missed <= 0.2 * 40 * HEADS
    assert sizes[0] < sizes[1] < sizes[2]


def test_what_is_not_read_counts_with_its_codes_and_the_mean_of_its_page() -> None:
    """The definition in float64, a row at a time."""
    selector = Estimated(page_tokens=8, **PLAIN)
    query, key, value = torch.randn(2, 4, 1, DIM), *torch.randn(2, 2, 2, TOKENS, DIM).unbind(0)
    look = look_at(selector, key, value, [TOKENS, TOKENS - 13])
    found = selector.select(query, look)
    out, lse, _ = sparse.attend(query, look.kv, found)
    codes = nibbles.unpack(*nibbles.pack(key)).double()
    for b, n in enumerate((TOKENS, TOKENS - 13)):
        for h in range(4):
            g, q = h // 2, query[b, h, 0].double() * DIM**-0.5
            read = found.ids[b, g, : found.count[b, g]].long()
            assert len(read) == selector.budget_tokens
            scores = codes[b, g, :n] @ q
            scores[read] = key[b, g, read].double() @ q
            # A page's tokens that are not read count with the mean of all its tokens.
            stands = value[b, g, :n].double().clone()
            for page in range(n // 8):
                some = slice(8 * page, 8 * page + 8)
                stands[some] = value[b, g, some].double().mean(0)
            stands[read] = value[b, g, read].double()
            assert torch.isclose(lse[b, h, 0].double(), scores.logsumexp(0), atol=1e-3)
            assert torch.allclose(out[b, h, 0].double(), scores.softmax(0) @ stands, atol=2e-3)


def test_values_that_are_alike_within_pages_are_estimated_with_exact_codes_alone() -> None:
    """The zone errs by codes and by what differs within a page: without the latter and with the
    former small it comes much nearer to the dense result than the read tokens alone."""
    selector = Estimated(page_tokens=8, **PLAIN)
    query, key = torch.randn(1, 4, 1, DIM), torch.randn(1, 2, TOKENS, DIM)
    value = torch.randn(1, 2, -(-TOKENS // 8), DIM).repeat_interleave(8, 2)[:, :, :TOKENS]
    look = look_at(selector, key, value)
    found = selector.select(query, look)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    apart = [
        (sparse.attend(query, look.kv, chosen)[0] - dense).norm() / dense.norm()
        for chosen in (found, replace(found, tail=None))
    ]
    assert apart[0] < 0.05
    assert apart[0] < apart[1] / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_gives_the_estimated_zone_what_it_needs(dtype: torch.dtype) -> None:
    """Records of V, in an arena, for prompt and generated tokens."""
    layout = vattn.Layout(1, 2, DIM, 512, dtype=str(dtype).removeprefix("torch."))
    with vattn.KVCache(layout) as cache:
        selector = Estimated(page_tokens=8, **PLAIN)
        engine = vattn.SparseAttention(cache, selector)
        sequence = cache.open()
        k, v = torch.randn(2, 1, 2, TOKENS, DIM).to(dtype).unbind(0)
        cache.append(0, k[:, :, :100], v[:, :, :100], [sequence])
        for at in range(100, TOKENS):
            cache.append(0, k[:, :, at : at + 1], v[:, :, at : at + 1], [sequence])
        query = torch.randn(1, 4, 1, DIM).to(dtype)
        out = engine.attend(query, cache.view([sequence]), 0)
        look = look_at(selector, k, v)
        right = sparse.attend(query, look.kv, selector.select(query, look))[0]
        torch.testing.assert_close(out, right)
        assert engine.activity()[0].read < engine.activity()[0].there


def test_padding_has_no_part_in_a_mean() -> None:
    """Padding ends within a page, and holds large values: the result is as without it."""
    selector = Estimated(page_tokens=8, **PLAIN)
    query, key, value = torch.randn(1, 4, 1, DIM), *torch.randn(2, 1, 2, TOKENS, DIM).unbind(0)
    apart = []
    for padding in (0.0, 1000.0):
        value[:, :, :13] = padding
        look = look_at(selector, key, value, starts=[13])
        out, _, _ = sparse.attend(query, look.kv, selector.select(query, look))
        right = torch.nn.functional.scaled_dot_product_attention(
            query, key[:, :, 13:], value[:, :, 13:], enable_gqa=True
        )
        apart.append(float((out - right).norm() / right.norm()))
    assert apart[0] == pytest.approx(apart[1], rel=1e-4)
    assert apart[1] < 1


def test_means_of_large_values_are_finite() -> None:
    selector = Estimated(page_tokens=8, **PLAIN)
    query, key = torch.randn(1, 4, 1, DIM), torch.randn(1, 2, TOKENS, DIM)
    look = look_at(selector, key, torch.full((1, 2, TOKENS, DIM), 1e5))
    out, _, _ = sparse.attend(query, look.kv, selector.select(query, look))
    assert torch.allclose(out, torch.full_like(out, 1e5), rtol=1e-2)
