"""SubGen: clusters, weights, and sums that keep their means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.attention import fresh_seed
from tests.evictor_cases import (
    dense,
    run,
    text,
)
from tests.evictor_checks import written
from tests.evictor_session import rows, session
from vattn.evictor import EvictorError
from vattn.evictors.subgen import SubGen, clusters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


def test_clusters_are_balls_around_centres_that_lie_apart(seed):
    # Whole numbers: what is equally far is so in float32, too.
    keys = torch.randint(-9, 10, (2, 3, 60, 4)).float()
    free = torch.rand(2, 3, 60) < 0.9
    for radius, most in ((0.0, 7), (8.03, 60), (100.0, 60)):
        label = clusters(keys, free, torch.full((2, 3), most), radius)
        for b in range(2):
            for h in range(3):
                mine, at = keys[b, h].double(), free[b, h].nonzero().flatten()
                apart = torch.cdist(mine, mine, compute_mode="donot_use_mm_for_euclid_dist")
                # Greedily by hand: the first free key, then the farthest from all centres.
                centres = [int(at[0])]
                while len(centres) < most:
                    far = apart[at][:, centres].amin(1)
                    if far.max() <= radius:
                        break
                    centres.append(int(at[far.argmax()]))
                between = apart[centres][:, centres] + torch.eye(len(centres)) * 1e9
                assert bool((between > radius).all())
                assert torch.equal(apart[at][:, centres].argmin(1), label[b, h, at]), f"seed {seed}"
                if most == 60:
                    assert bool((apart[at][:, centres].amin(1) <= radius).all())


@pytest.mark.parametrize("samples", [1, 3])
def test_weights_sum_to_the_tokens_and_attention_heeds_them(seed, samples):
    one = written(seed, 20)
    evictor = SubGen(budget=30, recent_tokens=8, samples=samples)
    with session(one, evictor) as (cache, play):
        for start, stop in [(0, 72), (72, 73), (73, 92), (92, 93), (93, 112)]:
            before = [(*rows(cache, i), cache.counts(i)) for i in range(2) if start]
            outs = play(start, stop)
            for layer in range(2):
                at, _, _, logs = rows(cache, layer)
                counts = cache.counts(layer)
                there = torch.arange(at.shape[2]) < counts[..., None]
                weights = (logs.exp() * there).sum(-1)
                torch.testing.assert_close(weights, torch.full((2, 2), float(stop)))
                if stop - start > 16:
                    assert bool((counts <= 30).all())
                    ends = ((at < 4) | (at >= stop - 8)) & there
                    assert bool((ends.sum(-1) == 12).all())
                    continue
                for b, h in [(0, 0), (0, 1), (1, 0), (1, 1)]:
                    _, key, value, logs = (
                        x[b, h, : before[layer][4][b, h]] for x in before[layer][:4]
                    )
                    key, value = (
                        torch.cat((old, new[layer][b, h, start:stop])).double()
                        for old, new in ((key, one.key), (value, one.value))
                    )
                    query = one.query[layer][b, 2 * h : 2 * h + 2, start].double()
                    share = (query @ key.T / 4 + F.pad(logs, (0, 1))).softmax(-1)
                    torch.testing.assert_close(
                        outs[layer][b, 2 * h : 2 * h + 2, 0].double(),
                        share @ value,
                        rtol=1e-4,
                        atol=1e-5,
                        msg=f"seed {seed}, tokens to {stop}",
                    )


def test_a_sample_of_equal_tokens_is_exact(seed):
    """Four of each token: clusters of radius 0, one sample, weight 4."""
    one = text(seed, prompt=64, steps=2)
    for side in (one.key, one.value):
        for layer in range(2):
            side[layer][:, :, 16:64] = side[layer][:, :, :16].repeat(1, 1, 3, 1)
    evictor = SubGen(budget=16, sink_tokens=0, recent_tokens=0, samples=1)
    whole = dense(one)
    for number, call in enumerate(run(one, evictor).calls):
        if call.prompt:
            assert bool((call.after.sum(-1) == 16).all())
        torch.testing.assert_close(call.out, whole[number], rtol=1e-4, atol=1e-5)


def test_sums_over_samples_have_the_right_mean(seed):
    one = text(seed, steps=0, layers=1, batch=1, sharp=1.0)
    query = one.query[0][0, 0, -1].double()
    one.value[0][..., 0] = torch.arange(72.0)  # of a cluster, the late are as likely as the early
    want = torch.stack([(one.key[0][0, 0].double() @ query / 4).exp().sum(), torch.tensor(2556.0)])
    found = []
    for draw in range(100):
        evictor = SubGen(budget=30, sink_tokens=2, recent_tokens=4, samples=2, seed=draw)
        with session(one, evictor) as (cache, play):
            play(0, 72)
            _, key, value, logs = (x[0, 0] for x in rows(cache, 0))
            many = int(cache.counts(0)[0, 0])
            logs, scores = logs[:many].double(), key[:many].double() @ query / 4
            found.append(
                torch.stack([(scores + logs).exp().sum(), logs.exp() @ value[:many, 0].double()])
            )
    sums = torch.stack(found)
    assert bool((sums.std(0) > 0).all())
    assert bool(((sums.mean(0) - want).abs() < 6 * sums.std(0) / 100**0.5).all()), f"seed {seed}"


def test_within_the_budget_results_are_those_of_a_dense_cache(seed):
    one = written(seed, 3)
    for call, out in zip(run(one, SubGen(budget=200)).calls, dense(one), strict=True):
        assert torch.equal(call.out, out), f"seed {seed}, tokens {call.start} to {call.stop}"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SubGen(samples=0), "samples must be an int >= 1, got 0"),
        (lambda: SubGen(radius=-1.0), "radius must be >= 0, got -1.0"),
        (lambda: SubGen(budget=38), "budget must be >= 40 .*, got 38"),
    ],
)
def test_what_is_out_of_range_is_named(make, says):
    with pytest.raises(EvictorError, match=says):
        make()
