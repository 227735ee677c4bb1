"""The table of all pages: state, references and owner of each id, and who hands out new ids.

Ids are file positions. A reservation's *homes* are one run of fresh ids (`extent`); pages that
cannot have their home's id get a *spare* id. Neither costs anything until a page is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ReserveError
from .quarantine import PageIds

FREE, WARM, MAPPED, QUARANTINED = 0, 1, 2, 3
MIXED = -1  # owner of a page that carries bytes of several tenants: never handed on unscrubbed
SPARE_IDS = 1024  # spare ids made at once
CHUNK = 1 << 20  # rows copied at once when the table grows


@dataclass(frozen=True)
class Taken:
    """What `Pool.take` handed out: page ids in goal order, and what is needed to undo it."""

    ids: PageIds
    before: NDArray[np.uint8]  # state of each page before: FREE or WARM
    stale: NDArray[np.bool_]  # pages that still carry another tenant's bytes
    owners: NDArray[np.int32]


def distinct(values: PageIds) -> PageIds:
    """The values, each once, ascending. They mostly are already, and then this costs one compare;
    np.unique would hash them all."""
    if len(values) < 2 or (values[1:] > values[:-1]).all():
        return values
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])]


class PageTable:
    """One row per id: ``state``, ``refs`` (addresses and exports), ``owner`` (tenant); ``twin``:
    one more than the id of an equal page in the lower tier, 0 for none (`tier`)."""

    def __init__(self) -> None:
        self.size = 0
        self.state: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.refs: NDArray[np.int32] = np.zeros(0, np.int32)
        self.owner: NDArray[np.int32] = np.zeros(0, np.int32)
        self.twin: NDArray[np.int64] = np.zeros(0, np.int64)
        self.spare: list[int] = []
        self._spare_ids: set[int] = set()
        self._extents: dict[int, list[int]] = {}  # pages -> first ids of extents to use again

    def extent(self, pages: int) -> int:
        """The first id of a run of ``pages`` ids that are nobody's home.

        Raises:
            ReserveError: no memory for so many rows.
        """
        again = self._extents.get(pages)
        return again.pop() if again else self._new_ids(pages)

    def forget(self, first: int, pages: int) -> None:
        """The extent at ``first`` is nobody's home any more."""
        self._extents.setdefault(pages, []).append(first)

    def take_spare(self, n: int) -> PageIds:
        """``n`` free ids that are nobody's home."""
        while len(self.spare) < n:
            first = self._new_ids(SPARE_IDS)
            self._spare_ids.update(range(first, first + SPARE_IDS))
            # Handed out from the end: keep the file order ascending.
            self.spare[:0] = range(first + SPARE_IDS - 1, first - 1, -1)
        out = self.spare[len(self.spare) - n :]
        del self.spare[len(self.spare) - n :]
        return np.array(out[::-1], np.int64)

    def recycle(self, ids: PageIds) -> None:
        """Ids that became free: spare ones are listed, homes are found by their address."""
        if self._spare_ids:
            self.spare.extend(i for i in reversed(ids.tolist()) if i in self._spare_ids)

    def _new_ids(self, pages: int) -> int:
        size = self.size + pages
        if size > len(self.state):
            # Untouched zeros cost nothing, so that terabytes of ids are free. Twice the size: rare.
            size = max(size + SPARE_IDS, 2 * len(self.state))
            try:
                rows = (self.state, self.refs, self.owner, self.twin)
                grown = [_grown(old, size) for old in rows]
            except (MemoryError, ValueError, OverflowError) as error:
                raise ReserveError(
                    f"no memory for a table of {size} pages. Use fewer slots, a smaller max_tokens "
                    "or larger pages."
                ) from error
            self.state, self.refs, self.owner, self.twin = grown
        first, self.size = self.size, self.size + pages
        return first


def _grown(old: NDArray[Any], size: int) -> NDArray[Any]:
    new = np.zeros(size, old.dtype)
    for start in range(0, len(old), CHUNK):
        part = old[start : start + CHUNK]
        if part.any():  # copying zeros would make them cost memory
            new[start : start + len(part)] = part
    return new
