"""Keep some rows of K and V and close the gaps, in place: what makes eviction give memory back.

    kept [B, Hkv, m] ascending row numbers, count [B, Hkv]
    row i of a head becomes its row kept[i], for i < count; rows behind are as they were, to be
    forgotten (`KVCache.truncate`) and unmapped

Ascending and without repetition, so kept[i] >= i: nothing is written that is still to be read, and
no second copy of the cache is needed. The order of the rows stays.

    on a GPU     `compact_kernel` (Triton): a program takes a head from its first row to its last
    elsewhere    torch's operations, a head at a time

Bytes moved: each kept row of K and V once in and once out, but for the leading ones that stay. Only
the first ``lengths`` rows need be mapped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vattn.kernels.kv import KV

# Rows of a head that are copied at once.
CHUNK = 4096


def compact(kv: KV, kept: Tensor, count: Tensor) -> None:
    """Move the kept rows [B, Hkv, m] int64 to the front; ``count`` [B, Hkv] says how many are.

    Raises:
        ValueError: rows that do not ascend or do not exist; nothing has moved.
    """
    check(kv, kept, count)
    if kv.key.is_cuda:
        from vattn.kernels.compact_kernel import launch

        launch(kv, kept, count)
        return
    slots = list(range(kv.batch)) if kv.slots is None else kv.slots.tolist()
    for b, (slot, counts) in enumerate(zip(slots, count.tolist(), strict=True)):
        for h, many in enumerate(counts):
            rows = kept[b, h, :many]
            stays = int((rows == torch.arange(many, device=rows.device)).sum())
            # Ascending rows that are their own places are the first ones.
            for first in range(stays, many, CHUNK):
                some = rows[first : min(first + CHUNK, many)]
                for side in (kv.key, kv.value):
                    head = side[slot, h]
                    head[first : first + len(some)] = head[some]


def check(kv: KV, kept: Tensor, count: Tensor) -> None:
    """Raise ValueError unless the rows ascend and exist."""
    shape = (kv.batch, kv.key.shape[1])
    if kept.dim() != 3 or kept.shape[:2] != shape or count.shape != shape:
        raise ValueError(
            f"kept is {tuple(kept.shape)} and count {tuple(count.shape)}: must be "
            f"{(*shape, 'm')} and {shape}"
        )
    for name, tensor in (("kept", kept), ("count", count)):
        if tensor.dtype != torch.int64 or tensor.device != kv.key.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}: must be int64 on {kv.key.device}"
            )
    if bool(((count < 0) | (count > kept.shape[2])).any()):
        raise ValueError(f"count must lie in 0..{kept.shape[2]}, the kept rows that there are")
    if not kept.shape[2]:
        return
    most = torch.full(shape[:1], kv.key.shape[2], device=kept.device)
    lengths = most if kv.lengths is None else kv.lengths
    inside = torch.arange(kept.shape[2], device=kept.device) < count[..., None]
    beyond = (kept >= lengths[:, None, None]) | (kept < 0)
    falls = torch.zeros_like(inside)
    falls[..., 1:] = kept[..., 1:] <= kept[..., :-1]
    if bool(((beyond | falls) & inside).any()):
        raise ValueError("kept rows must ascend, without repetition, below each sequence's length")


def as_rows(keep: Tensor) -> tuple[Tensor, Tensor]:
    """What a mask [B, Hkv, n] keeps, as `compact` takes it: ascending rows [B, Hkv, m] int64,
    filled up with 0, and how many [B, Hkv]."""
    counts = keep.sum(-1)
    # A stable sort of "not kept" puts the kept rows first, in order.
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    longest = int(counts.max())
    rows = order[..., :longest]
    at = torch.arange(longest, device=keep.device)
    return rows.masked_fill(at >= counts[..., None], 0), counts
