"""Which pages of a cache hold which tokens, and which of them are full."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from .allocator.errors import OutOfRange
from .allocator.frontiers import join, spans
from .allocator.table import distinct
from .batch import Ints
from .cache import KVCache
from .layout import LayoutError
from .sequence import Sequence

# A range, token numbers for all heads, or token numbers for each KV head.
Tokens = tuple[int, int] | NDArray | Seq[NDArray]


class Places:
    """Page numbers of a cache's arena, ascending and each once, of mapped pages only."""

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.arena, self.layout = cache, cache.arena, cache.layout

    def slot(self, sequence: Sequence) -> int:
        """The slot of an open sequence of this cache.

        Raises:
            LayoutError: it is another cache's. ClosedError: it is closed.
        """
        if sequence.cache is not self.cache:
            raise LayoutError(f"{sequence!r} belongs to another cache")
        sequence.check_open()
        return sequence.slot

    def lanes(self, layer: int) -> Ints:
        """Lanes in which a layer's rows lie. Raises LayoutError: there is no such layer."""
        layout = self.layout
        first = layout.physical(layer) // layout.group_layers * layout.lanes_per_group
        return np.arange(first, first + layout.lanes_per_group)

    # ---- full pages --------------------------------------------------------------------------
    def full_to(self, slot: int) -> Ints:
        """How many pages of each lane have all their rows written."""
        layout = self.layout
        lengths = np.full(layout.groups * layout.group_layers, np.iinfo(np.int64).max)
        lengths[: layout.physical_layers] = self.cache.lengths[slot]
        rows = lengths.reshape(layout.groups, -1).min(axis=1)
        return np.repeat(rows * layout.row_bytes // layout.page, layout.lanes_per_group)

    def full(self, slot: int) -> Ints:
        """The pages of a slot whose rows are all written."""
        first, last = self.arena.first[slot], self.arena.last[slot]
        return self.arena.span(slot, first, np.minimum(self.full_to(slot), last))

    def all_full(self) -> Ints:
        """`full` of every open sequence."""
        return join(self.full(slot) for slot in np.flatnonzero(self.cache.opened & 1).tolist())

    # ---- tokens ------------------------------------------------------------------------------
    def of(
        self, sequence: Sequence, layer: int | None, tokens: Tokens | None, *, whole: bool = False
    ) -> Ints:
        """Pages that hold any of the tokens (all: None) of a layer (of all: None); with ``whole``
        those of a range that hold nothing else.

        Raises:
            LayoutError, ClosedError: as `slot` and `lanes`, or not one array for each KV head.
            OutOfRange: beyond ``max_tokens``.
        """
        slot = self.slot(sequence)
        lanes = np.arange(self.layout.lanes) if layer is None else self.lanes(layer)
        if tokens is None or isinstance(tokens, tuple):
            first, last = self._range(tokens, whole)
            low = np.maximum(self.arena.first[slot, lanes], first)
            return self.arena.span(slot, low, np.minimum(self.arena.last[slot, lanes], last), lanes)
        index = self._index(self._by_lane(tokens), len(lanes))
        found = index + (slot * self.arena.slot_pages + int(lanes[0]) * self.arena.lane_pages)
        return found[self.arena.entry[found] > 0]

    def _by_lane(self, tokens: NDArray | Seq[NDArray]) -> list[Ints]:
        """Token numbers of each lane, for as many lanes as differ: of one, or one a KV head."""
        if isinstance(tokens, np.ndarray) and tokens.ndim == 1:
            return [tokens]
        if len(tokens) != self.layout.kv_heads:
            raise LayoutError(
                f"tokens of {len(tokens)} heads; the cache has {self.layout.kv_heads}"
            )
        return [np.concatenate(list(tokens))] if self.layout.rows == "token_major" else list(tokens)

    def _index(self, tokens: list[Ints], lanes: int) -> Ints:
        """Pages, counted from the first of ``lanes`` lanes, that hold tokens; what is given for
        fewer lanes holds for the next ones as well."""
        layout, lane_pages = self.layout, self.arena.lane_pages
        flat = np.concatenate(tokens).astype(np.int64)
        if len(flat) and not 0 <= flat.min() <= flat.max() < layout.max_tokens:
            raise OutOfRange(f"tokens must lie in 0..{layout.max_tokens - 1} (max_tokens)")
        first = flat * layout.row_bytes // layout.page
        lane = np.repeat(np.arange(len(tokens)) * lane_pages, [len(some) for some in tokens])
        if layout.page % layout.row_bytes == 0:  # no row lies in two pages
            index = first + lane
            index = distinct(index[np.diff(index, prepend=-1) != 0])
        else:
            counts = ((flat + 1) * layout.row_bytes - 1) // layout.page - first + 1
            index = np.unique(spans(first + lane, counts))
        return join(index + k * lane_pages for k in range(0, lanes, len(tokens)))

    def _range(self, tokens: tuple[int, int] | None, whole: bool) -> tuple[int, int]:
        """Pages of a lane that hold a range of tokens, or that it holds wholly."""
        layout = self.layout
        if tokens is None:
            return 0, layout.lane_pages
        start, end = tokens
        if not 0 <= start <= end <= layout.max_tokens:
            raise OutOfRange(f"tokens {start}..{end} lie outside of 0..{layout.max_tokens}")
        first, last = start * layout.row_bytes, end * layout.row_bytes
        if whole:
            return -(-first // layout.page), last // layout.page
        return first // layout.page, -(-last // layout.page)
