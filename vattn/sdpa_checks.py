"""What is asked about a call before a path is chosen: is it refused, is it torch's alone, does
the mask fit.

Every question is put to the tensors as they are; nothing is converted and nothing is remembered.
Whatever is neither refused here nor plain goes to torch, whose answers and errors are then its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

# Taken once: our function can then stand under torch's name without calling itself.
native = torch._C._nn.scaled_dot_product_attention

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Subclasses (FakeTensor, DTensor, nested, quantised wrappers) mean something else by an operation.
PLAIN = (Tensor, torch.nn.Parameter)

RESTRICTED = "sdpa_kernel: the user chose among torch's backends"
AUTOCAST = "autocast: torch casts the arguments"

# Decides a comparison of sizes: `bool`, or while torch.compile traces `guard_or_false`, which calls
# what depends on data untrue. Every comparison is therefore written so that false means torch.
Sure = Callable[[Any], bool]


def overrides(argument: Any) -> bool:
    """Whether an argument's type overrides torch functions, as torch decides it without modes."""
    kind = type(argument)
    if kind in PLAIN or argument is None:
        return False
    override = getattr(kind, "__torch_function__", None)
    return override is not None and override is not torch._C._disabled_torch_function_impl


def unequal_lengths(key: Any, value: Any) -> bool:
    """Whether K and V are dense and hold different numbers of tokens."""
    try:
        if key.shape == value.shape:
            return False
        return bool(key.dim() > 1 and value.dim() > 1 and key.shape[-2] != value.shape[-2])
    except (AttributeError, RuntimeError):
        return False  # no tensor, or a nested one: torch knows what to say


def refuse_lengths(key: Tensor, value: Tensor) -> NoReturn:
    """Raise for what torch's CPU kernel does not check: it would read past the shorter one."""
    raise RuntimeError(
        f"key has {key.shape[-2]} tokens but value has {value.shape[-2]}: "
        "both must hold the same number of rows; slice the longer one"
    )


def refuse_mask_and_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: tuple[Any, ...],
) -> NoReturn:
    """Raise what torch documents for an explicit mask together with `is_causal=True`.

    torch's MATH path raises it, after its other checks; its CPU flash path applies both. The meta
    device runs the first without computing anything, so the words and their order are torch's.
    """
    dropout_p, _, scale, enable_gqa = options
    if not any(t.is_nested for t in (query, key, value)):
        q, k, v, m = (t.detach().to("meta") for t in (query, key, value, mask))
        native(q, k, v, m, dropout_p, True, scale=scale, enable_gqa=enable_gqa)
    raise RuntimeError(
        "_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True"
    )


def positive_scale(query: Tensor, scale: Any) -> tuple[Tensor, Any]:
    """Return a query and a positive scale with the same scores, for a causal call on the CPU.

    torch's CPU kernel multiplies the -inf of hidden keys by the scale: 0 and less give NaN.
    """
    if not isinstance(scale, (float, int)) or scale > 0 or not query.is_cpu or query.is_nested:
        return query, scale
    if query.dtype not in FLOATS or scale != scale:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)


def why_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    sure: Sure = bool,
) -> str | None:
    """Say why only torch may serve this call on the CPU; None if the contract of the kernels holds.

    ``options`` is (dropout_p, is_causal, scale, enable_gqa).
    """
    if options[1] is not False:
        return "is_causal: torch's kernel skips what a causal mask hides"
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    why = why_options(options) or why_tensors(tensors)
    if why is not None:
        return why
    for t in tensors:
        if not t.is_cpu:
            return f"device {t.device}: this kernel takes tensors on the CPU"
        if t.requires_grad and torch.is_grad_enabled():
            return "a gradient is wanted"
    return (
        why_dtypes(query, key, value, mask, FLOATS)
        or _why_context()
        or why_shape(query, key, value, mask, options[3], sure)
    )


def why_options(options: tuple[Any, ...]) -> str | None:
    """Say which option has a meaning that torch alone knows, or is wrong."""
    dropout_p, _, scale, enable_gqa = options
    if type(dropout_p) not in (float, int) or dropout_p != 0:
        return "dropout: its random numbers are torch's"
    if enable_gqa is not False and enable_gqa is not True:
        return "enable_gqa is no bool"
    if scale is not None and (type(scale) not in (float, int) or scale - scale != 0):
        return "scale is no finite number"
    return None


def why_tensors(tensors: tuple[Tensor, ...]) -> str | None:
    """Say which argument is no dense tensor of torch's own class."""
    for t in tensors:
        if type(t) not in PLAIN:
            return f"a {type(t).__name__} is no plain tensor"
        if t.is_nested or t.layout is not torch.strided:
            return "a nested or sparse tensor"
    return None


def why_dtypes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> str | None:
    """Say which dtype is none of the kernels'."""
    dtype = query.dtype
    if dtype not in dtypes or key.dtype is not dtype or value.dtype is not dtype:
        return "dtypes differ, or are not the kernel's"
    if mask is not None and mask.dtype not in (torch.bool, dtype, torch.float32):
        return f"a mask of {mask.dtype}"
    return None


def _why_context() -> str | None:
    """Say which machinery around a call on the CPU wants to see torch's own operation."""
    if not (torch._C._get_flash_sdp_enabled() and torch._C._get_math_sdp_enabled()):
        return RESTRICTED
    if torch.is_autocast_enabled("cpu"):
        return AUTOCAST
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform (vmap, grad, jvp) is active"
    return why_watched()


def why_watched() -> str | None:
    """Say which machinery that works on torch's own operations is active."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is active"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a torch dispatch mode is active"
    return None


def why_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    enable_gqa: bool,
    sure: Sure = bool,
) -> str | None:
    """Say which shape leaves the contract of the kernels: they broadcast nothing but the mask."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "query, key and value are not all 4-D"
    batch, heads, length, dim = query.shape
    kv_batch, kv_heads, tokens, key_dim = key.shape
    v_batch, v_heads, v_tokens, v_dim = value.shape
    if not (
        sure(kv_batch == batch)
        and sure(v_batch == batch)
        and sure(v_heads == kv_heads)
        and sure(v_tokens == tokens)
        and sure(key_dim == dim)
    ):
        return "query, key and value differ in batch, KV heads, tokens or head_dim"
    if not (sure(query.numel() > 0) and sure(key.numel() > 0) and sure(v_dim > 0)):
        return "an empty dimension"
    if not sure(heads == kv_heads) and not (enable_gqa and sure(heads % kv_heads == 0)):
        return f"{heads} query heads over {kv_heads} KV heads, enable_gqa={enable_gqa}"
    if mask is None:
        return None
    rank = mask.dim()
    if rank not in (2, 3, 4):
        return "a mask that is not 2-D, 3-D or 4-D"
    limits = (batch, heads, length, tokens)[-rank:]
    pairs = zip(mask.shape, limits, strict=True)
    if not all(sure(n == 1) or sure(n == most) for n, most in pairs):
        return "a mask that does not broadcast to the scores"
    return None
