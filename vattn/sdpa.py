"""Attention on the CPU: torch's `scaled_dot_product_attention`, a group's query heads packed.

torch's CPU flash kernel walks the query heads one by one. With grouped-query attention and one
query token it therefore reads every K and V row once per *query* head, as a one-row matrix
product: 0.5 to 1 GB/s in bfloat16. The same kernel, given the G query heads that share a KV head
as G query *rows*

    query [B, Hq, L, D]  ->  [B, Hkv, G*L, D]        row g*L + l is head h*G + g, position l

reads each K and V row once, as a G-row product: 2x to 10x faster, and the same sums in the same
float32 accumulators. Grouped `bmm` is not used: it rounds the scores to bfloat16, and on
processors without a bfloat16 unit it is ten times slower.

Nothing here copies K or V: views into a cache keep whatever strides they have.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

# Taken once: this function can then be installed under torch's name without calling itself.
_native = torch._C._nn.scaled_dot_product_attention

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Beyond this many query rows the product is bound by arithmetic and torch's own tiling is as good.
PACKED_ROWS = 256


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `softmax(query @ key^T * scale + mask) @ value` exactly as torch defines it.

    Shapes: query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], mask broadcastable to
    [B, Hq, L, S] (bool, True = attend, or float, added); result [B, Hq, L, Dv]. float32, float64,
    bfloat16 or float16. A row that may attend to nothing is 0. `is_causal` is aligned top-left.
    Every other shape, device or option that torch accepts is passed to torch unchanged.

    Raises RuntimeError (torch's own, or ours where torch would read out of bounds: K and V of
    different lengths).
    """
    if has_torch_function((query, key, value, attn_mask)):
        # The function that torch's name holds now: CausalBias compares with exactly that one, and
        # is silently wrong for any other.
        return handle_torch_function(
            torch.nn.functional.scaled_dot_product_attention,
            (query, key, value, attn_mask),
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    _check_lengths(key, value)
    groups = _groups(query, key, value) if enable_gqa else 1
    if (
        groups > 1
        and not is_causal
        and dropout_p == 0.0
        and groups * query.shape[2] <= PACKED_ROWS
        and _packable(attn_mask, query)
        and not _needs_grad(query, key, value, attn_mask)
    ):
        return _packed(query, key, value, attn_mask, scale, groups)
    return _native(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


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


def _check_lengths(key: Tensor, value: Tensor) -> None:
    """Refuse K and V of different lengths: torch's CPU kernel would read past the shorter one."""
    if key.is_nested or value.is_nested or key.dim() < 2 or value.dim() < 2:
        return
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"key has {key.shape[-2]} tokens but value has {value.shape[-2]}: "
            "both must hold the same number of rows"
        )


def _groups(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Return the query heads per KV head where packing applies, else 1 (torch decides)."""
    tensors = (query, key, value)
    if any(t.is_nested or t.dim() != 4 or t.device.type != "cpu" for t in tensors):
        return 1
    if query.dtype not in _FLOATS or key.dtype != query.dtype or value.dtype != query.dtype:
        return 1
    batch, heads, length, dim = query.shape
    same_batch = key.shape[0] == batch and value.shape[0] == batch
    kv_heads = key.shape[1]
    if not same_batch or kv_heads == 0 or value.shape[1] != kv_heads or key.shape[3] != dim:
        return 1
    if heads % kv_heads or length == 0 or key.shape[2] == 0:
        return 1
    return int(heads // kv_heads)


def _packable(mask: Tensor | None, query: Tensor) -> bool:
    """Say whether `pack_mask` knows this mask; other shapes broadcast in ways left to torch."""
    if mask is None:
        return True
    if mask.is_nested or mask.dim() not in (2, 4) or mask.shape[-2] not in (1, query.shape[2]):
        return False
    return mask.dim() == 2 or mask.shape[1] in (1, query.shape[1])


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    groups: int,
) -> Tensor:
    batch, heads, length, _ = query.shape
    mask = pack_mask(mask, groups, length)
    out = _native(pack_rows(query, groups), key, value, mask, 0.0, False, scale=scale)
    return out.reshape(batch, heads, length, value.shape[3])
