"""Policies that evict by keys, values or a pool's history: what they keep is what their formula
keeps in float64, over places in the text; see `tests.evictor_cases`."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.attention import fresh_seed
from tests.evictor_cases import (
    Call,
    Text,
    assert_best,
    assert_recorded,
    dense,
    logits,
    run,
    text,
)
from tests.evictor_checks import BUDGET, FRESH, check, ends, evictions, written
from vattn.evictor import Evictor, EvictorError
from vattn.evictors.keydiff import KeyDiff
from vattn.evictors.knorm import Knorm
from vattn.evictors.lagkv import LagKV
from vattn.evictors.pool import PoolCounter, PoolFifo, PoolLru
from vattn.evictors.random_tokens import RandomTokens
from vattn.evictors.streaming import SlidingWindow

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


# ---- keys and values ----------------------------------------------------------------------------
def stirred(x: int) -> int:
    word = (1 << 32) - 1
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & word
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & word
    return x ^ (x >> 16)


def lots(text: Text, call: Call, seed: int = 7) -> Tensor:
    batch, heads, tokens, _ = text.key[0].shape
    of = [stirred(stirred(stirred(seed) + call.layer) + h & (1 << 32) - 1) for h in range(heads)]
    rows = [[stirred(at + t & (1 << 32) - 1) for t in range(tokens)] for at in of]
    return torch.tensor(rows, dtype=torch.float64).expand(batch, -1, -1)


def short(text: Text, call: Call) -> Tensor:
    return -text.key[call.layer].double().square().sum(-1).sqrt()


def unlike(text: Text, call: Call) -> Tensor:
    keys = text.key[call.layer].double()
    units = keys / keys.norm(dim=-1, keepdim=True)
    mean = (units * call.before[..., None]).sum(2, keepdim=True)
    return -F.cosine_similarity(keys, mean, dim=-1)


@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize(
    ("evictor", "score"),
    [
        (RandomTokens(budget=BUDGET, seed=7, recent_tokens=8), lots),
        (Knorm(budget=BUDGET, recent_tokens=8, every=1), short),
        (KeyDiff(budget=BUDGET, recent_tokens=8, every=3), unlike),
    ],
    ids=["random", "knorm", "keydiff"],
)
def test_keeps_the_best_by_its_formula(seed, fresh, evictor, score):
    check(seed, run(written(seed, fresh), evictor), evictor, BUDGET, score, 8)


def test_random_is_even_over_places_and_differs_by_head_and_layer(seed):
    one = text(seed, steps=0)
    kept = torch.zeros(2, 2, 72)
    for i in range(30):
        evictor = RandomTokens(budget=18, seed=i, sink_tokens=0, recent_tokens=0)
        calls = run(one, evictor).calls
        kept += torch.stack([call.after.float().mean(0) for call in calls])
        assert torch.equal(calls[0].after[0], calls[0].after[1]), "sequences draw the same"
        assert not torch.equal(calls[0].after, calls[1].after)
        assert not torch.equal(calls[0].after[0, 0], calls[0].after[0, 1])
    # 120 draws with probability 1/4 for each place: 30 +- 4.7.
    assert kept.sum((0, 1)).min() > 8
    assert kept.sum((0, 1)).max() < 52


# ---- LagKV --------------------------------------------------------------------------------------
def lag_parts(text: Text, call: Call, b: int, h: int, lag: int) -> list[tuple[Tensor, Tensor]]:
    """Places and scores of each part that has a whole next one, behind four sinks."""
    at = call.before[b, h].nonzero().flatten()[4:]
    parts = [at[i : i + lag] for i in range(0, len(at) - lag + 1, lag)]
    found = []
    for own, after in pairwise(parts):
        score = torch.zeros(lag, dtype=torch.float64)
        for side in (text.key, text.value):
            rows, ahead = (side[call.layer][b, h, x].double() for x in (own, after))
            low, high = ahead.min(0).values, ahead.max(0).values
            score += ((rows - low) / (high - low)).std(-1).softmax(-1) / 2
        found.append((own, score))
    return found


@pytest.mark.parametrize("across", [False, True], ids=["ranks", "scores"])
@pytest.mark.parametrize("budget", [BUDGET, 14], ids=["roomy", "tight"])
@pytest.mark.parametrize("fresh", FRESH)
def test_lagkv_keeps_of_each_part_what_varies_most(seed, fresh, budget, across):
    # A step that drops one token leaves rows in another order than the text's.
    evictor = LagKV(budget=budget, lag=8, across=across, every=1 if fresh == 1 else 3)
    done = run(written(seed, fresh), evictor)
    for call, now, note in evictions(done, evictor, seed):
        if not now:
            continue
        for b in range(2):
            for h in range(2):
                before, after = call.before[b, h], call.after[b, h]
                parts = lag_parts(done.text, call, b, h, 8)
                scores = 2 + torch.arange(len(before)).double()  # the newest of those not scored
                for number, (at, score) in enumerate(parts):
                    # By rank, parts keep as many; of equal ranks the earlier part's stays.
                    rank = score.argsort().argsort().double() / 8 - number / 1000
                    scores[at] = score if across else rank
                many = torch.tensor(budget + call.draft)
                forced = ends(call, 4, 0)
                if across:
                    assert_best(before, after, scores, forced, many, note)
                    continue
                ranked = scores.masked_fill(forced, 1e6).masked_fill(~before, -1e6)
                want = torch.zeros_like(before).scatter(0, ranked.topk(int(many)).indices, True)
                rest = before.clone()
                for at, score in parts:
                    kept = after[at]
                    everything = torch.ones_like(kept)
                    assert_best(everything, kept, score, ~everything, want[at].sum(), note)
                    rest[at] = False
                assert torch.equal(after & rest, want & before & rest), note


# ---- the pool -----------------------------------------------------------------------------------
def whole_numbers(text: Text) -> Text:
    """A text whose logits are exact in float32, so that no threshold is met by rounding."""
    query, key = ([x.round().clamp(-3, 3) for x in side] for side in (text.query, text.key))
    return replace(text, query=query, key=key)


@pytest.mark.parametrize("half", [True, False], ids=["old_half", "any"])
@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize("kind", [PoolLru, PoolCounter])
def test_pools_keep_what_was_used_last_or_most(seed, kind, fresh, rows, half):
    evictor = kind(budget=BUDGET, alpha=4.1, prompt_rows=rows, old_half=half)
    done = run(whole_numbers(written(seed, fresh)), evictor)
    state = torch.zeros(2, *done.calls[0].before.shape).double()
    places = torch.arange(done.text.tokens).double()
    for call, _, note in evictions(done, evictor, seed):
        score = state[call.layer]
        asked = rows if call.prompt else None
        if kind is PoolLru:
            score = score.maximum(places * call.before)
        if asked != 0:
            found = logits(done.text, call, asked)
            used = (found > found.amax(-1, keepdim=True) - 4.1).any(2)  # [B, H, r, T]
            stamps = torch.arange(call.stop - used.shape[2], call.stop)[:, None].double()
            if kind is PoolLru:
                score = score.maximum((used * stamps).amax(2))
            else:
                score = score + used.sum(2)
        forced = ends(call, 0, BUDGET // 2 if half else 0)
        counts = torch.full((2, 2), BUDGET + call.draft)
        assert_best(call.before, call.after, score, forced, counts, note)
        assert_recorded(call, score, note, rtol=0)
        state[call.layer] = score * call.after


def test_fifo_is_a_sliding_window_and_a_pool_never_exceeds_its_capacity(seed):
    one = written(seed)
    fifo, window = (
        run(one, evictor) for evictor in (PoolFifo(budget=20), SlidingWindow(budget=20))
    )
    for a, b in zip(fifo.calls, window.calls, strict=True):
        assert torch.equal(a.after, b.after)
    for kind in (PoolLru, PoolCounter):
        for call in run(one, kind(budget=20)).calls:
            assert int(call.after.sum(-1).max()) == 20


# ---- all of them --------------------------------------------------------------------------------
ROOMY: dict[str, Evictor] = {
    "random": RandomTokens(budget=200),
    "knorm": Knorm(budget=200, every=1),
    "keydiff": KeyDiff(budget=200, every=1),
    "lagkv": LagKV(budget=200, lag=8, every=1),
    "fifo": PoolFifo(budget=200),
    "lru": PoolLru(budget=200),
    "counter": PoolCounter(budget=200),
}


@pytest.mark.parametrize("name", ROOMY)
def test_within_the_budget_results_are_those_of_a_dense_cache(seed, name):
    one = written(seed, 3)
    for call, out in zip(run(one, ROOMY[name]).calls, dense(one), strict=True):
        assert torch.equal(call.out, out), f"seed {seed}, tokens {call.start} to {call.stop}"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RandomTokens(seed=-1), "seed must be an int in .*, got -1"),
        (lambda: Knorm(every=0), "every must be an int >= 1, got 0"),
        (lambda: LagKV(lag=0), "lag must be an int >= 1, got 0"),
        (lambda: PoolLru(alpha=-1.0), "alpha must be >= 0, got -1.0"),
        (lambda: PoolCounter(alpha=math.nan), "alpha must be >= 0, got nan"),
        (lambda: PoolCounter(prompt_rows=-2), "prompt_rows must be an int >= 0, got -2"),
    ],
)
def test_what_is_out_of_range_is_named(make, says):
    with pytest.raises(EvictorError, match=says):
        make()
