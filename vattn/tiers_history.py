"""Where pages lived over time, from the installs that moved them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .batch import Ints

FAST, SLOW = 0, 1
LIMIT = 100_000  # installs that are remembered


@dataclass(frozen=True)
class Install:
    """Pages that changed tiers at once: their page numbers in the arena."""

    step: int
    tier: int
    pages: Ints


class History:
    """The last installs, oldest first."""

    def __init__(self) -> None:
        self.installs: deque[Install] = deque(maxlen=LIMIT)

    def note(self, step: int, pages: Ints, *, down: bool) -> None:
        """Pages changed tiers."""
        self.installs.append(Install(step, SLOW if down else FAST, pages))

    def timeline(
        self, first: int, lanes: int, lane_pages: int, pages: int
    ) -> tuple[Ints, NDArray[np.float32]]:
        """Of ``lanes`` lanes from page number ``first`` on, and the first ``pages`` pages of each:
        steps [n], and the share of each page's lanes that was in the slow tier after it
        [n, pages]. As far back as is remembered; before, all were in the fast one."""
        now = np.zeros((lanes, pages), np.float32)
        steps, shares = [0], [now.mean(axis=0)]
        for install in self.installs:
            lane, index = np.divmod(install.pages - first, lane_pages)
            ours = (lane >= 0) & (lane < lanes) & (index < pages)
            if ours.any():
                now[lane[ours], index[ours]] = install.tier
                steps.append(install.step)
                shares.append(now.mean(axis=0))
        return np.array(steps), np.stack(shares)
