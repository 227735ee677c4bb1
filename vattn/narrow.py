"""Rows whose K has given up channels: ranges of another width, beside those of a `HeadCache`.

    K  │ D' │ D' │ D' │ ...      of each row the channels that its head has kept
    V  │   D   │   D   │ ...     whole

A token is either here or in the HeadCache; which of them are here does not change until the layer
is cleared, and neither do a head's channels. Pages are the HeadCache's: of its pool, in its budget,
mapped as rows come. Each range has a *slot* in two arenas, by a table:

    take ──► pages are mapped, rows written behind those that count ──► count
      └─ what fails on the way, here or in the HeadCache ──► untake ──► as before

A reordered batch hands slots on; where a sequence is taken twice, the second slot aliases the whole
pages of the first. A row that counts is never written again, so nothing shared ever is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .allocator.arena import Arena
from .allocator.errors import OutOfRange, VattnError
from .batch import Ints
from .cache import ALL, KVCache
from .kernels import stream
from .kernels.kv import KV
from .layout import Layout
from .reclaimer import enlist
from .tensor import Window
from .track import Track
from .usage import Usage


class Side:
    """K or V of all narrow rows: a lane for each slot."""

    def __init__(self, cache: KVCache, width: int, slots: int) -> None:
        own = cache.layout
        self.layout = Layout(
            1, 1, width, own.max_tokens, dtype=own.dtype, page_bytes=own.page, sides=1
        )
        self.arena = Arena(cache.pool, slots=slots, lanes=1, lane_pages=self.layout.lane_pages)
        strides = (self.layout.slot_bytes // self.layout.item_bytes, *self.layout.strides)
        # All rows of every slot, mapped or not. Written by later steps, so an ordinary tensor.
        with torch.inference_mode(False):
            window = Window(self.arena, cache.dtype, cache.device)
            self.rows = window.access(0, (slots, 1, own.max_tokens, width), strides)

    def pages(self, tokens: Ints) -> Ints:
        """Pages that hold so many rows each."""
        return -(-tokens * self.layout.row_bytes // self.layout.page)

    def places(self, slots: Ints) -> Ints:
        """Addresses of the first rows of slots."""
        return self.rows.data_ptr() + slots * self.layout.slot_bytes

    def trim(self, slots: Ints, pages: Ints, *, quiesced: bool = False) -> int:
        """Keep so many pages of each slot at most; returns how many went."""
        gone = 0
        for i in np.flatnonzero(self.arena.last[slots, 0] > pages).tolist():
            gone += self.arena.trim(slots.item(i), 0, pages.item(i), quiesced=quiesced)
        return gone

    def live(self, lengths: Ints) -> tuple[Ints, Ints]:
        """Id of every mapped page and the bytes of rows in it, mapping by mapping."""
        size, ids, live = self.layout.page, [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for slot in np.flatnonzero(self.arena.last[:, 0]).tolist():
            pages = self.arena.mapped(slot)
            filled = lengths.item(slot) * self.layout.row_bytes - np.arange(len(pages)) * size
            ids.append(self.arena.ids(pages))
            live.append(np.clip(filled, 0, size))
        return np.concatenate(ids), np.concatenate(live)


class NarrowRows:
    """The narrow rows of a HeadCache.

    Args:
        cache: of the HeadCache.
        shape: its layers, sequences and KV heads.
        width: channels of K that a row keeps.

    Raises:
        LayoutError, ReserveError, MapLimitError: no room for two more reservations.
    """

    def __init__(self, cache: KVCache, shape: tuple[int, int, int], width: int) -> None:
        self.cache, self.shape, self.width = cache, shape, width
        ranges = int(np.prod(shape))
        many = 2 * ranges  # address space: as many again for a reordered batch
        self.key = Side(cache, width, many)
        try:
            self.value = Side(cache, cache.layout.head_dim, many)
        except BaseException:
            self.key.arena.close()
            raise
        self.slots: Ints = np.arange(ranges, dtype=np.int64).reshape(shape)
        self.lengths = np.zeros(many, np.int64)  # rows that count, by slot
        self._promised = np.zeros(many, np.int64)  # rows to come: their pages stay
        self._before: list[Ints] = []  # pages of the slots that were last mapped, on each side
        self._channels: list[Tensor | None] = [None] * shape[0]
        self._positions = [self._track() for _ in range(shape[0])]
        self._tenant = cache.pool.tenant(None)
        self._leave_pool = enlist(cache.pool, self)

    # ---- what there is -------------------------------------------------------------------------
    def counts(self, layer: int) -> Ints:
        """Narrow rows of each range of a layer, [batch, kv_heads]."""
        found: Ints = self.lengths[self.slots[layer]]
        return found

    def channels(self, layer: int) -> Tensor | None:
        """The channels that each head has kept, [batch, kv_heads, D'] int64 ascending; None where
        the layer has no narrow row."""
        return self._channels[layer]

    def positions(self, layer: int) -> Tensor:
        """Where the token of each row stood in its text, [batch, kv_heads, n] int64."""
        return self._positions[layer].get(int(self.counts(layer).max()))

    def kv(self, layer: int) -> KV:
        """The ranges of a layer as kernels see them, K of D' channels. For use within one call."""
        slots = self.slots[layer].ravel()
        device = self.cache.device
        lengths, of = (torch.from_numpy(x).to(device) for x in (self.lengths[slots], slots.copy()))
        return KV(self.key.rows, self.value.rows, lengths, slots=of)

    def rows(self, layer: int) -> stream.Rows:
        """The same as the stream kernel takes it."""
        slots, key, value = self.slots[layer].ravel(), self.key, self.value
        return stream.Rows(
            key.places(slots),
            value.places(slots),
            self.lengths[slots],
            1,
            0,
            key.layout.row_bytes,
            keep=self,
            value_dim=value.rows.shape[3],
            value_bytes=value.layout.row_bytes,
        )

    def places(self, layer: int, positions: Tensor, counts: Ints) -> Tensor:
        """Positions of all rows that are held, the narrow ones first, [batch, kv_heads, n];
        ``positions`` and ``counts`` are of the others."""
        few, old = self.counts(layer), self.positions(layer)
        found = positions.new_zeros(*few.shape, int((few + counts).max()))
        for (b, h), many in np.ndenumerate(few):
            found[b, h, :many] = old[b, h, :many]
            found[b, h, many : many + counts[b, h]] = positions[b, h, : counts[b, h]]
        return found

    def holds_from(self, layer: int, first: Tensor) -> bool:
        """Is a token at ``first`` [batch] of its text, or behind it, narrow?"""
        positions = self.positions(layer)
        at = torch.arange(positions.shape[2], device=positions.device)
        counts = torch.from_numpy(self.counts(layer)).to(positions.device)
        return bool(((positions >= first[:, None, None]) & (at < counts[..., None])).any())

    def added_to(self, usage: Usage) -> Usage:
        """A cache's figures and these rows'."""
        size, sides = self.cache.layout.page, (self.key, self.value)
        mapped = used = held = mappings = 0
        for side in sides:
            ids, live = side.live(self.lengths)
            order = np.lexsort((live, ids))
            ids, live = ids[order], live[order]
            last = np.flatnonzero(np.diff(ids, append=-1) != 0)  # each page once
            mapped, mappings = mapped + len(last), mappings + len(ids)
            used, held = used + int(live[last].sum()), held + int(np.count_nonzero(live[last]))
        return replace(
            usage,
            reserved_bytes=usage.reserved_bytes + sum(s.arena.pages for s in sides) * size,
            mapped_bytes=usage.mapped_bytes + mapped * size,
            used_bytes=usage.used_bytes + used,
            wasted_bytes=usage.wasted_bytes + held * size - used,
            retained_bytes=usage.retained_bytes + (mapped - held) * size,
            shared_bytes=usage.shared_bytes + (mappings - mapped) * size,
            pages=usage.pages + mapped,
            maps=usage.maps + sum(side.arena.maps for side in sides),
            tokens=usage.tokens + int(self.lengths.sum()),
        )

    # ---- growing -------------------------------------------------------------------------------
    def take(
        self, layer: int, kv: KV, rows: Tensor, counts: Tensor, positions: Tensor, channels: Tensor
    ) -> None:
        """Copy the rows [batch, kv_heads, m] of ``kv``, the first ``counts`` of them, behind those
        that count; ``positions`` [batch, kv_heads, n] are those of kv's rows. ``channels`` are for
        a layer that has none yet. Nothing counts before `count`.

        Raises:
            OutOfRange, OutOfPages, MapLimitError, DriverError: nothing has changed.
        """
        slots, many = self.slots[layer].ravel(), counts.cpu().numpy().ravel()
        starts = self.lengths[slots]
        self._map(slots, starts + many)
        kept = self._channels[layer]
        kept = (channels if kept is None else kept).flatten(0, 1)
        marks = self._positions[layer].get(int((starts + many).max()))
        assert kv.slots is not None
        wide, flat = kv.slots.tolist(), rows.flatten(0, 1)
        for i, (slot, start, count) in enumerate(
            zip(slots.tolist(), starts.tolist(), many.tolist(), strict=True)
        ):
            some, end = flat[i, :count], start + count
            self.key.rows[slot, 0, start:end] = kv.key[wide[i], 0, some][:, kept[i]]
            self.value.rows[slot, 0, start:end] = kv.value[wide[i], 0, some]
            b, h = divmod(i, self.shape[2])
            marks[b, h, start:end] = positions[b, h, some]

    def count(self, layer: int, channels: Tensor | None) -> None:
        """What was taken counts from now on."""
        slots = self.slots[layer].ravel()
        self.lengths[slots] = self._promised[slots]
        self._promised[slots] = 0
        if self._channels[layer] is None:
            self._channels[layer] = channels

    def untake(self, layer: int) -> None:
        """What was taken is as if it had never been."""
        self._unmap(self.slots[layer].ravel())

    def copy_of(self, other: NarrowRows, order: list[int]) -> None:
        """Hold what the sequences ``order`` of another hold; this one is empty.

        Raises:
            OutOfPages, MapLimitError, DriverError: close this one.
        """
        for layer in range(self.shape[0]):
            sources, slots = other.slots[layer, order].ravel(), self.slots[layer].ravel()
            self._map(slots, other.lengths[sources])
            for source, slot in zip(sources.tolist(), slots.tolist(), strict=True):
                rows = slice(0, other.lengths.item(source))
                for mine, others in ((self.key, other.key), (self.value, other.value)):
                    mine.rows[slot, 0, rows] = others.rows[source, 0, rows]
            self.count(layer, other.channels_of(layer, order))
            self._mark(layer, other, order)

    # ---- another order -------------------------------------------------------------------------
    def share(self, order: list[int]) -> Ints:
        """A table of slots in which sequence i holds what ``order[i]`` holds, for `adopt`.

        Raises:
            OutOfPages, MapLimitError, DriverError: nothing has changed.
        """
        table: Ints = self.slots[:, order]
        spare = np.setdiff1d(np.arange(len(self.lengths)), self.slots)
        again = [i for i, source in enumerate(order) if source in order[:i]]
        table[:, again] = spare[: table[:, again].size].reshape(table[:, again].shape)
        try:
            for source, slot in self._copies(table, order, again):
                self.lengths[slot] = self.lengths[source]  # now: so that its pages stay
                for side in (self.key, self.value):
                    full, tail = side.layout.split(self.lengths.item(source))
                    side.arena.alias(source, slot, full, tail, tenant=self._tenant)
        except BaseException:
            self.unshare(table)
            raise
        return table

    def unshare(self, table: Ints) -> None:
        """Forget a table that was not adopted."""
        spare = np.setdiff1d(table, self.slots)
        self.lengths[spare] = 0
        self._give_unread(spare, [np.zeros_like(spare)] * 2)

    def adopt(self, table: Ints, order: list[int]) -> None:
        """The table of `share` holds from now on."""
        self.lengths[np.setdiff1d(self.slots, table)] = 0
        self.slots = table
        for layer in range(self.shape[0]):
            self._channels[layer] = self.channels_of(layer, order)
            self._mark(layer, self, order)
        with suppress(VattnError):  # what the system refuses now goes at another `reclaim`
            self.reclaim(ALL)

    def channels_of(self, layer: int, order: list[int]) -> Tensor | None:
        """A layer's channels in another order of the sequences."""
        kept = self._channels[layer]
        return None if kept is None else kept[order]

    # ---- shrinking -----------------------------------------------------------------------------
    def clear(self, layer: int) -> None:
        """Forget a layer's rows and channels."""
        self.lengths[self.slots[layer]] = 0
        self._channels[layer], self._positions[layer] = None, self._track()

    def reclaim(self, pages: int) -> int:
        """Give pages without a row back, at least ``pages`` as far as there are any; returns how
        many went."""
        gone, needed = 0, np.maximum(self.lengths, self._promised)
        for side in (self.key, self.value):
            if gone < pages:
                gone += side.trim(np.arange(len(needed)), side.pages(needed))
        return gone

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._leave_pool()
        try:
            self.key.arena.close()
        finally:
            self.value.arena.close()

    def check(self) -> None:
        """Assert every law. For tests."""
        assert not self._promised.any()
        others = np.setdiff1d(np.arange(len(self.lengths)), self.slots)
        assert not self.lengths[others].any()
        for side in (self.key, self.value):
            side.arena.check()
            assert bool((side.arena.last[:, 0] >= side.pages(self.lengths)).all())
            shared = side.arena.shared_to * side.layout.page <= self.lengths * side.layout.row_bytes
            assert bool((shared | (self.lengths == 0)).all())

    # ---- inside --------------------------------------------------------------------------------
    def _map(self, slots: Ints, ends: Ints) -> None:
        """Map pages so that each slot has room for its rows, in both arenas or in none."""
        most = self.cache.layout.max_tokens
        if int(ends.max()) > most:
            raise OutOfRange(
                f"{ends.max()} narrow rows wanted in a range reserved for {most}; make the "
                f"HeadCache with max_tokens >= {ends.max()}"
            )
        sides = (self.key, self.value)
        for side in sides:  # what a layer shared before it was cleared is not to be written
            for slot in slots[(self.lengths[slots] == 0) & (side.arena.shared_to[slots] > 0)]:
                side.arena.drop(int(slot))
        self._before = [side.arena.last[slots, 0].copy() for side in sides]
        self._promised[slots] = ends
        try:
            for side in sides:
                plan = side.arena.plan_grow(slots, side.pages(ends))
                if plan is not None:
                    side.arena.grow(plan, tenant=self._tenant)
        except BaseException:
            self._unmap(slots)
            raise

    def _unmap(self, slots: Ints) -> None:
        """Undo `_map`."""
        self._promised[slots] = 0
        self._give_unread(slots, self._before)

    def _give_unread(self, slots: Ints, pages: list[Ints]) -> None:
        """Give pages back that nobody has read, at once."""
        with suppress(VattnError):  # an error is on its way already
            for side, many in zip((self.key, self.value), pages, strict=True):
                side.trim(slots, many, quiesced=True)
            self.cache.pool.drain()

    def _copies(self, table: Ints, order: list[int], again: list[int]) -> Iterator[tuple[int, int]]:
        """(source, slot) of each range with rows that is taken once more."""
        for i in again:
            pairs = zip(self.slots[:, order[i]].flat, table[:, i].flat, strict=True)
            for source, slot in pairs:
                if self.lengths[source]:
                    yield int(source), int(slot)

    def _mark(self, layer: int, other: NarrowRows, order: list[int]) -> None:
        """Take over the positions of a layer."""
        rows = other._positions[layer].get(int(self.counts(layer).max()))[order]
        self._positions[layer] = self._track()
        self._positions[layer].get(rows.shape[2]).copy_(rows)

    def _track(self) -> Track:
        return Track(self.shape[1], self.shape[2], torch.int64, self.cache.device)


def check_masks(keep: Tensor, old: Tensor, channels: Tensor, counts: Tensor, dim: int) -> None:
    """Raise ValueError unless the masks name rows that there are, and the channels ascend."""
    shape = (*counts.shape, int(counts.max()))
    at = torch.arange(shape[2], device=counts.device)
    if keep.shape != shape or old.shape != shape or bool((keep & (at >= counts[..., None])).any()):
        raise ValueError(
            f"rows to keep and to narrow are masks of {shape} within {counts.tolist()}, got "
            f"{tuple(keep.shape)} and {tuple(old.shape)}"
        )
    if bool((old & ~keep).any()):
        raise ValueError("rows to narrow must be among those to keep")
    wrong = channels.dim() != 3 or channels.shape[:2] != counts.shape or not channels.shape[2]
    if wrong or channels.dtype != torch.int64:
        raise ValueError(
            f"channels are {channels.dtype} {tuple(channels.shape)}: must be int64 "
            f"{(*counts.shape, 'at least 1')}"
        )
    ascend = bool((channels[..., 1:] > channels[..., :-1]).all())
    if not ascend or int(channels.min()) < 0 or int(channels.max()) >= dim:
        raise ValueError(f"channels must ascend, without repetition, within 0..{dim - 1}")
