"""Scores of pages from one or two vectors a page: centre and spread, in any of their meanings.

    parts   a [N, Hkv, P, D], and b [N, Hkv, P, D] with no number below 0, or a alone; bfloat16,
            float16, float32
    score   (q . a + |q| . b) * scale, float32           |q| element by element

    bounds (Quest)           a = (max + min) / 2, b = (max - min) / 2:   the most that q . k can be
    mean and deviation       a = mean, b = standard deviation
    cuboid mean (ArkVale)    a = (max + min) / 2, b = mean |k - a|
    landmark (ShadowKV)      a = mean alone
    one token a page         a = the key, or some channels or a projection of it, alone

`outward` rounds a and b such that a bound stays a bound. Bytes read: the records once for all query
rows that share a KV head. Sources: Quest (arXiv 2406.10774), ArkVale (NeurIPS 2024), ShadowKV
(arXiv 2410.21465).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vattn.kernels.index import Index

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def outward(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The box ``low .. high`` [..., D] as (a, b) of ``dtype``: a - b <= low, high <= a + b."""
    low, high = low.float(), high.float()
    a = ((low + high) / 2).to(dtype)
    spread = torch.maximum(high - a.float(), a.float() - low).clamp_min(0.0)
    # The difference was rounded, too.
    most = torch.full_like(spread, torch.inf)
    spread = torch.where(spread > 0, torch.nextafter(spread, most), spread)
    b = spread.to(dtype)
    return a, torch.where(b.float() < spread, _up(b), b)


def _up(b: Tensor) -> Tensor:
    """The next larger number of a 16-bit dtype; b is not below 0. Nothing is lost in float32."""
    return b if b.dtype == torch.float32 else (b.view(torch.int16) + 1).view(b.dtype)


def scores(query: Tensor, index: Index, records: int, *, scale: float | None = None) -> Tensor:
    """Score the first ``records`` records: query [B, Hq, L, D] -> [B, Hkv, Hq / Hkv * L, records]
    float32, -inf where a sequence has no record. In torch's operations, for any device.

    Raises:
        ValueError: the query or the parts do not suit.
    """
    check(query, index)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = index.rows(query).float() * scale
    out = index.blank(rows, records)
    for b in range(index.batch):
        parts, n = index.read(b, records)
        found = rows[b] @ parts[0].float().mT
        if len(parts) == 2:
            found += rows[b].abs() @ parts[1].float().mT * (1 if scale >= 0 else -1)
        out[b, :, :, :n] = found
    return out


def check(query: Tensor, index: Index) -> None:
    """Raise ValueError unless the parts are summaries for ``query``."""
    dim = query.shape[-1]
    for part in index.parts:
        if part.shape[3] != dim or part.dtype not in DTYPES or len(index.parts) > 2:
            raise ValueError(
                f"parts are {[(tuple(p.shape), p.dtype) for p in index.parts]}: must be one or two "
                f"of width {dim}, bfloat16, float16 or float32"
            )
