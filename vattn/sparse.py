"""Attention that reads a few tokens of a cache: a selector chooses, our kernels read what it chose.

    sparse = SparseAttention(cache, policies.Quest(budget_tokens=1024))
    out = sparse.attend(query, cache.view(sequences), layer)      after cache.append(layer, ...)

    keep ──► look ──► select ──► None: dense attention, bit for bit
                             └─► Selection: kernels.sparse reads these tokens where they lie

Nothing is lost: what is not read now can be read at the next step. Queries are the last L tokens of
each sequence; more than `MOST_TOKENS` of them, a prompt, read everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .batch import Ints
from .cache import KVCache
from .kernels import sparse
from .kernels.contract import EMPTY
from .kernels.kv import KV, MOST_TOKENS
from .kernels.selection import Selection
from .layout import Layout, LayoutError
from .ragged import attend_lse as dense_lse
from .records import Records
from .selector import Look, Selector, SelectorError
from .sequence import View
from .tiers import Tiers

UNCOUNTED = 512  # selections whose counts are kept until somebody asks
# Told of each selection that is about to be read: layer, the sequences' slots, the selection.
Watcher = Callable[[int, Ints, Selection], None]


@dataclass(frozen=True)
class Activity:
    """What one layer read: tokens of all KV heads of all sequences, over its steps.

    ``read`` of ``there`` tokens; ``steps`` calls with at most `MOST_TOKENS` queries, without a
    selection in ``dense_steps`` of them.
    """

    steps: int
    dense_steps: int
    read: int
    there: int

    @property
    def share(self) -> float:
        """Tokens read of those there; 1.0 where nothing was asked."""
        return self.read / self.there if self.there else 1.0


class SparseAttention:
    """A selector at work on a cache.

    Args:
        cache: whose sequences are read.
        selector: what to read, see `vattn.policies`.
        tiers: told what is read, and asked to bring it into the fast tier in the background. What
            lies in the slow one is read there meanwhile: the result is the same.

    Its records of keys lie in the cache's pool and count in its budget (``nbytes``). Close it, or
    the cache.

    Raises:
        SelectorError: the selector does not suit the layout. LayoutError, ReserveError,
        MapLimitError: no room for the records.
    """

    most_queries = MOST_TOKENS  # of a call that the selector is asked about

    def __init__(self, cache: KVCache, selector: Selector, tiers: Tiers | None = None) -> None:
        self.cache, self.selector, self.tiers = cache, selector, tiers
        _check_suits(selector, cache.layout)
        parts = selector.parts(cache.layout.head_dim)
        self.records: Records | None = None
        if parts:
            self.records = Records(cache, parts, selector.page_tokens, selector.record)
        self.watchers: list[Watcher] = []
        layers = cache.layout.layers
        self._counts = np.zeros((layers, 3), np.int64)  # steps, dense steps, tokens there
        # What was read and is not counted yet: counting it at once would wait for the device.
        self._uncounted: list[tuple[int, Tensor, int, Ints]] = []
        self._read = np.zeros(layers, np.int64)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._earlier: dict[int, Selection] = {}
        self._latest = -1
        self._whose: tuple[object, ...] = ()  # earlier selections are

    @property
    def nbytes(self) -> int:
        """Bytes of pages that the index takes."""
        return self.records.nbytes if self.records is not None else 0

    def attend(
        self, query: Tensor, view: View, layer: int, *, scale: float | None = None
    ) -> Tensor:
        """Attend to what the selector chooses of one layer: query [B, Hq, L, D] -> [B, Hq, L, D].
        Forward only.

        Raises:
            LayoutError: the query does not suit the cache, or the layer has released tokens.
            ClosedError: a sequence was closed, truncated or reordered since the view was made.
            OutOfPages: no memory for new records.
        """
        return self.attend_lse(query, view, layer, scale=scale)[0]

    def attend_lse(
        self, query: Tensor, view: View, layer: int, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """`attend`, and the log-sum-exp of each row over what it read, [B, Hq, L] float32."""
        found = self.try_attend(query, view, layer, scale=scale)
        return dense_lse(query, view, layer, scale=scale) if found is None else found

    def try_attend(
        self,
        query: Tensor,
        view: View,
        layer: int,
        *,
        scale: float | None = None,
        starts: Ints | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """`attend_lse`; None where everything is to be read, which is the caller's then. ``starts``
        [B] are the first readable tokens of each sequence (padding on the left)."""
        look = self._look(view, layer, scale, starts)
        look.kv.check_query(query)
        selection = self._choose(query, view, look)
        if selection is None:
            return None
        for watch in self.watchers:
            watch(layer, np.asarray(view.slots), selection)
        if self.tiers is not None:
            self._recall(self.tiers, view, layer, selection)
        return sparse.attend(query, look.kv, selection, scale=look.scale)[:2]

    def selection(
        self, query: Tensor, view: View, layer: int, *, scale: float | None = None
    ) -> Selection | None:
        """What `attend` would read; None: everything. Counts in the activity."""
        return self._choose(query, view, self._look(view, layer, scale, None))

    def look(self, view: View, layer: int, *, scale: float | None = None) -> Look:
        """What the selector sees of a layer now, its records brought up to date: to ask it ahead of
        `attend`. Good until a sequence is truncated, reordered or closed.

        Raises:
            OutOfPages, MapLimitError, DriverError: no memory for new records.
        """
        look = self._look(view, layer, scale, None)
        return look if self.selector.reads_all(look) else self._indexed(look, view)

    def activity(self) -> list[Activity]:
        """What each layer has read so far. On a device this waits for it."""
        self._settle()
        read = self._read.tolist()
        return [
            Activity(steps, dense, read[layer], there)
            for layer, (steps, dense, there) in enumerate(self._counts.tolist())
        ]

    def close(self) -> None:
        """Give the records back. Idempotent."""
        if self.records is not None:
            self.records.close()

    def __enter__(self) -> SparseAttention:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- inside --------------------------------------------------------------------------------
    def _look(self, view: View, layer: int, scale: float | None, starts: Ints | None) -> Look:
        """What the selector sees, but for the index."""
        if view.cache is not self.cache:
            raise LayoutError("the view is of another cache than this SparseAttention")
        view.check_current()
        lengths = view.lengths[:, self.cache.layout.physical(layer)]
        layer = range(self.cache.layout.layers)[layer]
        counts, slots, first = (
            None if array is None else torch.from_numpy(array).to(self.cache.device)
            for array in (lengths, np.asarray(view.slots), starts)
        )
        rows = self._rows.get(layer)
        if rows is None:  # of all slots: they never change
            rows = self._rows[layer] = self.cache.reserved(layer)
        kv = KV(*rows, counts, first, slots)
        scale = self.cache.layout.head_dim**-0.5 if scale is None else scale
        step = int(self._counts[layer, 0])
        return Look(layer, kv, None, lengths, scale, starts, self._earlier, step)

    def _choose(self, query: Tensor, view: View, look: Look) -> Selection | None:
        if query.shape[2] > MOST_TOKENS:
            return None
        whose = (*view.slots, *self.cache.versions[view.slots].tolist())
        if look.layer <= self._latest or whose != self._whose:
            self._earlier.clear()
        self._latest, self._whose = look.layer, whose
        selection = None
        if not self.selector.reads_all(look) and self.selector.fits(query.shape[2]):
            selection = self.selector.select(query, self._indexed(look, view))
            if selection is not None:
                selection = short_whole(selection, look, self.selector.budget_tokens)
        self._count(look, selection)
        return selection

    def _indexed(self, look: Look, view: View) -> Look:
        released = view.starts[:, self.cache.layout.physical(look.layer)]
        if released.any():
            raise LayoutError(
                f"layer {look.layer} has released its first {int(released.max())} tokens "
                "(release_before): a window and a selection exclude each other; name the layer in "
                "dense_layers"
            )
        if self.records is None:
            return look
        batch = self.cache.batch(view.sequences)
        self.records.keep(batch, look.layer)
        return replace(look, index=self.records.index(batch, look.layer))

    def _recall(self, tiers: Tiers, view: View, layer: int, selection: Selection) -> None:
        for b, sequence in enumerate(view.sequences):
            tokens = tokens_of(selection, b, self.cache.layout, int(view.lengths[b].max()))
            tiers.read(sequence, layer, tokens)

    def _count(self, look: Look, selection: Selection | None) -> None:
        heads = look.kv.key.shape[1]
        there = int(look.lengths.sum()) - (0 if look.starts is None else int(look.starts.sum()))
        self._counts[look.layer] += (1, selection is None, there * heads)
        if selection is None:
            self._read[look.layer] += there * heads
            return
        self._earlier[look.layer] = selection
        size = selection.page_tokens
        self._uncounted.append((look.layer, selection.count, size, look.lengths))
        if len(self._uncounted) >= UNCOUNTED:
            self._settle()

    def _settle(self) -> None:
        for layer, count, size, lengths in self._uncounted:
            # The last page may be growing: no more tokens than there are.
            beyond = (-lengths % size).sum() * count.shape[1]
            self._read[layer] += int(count.sum()) * size - beyond
        self._uncounted.clear()


def _check_suits(selector: Selector, layout: Layout) -> None:
    for layer in selector.dense_layers:
        if not 0 <= layer < layout.layers:
            raise SelectorError(
                f"dense_layers has {layer}: the cache has layers 0 to {layout.layers - 1}"
            )
    if layout.layer_map is not None and "offline" in selector.caps.evidence:
        raise SelectorError(
            f"{type(selector).__name__} may map each layer's keys in a way of its own, and layers "
            "of this cache share keys (layer_map): choose a selector without calibration"
        )


def short_whole(selection: Selection, look: Look, budget_tokens: int) -> Selection:
    """The selection, with all tokens of sequences that are no longer than the budget."""
    starts = np.zeros_like(look.lengths) if look.starts is None else look.starts
    short = np.flatnonzero(look.lengths - starts <= budget_tokens)
    if not len(short):
        return selection
    size = selection.page_tokens
    first, end = starts // size, -(-look.lengths // size)
    width = max(selection.ids.shape[2], int((end - first)[short].max()))
    more = (0, width - selection.ids.shape[2])
    ids = torch.nn.functional.pad(selection.ids, more)
    count, weights, tail = selection.count.clone(), selection.log_weights, selection.tail
    if weights is not None:
        weights = torch.nn.functional.pad(weights, more)
    if tail is not None:
        tail = (tail[0], tail[1].clone())
    for b in short.tolist():
        pages = torch.arange(first[b], end[b], dtype=torch.int32, device=ids.device)
        ids[b, :, : len(pages)] = pages
        count[b] = len(pages)
        if weights is not None:
            weights[b] = 0.0
        if tail is not None:
            tail[1][b] = EMPTY
    return Selection(ids, count, size, weights, tail)


def tokens_of(selection: Selection, b: int, layout: Layout, length: int) -> list[Ints]:
    """Tokens that lie in every page of memory that sequence b reads, one array a KV head."""
    size = selection.page_tokens
    step = min(size, max(1, int(layout.tokens_per_page)))
    within = np.unique([*range(0, size, step), size - 1])
    ids, counts = selection.ids[b].cpu().numpy(), selection.count[b].tolist()
    firsts = (row[:count].astype(np.int64) * size for row, count in zip(ids, counts, strict=True))
    tokens = ((first[:, None] + within).ravel() for first in firsts)
    return [some[some < length] for some in tokens]
