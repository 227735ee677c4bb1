"""MPCache, its static part: what the end of the prompt looks at, above a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen
from vattn.selector import Caps

LONG = 24_000  # tokens; longer prompts ask half the share of their queries


@dataclass(frozen=True, kw_only=True)
class MPCacheStatic(Evictor):
    """Keep the tokens to which any of the prompt's last queries gives at least ``threshold`` of its
    attention, averaged over all heads of the layer: each head keeps the same tokens. There is no
    budget (``budget`` does nothing): the number follows from the text. The paper's dynamic part
    reads some of what is left at each step; see `vattn.policies` for its like.

    Args:
        threshold: the authors take 1e-8 to 1e-3, by data set.
        share: of the prompt's queries that are asked, half of it above 24,000 tokens.

    Source: Zeng et al., arXiv 2501.06807; code zwxandy/MPCache.
    """

    threshold: float = 1e-3
    share: float = 0.2

    caps: ClassVar[Caps] = Caps(frozenset({"mass"}), "token", "layer")
    source: ClassVar[str] = "arXiv 2501.06807"
    summary: ClassVar[str] = "a threshold on attention of the prompt's last 20 % of queries"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise EvictorError(f"threshold must be from 0 to 1, got {self.threshold!r}")
        if not 0 < self.share <= 1:
            raise EvictorError(f"share must be in (0, 1], got {self.share!r}")

    def rows(self, tokens: int) -> int:
        share = self.share / 2 if tokens > LONG else self.share
        return max(1, round(tokens * share))

    def score(self, seen: Seen) -> Tensor:
        most = seen.score.new_zeros(len(seen.score), 1, seen.score.shape[2])
        for _, block in seen.logits():
            weights = block.softmax(-1).mean((1, 2))
            most = most.maximum(weights.amax(1)[:, None])
        return most.expand_as(seen.score)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        return (self.forced(seen) | (score >= self.threshold)) & seen.valid
