"""Attention of many queries a sequence: a tile of query rows against the keys that it sees.

    query   [B, Hq, L, D], or packed [T, Hq, D] with query_starts [B + 1]: sequence b has the rows
            query_starts[b] <= t < query_starts[b + 1]
    kv      KV: [N, Hkv, S, D] and [N, Hkv, S, Dv], lengths, starts, slots (kv.py)
    out     query's shape with Dv, its dtype, and its order of strides (BSHD in, BSHD out)
    lse     float32, out's shape without Dv: natural log of the sum of exp(score), -inf for a row
            that sees nothing; such a row is exactly 0

bfloat16, float16 and float32, over K and V of the same dtype or of 8 bits (widened to the query's).
Sums are float32; softmax's weights are rounded to the query's dtype before they meet V, as in
FlashAttention. Scores: scores.py. A mask is added after ALiBi; finite numbers
beyond 2e38 in a float mask count as 2e38 (scores are kept in units of log2).

Two loops: over tiles of keys that every row of the query tile sees whole, without a comparison,
then over the tiles at the edges: causal diagonal, window, sink tokens, starts, lengths. A mask is
read on the second alone: mask_tiles.py finds, on the device, tiles to skip and tiles to join to
the first loop. Tiles before a window are not visited.

Which rows must be mapped: rows ``starts[b] <= s < lengths[b]`` of K and V; no other is touched. Of
packed queries rows outside of every sequence are neither read nor written.
Bytes moved: Q and out once, K and V once for each tile of query rows, mostly from L2.
Sources: FlashAttention-2, https://arxiv.org/abs/2307.08691; longest tiles first and heads in
L2-sized sections: FlashAttention 3's scheduler, https://arxiv.org/abs/2407.08608.
Reference: scores.reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vattn.kernels import gpu, mask_tiles
from vattn.kernels.contract import check_row, rows_like
from vattn.kernels.gpu import Device
from vattn.kernels.kv import KV, scale_stride
from vattn.kernels.mask_tiles import MaskTiles
from vattn.kernels.online import stored
from vattn.kernels.prefill_kernel import prefill_kernel
from vattn.kernels.prefill_tiles import Kind, Tile, packed_heads, section_of, tile_of, worth_finding
from vattn.kernels.scores import Scores


def prefill(
    query: Tensor,
    kv: KV,
    scores: Scores = Scores(),  # noqa: B008  frozen
    *,
    mask: Tensor | None = None,
    query_starts: Tensor | None = None,
    most_tokens: int | None = None,
    tile: Tile | None = None,
    find_tiles: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of ``query`` over ``kv``; returns out. Contract: the head of this file.

    Args:
        query: [B, Hq, L, D], or [T, Hq, D] with ``query_starts``.
        mask: bool or float, [L|1, S|1] or [B|1, Hq|1, L|1, S|1] (L is ``most_tokens`` for packed
            queries), any strides, the query's dtype or float32.
        query_starts, most_tokens: int32 [B + 1] on the device, and no less than any sequence's
            tokens.
        tile: rows and keys of a program; None: `tile_of`.
        find_tiles: whether tiles of the mask are found first; None: `worth_finding`.
        out: where to write; None: a new tensor.

    Raises ValueError, with the value and the limit, for anything outside of the contract.
    """
    return prefill_lse(
        query,
        kv,
        scores,
        mask=mask,
        query_starts=query_starts,
        most_tokens=most_tokens,
        tile=tile,
        find_tiles=find_tiles,
        out=out,
    )[0]


def prefill_lse(
    query: Tensor,
    kv: KV,
    scores: Scores = Scores(),  # noqa: B008  frozen
    *,
    mask: Tensor | None = None,
    query_starts: Tensor | None = None,
    most_tokens: int | None = None,
    tile: Tile | None = None,
    find_tiles: bool | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`prefill` and the log-sum-exp, float32 [B, Hq, L] or [T, Hq]."""
    device = gpu.device_of(query)
    kv, scores = kv.dense(), scores.dense()
    tokens = _tokens(query, kv, query_starts, most_tokens)
    scores.check(query, kv.batch)
    if mask is not None:
        shape = (kv.batch, query.shape[1], tokens, kv.key.shape[2])
        mask = mask_tiles.four_dim(mask, query.dtype, shape)
    out = rows_like(query, kv.value.shape[3]) if out is None else _checked_out(out, query, kv)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if lse.numel() and tokens:
        with gpu.current(query):
            starts = None if query_starts is None else query_starts.contiguous()
            plan = _plan(device, query, kv, scores, starts, tokens, mask, tile, find_tiles)
            _launch(device, query, kv, scores, plan, out, lse)
    return out, lse


@dataclass(frozen=True)
class _Plan:
    """How a call is cut: at most ``tokens`` a sequence, ``pack`` query heads a program."""

    starts: Tensor | None
    tokens: int
    pack: int
    tile: Tile
    lines: int
    key_tiles: int
    mask: Tensor | None
    found: MaskTiles | None


def _plan(
    device: Device,
    query: Tensor,
    kv: KV,
    scores: Scores,
    starts: Tensor | None,
    tokens: int,
    mask: Tensor | None,
    tile: Tile | None,
    find_tiles: bool | None,
) -> _Plan:
    """Choose tiles, and find out about the mask's where it is worth it."""
    groups = query.shape[1] // kv.key.shape[1]
    dim, itemsize = max(kv.key.shape[3], kv.value.shape[3]), query.element_size()
    kind = _kind(kv, scores, starts, mask)
    most = tile or tile_of(device, dim, itemsize, groups * tokens, kind)
    pack = packed_heads(groups, tokens, most.rows, starts is not None)
    if pack > 1 and kind == "plain":
        kind = "busy"
    tile = tile or tile_of(device, dim, itemsize, pack * tokens, kind)
    lines, key_tiles = -(-tokens * pack // tile.rows), -(-kv.key.shape[2] // tile.keys)
    found = None
    if mask is not None and key_tiles:
        programs = kv.batch * query.shape[1] // pack * lines
        if worth_finding(device, programs, key_tiles) if find_tiles is None else find_tiles:
            found = mask_tiles.classify(mask, pack, tile.rows, tile.keys)
    return _Plan(starts, tokens, pack, tile, lines, key_tiles, mask, found)


def _kind(kv: KV, scores: Scores, starts: Tensor | None, mask: Tensor | None) -> Kind:
    """What a call asks of registers, heads apart."""
    if mask is not None or scores.softcap is not None or scores.alibi is not None:
        return "costly"
    padded = any(dim & (dim - 1) for dim in (kv.key.shape[3], kv.value.shape[3]))
    return "plain" if scores.window is None and starts is None and not padded else "busy"


def _tokens(query: Tensor, kv: KV, query_starts: Tensor | None, most_tokens: int | None) -> int:
    """Most query tokens of a sequence, of a query that suits the contract."""
    kv.check_query(query)
    check_row("query", query)
    if query.dim() == 4:
        if query_starts is not None or most_tokens is not None:
            raise ValueError("query_starts and most_tokens are for packed queries [T, Hq, D]")
        return query.shape[2]
    if query_starts is None or most_tokens is None:
        raise ValueError("packed queries [T, Hq, D] need query_starts and most_tokens")
    if query_starts.dtype != torch.int32 or query_starts.shape != (kv.batch + 1,):
        raise ValueError(
            f"query_starts is {query_starts.dtype} {tuple(query_starts.shape)}: must be int32 "
            f"({kv.batch + 1},)"
        )
    if query_starts.device != query.device:
        raise ValueError(f"query_starts is on {query_starts.device} and query on {query.device}")
    if not 0 <= most_tokens <= query.shape[0]:
        raise ValueError(f"most_tokens is {most_tokens}: must be 0 to {query.shape[0]}")
    return most_tokens


def _checked_out(out: Tensor, query: Tensor, kv: KV) -> Tensor:
    shape = (*query.shape[:-1], kv.value.shape[3])
    if out.shape != shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}: must be {query.dtype} "
            f"{tuple(shape)} on {query.device}"
        )
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"out has stride {out.stride(-1)} in its last dimension and must have 1")
    return out


def _launch(
    device: Device,
    query: Tensor,
    kv: KV,
    scores: Scores,
    plan: _Plan,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Launch for checked arguments."""
    batch, heads, pack, tile = kv.batch, query.shape[1] // plan.pack, plan.pack, plan.tile
    kv_heads, keys, dim = kv.key.shape[1:]
    value_dim = kv.value.shape[3]
    kv_bytes = keys * (dim + value_dim) * kv.key.element_size()
    section = section_of(batch * kv_heads, heads // kv_heads, kv_bytes)
    mask, found = plan.mask, plan.found
    tables = (None, None, None) if found is None else (found.states, found.before, found.order)
    m_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    alibi = scores.alibi
    factor = scores.factor(dim)
    # A scale on the device may be negative for all that the host knows.
    linear = factor >= 0 and alibi is None and scores.softcap is None and kv.key_scale is None
    bits, (key, value) = stored(device, kv.key, kv.value)
    prefill_kernel[(batch * heads * plan.lines,)](
        query, key, value, out, lse, plan.starts, kv.lengths, kv.starts, kv.slots,
        kv.key_scale, kv.value_scale, alibi, scores.sink_logits, mask, *tables,
        *_strides(query), *key.stride()[:3], *value.stride()[:3],
        *_strides(out), *_strides(lse[..., None]), *m_strides,
        scale_stride(kv.key_scale), scale_stride(kv.value_scale),
        alibi.shape[1] if alibi is not None and alibi.dim() == 2 else 0,
        *((0, 0, 0) if found is None else found.steps),
        plan.tokens, keys, plan.key_tiles, plan.lines, section, batch * heads, heads,
        factor, scores.softcap or 0.0, scores.window or 0, scores.sink_tokens,
        D=dim,
        DV=value_dim,
        BLOCK_D=gpu.padded(dim),
        BLOCK_DV=gpu.padded(value_dim),
        ROWS=tile.rows,
        KEYS=tile.keys,
        PACK=pack,
        SHARED=heads // kv_heads,
        CAUSAL=scores.causal is not None,
        BOTTOM_RIGHT=scores.causal == "bottom_right",
        WINDOW=scores.window is not None,
        SOFTCAP=scores.softcap is not None,
        LINEAR=linear,
        BOOL=mask is not None and mask.dtype == torch.uint8,
        ONE_ROW=m_strides[2] == 0 and (pack == 1 or m_strides[1] == 0),
        PRECISION=gpu.precision(query),
        STORED=bits,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def _strides(rows: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and query of [B, H, L, D], or of [T, H, D]: no batch there."""
    if rows.dim() == 4:
        return rows.stride(0), rows.stride(1), rows.stride(2)
    return 0, rows.stride(1), rows.stride(0)
