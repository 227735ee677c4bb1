"""Attention as two matrix products a sequence, a group's query heads as rows.

    query [B, Hq, L, D]  key [B, Hkv, S, D]  value [B, Hkv, S, Dv]  -> [B, Hq, L, Dv]
    dtypes float32, float64, bfloat16, float16; any strides, D and Dv; masks as `contract` says

The matrix library reads K and V in place, whatever strides sequence, head and token have: the
batch is walked, since `matmul` over [B, Hkv] copies a cache whose sequences do not follow each
other head by head. Scores, weights and sums are float32 (float64 for float64): bfloat16 products
round the scores to 8 bits, for up to seven times the error of torch, so half-precision rows become
float32 first, a block of tokens at a time.

Memory: the scores once, changed in place, and the float32 copy of one block of K or V. Bytes
moved: K and V once, the scores about eight times. All S rows must be mapped and hold numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vattn.kernels.contract import EMPTY, check, empty_rows
from vattn.kernels.packed import pack_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Bytes of float32 rows made at once: a block stays in the processor's last cache.
BLOCK_BYTES = 4 << 20


def grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend: [B, Hq, L, Dv]. Raises ValueError for what this kernel does not take."""
    check(query, key, value, mask, DTYPES)
    return attend(query, key, value, mask, scale)[0]


def grouped_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`grouped`, and the log-sum-exp of each row: [B, Hq, L]."""
    check(query, key, value, mask, DTYPES)
    return attend(query, key, value, mask, scale)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`grouped_lse` for a caller that has checked."""
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    if 0 in (batch, heads, length, keys):
        return empty_rows(query, value)
    groups = heads // kv_heads
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = (dim**-0.5 if dim else 1.0) if scale is None else scale
    rows = pack_rows(query, groups).to(wide) * factor
    scores = rows.new_empty((*rows.shape[:3], keys))
    for b in range(batch):
        for some, span in _blocks(key[b], wide):
            torch.bmm(rows[b], some.mT, out=scores[b, :, :, span])
    if mask is not None:
        _apply(mask, scores.view(batch, kv_heads, groups, length, keys))
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top.masked_fill(top == EMPTY, 0.0)).exp_()
    out = rows.new_zeros((*rows.shape[:3], value.shape[3]))
    for b in range(batch):
        for some, span in _blocks(value[b], wide):
            out[b].baddbmm_(weights[b, :, :, span], some)
    total = weights.sum(dim=-1, keepdim=True)
    out /= total.masked_fill(total == 0.0, 1.0)
    lse = (top + total.log()).reshape(query.shape[:3])
    return out.to(query.dtype).reshape(*query.shape[:3], value.shape[3]), lse


def _blocks(rows: Tensor, wide: torch.dtype) -> Iterator[tuple[Tensor, slice]]:
    """Rows [H, S, D] in ``wide``: as they are, or converted a block of tokens at a time."""
    heads, keys, dim = rows.shape
    step = keys if rows.dtype == wide else max(1, BLOCK_BYTES // max(1, 4 * heads * dim))
    for first in range(0, keys, step):
        span = slice(first, min(first + step, keys))
        yield rows[:, span].to(wide), span


def _apply(mask: Tensor, scores: Tensor) -> None:
    """Put a mask on scores [B, Hkv, G, L, S], in place and without expanding it."""
    if mask.dim() == 4:
        kv_heads, groups = scores.shape[1:3] if mask.shape[1] > 1 else (1, 1)
        mask = mask.unflatten(1, (kv_heads, groups))
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, EMPTY)
    else:
        scores.add_(mask)
