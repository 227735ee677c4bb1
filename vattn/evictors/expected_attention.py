"""Expected Attention: what queries to come would see, were they drawn like those of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import ALL_ROWS, Evictor, EvictorError, Seen
from vattn.selector import Caps

LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Evictor):
    """Keep the tokens with the largest expected attention, times the length of their values.

    Queries before the rotary embedding are taken for draws of a Gaussian N(mu, Sigma) for each
    query head; R is the mean rotation of the ``future`` positions that follow the text.

        logit = s k . R mu + s^2 / 2 k^T R Sigma R^T k        log of the mean of exp(s q . k)
        score = (mean over query heads of softmax over keys of logit, + epsilon) * ||v||

    The first ``sink_tokens`` queries and keys are left out of these means.

    Args:
        rope_base: of the rotary embedding, channel i paired with i + D / 2; None: there is none.
        future: positions.
        epsilon: how much of the length of V counts without attention.

    Source: Devoto et al., arXiv 2510.00636 (4 sinks, 512 positions); code NVIDIA/kvpress.
    """

    rope_base: float | None = 10000.0
    future: int = 512
    epsilon: float = 0.0

    caps: ClassVar[Caps] = Caps(frozenset({"query", "keys", "values"}), "token")
    source: ClassVar[str] = "arXiv 2510.00636"
    summary: ClassVar[str] = "expected attention of queries like the prompt's, times the norm of V"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_base is not None and not self.rope_base > 1:
            raise EvictorError(f"rope_base must be > 1, or None, got {self.rope_base!r}")
        if not isinstance(self.future, int) or self.future < 1:
            raise EvictorError(f"future must be an int >= 1, got {self.future!r}")
        if not self.epsilon >= 0:
            raise EvictorError(f"epsilon must be >= 0, got {self.epsilon!r}")

    def rows(self, tokens: int) -> int:
        return ALL_ROWS

    def score(self, seen: Seen) -> Tensor:
        keys, scale = seen.keys.float(), seen.scale
        out = ~seen.valid | (seen.positions < self.sink_tokens)
        total = torch.zeros_like(seen.score)
        groups = 0
        for mean, spread in zip(*self.moments(seen), strict=True):
            logits = scale * (keys @ mean[..., None]).squeeze(-1)
            logits += scale**2 / 2 * ((keys @ spread) * keys).sum(-1)
            total += logits.masked_fill_(out, LEAST).softmax(-1)
            groups += 1
        return (total / groups + self.epsilon) * seen.values.float().norm(dim=-1)

    def moments(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Mean [G, B, H, D] and covariance [G, B, H, D, D] of queries to come."""
        assert seen.query is not None
        query = seen.query.float()
        count = query.shape[2]
        at = seen.tokens[:, None] - count + torch.arange(count, device=query.device)
        ahead = seen.tokens[:, None] + torch.arange(self.future, device=query.device)
        counts = (at >= self.sink_tokens).float()[:, None, :, None]
        counts = counts / counts.sum(2, keepdim=True).clamp_min(1)
        plain = self._turned(query, *(x[:, None] for x in self._angles(-at, query)))
        mean = (plain * counts).sum(2)
        apart = plain - mean[:, :, None]
        spread = (apart * counts).mT @ apart
        cos, sin = (x.mean(1)[:, None] for x in self._angles(ahead, query))
        mean = self._turned(mean, cos, sin)
        cos, sin = cos[:, :, None], sin[:, :, None]
        spread = self._turned(self._turned(spread, cos, sin).mT, cos, sin)
        heads = seen.counts.shape[1]
        grouped = (x.unflatten(1, (heads, -1)).movedim(2, 0) for x in (mean, spread))
        return next(grouped), next(grouped)

    def _angles(self, at: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, n, D / 2] of the rotation at positions [B, n]."""
        half = like.shape[-1] // 2
        pair = torch.arange(half, device=at.device, dtype=torch.float64) / half
        angles = at[..., None] * (self.rope_base or 1.0) ** -pair
        return angles.cos().to(like), angles.sin().to(like)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., D] turned; as it is without a rotary embedding."""
        if self.rope_base is None:
            return x
        left, right = x.chunk(2, -1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
