"""A serving trace driven through a real KVCache: open, extend, commit, close; no row is written.

    arrival ──► open, map the prompt ──► 1 s of prefill ──► one token every 25 ms ──► close

Mapping does not depend on what the rows hold, and `KVCache.commit` counts rows without writing
them, so a whole hour of traffic is replayed in a minute and without memory for its tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bench.workload import Request
from vattn import KVCache, Layout
from vattn.allocator.errors import OutOfPages
from vattn.batch import Batch
from vattn.sequence import Sequence

STEP_SECONDS = 0.025
PREFILL_STEPS = 40
SAMPLE_STEPS = 10
BLOCK_TOKENS = 16  # of a paged cache, vLLM's default
RETRIES = 3


@dataclass
class Totals:
    """Bytes summed over the samples of a replay, one every 0.25 s, and peaks of single samples."""

    samples: int = 0
    used: int = 0  # rows of live tokens
    wasted: int = 0  # the rest of pages with live rows
    ahead: int = 0  # pages of open sequences without a live row: mapped ahead, or adopted
    parked: int = 0  # pages of closed sequences that wait to be adopted
    paged: int = 0  # what blocks of 16 tokens would hold
    reserved: int = 0  # what a reservation of the longest request for each would hold
    peak_used: int = 0
    peak_needed: int = 0
    peak_sequences: int = 0
    calls: int = 0  # to the system
    late: int = 0  # times that pages were short until the next step boundary

    @property
    def mapped(self) -> int:
        return self.used + self.wasted + self.ahead + self.parked


@dataclass
class Replay:
    """One trace on one layout. ``audit`` is called with the cache now and then.

    Raises:
        OutOfPages: from `run`: the budget did not cover the live sequences.
    """

    layout: Layout
    requests: list[Request]
    budget_bytes: int = 1 << 60
    retain_bytes: int | None = None
    audit: Callable[[KVCache], object] = lambda cache: None
    audits: int = 6
    totals: Totals = field(default_factory=Totals)

    def run(self) -> Totals:
        """Replay every request to its end."""
        arrivals = [int(request.at / STEP_SECONDS) for request in self.requests]
        slots = peak_sequences(self.requests)
        every = max(1, len(self.requests) // self.audits)
        with KVCache(
            self.layout,
            slots=slots,
            budget_bytes=self.budget_bytes,
            retain_bytes=self.retain_bytes,
        ) as cache:
            crowd = Crowd(cache, self.totals)
            step = 0
            for number, request in enumerate(self.requests):
                step = self._until(crowd, step, arrivals[number])
                crowd.arrive(request, arrivals[number])
                if number % every == every - 1:
                    self.audit(cache)
            self._until(crowd, step, 1 << 62)
            self.audit(cache)
            self.totals.calls = sum(cache.pool.backend.calls.values())
        return self.totals

    def _until(self, crowd: Crowd, step: int, end: int) -> int:
        """Decode steps ``step .. end``; idle time is skipped."""
        longest = self.layout.max_tokens
        while step < end and crowd.busy:
            crowd.step(step)
            if step % SAMPLE_STEPS == 0:
                crowd.sample(longest)
            step += 1
        return step if crowd.busy else end


class Crowd:
    """The sequences of a replay that are open now."""

    def __init__(self, cache: KVCache, totals: Totals) -> None:
        self.cache, self.totals = cache, totals
        self.open: dict[int, Sequence] = {}
        self._waiting: list[tuple[int, int, int]] = []  # (first decode step, slot, tokens to come)
        self._ending: list[tuple[int, int]] = []  # (step after the last token, slot)
        self._decoding: dict[int, Sequence] = {}
        self._batch: Batch | None = None

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def arrive(self, request: Request, step: int) -> None:
        """Open a sequence and map its prompt."""
        sequence = self.cache.open(tokens=request.input_tokens)
        self.open[sequence.slot] = sequence
        self._grow([sequence], request.input_tokens)
        begin = step + PREFILL_STEPS
        heapq.heappush(self._waiting, (begin, sequence.slot, _outputs(request)))

    def step(self, step: int) -> None:
        """One token for every sequence whose prefill is over."""
        while self._ending and self._ending[0][0] <= step:
            _, slot = heapq.heappop(self._ending)
            del self._decoding[slot]
            self.open.pop(slot).close()
            self._batch = None
        while self._waiting and self._waiting[0][0] <= step:
            _, slot, tokens = heapq.heappop(self._waiting)
            heapq.heappush(self._ending, (step + tokens, slot))
            self._decoding[slot] = self.open[slot]
            self._batch = None
        self.cache.advance()
        if self._decoding:
            if self._batch is None:
                self._batch = self.cache.batch(list(self._decoding.values()))
            self._grow(self._batch, 1)

    def sample(self, longest: int) -> None:
        """Add the bytes held now to the totals."""
        cache, totals, layout = self.cache, self.totals, self.cache.layout
        if not self.open:
            return
        slots = np.fromiter(self.open, np.int64)
        tokens = cache.tokens[slots]
        used = int(tokens.sum()) * layout.bytes_per_token
        needed = needed_bytes(layout, tokens)
        held = int((cache.arena.last[slots] - cache.arena.first[slots]).sum()) * layout.page
        mapped = cache.pool.mapped * layout.page  # nothing is shared: pages are mapped once
        totals.samples += 1
        totals.used += used
        totals.wasted += needed - used
        totals.ahead += held - needed
        totals.parked += mapped - held
        totals.paged += (
            int((-(-tokens // BLOCK_TOKENS)).sum()) * BLOCK_TOKENS * layout.bytes_per_token
        )
        totals.reserved += len(slots) * longest * layout.bytes_per_token
        totals.peak_sequences = max(totals.peak_sequences, len(slots))

    def _grow(self, sequences: list[Sequence] | Batch, tokens: int) -> None:
        """Map and count ``tokens`` more; short of pages, wait for step boundaries."""
        for turn in range(RETRIES):
            try:
                self.cache.extend(sequences, tokens)
                break
            except OutOfPages:
                if turn == RETRIES - 1:
                    raise
                self.totals.late += 1
                self.cache.advance()
        self.cache.commit(sequences, tokens)
        held = self.cache.tokens[np.fromiter(self.open, np.int64)]
        layout, totals = self.cache.layout, self.totals
        totals.peak_used = max(totals.peak_used, int(held.sum()) * layout.bytes_per_token)
        totals.peak_needed = max(totals.peak_needed, needed_bytes(layout, held))


def needed_bytes(layout: Layout, tokens: NDArray[np.int64]) -> int:
    """Bytes of pages that hold at least one of so many tokens, summed over sequences."""
    pages = -(-tokens * layout.row_bytes // layout.page)
    return int(pages.sum()) * layout.page * layout.lanes


def peak_sequences(requests: list[Request]) -> int:
    """Most sequences that are open at once in a replay."""
    peak = now = 0
    for change in _changes(requests):
        now += change
        peak = max(peak, now)
    return peak


def _changes(requests: list[Request]) -> Iterator[int]:
    """+1 and -1 in order of time; at the same step the arrival comes first, as in `Replay.run`."""
    events = []
    for request in requests:
        begin = int(request.at / STEP_SECONDS)
        events += [(begin, 0, 1), (begin + PREFILL_STEPS + _outputs(request), 1, -1)]
    return (change for _, _, change in sorted(events))


def _outputs(request: Request) -> int:
    """Decode steps of a request: at least one."""
    return max(1, request.output_tokens)
