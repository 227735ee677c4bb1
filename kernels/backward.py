"""Gradients of attention, from the result and its log-sum-exp; the scores are computed again.

    grad, out     [B, Hq, L, Dv]             gradient of the result, the result
    query         [B, Hq, L, D]              bfloat16, float16 or float32, as all tensors here
    key, value    [B, Hkv, S, D], [B, Hkv, S, Dv]   Hq a multiple of Hkv
    lse, grad_lse [B, Hq, L] float32         natural log-sum-exp of the scores (with the sink's);
                                             its gradient, or None
    mask          [L|1, S|1] or [B|1, Hq|1, L|1, S|1]   bool (True = attend), float32 or the
                                             query's dtype (added to the scores); any strides
    returns       dq, dk, dv                 shapes, dtypes and order of strides of the inputs

Any strides with 1 in the last dimension (``grad`` with another is copied). Sums are float32; p and
ds are rounded to the inputs' dtype before the products with do, q and k. A row that sees no key
gives 0 everywhere.

Three kernels: `backward_rows` (log-sum-exp and delta of each row), `backward_key` (dK and dV),
`backward_query` (dQ). Scores are computed twice, in 7 products where 5 would do; in return no two
programs add to the same memory: results are always bitwise deterministic, without atomics.
Not computed: gradients of the mask and of ALiBi's slopes.

Rows read: all of every tensor. Reference: autograd of `scores.reference`, in float64.
Source: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vattn.kernels import gpu
from vattn.kernels.backward_key import key_kernel
from vattn.kernels.backward_query import query_kernel
from vattn.kernels.backward_rows import reference as row_terms_reference
from vattn.kernels.backward_rows import row_terms, sink_gradient
from vattn.kernels.backward_tiles import Tiles, tiles_of
from vattn.kernels.contract import check_row, rows_like
from vattn.kernels.kv import KV
from vattn.kernels.mask_tiles import four_dim
from vattn.kernels.scores import Scores


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scores: Scores = Scores(),  # noqa: B008  frozen
    *,
    mask: Tensor | None = None,
    grad_lse: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): the contract is at the head of this file; ``tiles`` None: `tiles_of`.

    Raises ValueError, with the value and the limit, for anything outside of the contract.
    """
    return _gradients(grad, query, key, value, out, lse, scores, mask, grad_lse, tiles)[:3]


def backward_sinks(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scores: Scores,
    *,
    mask: Tensor | None = None,
    grad_lse: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` and the gradient of ``scores.sink_logits``, float32 [Hq]."""
    sinks = scores.sink_logits
    if sinks is None:
        raise ValueError("scores have no sink_logits: call backward")
    dq, dk, dv, terms = _gradients(grad, query, key, value, out, lse, scores, mask, grad_lse, tiles)
    if terms is None:
        terms = row_terms_reference(grad, out, lse, grad_lse).float()
    return dq, dk, dv, sink_gradient(terms, sinks)


def _gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scores: Scores,
    mask: Tensor | None,
    grad_lse: Tensor | None,
    tiles: Tiles | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and the rows' terms; None where nothing had to be launched."""
    device = gpu.device_of(query)
    _check(grad, query, key, value, out, lse, grad_lse)
    scores.check(query, query.shape[0])
    if mask is not None:
        mask = four_dim(mask, query.dtype, (*query.shape[:3], key.shape[2]))
    dq, dk, dv = results = rows_like(query), rows_like(key), rows_like(value)
    if not lse.numel() or not key.shape[2]:
        return dq.zero_(), dk.zero_(), dv.zero_(), None
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    if tiles is None:
        plain = mask is None and scores.alibi is None and scores.softcap is None
        tiles = tiles_of(device, max(query.shape[3], value.shape[3]), query.dtype, plain)
    with gpu.current(query):
        terms = row_terms(grad, out, lse, grad_lse)
        _launch((grad, query, key, value), results, terms, scores, mask, tiles)
    return dq, dk, dv, terms


def _launch(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    terms: Tensor,
    scores: Scores,
    mask: Tensor | None,
    tiles: Tiles,
) -> None:
    """Launch for checked arguments; a mask is from `mask_tiles.four_dim`."""
    _, query, key, value = inputs
    batch, heads, tokens, dim = query.shape
    kv_heads, length = key.shape[1:3]
    grad_of, *rows = ((tensor, *tensor.stride()[:3]) for tensor in inputs)
    dq, dk, dv = ((tensor, *tensor.stride()[:3]) for tensor in results)
    alibi = None if scores.alibi is None else scores.alibi.expand(batch, heads)
    offsets = {None: None, "top_left": 0, "bottom_right": length - tokens}
    rest = (
        terms,
        None if mask is None else (mask, *mask.stride()),
        None if alibi is None else (alibi, *alibi.stride()),
        heads,
        heads // kv_heads,
        tokens,
        length,
        batch * heads * tokens,
        scores.factor(dim),
        scores.softcap,
        offsets[scores.causal],
        None if scores.window is None else min(scores.window, tokens + length),
        min(scores.sink_tokens, length),
    )
    fixed = {
        "D": dim,
        "DV": value.shape[3],
        "BLOCK_D": gpu.padded(dim),
        "BLOCK_DV": gpu.padded(value.shape[3]),
        "PRECISION": gpu.precision(query),
    }
    programs = batch * kv_heads * triton.cdiv(length, tiles.key.keys)
    key_kernel[(programs,)](grad_of, *rows, dk, dv, *rest, **fixed, **tiles.key.options)
    programs = batch * heads * triton.cdiv(tokens, tiles.query.queries)
    query_kernel[(programs,)](grad_of, *rows, dq, *rest, **fixed, **tiles.query.options)


def _check(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
) -> None:
    """Raise ValueError unless the tensors keep the contract."""
    KV(key, value).check_query(query)
    if query.dim() != 4 or key.dtype != query.dtype:
        raise ValueError(
            f"query is {query.dtype} {tuple(query.shape)} and key {key.dtype}: must be "
            "[B, Hq, L, D] and of one dtype"
        )
    for name, matrix in (("query", query), ("out", out)):
        check_row(name, matrix)
    rows = query.shape[:3]
    wide = (*rows, value.shape[3])
    for name, tensor, shape, dtype in (
        ("grad", grad, wide, query.dtype),
        ("out", out, wide, query.dtype),
        ("lse", lse, rows, torch.float32),
        ("grad_lse", grad_lse, rows, torch.float32),
    ):
        if tensor is not None and (
            tensor.shape != shape or tensor.dtype != dtype or tensor.device != query.device
        ):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: must be "
                f"{dtype} {tuple(shape)} on {query.device}"
            )
