"""Attention through torch's CPU flash kernel, the query heads of a group packed as query rows.

    query [B, Hq, L, D]  key [B, Hkv, S, D]  value [B, Hkv, S, D]  -> [B, Hq, L, D]
    dtypes float32, bfloat16, float16, float64; G = Hq / Hkv query heads share a KV head
    mask None, bool (True = attend) or float, [L|1, S] or [B|1, Hq|1, L|1, S]

torch's kernel walks the query heads one by one: with one query token it reads every K and V row
once per *query* head, as a one-row product. Given the heads of a group as rows

    [B, Hq, L, D]  ->  [B, Hkv, G*L, D]        row g*L + l is head h*G + g, position l

it reads each row once. With fewer (sequence, KV head) pairs than threads, the keys are cut into as
many chunks as there are threads: views on K and V, one chunk a head of the same kernel, merged by
log-sum-exp. Bytes moved: K and V once, nothing copied, whatever strides batch, head and token
have; the last dimension must have stride 1. All S rows of K and V must be mapped and hold numbers.

torch's kernel divides by the number of heads and of keys, and dies (SIGFPE) where one is 0: those
shapes never reach it. It reports a log-sum-exp of 0 for a row that may attend to nothing: here it
is -inf. K with infinite elements is outside of this contract.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vattn.kernels.contract import EMPTY, additive, check, check_rows, empty_rows, plain_rows
from vattn.kernels.merge import merge

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A chunk holds at least so many tokens: a key tile of torch's kernel.
CHUNK_TOKENS = 512
# Query rows that torch's kernel hands to one thread.
TASK_ROWS = 32

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend: [B, Hq, L, D]. Raises ValueError for what this kernel does not take."""
    _check(query, key, value, mask)
    return attend(query, key, value, mask, scale)[0]


def packed_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`packed`, and the log-sum-exp of each row: [B, Hq, L]."""
    _check(query, key, value, mask)
    return attend(query, key, value, mask, scale, want_lse=True)


def pack_rows(query: Tensor, groups: int) -> Tensor:
    """Turn [B, Hkv*groups, L, D] into [B, Hkv, groups*L, D]: the heads of a group become rows."""
    batch, heads, length, dim = query.shape
    return query.reshape(batch, heads // groups, groups * length, dim)


def pack_mask(mask: Tensor | None, groups: int, length: int) -> Tensor | None:
    """Give a [L, S] or [B|1, Hq|1, L|1, S] mask the rows of `pack_rows`; None stays None.

    A mask that is the same for all queries and heads is returned as it is and keeps broadcasting.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        mask = mask[None, None]
    batch, heads, rows, keys = mask.shape
    if heads == 1:
        if rows == 1:
            return mask
        mask = mask.expand(batch, groups, rows, keys)
        return mask.reshape(batch, 1, groups * rows, keys)
    if rows != length:
        mask = mask.expand(batch, heads, length, keys)
    return mask.reshape(batch, heads // groups, groups * length, keys)


def chunks(tasks: int, keys: int) -> int:
    """Into how many chunks ``keys`` tokens are cut, where ``tasks`` could run side by side."""
    return max(1, min(torch.get_num_threads() // tasks, keys // CHUNK_TOKENS))


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    check(query, key, value, mask, DTYPES)
    check_rows(key, value)
    if value.shape[3] != key.shape[3] or key.shape[3] == 0:
        raise ValueError(
            f"key has head_dim {key.shape[3]} and value {value.shape[3]}: these must be equal and "
            "not 0 here; use the grouped kernel"
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`packed_lse` for a caller that has checked; the log-sum-exp is right only where wanted."""
    batch, heads, length, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    if query.numel() == 0 or keys == 0:
        return empty_rows(query, value)
    groups = heads // kv_heads
    # torch's kernel takes the elements of a row to lie side by side, and does not look.
    rows = pack_rows(plain_rows(query), groups)
    bias = additive(pack_mask(mask, groups, length), query.dtype)
    parts = chunks(batch * kv_heads * -(-rows.shape[2] // TASK_ROWS), keys)
    split = _split(rows, key, value, bias, scale, parts) if parts > 1 else None
    if split is not None:
        out, lse = split
    else:
        out, lse = _flash(rows, key, value, attn_mask=bias, scale=scale)
        lse = _mark_empty(lse, bias) if want_lse else lse
    return out.reshape(query.shape), lse.reshape(query.shape[:3])


def _split(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None,
    parts: int,
) -> tuple[Tensor, Tensor] | None:
    """Attend with the keys of each head cut into ``parts`` equal chunks and a short remainder. None
    where all scores of a row in a chunk are -inf without a mask: torch gives no norm of these."""
    batch, kv_heads, count, dim = rows.shape
    size = key.shape[2] // parts
    whole = size * parts
    if bias is not None:
        bias = bias.expand(batch, kv_heads, count, key.shape[2])
    out, lse = torch.empty_like(rows), []
    # Sequence and head strides are not multiples of each other: a call takes heads as its batch.
    for b in range(batch):
        cut = [t[b, :, :whole].unflatten(1, (parts, size)) for t in (key, value)]
        mask = None if bias is None else bias[b, ..., :whole].unflatten(2, (parts, size))
        mask = None if mask is None else mask.transpose(1, 2)
        shared = rows[b, :, None].expand(kv_heads, parts, count, dim)
        some, sums = _flash(shared, *cut, attn_mask=mask, scale=scale)
        pieces, norms = [some.transpose(0, 1)], [_mark_empty(sums, mask).transpose(0, 1)]
        if whole < key.shape[2]:
            rest = [t[b : b + 1, :, whole:] for t in (key, value)]
            mask = None if bias is None else bias[b : b + 1, ..., whole:]
            some, sums = _flash(rows[b : b + 1], *rest, attn_mask=mask, scale=scale)
            pieces.append(some)
            norms.append(_mark_empty(sums, mask))
        outs, norm = torch.cat(pieces), torch.cat(norms)
        if ((norm == 0) & (outs == 0).all(-1)).any():
            return None
        out[b], joined = merge(outs, norm)
        lse.append(joined)
    return out, torch.stack(lse)


def _mark_empty(lse: Tensor, bias: Tensor | None) -> Tensor:
    """Set the log-sum-exp of rows that may attend to nothing: torch's kernel leaves 0 there."""
    if bias is None:
        return lse
    return lse.masked_fill((bias == EMPTY).all(dim=-1), EMPTY)
