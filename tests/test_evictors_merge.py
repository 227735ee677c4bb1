"""Policies that merge what they drop, or hold it in rings: their sets, their sums, and what stays
exact; see `tests.evictor_cases`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.attention import fresh_seed
from tests.evictor_cases import (
    Text,
    assert_best,
    assert_recorded,
    attention,
    dense,
    run,
    text,
)
from tests.evictor_checks import FRESH, written
from tests.evictor_session import rows, session
from vattn.evictor import Evictor, EvictorError
from vattn.evictors.cascading import Cascading
from vattn.evictors.combined import Protected
from vattn.evictors.elastic import Elastic, Merging
from vattn.evictors.h2o import H2O
from vattn.evictors.knorm import Knorm
from vattn.evictors.streaming import Streaming

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


# ---- elastic ------------------------------------------------------------------------------------
def test_elastic_keeps_one_set_by_the_attention_of_all_heads(seed):
    evictor = Elastic(budget=0.3)
    for call in run(written(seed), evictor).calls:
        if call.prompt:
            score = attention(written(seed), call).mean((1, 2)).sum(1)[:, None].expand(2, 2, -1)
            counts, forced = torch.full((2, 2), 22), (torch.arange(94) < 1) | (call.age == 0)
            assert_best(call.before, call.after, score, forced, counts, f"seed {seed}")
            assert torch.equal(call.after[:, 0], call.after[:, 1])


@pytest.mark.parametrize("fresh", [1, 3])
@pytest.mark.parametrize("distance", [1, 5, 25])
def test_an_elastic_step_drops_tokens_at_a_distance_from_the_end(seed, distance, fresh):
    gone = 0
    for call in run(written(seed, fresh), Elastic(budget=30, distance=distance)).calls:
        if call.prompt:
            continue
        for b in range(2):
            at = call.before[b, 0].nonzero().flatten().tolist()
            settled = at[: len(at) - call.draft]
            # The first and the last token are never dropped.
            free = sorted(
                settled[1:-1], key=lambda t: abs(len(settled) - settled.index(t) - distance)
            )
            want = call.before[b].clone()
            want[:, free[: len(settled) - 30]] = False
            assert torch.equal(call.after[b], want), f"seed {seed}, tokens to {call.stop}"
            gone += len(settled) - 30
    assert gone > 0


def test_an_elastic_step_merges_nothing(seed):
    one = text(seed, steps=3)
    with session(one, Elastic(budget=72, every=3)) as (cache, play):
        for start, stop in one.spans():
            play(start, stop)
        at, key, value, _ = rows(cache, 0)
        assert at.shape[2] == 72
        for side, got in ((one.key, key), (one.value, value)):
            assert torch.equal(got, side[0].gather(2, at[..., None].expand(got.shape)))


def test_elastic_averages_each_token_into_the_nearest_kept(seed):
    one = text(seed, steps=0)
    with session(one, Elastic(budget=0.2)) as (cache, play):
        play(0, 72)
        for layer in range(2):
            at, key, value, logs = rows(cache, layer)
            assert at.shape == (2, 2, 14)
            assert not bool(logs.any()), "Elastic counts a merged token as one"
            for b in range(2):
                kept = sorted(at[b, 0].tolist())
                # Of two as near the earlier: min takes the first.
                of = [min(kept, key=lambda k, t=t: abs(k - t)) for t in range(72)]
                for side, got in ((one.key, key), (one.value, value)):
                    whole = side[layer][b].double()
                    for row, place in enumerate(at[b, 0].tolist()):
                        mean = whole[:, [t for t in range(72) if of[t] == place]].mean(1)
                        torch.testing.assert_close(
                            got[b, :, row].double(), mean, rtol=1e-5, atol=1e-5
                        )
                    many = torch.tensor([of.count(place) for place in at[b, 0].tolist()])
                    total = (got[b].double() * many[:, None]).sum(1)
                    torch.testing.assert_close(total, whole.sum(1), rtol=1e-4, atol=1e-4)


def test_merging_what_is_equal_changes_nothing(seed):
    """All tokens of a sequence are equal, or, for a merger that heeds keys, runs of four."""
    for evictor, run_tokens in (
        (Elastic(budget=0.4), 72),
        (Merging(Knorm(budget=30, recent_tokens=4), least=0.999), 4),
    ):
        one = text(seed, steps=0)
        for side in (*one.key, *one.value):
            for start in range(0, 72, run_tokens):
                side[:, :, start : start + run_tokens] = side[:, :, start : start + 1]
        with session(one, evictor) as (cache, play):
            play(0, 72)
            for layer in range(2):
                at, key, value, _ = rows(cache, layer)
                assert at.shape[2] < 72
                for side, got in ((one.key, key), (one.value, value)):
                    want = side[layer].gather(2, at[..., None].expand(got.shape))
                    torch.testing.assert_close(got, want)


class Close(Exception):
    """A comparison that float32 may have decided otherwise."""


def far_apart(seed: int, check: Callable[[int], None]) -> None:
    """Run a check on a text whose comparisons are not too close to call."""
    for trial in range(seed, seed + 20):
        try:
            check(trial)
        except Close:
            continue
        return
    raise AssertionError(f"twenty texts from seed {seed} on had comparisons too close to call")


# ---- merging by keys ----------------------------------------------------------------------------
def check_merging(one: Text, least: float) -> None:
    with session(one, Merging(Knorm(budget=30, recent_tokens=8), least=least)) as (cache, play):
        play(0, 72)
        for layer in range(2):
            at, key, value, _ = rows(cache, layer)
            for b, h in [(0, 0), (0, 1), (1, 0), (1, 1)]:
                keys, values = (x[layer][b, h].double() for x in (one.key, one.value))
                kept = at[b, h]
                assert torch.equal(key[b, h], one.key[layer][b, h, kept])
                units = F.normalize(keys, dim=-1)
                (like, second), (into, _) = (x.unbind(-1) for x in (units @ units[kept].T).topk(2))
                gone = sorted(set(range(72)) - set(kept.tolist()))
                gaps = torch.cat((like - second, (like - least).abs()))[
                    [*gone, *(g + 72 for g in gone)]
                ]
                if gaps.min() < 1e-5:
                    raise Close
                weight, total = torch.full((30,), math.e).double(), math.e * values[kept]
                for t in gone:
                    if like[t] >= least:
                        weight[into[t]] += like[t].exp()
                        total[into[t]] += like[t].exp() * values[t]
                want = total / weight[:, None]
                torch.testing.assert_close(value[b, h].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("least", [-1.0, 0.3])
def test_merging_adds_values_to_the_most_similar_key(seed, least):
    far_apart(seed, lambda trial: check_merging(text(trial, steps=0), least))


def test_merging_keeps_what_its_base_keeps_and_merges_at_steps(seed):
    one = written(seed, 3)
    base = Knorm(budget=30, recent_tokens=4, every=1)
    pairs = zip(run(one, base).calls, run(one, Merging(base)).calls, strict=True)
    assert all(torch.equal(a.after, b.after) for a, b in pairs)
    with session(one, Merging(base)) as (cache, play):
        play(0, 72)
        _, _, first, _ = rows(cache, 0)
        play(72, 75)
        at, _, second, _ = rows(cache, 0)
        assert at.shape[2] == 32  # two of three may yet be taken back
        old = at < 72
        assert not bool(torch.isin(second[old], first).all()), "a step merged nothing"


# ---- cascading ----------------------------------------------------------------------------------
class Rings:
    """The rings of one head, as they are drawn in the paper: a queue each."""

    def __init__(self, rings: int, window: int) -> None:
        self.rings, self.window = [deque[int]() for _ in range(rings)], window

    def arrive(self, place: int, time: int, score: Tensor) -> None:
        room = any(len(ring) < self.window for ring in self.rings)
        for i, ring in enumerate(self.rings):
            if not room and time % 2**i:
                mine, other = float(score[place]), float(score[ring[-1]])
                if abs(mine - other) < 1e-5 * max(mine, other):
                    raise Close
                if mine >= other:
                    ring[-1] = place
                return
            ring.append(place)
            if len(ring) <= self.window:
                return
            place = ring.popleft()

    def held(self) -> set[int]:
        return {place for ring in self.rings for place in ring}


def check_cascading(one: Text, evictor: Cascading, window: int, seed: int) -> None:
    rows, sinks = 9, evictor.sink_tokens
    rings = {
        (layer, b, h): Rings(evictor.rings, window)
        for layer in range(2)
        for b in range(2)
        for h in range(2)
    }
    state, came = torch.zeros(2, 2, 2, one.tokens).double(), [0, 0]
    for call in run(one, evictor).calls:
        note = f"seed {seed}, layer {call.layer}, tokens {call.start} to {call.stop}"
        asked = rows if call.prompt else None
        weights = attention(one, call, asked).mean(2)  # [B, H, r, T]
        score = state[call.layer]
        for weight in weights.unbind(2):
            score = evictor.beta * score + (1 - evictor.beta) * weight
        for b in range(2):
            for h in range(2):
                mine = rings[call.layer, b, h]
                settled = call.stop - call.draft
                for t in range(max(came[call.layer], sinks), settled):
                    mine.arrive(t, t - sinks, score[b, h])
                want = mine.held() | set(range(sinks)) | set(range(settled, call.stop))
                assert set(call.after[b, h].nonzero().flatten().tolist()) == want, note
                assert len(want) <= sinks + evictor.rings * window + call.draft
        came[call.layer] = call.stop - call.draft
        # Sums of 72 steps of float32.
        assert_recorded(call, score, note, rtol=1e-3)
        state[call.layer] = score * call.after


@pytest.mark.parametrize("beta", [0.9, 0.9999])
@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize(
    ("rings", "budget", "window"), [(1, 20, 16), (2, 21, 8), (3, 20, 5), (4, 8, 1)]
)
def test_cascading_moves_tokens_as_rings_do(seed, rings, budget, window, fresh, beta):
    evictor = Cascading(budget=budget, rings=rings, beta=beta, prompt_rows=9)
    far_apart(seed, lambda trial: check_cascading(written(trial, fresh), evictor, window, trial))


@pytest.mark.parametrize("fresh", FRESH)
def test_one_ring_is_streaming(seed, fresh):
    one = written(seed, fresh)
    ring, window = (
        run(one, evictor).calls
        for evictor in (Cascading(budget=20, rings=1), Streaming(budget=20, recent_tokens=0))
    )
    for a, b in zip(ring, window, strict=True):
        assert torch.equal(a.after, b.after), f"seed {seed}, tokens to {a.stop}"


def test_rings_reach_back_twice_as_far_each(seed):
    """W tokens, then W of 2 W, W of 4 W, W of 8 W."""
    one = text(seed, prompt=200, steps=0, layers=1, batch=1)
    after = run(one, Cascading(budget=4 + 4 * 6, rings=4)).calls[0].after[0]
    for kept in after:
        ages = 199 - kept.nonzero().flatten().flip(0)[:-4]
        assert len(ages) == 24
        for i, oldest in enumerate(ages[5::6].tolist()):
            assert abs(oldest - 6 * (2 ** (i + 1) - 1)) <= 2 ** (i + 1), f"seed {seed}, ring {i}"


# ---- all of them --------------------------------------------------------------------------------
ROOMY: dict[str, Evictor] = {
    "elastic": Elastic(budget=200),
    "elastic_share": Elastic(budget=1.0, distance=3),
    "merging": Merging(H2O(budget=200)),
    "cascading": Cascading(budget=204),
    "protected": Protected(Elastic(budget=200)),
}


@pytest.mark.parametrize("name", ROOMY)
def test_within_the_budget_results_are_those_of_a_dense_cache(seed, name):
    one = written(seed, 3)
    for call, out in zip(run(one, ROOMY[name]).calls, dense(one), strict=True):
        if name != "elastic_share" or call.prompt:
            assert torch.equal(call.out, out), f"seed {seed}, tokens {call.start} to {call.stop}"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Elastic(distance=0), "distance must be an int >= 1, got 0"),
        (lambda: Merging(H2O(), least=2.0), r"least must be a cosine, in \[-1, 1\], got 2.0"),
        (lambda: Cascading(rings=0), "rings must be an int >= 1, got 0"),
        (lambda: Cascading(prompt_rows=0), "prompt_rows must be an int >= 1, got 0"),
        (lambda: Cascading(beta=1.0), r"beta must be in \[0, 1\), got 1.0"),
        (lambda: Cascading(recent_tokens=3), "recent_tokens must be 0, got 3"),
        (lambda: Cascading(budget=7), "budget must be >= 8 .*4 rings.*, got 7"),
    ],
)
def test_what_is_out_of_range_is_named(make, says):
    with pytest.raises(EvictorError, match=says):
        make()
