"""Warm pages, made ahead: a thread that touches and collapses pages while the model computes.

    step boundary                    this thread
    pool.advance() ── wakes ──►      lend: cold ids become pending (they count in the budget)
                                     create: make the page (0.2 ms for a handle of a device)
                                     warm: commit its bytes, by huge pages where the kernel will
                                     return: they are free and warm

The thread takes a turn of the pool to lend and to return (microseconds); the slow part, 0.2 ms to
2 ms a page, runs outside of it and touches only pages that nobody else can take. Who needs the
budget of lent pages takes them back (`recall`), and waits for the page in hand at most; those that
were not made yet go back as cold as they came. Where the kernel refuses huge pages, `refused` says
why, and the pages are warm all the same; where it has no page at all, the thread rests for some
step boundaries: asking again at each would only take memory from those who need it now. It sleeps
until a step boundary or a request wakes it, and ends with its context.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

import numpy as np

from .errors import ClosedError, DriverError
from .huge import HUGE_BYTES
from .pool import Pool
from .quarantine import PageIds
from .table import MAPPED

BATCH_PAGES = 8  # lent at once
REST_STEPS = 64  # boundaries without a page made after the system had none
NONE: PageIds = np.zeros(0, np.int64)


class Warmer:
    """Keeps at least ``low_bytes`` of a pool's free pages warm; a context manager.

    Args:
        pool: whose pages.
        low_bytes: the low watermark; the budget and ``warm_high_bytes`` of the pool cap it.

    Attributes: ``made`` pages warmed, ``collapsed`` extents collapsed, ``refused`` the last reason
    why the kernel did not give huge pages, None if it always did.
    """

    def __init__(self, pool: Pool, *, low_bytes: int) -> None:
        self.pool = pool
        self.low = low_bytes // pool.page_bytes
        if pool.warm_high is not None:
            self.low = min(self.low, pool.warm_high)
        self.made = self.collapsed = 0
        self.refused: str | None = None
        self._hot: deque[PageIds] = deque()
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._closing = False
        self._lent, self._made = NONE, 0  # and how many of them exist
        self._rest = 0  # boundaries to come without a page made
        self._work = threading.Lock()  # held while lent pages are touched; never around a turn
        self._thread = threading.Thread(target=self._run, name="vattn-warmer", daemon=True)

    def __enter__(self) -> Warmer:
        self._thread.start()
        self.pool.boundary, self.pool.recall = self.wake, self.recall
        self.wake()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def wake(self) -> None:
        """Look whether pages are wanted. `Pool.advance` calls it."""
        self._rest = max(0, self._rest - 1)
        self._idle.clear()
        self._wake.set()

    def collapse(self, ids: PageIds) -> None:
        """Ask for huge pages behind mapped pages; whole 2 MiB extents of them are collapsed later.

        Raises:
            ClosedError: the warmer is closed.
        """
        if self._closing:
            raise ClosedError("the warmer is closed")
        self._hot.append(np.unique(ids))
        self.wake()

    def recall(self) -> None:
        """Return the lent pages now, the page in hand being finished first. Within a turn."""
        lent, self._lent = self._lent, NONE  # the thread stops at its next page
        with self._work:
            self.pool.return_warm(lent, self._made if len(lent) else 0)

    def settle(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; False if that took longer than ``timeout`` seconds."""
        return self._idle.wait(timeout)

    def stop(self) -> None:
        """Let the thread end after the page in hand; does not wait for it."""
        self._closing = True
        if self.pool.boundary == self.wake:
            self.pool.boundary = self.pool.recall = None
        self._wake.set()

    def close(self) -> None:
        """`stop`, and wait for the end. Idempotent."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join()

    # ---- the thread --------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while True:
                self._wake.wait()
                self._wake.clear()
                while not self._closing and (self._collapse_some() or self._make_some()):
                    pass
                if self._closing:
                    return
                if not self._wake.is_set():
                    self._idle.set()
        except ClosedError:  # the pool was closed first
            pass
        finally:
            self._closing = True
            self._idle.set()

    def _make_some(self) -> bool:
        """Warm a few pages; False if none is wanted or to be had."""
        wanted = min(self.low - self.pool.warm, BATCH_PAGES)
        if wanted <= 0 or self._rest:
            return False
        with self.pool.turn:
            lent, self._made = self.pool.lend(wanted), 0
            self._lent = lent
        try:
            for page in lent.tolist():
                with self._work:
                    if self._closing or self._lent is not lent:
                        break
                    self.pool.backend.create(page, 1)
                    self._made += 1
                    self._commit(page, 1)
                    self.made += 1
        except DriverError as error:
            self.refused, self._rest = str(error), REST_STEPS
        finally:
            with self.pool.turn:
                if self._lent is lent:
                    self._lent = NONE
                    self.pool.return_warm(lent, self._made)
        return len(lent) > 0

    def _collapse_some(self) -> bool:
        """Collapse one extent of the requests, in a turn: its pages must stay who they are."""
        if not self._hot:
            return False
        ids, count = self._hot.popleft(), max(1, HUGE_BYTES // self.pool.page_bytes)
        starts = ids[(ids % count == 0) & np.isin(ids + count - 1, ids)]
        if not len(starts):
            return True
        if len(starts) > 1:
            self._hot.appendleft(ids[ids >= starts[1]])
        first = int(starts[0])
        with self.pool.turn:
            extent = np.arange(first, first + count)
            if (self.pool.table.state[extent] == MAPPED).all() and np.isin(extent, ids).all():
                before = self.refused
                self._commit(first, count)
                self.collapsed += self.refused is before
        return True

    def _commit(self, page: int, count: int) -> None:
        try:
            self.pool.backend.warm(page, count)
        except DriverError as error:
            self.refused = str(error)
