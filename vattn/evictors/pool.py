"""InfiniGen's pool: who leaves a full cache, by when and how often tokens were wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen, Step
from vattn.evictors.streaming import Streaming
from vattn.selector import Caps

SOURCE = "arXiv 2406.19707"


@dataclass(frozen=True, kw_only=True)
class PoolFifo(Streaming):
    """Keep the last tokens: first in, first out.

    Source: Lee et al., InfiniGen, arXiv 2406.19707 (pool of 80%).
    """

    budget: float | int = 0.8
    sink_tokens: int = 0
    recent_tokens: int = 0

    source: ClassVar[str] = SOURCE
    summary: ClassVar[str] = "first in, first out"


@dataclass(frozen=True, kw_only=True)
class Pool(Evictor):
    """What `PoolLru` and `PoolCounter` share: a token is used by a query if its score of attention
    exceeds the query's best minus ``alpha``, for any query head of the KV head.

    Args:
        alpha: in units of the logits; 5 for LLaMA, 4 for OPT. exp(-5) is 0.7% of the best weight.
        prompt_rows: the last queries of a prompt that count as uses; 0: none.
        old_half: victims are looked for among the older half of the budget alone, as in the
            authors' code; a token that has just come could not defend itself.
    """

    budget: float | int = 0.8
    sink_tokens: int = 0
    recent_tokens: int = 0
    alpha: float = 5.0
    prompt_rows: int = 32
    old_half: bool = True

    caps: ClassVar[Caps] = Caps(frozenset({"mass"}), "token")
    source: ClassVar[str] = SOURCE
    decodes: ClassVar[bool] = True
    watches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise EvictorError(f"alpha must be >= 0, got {self.alpha!r}")
        if not isinstance(self.prompt_rows, int) or self.prompt_rows < 0:
            raise EvictorError(f"prompt_rows must be an int >= 0, got {self.prompt_rows!r}")

    def rows(self, tokens: int) -> int:
        return self.prompt_rows

    def score(self, seen: Seen) -> Tensor:
        score = self.arrived(seen.score, seen.positions)
        if seen.query is None:
            return score
        for at, logits in seen.logits(self.prompt_rows):
            score = self.marked(score, self._used(logits), at)
        return score

    def observe(self, score: Tensor, step: Step) -> Tensor:
        at, block = step.block()
        return self.marked(self.arrived(score, step.positions), self._used(block), at)

    def recent(self, seen: Seen) -> int | Tensor:
        if not self.old_half:
            return super().recent(seen)
        return (seen.target // 2).clamp_min(self.recent_tokens)

    def arrived(self, score: Tensor, positions: Tensor) -> Tensor:
        """Scores [B, H, n] of which those of new rows are still 0."""
        return score

    def marked(self, score: Tensor, used: Tensor, at: Tensor) -> Tensor:
        """Scores after queries at positions ``at`` [B, r] have used rows [B, H, r, n]."""
        raise NotImplementedError

    def _used(self, logits: Tensor) -> Tensor:
        """Which rows a query uses, for any of its query heads: [B, H, r, n] bool."""
        return (logits > logits.amax(-1, keepdim=True) - self.alpha).any(2)


@dataclass(frozen=True, kw_only=True)
class PoolLru(Pool):
    """Keep the tokens that were used last; to come is a use.

    Source: Lee et al., InfiniGen, arXiv 2406.19707 (pool of 80%, alpha 5 for LLaMA).
    """

    summary: ClassVar[str] = "the last query that wanted the token"

    def arrived(self, score: Tensor, positions: Tensor) -> Tensor:
        return score.maximum(positions.float())

    def marked(self, score: Tensor, used: Tensor, at: Tensor) -> Tensor:
        return score.maximum((used * at[:, None, :, None]).amax(2).float())


@dataclass(frozen=True, kw_only=True)
class PoolCounter(Pool):
    """Keep the tokens that were used most often.

    Source: Lee et al., InfiniGen, arXiv 2406.19707 (pool of 80%, alpha 5 for LLaMA).
    """

    summary: ClassVar[str] = "how many queries wanted the token"

    def marked(self, score: Tensor, used: Tensor, at: Tensor) -> Tensor:
        return score + used.sum(2)
