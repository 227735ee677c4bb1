"""Pieces that the Triton attention kernels share: scores, what is visible, the online softmax.

Scores are kept in units of log2, so that exp2 is the only exponential (the scale comes with log2(e)
multiplied in, before the maximum is taken: a negative scale turns it round).

    m  running maximum      total  running sum of exp2(s - m)      acc  running sum of exp2(s - m) v

Source: Milakov and Gimelshein, https://arxiv.org/abs/1805.02867; Dao et al., FlashAttention,
https://arxiv.org/abs/2205.14135. A row without any visible key keeps m = -inf, total = 0,
acc = 0:
differences are then taken from 0, because -inf - -inf is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton issue 11584).
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; PRECISION "ieee" or "tf32" is for float32 alone."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


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
def fold(s, v, m, total, acc, PRECISION: tl.constexpr):
    """Take scores s [M, N] and values v [N, Dv] into m [M], total [M], acc [M, Dv]."""
    m_new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - shift)
    p = tl.exp2(s - shift[:, None])
    total = total * alpha + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)
    return m_new, total, acc


@triton.jit
def settled(m, total, acc):
    """The result [M, Dv] and natural log-sum-exp [M] of what was folded in."""
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    return out, m * LN2 + tl.log(total)
