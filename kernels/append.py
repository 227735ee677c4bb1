"""Writing new rows of K and V behind the rows that each sequence of a batch holds.

    new_key    [B, Hkv, L, D]   row i of sequence b, of which ``counts[b]`` are real (None: all L)
               [T, Hkv, D]      packed: row i of sequence b is token ``starts[b] + i``, and it has
                                ``starts[b + 1] - starts[b]``; tokens outside of all are left out
    new_value  the same with Dv

    row i of b goes to row lengths[b] + i of sequence b of the KV view, if that is below
    limit[b] = min(S, room[b]); rows at or behind the limit are not written.

    stored = new                                    in K and V of the new rows' own dtype
    stored = cast(new)                              in K and V of another of bfloat16, float16 and
                                                    float32: the nearest number, ties to even,
                                                    infinity for what is larger
    stored = saturate(new / scale)                  in K and V of 8 bits: the nearest number, ties
                                                    to even, the largest finite one for what is
                                                    larger; NaN stays NaN

float8_e4m3fn and float8_e5m2: Micikevicius et al., https://arxiv.org/abs/2209.05433. They are made
by bit arithmetic, so that every device stores the same bits (sm_80 converts to neither).

Bytes moved: the new rows once each way. One launch writes K and V; another one, of one program,
counts (``advance``, ``dropped``). All counts are read on the device: a captured graph replays with
other ones. Mapped must be rows lengths[b] .. min(lengths[b] + count, limit[b]) and no others; pass
``room``, the mapped rows, where this is not known. Two entries of the batch that name one slot
would write the same rows: the result is either's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vattn.kernels.append_rows import append_rows, count_rows
from vattn.kernels.contract import check_row
from vattn.kernels.gpu import Device, cannot_launch, current, device_of
from vattn.kernels.kv import DTYPES, FP8, KV, scale_stride

# Elements of a tile: 128 threads with two loads of 16 bytes each (32 threads where rows are few).
TILE, SMALL_TILE = 2048, 512
COUNT_BLOCK = 1024


class Format(NamedTuple):
    """A float of 8 bits: mantissa bits, exponent bias, and the bits of its largest number."""

    mantissa: int
    bias: int
    top: int


FORMATS = {torch.float8_e4m3fn: Format(3, 7, 0x7E), torch.float8_e5m2: Format(2, 15, 0x7B)}


def reference(
    new_key: Tensor,
    new_value: Tensor,
    kv: KV,
    *,
    starts: Tensor | None = None,
    counts: Tensor | None = None,
    room: Tensor | None = None,
) -> list[int]:
    """The definition, row by row; returns how many rows each sequence was given."""
    assert kv.lengths is not None
    written = []
    for b in range(kv.batch):
        slot = b if kv.slots is None else int(kv.slots[b])
        first, length = 0 if starts is None else int(starts[b]), int(kv.lengths[b])
        count = new_key.shape[-2] if counts is None else int(counts[b])
        count = count if starts is None else int(starts[b + 1]) - first
        limit = kv.key.shape[2] if room is None else min(kv.key.shape[2], int(room[b]))
        written.append(max(0, min(count, limit - length)))
        for new, rows, scale in (
            (new_key, kv.key, kv.key_scale),
            (new_value, kv.value, kv.value_scale),
        ):
            for i in range(written[-1]):
                row = new[b, :, i] if starts is None else new[first + i]
                rows[slot, :, length + i] = stored(row, rows.dtype, scale)
    return written


def stored(row: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """What rows [..., Hkv, D] become in a cache of ``dtype``."""
    if row.dtype == dtype or dtype not in FP8:
        return row.to(dtype)
    row = row.float() if scale is None else row.float() / scale[:, None]
    top = torch.finfo(dtype).max
    return row.clamp(-top, top).to(dtype)


# ---- launcher ----------------------------------------------------------------------------------
class Tile(NamedTuple):
    """Rows of a program, and its warps."""

    rows: int
    warps: int


def tile(device: Device, rows: int, dim: int) -> Tile:
    """The tile for ``rows`` new rows of at most ``dim`` elements: 2,048 elements, or 512 where
    these would leave processors idle."""
    wide = triton.next_power_of_2(dim)
    large = max(1, TILE // wide)
    if rows >= large * device.processors:
        return Tile(large, 4)
    return Tile(max(1, SMALL_TILE // wide), 1)


def append(
    new_key: Tensor,
    new_value: Tensor,
    kv: KV,
    *,
    starts: Tensor | None = None,
    counts: Tensor | None = None,
    room: Tensor | None = None,
    advance: bool = False,
    dropped: Tensor | None = None,
) -> None:
    """Write rows behind those that the sequences hold.

    Args:
        new_key, new_value: [B, Hkv, L, D] and [B, Hkv, L, Dv], or packed [T, Hkv, D] and
            [T, Hkv, Dv] with ``starts``; of the KV view's dtype, or bfloat16, float16 or float32,
            which are cast; scales of a view of 8 bits divide them.
        kv: the view; it must have ``lengths``.
        starts: int32 or int64 [B + 1], where each sequence's tokens begin, ascending.
        counts: int32 or int64 [B], rows of each sequence, at most L; None: L.
        room: int32 or int64 [B], mapped rows of each sequence; None: all S.
        advance: add the rows that were written to ``kv.lengths``, in place.
        dropped: int64 [B], to which the rows that were not written, because they would lie beyond
            S or ``room``, are added: zero it, append as often as you like, look at it once. Rows
            that are dropped raise nothing, since the host does not know their number.

    CPU tensors take torch's operations where Triton does not interpret.

    Raises:
        ValueError: shapes, dtypes, devices or strides are none of these, the view has no lengths,
            or the device is not one that kernels run on.
    """
    _check(new_key, new_value, kv, starts, counts, room, dropped)
    if new_key.is_cpu and cannot_launch(new_key) is not None:
        _on_cpu(new_key, new_value, kv, starts, counts, room, advance, dropped)
        return
    starts, counts, room = (None if t is None else t.contiguous() for t in (starts, counts, room))
    with current(new_key):
        _write(new_key, new_value, kv, starts, counts, room)
        if kv.batch and (advance or dropped is not None):
            assert kv.lengths is not None
            count_rows[(triton.cdiv(kv.batch, COUNT_BLOCK),)](
                kv.lengths, starts, counts, room, dropped,
                kv.lengths.stride(0), new_key.shape[-2], kv.batch, kv.key.shape[2],
                ADVANCE=advance, BLOCK=COUNT_BLOCK,
            )  # fmt: skip


def _write(
    new_key: Tensor,
    new_value: Tensor,
    kv: KV,
    starts: Tensor | None,
    counts: Tensor | None,
    room: Tensor | None,
) -> None:
    assert kv.lengths is not None
    heads, dim, value_dim = new_key.shape[1], new_key.shape[-1], new_value.shape[-1]
    tokens = new_key.shape[-2]
    rows = heads * (new_key.shape[0] if starts is not None else kv.batch * tokens)
    if not rows:
        return
    shape = tile(device_of(new_key), rows, max(dim, value_dim))
    encodes = kv.key.dtype in FP8 and new_key.dtype != kv.key.dtype
    form = FORMATS[kv.key.dtype] if encodes else Format(0, 0, 0)
    append_rows[(triton.cdiv(rows, shape.rows),)](
        _bits(new_key), _bits(new_value), _bits(kv.key), _bits(kv.value),
        kv.lengths, starts, counts, room, None if kv.slots is None else kv.slots.contiguous(),
        kv.key_scale, kv.value_scale,
        *_strides(new_key), *_strides(new_value), *_strides(kv.key), *_strides(kv.value),
        kv.lengths.stride(0), scale_stride(kv.key_scale), scale_stride(kv.value_scale),
        rows, tokens, kv.batch, kv.batch.bit_length(), kv.key.shape[2],
        HEADS=heads, D=dim, DV=value_dim,
        BLOCK_D=triton.next_power_of_2(dim), BLOCK_DV=triton.next_power_of_2(value_dim),
        ROWS=shape.rows, MANTISSA=form.mantissa, BIAS=form.bias, TOP=form.top,
        num_warps=shape.warps,
    )  # fmt: skip


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of sequence, head and token. Those of dimensions of one are 0: such a number may be
    anything, and Triton would take it for the rows' alignment."""
    if tensor.dim() == 3:
        token, head = tensor.stride()[:2]
        return 0, head if tensor.shape[1] > 1 else 0, token if tensor.shape[0] > 1 else 0
    sizes = tensor.shape[:3]
    batch, head, token = (
        n if size > 1 else 0 for n, size in zip(tensor.stride()[:3], sizes, strict=True)
    )
    return batch, head, token


def _bits(rows: Tensor) -> Tensor:
    """Numbers of 8 bits as bytes: not every device has loads and stores for them."""
    return rows.view(torch.uint8) if rows.dtype in FP8 else rows


# ---- checks ------------------------------------------------------------------------------------
def _check(
    new_key: Tensor,
    new_value: Tensor,
    kv: KV,
    starts: Tensor | None,
    counts: Tensor | None,
    room: Tensor | None,
    dropped: Tensor | None,
) -> None:
    if kv.lengths is None:
        raise ValueError("kv.lengths is None: rows are appended behind lengths, pass them")
    if starts is not None and counts is not None:
        raise ValueError(
            "starts and counts: packed rows are counted by starts alone, leave one out"
        )
    if kv.key.dtype not in FP8 and not (kv.key_scale is None is kv.value_scale):
        raise ValueError(f"scales go with a cache of 8 bits, this one is {kv.key.dtype}")
    if new_value.dtype != new_key.dtype:
        raise ValueError(f"new_value is {new_value.dtype} and new_key {new_key.dtype}")
    tokens = new_key.shape[-2] if new_key.dim() > 1 else 0
    lead: tuple[int, ...] = (kv.batch, kv.key.shape[1], tokens)
    if starts is not None:
        lead = (new_key.shape[0], kv.key.shape[1])
    _check_rows("new_key", new_key, kv.key, lead)
    _check_rows("new_value", new_value, kv.value, lead)
    _check_line("starts", starts, kv, kv.batch + 1)
    _check_line("counts", counts, kv, kv.batch)
    _check_line("room", room, kv, kv.batch)
    _check_line("dropped", dropped, kv, kv.batch)
    if dropped is not None and (dropped.dtype != torch.int64 or not dropped.is_contiguous()):
        raise ValueError(
            f"dropped is {dropped.dtype} with stride {dropped.stride(0)} and is written: must be "
            "int64 with 1"
        )


def _check_rows(name: str, new: Tensor, rows: Tensor, lead: tuple[int, ...]) -> None:
    if tuple(new.shape) != (*lead, rows.shape[3]):
        form = "[B, KV heads, tokens, D]" if len(lead) == 3 else "[tokens, KV heads, D]"
        raise ValueError(f"{name} is {tuple(new.shape)}: must be {form}, {(*lead, rows.shape[3])}")
    if new.dtype not in (rows.dtype, *DTYPES):
        raise ValueError(
            f"{name} is {new.dtype} and the cache {rows.dtype}: must be the same, or bfloat16, "
            "float16 or float32, which are cast"
        )
    check_row(name, new)
    _check_device(name, new, rows)


def _check_line(name: str, line: Tensor | None, kv: KV, size: int) -> None:
    if line is None:
        return
    if line.shape != (size,) or line.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} is {line.dtype} {tuple(line.shape)}: must be int32 or int64 ({size},)"
        )
    _check_device(name, line, kv.key)


def _check_device(name: str, tensor: Tensor, rows: Tensor) -> None:
    if tensor.device != rows.device:
        raise ValueError(f"{name} is on {tensor.device} and the cache on {rows.device}")


# ---- on a CPU ----------------------------------------------------------------------------------
def _on_cpu(
    new_key: Tensor,
    new_value: Tensor,
    kv: KV,
    starts: Tensor | None,
    counts: Tensor | None,
    room: Tensor | None,
    advance: bool,
    dropped: Tensor | None,
) -> None:
    assert kv.lengths is not None
    lengths, capacity, batch = kv.lengths.long(), kv.key.shape[2], kv.batch
    tokens = new_key.shape[-2]
    if starts is not None:
        count = starts.long().diff()
    elif counts is not None:
        count = counts.long().clamp(0, tokens)
    else:
        count = torch.full((batch,), tokens)
    limit = torch.full_like(lengths, capacity) if room is None else room.long().clamp(max=capacity)
    written = torch.minimum(count, limit - lengths).clamp_min(0)
    b = torch.arange(batch).repeat_interleave(written)
    i = torch.arange(len(b)) - (written.cumsum(0) - written)[b]
    slot = b if kv.slots is None else kv.slots.long()[b]
    for new, rows, scale in (
        (new_key, kv.key, kv.key_scale),
        (new_value, kv.value, kv.value_scale),
    ):
        some = new[b, :, i] if starts is None else new[starts.long()[b] + i]
        _bits(rows)[slot, :, lengths[b] + i] = _bits(stored(some, rows.dtype, scale))
    if dropped is not None:
        dropped.add_(count - written)
    if advance:
        kv.lengths.add_(written)
