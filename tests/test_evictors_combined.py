"""Evictors made of evictors: what they add, and that they change nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.attention import fresh_seed
from tests.evictor_cases import (
    dense,
    run,
    text,
)
from tests.evictor_checks import BUDGET, FRESH, assert_same, ends, played, written
from vattn.evictor import Evictor, EvictorError
from vattn.evictors.adakv import AdaKV
from vattn.evictors.cake import CAKE
from vattn.evictors.combined import PerLayer, Protected, Wrapper
from vattn.evictors.corm import CORM
from vattn.evictors.h2o import H2O
from vattn.evictors.knorm import Knorm
from vattn.evictors.kvzap import KVzap
from vattn.evictors.kvzip import KVzip
from vattn.evictors.snapkv import SnapKV

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seed() -> int:
    return fresh_seed()


# ---- combined -----------------------------------------------------------------------------------
BASES = [
    H2O(budget=BUDGET),
    SnapKV(budget=BUDGET, recent_tokens=8, window_tokens=8),
    AdaKV(budget=BUDGET, recent_tokens=8, window_tokens=8),
    CAKE(budget=BUDGET, recent_tokens=8, window_tokens=8),
    CORM(),
    KVzip(budget=BUDGET, mass=tuple(torch.rand(2, 2, 200) for _ in range(2))),
    Knorm(budget=BUDGET, recent_tokens=8, every=3, dense_layers=(1,)),
]


def test_a_wrapper_forwards_every_hook():
    hooks = {name for name, each in vars(Evictor).items() if callable(each) and name[0] != "_"}
    assert len(hooks) >= 13
    assert hooks <= set(vars(Wrapper)), hooks - set(vars(Wrapper))
    # What looks across layers is refused, so it needs no forwarding.
    assert hooks - set(vars(PerLayer)) == {"preference", "shares", "choose_jointly"}


@pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)
@pytest.mark.parametrize("wrap", [Wrapper, lambda base: Protected(base, share=0.0)])
def test_a_wrapper_that_adds_nothing_does_as_its_base(seed, base, wrap):
    one = written(seed, 3)
    assert_same(run(one, base), run(one, wrap(base)), f"seed {seed}")


@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize("base", [*BASES[1:4], BASES[6]], ids=lambda base: type(base).__name__)
def test_protected_keeps_both_ends_within_the_budget(seed, base, fresh):
    one = written(seed, fresh)
    base = replace(base, sink_tokens=0, recent_tokens=2, dense_layers=(), every=1)
    done, alone = run(one, Protected(base, share=0.15)), run(one, base)
    lost = torch.zeros(one.tokens)
    for call, plain in zip(done.calls, alone.calls, strict=True):
        if base.decodes or call.prompt:
            kept = ends(call, 6, 6) & (call.age >= 0)
            assert bool((call.after[..., kept]).all()), f"seed {seed}, tokens to {call.stop}"
            if call.prompt:
                lost += (kept * ~plain.after).sum((0, 1))
        assert torch.equal(call.after.sum((1, 2)), plain.after.sum((1, 2))) or base.cascades
    for end in (lost[:6], lost[66:72]):
        assert end.sum() > 0, "the base would have kept them by itself"


def test_protected_never_asks_for_more_than_there_is(seed):
    base = H2O(budget=20, recent_tokens=18)
    for call in run(written(seed), Protected(base, share=0.5)).calls:
        assert bool((call.after.sum(-1) == 20).all())
        assert bool(call.after[..., call.age.eq(0)].all())


@pytest.mark.parametrize("fresh", FRESH)
def test_each_layer_has_an_evictor_of_its_own(seed, fresh):
    one = written(seed, fresh)
    snap = SnapKV(budget=BUDGET, recent_tokens=8, window_tokens=8)
    whole, late = H2O(budget=BUDGET), H2O(budget=BUDGET, decode_only=True)
    short = Knorm(budget=BUDGET, recent_tokens=8, every=1)
    dense = replace(whole, dense_layers=(0,))
    for pair in ((snap, whole), (dense, snap), (late, whole), (short, late)):
        done = run(one, PerLayer(pair))
        for layer, evictor in enumerate(pair):
            assert_same(run(one, evictor), done, f"seed {seed}, {evictor}", layer)
    with pytest.raises(EvictorError, match="evictors are 1"):
        run(one, PerLayer((whole,)))


def test_layers_whose_evictors_ask_for_no_query_evict_after_a_prompt_alone(seed):
    one, hidden = text(seed, steps=3), torch.randn(2, 2, 75, 6)
    zap = KVzap(budget=BUDGET, recent_tokens=8, weights=torch.randn(2, 2, 6))
    mixed, alone = (played(one, each, hidden=hidden) for each in (PerLayer((zap, zap)), zap))
    for a, b in zip(mixed, alone, strict=True):
        assert bool((a.sum(-1) == BUDGET + 3).all())
        assert torch.equal(a, b), f"seed {seed}"


# ---- all of them --------------------------------------------------------------------------------
ROOMY: dict[str, Evictor] = {
    "protected": Protected(H2O(budget=200)),
    "layers": PerLayer((H2O(budget=200), Knorm(budget=200, every=1))),
}


@pytest.mark.parametrize("name", ROOMY)
def test_within_the_budget_results_are_those_of_a_dense_cache(seed, name):
    one = written(seed, 3)
    for call, out in zip(run(one, ROOMY[name]).calls, dense(one), strict=True):
        assert torch.equal(call.out, out), f"seed {seed}, tokens {call.start} to {call.stop}"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Protected("h2o"), "base must be an evictor, got 'h2o'"),
        (lambda: Protected(H2O(), share=0.6), r"share must be in \[0, 0.5\], got 0.6"),
        (lambda: PerLayer(()), r"one for each layer, got \(\)"),
        (lambda: PerLayer((H2O(), 3)), "must be a tuple of evictors, got .*3"),
        (lambda: PerLayer((H2O(), H2O(budget=9))), r"agree on budget, got \[0.5, 9\]"),
        (lambda: PerLayer((H2O(), H2O(every=9))), r"agree on every, got \[1, 9\]"),
        (lambda: PerLayer((H2O(), CAKE())), "CAKE.* decides for all layers"),
    ],
)
def test_what_is_out_of_range_is_named(make, says):
    with pytest.raises(EvictorError, match=says):
        make()
