"""Pages wait here, unmapped, until nothing submitted earlier can still read them.

First an epoch: work of the step in which a page was given back may be submitted but not started.
Then a fence: the device's own event, on a device that runs behind the host.

    hold(ids) at epoch e ──► advance() to e+1 ──► fence() is true ──► drain() returns ids
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

PageIds = NDArray[np.int64]


class Quarantine:
    """FIFO of page ids by epoch. ``pages`` counts what waits."""

    def __init__(self) -> None:
        self.epoch = 0
        self.pages = 0
        self._held: deque[tuple[int, PageIds, Callable[[], bool] | None]] = deque()

    def hold(
        self, ids: PageIds, *, quiesced: bool = False, fence: Callable[[], bool] | None = None
    ) -> None:
        """Take ``ids`` in. ``quiesced`` pages were unread for a whole epoch already."""
        entry = (self.epoch - 1 if quiesced else self.epoch, ids, fence)
        # Quiesced pages leave first; FIFO order by epoch is what lets drain() stop early.
        self._held.appendleft(entry) if quiesced else self._held.append(entry)
        self.pages += len(ids)

    def advance(self) -> None:
        """Begin the next epoch."""
        self.epoch += 1

    def drain(self) -> list[PageIds]:
        """Pages whose epoch has passed and whose fence is reached, oldest first."""
        out: list[PageIds] = []
        while self._held:
            epoch, ids, fence = self._held[0]
            if epoch >= self.epoch or (fence is not None and not fence()):
                break
            self._held.popleft()
            self.pages -= len(ids)
            out.append(ids)
        return out
