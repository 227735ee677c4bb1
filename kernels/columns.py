"""How much attention each key has had from several queries: what eviction policies decide by.

    query [B, Hq, R, D], the last R tokens of each sequence
    -> total [B, Hq, n], square [B, Hq, n], entropy [B, Hq], all float32

With a = softmax(scale * q k^T) under the causal mask aligned bottom-right (row r of R sees the
first length - R + 1 + r keys), ``total`` is the sum of a over the R rows, ``square`` that of a^2,
and ``entropy`` the sum over rows and keys of -a ln a. So ``total`` sums to R over the keys of a
query head. Keys behind a sequence's length have 0. n is the longest sequence.

    on a GPU     `columns_kernel` (Triton)
    on a CPU     `columns_loops` (numba)
    elsewhere    torch's operations

Scores are made a block of rows at a time. Bytes moved: K once for each block (once in all for an
observation window), and 8 bytes a key and query head. Only the first ``lengths`` rows of K need be
mapped. Sources: H2O (arXiv 2306.14048) sums over all rows, SnapKV (2404.14469) over a window, CAKE
(2503.12491) takes mean, variance and entropy of one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vattn.kernels import crew, stream
from vattn.kernels.contract import EMPTY
from vattn.kernels.kv import KV

# Scores that are held at once, in float32 elements (32 MiB).
SCORES = 1 << 23
# Likewise where loops read them; and those that pay for a thread.
BLOCK, THREAD_SCORES = 1 << 19, 16 << 10


@dataclass(frozen=True, eq=False)
class Columns:
    """Sums over ``rows`` queries: total and square [B, Hq, n], entropy [B, Hq], float32."""

    total: Tensor
    square: Tensor
    entropy: Tensor
    rows: int


def columns(
    query: Tensor, kv: KV, *, scale: float | None = None, bias: Tensor | None = None
) -> Columns:
    """The sums of query [B, Hq, R, D] over K; ``bias`` as in `logits`.

    Raises:
        ValueError: query and K do not suit each other, or R exceeds the shortest sequence.
    """
    if query.is_cuda and bias is None:
        from vattn.kernels.columns_kernel import columns as launched

        return launched(query, kv, scale=scale)
    if stream.serves(query):
        return _streamed(query, kv, scale, bias)
    total: Tensor | None = None
    square = entropy = query.new_zeros(0)
    for _, scores in logits(query, kv, scale=scale, bias=bias):
        logs = scores.log_softmax(-1)
        weights = logs.exp()
        mixed = (weights * logs.masked_fill_(weights == 0, 0.0)).sum((-1, -2)).neg_()
        if total is None:
            total, square, entropy = weights.sum(2), weights.square().sum(2), mixed
            continue
        total += weights.sum(2)
        square += weights.square_().sum(2)
        entropy += mixed
    assert total is not None
    return Columns(total, square, entropy, query.shape[2])


def _streamed(query: Tensor, kv: KV, scale: float | None, bias: Tensor | None) -> Columns:
    """By compiled loops: a block's scores stay in the processor's cache, and no key is looked at
    that the block's rows do not see."""
    code, counts = crew.loops("columns_loops"), check(query, kv)
    batch, heads, rows, _ = query.shape
    longest, units = max(counts), batch * heads
    total, square = query.new_zeros(2, batch, heads, longest, dtype=torch.float32)
    entropy = query.new_zeros(batch, heads, dtype=torch.float32)
    for first, scores in blocks(query, kv, counts, scale, bias, BLOCK):
        ends = torch.tensor(counts) - rows + first + 1
        drawn = array("q", bytes(8 * crew.COUNTS))
        held = scores, ends, total, square, entropy
        places = [each.data_ptr() for each in held]
        words = array("q", (heads, scores.shape[2], places[0], scores.shape[3], *places[1:4]))
        words.extend((longest, places[4], units, drawn.buffer_info()[0]))
        threads = crew.threads(units, scores.numel(), THREAD_SCORES)
        call = partial(code.run, words.buffer_info()[0])
        crew.work(call, drawn, units, threads, words, *held)
    return Columns(total, square, entropy, rows)


def logits(
    query: Tensor, kv: KV, *, scale: float | None = None, bias: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of scale * q k^T under the causal mask: (first row, [B, Hq, r, n] float32),
    -inf where a row sees nothing. For policies that need more than sums. ``bias`` [B, Hkv, n] is
    added to the scores: the logarithms of how many tokens each row stands for.

    Raises:
        ValueError: as `columns`.
    """
    counts, rows = check(query, kv), query.shape[2]
    at = torch.arange(max(counts), device=query.device)
    ends = torch.tensor(counts, device=query.device) - rows
    for first, scores in blocks(query, kv, counts, scale, bias, SCORES):
        row = torch.arange(first, first + scores.shape[2], device=query.device)
        last = (ends[:, None] + row)[:, None, :, None]
        whole = scores.new_full((*scores.shape[:3], len(at)), EMPTY)
        whole[..., : scores.shape[3]] = scores
        yield first, whole.masked_fill_(at > last, EMPTY)


def blocks(
    query: Tensor, kv: KV, counts: list[int], scale: float | None, bias: Tensor | None, size: int
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of about ``size`` scores: (first row, [B, Hq, r, m] float32), m the keys that its last
    row sees in the longest sequence. What a row does not see is not masked."""
    batch, heads, rows, dim = query.shape
    kv_heads, longest = kv.key.shape[1], max(counts)
    keys = padded(kv.key, kv, counts).float()
    if kv.key_scale is not None:
        keys = keys * kv.key_scale.view(-1, 1, 1)
    factor = dim**-0.5 if scale is None else float(scale)
    step = max(1, size // (batch * heads * longest))
    for first in range(0, rows, step):
        some = query[:, :, first : first + step].float() * factor
        seen = longest - rows + first + some.shape[2]
        scores = some.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ keys[:, :, :seen].mT
        if bias is not None:
            scores += bias[:, :, None, :seen]
        yield first, scores.view(batch, heads, some.shape[2], seen)


def check(query: Tensor, kv: KV) -> list[int]:
    """Lengths of the sequences. Raises ValueError where the call makes no sense."""
    kv.check_query(query)
    if query.dim() != 4 or not query.shape[2]:
        raise ValueError(f"query is {tuple(query.shape)}: must be [B, Hq, R, D] with R >= 1")
    counts = [kv.key.shape[2]] * kv.batch if kv.lengths is None else kv.lengths.tolist()
    if kv.starts is not None and bool(kv.starts.any()):
        raise ValueError("starts must be 0: sums over keys are by their place from row 0 on")
    if min(counts) < query.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries are the last tokens of each sequence, and the shortest "
            f"holds {min(counts)}"
        )
    return [int(each) for each in counts]


def padded(rows: Tensor, kv: KV, counts: list[int]) -> Tensor:
    """The first ``counts`` rows of each sequence side by side, [B, Hkv, n, D]; zeros behind them.
    A view where no sequence is shorter than another and they follow each other."""
    slots = list(range(kv.batch)) if kv.slots is None else kv.slots.tolist()
    longest, first = max(counts), slots[0]
    if min(counts) == longest and slots == list(range(first, first + len(slots))):
        return rows[first : first + len(slots), :, :longest]
    out = rows.new_zeros(len(slots), rows.shape[1], longest, rows.shape[3])
    for b, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        out[b, :, :count] = rows[slot, :, :count]
    return out
