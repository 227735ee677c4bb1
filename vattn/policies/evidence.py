"""What policies read: a layer's records, some parts of them, or K itself as records."""

from __future__ import annotations

import torch
from torch import Tensor

from vattn.kernels import score
from vattn.kernels.contract import EMPTY
from vattn.kernels.index import Index
from vattn.kernels.kv import FP8
from vattn.selector import Look, SelectorError


def records(look: Look, first: int = 0, last: int | None = None) -> Index:
    """The layer's records: parts ``first .. last`` of them. Raises SelectorError without any."""
    index = look.index
    if index is None:
        raise SelectorError(f"layer {look.layer} has no index: this selector needs one")
    return Index(index.parts[first:last], index.counts, index.slots)


def keys_themselves(look: Look) -> Index:
    """K as one record a token. Raises SelectorError for keys of 8 bits."""
    kv = look.kv
    if kv.key.dtype in FP8:
        raise SelectorError(f"keys are {kv.key.dtype}: this selector reads 16 or 32 bits")
    return Index((kv.key,), kv.lengths, kv.slots)


def gathered(index: Index, ids: Tensor, page_tokens: int) -> Index:
    """The records of chosen pages, ids [B, Hkv, K], side by side, as one record a token: parts [B,
    Hkv, K * page_tokens, width / page_tokens]. Where a page has no record stands another's."""
    batch, heads, _ = ids.shape
    device = ids.device
    slots = torch.arange(batch, device=device) if index.slots is None else index.slots.long()
    held = torch.full((batch,), index.parts[0].shape[2]) if index.counts is None else index.counts
    held = held.to(device).long()
    # Records beyond the counts may not be mapped: a sequence that has none reads the longest's.
    slots = torch.where(held > 0, slots, slots[held.argmax()])[:, None, None]
    rows = ids.long().clamp(max=(held - 1).clamp_min(0)[:, None, None])
    each = torch.arange(heads, device=device)[:, None]
    return Index(
        tuple(
            part[slots, each, rows].unflatten(-1, (page_tokens, -1)).flatten(2, 3)
            for part in index.parts
        )
    )


def exact_scores(query: Tensor, look: Look, tokens: Tensor) -> Tensor:
    """q . k * scale of tokens [B, Hkv, m] for the rows of query [B, Hq, L, D]: [B, Hkv, R, m]
    float32, -inf for tokens that a row does not see."""
    rows = gathered(keys_themselves(look), tokens, 1)
    found = score.summaries(query, rows, tokens.shape[-1], scale=look.scale)
    length = query.shape[2]
    row = torch.arange(found.shape[2], device=tokens.device) % length
    last = look.counts(1)[:, None] - length + row
    return found.masked_fill_(tokens[:, :, None] > last[:, None, :, None], EMPTY)


def exact_sums(query: Tensor, look: Look, tokens: Tensor) -> Tensor:
    """Log of the sum of exp(`exact_scores`): [B, Hkv, R]."""
    return exact_scores(query, look, tokens).logsumexp(-1)
