"""CriticalKV: what would change the output of the layer, not its attention alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import EvictorError, Seen, best, ranked
from vattn.evictors.snapkv import SnapKV, smoothed
from vattn.kernels.columns import SCORES
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class CriticalKV(SnapKV):
    """Keep by SnapKV's attention first, then by that times what the token adds to the output.

    Of the budget that forced tokens leave, the share ``first`` goes by attention a of the prompt's
    last queries, the rest by (a + epsilon) * ||W_o v||_1; a is smoothed, and both are means over
    the query heads of a KV head.

    Args:
        first: share of the first stage.
        epsilon: of the second stage.

    Source: Feng et al., arXiv 2502.03805 (half of the budget, 1e-4), over SnapKV (32, 5). Needs the
    weight behind attention: `Eviction(outputs=...)`.
    """

    first: float = 0.5
    epsilon: float = 1e-4

    caps: ClassVar[Caps] = Caps(frozenset({"mass", "values", "offline"}), "token")
    source: ClassVar[str] = "arXiv 2502.03805"
    summary: ClassVar[str] = "attention, then attention times what V adds to the output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first <= 1 or not self.epsilon >= 0:
            raise EvictorError(
                f"first must be in [0, 1] and epsilon >= 0, got {self.first!r} and {self.epsilon!r}"
            )

    def score(self, seen: Seen) -> Tensor:
        if seen.output is None:
            raise EvictorError(
                "CriticalKV needs the weight behind attention of each layer: Eviction(outputs=...)"
            )
        columns = seen.columns(self.window_tokens)
        attention = smoothed(columns.total.mean(2) / columns.rows, self.kernel)
        forced = self.forced(seen) & seen.valid
        budgets, many = self.budgets(seen), forced.sum(-1)
        stage = many + ((budgets - many).clamp_min(0) * self.first).long()
        passed = best(ranked(attention, forced, seen), stage)
        second = (attention + self.epsilon) * projected(seen.values, seen.output)
        # Whoever passed the first stage stands above all others.
        return second + passed * (second.amax(-1, keepdim=True) + 1)


def projected(values: Tensor, output: Tensor) -> Tensor:
    """||W_o v||_1 of values [B, H, n, D], the mean over the query heads of each: [B, H, n].

    Raises:
        EvictorError: W_o [model width, Hq * D] does not suit.
    """
    heads, dim = values.shape[1], values.shape[3]
    if output.dim() != 2 or output.shape[1] % (heads * dim):
        raise EvictorError(
            f"output is {tuple(output.shape)}: must be [model width, a multiple of {heads * dim}]"
        )
    weight = output.float().unflatten(1, (heads, -1, dim))  # [width, H, G, D]
    groups = weight.shape[2]
    rows = max(1, SCORES // (values.shape[0] * heads * weight.shape[0]))
    found = torch.zeros(values.shape[:3], dtype=torch.float32, device=values.device)
    for first in range(0, values.shape[2], rows):
        some = values[:, :, first : first + rows].float()
        for g in range(groups):
            found[:, :, first : first + rows] += (
                (some @ weight[:, :, g].permute(1, 2, 0)).abs().sum(-1)
            )
    return found / groups
