"""CORM: what no recent query has looked at more than it looks at a token on average goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen, Step
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class CORM(Evictor):
    """Keep the tokens that were major for one of the last queries: had at least 1 / i of its
    attention in some query head, where it saw i tokens. The score is the place of the last such
    query. There is no budget (``budget`` does nothing): the size follows the text.

    Args:
        window_tokens: queries that count; their own tokens are kept in any case.

    Source: Dai et al., arXiv 2404.15949 (window 256).
    """

    sink_tokens: int = 0
    recent_tokens: int = 0
    window_tokens: int = 256

    caps: ClassVar[Caps] = Caps(frozenset({"mass"}), "token")
    source: ClassVar[str] = "arXiv 2404.15949"
    summary: ClassVar[str] = "more than average attention from one of the last 256 queries"
    decodes: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.window_tokens, int) or self.window_tokens < 1:
            raise EvictorError(f"window_tokens must be an int >= 1, got {self.window_tokens!r}")

    def rows(self, tokens: int) -> int:
        return self.window_tokens

    def score(self, seen: Seen) -> Tensor:
        last = seen.score
        for at, block in seen.logits():
            last = last.maximum(last_major(block, at))
        return last

    def observe(self, score: Tensor, step: Step) -> Tensor:
        at, block = step.block()
        if step.fresh > 1:
            return score.maximum(last_major(block, at))
        # weight * sees >= 1, by the log-sum-exp that is known.
        least = step.lse - step.counts[..., None].log()
        major = (step.logits >= least[..., None]).any(2)
        return torch.where(major, at[:, None].float(), score)

    def recent(self, seen: Seen) -> int:
        return max(self.recent_tokens, self.window_tokens)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        first = (seen.tokens - self.window_tokens)[:, None, None]
        return (self.forced(seen) | (score >= first)) & seen.valid


def last_major(logits: Tensor, at: Tensor) -> Tensor:
    """Where the last query stood for which each key was major, 0 for none: logits [B, H, G, r, n]
    of queries at ``at`` [B, r] -> [B, H, n] float32 (exact to 2**24)."""
    sees = logits.isfinite().sum(-1, keepdim=True)
    major = logits.softmax(-1) * sees >= 1
    return torch.where(major, at[:, None, None, :, None], 0).amax((2, 3)).float()
