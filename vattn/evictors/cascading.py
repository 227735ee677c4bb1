"""Cascading KV cache: windows of ever sparser tokens, the winners of pairs, pairs of pairs, ..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen, Step
from vattn.evictors.order import by_text
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class Cascading(Evictor):
    """Keep the first tokens and ``rings`` windows, each of half the density of the one after it.

        newest ──► ring 0 ──► ring 1 ──► ... ──► gone         W tokens each, the oldest moves on
                  takes all   every 2nd   every 2^i-th

    Token t (counted behind the sinks) makes ring i take what ring i - 1 gives up if 2^i divides t.
    Else that and the newest of ring i fight it out: the one with more attention stays, of equals
    the newcomer; attention is an average over steps that forgets. Nothing goes before all rings are
    full. The ring of a token follows from its rank by age, so positions and scores are all that has
    to be recorded. With one ring this is `Streaming`.

    Args:
        budget: shared out evenly, rounded down: W = (budget - sink_tokens) // rings.
        rings: windows.
        beta: what is left of the average after a step.
        prompt_rows: the last queries of a prompt that count.

    Source: Willette et al., arXiv 2406.17808; code jeffwillette/cascading_kv_cache (4 sinks, eager
    fill, beta 0.9999). Positions stay those of the text; the paper counts them within the cache.
    """

    recent_tokens: int = 0
    rings: int = 4
    beta: float = 0.9999
    prompt_rows: int = 128

    caps: ClassVar[Caps] = Caps(frozenset({"position", "mass"}), "token")
    source: ClassVar[str] = "arXiv 2406.17808"
    summary: ClassVar[str] = "windows of halving density, filled by duels of attention"
    decodes: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rings", "prompt_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise EvictorError(f"{name} must be an int >= 1, got {value!r}")
        if not 0 <= self.beta < 1:
            raise EvictorError(f"beta must be in [0, 1), got {self.beta!r}")
        if self.recent_tokens:
            raise EvictorError(f"recent_tokens must be 0, got {self.recent_tokens}: raise budget")
        if isinstance(self.budget, int) and self.budget < self.sink_tokens + self.rings:
            raise EvictorError(
                f"budget must be >= {self.sink_tokens + self.rings} (sink_tokens "
                f"{self.sink_tokens} and a token for each of {self.rings} rings), got {self.budget}"
            )

    def target(self, tokens: Tensor) -> Tensor:
        return super().target(tokens).clamp_min(self.sink_tokens + self.rings)

    def budgets(self, seen: Seen) -> Tensor:
        within = super().budgets(seen) - self.sink_tokens
        return within // self.rings * self.rings + self.sink_tokens

    def rows(self, tokens: int) -> int:
        return self.prompt_rows

    def score(self, seen: Seen) -> Tensor:
        score = seen.score * self.beta ** min(self.prompt_rows, seen.fresh)
        for at, logits in seen.logits(self.prompt_rows):
            score = score + self._average(logits.softmax(-1).mean(2), seen.tokens[:, None] - 1 - at)
        return score

    def observe(self, score: Tensor, step: Step) -> Tensor:
        groups = step.logits.shape[2] // step.fresh
        shares = [(1 - self.beta) * self.beta**age / groups for age in reversed(range(step.fresh))]
        return score * self.beta**step.fresh + step.mass(shares)

    def _average(self, weights: Tensor, ages: Tensor) -> Tensor:
        """What attention [B, H, r, n] of queries of ages [b, r] adds: [B, H, n]."""
        shares = (1 - self.beta) * self.beta ** ages.to(weights.dtype)
        return (weights * shares[:, None, :, None]).sum(2)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        keep = seen.valid.clone()
        order = by_text(seen)
        # All heads of a layer hold equally many, and the same of what has come since.
        for b, (count, budget) in enumerate(zip(seen.counts[:, 0], budgets[:, 0], strict=True)):
            line = order[b, :, self.sink_tokens : int(count) - seen.draft]
            window = (int(budget) - seen.draft - self.sink_tokens) // self.rings
            if line.shape[1] > window * self.rings:
                times = seen.positions[b, 0, line[0]] - self.sink_tokens
                stays = cascade(line, score[b], times, window, self.rings)
                keep[b].scatter_(1, line, False).scatter_(1, stays, True)
        return keep


def cascade(line: Tensor, score: Tensor, times: Tensor, window: int, rings: int) -> Tensor:
    """What is left of rows [H, m], the oldest first, of which the first window * rings are in their
    rings and the others come one after the other at ``times`` [m]: [H, window * rings]."""
    full = window * rings
    held, comes, times = line[:, :full], line[:, full:], times[full:]
    stays = []
    for i in range(rings):
        taken = times % 2**i == 0
        ring = held[:, full - (i + 1) * window : full - i * window]
        slots = torch.cat((ring, comes[:, taken]), 1)
        # Whoever is not taken fights the slot that was newest when it came.
        slot = (window - 1 + taken.cumsum(0))[~taken]
        rival, owner = comes[:, ~taken], slots[:, slot]
        wins = score.gather(1, rival) >= score.gather(1, owner)
        slots[:, slot] = torch.where(wins, rival, owner)
        comes, times = slots[:, :-window], times[taken]
        stays.append(slots[:, -window:])
    return torch.cat(stays, 1)
