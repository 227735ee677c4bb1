"""Attention to a selection: what is chosen is read where it lies. `selection` states the contract.

    on the host, with numba     `sparse_stream`
    on a GPU                    `sparse_decode` (Triton)
    elsewhere                   chosen rows are copied side by side for torch's operations

Bytes moved: the chosen rows of K and V once for all query rows that share a KV head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vattn.kernels import stream
from vattn.kernels.contract import EMPTY
from vattn.kernels.kv import KV
from vattn.kernels.merge import merge
from vattn.kernels.packed import pack_rows
from vattn.kernels.selection import Selection, chosen

Answer = tuple[Tensor, Tensor, Tensor | None]


def attend(
    query: Tensor,
    kv: KV,
    selection: Selection,
    *,
    scale: float | None = None,
    want_mass: bool = False,
) -> Answer:
    """Attend to the chosen tokens: query [B, Hq, L, D] -> out [B, Hq, L, Dv] of the query's dtype,
    lse [B, Hq, L] float32 and, if wanted, mass [B, Hkv, K] float32.

    Raises:
        ValueError: shapes, dtypes or devices do not suit; see `Selection` and `KV`.
    """
    out, lse, mass = _kernel(query, kv)(query, kv, selection, scale=scale, want_mass=want_mass)
    if selection.tail is not None:
        outs = torch.stack([out.float(), selection.tail[0].float()])
        joined, lse = merge(outs, torch.stack([lse, selection.tail[1]]))
        out = joined.to(query.dtype)
    return out, lse, mass


def _kernel(query: Tensor, kv: KV) -> Callable[..., Answer]:
    """What runs where the query lies."""
    if query.device.type == "cuda":
        from vattn.kernels import sparse_decode

        return sparse_decode.attend
    plain = kv.key_scale is None and kv.value_scale is None and query.dtype == kv.key.dtype
    if query.device.type == "cpu" and plain and stream.available() is None:
        from vattn.kernels import sparse_stream

        return sparse_stream.attend
    return gathered


def gathered(
    query: Tensor,
    kv: KV,
    selection: Selection,
    *,
    scale: float | None = None,
    want_mass: bool = False,
) -> Answer:
    """`attend` in torch's operations, for any device, one sequence and KV head at a time."""
    selection.check(query, kv)
    batch, heads, length, dim = query.shape
    kv_heads = kv.key.shape[1]
    rows = pack_rows(query, heads // kv_heads).float() * (dim**-0.5 if scale is None else scale)
    out = rows.new_zeros(*rows.shape[:3], kv.value.shape[3])
    lse = rows.new_full(rows.shape[:3], EMPTY)
    mass = rows.new_zeros(selection.ids.shape)
    at = torch.arange(length, device=query.device).repeat(heads // kv_heads)
    for b in range(batch):
        slot = b if kv.slots is None else int(kv.slots[b])
        end = kv.key.shape[2] if kv.lengths is None else int(kv.lengths[b])
        start = 0 if kv.starts is None else int(kv.starts[b])
        for h in range(kv_heads):
            tokens, entry = chosen(selection, b, h, start, end)
            if not len(tokens):
                continue
            k, v = kv.key[slot, h, tokens].float(), kv.value[slot, h, tokens].float()
            if kv.key_scale is not None:
                k *= kv.key_scale[min(h, len(kv.key_scale) - 1)]
            if kv.value_scale is not None:
                v *= kv.value_scale[min(h, len(kv.value_scale) - 1)]
            scores = rows[b, h] @ k.mT
            if selection.log_weights is not None:
                scores += selection.log_weights[b, h, entry]
            scores.masked_fill_(tokens > (end - length + at)[:, None], EMPTY)
            sums = scores.logsumexp(-1)
            weights = (scores - sums.masked_fill(sums == EMPTY, 0.0)[:, None]).exp()
            out[b, h], lse[b, h] = weights @ v, sums
            mass[b, h].index_add_(0, entry, weights.sum(0))
    shape = (batch, heads, length)
    found = out.to(query.dtype).reshape(*shape, -1), lse.reshape(shape)
    return *found, mass if want_mass else None
