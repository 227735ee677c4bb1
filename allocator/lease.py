"""A live view keeps its slots mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .arena import Arena
    from .record import Ints

ATOMIC_SLOTS = 256  # numpy lets other threads run in the middle of loops over more than 500


class Lease:
    """Keeps slots ``first .. last`` of an arena mapped for as long as it lives."""

    __slots__ = ("_arena", "_first", "_last")

    def __init__(self, arena: Arena, first: int, last: int) -> None:
        self._first, self._last = first, last
        _count(arena.pins, first, last, 1)
        self._arena = arena

    def __del__(self) -> None:
        arena = getattr(self, "_arena", None)
        if arena is None:
            return
        # On any thread, and in the middle of anything: the count is one step of the interpreter,
        # and a change that saw the pin has left the pages alone.
        _count(arena.pins, self._first, self._last, -1)
        if arena.closed:
            arena.turn.soon(arena.settle_quietly)


def _count(pins: Ints, first: int, last: int, change: int) -> None:
    for start in range(first, last, ATOMIC_SLOTS):
        part = pins[start : min(start + ATOMIC_SLOTS, last)]
        np.add(part, change, out=part)
