"""Clocks and samples: how a function is timed, and how two timings are compared.

A round is one timed call of every contestant, so that a slow moment of the machine falls on all
of them. Odd rounds run in reverse order. The garbage collector is off inside a round.

    round 0:  ours  peer        paired ratio of round i = peer_i / ours_i
    round 1:  peer  ours        > 1: ours took less time
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Clock = Literal["wall", "thread"]
CLOCKS: dict[str, Callable[[], int]] = {
    "wall": time.perf_counter_ns,
    "thread": time.thread_time_ns,
}
RESAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """Timings of one function, in seconds a call."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("Sample.seconds is empty: repeat must be at least 1")

    @property
    def n(self) -> int:
        return len(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def max(self) -> float:
        return max(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p50(self) -> float:
        return self.median

    @property
    def p99(self) -> float:
        return self.quantile(0.99)

    @property
    def mad(self) -> float:
        """Median absolute deviation from the median."""
        middle = self.median
        return statistics.median(abs(s - middle) for s in self.seconds)

    @property
    def iqr(self) -> tuple[float, float]:
        """First and third quartile."""
        return self.quantile(0.25), self.quantile(0.75)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than a peer; ``low`` and ``high`` bound 95% of the doubt."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sample, peer: Sample, *, seed: int = 0) -> Ratio:
        """Median of the paired ratios, with a bootstrap interval of that median."""
        if ours.n != peer.n:
            raise ValueError(f"paired samples differ in length: ours {ours.n}, peer {peer.n}")
        pairs = np.asarray(peer.seconds) / np.maximum(np.asarray(ours.seconds), 1e-9)
        rng = np.random.default_rng(seed)
        medians = [np.median(rng.choice(pairs, len(pairs))) for _ in range(RESAMPLES)]
        low, high = np.quantile(medians, [0.025, 0.975])
        return cls(float(np.median(pairs)), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """Ours against a peer, timed in the same rounds."""

    ours: Sample
    peer: Sample
    ratio: Ratio


@contextmanager
def quiet_gc() -> Iterator[None]:
    """Collect once, then keep the collector out of the timed region."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def race(
    contestants: Mapping[str, Callable[..., object]],
    *,
    warmup: int = 3,
    repeat: int = 30,
    clock: Clock = "wall",
    setup: Callable[[], object] | None = None,
    calls: int = 1,
    tick: Callable[[], object] | None = None,
) -> dict[str, Sample]:
    """Time the contestants in interleaved rounds and return a sample of each.

    With ``setup`` every timed call is ``fn(setup())``, and making the argument is not timed.
    ``calls`` calls share one reading of the clock (functions under a microsecond); ``tick`` is
    called after every round, outside the timed region.
    """
    if repeat < 1 or calls < 1 or warmup < 0:
        raise ValueError(f"repeat {repeat}, calls {calls} must be >= 1 and warmup {warmup} >= 0")
    if setup is not None and calls != 1:
        raise ValueError(f"calls {calls} would share one setup: use calls=1 with setup")
    now = CLOCKS[clock]
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    with quiet_gc():
        for turn in range(warmup + repeat):
            for name in names if turn % 2 == 0 else reversed(names):
                spent = _spend(contestants[name], now, setup, calls)
                if turn >= warmup:
                    taken[name].append(spent)
            if tick is not None:
                tick()
    return {name: Sample(tuple(seconds)) for name, seconds in taken.items()}


def measure(fn: Callable[..., object], **options: Any) -> Sample:
    """Time one function; the options are those of `race`."""
    return race({"ours": fn}, **options)["ours"]


def compare(
    ours: Callable[..., object], peer: Callable[..., object], *, seed: int = 0, **options: Any
) -> Comparison:
    """Time ours and a peer in the same rounds; the options are those of `race`."""
    samples = race({"ours": ours, "peer": peer}, **options)
    return Comparison(
        samples["ours"], samples["peer"], Ratio.of(samples["ours"], samples["peer"], seed=seed)
    )


def _spend(
    fn: Callable[..., object],
    now: Callable[[], int],
    setup: Callable[[], object] | None,
    calls: int,
) -> float:
    """Seconds of one call of ``fn``."""
    arguments: Sequence[object] = () if setup is None else (setup(),)
    if calls == 1:
        begin = now()
        kept = fn(*arguments)
        end = now()
        del kept  # freeing the result is not part of the call
    else:
        turns = range(calls)
        begin = now()
        for _ in turns:
            fn()
        end = now()
    return (end - begin) / calls / 1e9
