"""Decode attention that reads K and V once, where they lie, at the speed of memory. Needs numba.

    query [B, Hq, L, D]  key [B, Hkv, S, D]  value [B, Hkv, S, Dv]  -> [B, Hq, L, Dv]
    dtypes float32, bfloat16, float16; G = Hq / Hkv any whole number; meant for L from 1 to 16
    masks and log-sum-exp as `contract` says; float32 sums, online softmax

K and V may have any strides of batch, head and token, and stride 1 in the last dimension. Where the
heads of a token lie side by side, one unit of work takes all of them, so that memory is read in
order. Sequences are cut into chunks, so that all threads are busy, and joined by log-sum-exp.

Bytes moved: K and V once (rows above four of a group read them again from the processor's cache),
and the results. Every row below a sequence's length must be mapped; none behind it is read. The
loops are in `stream_loops`. Source: FlashDecoding, https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

import importlib
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vattn.kernels.contract import check, check_rows, empty_rows, plain_rows
from vattn.kernels.pool import POOL

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}

NUMBA = (0, 61)
# Tokens of a unit of one head, and of several.
CHUNK, SPAN_CHUNK = 1024, 256
# Tokens of a block; and bytes of K in one of several heads: it and V, and both of the next block,
# lie in the processor's second cache.
BLOCK, BLOCK_BYTES = 64, 64 << 10
# The state of all heads of a unit stays in the processor's second cache.
SPAN_BYTES = 128 << 10
# Work of a thread, in bytes of K and V times tiles of rows, that pays for waking it.
THREAD_BYTES = 512 << 10
# How long to look for the last units of others before sleeping, and for how long then, in seconds.
SPINS, NAP = 4000, 20e-6
_is_lazy: Callable[[Tensor], bool] = getattr(torch._C, "_is_cow_tensor", lambda tensor: False)
_storage_address: Callable[[Tensor], int] = getattr(torch._C, "_data_address", Tensor.data_ptr)
# Words of a call that need not say anything.
NO_MASK, NOT_RAGGED = (0,) * 6, (0,) * 6


def _read(tensor: Tensor) -> int:
    """The address of a tensor that is only read: `data_ptr` would copy one that is a lazy clone."""
    if _is_lazy(tensor):
        storage: int = _storage_address(tensor)
        return storage + int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()


@cache
def available() -> str | None:
    """None where this kernel can run, else the reason."""
    try:
        import numba
        from llvmlite import binding
    except Exception as error:  # an extra may fail in any way while it loads
        return f"numba cannot be imported ({error}): pip install 'vattn[cpu]'"
    if getattr(numba.config, "DISABLE_JIT", False):
        return "numba compiles nothing: NUMBA_DISABLE_JIT is set"
    if numba.version_info.short < NUMBA:
        return f"numba {numba.__version__} is older than 0.61: pip install -U 'vattn[cpu]'"
    machine = binding.get_process_triple().partition("-")[0]
    if machine not in ("x86_64", "aarch64", "arm64"):
        return f"its loops are not known to work on {machine}"
    features = binding.get_host_cpu_features()
    if machine == "x86_64" and not (features.get("fma") and features.get("f16c")):
        return "this processor has no FMA or F16C instructions"
    return None


def serves(tensor: Tensor) -> bool:
    """Whether compiled loops, the stream kernel's and others', can take a tensor."""
    return tensor.is_cpu and available() is None


@cache
def loops() -> ModuleType:
    """The module of compiled loops; raises RuntimeError where it cannot be had."""
    reason = available()
    if reason is not None:
        raise RuntimeError(f"the stream kernel cannot run: {reason}")
    return importlib.import_module("vattn.kernels.stream_loops")


def stream(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend: [B, Hq, L, Dv]; where D = Dv, in memory ordered as the query.

    Raises ValueError for what this kernel does not take, RuntimeError where it cannot run.
    """
    _check(query, key, value, mask)
    return attend(query, key, value, mask, scale)


def stream_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`stream`, and the log-sum-exp of each row: [B, Hq, L] float32."""
    _check(query, key, value, mask)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    return attend(query, key, value, mask, scale, lse), lse


@dataclass(frozen=True)
class Rows:
    """K and V of one layer of several sequences: where rows lie, in bytes, and how many there are.

    A sequence's K starts at ``k[i]``, its V at ``v[i]``; strides are the same for all.
    """

    k: NDArray[np.int64]
    v: NDArray[np.int64]
    lengths: NDArray[np.int64]
    kv_heads: int
    head_bytes: int
    token_bytes: int
    keep: object = None  # what owns the rows: held until the last thread is done
    value_dim: int | None = None  # of V, whose heads then have `value_bytes` a token; None: as K
    value_bytes: int = 0


def stream_ragged(
    query: Tensor,
    rows: Rows,
    *,
    scale: float | None = None,
    window: int = 0,
    logits: Tensor | None = None,
    causal: bool = True,
    exact: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to sequences of any lengths: causally, the queries being the last tokens of each, or
    without a mask.

    query [B, Hq, L, D], K and V of the same dtype; with a ``window``, a query sees so many tokens,
    itself included. Returns ([B, Hq, L, Dv], log-sum-exp [B, Hq, L]), the former of the query's
    dtype or, where they are to be merged, ``exact`` float32. All rows must stay mapped until this
    returns. ``logits`` [B, Hkv, G * L, n] float32 contiguous, of n tokens or more of the longest
    sequence, gets scale * q k of the tokens that each query sees, and -inf. ``bias`` [B, n]
    float32, of as many tokens, is added to the scores of each sequence's tokens.
    """
    query = plain_rows(query)
    value_dim = query.shape[3] if rows.value_dim is None else rows.value_dim
    if value_dim == query.shape[3] and not exact:
        out = torch.empty_like(query)
    else:
        dtype = torch.float32 if exact else query.dtype
        out = query.new_empty((*query.shape[:3], value_dim), dtype=dtype)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if logits is not None:
        _check_logits(logits, query, rows)
        logits.fill_(-torch.inf)
    mask: tuple[int, ...] = NO_MASK
    if bias is not None:
        _check_bias(bias, query, rows)
        mask = _mask(bias[:, None, None])
    if query.numel() == 0:
        return out, lse
    length, dim = query.shape[2:]
    cut = _cut(rows.kv_heads, rows.head_bytes, rows.token_bytes, query, max(dim, value_dim))
    seen = np.maximum(rows.lengths - length + 1 - window, 0) if window else 0
    chunks = np.maximum(-(-rows.lengths // cut.chunk) - seen // cut.chunk, 1)
    firsts = np.zeros(len(chunks) + 1, np.int64)
    np.cumsum(chunks * -(-rows.kv_heads // cut.span), out=firsts[1:])
    units, keys = firsts.item(-1), int(rows.lengths.max())
    steps = (0, 0, rows.head_bytes, rows.token_bytes)
    v_steps = steps
    if rows.value_dim is not None:
        v_steps = (0, 0, value_dim * query.itemsize, rows.value_bytes)
    arrays = (rows.k, rows.v, rows.lengths, firsts)
    ragged = (*[a.ctypes.data for a in arrays], int(causal), window)
    lies = (*steps, *v_steps, *ragged)
    sizes = (rows.kv_heads, keys, value_dim)
    counts = (units, int(chunks.max()))
    keep = (arrays, rows, logits, bias)
    _launch(query, out, lse, sizes, lies, mask, cut, counts, scale, keep, logits)
    return out, lse


def _check_logits(logits: Tensor, query: Tensor, rows: Rows) -> None:
    least = (len(query), rows.kv_heads, query.shape[1] // rows.kv_heads * query.shape[2])
    longest = int(rows.lengths.max())
    wrong = logits.dim() != 4 or logits.shape[:3] != least or logits.shape[3] < longest
    if wrong or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(
            f"logits must be contiguous float32 {[*least, longest]}, or longer; got "
            f"{logits.dtype} {list(logits.shape)}"
        )


def _check_bias(bias: Tensor, query: Tensor, rows: Rows) -> None:
    longest = int(rows.lengths.max())
    fits = bias.dim() == 2 and len(bias) == len(query) and bias.shape[1] >= longest
    if not fits or bias.dtype != torch.float32:
        raise ValueError(
            f"bias must be float32 {[len(query), longest]}, or longer; got {bias.dtype} "
            f"{list(bias.shape)}"
        )


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    check(query, key, value, mask, DTYPES)
    check_rows(key, value)
    if key.shape[3] == 0:
        raise ValueError("query and key have head_dim 0: this kernel needs at least 1")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """`stream` for a caller that has checked; fills ``lse``, [B, Hq, L] float32 contiguous."""
    batch, kv_heads, keys, dim = key.shape
    value_dim = value.shape[3]
    if query.numel() == 0 or keys == 0:
        out, empty = empty_rows(query, value)
        if lse is not None:
            lse.copy_(empty)
        return out
    query = plain_rows(query)
    if value_dim == dim:
        out = torch.empty_like(query)
    else:
        out = query.new_empty((*query.shape[:3], value_dim))
    item = query.itemsize
    k_batch, k_head, k_row, _ = key.stride()
    v_batch, v_head, v_row, _ = value.stride()
    lies = (
        *(_read(key), k_batch * item, k_head * item, k_row * item),
        *(_read(value), v_batch * item, v_head * item, v_row * item),
        *NOT_RAGGED,
    )
    cut = _cut(kv_heads, k_head, k_row, query, max(dim, value_dim))
    chunks = -(-keys // cut.chunk)
    units = (batch * -(-kv_heads // cut.span) * chunks, chunks)
    masked = NO_MASK if mask is None else _mask(mask)
    sizes, keep = (kv_heads, keys, value_dim), (key, value, mask)
    _launch(query, out, lse, sizes, lies, masked, cut, units, scale, keep)
    return out


class Cut(NamedTuple):
    """KV heads and tokens of a unit, and tokens of a block."""

    span: int
    chunk: int
    block: int


def _cut(kv_heads: int, head_step: int, token_step: int, query: Tensor, dim: int) -> Cut:
    """Take all heads that fit into a unit where a token's heads lie side by side, else one."""
    if kv_heads == 1 or head_step >= token_step:
        return Cut(1, CHUNK, BLOCK)
    rows = max(4, query.shape[1] // kv_heads * query.shape[2])
    span = max(1, min(kv_heads, SPAN_BYTES // (8 * dim * rows)))
    block = BLOCK_BYTES // (span * dim * query.itemsize)
    return Cut(span, SPAN_CHUNK, max(16, min(BLOCK, block & ~1)))


def _lies(logits: Tensor) -> tuple[int, int, int]:
    """The words of a call about logits."""
    # Not by its strides: those of a dimension of size 1 mean nothing.
    rows, longest = logits.shape[2:]
    return logits.data_ptr(), rows * longest * 4, longest * 4


def _mask(mask: Tensor) -> tuple[int, ...]:
    """The words of a call about a mask: address, kind, byte strides (0 where it broadcasts)."""
    item = mask.itemsize
    pairs = zip(mask.shape, mask.stride(), strict=True)
    steps = [0 if size == 1 else step * item for size, step in pairs]
    return (_read(mask), MASK_KINDS[mask.dtype], *([0] * (4 - len(steps))), *steps)


def _launch(
    query: Tensor,
    out: Tensor,
    lse: Tensor | None,
    sizes: tuple[int, int, int],
    lies: tuple[int, ...],
    mask: tuple[int, ...],
    cut: Cut,
    units: tuple[int, int],
    scale: float | None,
    keep: object,
    logits: Tensor | None = None,
) -> None:
    """Describe the call, make its workspace, and run it on as many threads as it is worth.

    ``sizes``: KV heads, tokens, Dv; ``lies``: the words about K, V and ragged batches; ``units``:
    how many there are, and of how many chunks the longest sequence is; ``keep``: what must live.
    """
    code = loops()
    batch, heads, length, dim = query.shape
    kv_heads, keys, value_dim = sizes
    item, out_item, groups = query.itemsize, out.itemsize, heads // kv_heads
    tiles = -(-groups * length // code.ROWS)
    inner, outer = -(-dim // 16), -(-value_dim // 16)
    state = outer * code.STEP_BYTES + code.STATE_BYTES
    # As `stream_loops` says: query tiles, states, scores, padded rows.
    scratch = cut.span * tiles * (inner * code.STEP_BYTES + state)
    scratch += cut.block * (tiles * code.ROWS * 4 + max(inner, outer) * 16 * item)
    states = units[0] * cut.span * tiles * state if units[1] > 1 else 0
    moved = batch * kv_heads * keys * (dim + value_dim) * item * tiles
    threads = max(1, min(torch.get_num_threads(), units[0], moved // THREAD_BYTES))
    space = torch.empty(states + threads * scratch, dtype=torch.uint8, device=query.device)
    counts = array("q", bytes(8 * (3 + batch * -(-kv_heads // cut.span))))
    base = space.data_ptr()
    q_batch, q_head, q_row, _ = query.stride()
    out_batch, out_head, out_row, _ = out.stride()
    words = array(
        "q",
        (
            *(batch, kv_heads, groups, length, keys, dim, value_dim, item),
            *(_read(query), q_batch * item, q_head * item, q_row * item),
            *lies,
            *(out.data_ptr(), out_batch * out_item, out_head * out_item, out_row * out_item),
            out_item,
            0 if lse is None else lse.data_ptr(),
            *((0, 0, 0) if logits is None else _lies(logits)),
            *mask,
            *(cut.span, cut.chunk, units[0], cut.block),
            *(base, base + states, scratch, counts.buffer_info()[0]),
        ),
    )
    factor = dim**-0.5 if scale is None else float(scale)
    tag, place = code.TAGS[DTYPES.index(query.dtype)], words.buffer_info()[0]
    if threads == 1:
        code.run(tag, place, factor)
        return
    alive = (words, counts, space, query, out, lse, keep)
    job = Job(partial(code.run, tag, place, factor), alive)
    try:
        POOL.post(job, threads - 1)
        job.run()
        while not code.finished(place, SPINS):
            time.sleep(NAP)
    except BaseException:
        # Threads at work finish their unit, and the job keeps its memory for them until then.
        counts[0] = units[0]
        raise


@dataclass(frozen=True)
class Job:
    """What a helping thread calls, and the memory that must outlive the call."""

    run: Callable[[], object]
    alive: tuple[object, ...]

    def __call__(self) -> None:
        self.run()
