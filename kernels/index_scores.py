"""Scores of an index's records on a device: what `summaries`, `signs` and `nibbles` define.

    query   [B, Hq, L, D]         bfloat16, float16 or float32, 1 in the last stride
    index   parts of records, counts and slots, `vattn.kernels.index`
    scores  [B, Hkv, R, records]  float32, R = Hq / Hkv * L rows that share a KV head; -inf where a
                                  sequence has no record

A program holds a block of records of one KV head and takes all R rows past it: a record is read
once. Codes become numbers (+-1, 0 .. 15) of the query's dtype in registers, exactly; products are
summed in float32 by matrix instructions, and scaled behind them. A bfloat16 and a float16 meet as
tf32, which holds both exactly; with a float32 on one side both are float32.

Grid and workspace depend on shapes alone, counts and slots are read on the device: a captured CUDA
graph serves any. Mapped must be records [0, counts) of each sequence. Bytes moved: these once, the
query once a block, 4 * R a record out. Sources: see the three modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels import nibbles as nibble_codes
from vattn.kernels import signs as sign_codes
from vattn.kernels import summaries as page_summaries
from vattn.kernels.contract import check_row
from vattn.kernels.gpu import current, device_of, padded, precision
from vattn.kernels.index import Index
from vattn.kernels.kv import DTYPES, HALF
from vattn.kernels.online import dot

Kind = Literal["summaries", "signs", "nibbles"]
# Numbers of a block of records: with 4 warps, 64 registers a thread for each of two parts.
BLOCK_BYTES = 16 << 10
MOST_RECORDS = 128
MOST_ROWS = 64


def summaries(query: Tensor, index: Index, records: int, *, scale: float | None = None) -> Tensor:
    """See `vattn.kernels.summaries.scores`."""
    return _scores("summaries", query, index, records, scale)


def signs(query: Tensor, index: Index, records: int, *, scale: float | None = None) -> Tensor:
    """See `vattn.kernels.signs.scores`."""
    return _scores("signs", query, index, records, scale)


def nibbles(query: Tensor, index: Index, records: int, *, scale: float | None = None) -> Tensor:
    """See `vattn.kernels.nibbles.scores`."""
    return _scores("nibbles", query, index, records, scale)


# ---- the kernel ----


@triton.jit
def _vectors(at, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``WIDTH`` elements from addresses ``at`` [N] on; 0 where nothing is ``there``."""
    d = tl.arange(0, BLOCK)
    return tl.load(at[:, None] + d[None, :], mask=there[:, None] & (d < WIDTH)[None, :], other=0)


@triton.jit
def _keys(at, there, D: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, DTYPE):
    """What records stand for but for their scales, [N, D] of DTYPE."""
    if KIND == "signs":
        codes = _vectors(at, there, (D + 7) // 8, BLOCK_D // 8)
        bits = (codes[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
        x = tl.reshape(bits, [at.shape[0], BLOCK_D]).to(tl.float32) * 2 - 1
    elif KIND == "nibbles":
        codes = _vectors(at, there, D // 2, BLOCK_D // 2)
        x = tl.interleave(codes & 15, codes >> 4).to(tl.float32)
    else:
        x = _vectors(at, there, D, BLOCK_D)
    return x.to(DTYPE)


@triton.jit
def score_block(
    index, block, query, first, second, counts, slots, out,
    query_b, query_h, query_r, first_n, first_h, second_n, second_h,
    rows, records, reserved, scale,
    HEADS: tl.constexpr, FIRST_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    KIND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the scores of a block of records of KV head ``index`` of the batch."""
    DTYPE: tl.constexpr = tl.float32 if WIDE else query.dtype.element_ty
    # ---- the records ----
    b = (index // HEADS).to(tl.int64)
    head = (index % HEADS).to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(records, reserved)
    if counts is not None:
        held = tl.minimum(held, tl.load(counts + b).to(tl.int32))
    slot = b
    if slots is not None:
        slot = tl.load(slots + b).to(tl.int64)
    there = n < held
    record = n.to(tl.int64)
    x = _keys(
        first + slot * first_n + head * first_h + record * FIRST_ROW, there, D, BLOCK_D, KIND, DTYPE
    )
    spread = x
    factor = tl.full([BLOCK_N], 1.0, tl.float32)
    least = tl.full([BLOCK_N], 0.0, tl.float32)
    if second is not None:
        at = second + slot * second_n + head * second_h + record * SECOND_ROW
        if KIND == "summaries":
            spread = _keys(at, there, D, BLOCK_D, KIND, DTYPE)
        else:
            factor = tl.load(at, mask=there, other=0.0).to(tl.float32)
        if KIND == "nibbles":
            least = tl.load(at + 1, mask=there, other=0.0).to(tl.float32)

    # ---- the rows ----
    d = tl.arange(0, BLOCK_D)
    for before in range(0, rows, BLOCK_M):
        row = before + tl.arange(0, BLOCK_M)
        real = row < rows
        at_query = query + b * query_b + head * query_h + row[:, None] * query_r + d[None, :]
        q = tl.load(at_query, mask=real[:, None] & (d < D)[None, :], other=0.0).to(DTYPE)
        s = dot(q, tl.trans(x), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        if KIND == "summaries":
            if second is not None:
                s = dot(tl.abs(q), tl.trans(spread), s, PRECISION)
        else:
            s *= factor[None, :]
        if KIND == "nibbles":
            s += tl.sum(q.to(tl.float32), 1)[:, None] * least[None, :]
        s = tl.where(there[None, :], s * scale, float("-inf"))
        line = out + (index.to(tl.int64) * rows + row)[:, None] * records + n[None, :]
        tl.store(line, s, mask=real[:, None] & (n < records)[None, :])


@triton.jit(do_not_specialize=["rows", "records", "reserved"])
def score_records(
    query, first, second, counts, slots, out,
    query_b, query_h, query_r, first_n, first_h, second_n, second_h,
    rows, records, reserved, scale,
    HEADS: tl.constexpr, FIRST_ROW: tl.constexpr, SECOND_ROW: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    KIND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = (records + BLOCK_N - 1) // BLOCK_N
    score_block(
        tl.program_id(0) // blocks, tl.program_id(0) % blocks, query, first, second, counts, slots,
        out, query_b, query_h, query_r, first_n, first_h, second_n, second_h,
        rows, records, reserved, scale, HEADS, FIRST_ROW, SECOND_ROW, D,
        BLOCK_M, BLOCK_N, BLOCK_D, KIND, WIDE, PRECISION,
    )  # fmt: skip


# ---- the launcher ----


def records_of(kind: Kind, dim: int, wide: bool) -> int:
    """Records of a block, for a ``dim`` and numbers of two bytes or, ``wide``, of four."""
    size = padded(dim) * (4 if wide else 2)
    fit = BLOCK_BYTES // size if kind == "summaries" else 2 * BLOCK_BYTES // size
    return max(16, min(MOST_RECORDS, fit))


@dataclass(frozen=True)
class Scoring:
    """What a kernel is launched with to score: the tensors before the scores and the numbers behind
    them, in `score_block`'s order, its constants, and the scores' shape."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[int | float, ...]
    constants: Mapping[str, object]
    shape: tuple[int, int, int, int]
    block: int

    @property
    def programs(self) -> int:
        """One for each block of records of a KV head."""
        return self.shape[0] * self.shape[1] * -(-self.shape[3] // self.block)


def scoring(kind: Kind, query: Tensor, index: Index, records: int, scale: float | None) -> Scoring:
    """The launch for these. Raises ValueError where they do not suit."""
    {"summaries": page_summaries, "signs": sign_codes, "nibbles": nibble_codes}[kind].check(
        query, index
    )
    rows = index.rows(query)
    _check(rows, index, records)
    batch, kv_heads, count, dim = rows.shape
    parts = index.parts
    dtypes = {query.dtype, *(part.dtype for part in parts if kind == "summaries")}
    wide = len(dtypes) > 1 or torch.float32 in dtypes
    rounds = "tf32" if dtypes == set(HALF) else precision(query)
    block = records_of(kind, dim, wide)
    second = parts[1] if len(parts) > 1 else None
    lines = (None if line is None else line.contiguous() for line in (index.counts, index.slots))
    strides = (0, 0, 0) if second is None else second.stride()[:3]
    constants = {
        "HEADS": kv_heads,
        "FIRST_ROW": parts[0].stride(2),
        "SECOND_ROW": strides[2],
        "D": dim,
        "BLOCK_M": min(MOST_ROWS, padded(count)),
        "BLOCK_N": block,
        "BLOCK_D": padded(dim),
        "KIND": kind,
        "WIDE": wide,
        "PRECISION": rounds,
    }
    numbers = (
        *rows.stride()[:3], *parts[0].stride()[:2], *strides[:2],
        count, records, parts[0].shape[2], dim**-0.5 if scale is None else float(scale),
    )  # fmt: skip
    device_of(query)  # raises where nothing can be launched
    shape = (batch, kv_heads, count, records)
    return Scoring((rows, parts[0], second, *lines), numbers, constants, shape, block)


def _scores(kind: Kind, query: Tensor, index: Index, records: int, scale: float | None) -> Tensor:
    launch = scoring(kind, query, index, records, scale)
    out = query.new_empty(launch.shape, dtype=torch.float32)
    if out.numel():
        with current(query):
            score_records[(launch.programs,)](
                *launch.tensors, out, *launch.numbers, **launch.constants, num_warps=4
            )
    return out


def _check(rows: Tensor, index: Index, records: int) -> None:
    if rows.dtype not in DTYPES or rows.device != index.parts[0].device:
        raise ValueError(
            f"query is {rows.dtype} on {rows.device}: must be bfloat16, float16 or float32 on "
            f"{index.parts[0].device}"
        )
    if records < 0:
        raise ValueError(f"records is {records}: must be 0 or more")
    check_row("query", rows)
