"""Writing new rows of K and V and, in the same launch, the records of pages that they fill.

    new_key    [B, Hkv, L, D]   row i of sequence b goes to row lengths[b] + i of K, if it is below
    new_value  [B, Hkv, L, Dv]  min(S, room[b]) and i < counts[b], as `append` has it
    index      parts of records, `vattn.kernels.index`; record p of tokens p * page_tokens and on is
               written once all of these are there, which an earlier launch may have brought

    "bounds"     parts a, b     centre and half range of the keys, rounded outward   (Quest)
    "deviation"  a, b           mean, weight * standard deviation
    "cuboid"     a, b           centre, mean distance from it                        (ArkVale)
    "mean"       a              mean                                                 (ShadowKV)
    "signs"      codes, scales  of every row (page_tokens = 1): `vattn.kernels.signs`
    "nibbles"    codes, scales  of every row (page_tokens = 1): `vattn.kernels.nibbles`

All of keys as they are stored, in float32; see `summaries` for what they mean. A program is one
page of one KV head, or 16 rows of it: it writes what is new and reads what is not, so that no
program waits for another. Counts are read on the device: a captured graph replays with other ones.

Mapped must be rows [lengths, lengths + count) of K and V, the rows before them of the page that
lengths lies in, and the records of pages that become full. Bytes moved: the new rows once each way;
once in page_tokens steps, the page's other keys; its record.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels.append import COUNT_BLOCK
from vattn.kernels.append_rows import cast, count_rows, wide
from vattn.kernels.contract import check_row
from vattn.kernels.gpu import current, device_of
from vattn.kernels.index import Index
from vattn.kernels.kv import DTYPES, KV
from vattn.kernels.nibbles import LEVELS

Form = Literal["bounds", "deviation", "cuboid", "mean", "signs", "nibbles"]
# Parts of a summary; codes are of single rows.
PARTS = {"bounds": 2, "deviation": 2, "cuboid": 2, "mean": 1}
CODES = ("signs", "nibbles")
MOST_PAGE_TOKENS = 128
# Rows of a program where every row is a record.
CODE_ROWS = 16
STEPS = tl.constexpr(LEVELS)
# float32 numbers from 2^23 on are whole: adding it rounds to nearest, ties to even.
WHOLE = tl.constexpr(12582912.0)


def append_indexed(
    new_key: Tensor,
    new_value: Tensor,
    kv: KV,
    index: Index,
    form: Form,
    *,
    page_tokens: int = 1,
    weight: float = 1.0,
    counts: Tensor | None = None,
    room: Tensor | None = None,
    advance: bool = False,
) -> None:
    """Write rows behind those that the sequences hold, and the records of pages that they fill.

    Args:
        new_key, new_value: [B, Hkv, L, D] and [B, Hkv, L, Dv], bfloat16, float16 or float32.
        kv: the view; it must have ``lengths``, and 16 or 32 bits a number.
        index: where records go, for the same sequences; with its own slots.
        form: what a record is made of.
        page_tokens: tokens of a record, at most 128; 1 with "signs" and "nibbles".
        weight: of "deviation".
        counts: int32 or int64 [B], rows of each sequence, at most L; None: L.
        room: int32 or int64 [B], mapped rows of each sequence; None: all S.
        advance: add the rows that were written to ``kv.lengths`` and set ``index.counts``, if it
            has them, to the full pages, in place.

    Raises:
        ValueError: shapes, dtypes, devices or numbers are none of these, or the device is not one
            that kernels run on.
    """
    _check(new_key, new_value, kv, index, counts, room)
    _check_form(form, new_key, index, page_tokens)
    device_of(new_key)  # raises where nothing can be launched
    if not new_key.shape[0] * new_key.shape[1] * new_key.shape[2]:
        return
    counts, room = (None if t is None else t.contiguous() for t in (counts, room))
    with current(new_key):
        _write(new_key, new_value, kv, index, form, page_tokens, weight, counts, room, advance)
        if advance:
            assert kv.lengths is not None
            count_rows[(triton.cdiv(kv.batch, COUNT_BLOCK),)](
                kv.lengths, None, counts, room, None,
                kv.lengths.stride(0), new_key.shape[2], kv.batch, kv.key.shape[2],
                ADVANCE=True, BLOCK=COUNT_BLOCK,
            )  # fmt: skip


# ---- the kernels ----


@triton.jit
def _next(x):
    """The next larger number of a dtype; x is not below 0."""
    bits = x.to(tl.int32, bitcast=True) if x.dtype == tl.float32 else x.to(tl.int16, bitcast=True)
    return (bits + 1).to(x.dtype, bitcast=True)


@triton.jit
def _summary(k, mine, weight, PAGE: tl.constexpr, DTYPE: tl.constexpr, FORM: tl.constexpr):
    """Parts a and b of rows k [ROWS, D] float32, of which ``mine`` [ROWS, 1] count."""
    if FORM == "deviation" or FORM == "mean":
        centre = tl.sum(tl.where(mine, k, 0.0), 0) / PAGE
    else:
        low = tl.min(tl.where(mine, k, float("inf")), 0)
        high = tl.max(tl.where(mine, k, float("-inf")), 0)
        centre = (low + high) / 2
    a = cast(centre, DTYPE)
    apart = tl.where(mine, tl.abs(k - centre[None, :]), 0.0)
    if FORM == "bounds":
        reach = tl.maximum(tl.maximum(high - wide(a), wide(a) - low), 0.0)
        reach = tl.where(reach > 0.0, _next(reach), reach)  # the difference was rounded, too
        b = cast(reach, DTYPE)
        b = tl.where(wide(b) < reach, _next(b), b)
    elif FORM == "cuboid":
        b = cast(tl.sum(apart, 0) / PAGE, DTYPE)
    else:
        b = cast(tl.sqrt(tl.sum(apart * apart, 0) / PAGE) * weight, DTYPE)
    return a, b


@triton.jit
def _signs(k, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codes [ROWS, BLOCK_D / 8] and scales [ROWS] of rows."""
    bits = tl.reshape((inside & (k >= 0.0)).to(tl.int32), [k.shape[0], BLOCK_D // 8, 8])
    codes = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
    scales = tl.sum(tl.where(inside, tl.abs(k), 0.0), 1) / D
    return codes.to(tl.uint8), tl.minimum(scales, 65504.0).to(tl.float16)


@triton.jit
def _nibbles(k, inside, BLOCK_D: tl.constexpr):
    """Codes [ROWS, BLOCK_D / 2], steps and least [ROWS] of rows."""
    least = tl.min(tl.where(inside, k, float("inf")), 1).to(tl.float16)
    high = tl.max(tl.where(inside, k, float("-inf")), 1)
    step = ((high - least.to(tl.float32)) / STEPS).to(tl.float16)
    size = step.to(tl.float32)
    inverse = tl.where(size > 0.0, 1 / tl.where(size > 0.0, size, 1.0), 0.0)
    level = (k - least.to(tl.float32)[:, None]) * inverse[:, None]
    level = (tl.minimum(tl.maximum(level, 0.0), 15.0) + WHOLE) - WHOLE
    pairs = tl.reshape(level.to(tl.int32), [k.shape[0], BLOCK_D // 2, 2])
    codes = tl.sum(pairs << (4 * tl.arange(0, 2))[None, None, :], 2)
    return codes.to(tl.uint8), step, least


@triton.jit(do_not_specialize=["tokens", "capacity", "records", "pages"])
def append_pages(
    new_key, new_value, key, value, first, second,
    lengths, counts, room, slots, record_counts, record_slots,
    new_key_b, new_key_h, new_key_s, new_value_b, new_value_h, new_value_s,
    key_b, key_h, key_s, value_b, value_h, value_s,
    first_b, first_h, first_p, second_b, second_h, second_p, lengths_b,
    tokens, capacity, records, pages, weight,
    HEADS: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FORM: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    CODED: tl.constexpr = FORM == "signs" or FORM == "nibbles"
    # ---- which rows ----
    nth = tl.program_id(0) % pages
    line = tl.program_id(0) // pages
    b = (line // HEADS).to(tl.int64)
    head = (line % HEADS).to(tl.int64)
    length = tl.load(lengths + b * lengths_b).to(tl.int32)
    count = tokens
    if counts is not None:
        count = tl.minimum(count, tl.load(counts + b).to(tl.int32))
    limit = capacity
    if room is not None:
        limit = tl.minimum(limit, tl.load(room + b).to(tl.int32))
    end = tl.maximum(tl.minimum(length + count, limit), length)
    if ADVANCE and record_counts is not None:
        full = tl.minimum(end // (1 if CODED else PAGE), records)
        tl.store(record_counts + b, full, mask=(head == 0) & (nth == 0))
    page = length // PAGE + nth
    if page * PAGE >= end or end == length:
        return
    row = tl.arange(0, ROWS)
    token = page * PAGE + row
    fresh = (token >= length) & (token < end) & (row < PAGE)

    # ---- what is new ----
    slot = b
    if slots is not None:
        slot = tl.load(slots + b).to(tl.int64)
    at = token.to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    keys = key + slot * key_b + head * key_h + at[:, None] * key_s + d
    values = value + slot * value_b + head * value_h + at[:, None] * value_s + dv
    source = (at - length)[:, None]
    p_key = new_key + b * new_key_b + head * new_key_h + source * new_key_s + d
    p_value = new_value + b * new_value_b + head * new_value_h + source * new_value_s + dv
    k_mask = fresh[:, None] & (d < D)
    v_mask = fresh[:, None] & (dv < DV)
    k = cast(tl.load(p_key, mask=k_mask, other=0.0), key.dtype.element_ty)
    v = cast(tl.load(p_value, mask=v_mask, other=0.0), value.dtype.element_ty)
    tl.store(keys, k, mask=k_mask)
    tl.store(values, v, mask=v_mask)

    # ---- the records ----
    place = b
    if record_slots is not None:
        place = tl.load(record_slots + b).to(tl.int64)
    to = first + place * first_b + head * first_h
    beside = to
    if second is not None:
        beside = second + place * second_b + head * second_h
    if CODED:
        written = fresh & (token < records)
        if FORM == "signs":
            codes, scales = _signs(wide(k), d < D, D, BLOCK_D)
        else:
            codes, scales, least = _nibbles(wide(k), d < D, BLOCK_D)
            tl.store(beside + at * second_p + 1, least, mask=written)
        tl.store(beside + at * second_p, scales, mask=written)
        WIDTH: tl.constexpr = (D + 7) // 8 if FORM == "signs" else D // 2
        byte = tl.arange(0, codes.shape[1])[None, :]
        inside = written[:, None] & (byte < WIDTH)
        tl.store(to + at[:, None] * first_p + byte, codes, mask=inside)
    elif (page + 1) * PAGE <= end and page < records:
        older = (token < length)[:, None] & (row < PAGE)[:, None] & (d < D)
        held = wide(tl.load(keys, mask=older, other=0.0))
        whole = tl.where(fresh[:, None], wide(k), held)
        DTYPE: tl.constexpr = first.dtype.element_ty
        a, spread = _summary(whole, (row < PAGE)[:, None], weight, PAGE, DTYPE, FORM)
        e = tl.arange(0, BLOCK_D)
        tl.store(to + page.to(tl.int64) * first_p + e, a, mask=e < D)
        if second is not None:
            tl.store(beside + page.to(tl.int64) * second_p + e, spread, mask=e < D)


# ---- the launcher ----


def _write(
    new_key: Tensor,
    new_value: Tensor,
    kv: KV,
    index: Index,
    form: Form,
    page_tokens: int,
    weight: float,
    counts: Tensor | None,
    room: Tensor | None,
    advance: bool,
) -> None:
    assert kv.lengths is not None
    batch, heads, tokens, dim = new_key.shape
    value_dim = new_value.shape[3]
    first, second = index.parts[0], index.parts[1] if len(index.parts) > 1 else None
    page = CODE_ROWS if form in CODES else page_tokens
    pages = (tokens + page - 2) // page + 1  # that so many rows may lie in
    rows = triton.next_power_of_2(page)
    widths = [max(8, triton.next_power_of_2(n)) for n in (dim, value_dim)]
    numbers = rows * max(widths)
    append_pages[(batch * heads * pages,)](
        new_key, new_value, kv.key, kv.value, first, second,
        kv.lengths, counts, room, _dense(kv.slots), index.counts, _dense(index.slots),
        *new_key.stride()[:3], *new_value.stride()[:3],
        *kv.key.stride()[:3], *kv.value.stride()[:3], *first.stride()[:3],
        *((0, 0, 0) if second is None else second.stride()[:3]), kv.lengths.stride(0),
        tokens, kv.key.shape[2], first.shape[2], pages, float(weight),
        HEADS=heads, PAGE=page, ROWS=rows, D=dim, DV=value_dim,
        BLOCK_D=widths[0], BLOCK_DV=widths[1], FORM=form, ADVANCE=advance,
        num_warps=8 if numbers > 8192 else 4 if numbers > 1024 else 1,
    )  # fmt: skip


def _dense(line: Tensor | None) -> Tensor | None:
    return None if line is None else line.contiguous()


# ---- checks ----


def _check(
    new_key: Tensor,
    new_value: Tensor,
    kv: KV,
    index: Index,
    counts: Tensor | None,
    room: Tensor | None,
) -> None:
    if kv.lengths is None:
        raise ValueError("kv.lengths is None: rows are appended behind lengths, pass them")
    if kv.key.dtype not in DTYPES:
        raise ValueError(f"the cache is {kv.key.dtype}: records are made of 16 or 32 bits a number")
    tokens = new_key.shape[2] if new_key.dim() == 4 else 0
    for name, new, rows in (("new_key", new_key, kv.key), ("new_value", new_value, kv.value)):
        shape = (kv.batch, rows.shape[1], tokens, rows.shape[3])
        if tuple(new.shape) != shape or new.dtype not in DTYPES or new.device != rows.device:
            raise ValueError(
                f"{name} is {new.dtype} {tuple(new.shape)} on {new.device}: must be bfloat16, "
                f"float16 or float32 {shape} on {rows.device}"
            )
        check_row(name, new)
    if index.batch != kv.batch or index.parts[0].shape[1] != kv.key.shape[1]:
        raise ValueError(
            f"the index has {index.batch} sequences and {index.parts[0].shape[1]} KV heads, K and "
            f"V {kv.batch} and {kv.key.shape[1]}: must be the same"
        )
    if index.counts is not None and not index.counts.is_contiguous():
        raise ValueError(f"index.counts has stride {index.counts.stride(0)} and is written: pass 1")
    for name, line in (("counts", counts), ("room", room)):
        if line is None:
            continue
        right = line.dtype in (torch.int32, torch.int64) and line.device == kv.key.device
        if line.shape != (kv.batch,) or not right:
            raise ValueError(
                f"{name} is {line.dtype} {tuple(line.shape)} on {line.device}: must be int32 or "
                f"int64 ({kv.batch},) on {kv.key.device}"
            )


def _check_form(form: Form, new_key: Tensor, index: Index, page_tokens: int) -> None:
    dim = new_key.shape[3]
    found = [(part.shape[3], part.dtype) for part in index.parts]
    if form in CODES:
        width = -(-dim // 8) if form == "signs" else dim // 2
        want = [(width, torch.uint8), (1 if form == "signs" else 2, torch.float16)]
        right = found == want and page_tokens == 1 and (form == "signs" or dim % 2 == 0)
        need = f"page_tokens 1 and {want}"
    else:
        right = form in PARTS and 0 < page_tokens <= MOST_PAGE_TOKENS
        right = right and all(w == dim and t in DTYPES for w, t in found)
        right = right and len(found) == PARTS.get(form) and len({t for _, t in found}) == 1
        need = (
            f"page_tokens 1 to {MOST_PAGE_TOKENS} and {PARTS.get(form)} of width {dim}, bfloat16, "
            "float16 or float32"
        )
    if not right:
        raise ValueError(
            f"form {form!r} with page_tokens {page_tokens} and parts {found} (width, dtype): must "
            f"be one of {', '.join((*PARTS, *CODES))}, with {need}"
        )
