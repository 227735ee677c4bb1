"""Observed attention: how much attention a token has had from those who could see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vattn.evictor import ALL_ROWS, Evictor, Seen, Step
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(Evictor):
    """Keep the tokens with the largest mean of attention over the queries that could see them: H2O
    without its preference for the first tokens, which simply were seen by more queries.

    Source: ObservedAttentionPress of NVIDIA/kvpress, which does so for prompts.
    """

    caps: ClassVar[Caps] = Caps(frozenset({"mass"}), "token")
    source: ClassVar[str] = "NVIDIA/kvpress, after arXiv 2306.14048"
    summary: ClassVar[str] = "attention averaged over the queries that could see a token"
    decodes: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    def rows(self, tokens: int) -> int:
        return ALL_ROWS

    def score(self, seen: Seen) -> Tensor:
        return averaged(seen.score, seen.columns().total.mean(2), seen.age + 1, seen.fresh)

    def observe(self, score: Tensor, step: Step) -> Tensor:
        total = step.mass() * (step.fresh / step.logits.shape[2])
        return averaged(score, total, step.tokens[:, None, None] - step.positions, step.fresh)


def averaged(mean: Tensor, total: Tensor, queries: Tensor, fresh: int) -> Tensor:
    """The mean over all ``queries`` that could see each row, given that of those before the last
    ``fresh``, and the sum over these."""
    return (mean * (queries - fresh).clamp_min(0) + total) / queries.clamp_min(1)
