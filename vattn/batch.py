"""Sequences of one step, with their slots looked up once for many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sequence import Sequence

if TYPE_CHECKING:
    from .cache import KVCache

Ints = NDArray[np.int64]


class Batch(NamedTuple):
    """Open sequences of one cache, each once. Made by `KVCache.batch`; good until one closes."""

    cache: KVCache
    sequences: list[Sequence]
    slots: Ints
    consecutive: bool
    pick: slice | Ints  # picks the slots of an array; a slice, which is quicker, if consecutive
    generations: Ints  # of the slots, when the batch was made
    closings: int  # of the cache until then: while it stays, no slot need be looked at
    tenant: int | Ints  # of all sequences; where they differ, one for each slot of the cache


def batch_of(cache: KVCache, sequences: list[Sequence], closings: int) -> Batch:
    """A batch of open sequences, one or more, that differ."""
    slots = np.array([sequence.slot for sequence in sequences], np.int64)
    consecutive = bool((slots[1:] - slots[:-1] == 1).all())
    pick = slice(int(slots[0]), int(slots[-1]) + 1) if consecutive else slots
    tenant: int | Ints = sequences[0].tenant
    if any(sequence.tenant != tenant for sequence in sequences):
        tenant = np.zeros(cache.slots, np.int64)
        tenant[slots] = [sequence.tenant for sequence in sequences]
    opened = cache.opened[pick].copy()
    return Batch(cache, sequences, slots, consecutive, pick, opened, closings, tenant)
