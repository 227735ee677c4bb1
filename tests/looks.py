"""Looks at keys that lie in memory poisoned with NaN, for tests of selectors and indexes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vattn.kernels.index import Index
from vattn.kernels.kv import KV
from vattn.kernels.selection import Selection
from vattn.policies import Quest
from vattn.selector import Look, Selector

LAYERS, KV_HEADS, GROUPS, DIM = 3, 2, 3, 16
HEADS = KV_HEADS * GROUPS
TOKENS, BUDGET = 150, 96
FORCED = {"sink_tokens": 4, "recent_tokens": 8}
PLAIN = {"budget_tokens": BUDGET, **FORCED}


def poisoned(rows: Tensor, lengths: Sequence[int], room: int = 3) -> Tensor:
    """A copy [B, H, n + room, w] of rows [B, H, n, w], with the largest bytes behind ``lengths``:
    NaN in a float."""
    shape = (*rows.shape[:2], rows.shape[2] + room, rows.shape[3])
    base = torch.full((*shape, rows.element_size()), 255, dtype=torch.uint8)
    out = base.view(rows.dtype)[..., 0]
    for b, length in enumerate(lengths):
        out[b, :, :length] = rows[b, :, :length]
    return out


def index_of(
    selector: Selector, layer: int, key: Tensor, value: Tensor, lengths: Sequence[int]
) -> Index | None:
    """The records of the full pages of K and V [B, Hkv, n, D], nothing behind them."""
    size = selector.page_tokens
    counts = [length // size for length in lengths]
    if not selector.parts(key.shape[-1]):
        return None
    full = slice(max(counts) * size)
    pages = (side[:, :, full].unflatten(2, (max(counts), size)) for side in (key, value))
    made = [selector.record(layer, k, v) for k, v in zip(*pages, strict=True)]
    parts = [poisoned(torch.stack(part), counts) for part in zip(*made, strict=True)]
    return Index(tuple(parts), torch.tensor(counts))


def look_at(
    selector: Selector,
    key: Tensor,
    value: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    *,
    layer: int = 0,
    step: int = 0,
    starts: Sequence[int] | None = None,
    earlier: Mapping[int, Selection] | None = None,
) -> Look:
    """A look at keys [B, Hkv, n, D] of ``lengths`` tokens (None: n each)."""
    lengths = [key.shape[2]] * len(key) if lengths is None else lengths
    value = key if value is None else value
    kv = KV(
        poisoned(key, lengths),
        poisoned(value, lengths),
        torch.tensor(lengths, dtype=torch.int32),
        None if starts is None else torch.tensor(starts, dtype=torch.int32),
    )
    return Look(
        layer=layer,
        kv=kv,
        index=index_of(selector, layer, key, value, lengths),
        lengths=np.array(lengths),
        scale=key.shape[-1] ** -0.5,
        starts=None if starts is None else np.array(starts),
        earlier={} if earlier is None else earlier,
        step=step,
    )


def tokens(selection: Selection, b: int, h: int, length: int) -> set[int]:
    """The tokens below ``length`` that a sequence reads for a KV head."""
    size = selection.page_tokens
    pages = selection.ids[b, h, : int(selection.count[b, h])].tolist()
    return {t for p in pages for t in range(p * size, (p + 1) * size) if t < length}


def inputs(batch: int = 1, count: int = TOKENS, length: int = 1) -> tuple[Tensor, Tensor]:
    """A query [B, Hq, L, D], and keys [B, Hkv, count, D]."""
    return torch.randn(batch, HEADS, length, DIM), torch.randn(batch, KV_HEADS, count, DIM)


def recorded(count: int = 64) -> tuple[Tensor, Tensor]:
    """Keys and queries of every layer, as a calibration sees them."""
    keys = torch.randn(LAYERS, KV_HEADS, count, DIM) * torch.logspace(0.5, -0.5, DIM)
    return keys + 1, torch.randn(LAYERS, HEADS, count, DIM)


def pages(budget: int) -> Selector:
    return Quest(page_tokens=8, budget_tokens=budget, **FORCED)


def every(batch: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Ids and counts of all pages."""
    pages = -(-count // size)
    ids = torch.arange(pages, dtype=torch.int32).expand(batch, KV_HEADS, -1).contiguous()
    return ids, torch.full((batch, KV_HEADS), pages, dtype=torch.int32)
