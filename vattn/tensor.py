"""An address becomes a torch tensor, without a copy. The only file that knows raw pointers.

A tensor made here holds a *lease*: the pages of its slots stay mapped until its storage dies, which
torch reports by dropping the buffer object that the storage was made from. So a view that outlives
its sequence, or its cache, still reads what it read before.

A view's storage spans everything between its first and its last element, pages included that were
never mapped. Reading elements is always safe; copying the *storage* is not: use ``view.clone()``
before ``torch.save``, ``copy.deepcopy`` or sending a view to another process.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .allocator.arena import Arena
from .layout import ITEM_BYTES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}


class Window:
    """Tensors over the memory of one arena, all of one dtype."""

    def __init__(self, arena: Arena, dtype: torch.dtype) -> None:
        self.arena, self.dtype = arena, dtype
        self.item_bytes = dtype.itemsize
        self._buffer = ctypes.c_char * (arena.pages * arena.page_bytes)
        # For our own short accesses: no lease, so nothing may keep it. An ordinary tensor even if
        # the cache is made under inference_mode, so that later turns may write outside of it.
        with torch.inference_mode(False):
            self._whole = torch.frombuffer(self._buffer.from_address(arena.address), dtype=dtype)

    def access(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """A tensor at byte ``offset`` for use within one call; it keeps nothing mapped."""
        return self._whole.as_strided(shape, strides, offset // self.item_bytes)

    def view(
        self, slots: tuple[int, int], offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Tensor:
        """A tensor at byte ``offset`` that keeps slots ``first .. last`` mapped while it lives.

        ``strides`` are in elements. Every element must be mapped.
        """
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype)
        count = 1 + sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)])
        buffer = self._buffer.from_address(self.arena.address)
        buffer.lease = self.arena.lease(*slots)  # type: ignore[attr-defined]
        flat = torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=offset)
        return flat.as_strided(shape, strides)
