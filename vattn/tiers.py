"""Tiers: where the bytes of a page lie, under an address that never changes.

    fast   the pool's own pages: host memory (memfd), or a device's
    slow   on the host a file, on a device host memory that it reads at the same addresses

A page moves by a copy and a remap. Tensors, views, selections and captured graphs stay as they are,
and a kernel that knows nothing of tiers reads the same bytes, more slowly. Promotion only warms: no
result depends on it.

    append ──► fast ◄─────── promote, prefetch, a write ───────┐
                │                                              │
                └── demote, or a victim of the budget ──► slow, and fast again with a *twin* there:
                                                          unchanged, it leaves for nothing

Only pages whose rows are all written leave by themselves; the page that a sequence grows in stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from .allocator.errors import MapLimitError, OutOfPages, VattnError
from .allocator.mover import Move, Mover
from .allocator.tier import Tier
from .batch import Ints
from .cache import KVCache
from .sequence import Sequence
from .tiers_history import FAST as FAST
from .tiers_history import SLOW as SLOW
from .tiers_history import History
from .tiers_order import ORDERS, Order, Score, Uses
from .tiers_pages import Places, Tokens

PIECE_BYTES = 8 << 20  # copied and installed at a time
SHARE = 64  # of the fast tier leaves at once when something must


class TierError(VattnError, ValueError):
    """Tiers that cannot be made so."""


@dataclass(frozen=True)
class TierStats:
    """Bytes, but for ``hits``, ``misses`` (pages used in the fast, the slow tier), and ``dropped``
    (pages that changed under a move in the background, and stayed)."""

    fast_bytes: int
    fast_budget_bytes: int
    slow_bytes: int  # pages whose only place is the slow tier
    copy_bytes: int  # equal copies there of pages in the fast one
    slow_budget_bytes: int
    demoted_bytes: int  # pages that went, and
    promoted_bytes: int
    copied_bytes: int  # the bytes that were copied for it
    hits: int
    misses: int
    dropped: int

    def to_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return asdict(self)


class Tiers:
    """A slow tier under a cache's pool, and who lives there.

    Args:
        cache: whose pages move. One `Tiers` a pool.
        fast_bytes: budget of the fast tier from now on; None leaves the pool's. When a page is
            wanted beyond it, victims are demoted first.
        slow_bytes: budget of the slow tier; None: four times the fast one.
        file: on the host, the path of the slow tier's file, which must not exist; None: a file
            without a name in the folder for temporary files.
        node: on a device, the NUMA node of the slow tier's memory.
        victims: who leaves first: "fifo", "lru", "counter", or a function of `Candidates` that
            gives each a score, the lowest leave first.
        ready_bytes: of the slow tier, committed now: the first touch of a page costs ten copies.
        ahead_bytes: of the fast tier, kept free at step boundaries by demoting in the background.

    Raises:
        TierError: an order that there is none of. PageStateError: the pool has a slow tier.
        DriverError, NoDeviceError: the system refused.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        fast_bytes: int | None = None,
        slow_bytes: int | None = None,
        file: str | None = None,
        node: int | None = None,
        victims: Order | Score = "lru",
        ready_bytes: int = 0,
        ahead_bytes: int = 0,
    ) -> None:
        if isinstance(victims, str) and victims not in ORDERS:
            raise TierError(f"victims must be one of {sorted(ORDERS)} or a function: {victims!r}")
        self.cache, self.arena, self.layout, pool = cache, cache.arena, cache.layout, cache.pool
        self.score = ORDERS[victims] if isinstance(victims, str) else victims
        if fast_bytes is None:
            fast_bytes = pool.total * pool.page_bytes
        if slow_bytes is None:
            slow_bytes = 4 * fast_bytes
        self.slow = Tier(pool, budget_bytes=slow_bytes, place=file if node is None else node)
        self.slow.make_ready(ready_bytes)
        self.ahead = ahead_bytes // pool.page_bytes
        self.uses = Uses(self.arena.slots, self.arena.lanes, self.arena.lane_pages)
        self.places = Places(cache)
        pieces = PIECE_BYTES // pool.page_bytes
        self.mover = Mover(self.arena, piece_pages=pieces, told=self._note)
        self.history = History()
        self.steps = self.hits = self.misses = 0
        self._moved = {False: 0, True: 0}  # pages, by down
        self._copied = self._dropped = 0
        self._moves: list[Move] = []
        self._step_began = self.uses.clock
        self._idle: int | None = None  # fast pages not used since then, if counted
        cache.followers.add(self)
        self._evictor = _weak_evictor(self)
        pool.evictors.append(self._evictor)
        pool.set_budget(fast_bytes)

    # ---- moving ------------------------------------------------------------------------------
    def demote(
        self,
        sequence: Sequence,
        layer: int | None = None,
        tokens: Tokens | None = None,
        *,
        tail: bool = False,
    ) -> int:
        """Move pages to the slow tier, now; returns the bytes that were copied.

        Args:
            layer: one layer's (and those of layers whose rows lie between its rows), or all.
            tokens: those of pages wholly within ``(start, end)``, or all that are full; or token
                numbers: an array, or one for each KV head: every page that holds one.
            tail: the page that the sequence grows in, too; the next append brings it back.

        Raises:
            ClosedError: the sequence is closed. PageStateError: a page is exported.
            OutOfPages: the slow tier is full. MapLimitError, DriverError: nothing moved.
        """
        pages = self.places.of(sequence, layer, tokens, whole=True)
        return self._move(pages if tail else self._only_full(pages), down=True)

    def promote(
        self, sequence: Sequence, layer: int | None = None, tokens: Tokens | None = None
    ) -> int:
        """Move pages to the fast tier, now; returns the bytes that were copied. Arguments and
        errors as `demote`; a page that holds any of the tokens is meant.

        Raises:
            OutOfPages: the fast tier has no room, victims demoted.
        """
        return self._move(self.places.of(sequence, layer, tokens), down=False)

    def start_demote(
        self, sequence: Sequence, layer: int | None = None, tokens: Tokens | None = None
    ) -> Move:
        """`demote` in the background: full pages, as far as nobody else holds them."""
        pages = self._only_full(self.places.of(sequence, layer, tokens, whole=True))
        return self._start(pages, down=True)

    def start_promote(
        self, sequence: Sequence, layer: int | None = None, tokens: Tokens | None = None
    ) -> Move:
        """`promote` in the background."""
        return self._start(self.places.of(sequence, layer, tokens), down=False)

    def prefetch(self, sequence: Sequence, layer: int, tokens: Tokens | None = None) -> Move | None:
        """Ask for pages to be promoted in the background, as far as there is room without those
        that were used since the last step boundary; None if nothing is to be done. A wrong guess
        costs time alone.

        Raises:
            ClosedError: the sequence is closed.
        """
        return self._prefetch(self.places.of(sequence, layer, tokens))

    def read(self, sequence: Sequence, layer: int, tokens: Tokens | None = None) -> Move | None:
        """`touch` and `prefetch` by one look at the pages."""
        pages = self.places.of(sequence, layer, tokens)
        self._touch(pages)
        return self._prefetch(pages)

    def settle(self) -> None:
        """Install what was copied in the background. `KVCache.advance` does it at step ends."""
        self.mover.settle()
        for move in [move for move in self._moves if move.done]:
            self._moves.remove(move)
            self._copied += move.copied
            self._dropped += move.dropped

    # ---- using -------------------------------------------------------------------------------
    def touch(self, sequence: Sequence, layer: int, tokens: Tokens | None = None) -> None:
        """Say that tokens of a layer are read at this step; see `demote` for ``tokens``.

        Raises:
            ClosedError: the sequence is closed.
        """
        self._touch(self.places.of(sequence, layer, tokens))

    def resident(self, sequence: Sequence, layer: int) -> NDArray[np.int8]:
        """Where a layer's pages lie: [lanes, pages] of `FAST`, `SLOW`, or -1 where none is."""
        slot = self.places.slot(sequence)
        lanes, last = self.places.lanes(layer), int(self.arena.last[slot].max())
        pages = self.arena.span(slot, 0, last, lanes).reshape(len(lanes), last)
        ids = self.arena.ids(pages)
        return np.where(ids < 0, -1, self.slow.holds(ids)).astype(np.int8)

    def timeline(self, sequence: Sequence, layer: int) -> tuple[Ints, NDArray[np.float32]]:
        """Where a layer's pages lived: steps [n], and the share of each page's lanes that was in
        the slow tier after each [n, pages]."""
        slot, lanes = self.places.slot(sequence), self.places.lanes(layer)
        first = slot * self.arena.slot_pages + int(lanes[0]) * self.arena.lane_pages
        pages = int(self.arena.last[slot].max())
        return self.history.timeline(first, len(lanes), self.arena.lane_pages, pages)

    def stats(self) -> TierStats:
        """What lies where, and what moved."""
        pool, slow, size = self.cache.pool, self.slow, self.layout.page
        running = sum(move.copied for move in self._moves)
        return TierStats(
            fast_bytes=pool.mapped * size,
            fast_budget_bytes=pool.total * size,
            slow_bytes=(slow.mapped - slow.copies) * size,
            copy_bytes=slow.copies * size,
            slow_budget_bytes=slow.total * size,
            demoted_bytes=self._moved[True] * size,
            promoted_bytes=self._moved[False] * size,
            copied_bytes=self._copied + running,
            hits=self.hits,
            misses=self.misses,
            dropped=self._dropped,
        )

    def close(self) -> None:
        """End the moves in the background. Pages stay where they are; nothing leaves by itself any
        more. Idempotent; closing the cache does it."""
        self.mover.close()
        self.settle()
        self.cache.followers.discard(self)
        if self._evictor in self.cache.pool.evictors:
            self.cache.pool.evictors.remove(self._evictor)

    # ---- told by the cache, see `follower` ---------------------------------------------------
    def shrunk(self, slots: Ints, layers: slice, tokens: int) -> None:
        """What was known of the rows behind is no longer so."""
        for slot in slots.tolist():
            self.uses.forget(slot, tokens * self.layout.row_bytes // self.layout.page)

    def forked(self, source: int, target: int, tokens: int, tenant: int) -> None:
        """The same physical pages: what is known of them stays with the source's addresses."""

    def permuted(self, slots: Ints, source: Ints, tenant: int) -> None:
        """What is known moves with the rows."""
        self.uses.permute(slots, source)

    def advanced(self) -> None:
        """A safe point."""
        self.steps += 1
        self._step_began, self._idle = self.uses.clock + 1, None
        self.settle()
        self.uses.notice(self.places.all_full())
        leaving = any(move.down for move in self._moves)
        short = self.ahead - self.cache.pool.free
        if short > 0 and not leaving:
            with suppress(OutOfPages):
                self._start(self._victims(short), down=True)

    def closed(self) -> None:
        """The cache is."""
        self.close()

    # ---- inside: using -----------------------------------------------------------------------
    def _touch(self, pages: Ints) -> None:
        low = int(np.count_nonzero(self.slow.holds(self.arena.ids(pages))))
        self.misses += low
        self.hits += len(pages) - low
        self.uses.use(pages)

    def _prefetch(self, pages: Ints) -> Move | None:
        if len(self.mover.under_way):
            self.settle()
        pages = pages[self.slow.holds(self.arena.ids(pages))]
        pages = pages[: self._room(len(pages))]
        if not len(pages):
            return None
        with suppress(OutOfPages, MapLimitError):
            return self._start(pages, down=False)
        return None

    def _room(self, wanted: int) -> int:
        """How many pages may come to the fast tier: in the place of idle ones, too."""
        free = self.cache.pool.free
        if wanted <= free:
            return wanted
        if self._idle is None:  # counted once a step
            pages = self._may_leave()[0]
            self._idle = int(np.count_nonzero(self.uses.used[pages] < self._step_began))
        room = min(wanted, free + self._idle)
        self._idle -= room - free
        return room

    # ---- inside: moving ----------------------------------------------------------------------
    def _move(self, pages: Ints, *, down: bool) -> int:
        """Move now; what is under way in the background is waited for."""
        self.settle()
        for move in [move for move in self._moves if move.moves_any(self.arena.ids(pages))]:
            move.wait()
        before = self.slow.holds(self.arena.ids(pages))
        copied = self.arena.move(pages, down=down)
        self._copied += copied
        self._note(pages[before != down], down)
        return copied

    def _start(self, pages: Ints, *, down: bool) -> Move:
        move = self.mover.start(pages, down=down)
        self._moves.append(move)
        return move

    def _note(self, pages: Ints, down: bool) -> None:
        """Pages have changed tiers."""
        if not len(pages):
            return
        self._moved[down] += len(np.unique(self.arena.ids(pages)))
        self.history.note(self.steps, pages, down=down)
        if not down:
            self.uses.arrive(pages)

    def _only_full(self, pages: Ints) -> Ints:
        """Those of one slot's pages whose rows are all written."""
        if not len(pages):
            return pages
        return np.intersect1d(pages, self.places.full(pages.item(0) // self.arena.slot_pages))

    def _evict(self, pages: int) -> None:
        """Demote so many pages at least, if that can be; the pool asks, in the middle of a turn."""
        if self.cache.closed:
            return
        pool = self.cache.pool
        wanted = pool.free - pool.over + pages
        self.settle()
        for move in [move for move in self._moves if move.down]:  # they are leaving anyway
            if pool.free - pool.over < wanted:
                move.wait()
        short = wanted - pool.free + pool.over
        if short > 0:
            most = min(max(short, pool.total // SHARE), self.slow.free + self.slow.copies)
            with suppress(OutOfPages, MapLimitError):  # who asked says what is missing
                self._move(self._victims(most), down=True)

    def _victims(self, most: int) -> Ints:
        """Page numbers of up to ``most`` that leave first, ascending."""
        pages, ids = self._may_leave()
        self.uses.notice(pages)
        found = self.uses.candidates(pages, ids)
        worst = np.argsort(self.score(found), kind="stable")[:most]
        return np.sort(self.uses.page_numbers(found)[worst])

    def _may_leave(self) -> tuple[Ints, Ints]:
        """Full pages of the fast tier that only this arena holds, and their ids."""
        pages = self.places.all_full()
        ids = self.arena.ids(pages)
        stays = self.slow.holds(ids) | self._held_elsewhere(ids)
        return pages[~stays], ids[~stays]

    def _held_elsewhere(self, ids: Ints) -> NDArray[np.bool_]:
        """Pages with more holders than addresses of full pages here: exported, or on their way."""
        refs = self.cache.pool.refs(ids)
        many = refs > 1
        if many.any():
            _, which, counts = np.unique(ids, return_inverse=True, return_counts=True)
            many = refs > counts[which]
        return many


def _weak_evictor(tiers: Tiers) -> Callable[[int], None]:
    """The pool may ask for pages, but must not keep anybody alive."""
    ref = weakref.ref(tiers)

    def evict(pages: int) -> None:
        alive = ref()
        if alive is not None:
            alive._evict(pages)

    return evict
