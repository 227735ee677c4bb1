"""Who is told when rows of a cache change hands."""

from __future__ import annotations

from typing import Protocol

from .batch import Ints


class Follower(Protocol):
    """What is kept of a cache's rows beside them (records of keys, copies in another tier). It is
    told *after* rows have changed hands, and must not fail: what it cannot follow it forgets."""

    def shrunk(self, slots: Ints, layers: slice, tokens: int) -> None:
        """Of these slots and physical layers only the first ``tokens`` rows stay as they were."""

    def forked(self, source: int, target: int, tokens: int, tenant: int) -> None:
        """``target`` begins with the first ``tokens`` rows of ``source``, in every layer."""

    def permuted(self, slots: Ints, source: Ints, tenant: int) -> None:
        """``slots[i]`` holds what ``slots[source[i]]`` held."""

    def advanced(self) -> None:
        """A step boundary."""

    def closed(self) -> None:
        """The cache is closed."""
