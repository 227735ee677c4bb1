"""LagKV: tokens that stand out against those that came after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen
from vattn.evictors.order import by_text
from vattn.selector import Caps

TINY = 1e-6  # least range of a channel


@dataclass(frozen=True, kw_only=True)
class LagKV(Evictor):
    """Cut the text into parts; measure each by the range of the next; keep what varies most.

        x' = (x - min) / (max - min), min and max of a channel over the next part
        score = softmax over the part of std over channels of x', the mean of that of K and of V

    Tokens without a whole next part are not scored and are kept before those that are, the newest
    first.

    Args:
        lag: tokens of a part.
        across: parts compete by their scores; else by rank, and each part keeps as many.
        every: 128, a part, since each eviction at a step reads K and V; our choice.

    Source: Liang et al., arXiv 2504.04704 (4 sinks, lag 128).
    """

    recent_tokens: int = 0
    lag: int = 128
    across: bool = False
    every: int = 128

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "values"}), "token")
    source: ClassVar[str] = "arXiv 2504.04704"
    summary: ClassVar[str] = "spread of K and V in the range of the tokens that follow"
    decodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lag, int) or self.lag < 1:
            raise EvictorError(f"lag must be an int >= 1, got {self.lag!r}")

    def score(self, seen: Seen) -> Tensor:
        order, first, lag = by_text(seen), self.sink_tokens, self.lag
        longest = order.shape[-1]
        at = torch.arange(longest, device=order.device)
        scores = (2 + at.float() / longest).expand(order.shape).clone()  # above every score
        parts = (longest - first) // lag
        if parts > 1:
            rows, shape = order[..., first : first + parts * lag], (parts, lag)
            keys, values = (deviation(side, rows, shape) for side in (seen.keys, seen.values))
            found = (keys + values) / 2
            if not self.across:
                found = found.argsort(-1).argsort(-1).float() / lag
            ends = first + lag * torch.arange(2, parts + 1, device=order.device)
            whole = (ends <= seen.counts[..., None])[..., None]
            part = scores[..., first : first + (parts - 1) * lag].unflatten(2, (parts - 1, lag))
            part.copy_(torch.where(whole, found, part))
        return torch.empty_like(scores).scatter_(2, order, scores)

    def rescore(self, seen: Seen) -> Tensor:
        return self.score(seen)


def deviation(side: Tensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scores [B, H, p - 1, lag] of the rows [B, H, p * lag] of K or V [B, H, n, D], in p parts."""
    found = []
    # Head by head: one fits into a processor's cache.
    for head, some in zip(side.flatten(0, 1), rows.flatten(0, 1), strict=True):
        parts = head.index_select(0, some).float().unflatten(0, shape)
        low, high = parts.amin(1)[1:, None], parts.amax(1)[1:, None]
        inside = parts[:-1].sub_(low).div_((high - low).clamp_min_(TINY))
        # torch's `std` is four times as slow on a CPU.
        inside.sub_(inside.mean(-1, keepdim=True))
        spread = torch.linalg.vector_norm(inside, dim=-1) / max(1, side.shape[3] - 1) ** 0.5
        found.append(spread.softmax(-1))
    return torch.stack(found).unflatten(0, side.shape[:2])
