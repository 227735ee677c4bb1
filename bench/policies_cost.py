"""What eviction policies cost at a step: watching attention, scoring, dropping.

A layer of an 8B model (32 query heads, 8 KV heads of 128, bfloat16) holds a quarter of 8,192
tokens, and of 32,768. `overhead` is the time of a step under a policy (append, attend, watch, drop
a token) less that of a step over as many rows without one, as a share of the dense step over all
tokens: what a policy takes of what it saves, three quarters of the dense step. Policies that drop
every so many steps are timed over as many, and some are timed both ways. All by the processor time
of one thread, kernels included, in rounds in which each of the three has its turn, behind some
steps that none of this counts. Policies that watch attention have no target: ``reason`` says why.

The gate: the step's output is, bit for bit, that of attention over the same rows, and a policy that
drops at steps holds its budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor

from bench.freed import DIM, GRAIN, HEADS, KV_HEADS, SHOWN, WIDTH
from bench.harness import Bench
from bench.kept.roster import Facts, roster
from bench.timing import quiet_gc
from vattn.eviction import Eviction
from vattn.evictor import Evictor
from vattn.heads import HeadCache

SIZES = (8192, 32768)
KEPT = 4  # of so many tokens, one
ROOM = 1024  # rows for steps
WARM = 32  # steps before any is timed: a policy may take a prompt's end for another case
TARGET = "<= 0.15"
QUICK = ("H2O", "H2O, steps", "TOVA", "SnapKV", "PoolFifo", "PoolCounter", "Streaming", "KeyDiff")
RARELY = ("H2O", "TOVA", "PoolFifo")  # also timed where they drop every so many steps
EVERY = 16
LONG_PROMPTS = {"SubGen", "Merging"}  # quadratic in a prompt: 8,192 tokens only
# Why a policy may cost more than the target: what it is, not how it is made.
WATCHES = "watches attention: a softmax over all rows left, for every query head, at each step"


def run(
    bench: Bench,
    policies: Annotated[list[str], typer.Option(help="Policies; all by default.")] = [],
) -> None:
    torch.set_num_threads(1)
    made = roster()
    names = policies or bench.pick(list(made), [name for name in QUICK if name in made])
    for tokens in bench.pick(SIZES, SIZES[:1]):
        stage = Stage(tokens, bench.seed)
        for name in names:
            if tokens > SIZES[0] and name in LONG_PROMPTS:
                bench.note(f"{name} takes minutes to choose from {tokens:,} tokens: left out")
                continue
            evictor = made[name](tokens // KEPT, GRAIN, stage.facts())
            cost(bench, stage, f"policies_cost/{tokens}/{name}", evictor)
            if name in RARELY:
                rarely = replace(evictor, every=EVERY)
                cost(bench, stage, f"policies_cost/{tokens}/{name}, every {EVERY}", rarely)
        stage.close()


def cost(bench: Bench, stage: Stage, label: str, evictor: Evictor) -> None:
    """One figure."""
    found = stage.race(evictor, bench.pick(15, 7))
    reason = WATCHES if evictor.watches else None
    bench.figure(
        label,
        lambda: found.overhead,
        "of a dense step",
        gate=found.check,
        target=None if reason else TARGET,
        dense_us=1e6 * median(found.dense),
        plain_us=1e6 * median(found.plain),
        ours_us=1e6 * median(found.ours),
        every=evictor.every,
        held=found.held,
        reason=reason,
    )


@dataclass(frozen=True, eq=False)
class Cost:
    """Seconds of a step in each round, and what went wrong."""

    ours: list[float]
    plain: list[float]
    dense: list[float]
    held: float
    wrong: str

    @property
    def overhead(self) -> float:
        """The median over rounds."""
        each = zip(self.ours, self.plain, self.dense, strict=True)
        return median((ours - plain) / dense for ours, plain, dense in each)

    def check(self) -> bool:
        """Raise AssertionError where something is wrong."""
        assert not self.wrong, self.wrong
        return True


class Stage:
    """A prompt of some length, its dense cache, and steps."""

    def __init__(self, tokens: int, seed: int) -> None:
        self.tokens, self.rng = tokens, torch.Generator().manual_seed(seed)
        self.key, self.value = self.normal(KV_HEADS, tokens), self.normal(KV_HEADS, tokens)
        self.query = self.normal(HEADS, SHOWN)
        self.step = self.normal(HEADS, 1), self.normal(KV_HEADS, 1), self.normal(KV_HEADS, 1)
        self.hidden = torch.randn(1, SHOWN, WIDTH, generator=self.rng)
        self.outputs = [torch.randn(WIDTH, HEADS * DIM, generator=self.rng)]
        self.dense = self.filled(tokens)

    def normal(self, heads: int, tokens: int) -> Tensor:
        """Rows drawn from a Gaussian."""
        return torch.randn(1, heads, tokens, DIM, generator=self.rng).to(torch.bfloat16)

    def filled(self, rows: int) -> HeadCache:
        """A cache of the first rows."""
        heads = self.empty()
        heads.append(0, self.key[:, :, :rows], self.value[:, :, :rows])
        return heads

    def empty(self) -> HeadCache:
        """A cache with room for all rows."""
        return HeadCache(1, KV_HEADS, DIM, self.tokens + ROOM, device="cpu")

    def facts(self) -> Facts:
        """What policies are told."""
        mass = torch.rand(1, 1, KV_HEADS, self.tokens, generator=self.rng)
        return Facts(
            self.tokens,
            lazy=lambda: 0.0,
            future=lambda: mass,
            retrieval=lambda: tuple((0, head) for head in range(KV_HEADS // 4)),
            replay=lambda: tuple(mass),
            guess=lambda: (torch.randn(1, KV_HEADS, WIDTH), torch.zeros(1, KV_HEADS)),
        )

    def race(self, evictor: Evictor, rounds: int) -> Cost:
        """A policy, as many rows without it, and all rows, in turn."""
        query, k, v = self.step
        heads = self.empty()
        eviction = Eviction(heads, evictor, self.outputs)
        eviction.append(0, self.key, self.value)
        done = torch.zeros(1, HEADS, SHOWN, DIM, dtype=torch.bfloat16)
        eviction.attend(self.query, 0, hidden=self.hidden, attended=done)
        plain = self.filled(round(float(heads.held(0).mean())))
        hidden = self.hidden[:, :1]

        def ours() -> Tensor:
            eviction.append(0, k, v)
            return eviction.attend(query, 0, hidden=hidden)

        def attend(cache: HeadCache) -> Tensor:
            cache.append(0, k, v)
            return cache.attend_lse(query, 0)[0]

        taken: dict[str, list[float]] = {"ours": [], "plain": [], "dense": []}
        acts: dict[str, tuple[Callable[[], object], int, HeadCache]] = {
            "ours": (ours, evictor.every, heads),
            "plain": (partial(attend, plain), evictor.every, plain),
            "dense": (partial(attend, self.dense), 1, self.dense),
        }
        wrong = self.judged(eviction)
        with quiet_gc():
            for turn in range(2 + rounds):
                for name in list(acts)[:: 1 - 2 * (turn % 2)]:
                    act, steps, cache = acts[name]
                    spent = timed(act, steps) / steps
                    if turn > 1:
                        taken[name].append(spent)
                    if cache is not heads:
                        cache.crop(0, steps)
        held = float(heads.held(0).mean())
        budget = self.tokens // KEPT
        if evictor.decodes and not evictor.adaptive and held >= budget + evictor.every:
            wrong = wrong or f"{held} rows are held of {budget}"
        plain.close()
        heads.close()
        return Cost(taken["ours"], taken["plain"], taken["dense"], held, wrong)

    def judged(self, eviction: Eviction) -> str:
        """What is wrong with a step's output, or nothing."""
        query, k, v = self.step
        for _ in range(WARM):
            eviction.append(0, k, v)
            want = eviction.heads.attend_lse(query, 0)[0]
            if not torch.equal(eviction.attend(query, 0, hidden=self.hidden[:, :1]), want):
                return "a step's output is not that of attention over its rows"
        return ""

    def close(self) -> None:
        """Give everything back."""
        self.dense.close()


def timed(act: Callable[[], object], steps: int) -> float:
    """Processor seconds of some steps."""
    begin = time.thread_time()
    for _ in range(steps):
        act()
    return time.thread_time() - begin
