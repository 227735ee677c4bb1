"""Joining attention over parts of the keys: each part brings its result and its log-sum-exp.

    outs [n, ..., Dv]   results over the keys of part i alone
    lses [n, ...]       float32 (float64 beside float64 results), natural log of the sum of
                        exp(score); -inf where a part holds no key that the row may attend to

    m = max_i lse_i      w_i = exp(lse_i - m)      out = sum w_i out_i / sum w_i
                                                   lse = m + log(sum w_i)

Sums are float32 (float64 for float64 results). A part whose lse is -inf is not read as a number:
NaN in it, or memory that nobody wrote, does no harm. A row empty in every part is 0 with lse -inf.
Bytes moved: the parts once. Source: FlashDecoding, https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from vattn.kernels import crew, stream
from vattn.kernels.contract import EMPTY

WIDTH = 8  # numbers that the loops take at once


def reference(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in float64, one exponential a part."""
    outs, lses = outs.double(), lses.double()
    weights = lses.exp()
    total = weights.sum(dim=0)
    parts = torch.where(weights[..., None] > 0, weights[..., None] * outs, 0.0)
    return parts.sum(dim=0) / total.clamp_min(1e-300)[..., None], total.log()


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join parts: outs [n, ..., Dv] and lses [n, ...] into ([..., Dv] of outs' dtype, [...])."""
    wide = torch.promote_types(lses.dtype, torch.float32)
    lses = lses.to(wide)
    top = lses.amax(dim=0)
    # Shifted by 0 where every part is empty: -inf - -inf would be NaN.
    shift = torch.where(top == EMPTY, 0.0, top)
    weights = torch.exp(lses - shift)
    total = weights.sum(dim=0)
    weights = weights / torch.where(total == 0.0, 1.0, total)
    parts = torch.where((lses == EMPTY)[..., None], 0.0, weights[..., None] * outs.to(wide))
    return parts.sum(dim=0).to(outs.dtype), shift + torch.log(total)


def join(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`merge` of parts that lie apart, each [..., Dv] and [...]; float32 on a CPU with numba in one
    pass: a step has a few rows, and each of torch's operations takes longer to call than to run.

    Raises ValueError where they differ in shape.
    """
    out, lse = parts[0]
    plain = all(t.dtype == torch.float32 and t.is_contiguous() for part in parts for t in part)
    if not plain or out.shape[-1] < WIDTH or not stream.serves(out):
        outs, lses = zip(*parts, strict=True)
        return merge(torch.stack(outs), torch.stack(lses))
    if any(a.shape != out.shape or b.shape != out.shape[:-1] for a, b in parts):
        shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in parts]
        raise ValueError(f"parts are {shapes}: must be of one shape, [..., Dv] and [...]")
    places = array("q", [t.data_ptr() for part in parts for t in part])
    out, lse = torch.empty_like(out), torch.empty_like(lse)
    where = out.data_ptr(), lse.data_ptr()
    rows = len(parts), places.buffer_info()[0], lse.numel(), out.shape[-1]
    crew.loops("merge_loops").join(*rows, *where)
    return out, lse
