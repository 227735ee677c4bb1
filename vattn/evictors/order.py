"""The rows of a head in the order of the text, for evictors that look at neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from vattn.evictor import Seen, Step

LAST = torch.iinfo(torch.int64).max


def by_text(seen: Seen | Step) -> Tensor:
    """Row numbers in the order of their positions, [B, H, n]; rows that there are not come last.
    Steps that drop one token each leave rows in any order."""
    return seen.positions.masked_fill(~seen.valid, LAST).argsort(dim=-1, stable=True)


def ranks(order: Tensor) -> Tensor:
    """How many rows come before each, [B, H, n]: the inverse of an order."""
    at = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, at)
