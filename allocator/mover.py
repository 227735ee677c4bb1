"""Moves in the background: one thread copies, and whoever owns the arena installs.

    owner                                     this thread
    start: begin each piece ── queue ──►      wait for submitted work, copy the piece
    settle: finish or abandon ◄── ready ──    next piece

A piece is a bounded number of pages, and what is ready is installed by one change of mapping: the
owner never waits for a copy, unless it asks to (`Move.wait`).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import cast

import numpy as np

from .errors import ClosedError, DriverError, MapLimitError, VattnError
from .frontiers import join
from .moves import Moves, Transfer
from .quarantine import PageIds
from .record import Ints
from .vmm import TieredBackend


class Move:
    """Pages on their way in the background.

    Attributes: ``down`` to the lower tier; ``nbytes`` that are to be copied, ``copied`` bytes that
    are; ``installed`` and ``dropped`` pages: the latter were written, given back or found without a
    map meanwhile, and stay where they were; ``error`` what ended it, None if nothing did.
    """

    def __init__(self, mover: Mover, down: bool, pieces: list[Transfer]) -> None:
        self.mover, self.down, self.pieces = mover, down, pieces
        self.nbytes = sum(int(p.copied.sum()) for p in pieces) * mover.arena.page_bytes
        self.copied = self.installed = self.dropped = 0
        self.cancelled = False
        self.waited = False  # for what was submitted before
        self.error: VattnError | None = None
        self.left = len(pieces)  # to be settled
        self._copied = threading.Event()
        self._to_copy = len(pieces)
        if not pieces:
            self._copied.set()

    @property
    def done(self) -> bool:
        """Is everything installed, dropped or abandoned?"""
        return not self.left

    @property
    def progress(self) -> float:
        """Share of the bytes that are copied."""
        return self.copied / self.nbytes if self.nbytes else 1.0

    def moves_any(self, ids: PageIds) -> bool:
        """Is one of these pages under way?"""
        under_way = self.mover.under_way.intersection(self.pieces)
        return any(np.isin(piece.source, ids).any() for piece in under_way)

    def cancel(self) -> None:
        """Stop after the piece in hand; what is not installed yet never will be."""
        self.cancelled = True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the copies, and settle; False if that took longer than ``timeout`` seconds."""
        if not self._copied.wait(timeout):
            return False
        self.mover.settle()
        return True

    def piece_copied(self) -> None:
        """The thread is through with a piece."""
        self._to_copy -= 1
        if not self._to_copy:
            self._copied.set()


class Mover:
    """Moves of one arena.

    Args:
        piece_pages: most pages copied between two looks at `Move.cancelled`.
        told: of each install: the page numbers, and whether they went down.

    Attributes: ``under_way`` the pieces begun and not settled.
    """

    def __init__(
        self, arena: Moves, *, piece_pages: int, told: Callable[[Ints, bool], None]
    ) -> None:
        self.arena, self.piece_pages, self.told = arena, max(1, piece_pages), told
        self.under_way: set[Transfer] = set()
        self._queue: SimpleQueue[tuple[Move, Transfer] | None] = SimpleQueue()
        self._ready: deque[tuple[Move, Transfer]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        weakref.finalize(self, self._queue.put, None)  # the thread waits there

    def start(self, pages: Ints, *, down: bool) -> Move:
        """Begin to move mapped pages. Those with other holders, and those under way, stay.

        Raises:
            ClosedError, PageStateError, OutOfPages, DriverError: nothing was begun.
        """
        if self._closed:
            raise ClosedError("the mover is closed")
        pieces = self.arena.begin(pages, down=down).split(self.piece_pages)
        move = Move(self, down, pieces)
        self.under_way.update(pieces)
        if pieces and self._thread is None:
            work = (self.arena, self._queue, self._ready, self.piece_pages)
            self._thread = threading.Thread(target=_run, args=work, name="vattn-mover", daemon=True)
            self._thread.start()
        for piece in pieces:
            self._queue.put((move, piece))
        return move

    def settle(self) -> None:
        """Install what has been copied, and let go of what was cancelled. The owner's thread calls
        it at a safe point."""
        while self._ready:
            move, piece = self._ready.popleft()
            pieces = [piece]
            while self._ready and self._ready[0][0] is move:
                pieces.append(self._ready.popleft()[1])
            pages = self._finish(move, Transfer.joined(pieces))
            move.left -= len(pieces)
            self.under_way.difference_update(pieces)
            if len(pages):
                self.told(pages, move.down)

    def close(self) -> None:
        """Cancel everything; wait for the piece in hand. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._thread is None:
            return
        waiting: list[tuple[Move, Transfer]] = []
        while not self._queue.empty():
            item = self._queue.get()
            if item is not None:
                waiting.append(item)
        self._queue.put(None)
        self._thread.join()
        for move, piece in waiting:
            move.piece_copied()
            self._ready.append((move, piece))
        for move, _ in self._ready:
            move.cancel()
        self.settle()

    def _finish(self, move: Move, piece: Transfer) -> Ints:
        """Install pieces if they are whole and wanted; returns page numbers."""
        if not (move.cancelled or move.error):
            try:
                pages = self.arena.finish(piece)
                found = len(np.unique(self.arena.ids(pages)))
                move.installed += found
                move.dropped += len(piece.source) - found
                return pages
            except (MapLimitError, DriverError) as error:
                move.error = error
        self.arena.abandon(piece)
        move.dropped += len(piece.source)
        return join([])


def _run(
    arena: Moves,
    queue: SimpleQueue[tuple[Move, Transfer] | None],
    ready: deque[tuple[Move, Transfer]],
    most: int,
) -> None:
    """The thread. It knows no mover, so that nobody's end waits for it."""
    while (item := queue.get()) is not None:
        _carry(arena, *item, most)
        ready.append(item)
        item[0].piece_copied()
        del item


def _carry(arena: Moves, move: Move, piece: Transfer, most: int) -> None:
    """Copy a piece, unless it is not wanted any more."""
    try:
        if not move.waited:
            cast(TieredBackend, arena.backend).settle()
            move.waited = True
        if not (move.cancelled or move.error):
            for pages in arena.carry(piece, most):
                move.copied += pages * arena.page_bytes
    except VattnError as error:
        move.error = error
