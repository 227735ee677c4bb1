"""How far every sequence reaches, and mapping what it needs to reach further.

0 <= starts <= lengths <= tokens <= room <= max_tokens

starts    [slots, layers]  first token that may still be read (a window slides it)
lengths   [slots, layers]  tokens appended
tokens    [slots]          the longest layer
room      [slots]          tokens that fit into what is mapped in every lane
"""

from __future__ import annotations

import numpy as np

from .allocator.arena import Arena
from .allocator.errors import OutOfPages, OutOfRange
from .allocator.frontiers import GrowPlan
from .batch import Batch, Ints
from .layout import Layout, LayoutError
from .sequence import Sequence

# Pages are mapped ahead of a growing sequence by this share of its length: 8 times fewer map calls
# at 32k tokens, for at most 0.8% of memory.
AHEAD = 128


class Lengths:
    """The frontiers of all slots of an arena."""

    def __init__(self, layout: Layout, arena: Arena, *, ahead: bool = True) -> None:
        self.layout, self.arena, self.ahead = layout, arena, ahead
        slots, layers = arena.slots, layout.physical_layers
        self.lengths = np.zeros((slots, layers), np.int64)
        self.starts = np.zeros((slots, layers), np.int64)
        self.tokens = np.zeros(slots, np.int64)
        self.room = np.zeros(slots, np.int64)
        self.promised = np.zeros(slots, np.int64)
        self._page_tokens = int(layout.tokens_per_page)
        self._group_of_lane = np.repeat(np.arange(layout.groups), layout.lanes_per_group)

    # ---- growing -----------------------------------------------------------------------------
    def plan(self, batch: Batch, tokens: int | Ints, *, ahead: bool) -> GrowPlan | None:
        """See `KVCache.plan`."""
        # This runs at every step of every sequence: few calls, and ufunc.reduce instead of methods.
        if ahead and type(tokens) is int and tokens == 1 <= self._page_tokens:  # a decode step
            full = (self.tokens[batch.pick] >= self.room[batch.pick]).nonzero()[0]
            if not len(full):
                return None
            plan = self.arena.plan_next(batch.slots[full], AHEAD)
            if plan is not None:
                return plan
        want = self.tokens[batch.pick] + tokens
        short = (want > self.room[batch.pick]).nonzero()[0]
        if not len(short):
            return None
        slots = batch.slots[short]
        want = want[short]
        longest, limit = int(np.maximum.reduce(want)), self.layout.max_tokens
        if longest > limit:
            raise OutOfRange(
                f"{longest} tokens wanted in a sequence reserved for {limit}; make the cache with "
                f"max_tokens >= {longest}"
            )
        if ahead and longest >= AHEAD:
            want = np.minimum(want + want // AHEAD, limit)
        last_byte = want * self.layout.row_bytes - 1
        return self.arena.plan_grow(slots, last_byte // self.layout.page + 1)

    def extend(self, batch: Batch, tokens: int | Ints) -> None:
        """See `KVCache.extend`."""
        plan = self.plan(batch, tokens, ahead=self.ahead)
        if plan is None:
            return
        before = self.promised[batch.pick].copy()
        self.promised[batch.pick] = self.tokens[batch.pick] + tokens
        try:
            try:
                self.arena.grow(plan, tenant=batch.tenant)
            except OutOfPages:  # then without mapping ahead
                plan = self.plan(batch, tokens, ahead=False)
                assert plan is not None
                self.arena.grow(plan, tenant=batch.tenant)
        except BaseException:
            self.promised[batch.pick] = before
            raise
        self.measure(plan.slots)

    def make_writable(self, batch: Batch, lengths: Ints, counts: int | Ints) -> None:
        """Make the rows ``lengths .. lengths + counts`` mapped and private.

        Raises:
            OutOfPages, OutOfRange, MapLimitError, DriverError: no row has changed.
        """
        ends = lengths + counts
        if np.logical_or.reduce(ends > self.room[batch.pick]):
            self.extend(batch, np.maximum(ends - self.tokens[batch.slots], 0))
        self.unshare(batch, lengths, ends)

    def unshare(self, batch: Batch, lengths: Ints, ends: Ints) -> None:
        """Make the rows ``lengths .. ends``, which are mapped, private.

        Raises:
            OutOfPages, MapLimitError, DriverError: no row has changed.
        """
        reach = self.arena.shared_to[batch.pick]
        if not np.logical_or.reduce(reach):
            return
        first = lengths * self.layout.row_bytes // self.layout.page
        shared = first < reach
        if not np.logical_or.reduce(shared):
            return
        # Copies may need pages that a reclaimer finds: not those of the rows to be written.
        self.promised[batch.pick] = np.maximum(self.promised[batch.pick], ends)
        for i in shared.nonzero()[0].tolist():
            last = self.layout.pages(int(ends[i]))
            sequence = batch.sequences[i]
            self.arena.unshare(sequence.slot, int(first[i]), last, tenant=sequence.tenant)

    def measure(self, slots: Ints) -> None:
        """Read off the arena how much room the slots have."""
        room = self.arena.last[slots].min(axis=1) * self.layout.page // self.layout.row_bytes
        self.room[slots] = np.minimum(room, self.layout.max_tokens)

    def measure_one(self, slot: int) -> None:
        """`measure` for one slot."""
        lanes = self.arena.last[slot]
        pages = lanes.item(0) if len(lanes) == 1 else int(lanes.min())
        self.room[slot] = self.layout.room(pages)

    def check_tokens(self, tokens: int | Ints, sequences: int, name: str = "tokens") -> int | Ints:
        """Token counts as an int, or an array of one for each sequence, none negative.

        Raises:
            LayoutError: not whole numbers, or not one for each. OutOfRange: negative, or beyond
            ``max_tokens``.
        """
        if type(tokens) is int and tokens == 1:  # a decode step
            return tokens
        counts = np.asarray(tokens)
        if counts.dtype.kind not in "iu" or counts.shape not in ((), (sequences,)):
            raise LayoutError(
                f"{name} must be an int or {sequences} ints, one a sequence, got {tokens!r}"
            )
        low, high = int(counts.min()), int(counts.max())
        if low < 0 or high > self.layout.max_tokens:
            raise OutOfRange(
                f"{name} must lie in 0..{self.layout.max_tokens} (max_tokens of this cache), got "
                f"{low if low < 0 else high}"
            )
        return int(counts) if counts.ndim == 0 else counts.astype(np.int64)

    # ---- counting ----------------------------------------------------------------------------
    def add(self, batch: Batch, physical: int, ends: Ints) -> None:
        """A layer of the batch now holds ``ends`` tokens."""
        self.lengths[batch.pick, physical] = ends
        self.tokens[batch.pick] = np.maximum(self.tokens[batch.pick], ends)

    def commit(self, slots: Ints, which: slice, tokens: int) -> None:
        """See `KVCache.commit`."""
        self.check_tokens(tokens, 1)
        lengths = self.lengths[slots, which] + tokens
        if bool((lengths.max(axis=1) > self.room[slots]).any()):
            raise OutOfRange(f"{tokens} more rows are not mapped in every sequence; extend() first")
        self.lengths[slots, which] = lengths
        self.tokens[slots] = self.lengths[slots].max(axis=1)

    def check_rows(self, batch: Batch, first: Ints, ends: Ints) -> None:
        """Raise OutOfRange unless rows ``first .. ends`` begin behind what a window released."""
        starts = np.maximum.reduce(self.starts[batch.pick], axis=1)
        if np.logical_or.reduce((first < starts) | (first > ends)):
            raise OutOfRange(
                f"rows {first.tolist()} to {ends.tolist()} cannot be written: must ascend, and "
                f"begin behind {starts.tolist()}"
            )

    def hold(self, batch: Batch, ends: Ints) -> None:
        """See `KVCache.hold`."""
        if np.logical_or.reduce(ends > self.room[batch.pick]):
            raise OutOfRange(
                f"cannot hold {ends.tolist()} rows: {self.room[batch.pick].tolist()} are mapped; "
                "make_writable() first"
            )
        most = np.maximum(ends, self.tokens[batch.pick])
        self.lengths[batch.pick] = most[:, None]
        self.tokens[batch.pick] = most

    def truncate(self, batch: Batch, which: slice, tokens: Ints) -> None:
        """See `KVCache.truncate` and `truncate_batch`."""
        pick = batch.pick
        lengths, starts = self.lengths[pick, which], self.starts[pick, which]
        first, top = np.maximum.reduce(starts, axis=1), np.maximum.reduce(lengths, axis=1)
        slid = tokens < first
        if np.logical_or.reduce(slid | (tokens > top)):
            self._refill_all(batch, which, tokens, slid, first, top)
        self.lengths[pick, which] = np.minimum(lengths, tokens[:, None])
        self.tokens[pick] = np.maximum.reduce(self.lengths[pick], axis=1)
        self.promised[pick] = 0

    def _refill_all(
        self, batch: Batch, which: slice, tokens: Ints, slid: Ints, first: Ints, top: Ints
    ) -> None:
        """Map what a window released of the sequences that ``slid``: only for no tokens at all."""
        wrong = ((slid & (tokens != 0)) | (tokens > top)).nonzero()[0]
        if len(wrong):
            i = int(wrong[0])
            raise OutOfRange(
                f"cannot truncate to {tokens[i]} tokens: slot {batch.slots[i]} holds "
                f"{first[i]}..{top[i]}"
            )
        for i in slid.nonzero()[0].tolist():
            self._refill(batch.sequences[i], which)
        self.starts[batch.slots[slid], which] = 0

    def copy(self, source: int, target: int, tokens: int) -> None:
        """``target`` holds the first ``tokens`` tokens of ``source`` now."""
        self.lengths[target] = np.minimum(self.lengths[source], tokens)
        self.starts[target] = self.starts[source]
        self.tokens[target] = tokens
        self.promised[target] = 0
        self.measure_one(target)

    def permute(self, slots: Ints, source: Ints) -> None:
        """``slots[i]`` holds what ``slots[source[i]]`` held."""
        for array in (self.lengths, self.starts, self.tokens):
            array[slots] = array[slots][source]
        self.promised[slots] = 0
        self.measure(slots)

    def clear(self, slot: int) -> None:
        """The slot holds no token; what is mapped stays."""
        self.lengths[slot] = self.starts[slot] = self.tokens[slot] = self.promised[slot] = 0

    def needed_pages(self) -> Ints:
        """Pages of a lane that each slot holds tokens in, or was promised."""
        tokens = np.maximum(self.tokens, self.promised)
        return -(-tokens * self.layout.row_bytes // self.layout.page)

    def first_pages(self, slot: int) -> Ints:
        """First page of each lane that still holds a readable token."""
        layout = self.layout
        grouped = np.full(layout.groups * layout.group_layers, np.iinfo(np.int64).max)
        grouped[: layout.physical_layers] = self.starts[slot]
        first = grouped.reshape(layout.groups, -1).min(axis=1) * layout.row_bytes // layout.page
        return first[self._group_of_lane]

    def check(self, live: np.ndarray) -> None:
        """Assert the law of the head of this file."""
        assert bool((self.starts >= 0).all() and (self.starts <= self.lengths).all())
        assert bool((self.lengths.max(axis=1) == self.tokens).all())
        assert bool((self.tokens[live] <= self.room[live]).all())
        assert bool((self.room <= self.layout.max_tokens).all())

    def _refill(self, sequence: Sequence, which: slice) -> None:
        """Map what a window released, so that the layers ``which`` can start anew."""
        slot, layout = sequence.slot, self.layout
        groups = np.arange(layout.physical_layers)[which] // layout.group_layers
        lanes = np.isin(self._group_of_lane, groups) & (self.arena.first[slot] > 0)
        if lanes.any():
            self.arena.refill(slot, np.flatnonzero(lanes), tenant=sequence.tenant)
