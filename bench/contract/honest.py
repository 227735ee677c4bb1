"""Implementations that must pass: torch's own with its known faults repaired, and a flash kernel.

`flash` walks the keys in blocks with a running maximum, as kernels do, and may round the weights to
the dtype of the inputs, as tensor cores do: the tolerance has to be fair to both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from bench.contract.call import Attend, Call, torchs

BLOCK, LONG = 4, 128  # keys at a time: few, so that small calls have several blocks


def implementation(compute: Callable[[Call], Tensor], *, overrides: bool = True) -> Attend:
    """A function with torch's signature around ``compute``.

    Without ``overrides`` it passes subclasses of Tensor straight on, as a careless patch does.
    """

    def attend(
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
        call = Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if overrides and has_torch_function((query, key, value, attn_mask)):
            name = torch.nn.functional.scaled_dot_product_attention
            tensors = (query, key, value, attn_mask)
            result: Tensor = handle_torch_function(
                name, tensors, query, key, value, **call.options()
            )
            return result
        return compute(call)

    return attend


def answered(call: Call) -> Tensor:
    """torch's answer, with its documented faults refused: K and V of different lengths (read out of
    bounds), and a mask together with is_causal (both applied on some paths, refused on others)."""
    key, value = call.key, call.value
    if isinstance(key, Tensor) and isinstance(value, Tensor) and not key.is_nested:
        lengths = [each.shape[-2] for each in (key, value) if each.dim() > 1]
        if len(set(lengths)) > 1:
            raise RuntimeError(f"key and value differ in length: {lengths}")
    if call.mask is not None and call.causal is True:
        raise RuntimeError("Explicit attn_mask should not be set when is_causal=True")
    return call.run(torchs)


def plain(call: Call, *, block: int | None = None, rounded: bool = False) -> Tensor:
    """Attention in float32 (float64 for float64), ``block`` keys at a time, differentiable."""
    query, key, value, wide = call.query, call.key, call.value, _wide(call.query)
    if call.gqa:
        heads = query.shape[-3]
        key, value = (t.repeat_interleave(heads // t.shape[-3], dim=-3) for t in (key, value))
    scale = max(query.shape[-1], 1) ** -0.5 if call.scale is None else call.scale
    query = query.to(wide) * scale
    length = key.shape[-2]
    mask = call.mask
    if call.causal:
        mask = torch.ones(query.shape[-2], length, dtype=torch.bool, device=query.device).tril()
    step = max(1, block or length)
    top = total = out = None
    for first in range(0, max(length, 1), step):
        keys = slice(first, first + step)
        logits = query @ key[..., keys, :].to(wide).transpose(-2, -1)
        logits = _masked(logits, mask, keys)
        if logits.shape[-1]:
            peak = logits.detach().amax(dim=-1, keepdim=True)
        else:
            peak = logits.detach().new_full((*logits.shape[:-1], 1), float("-inf"))
        peak = peak if top is None else torch.maximum(peak, top)
        base = peak.masked_fill(peak == float("-inf"), 0.0)
        weights = torch.exp(logits - base)
        kept = 0.0 if top is None else torch.exp(top - base)
        total = weights.sum(dim=-1, keepdim=True) + (0.0 if total is None else total * kept)
        if rounded:
            weights = weights.to(call.query.dtype).to(wide)
        part = weights @ value[..., keys, :].to(wide)
        out = part if out is None else out * kept + part
        top = peak
    assert out is not None
    assert total is not None
    return _restrided(out / total.masked_fill(total == 0, 1.0), call)


def flash(call: Call, *, rounded: bool = False) -> Tensor:
    """`plain` in blocks for every call that torch accepts; dropout is torch's."""
    if call.dropout or type(call.query) is not Tensor or call.query.is_nested:
        return answered(call)
    answered(call.map(lambda each: each.detach().to("meta")))
    return plain(call, block=BLOCK if call.key.shape[-2] < LONG else LONG, rounded=rounded)


def _masked(logits: Tensor, mask: Tensor | None, keys: slice) -> Tensor:
    if mask is None:
        return logits
    if mask.shape[-1] != 1:
        mask = mask[..., keys]
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return logits + mask.to(logits.dtype)


def _restrided(out: Tensor, call: Call) -> Tensor:
    """The result in the query's dtype; in its order of dimensions where torch is fused."""
    out = out.to(call.query.dtype)
    if torch._C._functorch.is_batchedtensor(out) or not call.fused:
        return out.contiguous()
    strides = torch.empty_like(call.query, device="meta").stride()
    order = sorted(range(out.dim()), key=lambda i: (-strides[i], i))
    back = [order.index(i) for i in range(out.dim())]
    return out.permute(order).contiguous().permute(back)


def _wide(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


identity = implementation(answered)
blockwise = implementation(flash)
rounding = implementation(lambda call: flash(call, rounded=True))
HONEST: dict[str, Attend] = {"identity": identity, "blockwise": blockwise, "rounding": rounding}
