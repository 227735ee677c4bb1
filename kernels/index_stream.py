"""Scores of an index's records on a CPU, each record read once for all rows of its KV head.

The formats, scores and shapes are those of `summaries`, `signs` and `nibbles`; float32 sums. Sign
codes are looked up in tables of 14 bits: a score of D channels may be off by another D / 4 / 16383
of max_m(sum of |q_c| over channels 4m .. 4m + 3), times the token's scale and ``scale``.

Bytes moved: the records once, and 4 bytes a score. Only the first ``counts`` records of a sequence
need be mapped. Needs numba; the loops are in `index_loops`.
"""

from __future__ import annotations

from array import array
from functools import partial
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vattn.kernels import crew, nibbles, signs, summaries
from vattn.kernels.index import Index
from vattn.kernels.stream import DTYPES

# Records of a unit, and work of a thread in bytes of records times tiles of rows.
CHUNK = 4096
THREAD_BYTES = 128 << 10
# Sums of a sign code's table entries stay below 2^16.
MOST_SIGNS = 2048
CHECKS = {"summaries": summaries.check, "signs": signs.check, "nibbles": nibbles.check}


Form = Literal["summaries", "signs", "nibbles"]


def scores(
    form: Form, query: Tensor, index: Index, records: int, *, scale: float | None = None
) -> Tensor:
    """Score the first ``records`` records: query [B, Hq, L, D] -> [B, Hkv, Hq / Hkv * L, records]
    float32, -inf where a sequence has no record.

    Raises:
        ValueError: the query or the parts do not suit; sign codes of more than 2048 channels.
        RuntimeError: the compiled loops cannot run here.
    """
    check(form, query, index)
    found = reading(form, query, index, records)
    _, kv_heads, rows, dim = found.words[:4]
    out = torch.empty((index.batch, kv_heads, rows, records), dtype=torch.float32)
    if out.numel():
        _launch(found, index, out, dim**-0.5 if scale is None else float(scale))
    return out


def check(form: Form, query: Tensor, index: Index) -> None:
    """Raise ValueError unless the index is of this form and suits ``query``."""
    suits = CHECKS[form]
    suits(query, index)
    if form == "signs" and query.shape[3] > MOST_SIGNS:
        raise ValueError(f"head_dim is {query.shape[3]}: sign codes take at most {MOST_SIGNS}")
    for name, tensor in (("query", query), ("index", index.parts[0])):
        if not tensor.is_cpu:
            raise ValueError(f"{name} is on {tensor.device}: this kernel runs on the CPU")


class Reading(NamedTuple):
    """How records are read: the words of `index_loops.Call` before ``out``, the two element types,
    bytes of a thread's workspace, and what must live."""

    words: tuple[int, ...]
    tags: tuple[object, object]
    scratch: int
    keep: tuple[object, ...]


def reading(form: Form, query: Tensor, index: Index, records: int) -> Reading:
    """Describe the records that ``query`` is to be scored with."""
    code = crew.loops("index_loops")
    rows = index.rows(query).float().contiguous()
    _, kv_heads, count, dim = rows.shape
    lines = crew.line(index.counts), crew.line(index.slots)
    parts = [word for part in index.parts for word in _part(part)]
    words = (
        *(code.FORMATS[form], kv_heads, count, dim, rows.data_ptr()),
        *(records, index.parts[0].shape[2], *map(crew.address, lines)),
        *(parts + [0] * (10 - len(parts))),
    )
    numbers = form == "summaries"
    tags = [code.TAGS[DTYPES.index(part.dtype) if numbers else 0] for part in index.parts]
    scratch = _scratch(code, form, count, dim)
    return Reading(words, (tags[0], tags[-1]), scratch, (rows, lines, index))


def _part(part: Tensor) -> tuple[int, ...]:
    """Address, byte strides, and bytes of an element."""
    item = part.itemsize
    return (part.data_ptr(), *(step * item for step in part.stride()[:3]), item)


def _scratch(code: ModuleType, form: Form, rows: int, dim: int) -> int:
    """Bytes of a thread's workspace, as `index_loops` lays it out."""
    tiles, steps = -(-rows // code.ROWS), -(-dim // 16)
    tile, block = tiles * steps * code.STEP_BYTES, code.BLOCK * code.ROWS * 4
    if form == "signs":
        count = -(-dim // 8) * 2
        tables = rows * (count * code.TABLE_BYTES + 8)
        size = tables + code.TOKENS * (4 + count + 31) + code.TOKENS * (count + 16) + 128
    elif form == "nibbles":
        size = tile + block + tiles * 32 + steps * (code.BLOCK * 8 + 64)
    else:
        size = 2 * tile + 2 * block + 2 * code.BLOCK * steps * 64
    return -(-size // 64) * 64


def _launch(found: Reading, index: Index, out: Tensor, factor: float) -> None:
    """Run the call on as many threads as it is worth."""
    code = crew.loops("index_loops")
    batch, kv_heads, rows, records = out.shape
    chunks = -(-records // CHUNK)
    units = batch * kv_heads * chunks
    width = sum(part.shape[3] * part.itemsize for part in index.parts)
    moved = batch * kv_heads * records * width * -(-rows // code.ROWS)
    threads = crew.threads(units, moved, THREAD_BYTES)
    space = torch.empty(threads * found.scratch, dtype=torch.uint8)
    counts = array("q", bytes(8 * crew.COUNTS))
    tail = (out.data_ptr(), CHUNK, chunks, units, space.data_ptr(), found.scratch)
    words = array("q", (*found.words, *tail, counts.buffer_info()[0]))
    run = partial(code.run, *found.tags, words.buffer_info()[0], factor)
    crew.work(run, counts, units, threads, words, space, found, out)
