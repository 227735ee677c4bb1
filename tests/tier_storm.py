"""Random operations on a cache with tiers beside a model: a number for every row.

Each row of K holds one number in all its elements, and V its negative; numbers are used once, so a
row that came from anywhere else is seen. After each operation one sequence is read whole and, now
and then, every law is asserted over every page.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import torch

from vattn.allocator.checked import CheckedBackend
from vattn.allocator.errors import DriverError, OutOfPages, OutOfRange
from vattn.allocator.mover import Move
from vattn.allocator.pool import Pool
from vattn.allocator.vmm import Backend
from vattn.cache import KVCache
from vattn.layout import Layout
from vattn.sequence import Sequence
from vattn.tiers import Tiers

LAYERS, HEADS, DIM, SLOTS, MOST = 2, 2, 8, 6, 1000
AUDIT = 200  # operations between two looks at everything
WEIGHTS = {
    "append": 36,
    "commit": 4,
    "demote": 12,
    "promote": 12,
    "start": 8,
    "prefetch": 5,
    "touch": 3,
    "cancel": 1,
    "settle": 4,
    "advance": 8,
    "fork": 5,
    "truncate": 8,
    "reorder": 2,
    "close": 4,
    "budget": 2,
}


class TierStorm:
    """A cache with tiers, and the numbers that its rows must show.

    Attributes: ``done`` operations by name; ``failures`` calls that were made to fail.
    """

    def __init__(self, backend: Backend, *, seed: int, victims: str = "lru") -> None:
        self.random = random.Random(seed)
        self.backend = CheckedBackend(backend)
        page = backend.page_bytes
        many = {"rows": self.random.choice(["head_major", "token_major"])}
        layout = Layout(LAYERS, HEADS, DIM, MOST, dtype="float32", page_bytes=page, **many)
        self.pool = Pool(self.backend, budget_bytes=300 * page)
        self.cache = KVCache(layout, slots=SLOTS, pool=self.pool)
        self.tiers = Tiers(self.cache, slow_bytes=200 * page, victims=victims)
        self.tiers.mover.piece_pages = self.random.randint(1, 6)
        self.rows: dict[Sequence, list[torch.Tensor]] = {}
        self.moves: list[Move] = []
        self.stamp = self.failures = 0
        self.done: Counter[str] = Counter()

    def run(self, operations: int) -> None:
        """So many operations, and the end of everything."""
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        for name in self.random.choices(names, weights, k=operations):
            self.step(name)
            if sum(self.done.values()) % AUDIT == 0:
                self.audit()
        self.end()

    def step(self, name: str) -> None:
        """One operation, of which some call may fail; then it changed nothing that can be read."""
        self.done[name] += 1
        if not self.rows:
            self.rows[self.cache.open()] = [torch.zeros(0) for _ in range(LAYERS)]
        sequence = self.random.choice(list(self.rows))
        if self.random.random() < 0.02:
            self.backend.fail_at = self.backend.count + self.random.randint(0, 4)
        try:
            getattr(self, name)(sequence)
        except OutOfPages:
            self.done["out of pages"] += 1
        except DriverError as error:
            if "Injected" not in str(error):
                raise
            self.failures += 1
        finally:
            self.backend.fail_at = None
        if sequence in self.rows:
            self.verify(sequence)

    # ---- operations --------------------------------------------------------------------------
    def append(self, sequence: Sequence) -> None:
        count = self.random.choice([1, 1, 2, 17, 60])
        if len(self.rows[sequence][0]) + count > MOST:
            return self.truncate(sequence)
        for layer in range(LAYERS):
            new = self.numbers(count)
            k = new[:, None].expand(1, HEADS, count, DIM)
            self.cache.append(layer, k, -k, [sequence])
            self.rows[sequence][layer] = torch.cat([self.rows[sequence][layer], new])
        return None

    def commit(self, sequence: Sequence) -> None:
        """Rows written through a tensor, as a compiled graph does."""
        count = self.random.choice([1, 5, 40])
        if max(len(rows) for rows in self.rows[sequence]) + count > MOST:
            return
        self.cache.extend([sequence], count)
        for layer in range(LAYERS):
            new = self.numbers(count)
            rows = slice(len(self.rows[sequence][layer]), len(self.rows[sequence][layer]) + count)
            for side, sign in zip(self.cache.reserved(layer), (1, -1), strict=True):
                side[sequence.slot, :, rows] = sign * new[:, None]
            self.cache.commit([sequence], count, layer)
            self.rows[sequence][layer] = torch.cat([self.rows[sequence][layer], new])

    def numbers(self, count: int) -> torch.Tensor:
        """New ones: [count] float32."""
        self.stamp += count
        return torch.arange(self.stamp - count, self.stamp, dtype=torch.float32) % (1 << 23)

    def some(self, sequence: Sequence) -> tuple[int | None, tuple[int, int] | None]:
        """A layer or all, and a range of tokens or all."""
        layer = self.random.choice([None, *range(LAYERS)])
        length = max(len(rows) for rows in self.rows[sequence])
        first = self.random.randint(0, length)
        return layer, self.random.choice([None, (first, self.random.randint(first, length))])

    def demote(self, sequence: Sequence) -> None:
        self.tiers.demote(sequence, *self.some(sequence), tail=self.random.random() < 0.2)

    def promote(self, sequence: Sequence) -> None:
        self.tiers.promote(sequence, *self.some(sequence))

    def start(self, sequence: Sequence) -> None:
        begin = self.random.choice([self.tiers.start_demote, self.tiers.start_promote])
        self.moves.append(begin(sequence, *self.some(sequence)))

    def prefetch(self, sequence: Sequence) -> None:
        tokens = np.array([self.random.randrange(MOST) for _ in range(5)])
        move = self.tiers.prefetch(sequence, self.random.randrange(LAYERS), tokens)
        self.moves += [move] if move else []

    def touch(self, sequence: Sequence) -> None:
        self.tiers.touch(sequence, self.random.randrange(LAYERS), self.some(sequence)[1])

    def cancel(self, sequence: Sequence) -> None:
        for move in self.moves:
            move.cancel()

    def settle(self, sequence: Sequence) -> None:
        if self.moves and self.random.random() < 0.5:
            assert self.moves.pop().wait(30)
        self.tiers.settle()

    def advance(self, sequence: Sequence) -> None:
        self.cache.advance()
        self.moves = [move for move in self.moves if not move.done]

    def fork(self, sequence: Sequence) -> None:
        if len(self.rows) < SLOTS:
            tokens = self.random.randint(0, min(len(rows) for rows in self.rows[sequence]))
            try:
                child = sequence.share(tokens)
            except OutOfRange:  # a closed slot waits for its pages
                return
            self.rows[child] = [rows[:tokens] for rows in self.rows[sequence]]

    def truncate(self, sequence: Sequence) -> None:
        length = min(len(rows) for rows in self.rows[sequence])
        tokens = self.random.randint(max(0, length - 100), length)
        sequence.truncate(tokens)
        self.rows[sequence] = [rows[:tokens] for rows in self.rows[sequence]]

    def reorder(self, sequence: Sequence) -> None:
        many = list(self.rows)
        order = [self.random.randrange(len(many)) for _ in many]
        self.cache.reorder(many, order)
        old = list(self.rows.values())
        for one, source in zip(many, order, strict=True):
            self.rows[one] = list(old[source])

    def close(self, sequence: Sequence) -> None:
        del self.rows[sequence]
        sequence.close()

    def budget(self, sequence: Sequence) -> None:
        self.cache.set_budget(self.random.randint(60, 300) * self.pool.page_bytes)

    # ---- laws --------------------------------------------------------------------------------
    def verify(self, sequence: Sequence) -> None:
        """Every row of one layer shows its number."""
        layer = self.random.randrange(LAYERS)
        want = self.rows[sequence][layer]
        assert torch.equal(sequence.k[layer], want[:, None].expand(HEADS, len(want), DIM))
        assert torch.equal(sequence.v[layer], -want[:, None].expand(HEADS, len(want), DIM))

    def audit(self) -> None:
        """All rows, all laws."""
        for sequence in self.rows:
            self.verify(sequence)
        self.cache.check()
        table, arena = self.pool.table, self.cache.arena
        refs = np.bincount(arena.entry[arena.entry > 0] - 1, minlength=table.size)
        extra = table.refs[: table.size] - refs
        assert extra.min() >= 0, "a page has an address too many"
        owed = self.tiers.slow.copies + self.held()
        assert extra.sum() == owed, f"{extra.sum()} holders without an address, {owed} known"

    def held(self) -> int:
        """References of moves under way: one of each source, one of each new target."""
        mover = self.tiers.mover
        return sum(len(p.source) + len(p.fresh) for p in mover.under_way)

    def end(self) -> None:
        """Nothing is left."""
        self.audit()
        self.cache.close()
        slow = self.tiers.slow
        assert (self.pool.mapped, slow.mapped, slow.copies) == (0, 0, 0)
        self.pool.advance()
        self.pool.trim()
        slow.trim()
        self.pool.check()
        assert (self.pool.created, slow.created) == (0, 0)
        assert self.backend.resident_bytes() == 0
        assert self.backend.tier_bytes() == 0
        self.pool.close()
