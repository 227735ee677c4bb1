"""Joining attention over parts of the keys, on a device: the contract of `vattn.kernels.merge`.

    outs [n, ..., Dv]   bfloat16, float16 or float32, results over the keys of part i alone
    lses [n, ...]       float32, natural log; -inf where a part holds no key that the row sees
    ->   [..., Dv] of outs' dtype, [...] float32

    m = max_i lse_i      w_i = exp(lse_i - m)      out = sum w_i out_i / sum w_i
                                                   lse = m + log(sum w_i)

For cascades, and for keys spread over ranks, whose parts an all-gather brought side by side. A part
whose lse is -inf is not read: NaN in it, or memory that nobody wrote, does no harm. A row empty in
every part is 0 with lse -inf. Parts are taken in the order of i: the same call gives the same bits.
Bytes moved: the parts that are read once, the result once.
Source: FlashDecoding, https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.gpu import cannot_launch, current
from vattn.kernels.kv import DTYPES
from vattn.kernels.merge import merge
from vattn.kernels.online import LN2, LOG2E

# Elements of a part that a program holds at a time: 16 a thread.
ELEMENTS = 2048


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join parts: outs [n, ..., Dv] and lses [n, ...] into ([..., Dv] of outs' dtype, [...]).

    Where no kernel can run, and for float64, torch's operations do the same (`merge`).
    Raises ValueError for other shapes or dtypes, and where there is no part.
    """
    _check(outs, lses)
    if cannot_launch(outs) is not None or lses.dtype != torch.float32 or outs.dtype not in DTYPES:
        return merge(outs, lses)
    parts, value_dim = outs.shape[0], outs.shape[-1]
    flat, sums = outs.reshape(parts, -1, value_dim), lses.reshape(parts, -1)
    if value_dim > 1 and flat.stride(2) != 1:
        flat = flat.contiguous()
    out = outs.new_empty(outs.shape[1:])
    lse = lses.new_empty(lses.shape[1:])
    rows = sums.shape[1]
    if rows == 0 or value_dim == 0:
        return out, merge(outs, lses)[1]
    block_dv = triton.next_power_of_2(value_dim)
    block_m = max(1, ELEMENTS // block_dv)
    with current(outs):
        _combine[(triton.cdiv(rows, block_m),)](
            flat, sums, out, lse, *flat.stride()[:2], *sums.stride(), parts, rows,
            DV=value_dim, BLOCK_M=block_m, BLOCK_DV=block_dv, num_warps=4,
        )  # fmt: skip
    return out, lse


def _check(outs: Tensor, lses: Tensor) -> None:
    if outs.dim() < 2 or outs.shape[:-1] != lses.shape or outs.device != lses.device:
        raise ValueError(
            f"outs is {tuple(outs.shape)} on {outs.device} and lses {tuple(lses.shape)} on "
            f"{lses.device}: must be [n, ..., Dv] and [n, ...] on one device"
        )
    if outs.shape[0] == 0:
        raise ValueError("outs has no part: must have at least one")
    if not outs.is_floating_point() or lses.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"outs is {outs.dtype} and lses {lses.dtype}: must be floating and float32 (float64)"
        )


@triton.jit(do_not_specialize=["parts", "rows"])
def _combine(
    outs, lses, out, lse, outs_n, outs_m, lses_n, lses_m, parts, rows,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)
    inside = row < rows
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    tops = lses + row * lses_m
    for _ in range(0, parts):
        m = tl.maximum(m, tl.load(tops, mask=inside, other=float("-inf")))
        tops += lses_n
    shift = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    tops = lses + row * lses_m
    values = outs + row[:, None] * outs_m + d[None, :]
    for _ in range(0, parts):
        top = tl.load(tops, mask=inside, other=float("-inf"))
        weight = tl.exp2((top - shift) * LOG2E)
        read = (inside & (top != float("-inf")))[:, None] & (d < DV)[None, :]
        value = tl.load(values, mask=read, other=0.0).to(tl.float32)
        total += weight
        acc += value * weight[:, None]
        tops += lses_n
        values += outs_n
    whole = tl.where(total == 0.0, 1.0, total)
    result = (acc / whole[:, None]).to(out.dtype.element_ty)
    written = inside[:, None] & (d < DV)[None, :]
    tl.store(out + row[:, None] * DV + d[None, :], result, mask=written)
    tl.store(lse + row, m + tl.log2(whole) * LN2, mask=inside)
