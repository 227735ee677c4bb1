"""The Triton kernels behind the drop-in: which of them runs a call, and its gradients.

    few query rows, no mask      kernels.decode     K and V read in parts, by all processors
    every other call             kernels.prefill    a tile of query rows a program
    gradients                    kernels.backward

triton is imported when the first call is launched. Nothing here reads a tensor back to the host:
what is called once can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from vattn.kernels.contract import additive, plain_rows, rows_like
from vattn.kernels.kv import KV
from vattn.kernels.kv import MOST_TOKENS as MOST_QUERIES
from vattn.kernels.scores import Scores

Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]

# Parts of a sequence's keys in a `batch_invariant` block: the workspace is parts x batch.
MOST_PARTS = 256
_lock = Lock()
_open: dict[object, int] = {}  # the blocks that are open, the newest last
_split_tokens: int | None = None  # the newest one's: a global, for compiled code to guard


@contextmanager
def batch_invariant(split_tokens: int = 512) -> Iterator[None]:
    """A block in which a row's result has the same bits whatever else is in its batch.

    K and V are cut every ``split_tokens`` tokens, however many processors that leaves idle; into at
    most 256 parts, so that caches of more than ``256 * split_tokens`` reserved tokens are cut less
    often: by their size alone, see `cut`. On a GPU only the Triton kernels serve, for torch's own
    cut as the batch suits them: a call of plain tensors that they cannot serve raises
    `paths.ImplError` with the reason (subclasses of Tensor decide for themselves). Calls on the CPU
    stay as they are, unless impl="triton" is asked for.

    For the whole process and all its threads, as `torch.use_deterministic_algorithms`: from the
    first block that is entered to the last that is left, in any order; of several that are open the
    one entered last decides where to cut. What was compiled outside is compiled again.

    Raises ValueError unless ``split_tokens`` is a positive multiple of 128.
    """
    if split_tokens < 128 or split_tokens % 128:
        raise ValueError(f"split_tokens={split_tokens}: must be a positive multiple of 128")
    block = object()
    with _lock:
        _open[block] = split_tokens
        _settle()
    try:
        yield
    finally:
        with _lock:
            del _open[block]
            _settle()


def _settle() -> None:
    global _split_tokens
    _split_tokens = next(reversed(_open.values()), None)


def invariant() -> bool:
    """Whether a `batch_invariant` block is open."""
    return _split_tokens is not None


def split_tokens() -> int | None:
    """What the newest open `batch_invariant` block was given; None outside of one."""
    return _split_tokens


def cut(reserved: int) -> int | None:
    """Every how many tokens K and V of ``reserved`` rows a sequence are cut in a `batch_invariant`
    block, a multiple of 128; None outside of one."""
    wanted = _split_tokens
    if wanted is None:
        return None
    return max(wanted, 128 * -(-reserved // (128 * MOST_PARTS)))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Pair:
    """Attention and log-sum-exp of one dense call: (out [B, Hq, L, Dv], lse [B, Hq, L] float32).

    Shapes as in `scaled_dot_product_attention`, all 4-D but a mask of 2 to 4 dimensions; ``out`` is
    strided as `like`. Raises ValueError for what the kernels cannot take.
    """
    from vattn.kernels.decode import decode_lse
    from vattn.kernels.prefill import prefill_lse

    kv = KV(key, value)
    scores = Scores(scale=scale, causal="top_left" if is_causal else None)
    out = like(query, value.shape[3])
    # `empty_like` of a query whose rows overlap has gaps in its rows.
    rows = out if out.stride(3) == 1 or out.shape[3] == 1 else out.new_empty(out.shape)
    if mask is None and query.shape[2] <= MOST_QUERIES:
        lse = decode_lse(query, kv, scores, split_tokens=cut(key.shape[2]), out=rows)[1]
    else:
        mask = mask[None] if mask is not None and mask.dim() == 3 else mask
        # Which tiles of a mask are looked for decides the order of sums.
        find = True if invariant() else None
        lse = prefill_lse(query, kv, scores, mask=mask, find_tiles=find, out=rows)[1]
    return (out if rows is out else out.copy_(rows)), lse


def over_lanes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    slots: Tensor | None,
    scale: float | None,
    window_tokens: int | None,
) -> Pair:
    """Attention of the last tokens of sequences in a cache, causal and aligned bottom-right.

    query [B, Hq, L, D]; key and value [N, Hkv, S, D], of which sequence b owns rows ``starts[b]``
    to ``lengths[b]`` of slot ``slots[b]``; no other row is touched. Returns (out [B, Hq, L, D],
    lse [B, Hq, L] float32).
    """
    from vattn.kernels.decode import decode_lse
    from vattn.kernels.prefill import prefill_lse

    kv = KV(key, value, lengths, starts, slots)
    scores = Scores(scale=scale, causal="bottom_right", window=window_tokens)
    if query.shape[2] <= MOST_QUERIES:
        split = cut(key.shape[2])
        return decode_lse(query, kv, scores, split_tokens=split, out=rows_like(query))
    return prefill_lse(query, kv, scores, out=rows_like(query))


def like(query: Tensor, dim: int) -> Tensor:
    """An unwritten result: `empty_like` of the query, as torch's flash kernel makes it; contiguous
    where V is of another width."""
    if dim == query.shape[3]:
        return torch.empty_like(query)
    return query.new_empty((*query.shape[:3], dim))


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Gradients:
    """Gradients of query, key and value, from what `forward` returned."""
    from vattn.kernels import backward as kernels

    scores = Scores(scale=scale, causal="top_left" if is_causal else None)
    rows = mask[None] if mask is not None and mask.dim() == 3 else mask
    # `forward` returns a result with gaps in its rows for a query whose rows overlap.
    out = plain_rows(out)
    return kernels.backward(grad, query, key, value, out, lse, scores, mask=rows)


def differentiable_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor | None, ...]:
    """`backward` as torch's MATH kernel computes it, which can be differentiated again.

    It computes the result once more and keeps all scores: [B, Hq, L, S] in float32.
    """
    # A new node for each argument: the gradients of one tensor in two places stay apart.
    inputs = tuple(t.view_as(t) for t in (query, key, value))
    out = torch.ops.aten._scaled_dot_product_attention_math(
        *inputs,
        additive(mask, query.dtype),
        0.0,
        is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )[0]
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(found) if t.requires_grad else None for t in inputs)
