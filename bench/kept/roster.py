"""Every eviction policy there is, made for a task and a budget.

Policies are those `vattn.evictors` offers. First and last tokens that are kept in any case, and
windows, are cut to what the task allows (`Grain`); what a policy has to be told about the model or
the future is in `Facts`; all else is as the policy has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from torch import Tensor

from vattn.evictor import Evictor, EvictorError
from vattn.evictors import names
from vattn.evictors.combined import Protected
from vattn.evictors.duo_attention import DuoAttention
from vattn.evictors.elastic import Merging
from vattn.evictors.expected_attention import ExpectedAttention
from vattn.evictors.h2o import H2O
from vattn.evictors.kvzap import KVzap
from vattn.evictors.kvzip import KVzip
from vattn.evictors.mpcache import MPCacheStatic
from vattn.evictors.oracle import Oracle
from vattn.evictors.simlayerkv import SimLayerKV
from vattn.evictors.snapkv import SnapKV

FIFO, TOVA, COUNTER, ORACLE, CHANCE = "PoolFifo", "TOVA", "PoolCounter", "Oracle", "RandomTokens"
MASS, STEPS = "H2O", "H2O, steps"  # the latter: of decode steps alone
MEANS = 8  # times the mean weight: the threshold of `MPCacheStatic`
LEFT_OUT = ("PerLayer",)  # it has nothing to add to those it is made of


@dataclass(frozen=True)
class Grain:
    """Most tokens that are kept in any case, first and last, and most queries of a window."""

    sink: int
    recent: int
    window: int


def _unknown() -> Any:
    raise EvictorError("nobody has recorded what this policy has to be told")


@dataclass(frozen=True, eq=False)
class Facts:
    """What some policies have to be told.

    Args:
        context: tokens of the prompt.
        rope_base: of the model.
        lazy: how much of its attention a layer gives to the ends of a text, as `SimLayerKV` takes
            it: between those of the lazier half of the layers and of the others.
        future: attention to come, as `Oracle` takes it.
        retrieval: (layer, KV head) of the heads that look far back, as `DuoAttention` takes them.
        replay: attention of a replay of the prompt, as `KVzip` takes it.
        guess: weights and biases, as `KVzap` takes them.
    """

    context: int
    rope_base: float = 10_000.0
    lazy: Callable[[], float] = _unknown
    future: Callable[[], Tensor] = _unknown
    retrieval: Callable[[], tuple[tuple[int, int], ...]] = _unknown
    replay: Callable[[], tuple[Tensor, ...]] = _unknown
    guess: Callable[[], tuple[Tensor, Tensor]] = _unknown


Make = Callable[[int, Grain, Facts], Evictor]


def fitted(kind: type[Evictor], budget: int, grain: Grain, **given: Any) -> Evictor:
    """A policy with its own defaults, cut to a grain. Where nothing recent matters, none of the
    budget goes to what is recent."""
    limits = {
        "sink_tokens": grain.sink,
        "recent_tokens": grain.recent,
        "window_tokens": grain.window,
    }
    known: dict[str, Any] = {each.name: each.default for each in fields(kind)}
    made = {name: min(most, known[name]) for name, most in limits.items() if name in known}
    if not grain.recent:
        none = {"recent_share": 0.0, "old_half": False}
        made |= {name: value for name, value in none.items() if name in known}
        if "old_half" in known:  # a pool counts uses: nothing in such a prompt is one
            made["prompt_rows"] = 0
    return kind(**{**made, "budget": budget, **given})


@cache
def kinds() -> dict[str, type[Evictor]]:
    """Policies by the names of their classes."""
    return {kind.__name__: kind for kind in names.kinds().values()}


# ---- policies that take more than a budget, and variants -----------------------------------------
def steps(budget: int, grain: Grain, facts: Facts) -> Evictor:
    return fitted(H2O, budget, grain, decode_only=True)


def oracle(budget: int, grain: Grain, facts: Facts) -> Evictor:
    return fitted(Oracle, budget, grain, future=facts.future())


def duo(budget: int, grain: Grain, facts: Facts) -> Evictor:
    return fitted(DuoAttention, budget, grain, retrieval=facts.retrieval())


def lazy(budget: int, grain: Grain, facts: Facts) -> Evictor:
    ends = {"sink_tokens": max(1, grain.sink), "recent_tokens": facts.context // 4}
    return fitted(SimLayerKV, facts.context, grain, threshold=facts.lazy(), **ends)


def thresholded(budget: int, grain: Grain, facts: Facts) -> Evictor:
    # The authors' 1e-3 is for thousands of tokens.
    return fitted(MPCacheStatic, budget, grain, threshold=MEANS / facts.context)


def expected(budget: int, grain: Grain, facts: Facts) -> Evictor:
    return fitted(ExpectedAttention, budget, grain, rope_base=facts.rope_base)


def replayed(budget: int, grain: Grain, facts: Facts) -> Evictor:
    return fitted(KVzip, budget, grain, mass=facts.replay())


def guessed(budget: int, grain: Grain, facts: Facts) -> Evictor:
    weights, biases = facts.guess()
    return fitted(KVzap, budget, grain, weights=weights, biases=biases)


def protected(budget: int, grain: Grain, facts: Facts) -> Evictor:
    return Protected(fitted(SnapKV, budget, grain))


def merging(budget: int, grain: Grain, facts: Facts) -> Evictor:
    return Merging(fitted(SnapKV, budget, grain))


SPECIAL: dict[str, Make] = {
    STEPS: steps,
    ORACLE: oracle,
    "DuoAttention": duo,
    "ExpectedAttention": expected,
    "SimLayerKV": lazy,
    "MPCacheStatic": thresholded,
    "KVzip": replayed,
    "KVzap": guessed,
    "Protected": protected,  # both over SnapKV
    "Merging": merging,
}


def roster() -> dict[str, Make]:
    """Policies by name, and how to make them; `left_out` are those that cannot be made here."""
    plain = {kind.__name__: _plain(kind) for kind in names.named().values()}
    return {**{name: make for name, make in plain.items() if name not in SPECIAL}, **SPECIAL}


def _plain(kind: type[Evictor]) -> Make:
    return lambda budget, grain, facts: fitted(kind, budget, grain)


def left_out() -> list[str]:
    """Policies that are not on the roster, but for those with nothing to add (`LEFT_OUT`)."""
    return sorted(kinds().keys() - roster().keys() - set(LEFT_OUT))


def adaptive(name: str) -> bool:
    """Whether a policy has no budget to keep to."""
    kind = kinds().get(name)
    return kind is not None and kind.adaptive is True
