"""A log of which tokens each head keeps, step by step: for pictures and reports."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .batch import Ints
from .eviction import Eviction

HELD = -1  # in `KeepLog.gone`: no step has dropped it


class KeepLog:
    """Which tokens of a sequence every head of every layer holds, looked at after each step.

    Args:
        eviction: whose heads are looked at.
        sequence: which of the batch.
    """

    def __init__(self, eviction: Eviction, sequence: int = 0) -> None:
        self.eviction, self.sequence = eviction, sequence
        heads = eviction.heads
        self._gone = np.full((heads.layers, heads.kv_heads, 0), HELD, np.int64)
        self.tokens: list[int] = []  # of the text, at each look
        self.rows: list[float] = []  # that a head held on average

    def note(self) -> None:
        """Look now: after the prompt, and after each step."""
        heads, b = self.eviction.heads, self.sequence
        tokens = int(heads.tokens[:, b].max())
        step, more = len(self.tokens), tokens - self._gone.shape[2]
        if more > 0:
            wider = np.full((*self._gone.shape[:2], more), HELD, np.int64)
            self._gone = np.concatenate([self._gone, wider], axis=2)
        held = np.zeros((*self._gone.shape[:2], tokens), bool)
        for layer, rows in enumerate(held):
            positions, counts = heads.places(layer)[b].cpu().numpy(), heads.held(layer)[b]
            for row, at, count in zip(rows, positions, counts.tolist(), strict=True):
                row[at[:count]] = True
        now = self._gone[:, :, :tokens]
        now[~held & (now == HELD)] = step
        self.tokens.append(tokens)
        self.rows.append(float(held.sum()) / (heads.layers * heads.kv_heads))

    @property
    def gone(self) -> Ints:
        """The look that first missed each token, [layers, heads, tokens]; `HELD` for what is held
        still."""
        return self._gone

    def lifetimes(self) -> NDArray[np.float64]:
        """How long each head held each token, [layers * heads, tokens]: 0 for what the prompt's
        eviction dropped, then the share of the steps, and infinity for what is held still."""
        flat = self._gone.reshape(-1, self._gone.shape[2])
        return np.where(flat == HELD, np.inf, flat / max(1, len(self.tokens) - 1))
