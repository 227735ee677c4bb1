"""Attention to what a `HeadCache` holds, and the scores that it was made of.

The ranges of a layer are sequences of one KV head: rows of a query here are [ranges, G, L, D].

    weights      rows that stand for several tokens: the log of their number joins the score
    narrow rows  see `narrow_attention`
    others       the stream kernel on a CPU, Triton's on a device; elsewhere torch's, head by head
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import narrow_attention
from .kernels import score, sparse, stream
from .kernels.contract import EMPTY, plain_rows
from .kernels.index import Index
from .kernels.kv import MOST_TOKENS
from .kernels.scores import Scores
from .kernels.selection import Selection
from .ragged import streams

if TYPE_CHECKING:
    from .heads import HeadCache

Pair = tuple[Tensor, Tensor]


def attend_lse(heads: HeadCache, rows: Tensor, layer: int, scale: float | None) -> Pair:
    """See `HeadCache.attend_lse`."""
    logs, narrow = heads.log_weights(layer), heads.narrow_rows(layer)
    if narrow is not None:
        heads.check_last(layer, rows.shape[2])
        return narrow_attention.attend_lse(heads, rows, narrow, layer, scale)
    if streams(rows):
        return streamed(heads, rows, layer, scale)
    if logs is not None:
        return _weighted(heads, rows, layer, scale, logs)
    heads.check_last(layer, rows.shape[2])
    return narrow_attention.read(rows, heads.kv(layer), scale)


def attend_logits(
    heads: HeadCache, rows: Tensor, layer: int, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `HeadCache.attend_logits`."""
    narrow, weighted = heads.narrow_rows(layer) is not None, heads.log_weights(layer) is not None
    launches = rows.is_cuda and rows.shape[2] <= MOST_TOKENS and not weighted
    if narrow or not (streams(rows) or launches):
        return *attend_lse(heads, rows, layer, scale), logits(heads, rows, layer, scale)
    shape = len(rows), 1, rows.shape[1] * rows.shape[2], heads.longest(layer)
    found = torch.empty(shape, dtype=torch.float32, device=rows.device)
    attend = streamed if streams(rows) else launched
    return *attend(heads, rows, layer, scale, found), found[:, 0]


def logits(heads: HeadCache, rows: Tensor, layer: int, scale: float | None) -> Tensor:
    """See `HeadCache.logits`: [ranges, G * L, n]."""
    kv, longest = heads.kv(layer), heads.longest(layer)
    assert kv.lengths is not None
    index = Index((kv.key,), kv.lengths, kv.slots)
    found, length = score.summaries(rows, index, longest, scale=scale)[:, 0], rows.shape[2]
    if length > 1:  # a query does not see the tokens behind it
        line = torch.arange(found.shape[1], device=found.device) % length
        last = (kv.lengths[:, None] - length + line)[..., None]
        found.masked_fill_(torch.arange(longest, device=found.device) > last, EMPTY)
    logs = heads.log_weights(layer)
    return found if logs is None else found.add_(logs.flatten(0, 1)[:, None])


def streamed(
    heads: HeadCache, rows: Tensor, layer: int, scale: float | None, told: Tensor | None = None
) -> Pair:
    """By the stream kernel, which tells its logits."""
    heads.check_last(layer, rows.shape[2])
    logs, where = heads.log_weights(layer), heads.rows(layer)
    bias = None if logs is None else logs.flatten(0, 1)
    return stream.stream_ragged(plain_rows(rows), where, scale=scale, logits=told, bias=bias)


def launched(heads: HeadCache, rows: Tensor, layer: int, scale: float | None, told: Tensor) -> Pair:
    """By Triton's kernel, likewise."""
    heads.check_last(layer, rows.shape[2])
    from .kernels.decode import decode_lse

    return decode_lse(rows, heads.kv(layer), Scores(scale, "bottom_right"), logits=told)


def _weighted(
    heads: HeadCache, rows: Tensor, layer: int, scale: float | None, logs: Tensor
) -> Pair:
    """Every row is chosen, and the logs are its scores' weights."""
    kv, logs = heads.kv(layer), logs.flatten(0, 1)[:, None]
    ids = torch.arange(logs.shape[2], dtype=torch.int32, device=rows.device)
    assert kv.lengths is not None
    count = kv.lengths.to(torch.int32)[:, None]
    chosen = Selection(ids.expand(len(rows), 1, -1).contiguous(), count, 1, logs.contiguous())
    return sparse.attend(rows.contiguous(), kv, chosen, scale=scale)[:2]
