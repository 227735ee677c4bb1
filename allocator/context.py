"""The primary context of a device: which calls need it, and how they find it.

Some of the driver's calls act on the context that is current on the calling thread: on a thread
without one they refuse, on a thread that chose another device (``torch.cuda.set_device``, another
library's cuCtxSetCurrent or cuCtxPushCurrent, at any time and without telling us) they would wait
for that one's work and not for ours. Others name all that they act on:

    cuMemAddressReserve, cuMemAddressFree        address space of the process
    cuMemCreate, cuMemRelease, export, import    a handle; its device is in the properties
    cuMemMap, cuMemUnmap, cuMemSetAccess         addresses, handles, and the devices with access

cuda.h lists CUDA_ERROR_INVALID_CONTEXT for none of these, but for cuCtxSynchronize, cuMemGetInfo,
cuMemset*, cuMemcpy*, cuStreamSynchronize, cuEventRecord and whatever makes a stream or an event.

`current` is for methods with calls of the second kind: it asks at each which context is current,
because nothing else could know, and brings back what was there. The verbs of every step (map,
remap, unmap) make calls of the first kind, and only `check`; their waits and zeroing ask. The rarer
verbs of the first kind ask, too: it is a fraction of what they cost. Should a driver insist on a
context for mapping all the same, `Driver` gives ours to a thread that has none.
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
        self.number = driver.home = driver.retain_context(device)
        self._pid, self.forks = os.getpid(), forks()
        self.open = True

    @property
    def foreign(self) -> bool:
        """Are we in a fork of the process that opened it?"""
        return self.forks != forks()

    def check(self) -> None:
        """Raises:
        ClosedError: closed, or in a fork."""
        if self.open and self.forks == forks():
            return
        if not self.open:
            raise ClosedError("the CUDA backend is closed")
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
        # The usual case, our context on an old thread, asks the driver one question.
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
