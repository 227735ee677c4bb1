"""The KV cache: sequences that grow, shrink, fork and are given back, in contiguous memory.

The life of one token: `plan` says which pages a step needs (one vectorised look at the frontiers of
all sequences), `extend` maps them all or none, `append` writes the rows of one layer, a view reads
them; `truncate` forgets them but keeps the pages; `close_sequence` parks the slot, still mapped,
and the next `open` adopts it. In steady state no step makes a system call.

    tokens of one sequence   0 ........ start ........ length ........ room ........ max_tokens
                             │ released  │   live      │  mapped ahead  │   reserved    │

    per slot and layer:  0 <= starts <= lengths <= room        per slot: room = pages mapped
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from typing import NoReturn, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from .allocator.arena import Arena
from .allocator.errors import ClosedError, OutOfRange, VattnError
from .allocator.frontiers import GrowPlan
from .allocator.pool import Pool
from .allocator.trace import Trace
from .allocator.warm import Warmer
from .batch import Batch, Ints, batch_of
from .device import Streams, open_pool, place_of
from .follower import Follower
from .layout import Layout, LayoutError
from .lengths import Lengths
from .reclaimer import enlist
from .rows import Rows
from .sequence import Sequence, View
from .slots import Slots
from .usage import Usage, measure


class PrefixError(VattnError, ValueError):
    """A prefix that the donor does not hold, or may not share."""


ALL = 1 << 62  # pages: more than there are


class CopyRefused(VattnError, TypeError):
    """A cache was to be copied or pickled: its rows are memory of this process."""


class KVCache:
    """K and V of up to ``slots`` sequences at a time.

    Args:
        layout: shapes, strides and page size.
        slots: most sequences open at once; address space only.
        device: where the pages lie and the tensors are: "cpu" (the default), "cuda", "cuda:1" or a
            torch.device. Pages of a device are multiples of its granularity, 2 MiB so far.
        budget_bytes: most bytes of pages; 80% of the available memory by default. torch's caching
            allocator lives beside it: what the budget leaves is torch's.
        pool: share another cache's pool (and budget, and device) instead of making one.
        retain_bytes: most bytes of pages without a live token (parked slots, mapped ahead) that
            stay mapped over a step boundary; None keeps all until somebody needs them, which
            costs no system call in steady state, 0 maps exactly what is in use.
        warm_bytes: bytes of free pages that a background thread keeps ready (as huge pages where
            the kernel will), so that growing never waits for the kernel to zero memory; they are
            held, within the budget. ``cache.warmer`` says what it did.
        zero_backed: unmapped rows read as zeros: `static_view` shows all ``max_tokens``.
        trace: record every map and unmap in ``cache.trace``, see `allocator.trace`.
        streams: on a device, asked before pages are unmapped for the streams to wait for, by handle
            (``lambda: [torch.cuda.current_stream().cuda_stream]``). A view may be read on any
            stream and die on any thread, so by default all work of the device is waited for; that
            happens only when memory goes back, never in steady state.

    Not thread-safe: one thread drives a cache; its views may die on any thread. On a device rows
    are written by the current stream; work of other streams on the same rows is the caller's to
    order, as it is for torch's own memory.

    Raises:
        ReserveError: the address space is refused. MapLimitError: no file descriptor is left.
        LayoutError: no such device, or the layout's page does not suit it. NoDeviceError: none can
        be used.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        slots: int = 64,
        device: str | torch.device | None = None,
        budget_bytes: int | None = None,
        pool: Pool | None = None,
        retain_bytes: int | None = None,
        warm_bytes: int = 0,
        zero_backed: bool = False,
        trace: bool = False,
        streams: Streams | None = None,
    ) -> None:
        self.closed = True  # until everything below has worked
        if layout.sides != 2 or layout.dtype == "uint8":
            raise LayoutError(
                f"K and V have two sides of numbers, this layout has {layout.sides} of "
                f"{layout.dtype}: it is for records (vattn.records)"
            )
        self._own_pool = pool is None
        self.trace = Trace() if trace else None
        place = place_of(device, pool)
        if pool is None:
            pool = open_pool(
                layout, place, budget_bytes=budget_bytes, streams=streams, trace=self.trace
            )
        elif pool.page_bytes != layout.page:
            raise LayoutError(
                f"the pool has pages of {pool.page_bytes} bytes, the layout of {layout.page}"
            )
        elif trace or warm_bytes or streams:
            raise LayoutError(
                "trace, streams and warm_bytes need a pool of the cache's own: leave pool out, or "
                "trace and warm where the pool is made"
            )
        self.layout, self.pool, self.slots = layout, pool, slots
        self.retain_bytes = retain_bytes
        try:
            self.arena = Arena(
                pool,
                slots=slots,
                lanes=layout.lanes,
                lane_pages=layout.lane_pages,
                zero_backed=zero_backed,
            )
        except BaseException:
            if self._own_pool:
                pool.close()
            raise
        if self.trace is not None:
            base, slot_bytes = self.arena.address, layout.slot_bytes
            self.trace.owner_of = lambda address: f"slot {(address - base) // slot_bytes}"
        self._rows = Rows(layout, self.arena, place)
        self.device = self._rows.device
        # What is mapped ahead holds no token: with nothing retained it would go at once.
        self._frontiers = Lengths(layout, self.arena, ahead=retain_bytes != 0)
        self.dtype = self._rows.dtype
        # The same arrays, for everybody who looks: see `Lengths`.
        self.lengths, self.starts = self._frontiers.lengths, self._frontiers.starts
        self.tokens, self.room = self._frontiers.tokens, self._frontiers.room
        self.promised = self._frontiers.promised
        self._slots = Slots(self.arena, self._frontiers)
        self.opened = self._slots.generation
        self.versions = np.zeros(slots, np.int64)  # grows when rows that a view saw go away
        self.followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self._leave_pool = enlist(pool, self)
        self.warmer: Warmer | None = None
        self.closed = False
        if warm_bytes:
            self.warmer = Warmer(pool, low_bytes=warm_bytes)
            # A destructor must not wait for a thread that may wait for the turn it interrupts.
            weakref.finalize(self, self.warmer.stop)
            self.warmer.__enter__()

    # ---- opening -------------------------------------------------------------------------------
    def open(
        self,
        *,
        slot: int | None = None,
        tenant: Hashable = None,
        tokens: int = 0,
        empty: bool = False,
    ) -> Sequence:
        """Open a sequence, adopting a parked slot that is still mapped if one fits.

        Args:
            slot: a particular slot.
            tenant: whose bytes these are. What another tenant left in adopted pages is zeroed.
            tokens: length of the prompt; the smallest parked slot that holds it is adopted, or an
                empty one is taken.
            empty: prefer a slot with nothing mapped (its pages will be aliased).

        Raises:
            ClosedError: the cache is closed. OutOfRange: no slot is free, or ``slot`` is not.
        """
        self._check_open()
        if slot is None:
            slot = self._slots.choose(tokens, empty=empty)
        elif not (0 <= slot < self.slots and self._slots.is_free(slot)):
            raise OutOfRange(
                f"slot {slot} is not free: it is open, seen by a live view, or not one of "
                f"{self.slots}; leave slot out to get one that is"
            )
        try:
            self._slots.take(slot, tenant)
        except TypeError as error:
            raise LayoutError(f"a tenant must be hashable, got {tenant!r}") from error
        return Sequence(self, slot, self._slots.tenant.item(slot))

    def open_batch(self, count: int, *, tenant: Hashable = None) -> list[Sequence]:
        """Open ``count`` sequences in consecutive slots: their views are one tensor.

        Raises:
            OutOfRange: no such run of slots is free. Nothing was opened.
        """
        self._check_open()
        if count < 1:
            raise OutOfRange(f"a batch has at least 1 sequence, got {count}")
        opened: list[Sequence] = []
        try:
            for slot in self._slots.choose_run(count):
                opened.append(self.open(slot=slot, tenant=tenant))
        except BaseException:
            for sequence in opened:
                self.close_sequence(sequence)
            raise
        return opened

    @property
    def sequences(self) -> list[Sequence]:
        """A handle for every open sequence, by slot."""
        return [Sequence(self, s, self._slots.tenant.item(s)) for s in self._slots.open_slots()]

    def batch(self, sequences: Seq[Sequence] | Batch) -> Batch:
        """Sequences with their slots looked up and checked.

        Raises:
            ClosedError: one is closed. LayoutError: one is of another cache, or twice in the list.
        """
        if isinstance(sequences, Batch):
            # A slot may have been closed, and opened by another tenant, since the batch was made.
            if sequences.cache is not self or (
                sequences.closings != self._slots.closings
                and np.logical_or.reduce(self.opened[sequences.pick] != sequences.generations)
            ):
                raise ClosedError(
                    "a sequence of this batch was closed, or is another cache's; make a new batch"
                )
            return sequences
        many = list(sequences)
        if not many:
            raise LayoutError("a batch has at least 1 sequence, got none")
        for sequence in many:
            if sequence.cache is not self:
                raise LayoutError(
                    f"{sequence!r} belongs to another cache; append to the cache that opened it"
                )
            sequence.check_open()
        slots = [sequence.slot for sequence in many]
        if len(set(slots)) != len(slots):
            raise LayoutError(f"a sequence appears twice in the batch: slots {slots}")
        return batch_of(self, many, self._slots.closings)

    # ---- growing -------------------------------------------------------------------------------
    def plan(
        self, sequences: Seq[Sequence] | Batch, tokens: int | Ints = 1, *, ahead: bool = True
    ) -> GrowPlan | None:
        """Which pages ``tokens`` more tokens need (an int, or one per sequence); None for none.

        Raises:
            OutOfRange: a sequence would outgrow ``max_tokens``.
        """
        batch = self.batch(sequences)
        tokens = self._frontiers.check_tokens(tokens, len(batch.slots))
        return self._frontiers.plan(batch, tokens, ahead=ahead and self._frontiers.ahead)

    def extend(self, sequences: Seq[Sequence] | Batch, tokens: int | Ints = 1) -> None:
        """Map pages for ``tokens`` more tokens of every sequence, or for none; what other sequences
        share of these rows is copied.

        Raises:
            OutOfPages: the budget does not cover it. OutOfRange: negative, or ``max_tokens``
            exceeded. LayoutError: not one count for each sequence.
            MapLimitError, DriverError: the system refused. In every case no row has changed; where
            a shared page could not be copied, pages without a row may be mapped (``trim``).
        """
        self._check_open()
        batch = self.batch(sequences)
        tokens = self._frontiers.check_tokens(tokens, len(batch.slots))
        if not np.any(tokens):
            return
        self._frontiers.extend(batch, tokens)
        # They may be written through a view (`commit`): not into somebody else's page.
        ends = self.tokens[batch.slots] + tokens
        self._frontiers.unshare(batch, np.minimum.reduce(self.lengths[batch.slots], axis=1), ends)

    def append(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        sequences: Seq[Sequence] | Batch,
        counts: Seq[int] | None = None,
    ) -> None:
        """Write new rows of one layer behind the old ones; maps pages where `extend` did not.

        Args:
            layer: which layer; shared layers write where the layer map says.
            k, v: [batch, kv_heads, n, head_dim], of the cache's dtype; or, with ``counts``,
                [kv_heads, sum(counts), head_dim], sequence after sequence.
            sequences: the batch, in the order of the rows.
            counts: tokens of each sequence, for a ragged batch.

        The rows are copied without their autograd history.

        Raises:
            LayoutError: wrong layer, shape, dtype or device. OutOfPages, OutOfRange,
            MapLimitError, DriverError: as `extend`. The cache is as before.
        """
        self._check_open()
        physical = self.layout.physical(layer)
        batch = self.batch(sequences)
        lengths = self.lengths[batch.slots, physical]
        if counts is None:
            count = k.shape[-2] if k.dim() > 1 else 0
            self.check_rows(k, v, (len(batch.slots), self.layout.kv_heads, count))
            self._frontiers.make_writable(batch, lengths, count)
            self._rows.write(physical, batch, lengths, k, v)
            self._frontiers.add(batch, physical, lengths + count)
            return
        many = self._frontiers.check_tokens(np.asarray(counts), len(batch.slots), "counts")
        if isinstance(many, int):
            raise LayoutError(f"counts must be {len(batch.slots)} ints, got {counts!r}")
        self.check_rows(k, v, (self.layout.kv_heads, int(many.sum())))
        self._frontiers.make_writable(batch, lengths, many)
        at = 0
        for slot, length, count in zip(batch.slots, lengths.tolist(), many.tolist(), strict=True):
            rows = slice(at, at + count)
            self._rows.write_one(physical, int(slot), length, k[:, rows], v[:, rows])
            at += count
        self._frontiers.add(batch, physical, lengths + many)

    # ---- looking -------------------------------------------------------------------------------
    def view(self, sequences: Seq[Sequence]) -> View:
        """What kernels see of these sequences at their present lengths; zero-copy."""
        return View(self, self.batch(sequences).sequences)

    def reserved(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer with all rows of every slot, mapped or not: [slots, kv_heads,
        max_tokens, head_dim] each. Touching a row that is not mapped is a fault: for kernels that
        take lengths and slots (`vattn.kernels.kv`), within one call; nothing is kept mapped.

        Raises:
            ClosedError: the cache is closed. LayoutError: there is no such layer.
        """
        self._check_open()
        physical = self.layout.physical(layer)
        return self._rows.reserved(physical, 0), self._rows.reserved(physical, 1)

    def static_view(self, sequences: Seq[Sequence]) -> View:
        """All ``max_tokens`` rows of consecutive sequences, unmapped ones reading as zeros.

        Raises:
            LayoutError: the cache is not zero-backed, or the slots are not consecutive.
        """
        batch = self.batch(sequences)
        if not (self.arena.zero_backed and batch.consecutive):
            raise LayoutError("static_view needs KVCache(zero_backed=True) and consecutive slots")
        return View(self, batch.sequences, static=True)

    def tensor(
        self,
        slots: list[int],
        layer: int,
        side: int,
        *,
        span: tuple[int, int] | None = None,
        static: bool = False,
    ) -> Tensor:
        """K (0) or V (1) of one layer of consecutive slots, [batch, kv_heads, tokens, head_dim].

        The tokens are ``span``; by default those that are live, equally many in all slots.

        Raises:
            LayoutError: the slots differ in length, or are not consecutive. OutOfRange: ``span`` is
            not mapped in all of them. ClosedError: a slot is not open.
        """
        self._check_open()
        physical = self.layout.physical(layer)
        first, last = slots[0], slots[-1] + 1
        if last - first != len(slots) or not 0 <= first < last <= self.slots:
            raise LayoutError(f"slots {slots} are not consecutive slots of {self.slots}")
        if np.logical_or.reduce(self.opened[first:last] & 1 == 0):
            raise ClosedError(f"not all of the slots {slots} are open")
        starts, lengths = self.starts[first:last, physical], self.lengths[first:last, physical]
        if static:
            return self._rows.tensor(first, last, physical, side, 0, self.layout.max_tokens)
        start, end = span or (starts.item(0), lengths.item(0))
        if span is None and np.logical_or.reduce((lengths != end) | (starts != start)):
            raise LayoutError(f"slots {slots} differ in length; take their tensors one by one")
        if start < np.maximum.reduce(starts) or end > np.minimum.reduce(lengths) or start > end:
            raise OutOfRange(f"tokens {start}..{end} are not held by all of the slots {slots}")
        return self._rows.tensor(first, last, physical, side, start, end)

    # ---- shrinking and sharing -------------------------------------------------------------------
    def truncate(self, sequence: Sequence, tokens: int, layer: int | None = None) -> None:
        """Keep the first ``tokens`` tokens (speculative rollback), in every layer or in one. Pages
        stay mapped. To 0 tokens is always possible: what a window released is mapped again.

        Raises:
            OutOfRange: negative, more than there are, or before what a window released.
            OutOfPages, MapLimitError, DriverError: nothing changed.
        """
        self._truncate(self.batch([sequence]), self._which(layer), np.array([tokens]))

    def truncate_batch(self, sequences: Seq[Sequence] | Batch, tokens: Ints) -> None:
        """`truncate` of several sequences in every layer, each to a length of its own.

        Raises:
            LayoutError: not one length for each sequence. Otherwise as `truncate`; nothing changed.
        """
        batch = self.batch(sequences)
        counts = self._frontiers.check_tokens(tokens, len(batch.slots))
        if isinstance(counts, int):
            counts = np.full(len(batch.slots), counts)
        self._truncate(batch, slice(None), counts)

    def unshare(self, sequences: Seq[Sequence] | Batch) -> None:
        """Copy the pages that these sequences share with others: all rows may then be written.

        Raises:
            OutOfPages, MapLimitError, DriverError: no row has changed.
        """
        batch = self.batch(sequences)
        ends = self.tokens[batch.slots]
        self._frontiers.unshare(batch, np.zeros_like(ends), ends)

    def commit(
        self, sequences: Seq[Sequence] | Batch, tokens: int, layer: int | None = None
    ) -> None:
        """Count ``tokens`` more rows, of every layer or of one, that were written through a view
        after `extend` (by a compiled graph, say).

        Raises:
            OutOfRange: the rows are not mapped: call `extend` first.
        """
        self._frontiers.commit(self.batch(sequences).slots, self._which(layer), tokens)

    def check_rows(self, k: Tensor, v: Tensor, lead: tuple[int, ...]) -> None:
        """Raise LayoutError unless k and v are rows [*lead, head_dim] of this cache's dtype and
        device."""
        self._rows.check(k, v, lead)

    def make_writable(self, sequences: Seq[Sequence] | Batch, first: Ints, ends: Ints) -> None:
        """Map the rows ``first .. ends`` of each sequence and make them its own, in every layer: to
        be written through `reserved`, and counted by `hold`.

        Raises:
            OutOfRange: rows before what a window released. OutOfPages, MapLimitError, DriverError:
            as `extend`. No row has changed.
        """
        self._check_open()
        batch = self.batch(sequences)
        self._frontiers.check_rows(batch, first, ends)
        self._frontiers.make_writable(batch, first, ends - first)

    def hold(self, sequences: Seq[Sequence] | Batch, ends: Ints) -> None:
        """Count ``ends`` rows of each sequence, or those that there are if these are more, in every
        layer: what was written after `make_writable`.

        Raises:
            OutOfRange: rows that are not mapped.
        """
        self._check_open()
        self._frontiers.hold(self.batch(sequences), ends)

    def release_before(self, sequence: Sequence, layer: int, token: int) -> None:
        """Tokens before ``token`` of this layer will not be read again (sliding window). Whole
        pages go back at a later `advance`, never under a live view.

        Raises:
            OutOfRange: ``token`` is beyond the layer's length.
        """
        slot = self._slot(sequence)
        physical = self.layout.physical(layer)
        if token > self.lengths[slot, physical]:
            raise OutOfRange(
                f"layer {layer} holds {self.lengths[slot, physical]} tokens, not {token}"
            )
        if token > self.starts[slot, physical]:
            self.starts[slot, physical] = token
            self.versions[slot] += 1
            self._slots.mark(slot)

    def fork(self, sequence: Sequence, tokens: int | None = None) -> Sequence:
        """A new sequence that begins with the first ``tokens`` tokens (all by default) of another:
        whole pages are the same physical pages, a partly filled tail page is copied.

        Raises:
            PrefixError: longer than the donor, or before what its window released.
            OutOfPages, OutOfRange, MapLimitError, DriverError: nothing changed.
        """
        source = self._slot(sequence)
        tokens = int(self.tokens[source]) if tokens is None else tokens
        start, end = int(np.maximum.reduce(self.starts[source])), self.tokens.item(source)
        if not start <= tokens <= end:
            raise PrefixError(
                f"a prefix of {tokens} tokens is wanted; slot {source} holds {start}..{end}"
            )
        child = self.open(empty=True, tenant=self._slots.names[source])
        try:
            self._alias(sequence, child, tokens)
        except BaseException:
            self._slots.discard(child.slot)
            raise
        for follower in self.followers:
            follower.forked(source, child.slot, tokens, child.tenant)
        return child

    def select(self, sequences: Seq[Sequence], order: Seq[int]) -> list[Sequence]:
        """New consecutive sequences, the i-th a fork of ``sequences[order[i]]``; the old stay open.

        Raises:
            PrefixError: an index is out of range. Otherwise as `fork`; nothing changed.
        """
        many = self._of_one_tenant(sequences).sequences
        if not len(order) or any(not 0 <= i < len(many) for i in order):
            raise PrefixError(f"order {list(order)} has indices outside of 0..{len(many) - 1}")
        children = self.open_batch(len(order), tenant=self._slots.names[many[0].slot])
        try:
            for child, i in zip(children, order, strict=True):
                self._alias(many[i], child, int(self.tokens[many[i].slot]))
        except BaseException:
            for child in children:
                self._slots.discard(child.slot)
            raise
        for follower in self.followers:
            for child, i in zip(children, order, strict=True):
                donor = many[i].slot
                follower.forked(donor, child.slot, int(self.tokens[donor]), child.tenant)
        return children

    def reorder(self, sequences: Seq[Sequence] | Batch, order: Seq[int]) -> None:
        """In place: ``sequences[i]`` gets what ``sequences[order[i]]`` holds (beam search). Pages
        are remapped, only partly filled tails are copied.

        Raises:
            PrefixError: ``order`` is not one index per sequence. PageStateError: windows of these
            sequences have slid apart, and a live view shows pages that would go: drop the view
            first. Otherwise as `fork`.
        """
        batch = self._of_one_tenant(sequences)
        source = np.asarray(order, np.int64)
        if len(source) != len(batch.slots) or source.min() < 0 or source.max() >= len(source):
            raise PrefixError(f"order must be {len(batch.slots)} indices, got {list(order)}")
        if bool((source == np.arange(len(source))).all()):
            return
        slots = batch.slots
        full, tail = np.divmod(self.tokens[slots] * self.layout.row_bytes, self.layout.page)
        self.arena.permute(slots, source, full, tail, tenant=batch.sequences[0].tenant)
        self._frontiers.permute(slots, source)
        self.versions[slots] += 1
        for follower in self.followers:
            follower.permuted(slots, source, batch.sequences[0].tenant)

    # ---- closing -------------------------------------------------------------------------------
    def close_sequence(self, sequence: Sequence) -> None:
        """End a sequence. Its slot stays mapped for the next one to adopt; pages that other
        sequences share are let go.

        Raises:
            ClosedError: it is closed already. DriverError: it is closed, but shared pages could not
            be unmapped; the next `advance` tries again.
        """
        slot = self._slot(sequence)
        self.versions[slot] += 1
        try:
            self._slots.close(slot)
        finally:  # it is closed even if its pages could not be given back yet
            for follower in self.followers:
                follower.shrunk(np.array([slot]), slice(None), 0)

    def advance(self) -> None:
        """Step boundary: pages released a step ago are unmapped, quarantined ones become free."""
        self._check_open()
        self._slots.collect()
        if self.retain_bytes is not None:
            excess = self._slots.retained() - self.retain_bytes // self.layout.page
            if excess > 0:
                self._slots.reclaim(excess)
        for follower in self.followers:
            follower.advanced()
        self.pool.advance()

    def reclaim(self, pages: int) -> int:
        """Unmap up to ``pages`` pages without a live token; returns how many went."""
        return self._slots.reclaim(pages)

    def trim(self) -> int:
        """Give all memory without live tokens back to the system; returns bytes."""
        before = self.pool.created
        for reclaimer in self.pool.reclaimers:
            reclaimer(ALL)
        self.advance()
        self.pool.trim()
        return (before - self.pool.created) * self.layout.page

    def set_budget(self, budget_bytes: int) -> None:
        """Change the budget of the pool now. Pages without a live token go at once, or at the next
        `advance` if their sequence ended in this step; live rows stay, and until enough of them
        are closed or truncated ``pool.over`` counts the pages too many and `extend` raises
        OutOfPages. See `Pool.set_budget`."""
        self._check_open()
        self.pool.set_budget(budget_bytes)

    def stats(self, *, huge: bool = False) -> Usage:
        """Bytes reserved, mapped, used, retained, wasted and pending; pages, maps and calls; with
        ``huge`` also the bytes behind huge pages, which takes milliseconds.

        Raises:
            ClosedError: the cache is closed.
        """
        self._check_open()
        return measure(self, huge=huge)

    def close(self) -> None:
        """Close every sequence and give everything back; what a live view still shows stays mapped
        until that view dies. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._leave_pool()
        if self.warmer is not None and not self.arena.turn.foreign:
            self.warmer.close()
        for follower in list(self.followers):
            follower.closed()
        self.arena.close()
        if self._own_pool:
            self.pool.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise CopyRefused(
            "a KVCache cannot be copied or pickled: its rows are mapped memory of this process. "
            "Fork its sequences (fork, select), or save clones of their views"
        )

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def check(self) -> None:
        """Assert every law of cache, arena and pool. For tests."""
        if self.closed:
            return
        self.arena.check()
        self.pool.check()
        self._frontiers.check(self.opened % 2 == 1)

    # ---- inside --------------------------------------------------------------------------------
    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("this cache is closed; make a new KVCache")
        if self.arena.turn.foreign:
            raise ClosedError(
                "this cache belongs to the process that forked this one; make a KVCache here"
            )

    def _slot(self, sequence: Sequence) -> int:
        """The slot of one open sequence of this cache."""
        if sequence.cache is not self:
            raise LayoutError(f"{sequence!r} belongs to another cache")
        sequence.check_open()
        return sequence.slot

    def _truncate(self, batch: Batch, which: slice, tokens: Ints) -> None:
        self._frontiers.truncate(batch, which, tokens)
        self.versions[batch.slots] += 1
        for follower in self.followers:
            for slot, count in zip(batch.slots, tokens.tolist(), strict=True):
                follower.shrunk(np.array([slot]), which, count)

    def _alias(self, source: Sequence, target: Sequence, tokens: int) -> None:
        full, tail = self.layout.split(tokens)
        if full or tail:
            self.arena.alias(source.slot, target.slot, full, tail, tenant=source.tenant)
        self._frontiers.copy(source.slot, target.slot, tokens)
        # The donor's window may have released more than went back yet.
        if np.logical_or.reduce(self.starts[target.slot]):
            self._slots.mark(target.slot)

    def _of_one_tenant(self, sequences: Seq[Sequence] | Batch) -> Batch:
        batch = self.batch(sequences)
        if not isinstance(batch.tenant, int):
            raise PrefixError("sequences of several tenants share no pages: one tenant a call")
        return batch

    def _which(self, layer: int | None) -> slice:
        """One physical layer, or all."""
        if layer is None:
            return slice(None)
        physical = self.layout.physical(layer)
        return slice(physical, physical + 1)
