"""Records of a cache's keys, kept beside them: one for each full page of tokens, written once.

    K        0 ....... S ....... 2S ....... 3S ... length
    records  |    0    |    1    |    2     |  growing: no record yet

Each part of a record lies in an arena of its own over the cache's pool, laid out like K: a range
for every slot, mapped as it grows. So records count in the cache's budget, keep their address, and
a fork aliases them. They are made from K itself whenever somebody wants to look (`keep`): rows of a
prompt, of generated tokens and of a graph that wrote by itself are all the same. What is lost (a
fork without memory for it, a truncated sequence) is made again from K.

    counts[slot, layer] * page_tokens <= lengths[slot, layer]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .allocator.arena import Arena
from .allocator.errors import VattnError
from .batch import Batch, Ints
from .cache import ALL, KVCache
from .kernels.index import Index, Part
from .layout import Layout
from .lengths import Lengths
from .reclaimer import enlist
from .tensor import Window

# Tokens whose keys are summarised at once: their float32 copies stay small.
CHUNK_TOKENS = 4096
# K and V [Hkv, n, page_tokens, D] of a layer -> one tensor [Hkv, n, width] for each part.
Summarise = Callable[[int, Tensor, Tensor], tuple[Tensor, ...]]


class Column:
    """One part of the records of every slot: a window over an arena, and how far it reaches."""

    def __init__(self, cache: KVCache, part: Part, records: int) -> None:
        own = cache.layout
        self.layout = Layout(
            own.physical_layers,
            own.kv_heads,
            part.width,
            records,
            dtype=str(part.dtype).removeprefix("torch."),
            # A device's pages are large: one lane for all heads there.
            rows="head_major" if cache.device.type == "cpu" else "token_major",
            page_bytes=own.page,
            sides=1,
        )
        self.arena = Arena(
            cache.pool,
            slots=cache.slots,
            lanes=self.layout.lanes,
            lane_pages=self.layout.lane_pages,
        )
        self.lengths = Lengths(self.layout, self.arena)
        self._window = Window(self.arena, part.dtype, cache.device)
        self._strides = (self.layout.slot_bytes // self.layout.item_bytes, *self.layout.strides)

    def rows(self, physical: int, slot: int = 0, first: int = 0, count: int = 0) -> Tensor:
        """Records ``first .. first + count`` of a slot, [1, Hkv, count, width]; without a count all
        of every slot, mapped or not: [slots, Hkv, records, width]. For use within one call."""
        layout = self.layout
        slots = 1 if count else self.arena.slots
        shape = (slots, layout.kv_heads, count or layout.max_tokens, layout.head_dim)
        offset = slot * layout.slot_bytes + layout.offset(physical, 0) + first * layout.row_bytes
        return self._window.access(offset, shape, self._strides)


class Records:
    """The records of all sequences of a cache.

    Args:
        cache: whose keys.
        parts: what a record consists of, at least one.
        page_tokens: tokens of a record.
        summarise: makes records from K and V.

    Raises:
        LayoutError, ReserveError, MapLimitError: no room for another reservation.
    """

    def __init__(
        self, cache: KVCache, parts: tuple[Part, ...], page_tokens: int, summarise: Summarise
    ) -> None:
        self.cache, self.page_tokens, self._summarise = cache, page_tokens, summarise
        records = max(1, cache.layout.max_tokens // page_tokens)
        self.columns = [Column(cache, part, records) for part in parts]
        self.counts = np.zeros((cache.slots, cache.layout.physical_layers), np.int64)
        self._parts: dict[int, tuple[Tensor, ...]] = {}
        cache.followers.add(self)
        self._leave_pool = enlist(cache.pool, self)

    @property
    def nbytes(self) -> int:
        """Bytes of pages mapped for records."""
        return sum(
            int((column.arena.last - column.arena.first).sum()) * column.layout.page
            for column in self.columns
        )

    def keep(self, batch: Batch, layer: int) -> None:
        """Make the records of all full pages of a layer that have none.

        Raises:
            OutOfPages, MapLimitError, DriverError: no new record counts.
        """
        physical = self.cache.layout.physical(layer)
        full = self.cache.lengths[batch.slots, physical] // self.page_tokens
        held = self.counts[batch.slots, physical]
        if not np.logical_or.reduce(full > held):
            return
        for column in self.columns:
            self._scrub(column, batch, held)
            column.lengths.make_writable(batch, held, full - held)
        step = max(1, CHUNK_TOKENS // self.page_tokens)
        spans = zip(batch.slots.tolist(), held.tolist(), full.tolist(), strict=True)
        for slot, first, end in spans:
            for at in range(first, end, step):
                self._write(layer, physical, slot, at, min(end, at + step))
        for column in self.columns:
            column.lengths.add(batch, physical, full)
        self.counts[batch.slots, physical] = full

    def index(self, batch: Batch, layer: int) -> Index:
        """The records of a layer as kernels see them, for use within one call."""
        physical = self.cache.layout.physical(layer)
        device = self.cache.device
        counts = torch.from_numpy(self.counts[batch.slots, physical]).to(device)
        parts = self._parts.get(physical)
        if parts is None:  # of all slots: they never change
            parts = tuple(column.rows(physical) for column in self.columns)
            self._parts[physical] = parts
        return Index(parts, counts, torch.from_numpy(batch.slots).to(device))

    def check(self) -> None:
        """Assert the law of the head of this file. For tests."""
        if not self.cache.closed:
            assert bool((self.counts * self.page_tokens <= self.cache.lengths).all())
            for column in self.columns:
                column.arena.check()
                assert bool((column.lengths.lengths >= self.counts).all())

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        self.cache.followers.discard(self)
        self._leave_pool()
        for column in self.columns:
            column.arena.close()

    # ---- what the cache tells (`vattn.follower`) -------------------------------------------------
    def shrunk(self, slots: Ints, layers: slice, tokens: int) -> None:
        """See `Follower`."""
        self._cap(slots, layers, tokens // self.page_tokens)

    def forked(self, source: int, target: int, tokens: int, tenant: int) -> None:
        """See `Follower`. Without memory for it the fork's records are made anew."""
        counts = np.minimum(self.counts[source], tokens // self.page_tokens)
        longest = int(counts.max())
        if not longest:
            return
        try:
            for column in self.columns:
                self._empty(column, target)  # what an earlier sequence left is not the fork's
                full, tail = column.layout.split(longest)
                column.arena.alias(source, target, full, tail, tenant=tenant)
                column.lengths.copy(source, target, longest)
        except VattnError:
            self._cap(np.array([target]), slice(None), 0)
            return
        self.counts[target] = counts

    def permuted(self, slots: Ints, source: Ints, tenant: int) -> None:
        """See `Follower`."""
        try:
            for column in self.columns:
                tokens = column.lengths.tokens[slots] * column.layout.row_bytes
                full, tail = np.divmod(tokens, column.layout.page)
                column.arena.permute(slots, source, full, tail, tenant=tenant)
                column.lengths.permute(slots, source)
        except VattnError:
            self._cap(slots, slice(None), 0)
            return
        self.counts[slots] = self.counts[slots][source]

    def advanced(self) -> None:
        """See `Follower`."""
        if self.cache.retain_bytes is not None:
            self.reclaim(ALL)

    def closed(self) -> None:
        """See `Follower`."""
        self.close()

    # ---- inside --------------------------------------------------------------------------------
    def _empty(self, column: Column, slot: int) -> int:
        """Unmap all of a slot; returns how many pages went."""
        gone = column.arena.drop(slot)
        column.lengths.room[slot] = 0
        return gone

    def _scrub(self, column: Column, batch: Batch, held: Ints) -> None:
        """What another tenant's records left in a slot that starts anew goes."""
        if self.cache.pool.tenants > 1:
            for sequence, count in zip(batch.sequences, held.tolist(), strict=True):
                if not count and not column.lengths.tokens[sequence.slot]:
                    column.arena.retenant(sequence.slot, sequence.tenant)

    def _write(self, layer: int, physical: int, slot: int, first: int, end: int) -> None:
        size = self.page_tokens
        span = (first * size, end * size)
        pages = (
            self.cache.tensor([slot], layer, side, span=span)[0].unflatten(1, (end - first, size))
            for side in (0, 1)
        )
        made = self._summarise(layer, *pages)
        for column, rows in zip(self.columns, made, strict=True):
            column.rows(physical, slot, first, end - first)[0].copy_(rows)

    def _cap(self, slots: Ints, layers: slice, count: int) -> None:
        self.counts[slots, layers] = np.minimum(self.counts[slots, layers], count)
        for column in self.columns:
            lengths = column.lengths
            lengths.lengths[slots, layers] = np.minimum(lengths.lengths[slots, layers], count)
            lengths.tokens[slots] = lengths.lengths[slots].max(axis=1)
            lengths.promised[slots] = 0

    def reclaim(self, pages: int) -> None:
        """Unmap pages without a record until ``pages`` of them went, as far as there are any."""
        for column in self.columns:
            needed = column.lengths.needed_pages()
            for slot in np.flatnonzero(column.arena.last.max(axis=1) > needed).tolist():
                if pages <= 0:
                    return
                if needed[slot]:
                    pages -= column.arena.trim(slot, 0, needed.item(slot))
                    column.lengths.measure_one(slot)
                else:
                    pages -= self._empty(column, slot)
