"""A few threads that help the caller through compiled loops which give the interpreter lock back.

    post(work, helpers)    asks up to ``helpers`` threads to call work(); returns at once

The caller does the same work itself and never waits for a helper that has not begun: ``work`` must
be a list that any number of threads empty. numba's own threads would be simpler, but its default
ones abort the process when two threads use them, and OpenMP's do after a fork.

Threads start on first use, are daemons, and are forgotten by a forked child, which starts its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

Work = Callable[[], object]


class Pool:
    """Threads that wait for work. One for the process: `POOL`."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Work] = SimpleQueue()
        self.threads = 0

    def post(self, work: Work, helpers: int) -> None:
        """Let up to ``helpers`` threads call ``work``, now or a little later."""
        if self.threads < helpers:
            self._start(helpers)
        for _ in range(min(helpers, self.threads)):
            self._queue.put(work)

    def _start(self, helpers: int) -> None:
        with self._lock:
            while self.threads < helpers:
                name = f"vattn-stream-{self.threads}"
                thread = threading.Thread(target=serve, args=(self._queue,), name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no thread is to be had: the caller does the work alone
                    return
                self.threads += 1


def serve(queue: SimpleQueue[Work]) -> None:
    """Call what comes, for ever."""
    while True:
        work = queue.get()
        # What it raises is the caller's matter (`crew.Job`); this thread serves others, too.
        with suppress(Exception):
            work()
        # A finished call must not be kept alive by the thread that waits for the next one.
        del work


POOL = Pool()
