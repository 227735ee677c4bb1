"""One change at a time, and none is torn apart: the turn that every change of a pool takes.

Three things may break into a change between two lines of Python:

- *Ctrl-C*: KeyboardInterrupt is raised between any two bytecodes of the main thread, also between a
  system call and the line that records it.
- *The garbage collector*: it may run any destructor at any allocation, also that of a view whose
  death gives an arena back, in the middle of a change of the same pool.
- *Another thread*: it may drop the last reference to a view.

Things that do not work: to block SIGINT (``pthread_sigmask``) only moves the signal to another
thread, whose C handler still makes the main thread raise; ``try/finally`` has gaps of its own; a
lock taken by a destructor waits for the thread that it interrupts, for ever.

So a turn holds a lock, and the main thread's SIGINT handler is exchanged for one that remembers.
Destructors never wait: they leave their work to be done at the end of the running turn (`soon`).
"""

from __future__ import annotations

import os
from _signal import SIGINT, getsignal, signal  # type: ignore[import-not-found]  # no enums: 10x
from _thread import allocate_lock, get_ident
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from .errors import ClosedError
from .process import forks, main_thread


class Turn:
    """A reentrant ``with`` block: one thread at a time, interrupts wait for its end.

    Raises:
        ClosedError: entered in a fork of the process that made it.
    """

    __slots__ = ("_after", "_depth", "_forks", "_handler", "_interrupt", "_lock", "_owner", "_pid")

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._owner = self._depth = 0
        self._after: deque[Callable[[], None]] = deque()
        self._handler: Any = None
        self._interrupt: FrameType | None = None
        self._pid, self._forks = os.getpid(), forks()

    @property
    def foreign(self) -> bool:
        """Are we in a fork of the process that made this?"""
        return self._forks != forks()

    def __enter__(self) -> None:
        # Twice a microsecond at every step of every sequence: no calls that can be avoided.
        me = get_ident()
        if self._owner == me:
            self._depth += 1
            return
        if self._forks != forks():
            raise ClosedError(
                f"this memory belongs to process {self._pid} and is not valid in its fork "
                f"{os.getpid()}; create a cache in the process that uses it"
            )
        handler = self._hold() if me == main_thread() else None
        self._lock.acquire()
        self._owner, self._depth, self._handler = me, 1, handler

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        handler, self._handler, self._owner = self._handler, None, 0
        self._lock.release()
        # Only now: work left by a destructor that found the lock taken is seen here or by a later
        # turn, never by nobody.
        try:
            if self._after:
                self._flush()
        finally:
            if handler is not None:
                self._let_go(handler)

    def soon(self, act: Callable[[], None]) -> None:
        """Do ``act`` now, or at the end of the running turn. For destructors: never waits."""
        if self.foreign:
            return
        self._after.append(act)
        handler = self._hold() if get_ident() == main_thread() else None
        try:
            self._flush()
        finally:
            if handler is not None:
                self._let_go(handler)

    def _flush(self) -> None:
        while self._after and self._lock.acquire(blocking=False):
            self._owner, self._depth = get_ident(), 1
            try:
                if self._after:
                    self._after.popleft()()
            finally:
                self._owner = self._depth = 0
                self._lock.release()

    # ---- interrupts --------------------------------------------------------------------------
    def _hold(self) -> Any:
        """Exchange the handler of SIGINT; returns the old one, None if there is nothing to hold."""
        handler = getsignal(SIGINT)
        remember = self._remember
        if handler == remember or not callable(handler):
            return None
        try:
            signal(SIGINT, remember)
        except ValueError:  # a sub-interpreter: its main thread gets no signals
            return None
        return handler

    def _let_go(self, handler: Any) -> None:
        signal(SIGINT, handler)
        frame, self._interrupt = self._interrupt, None
        if frame is not None:
            handler(SIGINT, frame)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._interrupt = frame
