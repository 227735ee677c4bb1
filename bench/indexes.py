"""The indexes that `recall` compares, by name: a scene gives a selector for each budget.

A number behind a name is the tokens of a page, or the share of the channels that are kept. What is
calibrated is so once for a scene.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.recorded import Scene
from vattn import policies
from vattn.selector import Selector

FORCED: dict[str, Any] = {"sink_tokens": 4, "recent_tokens": 32}
Within = Callable[[int], Selector]  # of the tokens to read
Make = Callable[[Scene], Within]


def plain(kind: type[Selector], **options: Any) -> Make:
    """A selector that looks at nothing beforehand."""
    return lambda scene: lambda budget: kind(budget_tokens=budget, **FORCED, **options)


def within(selector: Selector) -> Within:
    """The same selector for any budget."""
    return lambda budget: replace(selector, budget_tokens=budget)


def calibrated(kind: Any, **options: Any) -> Make:
    """A selector calibrated with the scene's known keys."""
    return lambda scene: within(kind.calibrate(scene.known_keys[None], **FORCED, **options))


def share(kind: Any, of: int) -> Make:
    """`calibrated`, with 1 / ``of`` of the channels kept."""
    return lambda scene: calibrated(kind, rank=scene.dim // of)(scene)


def labels(scene: Scene) -> Within:
    keys, queries = scene.known_keys[None], scene.known_queries[None]
    return within(policies.DoubleSparsity.calibrate(keys, queries, **FORCED))


def skewed(scene: Scene) -> Within:
    """InfiniGen's partial keys, but as many tokens as the budget holds."""
    skew = policies.skew([scene.known_queries], [scene.known_keys], 0.2)
    return within(policies.InfiniGen(map=skew, alpha=1e9, **FORCED))


def landmarks(scene: Scene) -> Within:
    return lambda budget: policies.Landmark(outliers=budget // 32, budget_tokens=budget, **FORCED)


def channels(scene: Scene) -> Within:
    return within(policies.SparQ(rank=scene.dim // 4, **FORCED))


def two_stage(scene: Scene) -> Within:
    code = policies.Signs.calibrate(scene.known_keys[None])

    def make(budget: int) -> Selector:
        base = policies.Quest(budget_tokens=4 * budget, **FORCED)
        return policies.TwoStage(base=base, code=code, budget_tokens=budget, **FORCED)

    return make


def twilight(scene: Scene) -> Within:
    def make(budget: int) -> Selector:
        base = policies.Quest(budget_tokens=4 * budget, **FORCED)
        return policies.Twilight(base=base, budget_tokens=budget, p=0.95, **FORCED)

    return make


def sampled(scene: Scene) -> Within:
    """Three quarters of the budget by a graded code, the last one drawn."""
    graded = calibrated(policies.Graded)(scene)

    def make(budget: int) -> Selector:
        base = graded(budget * 3 // 4)
        return policies.Sampled(base=base, sample=0.99, budget_tokens=budget, **FORCED)

    return make


INDEXES: dict[str, Make] = {
    "Exact": plain(policies.Exact),
    "Exact 16": plain(policies.Exact, page_tokens=16),
    **{f"Quest {size}": plain(policies.Quest, page_tokens=size) for size in (4, 8, 16, 32)},
    "MeanDeviation 16": plain(policies.MeanDeviation),
    "Cuboid 16": plain(policies.Cuboid, page_tokens=16),
    "Landmark 8": landmarks,
    "Clusters 32/16": plain(policies.Clusters),
    "Signs": plain(policies.Signs),
    "Signs, calibrated": calibrated(policies.Signs),
    "Nibbles": plain(policies.Nibbles),
    "Nibbles 1/4": share(policies.Nibbles, 4),
    "Graded 8+80": calibrated(policies.Graded),
    "Graded 4+96": calibrated(policies.Graded, fine=4, coarse=96),
    "Loki 1/4": share(policies.Loki, 4),
    "DoubleSparsity 1/8": labels,
    "SparQ 1/4": channels,
    "InfiniGen 0.2": skewed,
    "TwoStage": two_stage,
    "Twilight": twilight,
    "Sampled": sampled,
    "Random 16": plain(policies.Random),
    "Window": plain(policies.Window),
}
