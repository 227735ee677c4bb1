"""Growing on a device: driver calls for each 2 MiB, and what Python adds to a call.

`calls` grows sequences of an 8B model page by page, as decoding does, on the emulated device, and
divides the memory calls that reached it by the memory they mapped; `warm` pages have their handles
already, `cold` ones are made and zeroed on the way. kvcached makes four calls for 2 MiB: unmap a
zero page, create, map, set access.

`overhead` times the backend's map and unmap of a run against the same calls made by hand through
`cuda.bindings`: (ours - raw) / calls, by the median of the paired differences, in thread CPU time.
The emulator's side of a call is in both.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from bench.emulated import counts, open_backend, open_emulator
from bench.harness import Bench
from vattn import KVCache, Layout
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.pool import Pool

MIB = 1 << 20
SHAPE_8B = (32, 8, 128)
PAGES_MIB = (2, 16, 64)
SEQUENCES, PAGES_EACH = 16, 16
RIVAL_CALLS = 4.0  # of kvcached, for 2 MiB
RUNS = (1, 16)  # pages mapped by one call of ours
TARGET_MIB = 16


def run(bench: Bench) -> None:
    for mib in PAGES_MIB:
        for warm in (True, False):
            emulator = open_emulator(bench, granularity=2 * MIB)
            if emulator is None:
                return
            grown(bench, emulator, mib, warm)
    for count in RUNS:
        overhead(bench, open_emulator(bench, granularity=2 * MIB), count)


# ---- calls ---------------------------------------------------------------------------------------
def grown(bench: Bench, emulator: Any, mib: int, warm: bool) -> None:
    """Grow every sequence by a page at a time."""
    tokens = mib * MIB // (128 << 10)  # of a page
    layout = Layout.all_layers(*SHAPE_8B, tokens * PAGES_EACH, page_bytes=mib * MIB)
    pages = SEQUENCES * PAGES_EACH
    pool = Pool(open_backend(layout.page), budget_bytes=pages * layout.page)
    with KVCache(layout, slots=SEQUENCES, pool=pool) as cache:
        if warm:
            lent = pool.lend(pages)
            for page in lent.tolist():
                pool.backend.create(page, 1)
                pool.backend.warm(page, 1)
            pool.return_warm(lent, pages)
        batch = cache.batch(cache.open_batch(SEQUENCES))
        before, every = sum(counts(emulator).values()), emulator.calls()
        for _ in range(PAGES_EACH):
            for sequence in batch.sequences:  # lengths differ: no two cross into a page at once
                cache.extend([sequence], tokens)
                cache.commit([sequence], tokens)
        made = sum(counts(emulator).values()) - before
        bench.figure(
            f"grow/{mib}MiB/{'warm' if warm else 'cold'}/calls",
            made / (pages * mib / 2),
            "calls/2 MiB",
            gate=partial(is_mapped, emulator, cache, pages),
            target="<= 0.25" if warm and mib == TARGET_MIB else None,
            peer="kvcached",
            peer_value=RIVAL_CALLS,
            every_call=(emulator.calls() - every) / (pages * mib / 2),
        )
    pool.close()


def is_mapped(emulator: Any, cache: KVCache, pages: int) -> bool:
    """The device has as many mappings as there are pages, and their last rows are readable."""
    cache.check()
    assert emulator.live.mappings == cache.pool.mapped == pages, "mappings"
    for sequence in cache.sequences:
        emulator.kernel(sequence.k[31][0, -1].data_ptr(), 256)
    assert emulator.faults == 0, emulator.fault
    return True


# ---- overhead ------------------------------------------------------------------------------------
class Ours:
    """Map and unmap a run by the backend."""

    def __init__(self, backend: CudaBackend, base: int, count: int) -> None:
        self.backend, self.base, self.count = backend, base, count

    def __call__(self) -> None:
        self.backend.map(self.base, 0, self.count)
        self.backend.unmap(self.base, 0, self.count)


class Raw:
    """The same calls by hand."""

    def __init__(self, backend: CudaBackend, base: int, count: int) -> None:
        self.cuda, self.base, self.size = backend.driver.cuda, base, backend.page_bytes
        self.handles = backend.handles.run(0, count)
        self.access = backend.mappings.access

    def __call__(self) -> None:
        cuda, at, size = self.cuda, self.base, self.size
        for handle in self.handles:
            (code,) = cuda.cuMemMap(at, size, 0, handle, 0)
            assert not code
            at += size
        (code,) = cuda.cuMemSetAccess(self.base, at - self.base, self.access, len(self.access))
        assert not code
        (code,) = cuda.cuCtxSynchronize()
        assert not code
        (code,) = cuda.cuMemUnmap(self.base, at - self.base)
        assert not code


def overhead(bench: Bench, emulator: Any, count: int) -> None:
    """What the backend adds to each call, for runs of ``count`` pages."""
    backend = open_backend(TARGET_MIB * MIB, scrub=False)
    backend.create(0, count)
    base = backend.reserve(count, home=0)
    ours, raw = Ours(backend, base, count), Raw(backend, base, count)
    calls = count + 3  # one map for each page, an access, a wait, an unmap
    both = bench.compare(ours, raw, clock="thread", warmup=50, repeat=bench.pick(5000, 2000))
    pairs = zip(both.ours.seconds, both.peer.seconds, strict=True)
    bench.figure(
        f"grow/overhead/{count}",
        1e6 * median(mine - theirs for mine, theirs in pairs) / calls,
        "us/call",
        gate=partial(same_calls, emulator, ours, raw, calls),
        target="<= 1",
        raw_us=1e6 * both.peer.p50 / calls,
    )
    backend.close()


def same_calls(emulator: Any, ours: Ours, raw: Raw, calls: int) -> bool:
    """Both make the same calls, but for the question which context is current."""
    made = []
    for contestant in (ours, raw):
        before = emulator.calls() - emulator.calls("cuCtxGetCurrent")
        contestant()
        made.append(emulator.calls() - emulator.calls("cuCtxGetCurrent") - before)
    assert made == [calls, calls], made
    return True
