"""AdaKV: the heads of a layer share one budget, and those that need more get more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vattn.evictor import BEST, EvictorError, Seen, best, ranked
from vattn.evictors.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV's scores, but the best of all KV heads of a layer together: heads whose attention is
    spread keep more tokens than heads that look at few. A layer keeps its budget exactly.

    Args:
        safeguard: share of the mean budget that each head gets in any case.

    Source: Feng et al., arXiv 2407.11550; code FFY0/AdaKV (a maximum over 7 tokens, safeguard .2).
    """

    kernel: int = 7
    safeguard: float = 0.2

    source: ClassVar[str] = "arXiv 2407.11550"
    summary: ClassVar[str] = "as SnapKV, with one budget for all heads of a layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise EvictorError(f"safeguard must be from 0 to 1, got {self.safeguard!r}")

    def score(self, seen: Seen) -> Tensor:
        found = seen.columns(self.window_tokens)
        # The window is kept anyway: its tokens must not lift those before it.
        before = found.total.mean(2).masked_fill(seen.age < found.rows, 0.0)
        return F.max_pool1d(before, self.kernel, stride=1, padding=self.kernel // 2)

    def choose(self, score: Tensor, seen: Seen, budgets: Tensor) -> Tensor:
        line = ranked(score, self.forced(seen), seen)
        least = (budgets.double() * self.safeguard - 1e-9).ceil()
        line = line.masked_fill(best(line, least) & seen.valid, BEST)
        kept = best(line.flatten(1), budgets.sum(1))
        return kept.view_as(score) & seen.valid
