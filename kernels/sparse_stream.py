"""Attention to a selection on a CPU: each chosen row is read where it lies. Needs numba.

`selection` states the contract: bfloat16, float16 or float32, D and Dv any, query rows any whole
multiple of KV heads, meant for L from 1 to 16; float32 sums, online softmax; strides of K and V any
with 1 in the last dimension; scales of K and V.

Lists of pages are cut into chunks, so that all threads are busy, and joined by log-sum-exp. The
mass takes a second pass over the scores, which are kept for it: it does not depend on threads.

Bytes moved: the chosen rows of K and V once for all query rows that share a KV head (rows above
four of a group read them again from the processor's cache), 4 bytes a page, and the results. Only
rows of the chosen pages from ``starts`` to ``lengths`` need be mapped. The loops are in
`sparse_loops`.
"""

from __future__ import annotations

from array import array
from functools import partial

import torch
from torch import Tensor

from vattn.kernels import crew
from vattn.kernels.contract import EMPTY, plain_rows
from vattn.kernels.kv import KV, scale_stride
from vattn.kernels.selection import Selection
from vattn.kernels.stream import DTYPES

Answer = tuple[Tensor, Tensor, Tensor | None]

# Tokens of a unit, and work of a thread in bytes of K and V times tiles of rows.
CHUNK = 512
THREAD_BYTES = 256 << 10


def attend(
    query: Tensor,
    kv: KV,
    selection: Selection,
    *,
    scale: float | None = None,
    want_mass: bool = False,
) -> Answer:
    """Attend to the chosen tokens: query [B, Hq, L, D] -> out [B, Hq, L, Dv] of the query's dtype,
    lse [B, Hq, L] float32 and, if wanted, mass [B, Hkv, K] float32.

    Raises:
        ValueError: shapes, dtypes or devices do not suit; the message names them.
        RuntimeError: the compiled loops cannot run here.
    """
    check(query, kv, selection)
    query = plain_rows(query)
    value_dim = kv.value.shape[3]
    if value_dim == query.shape[3]:
        out = torch.empty_like(query)
    else:
        out = torch.empty((*query.shape[:3], value_dim), dtype=query.dtype)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    mass = None
    if want_mass:
        mass = torch.zeros(selection.ids.shape, dtype=torch.float32)
    if out.numel() == 0 or selection.ids.shape[2] == 0:
        return out.zero_(), lse.fill_(EMPTY), mass
    factor = query.shape[3] ** -0.5 if scale is None else float(scale)
    _launch(query, kv, selection, factor, out, lse, mass)
    return out, lse, mass


def check(query: Tensor, kv: KV, selection: Selection) -> None:
    """Raise ValueError unless this kernel takes the call."""
    selection.check(query, kv)
    if not query.is_cpu:
        raise ValueError(f"query is on {query.device}: this kernel runs on the CPU")
    if kv.key.dtype not in DTYPES:
        raise ValueError(
            f"key is {kv.key.dtype}: this kernel takes float32, bfloat16, float16; `gathered` "
            "takes any"
        )


def _launch(
    query: Tensor,
    kv: KV,
    selection: Selection,
    factor: float,
    out: Tensor,
    lse: Tensor,
    mass: Tensor | None,
) -> None:
    """Describe the call, make its workspace, and run it on as many threads as it is worth."""
    code = crew.loops("sparse_loops")
    batch, heads, length, dim = query.shape
    kv_heads, value_dim, item = kv.key.shape[1], out.shape[3], query.itemsize
    groups, entries, size = heads // kv_heads, selection.ids.shape[2], selection.page_tokens
    chunk = max(1, CHUNK // size)
    chunks = -(-entries // chunk)
    units = batch * kv_heads * chunks
    tiles = -(-groups * length // code.ROWS)
    inner, outer = -(-dim // 16), -(-value_dim // 16)
    state = outer * code.STEP_BYTES + code.STATE_BYTES
    # As `sparse_loops` says: query tiles, states, scores, padded rows, positions, log-weights.
    scratch = tiles * (inner * code.STEP_BYTES + state + code.BLOCK * code.ROWS * 4)
    scratch += code.BLOCK * max(inner, outer) * 16 * item
    scratch += 12 * (chunk * size + code.BLOCK) + 64
    scratch += -scratch % 64
    states = units * tiles * state if chunks > 1 else 0
    logits = units * tiles * (chunk * size + 1) * code.ROWS * 4 if mass is not None else 0
    moved = batch * kv_heads * entries * size * (dim + value_dim) * item * tiles
    threads = crew.threads(units, moved, THREAD_BYTES)
    space = torch.empty(states + logits + threads * scratch, dtype=torch.uint8)
    counts = array("q", bytes(8 * (crew.COUNTS + batch * kv_heads)))
    lines = [crew.line(counts) for counts in (kv.slots, kv.starts, kv.lengths)]
    given = (selection.ids, selection.count, selection.log_weights)
    lists = [None if each is None else each.contiguous() for each in given]
    scales = (kv.key_scale, kv.value_scale)
    base = space.data_ptr()
    words = array(
        "q",
        (
            *(kv_heads, groups, length, kv.key.shape[2], dim, value_dim, item),
            *(crew.address(query), *(step * item for step in query.stride()[:3])),
            *(crew.address(kv.key), *(step * item for step in kv.key.stride()[:3])),
            *(crew.address(kv.value), *(step * item for step in kv.value.stride()[:3])),
            *map(crew.address, lines),
            *(word for each in scales for word in (crew.address(each), 4 * scale_stride(each))),
            *map(crew.address, lists),
            *(entries, size),
            *(crew.address(out), *(step * item for step in out.stride()[:3])),
            *(crew.address(lse), crew.address(mass)),
            *(chunk, chunks, units),
            *(base, base + states, base + states + logits, scratch, counts.buffer_info()[0]),
        ),
    )
    tag = code.TAGS[DTYPES.index(query.dtype)]
    run = partial(code.run, tag, words.buffer_info()[0], factor)
    alive = (words, space, query, kv, lines, lists, out, lse, mass)
    crew.work(run, counts, units, threads, *alive)
