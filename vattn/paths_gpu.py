"""Which calls on a GPU the Triton kernels serve: one table, read from the top; the first row that
fits. `vattn.paths` is the same for the CPU.

    over       the kernel of torch that would serve: "flash", "efficient" (memory-efficient), "math"
    queries    query tokens, at most
    tokens     keys, at least

The kernels are exact for every call that `why_torch` lets through, so rows are a matter of speed
alone, and no GPU has measured them yet. Until one has, a row stands only where torch falls to a
kernel that reads more or in fewer parts: dense prefill over torch's flash kernel stays torch's, and
float32 over its memory-efficient kernel. So do, before any row, "idle" calls: at most 16 queries
under a mask, which only the prefill kernel takes, where its programs (sequences x KV heads x tiles
of a KV head's query rows) are fewer than the device's processors.

`Call.of` and `chosen` ask nothing but sizes, dtypes, strides and the number of processors: the rule
is the same for tensors of any device, and is tested so. Only a call that a row takes imports triton
and starts its driver; where that fails, the call is torch's and `explained` says why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vattn.device import cannot_launch
from vattn.kernels.kv import DTYPES, HALF, MOST_DIM
from vattn.kernels.kv import MOST_TOKENS as FEW_QUERIES
from vattn.paths import IMPLS, NATIVE, TRITON, Choice, torchs
from vattn.sdpa_checks import (
    AUTOCAST,
    RESTRICTED,
    Sure,
    why_dtypes,
    why_options,
    why_shape,
    why_tensors,
    why_watched,
)

# What only modules that import triton hold: the rows of the largest tile in kernels.prefill_tiles,
# and kernels.gpu.INTERPRETER's processors.
MOST_ROWS, INTERPRETED_PROCESSORS = 128, 8
ANY = 1 << 62


class Row(NamedTuple):
    """One line of the table: what a call must be to be served by Triton, and why that is best."""

    dtypes: tuple[torch.dtype, ...]
    over: str
    queries: int
    tokens: int
    why: str


MATH = "torch would copy K and V for every query head, or write all scores to memory"
EFFICIENT = (
    "torch's flash kernel takes no such call; its memory-efficient kernel turns a bool mask into "
    "numbers and skips no tile that a mask hides: ours is not measured against it"
)
SPLIT = "few queries: K and V are read once a group of heads, in parts, by all processors"
TABLE = (
    Row(DTYPES, "math", ANY, 1, MATH),
    Row(HALF, "efficient", ANY, 1, EFFICIENT),
    Row(HALF, "flash", FEW_QUERIES, 1024, SPLIT),
)


class Call(NamedTuple):
    """What the table looks at."""

    dtype: torch.dtype
    over: str
    queries: int
    tokens: int
    idle: bool

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        sure: Sure = bool,
    ) -> Call:
        """Describe a call that `why_torch` lets through."""
        over = torchs_kernel(query, key, value, mask, is_causal, sure)
        idle = mask is not None and _leaves_idle(query, key, sure)
        return cls(query.dtype, over, query.shape[2], key.shape[2], idle)


def _leaves_idle(query: Tensor, key: Tensor, sure: Sure) -> bool:
    """Whether prefill of few queries would have fewer programs than the device has processors."""
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    if not sure(length <= FEW_QUERIES):
        return False
    tiles = (heads // kv_heads * length + MOST_ROWS - 1) // MOST_ROWS
    return not sure(batch * kv_heads * tiles >= _processors(query.device.type, query.device.index))


def _processors(kind: str, index: int | None) -> int:
    """Streaming multiprocessors of a device; without triton, whose driver may not start."""
    if kind != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def torchs_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    sure: Sure = bool,
) -> str:
    """Which of torch's CUDA kernels takes a call: aten/src/ATen/native/transformers/cuda/
    sdp_utils.cpp, without cuDNN, which serves what flash serves and is the user's to enable."""
    _, heads, length, dim = query.shape
    _, kv_heads, tokens, value_dim = value.shape
    if (
        query.dtype in HALF
        and mask is None
        and sure(dim == value_dim)
        and (not is_causal or sure(length == tokens))
    ):
        return "flash"
    aligned = 16 // query.itemsize  # elements that a tensor core's operand is loaded by
    if sure(heads == kv_heads) and sure(dim % aligned == 0) and sure(value_dim % aligned == 0):
        return "efficient"
    return "math"


def chosen(call: Call, sure: Sure = bool) -> Row | None:
    """The first row that fits; None leaves the call to torch."""
    if call.idle:
        return None
    for row in TABLE:
        if (
            call.dtype in row.dtypes
            and call.over == row.over
            and sure(call.queries <= row.queries)
            and sure(call.tokens >= row.tokens)
        ):
            return row
    return None


def path(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    sure: Sure = bool,
) -> str:
    """The name of what serves a call on a GPU: "triton" or "native"."""
    if why_torch(query, key, value, mask, options, sure) is not None:
        return NATIVE
    row = chosen(Call.of(query, key, value, mask, options[1], sure), sure)
    return NATIVE if row is None or why_not_launched(query) is not None else TRITON


def explained(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: tuple[Any, ...]
) -> Choice:
    """`path`, with the reasons."""
    why = why_torch(query, key, value, mask, options)
    if why is not None:
        return torchs(why)
    call = Call.of(query, key, value, mask, options[1])
    row = chosen(call)
    others = dict.fromkeys(IMPLS, "for tensors on the CPU")
    if row is None:
        return Choice(NATIVE, unlike(call), ((TRITON, "no row of the table fits"), *others.items()))
    why = why_not_launched(query)
    if why is not None:
        return torchs(why)
    return Choice(TRITON, row.why, ((NATIVE, f"its {call.over} kernel"), *others.items()))


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    sure: Sure = bool,
) -> str | None:
    """Say why the Triton kernels cannot serve a call; None if they can. May import triton."""
    why = why_torch(query, key, value, mask, options, sure)
    return why_not_launched(query) if why is None else why


def unlike(call: Call) -> str:
    """Say why no row fits."""
    if call.idle:
        return (
            f"{call.queries} queries under a mask make fewer programs than the device has "
            "processors: ours is not measured there"
        )
    if call.over == "flash" and call.dtype in HALF:
        return (
            f"torch's flash kernel serves {call.queries} queries over {call.tokens} keys well, as "
            "far as is known: no GPU has measured ours against it"
        )
    return f"torch's {call.over} kernel serves {call.dtype}: ours is not measured against it"


def why_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    sure: Sure = bool,
) -> str | None:
    """Say why only torch may serve this call; None where the Triton kernels are exact.

    ``options`` is (dropout_p, is_causal, scale, enable_gqa). Asks about the call, not about the
    device: see `why_not_launched`.
    """
    if options[1] is not False and options[1] is not True:
        return "is_causal is no bool"
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    return (
        why_options(options)
        or why_tensors(tensors)
        or _why_memory(tensors)
        or why_dtypes(query, key, value, mask, DTYPES)
        or _why_gradient(tensors, mask)
        or _why_context(tensors)
        or why_shape(query, key, value, mask, options[3], sure)
        or why_rows(query, key, value, sure)
    )


def _why_memory(tensors: tuple[Tensor, ...]) -> str | None:
    """Say which tensor lies elsewhere than the query, or is not in its memory as it reads."""
    device = tensors[0].device
    for t in tensors:
        if t.device != device:
            return f"tensors on {device} and {t.device}"
    # In a compiled graph torch makes such tensors real before the operation sees them.
    if torch.compiler.is_compiling() or _transforms():
        return None
    for t in tensors:
        if t.is_neg() or t._is_zerotensor() or torch._C._is_cow_tensor(t):  # type: ignore[attr-defined]
            return "a tensor whose sign or elements are not, or not yet, in its own memory"
    return None


def _why_gradient(tensors: tuple[Tensor, ...], mask: Tensor | None) -> str | None:
    if not torch.is_grad_enabled():
        return None
    if mask is not None and mask.requires_grad:
        return "the mask wants a gradient: torch's MATH kernel alone has one"
    if not any(t.requires_grad for t in tensors):
        return None
    if mask is not None and mask.dtype is not torch.bool:
        return "a gradient under a float mask: rows that finite numbers hide have one in torch"
    return "a gradient under a functorch transform" if _transforms() else None


def _why_context(tensors: tuple[Tensor, ...]) -> str | None:
    """Say which machinery around the call wants to see torch's own operation, or must cast."""
    if not (
        torch._C._get_flash_sdp_enabled()
        and torch._C._get_math_sdp_enabled()
        and torch._C._get_mem_efficient_sdp_enabled()
        and torch._C._get_cudnn_sdp_enabled()
    ):
        return RESTRICTED
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
        if any(t.dtype is not wanted and t.dtype is not torch.bool for t in tensors):
            return AUTOCAST
    if _transforms() and not _only_vmap():
        return "a functorch transform other than vmap is active"
    return why_watched()


def _transforms() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def _only_vmap() -> bool:
    """Whether nothing but vmap is active, for which the operations of `sdpa_gpu_op` have a rule."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or []
    return all(each.key() == functorch.TransformType.Vmap for each in stack)


def why_rows(query: Tensor, key: Tensor, value: Tensor, sure: Sure = bool) -> str | None:
    """Say which rows the kernels cannot read."""
    if not (sure(query.shape[3] <= MOST_DIM) and sure(value.shape[3] <= MOST_DIM)):
        return f"head_dim above {MOST_DIM}"
    for t in (query, key, value):
        if not (sure(t.stride(3) == 1) or sure(t.shape[3] == 1)):
            return "the elements of a row of query, K or V are not adjacent"
    return None


def why_not_launched(tensor: Tensor) -> str | None:
    """Say why no Triton kernel runs where ``tensor`` lies; imports triton."""
    if torch.compiler.is_compiling():
        return _why_not_launched_on(tensor.device.type, tensor.device.index)
    return cannot_launch(tensor)


def _why_not_launched_on(kind: str, index: int | None) -> str | None:
    return cannot_launch(torch.empty(0, device=torch.device(kind, index or 0)))


# What `torch.compiler.assume_constant_result` sets, without its import of the whole compiler.
_why_not_launched_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
_processors._dynamo_marked_constant = True  # type: ignore[attr-defined]
