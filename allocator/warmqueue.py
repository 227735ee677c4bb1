"""Free pages that keep their bytes, oldest first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from .quarantine import PageIds
from .table import FREE, MAPPED, WARM, PageTable

QUEUE_RUNS = 4096  # entries beyond which the queue is rebuilt


def runs(ids: PageIds) -> Iterator[tuple[int, int]]:
    """Maximal runs ``(page, count)`` of consecutive ids, in order."""
    if len(ids) == 0:
        return
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield int(ids[start]), end - start


class WarmQueue:
    """Every warm page is in an entry; entries may be out of date, the table tells the truth."""

    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.runs: deque[PageIds] = deque()

    def push(self, ids: PageIds) -> None:
        """Pages that became warm, after all others."""
        self.runs.append(ids)
        if len(self.runs) > QUEUE_RUNS:
            ids = np.fromiter(chain.from_iterable(self.runs), np.int64)
            _, seen = np.unique(ids, return_index=True)  # each once, oldest first
            ids = ids[np.sort(seen)]
            self.runs = deque([ids[self.table.state[ids] == WARM]])

    def unpop(self, ids: PageIds) -> None:
        """Pages that were popped and stayed warm, before all others."""
        if len(ids):
            self.runs.appendleft(ids)

    def pop(self, n: int) -> PageIds:
        """Up to ``n`` warm ids of the oldest entry; none if there is no warm page."""
        ids: PageIds = np.zeros(0, np.int64)
        while not len(ids) and self.runs and n > 0:
            ids = self.runs.popleft()
            ids = ids[self.table.state[ids] == WARM]
            self.unpop(ids[n:])
            ids = ids[:n]
        return ids

    def pop_many(self, n: int) -> PageIds:
        """Up to ``n`` warm ids, oldest first: a window that moves keeps its pages in file order."""
        state = self.table.state
        parts: list[PageIds] = [np.zeros(0, np.int64)]
        while n and len(ids := self.pop(n)):
            state[ids] = MAPPED  # so that a second, stale entry of the same id is skipped
            parts.append(ids)
            n -= len(ids)
        found = np.concatenate(parts)
        state[found] = WARM
        return found

    def choose(
        self, goals: PageIds, before: NDArray[np.uint8], use_warm: bool
    ) -> tuple[PageIds, NDArray[np.uint8]]:
        """Ids for goals of which not all are cold and free, and their states: the goal itself if it
        is free, a warm page instead of a cold goal if ``use_warm``, else a spare id."""
        ids, state = goals.copy(), self.table.state
        # Reserve the goals that are kept, so that the warm queue does not offer them twice.
        kept = before == WARM
        state[goals[kept]] = MAPPED
        elsewhere = np.flatnonzero(~kept if use_warm else before > WARM)
        if use_warm and len(elsewhere):
            found = self.pop_many(len(elsewhere))
            ids[elsewhere[: len(found)]] = found
            before[elsewhere[: len(found)]] = WARM
            elsewhere = elsewhere[len(found) :]
        state[goals[kept]] = WARM
        busy = elsewhere[before[elsewhere] > WARM]
        if len(busy):
            ids[busy] = self.table.take_spare(len(busy))
            before[busy] = FREE
        return ids, before
