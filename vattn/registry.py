"""torch's own switch: a flash attention implementation that a user activates by name.

    vattn.registry.register()                                     tells torch the name
    torch.nn.attention.activate_flash_attention_impl("vattn")     from here on, in every thread
    torch.nn.attention.restore_flash_attention_impl()             torch's kernel again

It works below torch's choice of a backend, in the dispatcher: whoever calls, by whatever name, in
Python, TorchScript, compiled code or C++. It reaches what the choice sends to the CPU's flash
kernel, and that is: 4-D, one head_dim for K and V, no dropout, no gradient to the mask, elements of
a row adjacent. Of these it serves grouped-query calls of few query rows, with the heads of a group
packed as rows; the rest goes on to torch's kernel. Gradients are torch's, from the same
log-sum-exp.

Where torch is built for CUDA its flash kernel of that device is switched, too: calls that the table
of `paths_gpu` gives to Triton in its place, a few queries over many keys, run there, and the rest
goes on. Masks and rectangular causality never come by: torch has no flash kernel for them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from vattn import paths_gpu, sdpa_gpu
from vattn.allocator.errors import VattnError
from vattn.kernels.contract import additive
from vattn.kernels.kv import HALF
from vattn.kernels.packed import pack_mask, pack_rows
from vattn.sdpa_checks import why_dtypes, why_options, why_shape

NAME = "vattn"
OP = "_scaled_dot_product_flash_attention_for_cpu"
CUDA_OP = "_scaled_dot_product_flash_attention"
# Query rows a KV head: beyond, torch's own tiling is as good.
MOST_ROWS = 256


class RegistryError(VattnError, NotImplementedError):
    """This torch has no such registry, or cannot serve it; the message names the remedy."""


def register() -> None:
    """Tell torch the name "vattn". Changes no call; again is no error.

    Raises RegistryError where torch has no registry.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError:
        raise RegistryError(
            f"torch {torch.__version__} has no register_flash_attention_impl: "
            "it needs torch >= 2.11; use vattn.patch() instead"
        ) from None
    register_flash_attention_impl(NAME, register_fn=_Activated)


class _Activated:
    """Our kernels in the dispatcher, from `activate_flash_attention_impl` to `remove`."""

    def __init__(self) -> None:
        if not hasattr(torch.library, "get_kernel") or not hasattr(torch.ops.aten, OP):
            raise RegistryError(
                f"torch {torch.__version__} cannot hand over its kernel of aten::{OP}: "
                "use vattn.patch() instead"
            )
        self.kernel = torch.library.get_kernel(f"aten::{OP}", "CPU")
        self.library: Any = torch.library.Library("aten", "IMPL")
        self.cuda: _ActivatedCuda | None = None
        with warnings.catch_warnings():
            # "Overriding a previously registered kernel": that is what the user asked for.
            warnings.simplefilter("ignore", UserWarning)
            self.library.impl(OP, self._call, "CPU", with_keyset=True)
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{CUDA_OP}", "CUDA"):
                self.cuda = _ActivatedCuda(torch.library.get_kernel(f"aten::{CUDA_OP}", "CUDA"))
                self.library.impl(CUDA_OP, self.cuda.call, "CUDA", with_keyset=True)

    def remove(self) -> None:
        """Give torch's kernels their places back; called by `restore_flash_attention_impl`."""
        self.library = None

    def _call(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend as the operation is defined: [B, Hq, L, D] and log-sum-exp [B, Hq, L]."""

        def native(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.kernel.call_boxed(
                keys, rows, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
            )

        if is_causal or not _packable(query, key, value, attn_mask):
            return native(query, attn_mask)
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        rows = pack_rows(query, groups)
        packed, sums = native(rows, pack_mask(additive(attn_mask, query.dtype), groups, length))
        # Laid out as torch's kernel does it: compiled code relies on the strides.
        out = torch.empty_like(query).copy_(packed.reshape(query.shape))
        return out, sums.reshape(query.shape[:3]).mT.contiguous().mT


class _ActivatedCuda:
    """Our kernel in the place of torch's flash kernel for CUDA, ``kernel``."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def call(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        """Attend as the operation is defined: [B, Hq, L, D], log-sum-exp [B, Hq, L], and what
        torch's backward asks for: lengths, and an unused state of random numbers."""
        options = (dropout_p, is_causal, scale, query.shape[1] != key.shape[1])
        if return_debug_mask or not serves(query, key, value, options):
            found: tuple[Any, ...] = self.kernel.call_boxed(
                keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale
            )
            return found
        out, lse = sdpa_gpu.forward(query, key, value, None, is_causal, scale)
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.zeros((), dtype=torch.uint64, device=query.device)
        debug = query.new_empty(0)
        return out, lse, None, None, query.shape[2], key.shape[2], state, unused, debug


def serves(query: Tensor, key: Tensor, value: Tensor, options: tuple[Any, ...]) -> bool:
    """Whether a call that torch sends to its flash kernel is one for Triton. Casts, transforms and
    the choice of a backend are behind it; gradients are torch's."""
    why = (
        why_options(options)
        or why_dtypes(query, key, value, None, HALF)
        or why_shape(query, key, value, None, options[3])
        or paths_gpu.why_rows(query, key, value)
    )
    if why is not None:
        return False
    call = paths_gpu.Call.of(query, key, value, None, options[1])
    if call.over != "flash" or paths_gpu.chosen(call) is None:
        return False
    return paths_gpu.why_not_launched(query) is None


def _packable(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether query heads share KV heads, few enough rows of them, and the mask follows."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    heads, kv_heads, length = query.shape[1], key.shape[1], query.shape[2]
    if key.shape[:3] != value.shape[:3] or not 0 < kv_heads < heads or heads % kv_heads:
        return False
    if not 0 < heads // kv_heads * length <= MOST_ROWS or query.stride(3) != 1:
        return False
    if mask is None:
        return True
    fits = mask.dim() in (2, 4) and mask.shape[-2] in (1, length)
    return fits and (mask.dim() == 2 or mask.shape[1] in (1, heads))
