"""Attention guidance: a helper loss that shows some heads where a context occurred before.

Copying needs an induction head, which attends from a byte to the byte *after* the earlier
occurrence of the same context. Left alone, such heads appear late in training. For a few heads
this loss asks for the attention itself: minus the log of the mass on all positions whose
preceding n bytes equal the last n bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# layer -> (query heads, length n of the context to match)
GUIDED: dict[int, tuple[int, int]] = {2: (4, 3), 3: (4, 5)}


def matches(ids: Tensor, n: int) -> Tensor:
    """Boolean [batch, query, key]: the n bytes before ``key`` equal the n bytes up to ``query``."""
    length = ids.shape[1]
    found = torch.zeros(ids.shape[0], length, length, dtype=torch.bool)
    same = ids[:, :, None] == ids[:, None, :]
    # found[t, s]: same[t, s - 1] and same[t - 1, s - 2] and ... n times.
    part = same
    for back in range(1, n):
        shifted = torch.zeros_like(same)
        shifted[:, back:, back:] = same[:, :-back, :-back]
        part = part & shifted
    found[:, :, 1:] = part[:, :, :-1]
    return found & torch.ones(length, length, dtype=torch.bool).tril()


def guidance(ids: Tensor, taps: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Mean guidance loss over guided layers and positions that have a match.

    ids: [batch, length]; taps: layer -> query [batch, heads, length, dim] and key
    [batch, kv_heads, length, dim], rotated.
    """
    length = ids.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    total = torch.zeros(())
    for layer, (heads, n) in GUIDED.items():
        q, k = taps[layer]
        per_key = q.shape[1] // k.shape[1]
        scores = (
            q[:, :heads]
            @ k[:, : (heads + per_key - 1) // per_key]
            .repeat_interleave(per_key, dim=1)[:, :heads]
            .mT
        )
        scores = scores / q.shape[-1] ** 0.5
        target = matches(ids, n)[:, None]
        everything = scores.masked_fill(future, -1e9).logsumexp(-1)
        wanted = scores.masked_fill(~target, -1e9).logsumexp(-1)
        valid = target.any(-1).expand_as(wanted)
        loss = (everything - wanted)[valid]
        if loss.numel():
            total = total + loss.mean() / len(GUIDED)
    return total
