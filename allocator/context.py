"""The primary context of a device, current on every thread that calls the driver.

The driver acts on the context that is current on the calling thread: on a thread without one it
refuses, on a thread that chose another device (``torch.cuda.set_device``) it would wait for that
one's work and not for ours. `current` sees to it at each call, and brings back what was there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from .driver import Driver
from .errors import ClosedError
from .process import forks


class Context:
    """The primary context of ``device``, the one that torch uses, too; retained until closed."""

    def __init__(self, driver: Driver, device: int) -> None:
        self.driver, self.device = driver, device
        self.number = driver.retain_context(device)
        self._pid, self.forks = os.getpid(), forks()
        self.open = True

    @property
    def foreign(self) -> bool:
        """Are we in a fork of the process that opened it?"""
        return self.forks != forks()

    def check(self) -> None:
        """Raises:
        ClosedError: closed, or in a fork."""
        if not self.open:
            raise ClosedError("the CUDA backend is closed")
        if self.forks != forks():
            raise ClosedError(
                f"this cache belongs to process {self._pid} and is not valid in its fork "
                f"{os.getpid()}; create it in the process that uses it, started by spawn"
            )

    def enter(self) -> bool:
        """`check`, and make it current on this thread; True if `leave` must follow."""
        self.check()
        return self.driver.enter(self.number)

    def leave(self) -> None:
        """Bring back the context that was current before."""
        self.driver.leave()

    def close(self) -> None:
        """Give it back."""
        self.open = False
        self.driver.release_context(self.device)


class _HasContext(Protocol):
    context: Context


S = TypeVar("S", bound=_HasContext)
P = ParamSpec("P")
T = TypeVar("T")


def current(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Have ``self.context`` current on this thread during a method; refuse if that is closed."""

    @wraps(method)
    def call(self: S, /, *args: P.args, **options: P.kwargs) -> T:
        # At every verb: the usual case, our context on an old thread, asks the driver one question.
        context = self.context
        if context.open and context.forks == forks() and context.driver.current() == context.number:
            return method(self, *args, **options)
        entered = context.enter()
        try:
            return method(self, *args, **options)
        finally:
            if entered:
                context.leave()

    return call
