"""Attention to the rows of a `HeadCache` and its narrow rows.

All queries see all narrow rows, and of the others those up to their own. With a few queries both
parts are read where they lie, and joined by log-sum-exp:

    query, the kept channels of its head  ──►  K of D' channels, V   ──┐
    query  ───────────────────────────────►  K of D channels, V      ──┴──►  merged

Prompts are read over a copy of the layer, in which channels that were given up are zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ragged
from .kernels import stream
from .kernels.contract import plain_rows
from .kernels.kv import KV, MOST_TOKENS
from .kernels.merge import join
from .kernels.scores import Scores
from .narrow import NarrowRows
from .sdpa_gpu import over_lanes

if TYPE_CHECKING:
    from .heads import HeadCache


def attend_lse(
    heads: HeadCache, query: Tensor, narrow: NarrowRows, layer: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend to a layer with narrow rows: query [ranges, G, L, D], of other rows at least L in each
    range. Returns the same shape and the log-sum-exp [ranges, G, L]."""
    factor = query.shape[3] ** -0.5 if scale is None else float(scale)
    if ragged.streams(query):
        parts = streamed(heads, query, narrow, layer, factor)
    elif query.is_cuda and query.shape[2] <= MOST_TOKENS:
        parts = launched(query, heads.kv(layer), narrow, layer, factor)
    else:
        return read(query, rebuilt(heads.kv(layer), narrow, layer), factor)
    out, lse = join(parts)
    return out.to(query.dtype), lse


def rebuilt(kv: KV, narrow: NarrowRows, layer: int) -> KV:
    """A copy of all rows of a layer, the narrow ones first, with zeros in the channels that these
    have given up."""
    few, channels = narrow.kv(layer), narrow.channels(layer)
    assert channels is not None
    assert kv.lengths is not None
    assert few.lengths is not None
    ends = few.lengths + kv.lengths
    shape = (kv.batch, 1, int(ends.max()), kv.key.shape[3])
    key, value = kv.key.new_zeros(shape), kv.value.new_zeros(shape)
    counts, totals = few.lengths.tolist(), ends.tolist()
    kept = channels.flatten(0, 1)
    for i, (thin, wide) in enumerate(zip(_slots(few), _slots(kv), strict=True)):
        old, end = counts[i], totals[i]
        key[i, 0, :old, kept[i]] = few.key[thin, 0, :old]
        value[i, 0, :old] = few.value[thin, 0, :old]
        key[i, 0, old:end] = kv.key[wide, 0, : end - old]
        value[i, 0, old:end] = kv.value[wide, 0, : end - old]
    return KV(key, value, ends)


def streamed(
    heads: HeadCache, query: Tensor, narrow: NarrowRows, layer: int, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """Both parts by the stream kernel, in float32."""
    some, few, others = _gathered(query, narrow, layer), narrow.rows(layer), heads.rows(layer)
    return [
        stream.stream_ragged(some, few, scale=scale, causal=False, exact=True),
        stream.stream_ragged(plain_rows(query), others, scale=scale, exact=True),
    ]


def launched(
    query: Tensor, kv: KV, narrow: NarrowRows, layer: int, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """Both parts by the Triton kernel for at most `MOST_TOKENS` queries, in float32."""
    from .kernels.decode import decode_lse

    query, parts = plain_rows(query), []
    for rows, where, causal in (
        (_gathered(query, narrow, layer), narrow.kv(layer), None),
        (query, kv, "bottom_right"),
    ):
        scores = Scores(scale=scale, causal=causal)  # type: ignore[arg-type]
        out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        parts.append(decode_lse(rows, where, scores, out=out))
    return parts


def read(query: Tensor, kv: KV, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attend causally to ranges: by Triton's kernels on a device, by torch's elsewhere."""
    query = plain_rows(query.resolve_neg())
    assert kv.lengths is not None
    if query.is_cuda:
        lengths, slots = kv.lengths, kv.slots
        return over_lanes(query, kv.key, kv.value, lengths, None, slots, scale, None)
    parts = []
    for i, (slot, count) in enumerate(zip(_slots(kv), kv.lengths.tolist(), strict=True)):
        key, value = (side[slot, None, :, :count] for side in (kv.key, kv.value))
        parts.append(ragged.attend_one(query[i : i + 1], key, value, scale, None))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _gathered(query: Tensor, narrow: NarrowRows, layer: int) -> Tensor:
    """Of each query the channels that its head has kept: [ranges, G, L, D']."""
    channels = narrow.channels(layer)
    assert channels is not None
    where = channels.flatten(0, 1)[:, None, None]
    return query.gather(3, where.expand(*query.shape[:3], -1))


def _slots(kv: KV) -> list[int]:
    slots: list[int] = list(range(kv.batch)) if kv.slots is None else kv.slots.tolist()
    return slots
