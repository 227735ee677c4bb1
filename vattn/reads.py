"""A log of which tokens one layer of one sequence reads, step by step: for pictures and reports."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .batch import Ints
from .kernels.selection import Selection
from .sparse import SparseAttention

MOST_STEPS = 4096  # kept: the latest


class ReadLog:
    """What a layer reads of the sequence in a slot, while this is attached.

    Args:
        sparse: whose selections are watched.
        layer, slot: which. Steps that read everything are not logged.
    """

    def __init__(self, sparse: SparseAttention, layer: int, slot: int) -> None:
        self.sparse, self.layer, self.slot = sparse, layer, slot
        self._steps: list[tuple[int, list[Ints]]] = []
        sparse.watchers.append(self._note)

    def _note(self, layer: int, slots: Ints, selection: Selection) -> None:
        found = np.flatnonzero(slots == self.slot)
        if layer != self.layer or not len(found):
            return
        b = int(found[0])
        ids, counts = selection.ids[b].cpu().numpy(), selection.count[b].tolist()
        heads = [row[:n].astype(np.int64) for row, n in zip(ids, counts, strict=True)]
        self._steps = [*self._steps[-(MOST_STEPS - 1) :], (selection.page_tokens, heads)]

    @property
    def steps(self) -> int:
        """Steps logged."""
        return len(self._steps)

    def shares(self, page_tokens: int, tokens: int) -> NDArray[np.float32]:
        """How much of each span of ``page_tokens`` tokens was read: [steps, spans] from 0 to 1,
        over the KV heads and the span's tokens."""
        spans = -(-tokens // page_tokens)
        out = np.zeros((len(self._steps), spans), np.float32)
        for row, (size, heads) in zip(out, self._steps, strict=True):
            for ids in heads:
                read = (ids[:, None] * size + np.arange(size)).ravel()
                read = read[read < tokens]
                row += np.bincount(read // page_tokens, minlength=spans)
            row /= max(1, len(heads))
        held = np.minimum(np.arange(1, spans + 1) * page_tokens, tokens)
        return (out / (held - np.arange(spans) * page_tokens)).astype(np.float32)

    def close(self) -> None:
        """Stop logging. Idempotent."""
        if self._note in self.sparse.watchers:
            self.sparse.watchers.remove(self._note)
