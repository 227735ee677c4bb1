"""Numbers beside the rows of a `HeadCache`: positions, scores, weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.evict import Lines


class Track:
    """A number for each row of each range of a layer: [batch, kv_heads, n], growing at its end.

    Ordinary tensors even where they are made under inference_mode: later steps write to them.
    """

    def __init__(self, batch: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.zeros(batch, kv_heads, 0, dtype=dtype, device=device)
        self._slots = torch.arange(batch * kv_heads, device=device)
        self._lines: Lines | None = None  # of these rows

    def get(self, longest: int) -> Tensor:
        """The first ``longest`` numbers of each range; 0 where none was set. A view to write to."""
        have = self._rows.shape[2]
        if have < longest:
            self._grow(max(longest - have, have // 2))
        return self._rows[:, :, :longest]

    @torch.inference_mode(False)
    def _grow(self, rows: int) -> None:
        self._rows, self._lines = torch.nn.functional.pad(self._rows, (0, rows)), None

    @torch.inference_mode(False)
    def keep(self, rows: Tensor) -> None:
        """Rows [batch, kv_heads, m] become the first m; what lies behind is 0."""
        self._rows, self._lines = self._rows.gather(2, rows), None

    def move(self, sequence: Tensor, head: Tensor, row: Tensor, source: Tensor) -> None:
        """The number of row ``source`` goes to ``row``, of each sequence and head."""
        self._rows[sequence, head, row] = self._rows[sequence, head, source]

    def lines(self, longest: int) -> Lines:
        """The numbers of ``longest`` rows, as `kernels.evict.drop` moves them."""
        self.get(longest)
        if self._lines is None:
            self._lines = Lines(self._rows.flatten(0, 1)[..., None], self._slots, clear=True)
        return self._lines

    def clear_behind(self, counts: Tensor) -> None:
        """Numbers of rows from ``counts`` [batch, kv_heads] on become 0."""
        at = torch.arange(self._rows.shape[2], device=self._rows.device)
        self._rows.masked_fill_(at >= counts[..., None], 0)
