"""Rows of K and V as torch tensors: where they are read and written."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .allocator.arena import Arena
from .batch import Batch, Ints
from .device import cannot_launch
from .kernels.kv import KV, MOST_DIM
from .layout import Layout, LayoutError
from .tensor import DTYPES, Window


class Rows:
    """The rows of every slot of an arena, laid out by a layout."""

    def __init__(self, layout: Layout, arena: Arena, device: torch.device) -> None:
        self.layout = layout
        self.dtype = DTYPES[layout.dtype]
        self._window = Window(arena, self.dtype, device)
        self.device, self._slots = self._window.device, arena.slots
        # Looked up at every append of every layer.
        self._offsets = [
            (layout.offset(p, 0), layout.offset(p, 1)) for p in range(layout.physical_layers)
        ]
        self._strides = (layout.slot_bytes // layout.item_bytes, *layout.strides)

    def tensor(
        self, first: int, last: int, physical: int, side: int, start: int, end: int
    ) -> Tensor:
        """K (``side`` 0) or V (1) of tokens ``start .. end`` of slots ``first .. last``:
        [slots, kv_heads, tokens, head_dim]. Keeps the slots mapped while it lives."""
        shape = (last - first, self.layout.kv_heads, end - start, self.layout.head_dim)
        offset = self._offset(first, physical, side, start)
        return self._window.view((first, last), offset, shape, self._strides)

    def reserved(self, physical: int, side: int) -> Tensor:
        """All rows of every slot, mapped or not: [slots, kv_heads, max_tokens, head_dim], for use
        within one call by kernels that know which rows are mapped. Keeps nothing mapped."""
        return self._access(0, self._slots, physical, side, 0, self.layout.max_tokens)

    def write(self, physical: int, batch: Batch, lengths: Ints, k: Tensor, v: Tensor) -> None:
        """Copy ``k``, ``v`` [batch, kv_heads, n, head_dim], detached, behind ``lengths`` rows of
        each sequence; on a device, by its current stream. Every page is mapped by now, so nothing
        can fail. A ragged batch is two copies a sequence; where Triton runs on a GPU, one launch.
        """
        count, first = k.shape[2], lengths.item(0)
        if not count:
            return
        k, v = k.detach(), v.detach()  # a cache is no part of anybody's graph
        if batch.consecutive and not np.logical_or.reduce(lengths != first):
            slot, slots = batch.slots.item(0), len(batch.slots)
            self._access(slot, slots, physical, 0, first, count).copy_(k)
            self._access(slot, slots, physical, 1, first, count).copy_(v)
            return
        if self.device.type == "cuda" and self.layout.head_dim <= MOST_DIM and not cannot_launch(k):
            self._launch(physical, batch.slots, lengths, k, v)
            return
        for i, (slot, at) in enumerate(zip(batch.slots.tolist(), lengths.tolist(), strict=True)):
            self.write_one(physical, slot, at, k[i], v[i])

    def write_one(self, physical: int, slot: int, at: int, k: Tensor, v: Tensor) -> None:
        """`write` for one sequence: ``k``, ``v`` [kv_heads, n, head_dim] behind ``at`` rows."""
        self._access(slot, 1, physical, 0, at, k.shape[1])[0].copy_(k.detach())
        self._access(slot, 1, physical, 1, at, v.shape[1])[0].copy_(v.detach())

    def _launch(self, physical: int, slots: Ints, lengths: Ints, k: Tensor, v: Tensor) -> None:
        """`write` by one launch of `vattn.kernels.append`, for which the host does not wait."""
        from .kernels.append import append

        held = torch.from_numpy(np.stack([lengths, slots]))
        if self.device.type == "cuda":
            held = held.pin_memory()
        behind, of = held.to(self.device, non_blocking=True)
        # The kernel reads the elements of a row side by side, and as they lie in memory.
        k, v = (
            t if t.stride(3) == 1 else t.contiguous() for t in (k.resolve_neg(), v.resolve_neg())
        )
        kv = KV(self.reserved(physical, 0), self.reserved(physical, 1), behind, slots=of)
        append(k, v, kv)

    def check(self, k: Tensor, v: Tensor, lead: tuple[int, ...]) -> None:
        """Raise `LayoutError` unless ``k`` and ``v`` are rows [*lead, head_dim] of this cache."""
        shape = (*lead, self.layout.head_dim)
        for name, rows in (("k", k), ("v", v)):
            if rows.shape != shape:
                raise LayoutError(f"{name} must have shape {shape}, got {tuple(rows.shape)}")
            if rows.dtype is not self.dtype:
                raise LayoutError(f"{name} must be {self.dtype}, got {rows.dtype}; cast it first")
            if rows.device != self.device:
                raise LayoutError(f"{name} must be on {self.device}, got {rows.device}; move it")

    def _access(
        self, slot: int, slots: int, physical: int, side: int, start: int, count: int
    ) -> Tensor:
        shape = (slots, self.layout.kv_heads, count, self.layout.head_dim)
        return self._window.access(self._offset(slot, physical, side, start), shape, self._strides)

    def _offset(self, slot: int, physical: int, side: int, start: int) -> int:
        inside = self._offsets[physical][side] + start * self.layout.row_bytes
        return slot * self.layout.slot_bytes + inside
