"""What the backward kernels need of each query's row: its log-sum-exp and delta, made once.

    grad, out      [B, H, L, Dv]         lse, grad_lse [B, H, L] float32; grad_lse may be None
    returns        [2, B, H, L] float32: the log-sum-exp in units of log2, and
                   delta = sum_d grad_d out_d - grad_lse

A row that saw no key (lse = -inf) gets +inf and delta 0: its weights exp2(s - inf) are then 0. So
does one with lse < -1e30, whose keys are all hidden by large finite numbers: float32 has no room
for the sum of its weights beside such a number.
Bytes moved: grad and out once. Rows read: all of them. Source: Dao, FlashAttention-2,
https://arxiv.org/abs/2307.08691, algorithm 2, line 4; grad_lse enters since d lse / d s_j = p_j.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.backward_scores import matrix, read_rows
from vattn.kernels.gpu import current, padded
from vattn.kernels.scores import LOG2E

BLOCK_L = 32
HIDDEN = -1e30


def reference(grad: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None = None) -> Tensor:
    """The definition, in float64."""
    delta = (grad.double() * out.double()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    empty = lse < HIDDEN
    log2_lse = lse.double() * LOG2E
    return torch.stack([log2_lse.masked_fill(empty, float("inf")), delta.masked_fill(empty, 0.0)])


@triton.jit
def _number(tensor, b, h, i, tokens):
    """Numbers i of head h."""
    base, stride = matrix(tensor, b, h)
    return tl.load(base + i.to(tl.int64) * stride, mask=i < tokens, other=0.0)


@triton.jit(do_not_specialize=["heads", "tokens", "count"])
def row_terms_kernel(
    grad,
    out,
    lse,
    grad_lse,
    terms,
    heads,
    tokens,
    count,
    LOG2E: tl.constexpr,
    HIDDEN: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_L)
    head = tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    i = (tl.program_id(0) % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    do = read_rows(matrix(grad, b, h), i, tokens, DV, BLOCK_DV).to(tl.float32)
    o = read_rows(matrix(out, b, h), i, tokens, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(do * o, 1)
    if grad_lse is not None:
        delta -= _number(grad_lse, b, h, i, tokens)
    held = _number(lse, b, h, i, tokens)
    empty = held < HIDDEN
    to = terms + head.to(tl.int64) * tokens + i
    tl.store(to, tl.where(empty, float("inf"), held * LOG2E), mask=i < tokens)
    tl.store(to + count, tl.where(empty, 0.0, delta), mask=i < tokens)


def row_terms(grad: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None = None) -> Tensor:
    """The contract above; `backward` has checked the arguments."""
    batch, heads, tokens, dim = grad.shape
    terms = torch.empty((2, batch, heads, tokens), dtype=torch.float32, device=grad.device)
    with current(grad):
        row_terms_kernel[(batch * heads * triton.cdiv(tokens, BLOCK_L),)](
            (grad, *grad.stride()[:3]),
            (out, *out.stride()[:3]),
            (lse, *lse.stride()),
            None if grad_lse is None else (grad_lse, *grad_lse.stride()),
            terms,
            heads,
            tokens,
            batch * heads * tokens,
            LOG2E=LOG2E,
            HIDDEN=HIDDEN,
            DV=dim,
            BLOCK_DV=padded(dim),
            BLOCK_L=BLOCK_L,
            num_warps=4,
        )
    return terms


def sink_gradient(terms: Tensor, sink_logits: Tensor) -> Tensor:
    """The gradient [Hq] float32 of the sink logits, from what `row_terms` returned.

    A sink has a weight and no value, so that dp = 0: -sum over rows of p_sink * delta.
    """
    lse, delta = terms
    return -(torch.exp2(sink_logits[:, None] * LOG2E - lse) * delta).sum((0, 2))
