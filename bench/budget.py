"""Lowering the budget while serving: how soon it is obeyed, and what happens when it cannot be.

16 sequences are open and as many have ended, parked for the next ones to adopt. `obeyed` times
`set_budget` to what is live, and the step boundary after it; then the pool holds no page too many,
the system no byte too many, and every live row is what it was. `refused` times an `extend` under a
budget below what is live: it raises OutOfPages and changes nothing; once sequences end, that budget
is obeyed, too.

The worst of all rounds counts; `obeyed cpu` is the worst of the time that the thread itself was
running, which leaves out what other work on the machine took away.

On host memory the kernel takes 0.5 ms or more to free a MiB that was written, and that is most of
it: once with 8 MiB to give back, once with 64. On the emulated device nothing was written: the time
is ours and that of the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.emulated import open_backend, open_emulator
from bench.harness import Bench
from vattn import KVCache, Layout
from vattn.allocator.errors import OutOfPages
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.allocator.vmm import Backend
from vattn.sequence import Sequence

SEQUENCES = 16
MAX_TOKENS = 16384
# page size, tokens of each sequence, target in ms
PLACES: dict[str, tuple[int, int, Callable[[int], Backend], str | None]] = {
    "host 8 MiB": (64 << 10, 256, HostBackend, "<= 10"),
    "host 64 MiB": (64 << 10, 2048, HostBackend, None),
    "emulator 256 MiB": (2 << 20, 8192, open_backend, "<= 10"),
}


def run(bench: Bench) -> None:
    for name, (page_bytes, tokens, make, target) in PLACES.items():
        emulated = make is open_backend
        if emulated and open_emulator(bench, granularity=page_bytes) is None:
            return
        layout = Layout.all_layers(4, 2, 64, MAX_TOKENS, page_bytes=page_bytes)
        serving = Serving(layout, make(page_bytes), tokens, written=not emulated)
        bench.figure(
            f"budget/{name}/obeyed",
            partial(obeyed, bench, serving),
            "ms",
            gate=partial(nothing_is_lost, serving),
            target=target,
            stat="max",
            given_back_bytes=serving.parked_bytes,
        )
        bench.figure(
            f"budget/{name}/obeyed cpu",
            partial(obeyed, bench, serving, clock="thread"),
            "ms",
            gate=True,  # by the gate of `obeyed`
            stat="max",
        )
        bench.figure(
            f"budget/{name}/refused",
            partial(refused, bench, serving),
            "us",
            gate=partial(an_impossible_budget_is_an_error, serving),
        )
        serving.close()


class Serving:
    """Half of the slots open, half of them parked; the live rows are written and known."""

    def __init__(self, layout: Layout, backend: Backend, tokens: int, *, written: bool) -> None:
        self.layout, self.count, self.written = layout, tokens, written
        self.live_bytes = SEQUENCES * layout.pages(tokens) * layout.page
        self.parked_bytes = self.live_bytes
        self.full_bytes = 2 * self.live_bytes + 4 * SEQUENCES * layout.page  # some mapped ahead
        self.pool = Pool(backend, budget_bytes=self.full_bytes)
        self.cache = KVCache(layout, slots=2 * SEQUENCES, pool=self.pool)
        shape = (SEQUENCES, layout.kv_heads, tokens if written else 1, layout.head_dim)
        self.k = torch.randn(shape).to(self.cache.dtype)
        self.sequences = self._opened(self.cache.open_batch(SEQUENCES))

    def _opened(self, sequences: list[Sequence]) -> list[Sequence]:
        for layer in range(self.layout.layers):
            self.cache.append(layer, self.k, -self.k, sequences)
        if not self.written:  # but for the first row
            self.cache.extend(sequences, self.count - 1)
            self.cache.commit(sequences, self.count - 1)
        return sequences

    def park(self, _: Any = None) -> None:
        """The whole budget in use: what is not live is parked, since the step before."""
        self.cache.set_budget(self.full_bytes)
        ended = self._opened(self.cache.open_batch(SEQUENCES))
        for sequence in ended:
            sequence.close()
        self.cache.advance()
        assert self.pool.mapped * self.layout.page >= 2 * self.live_bytes, "nothing is parked"

    def lower(self, _: Any = None) -> None:
        """What is timed."""
        self.cache.set_budget(self.live_bytes)
        self.cache.advance()

    def check(self) -> None:
        """The budget is obeyed to the byte, and every live row is what was written."""
        self.cache.check()
        assert self.pool.over == 0, f"{self.pool.over} pages too many"
        assert self.pool.backend.resident_bytes() <= self.pool.total * self.layout.page, "bytes"
        for layer in range(self.layout.layers):
            view = self.cache.view(self.sequences)
            rows = self.k.shape[2]
            assert torch.equal(view.k[layer][:, :, :rows], self.k), f"K of layer {layer}"
            assert torch.equal(view.v[layer][:, :, :rows], -self.k), f"V of layer {layer}"

    def close(self) -> None:
        self.cache.close()
        self.pool.close()


def obeyed(bench: Bench, serving: Serving, **options: Any) -> Any:
    """Time lowering the budget, from a full pool each time."""
    repeat = bench.pick(50, 10)
    return bench.measure(serving.lower, setup=serving.park, warmup=1, repeat=repeat, **options)


def nothing_is_lost(serving: Serving) -> bool:
    """Obeyed at once, with every row in its place; also for sequences that ended in this step."""
    serving.park()
    serving.lower()
    serving.check()
    serving.cache.set_budget(serving.full_bytes)
    ended = serving.cache.open_batch(SEQUENCES)
    serving.cache.extend(ended, serving.count)
    for sequence in ended:
        sequence.close()
    serving.lower()
    serving.check()
    return True


def refused(bench: Bench, serving: Serving) -> Any:
    """Time an extend that cannot be."""
    serving.cache.set_budget(serving.live_bytes // 2)

    def extend() -> None:
        try:
            serving.cache.extend(serving.sequences, MAX_TOKENS - serving.count)
        except OutOfPages:
            return
        raise AssertionError("more pages than the budget has")

    sample = bench.measure(extend, repeat=bench.pick(1000, 100))
    serving.cache.set_budget(serving.full_bytes)
    return sample


def an_impossible_budget_is_an_error(serving: Serving) -> bool:
    """Below what is live nothing more is mapped, nothing is lost, and ends bring it about."""
    cache, pool = serving.cache, serving.pool
    cache.set_budget(serving.live_bytes // 2)
    over = pool.over * serving.layout.page
    assert over == serving.live_bytes - serving.live_bytes // 2, f"{over} bytes over"
    try:
        cache.extend(serving.sequences[:1], MAX_TOKENS - serving.count)
    except OutOfPages as error:
        said = str(error)
    else:
        said = ""
    assert "free 0" in said, f"refused: {said}"
    rows = serving.k.shape[2]
    for layer in range(serving.layout.layers):
        kept = cache.view(serving.sequences).k[layer][:, :, :rows].clone()  # a view would pin
        assert torch.equal(kept, serving.k), "rows were lost"
    for sequence in serving.sequences[SEQUENCES // 2 :]:
        sequence.close()
    cache.advance()
    cache.reclaim(pool.mapped)
    cache.advance()
    assert pool.over == 0, "ended sequences hold pages beyond the budget"
    assert pool.backend.resident_bytes() <= serving.live_bytes // 2, "bytes beyond the budget"
    living, half = serving.sequences[: SEQUENCES // 2], serving.k[: SEQUENCES // 2]
    assert torch.equal(cache.view(living).k[0][:, :, :rows], half), "rows of the living"
    for sequence in living:
        sequence.close()
    cache.set_budget(serving.full_bytes)
    serving.sequences = serving._opened(cache.open_batch(SEQUENCES))
    serving.check()
    return True
