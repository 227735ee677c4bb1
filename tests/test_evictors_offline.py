"""Policies that evict by weights of the model, hidden states or recordings; see
`tests.evictor_cases`."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    attention,
    run,
    text,
)
from tests.evictor_checks import BUDGET, FRESH, check, ends, played, written
from vattn.evictor import Evictor, EvictorError
from vattn.evictors.cascading import Cascading
from vattn.evictors.criticalkv import CriticalKV
from vattn.evictors.elastic import Elastic
from vattn.evictors.expected_attention import ExpectedAttention
from vattn.evictors.h2o import H2O
from vattn.evictors.knorm import Knorm
from vattn.evictors.kvzap import KVzap
from vattn.evictors.kvzip import KVzip
from vattn.evictors.lagkv import LagKV
from vattn.evictors.oracle import Oracle
from vattn.evictors.pool import PoolCounter, PoolLru
from vattn.evictors.random_tokens import RandomTokens
from vattn.evictors.subgen import SubGen

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


# ---- recordings ---------------------------------------------------------------------------------
@pytest.mark.parametrize("fresh", FRESH)
def test_the_oracle_keeps_the_largest_future(seed, fresh):
    one = written(seed, fresh)
    future = torch.rand(2, 2, 2, one.tokens)
    evictor = Oracle(budget=BUDGET, future=future)
    check(seed, run(one, evictor), evictor, BUDGET, lambda _, call: future[call.layer].double(), 0)


def test_nobody_keeps_more_of_the_future_than_the_oracle(seed):
    one = text(seed, steps=20)
    later = [Call(i, 72, 92, torch.ones(2, 2, 92).bool(), torch.empty(0)) for i in range(2)]
    future = torch.stack([attention(one, call).sum((2, 3)) for call in later])[..., :72]
    none = {"budget": 20, "sink_tokens": 0, "recent_tokens": 0}
    prompt = Text(*([x[:, :, :72] for x in s] for s in (one.query, one.key, one.value)), prompt=72)

    def mass(evictor: Evictor) -> Tensor:
        calls = run(prompt, evictor).calls
        return torch.stack([(future[c.layer] * c.after).sum(-1) for c in calls])

    most = mass(Oracle(budget=20, future=future.float()))
    others = [
        H2O(**none),
        Knorm(**none),
        RandomTokens(**none),
        PoolCounter(budget=20),
        LagKV(**none),
    ]
    for other in others:
        assert bool((mass(other) <= most + 1e-4).all()), f"seed {seed}, {type(other).__name__}"


def test_a_recording_of_another_cache_is_refused(seed):
    one = text(seed, steps=0)
    for shape in ((3, 2, 2, 72), (2, 1, 2, 72), (2, 2, 4, 72)):
        with pytest.raises(EvictorError, match=r"future is of 3|recorded were"):
            run(one, Oracle(future=torch.rand(shape)))
    for mass in ((torch.rand(2, 2, 72),), (torch.rand(2, 2, 70),) * 2):
        with pytest.raises(EvictorError, match=r"of 1 layers|of 70 tokens"):
            run(one, KVzip(mass=mass))


def test_kvzip_keeps_the_best_of_all_layers_and_heads(seed):
    one = text(seed, steps=3)
    mass = tuple(torch.rand(2, 2, one.tokens) * (1 + i) for i in range(2))
    done = run(one, KVzip(budget=20, mass=mass))
    prompt, steps = done.calls[:2], done.calls[2:]
    for b in range(2):
        scores = torch.cat([mass[c.layer][b].double().flatten() for c in prompt])
        before, after = (
            torch.cat([x[b].flatten() for x in side])
            for side in zip(*((c.before, c.after) for c in prompt), strict=True)
        )
        forced = (torch.arange(one.tokens) < 4).repeat(4)
        assert_best(before, after, scores, forced, torch.tensor(80), f"seed {seed}")
        assert len({int(c.after[b, h].sum()) for c in prompt for h in range(2)}) > 1
    assert all(torch.equal(call.before, call.after) for call in steps)


# ---- with weights of the model -------------------------------------------------------------------
def test_criticalkv_spends_half_by_attention_and_half_by_what_the_output_sees(seed):
    evictor = CriticalKV(budget=31, window_tokens=8, recent_tokens=8, sink_tokens=1)
    for trial in range(20):
        one = text(seed + trial, steps=0)
        outputs = [torch.randn(24, 64) for _ in range(2)]
        want, margin = [], math.inf
        for layer in range(2):
            call = Call(layer, 0, 72, torch.ones(2, 2, 72).bool(), torch.empty(0))
            mean = attention(one, call, 8).mean((2, 3))
            seen = F.pad(mean, (2, 2)).unfold(-1, 5, 1).mean(-1)
            weight = outputs[layer].double().view(24, 2, 2, 16)
            parts = torch.einsum("whgd,bhtd->bhgtw", weight, one.value[layer].double())
            second = (seen + 1e-4) * parts.abs().sum(-1).mean(2)
            forced = ends(call, 1, 8).expand(2, 2, 72)
            first = seen.masked_fill(forced, -1.0).sort(-1, descending=True)
            taken = forced.scatter(-1, first.indices[..., :11], True)
            rest = second.masked_fill(taken, -1.0).sort(-1, descending=True)
            for found in (first, rest):
                gap = found.values[..., 10] - found.values[..., 11]
                margin = min(margin, float((gap / found.values[..., 0]).min()))
            want.append(taken.scatter(-1, rest.indices[..., :11], True))
        if margin > 1e-5:  # no ties of float32
            break
    for layer, kept in enumerate(played(one, evictor, outputs)):
        assert torch.equal(kept, want[layer]), f"seed {seed + trial}, layer {layer}"
    with pytest.raises(EvictorError, match="outputs"):
        played(one, evictor)
    with pytest.raises(EvictorError, match=r"must be \[model width, a multiple of 32\]"):
        played(one, evictor, [torch.randn(24, 40)] * 2)


@pytest.mark.parametrize("threshold", [None, 0.3, -math.inf])
@pytest.mark.parametrize("fresh", [1, 20])
def test_kvzap_rates_hidden_states(seed, fresh, threshold):
    one = written(seed, fresh)
    # Whole numbers: no rate meets the threshold by rounding.
    hidden, weights, biases = (
        torch.randint(-4, 5, shape).float() for shape in ((2, 2, one.tokens, 6), (2, 2, 6), (2, 2))
    )
    evictor = KVzap(
        budget=BUDGET, recent_tokens=8, weights=weights, biases=biases, threshold=threshold
    )
    kept = played(one, evictor, hidden=hidden)
    rates = torch.einsum("lbtw,lhw->lbht", hidden.double(), weights.double())
    rates += biases[:, None, :, None].double()
    for layer in range(2):
        alive = torch.zeros(2, 2, one.tokens).bool()
        for start, stop in one.spans():
            alive[..., start:stop] = True
            if stop - start <= 16:
                continue  # steps have no hidden states: what comes stays
            call = Call(layer, start, stop, alive, torch.empty(0))
            ranked = rates[layer].masked_fill(ends(call, 4, 8), 1e9).masked_fill(~alive, -1e9)
            best = ranked.topk(BUDGET).indices
            passed = ranked > (-1e8 if threshold is None else max(threshold, -1e8))
            alive = (
                passed if threshold is not None else torch.zeros_like(alive).scatter(-1, best, True)
            )
        # Rates tie: as many, and the same sum.
        assert torch.equal(kept[layer].sum(-1), alive.sum(-1)), f"seed {seed}"
        a, b = ((rates[layer] * each).sum(-1) for each in (kept[layer], alive))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    with pytest.raises(EvictorError, match="hidden"):
        played(one, evictor)
    with pytest.raises(EvictorError, match=r"must be \(2, 2, 5\)"):
        played(one, evictor, hidden=hidden[..., :5])


def padded_cases(of: slice, future: Tensor, weights: Tensor) -> dict[str, Callable[[], Evictor]]:
    """Evictors that look at more than scores, with what was recorded of some sequences."""
    mass = tuple(future[:, of].unbind(0))
    return {
        "oracle": lambda: Oracle(budget=30, future=future[:, of]),
        "kvzip": lambda: KVzip(budget=30, mass=mass),
        "kvzap": lambda: KVzap(budget=30, recent_tokens=8, weights=weights),
        "expected": lambda: ExpectedAttention(budget=30, recent_tokens=8),
        "critical": lambda: CriticalKV(budget=30, recent_tokens=8, window_tokens=8),
        "lagkv": lambda: LagKV(budget=30, lag=8, every=1),
        "lru": lambda: PoolLru(budget=0.5),
        "cascading": lambda: Cascading(budget=0.5, rings=2),
        "subgen": lambda: SubGen(budget=30, recent_tokens=8),
        "elastic": lambda: Elastic(budget=0.4, distance=5),
    }


@pytest.mark.parametrize("name", list(padded_cases(slice(0), torch.rand(1, 1), torch.rand(1))))
def test_a_padded_prompt_keeps_what_it_would_alone(seed, name):
    one = text(seed, steps=2)
    future, weights = torch.rand(2, 2, 2, one.tokens), torch.randn(2, 2, 6)
    hidden, outputs = torch.randn(2, 2, one.tokens, 6), [torch.randn(24, 64)] * 2
    lengths = (72, 50)
    evictor = padded_cases(slice(None), future, weights)[name]()
    kept = played(one, evictor, outputs, hidden, lengths)
    for b, length in enumerate(lengths):
        first = 72 - length
        query, key, value = (
            [x[b : b + 1, :, first:].contiguous() for x in side]
            for side in (one.query, one.key, one.value)
        )
        evictor = padded_cases(slice(b, b + 1), future, weights)[name]()
        alone = played(
            Text(query, key, value, length), evictor, outputs, hidden[:, b : b + 1, first:]
        )
        for layer in range(2):
            mine = kept[layer][b, :, : length + 2]
            assert torch.equal(mine, alone[layer][0]), f"seed {seed}, sequence {b}, layer {layer}"


# ---- expected attention -------------------------------------------------------------------------
def rotated(x: Tensor, at: Tensor, base: float | None) -> Tensor:
    """x [..., n, D] by complex numbers: channel i and i + D / 2 are one."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    angle = at[:, None] * base ** -(torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("base", [None, 1e4])
def test_expected_attention_is_the_mean_exponential_of_a_gaussian(seed, base):
    one = text(seed, steps=0, sharp=0.5)
    evictor = ExpectedAttention(budget=24, recent_tokens=8, rope_base=base, future=16, epsilon=0.01)
    done = run(one, evictor)
    for call in done.calls:
        query, key = one.query[call.layer].double(), one.key[call.layer].double()
        plain = rotated(query, -torch.arange(72).double(), base)[:, :, 4:]
        turn = rotated(
            torch.eye(16).double()[:, None].expand(-1, 16, -1), torch.arange(72.0, 88), base
        )
        turn = turn.mean(1)  # row i: where channel i goes
        mean, apart = plain.mean(2), plain - plain.mean(2, keepdim=True)
        spread = turn.mT @ (apart.mT @ apart / 68) @ turn
        keys = key.repeat_interleave(2, 1)
        logit = (keys * (mean @ turn)[:, :, None]).sum(-1) / 4
        logit += torch.einsum("bhti,bhij,bhtj->bht", keys, spread, keys) / 32
        share = logit[..., 4:].softmax(-1).unflatten(1, (2, 2)).mean(2)
        score = F.pad(
            (share + 0.01) * one.value[call.layer][:, :, 4:].double().norm(dim=-1), (4, 0)
        )
        counts = torch.full((2, 2), 24)
        assert_best(call.before, call.after, score, ends(call, 4, 8), counts, f"seed {seed}")


def test_expected_attention_of_equal_queries_is_their_attention(seed):
    one = text(seed, steps=0)
    for layer in range(2):
        one.query[layer][:] = one.query[layer][:, :, :1]
        one.value[layer][:] = F.normalize(one.value[layer], dim=-1)
    for call in run(one, ExpectedAttention(rope_base=None, sink_tokens=0, recent_tokens=0)).calls:
        score = attention(one, call, 1).mean((2, 3))
        assert_recorded(call, score, f"seed {seed}")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Oracle(future=torch.rand(3, 4)), r"future is \(3, 4\): must be"),
        (lambda: ExpectedAttention(rope_base=1.0), "rope_base must be > 1, or None, got 1.0"),
        (lambda: ExpectedAttention(future=0), "future must be an int >= 1, got 0"),
        (lambda: ExpectedAttention(epsilon=-0.1), "epsilon must be >= 0, got -0.1"),
        (lambda: CriticalKV(kernel=4), "kernel an odd int >= 1, got 32 and 4"),
        (lambda: CriticalKV(first=1.5), r"first must be in \[0, 1\] .* got 1.5"),
        (lambda: KVzip(mass=()), "mass must be a tuple of tensors"),
        (lambda: KVzap(weights=torch.rand(2, 3)), r"weights is \(2, 3\): must be"),
        (lambda: KVzap(weights=torch.rand(2, 3, 4), biases=torch.rand(3)), r"biases is \(3,\)"),
        (lambda: KVzap(weights=torch.rand(2, 3, 4), threshold=math.nan), "threshold .* got nan"),
    ],
)
def test_what_is_out_of_range_is_named(make, says):
    with pytest.raises(EvictorError, match=says):
        make()
