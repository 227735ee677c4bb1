"""SnapKV: what the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vattn.evictor import Evictor, EvictorError, Seen
from vattn.selector import Caps


@dataclass(frozen=True, kw_only=True)
class SnapKV(Evictor):
    """Keep what the last queries of the prompt attend to, neighbours included.

    The mean over a KV head's query heads (the original repeats K and V for each query head, and
    saves nothing where heads share them), smoothed by an average over ``kernel`` tokens.

    Args:
        window_tokens: queries that are asked; their own tokens are kept in any case.
        kernel: tokens of the average, odd.

    Source: Li et al., arXiv 2404.14469; code FasterDecoding/SnapKV (window 32, average of 5).
    """

    sink_tokens: int = 0
    recent_tokens: int = 32
    window_tokens: int = 32
    kernel: int = 5

    caps: ClassVar[Caps] = Caps(frozenset({"mass"}), "token")
    source: ClassVar[str] = "arXiv 2404.14469"
    summary: ClassVar[str] = "attention of the prompt's last 32 queries, smoothed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_tokens < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise EvictorError(
                "window_tokens must be >= 1 and kernel an odd int >= 1, got "
                f"{self.window_tokens} and {self.kernel}"
            )

    def rows(self, tokens: int) -> int:
        return self.window_tokens

    def score(self, seen: Seen) -> Tensor:
        return smoothed(seen.columns(self.window_tokens).total.mean(2), self.kernel)


def smoothed(scores: Tensor, kernel: int) -> Tensor:
    """The mean of each token's ``kernel`` neighbours, zeros beyond the ends: [B, H, n]."""
    return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
