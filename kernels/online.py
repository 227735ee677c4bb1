"""Pieces that the Triton attention kernels share: scores, what is visible, the online softmax.

Scores are kept in units of log2, so that exp2 is the only exponential (the scale comes with log2(e)
multiplied in, before the maximum is taken: a negative scale turns it round).

    m  running maximum      total  running sum of exp2(s - m)      acc  running sum of exp2(s - m) v

Source: Milakov and Gimelshein, https://arxiv.org/abs/1805.02867; Dao et al., FlashAttention,
https://arxiv.org/abs/2205.14135. A row without any visible key keeps m = -inf, total = 0, acc = 0:
differences are then taken from 0, because -inf - -inf is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.gpu import Device

# The interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton issue 11584).
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

BITS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
CONVERTS_FP8 = 89  # compute capability 8.9, Ada


def stored(device: Device, *tensors: Tensor) -> tuple[str, list[Tensor]]:
    """How a kernel reads tensors of one dtype on ``device``, for `widen`: "" as numbers, or as the
    bits of these; and the tensors so."""
    bits = BITS.get(tensors[0].dtype, "")
    if not bits or device.arch >= CONVERTS_FP8:
        return "", list(tensors)
    return bits, [tensor.view(torch.uint8) for tensor in tensors]


@triton.jit
def rows_before(base, n, limit, ROW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``n`` < ``limit`` from ``base`` on; zeros for others."""
    d = tl.arange(0, BLOCK_D)
    inside = (n < limit)[:, None] & (d < D)[None, :]
    return tl.load(base + n.to(tl.int64)[:, None] * ROW + d[None, :], mask=inside, other=0.0)


@triton.jit
def whole_rows(base, ROW: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """N rows from ``base`` on."""
    n = tl.arange(0, N).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    at = base + n[:, None] * ROW + d[None, :]
    if D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; PRECISION "ieee" or "tf32" is for float32 alone."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def widen(tile, DTYPE: tl.constexpr, STORED: tl.constexpr):
    """A tile as `stored` handed it over, exactly, in DTYPE.

    STORED "e4m3" and "e5m2" are bits, for devices that cannot convert them: e5m2 is the upper byte
    of a float16; e4m3 has its mantissa and exponent in the middle of one, with a bias less by 8.
    """
    if STORED == "e5m2":
        tile = (tile.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif STORED == "e4m3":
        bits = tile.to(tl.uint16)
        small = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        tile = tl.where((bits & 0x7F) == 0x7F, float("nan"), small * 256.0)
    return tile.to(DTYPE)


@triton.jit
def scored(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2 from <q, k>; ``scale`` in natural units."""
    if SOFTCAP:
        # tanh x = 1 - 2 / (1 + e^2x), which overflows to the right limits.
        power = tl.exp2(products * (2 * LOG2E * scale / softcap))
        return (softcap * LOG2E) * (1 - 2 / (1 + power))
    return products * (scale * LOG2E)


@triton.jit
def visible(p, j, window, sink_tokens, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether queries at positions p [M, 1] see keys j [1, N]; CAUSAL must hold."""
    seen = j <= p
    if WINDOW:
        seen = seen & ((j > p - window) | (j < sink_tokens))
    return seen


@triton.jit
def weigh(s, m):
    """(new m [M], what was summed before shrinks by [M], weights [M, N]) of scores s [M, N]."""
    m_new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, tl.exp2(m - shift), tl.exp2(s - shift[:, None])


@triton.jit
def weigh_whole(products, factor, m):
    """`weigh` of products none of which is masked, whose ``factor`` [M] to scores in units of log2
    is at least 0: one multiply-add and one exp2 an element."""
    m_new = tl.maximum(m, tl.max(products, 1) * factor)
    return m_new, tl.exp2(m - m_new), tl.exp2(products * factor[:, None] - m_new[:, None])


@triton.jit
def fold(s, v, m, total, acc, PRECISION: tl.constexpr):
    """Take scores s [M, N] and values v [N, Dv] into m [M], total [M], acc [M, Dv]."""
    m, alpha, p = weigh(s, m)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)
    return m, total * alpha + tl.sum(p, 1), acc


@triton.jit
def settled(m, total, acc):
    """The result [M, Dv] and natural log-sum-exp [M] of what was folded in."""
    whole = tl.where(total == 0.0, 1.0, total)
    return acc / whole[:, None], m * LN2 + tl.log(whole)
