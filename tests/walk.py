"""A random walk over a cache with a selector and tiers, beside plain tensors that say what is true.

python -m tests.walk OPERATIONS SEED      one walk again
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import vattn
from vattn import KVCache, Layout
from vattn.allocator.errors import OutOfPages
from vattn.kernels.kv import KV
from vattn.kernels.sparse import gathered
from vattn.policies import Quest, Signs
from vattn.sequence import Sequence
from vattn.sparse import SparseAttention
from vattn.tiers import Tiers

LAYERS, HEADS, GROUPS, DIM, MOST = 2, 2, 2, 16, 900
PAGE, PAGES = 4096, 220  # of the fast tier
ACTS = {
    "append": 30,
    "select": 25,
    "demote": 8,
    "promote": 6,
    "prefetch": 6,
    "truncate": 5,
    "fork": 5,
    "reorder": 2,
    "close": 5,
    "advance": 8,
}


@dataclass
class Twin:
    """A sequence and the rows it should hold, K and V of each layer: [2, layers, Hkv, n, D]."""

    sequence: Sequence
    rows: Tensor


class Walk:
    """One walk; `step` does one random operation and checks what it can see of it."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.draw = torch.Generator().manual_seed(seed)
        layout = Layout(LAYERS, HEADS, DIM, 1024, dtype="float32", page_bytes=PAGE)
        self.cache = KVCache(layout, slots=10, budget_bytes=PAGES * PAGE)
        victims = ("lru", "fifo", "counter")[seed % 3]
        self.tiers = Tiers(self.cache, slow_bytes=8 * PAGES * PAGE, victims=victims)
        kind = (Quest, Signs)[seed % 2]
        selector = kind(budget_tokens=96, page_tokens=16 if kind is Quest else 1, recent_tokens=16)
        self.sparse = SparseAttention(self.cache, selector, self.tiers)
        self.live: list[Twin] = []
        self.done: Counter[str] = Counter()
        self.read: list = []
        self.sparse.watchers.append(lambda layer, slots, selection: self.read.append(selection))

    def walk(self, operations: int) -> Counter[str]:
        """So many operations; then everything is looked at, closed and accounted for."""
        names = list(ACTS)
        odds = np.array(list(ACTS.values())) / sum(ACTS.values())
        for number, act in enumerate(self.random.choice(names, operations, p=odds)):
            getattr(self, str(act))()
            self.done[str(act)] += 1
            if number % 500 == 0:
                self.check()
        self.check()
        for twin in self.live:
            twin.sequence.close()
        self.tiers.close()
        self.cache.trim()
        assert self.cache.pool.mapped == 0, "pages leaked"
        self.cache.check()
        self.cache.close()
        return self.done

    def check(self) -> None:
        """Every row of every sequence, bit by bit, and every law."""
        for twin in self.live:
            for layer in range(LAYERS):
                assert torch.equal(twin.sequence.k[layer], twin.rows[0, layer])
                assert torch.equal(twin.sequence.v[layer], twin.rows[1, layer])
        self.cache.check()
        self.sparse.records.check()

    # ---- operations ------------------------------------------------------------------------------
    def append(self) -> None:
        if not self.live or (len(self.live) < 6 and self.random.random() < 0.2):
            self.live.append(Twin(self.cache.open(), torch.zeros(2, LAYERS, HEADS, 0, DIM)))
        twin = self._one()
        count = int(self.random.integers(1, 40 if self.random.random() < 0.9 else 300))
        if twin.rows.shape[3] + count > MOST:
            return
        rows = torch.randn(2, LAYERS, HEADS, count, DIM, generator=self.draw)
        try:
            self.cache.extend([twin.sequence], count)
        except OutOfPages:
            self.done["refused"] += 1
            return
        for layer in range(LAYERS):
            self.cache.append(layer, rows[0, layer][None], rows[1, layer][None], [twin.sequence])
        twin.rows = torch.cat([twin.rows, rows], 3)

    def select(self) -> None:
        if not self.live:
            return
        twin, layer = self._one(), int(self.random.integers(LAYERS))
        n = twin.rows.shape[3]
        tokens = int(self.random.integers(1, 4))
        if n < tokens:
            return
        query = torch.randn(1, HEADS * GROUPS, tokens, DIM, generator=self.draw)
        self.read.clear()
        view = self.cache.view([twin.sequence])
        try:
            out = self.sparse.attend(query, view, layer)
        except OutOfPages:
            self.done["refused"] += 1
            return
        if not self.read:
            assert n <= self.sparse.selector.budget_tokens
            assert torch.equal(out, vattn.attend(query, view, layer))
            return
        truth = KV(twin.rows[0, layer][None].contiguous(), twin.rows[1, layer][None].contiguous())
        want = gathered(query, truth, self.read[0])[0]
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        self.done["chosen"] += 1

    def demote(self) -> None:
        self._move(self.tiers.demote, self.tiers.start_demote)

    def promote(self) -> None:
        self._move(self.tiers.promote, self.tiers.start_promote)

    def prefetch(self) -> None:
        if self.live:
            twin = self._one()
            tokens = self.random.integers(0, max(1, twin.rows.shape[3]), 20)
            if twin.rows.shape[3]:
                self.tiers.prefetch(twin.sequence, int(self.random.integers(LAYERS)), tokens)

    def truncate(self) -> None:
        if self.live:
            twin = self._one()
            keep = int(self.random.integers(0, twin.rows.shape[3] + 1))
            twin.sequence.truncate(keep)
            twin.rows = twin.rows[:, :, :, :keep]

    def fork(self) -> None:
        if self.live and len(self.live) < 7:
            twin = self._one()
            keep = int(self.random.integers(0, twin.rows.shape[3] + 1))
            try:
                child = twin.sequence.share(keep)
            except OutOfPages:
                self.done["refused"] += 1
                return
            self.live.append(Twin(child, twin.rows[:, :, :, :keep]))

    def reorder(self) -> None:
        if len(self.live) > 1:
            order = self.random.integers(0, len(self.live), len(self.live))
            try:
                self.cache.reorder([twin.sequence for twin in self.live], order.tolist())
            except OutOfPages:
                self.done["refused"] += 1
                return
            rows = [self.live[i].rows for i in order]
            for twin, some in zip(self.live, rows, strict=True):
                twin.rows = some

    def close(self) -> None:
        if len(self.live) > 2:
            twin = self.live.pop(int(self.random.integers(len(self.live))))
            twin.sequence.close()

    def advance(self) -> None:
        self.cache.advance()

    # ---- inside --------------------------------------------------------------------------------
    def _one(self) -> Twin:
        return self.live[int(self.random.integers(len(self.live)))]

    def _move(self, now, soon) -> None:
        if not self.live:
            return
        twin = self._one()
        n = twin.rows.shape[3]
        first, last = sorted(self.random.integers(0, n + 1, 2).tolist())
        layer = None if self.random.random() < 0.3 else int(self.random.integers(LAYERS))
        try:
            move = (now if self.random.random() < 0.5 else soon)(
                twin.sequence, layer, (first, last)
            )
        except OutOfPages:
            self.done["refused"] += 1
            return
        if not isinstance(move, int) and self.random.random() < 0.1:
            move.cancel()


if __name__ == "__main__":
    print(Walk(int(sys.argv[2])).walk(int(sys.argv[1])))
