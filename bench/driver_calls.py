"""Driver calls of steady serving: how many, and what not calling costs in memory.

256 sequences of an 8B model (128 KiB a token, all layers in one lane, 2 MiB pages) decode at once
on the emulated device; one that ends is replaced in the same step by a request drawn from the Azure
conversation sample. Calls are counted by the emulator, in the second half of the steps.

    calls      cuMemMap + cuMemSetAccess + cuMemUnmap a step
    adopted    admissions whose whole prompt lay in pages that were mapped already
    unused     mapped pages without a live row / mapped pages

`keep` retains everything, `bounded` as many bytes as the target of `unused` leaves, `lean` nothing:
the fewer calls, the more pages wait. `least` is what no policy without calls can go below, even one
that knows at admission how long each answer will be and packs perfectly: nothing is mapped later,
so the pages of a sequence's last token are there from its first, and at the fullest moment those of
all sequences at once. `fixed` is the same without the first half of the argument: the pages that
are live at the fullest moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from bench.emulated import counts, open_backend, open_emulator
from bench.harness import Bench
from bench.replay import needed_bytes
from bench.workload import Request, load
from vattn import KVCache, Layout
from vattn.allocator.pool import Pool
from vattn.sequence import Sequence

SHAPE_8B = (32, 8, 128)
PAGE_BYTES = 2 << 20
SPARE_SLOTS = 16  # beside the batch: parked slots of several sizes to choose from
UNUSED = 0.05
BUDGET = 1 << 45  # never short: retaining is what is looked at


@dataclass
class Steady:
    """A batch that is always full. `run` gives the figures of the second half."""

    cache: KVCache
    requests: list[Request]
    batch: int
    rng: np.random.Generator
    emulator: Any
    open: dict[int, Sequence] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)  # slot -> step
    last: dict[int, int] = field(default_factory=dict)  # slot -> tokens at its end
    prompts: list[bool] = field(default_factory=list)  # of each admission: adopted?
    calls: list[int] = field(default_factory=list)  # of each step
    pages: list[tuple[int, int, int]] = field(default_factory=list)  # mapped, live, at the end

    def run(self, steps: int) -> Steady:
        """All steps; the first half is warm-up."""
        for step in range(steps):
            before = self._calls()
            self._end(step)
            self._admit(step)
            batch = self.cache.batch(list(self.open.values()))
            self.cache.extend(batch, 1)
            self.cache.commit(batch, 1)
            self.cache.advance()
            self.calls.append(self._calls() - before)
            live = self._pages(self.cache.tokens[batch.slots])
            self.pages.append((self.cache.pool.mapped, live, self._pages(self._last())))
            if step == steps // 2:
                self.prompts.clear()
        self.calls, self.pages = self.calls[steps // 2 :], self.pages[steps // 2 :]
        return self

    @property
    def unused(self) -> float:
        """Mapped pages without a live row, of all mapped pages."""
        mapped, live, _ = np.array(self.pages).sum(axis=0)
        return 1 - live / mapped

    @property
    def fixed(self) -> float:
        """`unused` of the smallest set of pages that holds every step."""
        live = np.array(self.pages)[:, 1]
        return float(1 - live.mean() / live.max())

    @property
    def least(self) -> float:
        """`unused` of the smallest set that holds every sequence from its first to its last token,
        where it lies: without calls nothing can be mapped in between."""
        _, live, last = np.array(self.pages).T
        return float(1 - live.mean() / last.max())

    def check(self) -> bool:
        """The device has mapped what the cache says, and every sequence has its tokens."""
        self.cache.check()
        assert self.emulator.live.mappings == self.cache.pool.mapped, "mappings of the device"
        assert len(self.open) == self.batch, "the batch was not full"
        assert self.emulator.faults == 0, self.emulator.fault
        tokens = self.cache.tokens[list(self.open)]
        assert bool((tokens <= self.cache.room[list(self.open)]).all()), "rows that are not mapped"
        return True

    def _last(self) -> NDArray[np.int64]:
        return np.array([self.last[slot] for slot in self.open], np.int64)

    def _pages(self, tokens: NDArray[np.int64]) -> int:
        return needed_bytes(self.cache.layout, tokens) // self.cache.layout.page

    def _calls(self) -> int:
        made = counts(self.emulator)
        return made["cuMemMap"] + made["cuMemSetAccess"] + made["cuMemUnmap"]

    def _end(self, step: int) -> None:
        for slot in [slot for slot, end in self.ends.items() if end <= step]:
            del self.ends[slot]
            self.open.pop(slot).close()

    def _admit(self, step: int) -> None:
        """Fill the batch; at the first step with sequences in the middle of their lives."""
        while len(self.open) < self.batch:
            request = self.requests[int(self.rng.integers(len(self.requests)))]
            outputs = max(1, request.output_tokens)
            done = 0 if step else int(self.rng.integers(outputs))
            prompt = request.input_tokens + done
            sequence = self.cache.open(tokens=prompt)
            self.prompts.append(self.cache.room.item(sequence.slot) >= prompt)
            self.cache.extend([sequence], prompt)
            self.cache.commit([sequence], prompt)
            self.open[sequence.slot] = sequence
            self.ends[sequence.slot] = step + outputs - done
            self.last[sequence.slot] = request.input_tokens + outputs


def run(
    bench: Bench,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 256,
) -> None:
    requests = load("azure_conv")
    layout = Layout.all_layers(*SHAPE_8B, max(r.tokens for r in requests), page_bytes=PAGE_BYTES)
    mean = sum(request.tokens for request in requests) / len(requests)
    bounded = int(0.8 * UNUSED * batch * mean * layout.bytes_per_token)
    policies = {
        "keep": (None, bench.pick(10_000, 4_000)),
        "bounded": (bounded, bench.pick(10_000, 500)),
        "lean": (0, bench.pick(2_000, 400)),
    }
    for name, (retain, steps) in policies.items():
        emulator = open_emulator(bench, granularity=PAGE_BYTES)
        if emulator is None:
            return
        pool = Pool(open_backend(PAGE_BYTES), budget_bytes=BUDGET)
        slots = batch + SPARE_SLOTS
        with KVCache(layout, slots=slots, pool=pool, retain_bytes=retain) as cache:
            steady = Steady(cache, requests, batch, bench.rng, emulator).run(steps)
            figures(bench, name, steady)
        pool.close()


def figures(bench: Bench, name: str, steady: Steady) -> None:
    """What one policy gives."""
    show = partial(bench.figure, gate=steady.check)
    calls = np.array(steady.calls)
    show(
        f"driver_calls/{name}/calls",
        float(calls.mean()),
        "calls/step",
        target="<= 0" if name == "keep" else None,
        steps=len(calls),
        steps_without_a_call=float((calls == 0).mean()),
    )
    adopted = 100 * float(np.mean(steady.prompts))
    show(
        f"driver_calls/{name}/adopted",
        adopted,
        "%",
        target=">= 99" if name == "keep" else None,
        admissions=len(steady.prompts),
    )
    show(f"driver_calls/{name}/unused", 100 * steady.unused, "%", target="<= 5")
    if name == "keep":
        show(f"driver_calls/{name}/fixed", 100 * steady.fixed, "%")
        show(f"driver_calls/{name}/least", 100 * steady.least, "%")
