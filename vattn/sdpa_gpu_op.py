"""The Triton kernels as torch operations: what autograd, torch.compile and vmap see of them.

    vattn::attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal,
                     float? scale) -> (Tensor out, Tensor lse)
    vattn::attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out,
                              Tensor lse, Tensor? mask, bool is_causal, float? scale)
                              -> (Tensor, Tensor, Tensor)

Defined through `Library`, whose calls cost a fifth of a `custom_op`'s. ``lse`` is float32 and has
no gradient, nor has the mask. A backward pass with ``create_graph=True`` is computed by torch's
MATH kernel, so that it can be differentiated again; any other by `attention_backward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vattn import sdpa_gpu
from vattn.kernels.contract import rows_like
from vattn.sdpa_gpu import Gradients, Pair

_library = torch.library.Library("vattn", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale)"
    " -> (Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor lse, Tensor? mask, bool is_causal, float? scale) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
attention = torch.ops.vattn.attention.default
attention_backward = torch.ops.vattn.attention_backward.default


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """Serve a call that `paths_gpu.why_not` lets through; no operation where nobody sees it."""
    _, is_causal, scale, _ = options
    if (
        torch.compiler.is_compiling()
        or (
            torch.is_grad_enabled()
            and (query.requires_grad or key.requires_grad or value.requires_grad)
        )
        or torch._C._are_functorch_transforms_active()
    ):
        return attention(query, key, value, mask, is_causal, scale)[0]
    return sdpa_gpu.forward(query, key, value, mask, is_causal, scale)[0]


# ---- what runs -----------------------------------------------------------------------------------
_library.impl("attention", sdpa_gpu.forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", sdpa_gpu.backward, "CompositeExplicitAutograd")


# ---- shapes, dtypes and strides without running --------------------------------------------------
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Pair:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return sdpa_gpu.like(query, value.shape[3]), lse


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> Gradients:
    return rows_like(query), rows_like(key), rows_like(value)


torch.library.register_fake("vattn::attention", _attention_fake, lib=_library)
torch.library.register_fake("vattn::attention_backward", _backward_fake, lib=_library)


# ---- gradients -----------------------------------------------------------------------------------
def _keep(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    query, key, value, mask, ctx.is_causal, ctx.scale = inputs
    if mask is not None and mask.requires_grad:
        raise ValueError(
            "vattn::attention has no gradient of the mask: pass mask.detach(), or use "
            'scaled_dot_product_attention(impl="native")'
        )
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, mask, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, mask, out, lse = ctx.saved_tensors
    rest = (mask, ctx.is_causal, ctx.scale)
    found: tuple[Tensor | None, ...]
    if torch.is_grad_enabled():  # create_graph=True: somebody may differentiate again
        found = sdpa_gpu.differentiable_backward(grad, query, key, value, *rest)
    else:
        found = attention_backward(grad, query, key, value, out, lse, *rest)
    return (*found, None, None, None)


torch.library.register_autograd("vattn::attention", _gradients, setup_context=_keep, lib=_library)


# ---- vmap: the mapped dimension becomes part of the batch ----------------------------------------
def _attention_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Pair, Any]:
    size = info.batch_size
    batch = args[0].shape[0 if in_dims[0] != 0 else 1]
    tensors = [_merged(t, at, size) for t, at in zip(args[:3], in_dims[:3], strict=True)]
    mask = _merged_mask(args[3], in_dims[3], size, batch)
    found = attention(*tensors, mask, *args[4:])
    return tuple(t.unflatten(0, (size, batch)) for t in found), (0, 0)


def _backward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    batch = args[1].shape[0 if in_dims[1] != 0 else 1]
    tensors = [_merged(t, at, size) for t, at in zip(args[:6], in_dims[:6], strict=True)]
    mask = _merged_mask(args[6], in_dims[6], size, batch)
    found = attention_backward(*tensors, mask, *args[7:])
    return tuple(t.unflatten(0, (size, batch)) for t in found), (0, 0, 0)


def _merged(tensor: Tensor, at: int | None, size: int) -> Tensor:
    """[B, ...] with a mapped dimension ``at``, or without one, as [size * B, ...]."""
    tensor = tensor.expand(size, *tensor.shape) if at is None else tensor.movedim(at, 0)
    return tensor.flatten(0, 1)


def _merged_mask(mask: Tensor | None, at: int | None, size: int, batch: int) -> Tensor | None:
    """A mask that broadcasts to [B, H, L, S], as one for [size * B, H, L, S]."""
    if mask is None or (at is None and mask.dim() == 2):
        return mask
    mask = mask.expand(size, *mask.shape) if at is None else mask.movedim(at, 0)
    mask = mask.reshape(size, *(1,) * (5 - mask.dim()), *mask.shape[1:])
    return mask.expand(-1, batch, -1, -1, -1).flatten(0, 1)


torch.library.register_vmap("vattn::attention", _attention_vmap, lib=_library)
torch.library.register_vmap("vattn::attention_backward", _backward_vmap, lib=_library)
