"""PyramidKV: SnapKV with more for the first layers than for the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import EvictorError, Seen
from vattn.evictors.snapkv import SnapKV

CLOSE = 1e-9  # what rounding may add to a budget


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's choice within budgets that fall from layer to layer: attention of the first layers
    spreads over the whole text, that of the last is on few tokens.

    With M tokens to choose beside those kept in any case, the last layer chooses M / beta, the
    first 2 M - M / beta, the layers between on a line; together M times their number, exactly. No
    layer gets more than there is, and all get M where the text is shorter than 2 M.

    Args:
        beta: how steep; 1: all layers get the same.

    Source: Cai et al., arXiv 2406.02069; code Zefan-Cai/KVCache-Factory (beta 20).
    """

    beta: float = 20.0

    source: ClassVar[str] = "arXiv 2406.02069"
    summary: ClassVar[str] = "as SnapKV, with less for each deeper layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise EvictorError(f"beta must be >= 1 (the same for all layers), got {self.beta!r}")

    def budgets(self, seen: Seen) -> Tensor:
        layers = [i for i in range(seen.layers) if i not in self.dense_layers]
        kept = self.sink_tokens + self.recent_tokens
        free = pyramid(seen.target - kept, seen.tokens - kept, len(layers), self.beta)
        return (kept + free[layers.index(seen.layer)])[:, None].expand_as(seen.counts)


def pyramid(mean: Tensor, most: Tensor, layers: int, beta: float) -> Tensor:
    """Falling budgets with ``mean`` [B], each at most ``most`` [B] where the mean is: [layers, B]
    int64. They sum to mean * layers."""
    average = mean.double()
    first = torch.minimum(average * (2 - 1 / beta), most.double())
    flat = (most < 2 * average) if layers > 1 else torch.ones_like(mean, dtype=torch.bool)
    first = torch.where(flat, average, first)
    down = torch.linspace(0, 1, layers, dtype=torch.float64, device=mean.device)[:, None]
    exact = first - 2 * (first - average) * down
    whole = (exact + CLOSE).floor()
    # What rounding down has left goes to the first layers that lost some: budgets still fall.
    lost = exact - whole > CLOSE
    return (whole + (lost & (lost.cumsum(0) <= mean * layers - whole.sum(0)))).long()
