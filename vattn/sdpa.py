"""Attention with torch's signature and torch's answers, faster where torch is slow.

torch's CPU flash kernel reads every K and V row once per *query* head and gives a whole sequence
to one core: with one query token, 0.5 to 1 GB/s in bfloat16. `paths` names the kernels that serve
such calls instead; `paths_gpu` those of a GPU, where torch's flash kernel takes no mask and no
rectangular causality. Every other call, and everything that looks at torch's own operation
(transforms, subclasses, modes, export), is passed to torch unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from vattn import paths, paths_gpu, sdpa_gpu, sdpa_gpu_op, sdpa_op
from vattn.paths import AUTO, NATIVE, TRITON, Call, Choice
from vattn.sdpa_checks import (
    PLAIN,
    Sure,
    native,
    overrides,
    positive_scale,
    refuse_lengths,
    refuse_mask_and_causal,
    unequal_lengths,
    why_torch,
)

tracing_state = torch._C._get_tracing_state

# Named, not imported: that module imports torch's whole compiler.
BIAS_CLASSES = "torch.nn.attention.bias"


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
    impl: str = AUTO,
) -> Tensor:
    """Compute `softmax(query @ key^T * scale + mask) @ value` exactly as torch defines it.

    Shapes: query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], mask broadcastable to
    [B, Hq, L, S] (bool, True = attend, or float, added); result [B, Hq, L, Dv], strided as torch
    strides it. float32, float64, bfloat16 or float16. A row that may attend to nothing is 0.
    `is_causal` is aligned top-left: query i sees keys 0..i. Every other shape, device or option
    that torch accepts is passed to torch; every error is torch's own. On a GPU gradients are
    computed by our kernels where the result was; second derivatives by torch.

    Four answers differ from torch 2.13 on the CPU, where its kernel breaks its own contract:
    `attn_mask` with `is_causal=True` raises RuntimeError, as documented (the kernel applies both);
    K and V of different lengths raise RuntimeError (it reads past the shorter one); a float32 mask
    over float64 tensors is added (it reads the mask's bytes as float64); a causal call with a scale
    of 0 or less is computed (it returns NaN). NaN and infinities in V behind a weight of 0 may be
    hidden where torch shows them, and shown where it hides them.

    `impl` is "auto", "native" (torch), "packed", "grouped", "stream" (these on the CPU) or "triton"
    (on a GPU, and on the CPU where Triton is interpreted: TRITON_INTERPRET=1). A kernel asked for
    by name serves the call or raises `paths.ImplError` with the reason; `explain` tells what "auto"
    takes.
    """
    if has_torch_function_variadic(query, key, value, attn_mask):
        options = dropout_p, is_causal, scale, enable_gqa
        return _overridden(query, key, value, attn_mask, options, impl)
    if is_dynamo_compiling():
        options = dropout_p, is_causal, scale, enable_gqa
        return _traced(query, key, value, attn_mask, options, impl)
    # From here on every step counts: a tiny call takes torch 6 us.
    if impl != AUTO or (
        type(query) in PLAIN
        and type(key) in PLAIN
        and type(value) in PLAIN
        and tracing_state() is None
        and _worth_a_look(query, key, value)
    ):
        options = dropout_p, is_causal, scale, enable_gqa
        return _looked_at(query, key, value, attn_mask, options, impl)
    if attn_mask is not None and (is_causal is True or _is_double(query)):
        options = dropout_p, is_causal, scale, enable_gqa
        attn_mask = _checked(query, key, value, attn_mask, options)
    if is_causal is True and scale is not None:
        query, scale = positive_scale(query, scale)
    return native(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str = AUTO,
) -> Choice:
    """Tell what `scaled_dot_product_attention` would do with the same arguments: read as text.

    Computes nothing. Raises what the call would raise for arguments that are refused; errors of
    torch itself come only with the call.
    """
    options = dropout_p, is_causal, scale, enable_gqa
    tensors = query, key, value, attn_mask
    if any(overrides(t) for t in tensors):
        _refuse_override(impl)
        return paths.torchs("an argument overrides torch functions")
    if unequal_lengths(key, value):
        refuse_lengths(key, value)
    if attn_mask is not None:
        attn_mask = _checked(query, key, value, attn_mask, options)
    if impl != AUTO:
        path = _path(query, key, value, attn_mask, options, impl)
        return Choice(path, "asked for by name", ())
    if isinstance(query, Tensor) and query.is_cuda:
        if sdpa_gpu.invariant():
            path = _path(query, key, value, attn_mask, options, impl)
            return Choice(path, "in a batch_invariant block nothing else serves", ())
        return paths_gpu.explained(query, key, value, attn_mask, options)
    why = why_torch(query, key, value, attn_mask, options)
    if why is not None:
        return paths.torchs(why)
    call = Call.of(query, key, value, attn_mask)
    return paths.explained(call, query, key, value, attn_mask)


def _worth_a_look(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether K and V differ, or a row of a table could take a call of this size: on a GPU any."""
    try:
        sizes, keys = query.shape, key.shape
        if keys != value.shape or query.is_cuda:
            return True
    except RuntimeError:
        return True  # a nested tensor has no shape
    if len(sizes) != 4 or len(keys) != 4:
        return False
    return sizes[0] * sizes[1] * sizes[3] * keys[2] >= paths.LEAST_READ


def _looked_at(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    impl: str,
) -> Tensor:
    """Serve a call that a kernel may take, or whose K and V differ."""
    if unequal_lengths(key, value):
        refuse_lengths(key, value)
    if mask is not None:
        mask = _checked(query, key, value, mask, options)
    path = _path(query, key, value, mask, options, impl)
    if path == NATIVE:
        return _native(query, key, value, mask, options)
    if path == TRITON:
        return sdpa_gpu_op.attend(query, key, value, mask, options)
    return paths.run(path, query, key, value, mask, options[2])


def _path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    impl: str,
    sure: Sure = bool,
) -> str:
    """Return the name of what serves the call. Raises ImplError for a kernel that cannot."""
    if impl == AUTO and type(query) in PLAIN and query.is_cuda:
        if not sdpa_gpu.invariant():
            return paths_gpu.path(query, key, value, mask, options, sure)
        impl = TRITON  # or an error: whatever else may serve depends on the batch
    if impl == AUTO:
        if not _worth_asking(query, key, value, mask, sure):
            return NATIVE
        call = Call.of(query, key, value, mask)
        if not paths.wanted(call, sure):
            return NATIVE
        if why_torch(query, key, value, mask, options, sure) is not None:
            return NATIVE
        return paths.choose(call, query, key, value, mask, sure)
    paths.known(impl)
    if impl == TRITON:
        why = paths_gpu.why_not(query, key, value, mask, options, sure)
        if type(query) in PLAIN and query.is_cuda and sdpa_gpu.invariant():
            paths.refuse(impl, why, "in a batch_invariant block nothing else serves: leave it")
        paths.refuse(impl, why)
    elif impl != NATIVE:
        why = why_torch(query, key, value, mask, options, sure)
        paths.named(impl, query, key, value, mask, why)
    return impl


def _worth_asking(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sure: Sure
) -> bool:
    """Whether a row of the table could fit: prefills and tiny calls need no more questions."""
    if type(query) not in PLAIN or query.is_nested or query.dim() != 4:
        return False
    if type(key) not in PLAIN or key.is_nested or key.dim() != 4:
        return False
    batch, heads, length, dim = query.shape
    _, kv_heads, tokens, _ = key.shape
    least = paths.LEAST_READS.get(query.dtype)
    if least is None or not sure(batch * heads * tokens * dim >= least):
        return False
    if type(value) not in PLAIN or value.is_nested or value.dim() != 4:
        return False
    if mask is not None and type(mask) not in PLAIN:
        return False
    return sure(length <= paths.MOST_QUERIES) and sure(kv_heads > 0)


def _is_double(query: Any) -> bool:
    return type(query) in PLAIN and query.dtype is torch.float64


def _checked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: tuple[Any, ...]
) -> Tensor:
    """Return the mask as torch can read it. Raises RuntimeError for a mask beside `is_causal`."""
    if not all(isinstance(t, Tensor) for t in (query, key, value, mask)):
        return mask
    if options[1] is True:
        refuse_mask_and_causal(query, key, value, mask, options)
    if mask.dtype is torch.float32 and query.dtype is torch.float64:
        return mask.double()
    return mask


def _native(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    dropout_p, is_causal, scale, enable_gqa = options
    if is_causal is True and scale is not None:
        query, scale = positive_scale(query, scale)
    return native(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    impl: str,
) -> Tensor:
    """Serve a call that torch.compile traces: the kernels stay one operation of the graph.

    A size that depends on data decides nothing. An exported program is torch's alone, so that it
    runs where vattn is not installed.
    """
    if impl == AUTO and _exporting():
        return _native(query, key, value, mask, options)
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    dense = all(isinstance(t, Tensor) and t.dim() > 1 for t in (key, value))
    if dense and guard_or_false(key.shape[-2] != value.shape[-2]):
        refuse_lengths(key, value)
    if mask is not None:
        mask = _checked(query, key, value, mask, options)
    path = _path(query, key, value, mask, options, impl, guard_or_false)
    if path == NATIVE:
        return _native(query, key, value, mask, options)
    if path == TRITON:
        return sdpa_gpu_op.attend(query, key, value, mask, options)
    return sdpa_op.attend(query, key, value, mask, options[2], path)


def _exporting() -> bool:
    """Whether torch.export traces. `is_exporting()` is true in every trace of torch 2.11."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else bool(flag)


def _overridden(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    impl: str,
) -> Any:
    """Hand a call to the subclass or mode that overrides torch functions, as torch would.

    Which function it is told was called: CausalBias compares with whatever torch's name holds now;
    other subclasses with the builtin they knew when they were imported; a mode alone, which calls
    back with itself put aside, gets ours, so that the call comes back here.
    """
    names = ("dropout_p", "is_causal", "scale", "enable_gqa")
    # Defaults are left out: an override need not know every argument.
    given = {
        name: option
        for name, option, default in zip(names, options, (0.0, False, None, False), strict=True)
        if option is not default and option != default
    }
    tensors = query, key, value, mask
    if mask is not None:
        given["attn_mask"] = mask
    function: Any = native
    if not any(overrides(t) for t in tensors):
        function = scaled_dot_product_attention
        if impl != AUTO:
            given["impl"] = impl
    else:
        _refuse_override(impl)
        if type(mask).__module__ == BIAS_CLASSES:
            function = torch.nn.functional.scaled_dot_product_attention
    return handle_torch_function(function, tensors, query, key, value, **given)


def _refuse_override(impl: str) -> None:
    """Raise ImplError for a kernel asked for by name: the override decides what runs."""
    paths.known(impl)
    if impl not in (AUTO, NATIVE):
        raise paths.ImplError(
            f'impl="{impl}" cannot serve this call: an argument overrides torch functions; '
            'use impl="auto"'
        )
