"""Virtual memory on a real GPU: what calls cost by page size, and whether kernels notice.

    calls      create, map, set access, unmap and release of one page, by page size
    access     one set access over a run of n mappings: n times the cost of one, or less?
    beside     mapping in a reservation that a kernel is reading: does it wait, does it fault?
    copy       a copy over many pages against one inside of torch's own memory
    read       bandwidth of a sum over everything, by page size (how far the TLB reaches)
    decode     attention over a cache's view against the same strides in torch's own memory

Skipped where torch sees no CUDA device. `--gib 100` reads as far as a large device goes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu import missing, timed_on_device
from bench.harness import Bench
from bench.timing import Sample
from vattn import KVCache, Layout
from vattn.allocator.arena import Arena
from vattn.allocator.cuda import CudaBackend
from vattn.allocator.pool import Pool
from vattn.tensor import Window

MIB, GIB = 1 << 20, 1 << 30
SIZES_MIB = (2, 4, 8, 16, 32, 64)
RUNS = (1, 4, 16, 64)
READ_MIB = (2, 16, 64)
BATCH, HEADS, TOKENS, DIM = 32, 8, 4096, 128


def run(
    bench: Bench,
    gib: Annotated[int, typer.Option(help="Most GiB to read at once; 0 is by the device.")] = 0,
) -> None:
    if (why := missing()) is not None:
        return bench.skip(why)
    torch.cuda.init()
    bench.note(torch.cuda.get_device_name())
    for mib in SIZES_MIB:
        calls(bench, mib, bench.pick(64, 16))
    access(bench, bench.pick(50, 10))
    beside(bench)
    copy(bench)
    free = torch.cuda.mem_get_info()[0]
    read(bench, min(gib or bench.pick(100, 8), int(0.8 * free) // GIB) * GIB)
    return decode(bench)


# ---- calls of the driver -------------------------------------------------------------------------
@contextmanager
def entered(backend: CudaBackend) -> Any:
    """The backend's context on this thread; the backend is closed afterwards."""
    again = backend.context.enter()
    try:
        yield backend.driver
    finally:
        if again:
            backend.context.leave()
        backend.close()


def calls(bench: Bench, mib: int, pages: int) -> None:
    """Every verb of a page's life, page by page."""
    backend = CudaBackend(mib * MIB, scrub=False)
    size, prop, allow = backend.page_bytes, backend.handles.prop, backend.mappings.access
    spent: dict[str, list[float]] = {}

    def timed(verb: str, act: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = act(*arguments)
        spent.setdefault(verb, []).append(time.perf_counter() - begin)
        return result

    with entered(backend) as driver:
        before = driver.free_memory()
        base = timed("reserve", driver.reserve, pages * size, size)
        handles = [timed("create", driver.create, size, prop) for _ in range(pages)]
        at = range(base, base + pages * size, size)
        for address, handle in zip(at, handles, strict=True):
            timed("map", driver.map, address, size, handle)
            timed("access", driver.set_access, address, size, allow)
        for address in at:
            timed("unmap", driver.unmap, address, size)
        for handle in handles:
            timed("release", driver.destroy, handle, size)
        timed("free", driver.free, base, pages * size)
        back = driver.free_memory() >= before - size
    for verb, seconds in spent.items():
        bench.figure(f"gpu_vmm/calls/{mib}MiB/{verb}", Sample(tuple(seconds)), "us", gate=back)


def access(bench: Bench, rounds: int) -> None:
    """One call over n mappings, for growing n."""
    backend = CudaBackend(2 * MIB, scrub=False)
    size, prop, allow = backend.page_bytes, backend.handles.prop, backend.mappings.access
    with entered(backend) as driver:
        handles = [driver.create(size, prop) for _ in range(max(RUNS))]
        base = driver.reserve(max(RUNS) * size, size)
        for count in RUNS:
            spent = []
            for _ in range(rounds):
                for i, handle in enumerate(handles[:count]):
                    driver.map(base + i * size, size, handle)
                begin = time.perf_counter()
                driver.set_access(base, count * size, allow)
                spent.append(time.perf_counter() - begin)
                driver.unmap(base, count * size)
            sample = Sample(tuple(spent))
            each = sample.p50 / count * 1e6
            bench.figure(f"gpu_vmm/access/{count}", sample, "us", gate=True, us_a_mapping=each)
        for handle in handles:
            driver.destroy(handle, size)
        driver.free(base, max(RUNS) * size)


# ---- kernels -------------------------------------------------------------------------------------
@contextmanager
def device_memory(mib: int, nbytes: int, *, mapped: int | None = None) -> Any:
    """An arena of one slot with pages of ``mib`` MiB, and bytes over all of it as a tensor."""
    pages = nbytes // (mib * MIB)
    backend = CudaBackend(mib * MIB, device=torch.cuda.current_device())
    pool = Pool(backend, budget_bytes=nbytes)
    arena = Arena(pool, slots=1, lanes=1, lane_pages=pages)
    arena.grow_to(0, pages if mapped is None else mapped)
    device = torch.device("cuda", torch.cuda.current_device())
    yield arena, Window(arena, torch.uint8, device).access(0, (nbytes,), (1,))
    torch.cuda.synchronize()
    arena.close()
    pool.close()


def beside(bench: Bench) -> None:
    """Map more pages of a reservation while a kernel reads others of it."""
    with device_memory(2, 512 * MIB, mapped=128) as (arena, whole):
        read = whole[: 256 * MIB].view(torch.int32)
        read.fill_(1)
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)  # cycles: the kernels behind it are still to come
        total = torch.stack([read.sum() for _ in range(20)])
        done = torch.cuda.Event()
        done.record()
        spent = []
        for page in range(129, 193):
            begin = time.perf_counter()
            arena.grow_to(0, page)
            spent.append(time.perf_counter() - begin)
        running = not done.query()
        torch.cuda.synchronize()
        right = bool((total == read.numel()).all())
    bench.figure(
        "gpu_vmm/beside/map", Sample(tuple(spent)), "us", gate=right, kernels_still_ran=running
    )


def copy(bench: Bench, nbytes: int = GIB) -> None:
    """Copy out of many pages, out of few, and out of torch's memory."""
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    native = torch.full((nbytes,), 3, dtype=torch.uint8, device="cuda")
    for mib in READ_MIB:
        with device_memory(mib, nbytes) as (_, whole):
            whole.fill_(3)
            acts = (partial(target.copy_, whole), partial(target.copy_, native))
            ours, theirs = timed_on_device(bench.pick(50, 10), *acts)
            bench.figure(
                f"gpu_vmm/copy/{mib}MiB",
                bench.versus(ours, theirs),
                "us",
                gate=torch.equal(whole, native),
                peer="cudaMalloc",
            )


def read(bench: Bench, nbytes: int) -> None:
    """Sum everything; torch's own memory first, because both at once would not fit."""
    repeat = bench.pick(20, 5)

    def rate(whole: torch.Tensor) -> tuple[float, bool]:
        words = whole.view(torch.int32)
        words.fill_(1)
        (sample,) = timed_on_device(repeat, words.sum)
        return nbytes / sample.p50 / 1e9, int(words.sum()) == words.numel()

    native, right = rate(torch.empty(nbytes, dtype=torch.uint8, device="cuda"))
    gc.collect()
    torch.cuda.empty_cache()
    gib = nbytes // GIB
    bench.figure("gpu_vmm/read/cudaMalloc", native, "GB/s", gate=right, gib=gib)
    for mib in READ_MIB:
        with device_memory(mib, nbytes) as (_, whole):
            ours, right = rate(whole)
        del whole
        bench.figure(
            f"gpu_vmm/read/{mib}MiB",
            ours,
            "GB/s",
            gate=right,
            gib=gib,
            share_of_cudaMalloc=ours / native,
        )


def decode(bench: Bench) -> None:
    """One query a sequence over a cache's view, and over the same rows side by side."""
    for mib in READ_MIB:
        layout = Layout.all_layers(1, HEADS, DIM, TOKENS, page_bytes=mib * MIB)
        options: dict[str, Any] = {"device": "cuda", "budget_bytes": 16 * GIB}
        with KVCache(layout, slots=BATCH, **options) as cache:
            sequences = cache.open_batch(BATCH)
            k, v = (
                torch.randn(BATCH, HEADS, TOKENS, DIM, device="cuda", dtype=cache.dtype)
                for _ in range(2)
            )
            cache.append(0, k, v, sequences)
            q = torch.randn(BATCH, HEADS, 1, DIM, device="cuda", dtype=cache.dtype)
            view = cache.view(sequences)
            ours = (view.k[0], view.v[0])
            # The same strides, so that the kernel is the same and only the memory differs.
            theirs = (like(view.k[0]), like(view.v[0]))
            acts = [partial(scaled_dot_product_attention, q, k, v) for k, v in (ours, theirs)]
            gate = partial(torch.equal, acts[0](), acts[1]())
            samples = timed_on_device(bench.pick(200, 30), *acts)
            bench.figure(
                f"gpu_vmm/decode/{mib}MiB",
                bench.versus(*samples),
                "us",
                gate=gate,
                peer="cudaMalloc",
                target="ratio >= 0.99",
            )
            del ours, theirs, view, acts, gate


def like(view: torch.Tensor) -> torch.Tensor:
    """The same values at the same strides in torch's own memory."""
    copied = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=view.device)
    return copied.copy_(view)
