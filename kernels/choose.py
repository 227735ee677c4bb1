"""From scores to a selection: joined over the query rows of a KV head, then the best, in order.

    scores  [B, Hkv, R, n] float32   of n pages for the R query rows that share a KV head; -inf
                                     where there is no page
    joined  [B, Hkv, n]              log of the sum ("sum") or the largest ("max") over the rows of
                                     softmax(scores): every row weighs alike
    forced                           pages taken whatever their score: +inf in ``joined``

Ties go to the lower page number, so that the same scores give the same pages on every device. The
pages of a selection ascend. Sources: RetroInfer (arXiv 2505.02922) joins by sum, ShadowKV by max;
top-p is Twilight's (arXiv 2502.02770), the threshold InfiniGen's (arXiv 2406.19707).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vattn.kernels.contract import EMPTY

Join = Literal["sum", "max"]
FORCED = float("inf")


def joined(scores: Tensor, how: Join = "sum") -> Tensor:
    """Join the rows of a KV head: [B, Hkv, R, n] -> [B, Hkv, n], -inf where there is no page."""
    sums = scores.logsumexp(-1, keepdim=True)
    shares = scores - sums.masked_fill(sums == EMPTY, 0.0)
    return shares.logsumexp(-2) if how == "sum" else shares.amax(-2)


def force(
    joined: Tensor, pages: Tensor, first: int, last: int, starts: Tensor | None = None
) -> Tensor:
    """Mark the ``first`` and ``last`` of the pages ``starts .. pages`` ([B] each; None: from 0) of
    each sequence as taken in any case; others are none. In place; returns ``joined``."""
    n = torch.arange(joined.shape[-1], device=joined.device)
    end = pages[:, None]
    start = torch.zeros_like(end) if starts is None else starts[:, None]
    there = (n >= start) & (n < end)
    taken = ((n < start + first) | (n >= end - last)) & there
    joined.masked_fill_(taken[:, None], FORCED)
    return joined.masked_fill_(~there[:, None], EMPTY)


def top_k(joined: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best pages, or all there are: ids [B, Hkv, min(k, n)] and count [B, Hkv], int32."""
    k = min(k, joined.shape[-1])
    best, order = joined.sort(dim=-1, descending=True, stable=True)
    return _ascending(order[..., :k], (best[..., :k] > EMPTY).sum(-1), joined.shape[-1])


def top_p(joined: Tensor, p: float, least: int, most: int) -> tuple[Tensor, Tensor]:
    """The fewest best pages that hold the share ``p`` of the softmax mass of those not forced, and
    the forced ones: ``least .. most`` pages. Returns as `top_k`."""
    most = min(most, joined.shape[-1])
    best, order = joined.sort(dim=-1, descending=True, stable=True)
    forced = best == FORCED
    mass = torch.softmax(best.masked_fill(forced, EMPTY).double(), -1).nan_to_num_(0.0)
    before = mass.cumsum(-1) - mass
    taken = forced | (before < p) & (mass > 0)
    there = (best > EMPTY).sum(-1)
    count = taken.sum(-1).clamp(min=least).clamp(max=most).minimum(there)
    return _ascending(order[..., :most], count, joined.shape[-1])


def threshold(joined: Tensor, alpha: float, least: int, most: int) -> tuple[Tensor, Tensor]:
    """Pages whose score is above the best's (not forced) minus ``alpha``, and the forced ones:
    ``least .. most`` pages, the best of them. Returns as `top_k`."""
    most = min(most, joined.shape[-1])
    best, order = joined.sort(dim=-1, descending=True, stable=True)
    top = best.masked_fill(best == FORCED, EMPTY).amax(-1, keepdim=True)
    there = (best > EMPTY).sum(-1)
    count = ((best > top - alpha) & (best > EMPTY)).sum(-1)
    count = count.clamp(min=least).clamp(max=most).minimum(there)
    return _ascending(order[..., :most], count, joined.shape[-1])


def _ascending(order: Tensor, count: Tensor, beyond: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` of each row, in ascending order; ``beyond`` stands behind them."""
    place = torch.arange(order.shape[-1], device=order.device)
    ids = order.masked_fill(place >= count[..., None], beyond).sort(dim=-1).values
    return ids.int(), count.int()
