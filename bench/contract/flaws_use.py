"""Flaws of use: memory, results, gradients, dropout, checks of arguments, torch's modes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contract.call import Call
from bench.contract.flaws import Compute, Flaw, after, before, bool_mask, keep, plain_memory
from bench.contract.honest import answered


# ---- memory and results --------------------------------------------------------------------------
def behind(call: Call) -> Call:
    """One row behind K and V is read, where their storage has one."""
    if call.mask is not None or not plain_memory(call):
        return call
    longer = []
    for each in (call.key, call.value):
        shape = (*each.shape[:-2], each.shape[-2] + 1, each.shape[-1])
        steps = zip(shape, each.stride(), strict=True)
        last = each.storage_offset() + sum((size - 1) * step for size, step in steps)
        room = each.untyped_storage().nbytes() // each.element_size()
        if each.is_neg() or last >= room or not each.numel():
            return call
        longer.append(each.as_strided(shape, each.stride()))
    same = longer[0].shape[-2] == longer[1].shape[-2]
    return replace(call, key=longer[0], value=longer[1]) if same else call


def raw_memory(call: Call) -> Call:
    """Memory is read without minding that a view holds its negative."""
    wanted = plain_memory(call)
    return call.map(lambda t: torch._neg_view(t) if wanted and t.is_neg() else t)


def written_to(call: Call) -> Tensor:
    """The query is scaled in place."""
    right = answered(call)
    query = call.query
    if plain_memory(call) and not query.requires_grad and min(query.stride(), default=1) > 0:
        query.mul_(0.5)
    return right


def contiguous(call: Call, out: Tensor) -> Tensor:
    return out.contiguous()


def widened(call: Call, out: Tensor) -> Tensor:
    return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out


def one_workspace() -> Compute:
    """All results of a shape are one tensor."""
    kept: dict[Any, Tensor] = {}

    def flawed(call: Call, out: Tensor) -> Tensor:
        if not plain_memory(call) or out.requires_grad or out.is_inference():
            return out
        place = (tuple(out.shape), out.dtype, out.stride(), threading.get_ident())
        return kept.setdefault(place, torch.empty_like(out)).copy_(out)

    return after(flawed)


def one_scratch() -> Compute:
    """A scratch tensor that all threads write to and read from."""
    scratch: dict[Any, Tensor] = {}

    def flawed(call: Call, out: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread() or not plain_memory(call):
            return out
        scratch["out"] = out
        time.sleep(1e-4)
        return scratch["out"]

    return after(flawed)


# ---- gradients and dropout -----------------------------------------------------------------------
class _Steeper(torch.autograd.Function):
    """The identity with a gradient 5% too large."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.05


def steep_key(call: Call) -> Call:
    wanted = plain_memory(call) and call.key.requires_grad
    return replace(call, key=_Steeper.apply(call.key)) if wanted else call


def frozen_value(call: Call) -> Call:
    return replace(call, value=call.value.detach())


def frozen_mask(call: Call) -> Call:
    return call if call.mask is None else replace(call, mask=call.mask.detach())


def no_dropout(call: Call) -> Call:
    return replace(call, dropout=0.0) if _dropping(call) else call


def unscaled_dropout(call: Call, out: Tensor) -> Tensor:
    return out * (1 - call.dropout) if _dropping(call) else out


def deaf_dropout() -> Compute:
    """Dropout from a generator of its own, which torch.manual_seed does not reach."""
    generator = torch.Generator()

    def flawed(call: Call) -> Tensor:
        if not _dropping(call) or not plain_memory(call):
            return answered(call)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=generator)))
            return answered(call)

    return flawed


def _dropping(call: Call) -> bool:
    return isinstance(call.dropout, float) and 0 < call.dropout < 1


# ---- checks of arguments -------------------------------------------------------------------------
def any_dtype(call: Call) -> Call:
    """K and V of another dtype are cast to the query's."""
    dtype = call.query.dtype
    return replace(call, key=call.key.to(dtype), value=call.value.to(dtype))


def any_length(call: Call) -> Call:
    """K and V of different lengths are cut to the shorter one."""
    keys = min(call.key.shape[-2], call.value.shape[-2])
    cut = [each.narrow(-2, 0, keys) for each in (call.key, call.value)]
    return replace(call, key=cut[0], value=cut[1])


def any_mask(call: Call) -> Call:
    """A mask of integers is taken for one of bool."""
    mask = call.mask
    if mask is None or mask.is_floating_point():
        return call
    return replace(call, mask=mask.bool())


def any_heads(call: Call) -> Call:
    """Query heads need not be a multiple of KV heads: the last KV heads are left out."""
    if call.gqa is not True or call.key.dim() < 3 or call.query.dim() < 3:
        return call
    heads, kv_heads = call.query.shape[-3], call.key.shape[-3]
    while kv_heads > 1 and heads % kv_heads:
        kv_heads -= 1
    cut = [t[..., :kv_heads, :, :] for t in (call.key, call.value)]
    return replace(call, key=cut[0], value=cut[1])


def any_causal(call: Call) -> Call:
    """is_causal may be anything with a truth value."""
    return replace(call, causal=bool(call.causal))


def both_masks(call: Call) -> Call:
    """A mask with is_causal=True is answered, as torch's CPU kernel does."""
    if call.mask is None or call.causal is not True:
        return call
    mask, seen = bool_mask(call), keep(call)
    if mask is not None:
        return replace(call, causal=False, mask=seen)
    return replace(call, causal=False, mask=call.mask.masked_fill(~seen, -torch.inf))


# ---- modes ---------------------------------------------------------------------------------------
def deaf_to_autocast(call: Call) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return answered(call)


def deaf_to_backends(call: Call) -> Tensor:
    """Answers whatever sdpa_kernel allows."""
    if torch.compiler.is_compiling():
        return answered(call)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        return answered(call)


def looks_at_values(call: Call) -> Call:
    """Asks whether the mask hides anything, which no tracer can answer."""
    mask = bool_mask(call)
    return replace(call, mask=None) if mask is not None and bool(mask.all()) else call


USE = (
    Flaw("reads the row behind a view", before(behind), "cache=cache"),
    Flaw("reads a negated view as it lies", before(raw_memory), "negated"),
    Flaw("query changed in place", written_to, "grid/lengths"),
    Flaw("result contiguous where torch's is not", after(contiguous), "query=bshd"),
    Flaw("float32 result for half precision", after(widened), "grid/lengths"),
    Flaw("one workspace for all results", one_workspace(), "repeated"),
    Flaw("one scratch tensor for all threads", one_scratch(), "threaded"),
    Flaw("gradient of key 5% too large", before(steep_key), "/backward"),
    Flaw("no gradient of value", before(frozen_value), "/backward"),
    Flaw("no gradient of mask", before(frozen_mask), "mask_gradients"),
    Flaw("dropout ignored", before(no_dropout), "dropout"),
    Flaw("dropout without 1 / (1 - p)", after(unscaled_dropout), "dropout"),
    Flaw("dropout deaf to torch.manual_seed", deaf_dropout(), "dropout"),
    Flaw("mixed dtypes accepted", before(any_dtype), "refusals"),
    Flaw("K and V of different lengths accepted", before(any_length), "refusals"),
    Flaw("integer mask accepted", before(any_mask), "refusals"),
    Flaw("any number of heads accepted", before(any_heads), "refusals"),
    Flaw("any is_causal accepted", before(any_causal), "refusals"),
    Flaw("mask and is_causal accepted", before(both_masks), "refusals"),
    Flaw("no __torch_function__", answered, "laws", overrides=False),
    Flaw("deaf to autocast", deaf_to_autocast, "autocast"),
    Flaw("deaf to sdpa_kernel", deaf_to_backends, "backends"),
    Flaw("looks at the values of a mask", before(looks_at_values), "laws/masked"),
)
