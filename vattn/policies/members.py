"""Selections as sets of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vattn.kernels.selection import Selection
from vattn.selector import Look


def tokens_there(look: Look, tokens: int) -> Tensor:
    """Which of the first ``tokens`` tokens each sequence has: bool [B, tokens]."""
    at = torch.arange(tokens, device=look.kv.key.device)
    there = at < look.counts(1)[:, None]
    first = look.firsts(1)
    return there if first is None else there & (at >= first[:, None])


def tokens_chosen(selection: Selection | None, look: Look, tokens: int, kv_heads: int) -> Tensor:
    """Which of the first ``tokens`` tokens each KV head reads: bool [B, Hkv, tokens]; None: all."""
    there = tokens_there(look, tokens)[:, None]
    if selection is None:
        return there.expand(-1, kv_heads, -1)
    size = selection.page_tokens
    pages = -(-tokens // size)
    entry = torch.arange(selection.ids.shape[-1], device=selection.ids.device)
    # One page more than there are takes what stands behind the counts.
    chosen = torch.zeros(*selection.ids.shape[:2], pages + 1, device=entry.device, dtype=torch.bool)
    ids = selection.ids.long().masked_fill(entry >= selection.count[..., None], pages)
    chosen.scatter_(-1, ids, True)
    return chosen[..., :pages].repeat_interleave(size, -1)[..., :tokens] & there


def every_page(look: Look, page_tokens: int, kv_heads: int) -> Selection:
    """All pages of each sequence: a selection that leaves nothing out."""
    pages = look.pages(page_tokens)
    count = look.counts(page_tokens).int()[:, None].expand(-1, kv_heads)
    ids = torch.arange(pages, dtype=torch.int32, device=count.device)
    ids = ids.where(ids < count[..., None], pages)
    return Selection(ids, count.contiguous(), page_tokens)


def tokens_of(selection: Selection) -> Tensor:
    """The token numbers of a selection's pages, ascending: int64 [B, Hkv, K * page_tokens]; behind
    ``count`` pages these are beyond any token."""
    size = selection.page_tokens
    entry = torch.arange(selection.ids.shape[-1], device=selection.ids.device)
    beyond = torch.iinfo(torch.int32).max // size
    pages = selection.ids.long().masked_fill(entry >= selection.count[..., None], beyond)
    return (pages[..., None] * size + torch.arange(size, device=entry.device)).flatten(-2)
