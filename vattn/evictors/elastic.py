"""Merging: what goes lives on in what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vattn.batch import Ints
from vattn.evictor import ALL_ROWS, Evictor, EvictorError, Seen
from vattn.evictors.combined import Wrapper
from vattn.evictors.order import by_text, ranks
from vattn.kernels.columns import SCORES
from vattn.kernels.contract import EMPTY
from vattn.kernels.evict import Rule
from vattn.selector import Caps

FAR = 1 << 40  # beyond any position


@dataclass(frozen=True, kw_only=True)
class Elastic(Evictor):
    """Keep what all heads together attend to; after a prompt, average K and V of each other token
    into those of the nearest one kept (of two as near, the earlier).

    A step drops the token ``distance`` from the end, unmerged: the newest ones and what the prompt
    left stay.

    Args:
        distance: 1 is the newest token.

    Source: Liu et al., Elastic Cache, arXiv 2407.18121 (a fifth of the prompt, the first and the
    last token in any case, 25 from the end).
    """

    budget: float | int = 0.2
    sink_tokens: int = 1
    recent_tokens: int = 1
    distance: int = 25

    caps: ClassVar[Caps] = Caps(frozenset({"mass", "position"}), "token", "layer")
    source: ClassVar[str] = "arXiv 2407.18121"
    summary: ClassVar[str] = "attention of all heads; the others are merged into their neighbours"
    decodes: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.distance, int) or self.distance < 1:
            raise EvictorError(f"distance must be an int >= 1, got {self.distance!r}")

    def rows(self, tokens: int) -> int:
        return ALL_ROWS

    def score(self, seen: Seen) -> Tensor:
        return seen.columns().total.mean((1, 2))[:, None].expand(seen.score.shape)

    def rescore(self, seen: Seen) -> Tensor:
        from_end = seen.counts[..., None] - seen.draft - ranks(by_text(seen))
        return (from_end - self.distance).abs().float()

    def rule(self, seen: Seen, limits: Ints) -> Rule | None:
        newest = seen.valid & (seen.age >= 0) & (seen.age < self.distance)
        if self.distance <= self.recent_tokens or bool((newest.sum(-1) < self.distance).any()):
            return None
        # From here on a place in the text is a place among the rows, as no other row goes.
        recent = np.full(len(seen.tokens), self.distance - 1, np.int64)
        return Rule(limits, recent, self.sink_tokens, within=1)

    def merged(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor, None] | None:
        if seen.query is None:  # a step
            return None
        into, own = nearest(seen, keep), seen.valid.float()
        many = torch.zeros_like(own).scatter_add_(2, into, own).clamp_min_(1)[..., None]
        k, v = (gathered(x.float() * own[..., None], into) / many for x in (seen.keys, seen.values))
        return k, v, None


@dataclass(frozen=True, kw_only=True)
class Merging(Wrapper):
    """What the base lets go adds its V to the token kept whose key is most like its own.

    V becomes the mean of its own and those it takes in, weighted by exp(cosine of the keys), 1 for
    its own. Keys stay, and with them what their positions say.

    Args:
        least: cosine below which a token is lost.

    Source: after Wan et al., D2O, arXiv 2406.13035 (its weights, for V alone and with a fixed
    threshold), and CaM (ICML 2024), which merges values.
    """

    least: float = 0.0

    source: ClassVar[str] = "arXiv 2406.13035"
    summary: ClassVar[str] = "another evictor; what it drops goes into the values of similar keys"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "merges", True)
        if not -1 <= self.least <= 1:
            raise EvictorError(f"least must be a cosine, in [-1, 1], got {self.least!r}")

    def merged(self, seen: Seen, keep: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        like, into = most_alike(seen.keys.float(), keep)
        goes = seen.valid & ~keep & (like >= self.least)
        weights = like.exp().masked_fill(~goes, 0.0).masked_fill(keep, torch.e)
        # Who stays goes into itself.
        into = torch.where(goes, into, torch.arange(into.shape[-1], device=into.device))
        sums = torch.zeros_like(weights).scatter_add_(2, into, weights)[..., None]
        values = gathered(seen.values.float() * weights[..., None], into) / sums
        return seen.keys.clone(), values, None


def nearest(seen: Seen, keep: Tensor) -> Tensor:
    """The row of ``keep`` whose token stands nearest in the text to that of each row: [B, H, n]."""
    order = by_text(seen)
    kept, at = keep.gather(2, order), seen.positions.gather(2, order)
    rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    before = rank.masked_fill(~kept, -1).cummax(-1).values
    last = order.shape[-1] - 1
    after = rank.masked_fill(~kept, last + 1).flip(-1).cummin(-1).values.flip(-1)
    down = (at - at.gather(2, before.clamp_min(0))).masked_fill(before < 0, FAR)
    up = (at.gather(2, after.clamp_max(last)) - at).masked_fill(after > last, FAR)
    chosen = torch.where(down <= up, before.clamp_min(0), after.clamp_max(last))
    return torch.empty_like(order).scatter_(2, order, order.gather(2, chosen))


def gathered(rows: Tensor, into: Tensor) -> Tensor:
    """Sums of rows [B, H, n, D] by where they go, [B, H, n]."""
    return torch.zeros_like(rows).scatter_add_(2, into[..., None].expand(rows.shape), rows)


def most_alike(keys: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Of the keys [B, H, n, D] of ``keep``, the cosine and the row of the one most like each."""
    directions = torch.nn.functional.normalize(keys, dim=-1)
    rows = max(1, SCORES // keep.numel())
    found = [
        (some @ directions.mT).masked_fill(~keep[:, :, None], EMPTY).max(-1)
        for some in directions.split(rows, 2)
    ]
    return torch.cat([x.values for x in found], 2), torch.cat([x.indices for x in found], 2)
