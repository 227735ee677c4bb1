"""Waiting for a device that runs behind the host.

wait      blocks until the work submitted before is done: before pages are unmapped
fence     events on the streams, asked later, never blocking: before pages are used again
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from .context import Context, current
from .errors import DriverError

Streams = Callable[[], Iterable[int]]


class Fences:
    """Waits and events of one context.

    Attributes: ``streams`` names the streams whose work counts, None for all of the context;
    ``waits`` waits that ended.
    """

    def __init__(self, context: Context, streams: Streams | None) -> None:
        self.context, self.driver, self.streams = context, context.driver, streams
        self.waits = 0
        self._events: list[int] = []
        self._idle: list[int] = []  # those of them that nobody asks about

    def wait(self) -> None:
        """Until the work submitted before is done. Our context has to be current, also for streams:
        the default one is that of the current context."""
        context = self.context
        entered = self.driver.current() != context.number and context.enter()
        try:
            if self.streams is None:
                self.driver.synchronize()
            else:
                for stream in self.streams():
                    self.driver.synchronize_stream(stream)
        finally:
            if entered:
                context.leave()
        self.waits += 1

    def fence(self) -> Callable[[], bool] | None:
        """Something to ask whether the work submitted until now to ``streams`` is done; None where
        `wait` has waited for all there is. Neither raises: a device that cannot answer has not
        reached it."""
        if self.streams is None or not self.context.open or self.context.foreign:
            return None
        try:
            events = self._record(self.streams())
        except DriverError:
            return lambda: self._answer(self._all_done)
        return lambda: self._answer(lambda: self._reached(events))

    def close(self) -> None:
        """Destroy all events, as far as the driver takes it. The context is current."""
        for event in self._events:
            with suppress(DriverError):
                self.driver.destroy_event(event)
        self._events.clear()
        self._idle.clear()

    # ---- inside ------------------------------------------------------------------------------
    @current
    def _record(self, streams: Iterable[int]) -> list[int]:
        events: list[int] = []
        for stream in streams:
            if not self._idle:
                self._events.append(self.driver.create_event())
                self._idle.append(self._events[-1])
            self.driver.record(self._idle[-1], stream)
            events.append(self._idle.pop())
        return events

    @current
    def _reached(self, events: list[int]) -> bool:
        while events and self.driver.reached(events[-1]):
            self._idle.append(events.pop())
        return not events

    @current
    def _all_done(self) -> bool:
        self.driver.synchronize()
        return True

    def _answer(self, ask: Callable[[], bool]) -> bool:
        try:
            return not self.context.open or ask()
        except DriverError:
            return False
