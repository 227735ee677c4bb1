"""What every CPU attention kernel of this folder takes and returns, and its definition.

    query [B, Hq, L, D]  key [B, Hkv, S, D]  value [B, Hkv, S, Dv]  -> [B, Hq, L, Dv]
    query head h reads KV head h // (Hq / Hkv)
    mask None, bool (True = attend) or float (added), [L|1, S|1] or [B|1, Hq|1, L|1, S|1]
    scale None is 1 / sqrt(D); any other number is taken as it is
    log-sum-exp [B, Hq, L], natural logarithm, float32 (float64 for float64 inputs)

A row that may attend to nothing, and every row of a call without keys, is 0 with log-sum-exp -inf.
Nothing here knows causality, dropout or gradients: the caller makes a mask or asks torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY = float("-inf")


def check(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise ValueError, with the values, for a call outside of the contract."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(f"query, key, value must be 4-D, got {_shapes(query, key, value)}")
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        devices = f"{query.device}, {key.device}, {value.device}"
        raise ValueError(f"query, key, value must be on the CPU, got {devices}")
    if query.dtype not in dtypes or key.dtype != query.dtype or value.dtype != query.dtype:
        named = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"query, key, value are {query.dtype}, {key.dtype}, {value.dtype}: "
            f"this kernel takes one dtype of {named}"
        )
    batch, heads, _, dim = query.shape
    kv_batch, kv_heads, keys, key_dim = key.shape
    value_batch, value_heads, value_keys, _ = value.shape
    if (
        not batch == kv_batch == value_batch
        or (kv_heads, keys) != (value_heads, value_keys)
        or key_dim != dim
    ):
        raise ValueError(
            f"query, key, value are {_shapes(query, key, value)}: "
            "batch, KV heads, tokens and head_dim must agree"
        )
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} KV heads")
    if mask is not None:
        _check_mask(mask, query, keys)


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _check_mask(mask: Tensor, query: Tensor, keys: int) -> None:
    batch, heads, length, _ = query.shape
    shape = mask.shape if mask.dim() == 4 else (1, 1, *mask.shape) if mask.dim() == 2 else ()
    limits = (batch, heads, length, keys)
    if not shape or any(a not in (1, b) for a, b in zip(shape, limits, strict=True)):
        raise ValueError(f"mask {tuple(mask.shape)} must be 2-D or 4-D and broadcast to {limits}")
    if not mask.is_cpu:
        raise ValueError(f"mask is on {mask.device} and must be on the CPU")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(f"mask is {mask.dtype}: must be bool, float32 or {query.dtype}")


def check_rows(key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the elements of a row of K and V lie side by side."""
    for name, tensor in (("key", key), ("value", value)):
        why = why_apart(name, tensor)
        if why is not None:
            raise ValueError(f"{why}, or use the grouped kernel")


def why_apart(name: str, tensor: Tensor) -> str | None:
    """Say that the elements of a row do not lie side by side; None if they do."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return None
    return (
        f"{name} has stride {tensor.stride(-1)} in its last dimension and must have 1: "
        f"pass {name}.contiguous()"
    )


def check_row(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the elements of a row lie side by side."""
    why = why_apart(name, tensor)
    if why is not None:
        raise ValueError(why)


def rows_like(tensor: Tensor, width: int | None = None) -> Tensor:
    """An unwritten tensor with rows of ``width`` elements (None: as many) side by side, its other
    dimensions in the order of this one's strides; contiguous for one whose rows overlap."""
    if width is None or width == tensor.shape[-1]:
        like = torch.empty_like(tensor)
        return like if like.stride(-1) == 1 else tensor.new_empty(tensor.shape)
    last = tensor.dim() - 1
    order = sorted(range(last), key=tensor.stride, reverse=True)
    return torch.empty_permuted(
        (*tensor.shape[:-1], width), (*order, last), dtype=tensor.dtype, device=tensor.device
    )


def plain_rows(query: Tensor) -> Tensor:
    """The query with the elements of each row side by side and rows that do not overlap, without a
    copy where it is so: `empty_like` of any other, as torch's kernel makes its result, has gaps."""
    _, _, length, dim = query.shape
    if query.stride(3) == 1 and (length == 1 or query.stride(2) >= dim):
        return query
    return query.contiguous()


def empty_rows(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The answer of a call without keys, heads or queries."""
    shape = query.shape[:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_zeros((*shape, value.shape[3])), query.new_full(shape, EMPTY, dtype=wide)


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as 0 and -inf in ``dtype``; a float mask as it is, in float64 for float64."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return mask.to(torch.promote_types(mask.dtype, dtype))
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, EMPTY)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition in float64: (out, lse)."""
    groups = query.shape[1] // max(1, key.shape[1])
    key, value = (t.double().repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, EMPTY)
    elif mask is not None:
        scores = scores + mask.double()
    empty = (scores == EMPTY).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
    return weights @ value, torch.logsumexp(scores, dim=-1)
