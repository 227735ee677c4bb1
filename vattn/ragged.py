"""Attention of new tokens to the sequences of a cache, of any lengths and without padding.

    query [B, Hq, L, D], sequence i holding S_i tokens  ->  [B, Hq, L, D]

The queries are the last L tokens of each sequence, so the mask is causal, aligned bottom-right:
query l of sequence i sees tokens 0 .. S_i - L + l, or the last ``window_tokens`` of these. Tokens
that a sequence has released (`KVCache.release_before`) are not seen.

A cache on a GPU is read by the Triton kernels (`ragged_gpu`). On the host, where numba is there,
all sequences are one call of the stream kernel: it takes addresses and lengths, so nothing is
padded, gathered or copied. Elsewhere, and for many queries, each sequence is two calls of torch's
flash kernel, joined by log-sum-exp:

    tokens   0 ........... S-L ....... S
    queries  |   all seen   | triangle |
"""

from __future__ import annotations

import torch
from torch import Tensor

from vattn import ragged_gpu
from vattn.kernels import packed, stream
from vattn.kernels.contract import empty_rows, plain_rows
from vattn.kernels.merge import merge
from vattn.paths import AUTO, TRITON
from vattn.ragged_gpu import FixedView
from vattn.sequence import View

# Query rows that share a KV head up to which reading K and V is what takes the time.
STREAM_ROWS = 64

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attend(
    query: Tensor,
    view: View | FixedView,
    layer: int,
    *,
    scale: float | None = None,
    window_tokens: int | None = None,
    impl: str = AUTO,
) -> Tensor:
    """Attend to one layer of a view, [B, Hq, L, D]; forward only.

    `impl` is "auto" or "triton": the Triton kernels read a cache on a GPU in any case, and one on
    the host by name where Triton is interpreted (TRITON_INTERPRET=1).

    Raises:
        LayoutError: the query has another dtype, device or shape than the cache serves, holds more
            tokens than a sequence does, or wants a gradient.
        ClosedError: a sequence was closed, truncated or reordered since the view was made.
        ImplError: the Triton kernels cannot run where the cache lies; the message says why.
    """
    return attend_lse(query, view, layer, scale=scale, window_tokens=window_tokens, impl=impl)[0]


def attend_lse(
    query: Tensor,
    view: View | FixedView,
    layer: int,
    *,
    scale: float | None = None,
    window_tokens: int | None = None,
    impl: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """`attend`, and the log-sum-exp of each row, [B, Hq, L] float32: to merge with other tokens."""
    if impl not in (AUTO, TRITON):
        raise ValueError(f'impl={impl!r} is unknown; choose "{AUTO}" or "{TRITON}"')
    if impl == TRITON or isinstance(view, FixedView) or view.cache.device.type != "cpu":
        return ragged_gpu.attend_lse(query, view, layer, scale, window_tokens)
    ragged = view.ragged(layer)
    ragged_gpu.check(query, view, layer, window_tokens)
    if query.numel() == 0:
        return empty_rows(query, query)
    # The kernels read the elements of a row side by side, and as they lie in memory.
    query = plain_rows(query.resolve_neg())
    if streams(query, view.cache.layout.kv_heads):
        head, token, _ = ragged.strides
        item = query.itemsize
        places = stream.Rows(
            ragged.k_pointers,
            ragged.v_pointers,
            ragged.lengths,
            view.cache.layout.kv_heads,
            head * item,
            token * item,
            keep=ragged,
        )
        return stream.stream_ragged(query, places, scale=scale, window=window_tokens or 0)
    parts = [
        attend_one(query[i : i + 1], k[None], v[None], scale, window_tokens)
        for i, (k, v) in enumerate(zip(ragged.k, ragged.v, strict=True))
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def streams(query: Tensor, kv_heads: int = 1) -> bool:
    """Whether the stream kernel takes a query [B, Hq, L, D] over so many KV heads."""
    rows = query.shape[1] // kv_heads * query.shape[2]
    return rows <= STREAM_ROWS and stream.serves(query)


def attend_one(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attend to one sequence: what all queries see, then the triangle of the last tokens."""
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    if window is not None and window < key.shape[2]:
        first = max(0, before + 1 - window)
        key, value = key[:, :, first:], value[:, :, first:]
        return packed.packed_lse(query, key, value, _band(length, key, window), scale=scale)
    if length == 1:
        return packed.packed_lse(query, key, value, scale=scale)
    triangle = _triangle(query, key[:, :, before:], value[:, :, before:], scale)
    if before == 0:
        return triangle
    seen = packed.packed_lse(query, key[:, :, :before], value[:, :, :before], scale=scale)
    outs, lses = (torch.stack(pair) for pair in zip(seen, triangle, strict=True))
    return merge(outs, lses)


def _triangle(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend to the queries' own tokens."""
    if scale is not None and scale <= 0:
        # torch's kernel puts -inf above the diagonal and then multiplies by the scale.
        return packed.packed_lse(query, key, value, _band(query.shape[2], key), scale=scale)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return _flash(query, key, value, 0.0, True, scale=scale)


def _band(length: int, key: Tensor, window: int | None = None) -> Tensor:
    """Mask [L, S] of the last ``length`` tokens, each seeing ``window`` tokens or all before."""
    keys = torch.arange(key.shape[2], device=key.device)
    queries = keys[-length:, None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
