"""Policies that evict by attention: what they keep is what their formula keeps in float64.

References are written from the papers' formulae over places in the text; see `tests.evictor_cases`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.attention import fresh_seed
from tests.evictor_cases import (
    Call,
    Run,
    Text,
    assert_best,
    assert_recorded,
    attention,
    dense,
    logits,
    run,
    text,
)
from tests.evictor_checks import FRESH, written
from vattn.eviction import SCORE, Eviction
from vattn.evictor import Evictor, EvictorError
from vattn.evictors.adakv import AdaKV
from vattn.evictors.cake import CAKE
from vattn.evictors.corm import CORM
from vattn.evictors.duo_attention import DuoAttention
from vattn.evictors.h2o import H2O
from vattn.evictors.keyformer import Keyformer, gumbel
from vattn.evictors.mpcache import MPCacheStatic
from vattn.evictors.observed import ObservedAttention
from vattn.evictors.pyramidkv import PyramidKV, pyramid
from vattn.evictors.simlayerkv import SimLayerKV
from vattn.evictors.tova import TOVA
from vattn.heads import HeadCache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


def note(seed: int, call: Call) -> str:
    return f"seed {seed}, layer {call.layer}, tokens {call.start} to {call.stop} "


def totals(done: Run) -> list[Tensor]:
    """A sum for each layer and token, to be added to."""
    return [torch.zeros(done.calls[0].before.shape).double() for _ in range(done.text.layers)]


def counts(call: Call, many: int) -> Tensor:
    return torch.full(call.before.shape[:2], many + call.draft)


# ---- keyformer ----------------------------------------------------------------------------------
def check_keyformer(seed: int, done: Run, evictor: Keyformer, budget: int) -> float:
    """A run against sums of softmax((logits + noise) / tau); the closest choice's margin."""
    sums, closest = totals(done), math.inf
    for number, call in enumerate(done.calls):
        step = number // done.text.layers
        tau = min(evictor.tau_init + step * evictor.tau_delta, evictor.tau_end)
        found = logits(done.text, call)
        if evictor.noise:
            batch, heads, groups, _, tokens = found.shape
            at = torch.arange(call.start, call.stop).expand(batch, -1)
            positions = torch.arange(tokens).expand(batch, heads, -1)
            found = found + gumbel(evictor.seed, call.layer, at, positions, groups).double()
        sums[call.layer] += (found / tau).softmax(-1).sum((2, 3))
        recent = call.since < int(budget * evictor.recent_share)
        scores = sums[call.layer]
        margin = assert_best(
            call.before, call.after, scores, recent, counts(call, budget), note(seed, call)
        )
        assert_recorded(call, scores, note(seed, call))
        closest = min(closest, margin)
    return closest


@pytest.mark.parametrize("fresh", FRESH)
def test_keyformer_sums_noisy_softmax(seed: int, fresh: int) -> None:
    evictor = Keyformer(budget=24, tau_delta=0.0 if fresh == 20 else 0.08, seed=seed)
    check_keyformer(seed, run(written(seed, fresh), evictor), evictor, 24)


def test_keyformer_without_noise_keeps_what_h2o_keeps(seed: int) -> None:
    told = written(seed)
    evictor = Keyformer(budget=24, noise=False, tau_delta=0.0, recent_share=0.5)
    ours, theirs = run(told, evictor), run(told, H2O(budget=24))
    margins = [check_keyformer(seed, done, evictor, 24) for done in (ours, theirs)]
    same = all(torch.equal(a.after, b.after) for a, b in zip(ours.calls, theirs.calls, strict=True))
    assert same or min(margins) < 1e-5, f"seed {seed}"


def test_keyformer_draws_by_its_seed_alone(seed: int) -> None:
    told = written(seed, batch=1)
    twice = Text(*([x.repeat(2, 1, 1, 1) for x in part] for part in (told.query, told.key)),
                 [x.repeat(2, 1, 1, 1) for x in told.value], told.prompt)  # fmt: skip
    alone, beside, other = (
        run(t, Keyformer(budget=24, seed=s)) for t, s in ((told, 1), (twice, 1), (told, 2))
    )
    for a, b in zip(alone.calls, beside.calls, strict=True):
        torch.testing.assert_close(b.score[1:], a.score)
    assert not torch.allclose(alone.calls[0].score, other.calls[0].score)


def test_noise_is_of_gumbels_distribution_and_a_function_of_its_place(seed: int) -> None:
    at, positions = torch.arange(200)[None] + 1000, torch.arange(300).expand(1, 2, -1)
    drawn = gumbel(seed, 3, at, positions, 2).double()
    many = drawn.numel()
    assert bool(drawn.isfinite().all())
    # Six standard errors; the fourth central moment of the distribution is 14.6.
    assert abs(float(drawn.mean()) - 0.5772157) < 6 * math.sqrt(1.644934 / many), seed
    assert abs(float(drawn.var()) - 1.644934) < 6 * math.sqrt((14.6114 - 1.644934**2) / many), seed
    for p in (0.1, 0.5, 0.9):
        share = float((drawn < -math.log(-math.log(p))).double().mean())
        assert abs(share - p) < 6 * math.sqrt(p * (1 - p) / many), seed
    rows = torch.randperm(300)
    shuffled = gumbel(seed, 3, at[:, 7:9], positions[:, :, rows], 2)
    assert torch.equal(shuffled.double(), drawn[:, :, :, 7:9, rows])
    others = [gumbel(seed, 4, at, positions, 2), gumbel(seed + 1, 3, at, positions, 2)]
    others += [drawn.roll(1, dim) for dim in (1, 2, 3, 4)]
    for other in others:  # layer, seed, head, group, query and key: all count
        pair = torch.stack((drawn.flatten(), other.double().flatten()))
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 6 / math.sqrt(many), seed


# ---- CORM ---------------------------------------------------------------------------------------
def last_major(told: Text, call: Call, slack: float) -> Tensor:
    """The last query of a call for which each token had 1 / i of its attention, 0 for none."""
    weights = attention(told, call)
    sees = (weights > 0).sum(-1, keepdim=True)
    at = torch.arange(call.start, call.stop)[:, None]
    return torch.where(weights >= (1 + slack) / sees, at, 0).amax((2, 3))


@pytest.mark.parametrize("fresh", FRESH)
def test_corm_keeps_what_was_major_within_the_window(seed: int, fresh: int) -> None:
    window = 12
    done = run(written(seed, fresh, sharp=4.0), CORM(window_tokens=window))
    bounds = [[x.long() for x in totals(done)] for _ in range(2)]
    for call in done.calls:
        sides = []
        for bound, slack in zip(bounds, (1e-4, -1e-4), strict=True):
            last = bound[call.layer].maximum(last_major(done.text, call, slack))
            bound[call.layer] = last
            now = call.stop - 1
            sides.append(call.before & ((call.since < window) | (last > now - window)))
        assert bool((sides[0] <= call.after).all()), note(seed, call)
        assert bool((call.after <= sides[1]).all()), note(seed, call)
        low, high = (bound[call.layer] * call.after for bound in bounds)
        assert bool(((low <= call.score) & (call.score <= high)).all()), note(seed, call)
    share = float(done.calls[-1].after.double().mean())
    assert window / done.text.tokens < share < 0.9, f"seed {seed}: nothing to tell"


def test_corm_keeps_more_with_a_longer_window(seed: int) -> None:
    told = text(seed, steps=0, sharp=4.0)
    kept = [run(told, CORM(window_tokens=w)).calls for w in (6, 12, 24, 72)]
    for small, large in pairwise(kept):
        for a, b in zip(small, large, strict=True):
            assert bool((a.after <= b.after).all()), f"seed {seed}"
            assert int(a.after.sum()) < int(b.after.sum()), f"seed {seed}"
    assert all(bool(call.after.all()) for call in kept[-1])


# ---- TOVA ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("fresh", FRESH)
def test_tova_keeps_what_the_last_query_looks_at(seed: int, fresh: int) -> None:
    done = run(written(seed, fresh), TOVA(budget=24))
    for call in done.calls:
        mean = attention(done.text, call, rows=1).mean((1, 2, 3))[:, None].expand_as(call.before)
        assert_best(
            call.before, call.after, mean, call.since < 1, counts(call, 24), note(seed, call)
        )
        assert_recorded(call, mean, note(seed, call))
        assert torch.equal(call.after, call.after[:, :1].expand_as(call.after)), note(seed, call)
        if not call.prompt:
            gone = call.before.sum(-1) - call.after.sum(-1)
            first = call.start == done.text.prompt
            assert bool((gone == fresh - (call.draft if first else 0)).all()), note(seed, call)


# ---- pyramid ------------------------------------------------------------------------------------
def test_pyramidkv_gives_deeper_layers_less(seed: int) -> None:
    layers, budget, window = 5, 30, 8
    done = run(
        text(seed, layers=layers, steps=2, prompt=90),
        PyramidKV(budget=budget, recent_tokens=window, window_tokens=window),
    )
    free = budget - window
    least = Fraction(free, 20)
    most = 2 * free - least
    held = []
    for call in done.calls[:layers]:
        exact = most - (most - least) * Fraction(call.layer, layers - 1)
        count = call.after.sum(-1)
        held.append(int(count[0, 0]))
        assert bool((count == held[-1]).all())
        assert abs(held[-1] - window - exact) < 1, f"layer {call.layer}"
        weights = attention(done.text, call, rows=window).sum(3).mean(2)
        mean = F.avg_pool1d(weights, 5, stride=1, padding=2)
        assert_best(call.before, call.after, mean, call.since < window, count, note(seed, call))
    assert sum(held) == layers * budget
    assert held == sorted(held, reverse=True)
    assert bool(all((c.after == c.before).all() for c in done.calls[layers:]))


def test_pyramid_sums_exactly_falls_and_fits(seed: int) -> None:
    of = torch.Generator().manual_seed(seed)
    for _ in range(200):
        layers, most_mean = (int(torch.randint(1, high, (), generator=of)) for high in (90, 5000))
        mean = torch.randint(0, most_mean, (3,), generator=of)
        room = mean + (mean * 3 * torch.rand(3, generator=of)).long()
        beta = 1 + 40 * float(torch.rand((), generator=of))
        told = f"seed {seed}: mean {mean.tolist()}, room {room.tolist()}, {layers} layers, {beta}"
        found = pyramid(mean, room, layers, beta)
        assert torch.equal(found.sum(0), mean * layers), told
        assert bool((found[1:] <= found[:-1]).all()), told
        assert bool((found >= 0).all() and (found <= room).all()), told
        flat = room < 2 * mean
        assert torch.equal(found[:, flat], mean[flat].expand(layers, -1)), told
        steep = ~flat & (layers > 1) & (mean > 20)
        low = torch.maximum(mean / beta, (2 * mean - room).double())
        assert bool(((found[-1] - low).abs() <= 1)[steep].all()), told


def test_pyramidkv_skips_dense_layers(seed: int) -> None:
    done = run(
        text(seed, layers=4, steps=0, prompt=90),
        PyramidKV(budget=30, recent_tokens=8, window_tokens=8, dense_layers=(1,)),
    )
    held = [int(call.after[0, 0].sum()) for call in done.calls]
    assert held[1] == 90
    assert held[0] + held[2] + held[3] == 3 * 30
    assert held[0] > held[2] > held[3]


# ---- heads together -----------------------------------------------------------------------------
@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.8, 1.0])
def test_adakv_shares_a_budget_between_heads(seed: int, safeguard: float) -> None:
    budget, window = 26, 6
    done = run(
        text(seed, kv_heads=4, steps=3),
        AdaKV(budget=budget, recent_tokens=window, window_tokens=window, safeguard=safeguard),
    )
    for call in done.calls[: done.text.layers]:
        weights = attention(done.text, call, rows=window).sum(3).mean(2)
        weights[..., call.since < window] = 0
        scores = F.max_pool1d(weights, 7, stride=1, padding=3)
        recent, count = call.since < window, call.after.sum(-1)
        assert bool((count.sum(1) == 4 * budget).all()), note(seed, call)
        assert bool((count >= safeguard * budget - 1e-9).all()), note(seed, call)
        assert_best(call.before, call.after, scores, recent, count, note(seed, call))
        # A head with more than is its by right has no token worse than any that went.
        freely = (count > max(window, math.ceil(safeguard * budget - 1e-9)))[..., None]
        kept = scores.masked_fill(~(call.after & freely & ~recent), torch.inf).amin((1, 2))
        gone = scores.masked_fill(call.after, -torch.inf).amax((1, 2))
        assert bool((kept >= gone - 1e-5).all()), note(seed, call)
        if safeguard == 1.0:
            assert bool((count == budget).all())
        elif safeguard < 0.5:
            assert len(count.unique()) > 1, f"seed {seed}: all heads are alike"


# ---- CAKE ---------------------------------------------------------------------------------------
def cake_reference(told: Text, call: Call, window: int, gamma: float) -> tuple[Tensor, ...]:
    """Scores [B, H, T], and entropy and variance [B] of the window's attention before it."""
    weights = attention(told, call, rows=window)[..., : call.stop - window]
    spread = weights.var(3)
    entropy = -(weights * weights.log()).sum((1, 2, 3, 4))
    found = (weights.mean(3) + gamma * spread).mean(2)
    found = F.pad(found, (0, told.tokens - found.shape[-1]))
    return F.avg_pool1d(found, 5, stride=1, padding=2), entropy, spread.sum((1, 2, 3))


def water(preferences: Tensor, amount: float, room: float) -> Tensor:
    """Shares min(c * preference, room) with the sum ``amount``: c by bisection."""
    low, high = 0.0, amount / float(preferences.min())
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (c * preferences).clamp(max=room).sum() < amount else (low, c)
    return (high * preferences).clamp(max=room)


@pytest.mark.parametrize(
    ("tau1", "tau2", "budget"), [(1.0, 1.0, 26), (1.6, 0.4, 26), (1.0, 0.15, 52)]
)
def test_cake_cascades_to_what_one_decision_would_keep(
    seed: int, tau1: float, tau2: float, budget: int
) -> None:
    layers, window, prompt = 4, 8, 72
    evictor = CAKE(budget=budget, recent_tokens=window, window_tokens=window, tau1=tau1, tau2=tau2)
    done = run(text(seed, layers=layers, prompt=prompt), evictor)
    wishes, count = [], []
    for call in done.calls[:layers]:
        scores, entropy, shift = cake_reference(done.text, call, window, 200.0)
        wishes.append(entropy ** (1 / tau1) * shift ** (1 / tau2))
        count.append(call.after.sum(-1))
        recent = call.since < window
        assert_best(call.before, call.after, scores, recent, count[-1], note(seed, call))
        assert_recorded(call, scores, note(seed, call))
    found = torch.stack(done.eviction._preferences).double()
    torch.testing.assert_close(found, torch.stack(wishes), rtol=1e-3, atol=0.0)
    for b in range(2):
        exact = window + water(
            torch.stack(wishes)[:, b], layers * (budget - window), prompt - window
        )
        found = torch.stack(count)[:, b]
        assert bool((found == found[:, :1]).all()), "heads of a layer are to keep the same number"
        assert int(found[:, 0].sum()) == layers * budget, f"seed {seed}"
        assert bool(((found[:, 0] - exact).abs() < 1.01).all()), f"seed {seed}"
        if budget == 52:
            assert int(found[:, 0].max()) == prompt, f"seed {seed}: no layer is full"
    for layer, rows in enumerate(done.peaks):
        assert rows <= layers * budget + layer + 1, f"seed {seed}"
    check_cake_steps(seed, done, window, count)


def check_cake_steps(seed: int, done: Run, window: int, count: list[Tensor]) -> None:
    """Each step keeps what its own queries look at, neighbours in the text included."""
    for call in done.calls[done.text.layers :]:
        weights = attention(done.text, call).mean((2, 3)) * (call.age >= window)
        scores = torch.zeros_like(weights)
        for b in range(weights.shape[0]):
            for h in range(weights.shape[1]):
                at = call.before[b, h].nonzero()[:, 0]
                line = F.pad(weights[b, h, at], (2, 2))
                scores[b, h, at] = line.unfold(0, 5, 1).mean(-1)
        many = count[call.layer]
        assert_best(call.before, call.after, scores, call.since < window, many, note(seed, call))
        assert_recorded(call, scores, note(seed, call))


def test_cake_budgets_only_shrink_and_sum_exactly(seed: int) -> None:
    of = torch.Generator().manual_seed(seed)
    evictor = CAKE(budget=64)
    for trial in range(60):
        layers = int(torch.randint(1, 40, (), generator=of))
        wishes = torch.rand(layers, 3, generator=of) ** (1 + 8 * (trial % 3))
        wishes[torch.rand(layers, generator=of) < 0.2] = 0.0
        tokens = torch.randint(1, 400, (3,), generator=of)
        target = torch.randint(32, 200, (3,), generator=of)
        told = f"seed {seed}, trial {trial}"
        before: Tensor | None = None
        for so_far in range(1, layers + 1):
            now = evictor.shares(wishes[:so_far], layers, target, tokens)
            assert before is None or bool((now[:-1] <= before).all()), told
            before = now
        assert before is not None
        assert torch.equal(before.sum(0), target * layers), told
        over = target < tokens
        assert bool((before <= tokens)[:, over].all()), told
        assert bool((before >= 32)[:, over].all()), told


# ---- observed attention -------------------------------------------------------------------------
@pytest.mark.parametrize("fresh", FRESH)
def test_observed_attention_is_the_mean_of_those_who_could_see(seed: int, fresh: int) -> None:
    done = run(written(seed, fresh), ObservedAttention(budget=24, sink_tokens=2, recent_tokens=5))
    sums = totals(done)
    for call in done.calls:
        sums[call.layer] += attention(done.text, call).sum(3).mean(2)
        mean = sums[call.layer] / (call.age + 1).clamp_min(1)
        stays = (call.since < 5) | (torch.arange(done.text.tokens) < 2)
        assert_best(call.before, call.after, mean, stays, counts(call, 24), note(seed, call))
        assert_recorded(call, mean, note(seed, call))
        assert float(call.score.max()) <= 1 + 1e-5


# ---- classes of layers and heads ----------------------------------------------------------------
@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize("window", [1, 4])
def test_simlayerkv_trims_the_lazy_layer_alone(seed: int, window: int, fresh: int) -> None:
    evictor = SimLayerKV(recent_tokens=12, threshold=0.8, window_tokens=window)
    done = run(written(seed, fresh, lazy=(1,), layers=3, sharp=1.0), evictor)
    lazy = {}
    for call in done.calls:
        ends = (call.since < 12) | (torch.arange(done.text.tokens) < 4)
        if call.prompt:
            mass = attention(done.text, call, rows=window)[..., ends].sum(-1).mean((1, 2, 3))
            lazy[call.layer] = (mass > 0.8)[:, None, None]
            assert bool(((mass - 0.8).abs() > 1e-4).all())
        expected = call.before & (ends | ~lazy[call.layer])
        assert torch.equal(call.after, expected), note(seed, call)
    assert [bool(done.calls[i].after.all()) for i in range(3)] == [False] * 3  # tokens to come
    assert [int(call.after[0, 0].sum()) for call in done.calls[:3]] == [72, 16, 72]


def ends_stay(call: Call, sinks: int, recent: int) -> Tensor:
    place = torch.arange(call.before.shape[2])
    return call.before & ((place < sinks) | (call.since < recent))


@pytest.mark.parametrize("fresh", FRESH)
def test_duo_attention_streams_in_the_other_heads(seed: int, fresh: int) -> None:
    told = written(seed, fresh, kv_heads=3, layers=2)
    how: dict[str, Any] = {"sink_tokens": 3, "recent_tokens": 9}
    gates = DuoAttention(gates=((0.9, 0.1, 0.5), (0.2, 0.3, 0.7)), **how)
    heads = DuoAttention(retrieval=((0, 0), (0, 2), (1, 2)), **how)
    for done in (run(told, gates), run(told, heads)):
        for call in done.calls:
            expected = ends_stay(call, 3, 9)
            for head in ((0, 2), (2,))[call.layer]:
                expected[:, head] = call.before[:, head]
            assert torch.equal(call.after, expected), note(seed, call)
    strict = DuoAttention(gates=((0.9, 0.1, 0.5), (0.2, 0.3, 0.7)), threshold=0.8, **how)
    kept = run(told, strict).calls[0].after.sum(-1)[0].tolist()
    assert kept == [72, 12, 12]


def test_duo_attention_refuses_another_model(seed: int) -> None:
    told = text(seed, steps=0)
    for wrong, words in (
        ({"gates": ((1.0, 1.0),)}, r"1 layers with \[2\] KV heads: the model has 2 with 2"),
        ({"gates": ((1.0, 1.0), (1.0,))}, r"2 layers with \[1, 2\] KV heads"),
        ({"retrieval": ((0, 1), (2, 0))}, "layer 2, head 0: the model has 2 layers"),
        ({"retrieval": ((0, 2),)}, "layer 0, head 2"),
    ):
        with pytest.raises(EvictorError, match=words):
            run(told, DuoAttention(**wrong))  # type: ignore[arg-type]


# ---- MPCache ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("threshold", "share"), [(0.02, 0.2), (0.08, 0.5)])
def test_mpcache_keeps_what_any_late_query_looks_at(
    seed: int, threshold: float, share: float
) -> None:
    done = run(
        text(seed, steps=3),
        MPCacheStatic(threshold=threshold, share=share, sink_tokens=1, recent_tokens=2),
    )
    for call in done.calls[: done.text.layers]:
        mean = attention(done.text, call, rows=round(72 * share)).mean((1, 2))
        most = mean.amax(1)[:, None].expand_as(call.before)
        stays = ends_stay(call, 1, 2)
        sure, maybe = (
            call.before & (stays | (most >= threshold * by)) for by in (1 + 1e-4, 1 - 1e-4)
        )
        assert bool((sure <= call.after).all()), note(seed, call)
        assert bool((call.after <= maybe).all()), note(seed, call)
        assert torch.equal(call.after, call.after[:, :1].expand_as(call.after))
        assert 3 < int(call.after[0, 0].sum()) < 72, f"seed {seed}: nothing to tell"
    for call in done.calls[done.text.layers :]:
        assert torch.equal(call.after, call.before)


def test_mpcache_asks_half_as_many_of_long_prompts() -> None:
    asked = MPCacheStatic().rows
    assert [asked(n) for n in (1, 100, 24_000, 24_001, 40_000)] == [1, 20, 4800, 2400, 4000]


# ---- all of them --------------------------------------------------------------------------------
ROOMY: list[Evictor] = [
    Keyformer(budget=94),
    CORM(window_tokens=94),
    TOVA(budget=94),
    PyramidKV(budget=94),
    PyramidKV(budget=72),
    AdaKV(budget=94),
    CAKE(budget=94),
    ObservedAttention(budget=94),
    SimLayerKV(),
    SimLayerKV(recent_tokens=2, threshold=1.0),
    DuoAttention(gates=((1.0, 1.0), (1.0, 1.0)), sink_tokens=0, recent_tokens=1),
    DuoAttention(retrieval=(), sink_tokens=4, recent_tokens=90),
    MPCacheStatic(threshold=0.0),
]


@pytest.mark.parametrize("evictor", ROOMY, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("fresh", [1, 3])
def test_with_room_for_all_nothing_goes_and_results_are_dense(
    seed: int, evictor: Evictor, fresh: int
) -> None:
    told = text(seed, fresh=fresh, steps=21 // fresh)
    done = run(told, evictor)
    assert [kept.evicted for kept in done.eviction.kept()] == [0, 0]
    for call, expected in zip(done.calls, dense(told), strict=True):
        assert torch.equal(call.out, expected), note(seed, call)


TIGHT: list[Evictor] = [
    Keyformer(budget=24),
    CORM(window_tokens=8),
    TOVA(budget=24),
    PyramidKV(budget=24, recent_tokens=8, window_tokens=8),
    AdaKV(budget=24, recent_tokens=8, window_tokens=8),
    CAKE(budget=24, recent_tokens=8, window_tokens=8),
    ObservedAttention(budget=24, recent_tokens=8),
    SimLayerKV(recent_tokens=10, threshold=0.5),
    DuoAttention(retrieval=((0, 1),), sink_tokens=2, recent_tokens=8),
    MPCacheStatic(threshold=0.05),
]


@pytest.mark.parametrize("evictor", TIGHT, ids=lambda e: type(e).__name__)
def test_a_padded_prompt_keeps_what_it_keeps_alone(seed: int, evictor: Evictor) -> None:
    told = text(seed, steps=0)
    lengths = [72, 45]

    def scores(cut: Text, counts: list[int]) -> list[Tensor]:
        """What is recorded of each head of each layer, sorted, for each sequence."""
        batch, kv_heads, tokens, dim = cut.key[0].shape
        how: dict[str, Any] = {"batch": batch, "dtype": "float32", "device": "cpu"}
        with HeadCache(cut.layers, kv_heads, dim, tokens, **how) as heads:
            eviction = Eviction(heads, evictor)
            for layer in range(cut.layers):
                eviction.append(layer, cut.key[layer], cut.value[layer], np.array(counts))
                query = cut.query[layer]
                eviction.attend(query, layer, attended=query)  # the caller attends to padding
            lines: list[list[Tensor]] = [[] for _ in range(batch)]
            for layer in range(cut.layers):
                track, held = heads.track(layer, SCORE), heads.lengths(layer)
                for b in range(batch):
                    lines[b] += [track[b, h, : held[b, h]].sort()[0] for h in range(kv_heads)]
            return [torch.cat(each) for each in lines]

    together = scores(told, lengths)
    for b, count in enumerate(lengths):
        parts = (told.query, told.key, told.value)
        alone = Text(*([x[b : b + 1, :, -count:] for x in part] for part in parts), count)
        torch.testing.assert_close(together[b], scores(alone, [count])[0], rtol=1e-3, atol=1e-4)


WRONG: list[tuple[type[Evictor], dict[str, Any], str]] = [
    (Keyformer, {"recent_share": 1.5}, "recent_share .* 1.5"),
    (Keyformer, {"tau_init": 0.0}, "tau_init 0.0"),
    (Keyformer, {"tau_init": 3.0}, "tau_init 3.0, tau_end 2.0"),
    (Keyformer, {"tau_delta": -0.1}, "tau_delta -0.1"),
    (Keyformer, {"seed": -1}, "seed .* -1"),
    (Keyformer, {"budget": 0.0}, "budget .* 0.0"),
    (CORM, {"window_tokens": 0}, "window_tokens .* 0"),
    (TOVA, {"recent_tokens": -1}, "recent_tokens .* -1"),
    (PyramidKV, {"beta": 0.5}, "beta .* 0.5"),
    (PyramidKV, {"budget": 31}, "budget must be >= 32"),
    (AdaKV, {"safeguard": 1.1}, "safeguard .* 1.1"),
    (AdaKV, {"kernel": 4}, "kernel .* 4"),
    (CAKE, {"window_tokens": 1}, "window_tokens .* 1 and 5"),
    (CAKE, {"kernel": 2}, "kernel .* 32 and 2"),
    (CAKE, {"gamma": -1.0}, "gamma .* -1.0"),
    (CAKE, {"tau1": 0.0}, "tau1 .* 0.0"),
    (CAKE, {"tau2": math.nan}, "tau2 .* nan"),
    (ObservedAttention, {"every": 0}, "every .* 0"),
    (SimLayerKV, {"sink_tokens": 0}, "sink_tokens .* 0 and 1"),
    (SimLayerKV, {"threshold": 1.2}, "threshold .* 1.2"),
    (DuoAttention, {}, "got neither"),
    (DuoAttention, {"gates": ((1.0,),), "retrieval": ()}, "got both"),
    (DuoAttention, {"gates": ((1.0, 2.0),)}, "gates .* 2.0"),
    (DuoAttention, {"retrieval": (), "threshold": -1.0}, "threshold .* -1.0"),
    (MPCacheStatic, {"threshold": 2.0}, "threshold .* 2.0"),
    (MPCacheStatic, {"share": 0.0}, "share .* 0.0"),
]


@pytest.mark.parametrize(("kind", "options", "words"), WRONG)
def test_parameters_out_of_range_are_named(
    kind: type[Evictor], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(EvictorError, match=words):
        kind(**options)


def test_a_budget_does_nothing_where_there_is_none(seed: int) -> None:
    told = text(seed, steps=3)
    for kind in (CORM, SimLayerKV, MPCacheStatic):
        few, all_ = (run(told, kind(budget=budget)).calls[-1].after for budget in (1, 1.0))
        assert torch.equal(few, all_)


def test_each_declares_itself() -> None:
    for kind in {type(evictor) for evictor in ROOMY}:
        assert kind.source.strip()
        assert kind.summary.strip()
        assert kind.caps.grain == "token"
        assert kind.caps.evidence & {"mass", "offline"}
