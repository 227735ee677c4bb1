"""ThinK: tokens as SnapKV chooses them, of which old ones keep some channels of K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.evictor import EvictorError, Seen, best
from vattn.evictors.snapkv import SnapKV
from vattn.selector import Caps

ROW = 16  # bytes: rows of K begin at multiples of it
CHUNK = 4096  # tokens that are squared at once


@dataclass(frozen=True, kw_only=True)
class ThinK(SnapKV):
    """Keep what SnapKV keeps, and of K only the channels that matter to the prompt's last queries.

    A channel is worth ||Q_c||^2 ||K_c||^2, over the window's queries of all query heads of a KV
    head, and over the tokens it keeps. Each head drops the least ones from K of its tokens but for
    the last ``recent_tokens``, whose memory goes back; V and tokens to come stay whole. A row that
    is left has a multiple of 16 bytes where that is less than all: of 128 channels in bfloat16 at
    0.4 it is 80, not 77.

    What was narrowed after a prompt stays, and so do a head's channels: a later prompt has what is
    left of the budget for its own tokens, so a share suits several prompts, a number one.

    Args:
        channels: share of the channels to drop, at most; 0: SnapKV.

    Source: Xu et al., arXiv 2407.21018 (0.4, and 32 recent tokens); code
    SalesforceAIResearch/ThinK, which scores each query head's channels.
    """

    channels: float = 0.4

    caps: ClassVar[Caps] = Caps(frozenset({"mass", "keys"}), "token")
    source: ClassVar[str] = "arXiv 2407.21018"
    summary: ClassVar[str] = "SnapKV, and of old tokens' K the channels that queries use"
    narrows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.channels < 1:
            raise EvictorError(f"channels must be >= 0 and < 1, a share, got {self.channels!r}")

    def budgets(self, seen: Seen) -> Tensor:
        budgets = super().budgets(seen)
        return budgets if seen.narrow is None else (budgets - seen.narrow).clamp_min(0)

    def narrowed(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor] | None:
        dim = seen.kv.key.shape[3]
        left = width(dim, self.channels, seen.kv.key.element_size())
        if left == dim:
            return None
        worth = channel_scores(seen, keep, self.window_tokens)
        stays = best(worth, torch.full(worth.shape[:2], left, device=worth.device))
        channels = stays.nonzero()[:, 2].view(*worth.shape[:2], left)
        return keep & (seen.age >= self.recent_tokens), channels


def width(dim: int, share: float, item: int) -> int:
    """Channels that are left of ``dim`` of ``item`` bytes: at least those that ``share`` leaves."""
    left, step = dim - int(dim * share), max(1, ROW // item)
    whole = -(-left // step) * step
    return whole if whole < dim else left


def channel_scores(seen: Seen, keep: Tensor, window: int) -> Tensor:
    """||Q_c||^2 ||K_c||^2 over the last ``window`` queries and the tokens of a mask [B, H, n]:
    [B, H, D] float32."""
    if seen.query is None:
        raise EvictorError("ThinK chooses channels after a prompt: there are no queries")
    query = seen.query[:, :, -window:].float().unflatten(1, (keep.shape[1], -1))
    keys = seen.keys
    shape = (*keys.shape[:2], keys.shape[3])
    found = torch.zeros(shape, dtype=torch.float32, device=keys.device)
    for first in range(0, keys.shape[2], CHUNK):
        some = keep[:, :, first : first + CHUNK, None]
        found += keys[:, :, first : first + CHUNK].float().square().where(some, 0.0).sum(2)
    return found * query.square().sum((2, 3))
