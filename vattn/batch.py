"""Sequences of one step, with their slots looked up once for many steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sequence import Sequence

Ints = NDArray[np.int64]


class Batch(NamedTuple):
    """Open sequences of one cache, each once. Made by `KVCache.batch`."""

    sequences: list[Sequence]
    slots: Ints
    consecutive: bool
    pick: slice | Ints  # picks the slots of an array; a slice, which is quicker, if consecutive


def batch_of(sequences: list[Sequence], slots: Ints) -> Batch:
    """A batch of sequences that were checked before."""
    consecutive = bool((slots[1:] - slots[:-1] == 1).all())
    dense = consecutive and len(slots) > 0
    pick = slice(int(slots[0]), int(slots[-1]) + 1) if dense else slots
    return Batch(sequences, slots, consecutive, pick)
