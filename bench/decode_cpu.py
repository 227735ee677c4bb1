"""One decode step on a CPU, through a real cache: against torch's own function, and against memory.

32 query heads, 8 KV heads of 128, one query token a sequence; K and V are a view of a `KVCache`, in
its default layout (head_major) and with a token's heads side by side (token_major). Contestants,
timed in the same rounds with other data in the processor's cache before each:

    ours       vattn.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch      torch.nn.functional.scaled_dot_product_attention, the same arguments
    packed     torch's kernel with packed heads; and `grouped` in float32: they need no compiler
    copy       torch's copy_ between buffers of 256 MiB; bytes read and written count

`.../copy_share` is the rate at which ours reads K and V, divided by the rate of copy. All use
torch's number of threads. The gate is the error against float64: at most three times torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

import vattn
from bench.harness import Bench, Sample
from vattn import KVCache, Layout
from vattn.kernels.contract import reference
from vattn.kernels.grouped import grouped
from vattn.kernels.packed import packed

HEADS, KV_HEADS, DIM = 32, 8, 128
BATCHES = (1, 8)
CONTEXTS = (4 << 10, 32 << 10)
COPIED = 256 << 20
EVICTED = 64 << 20
SECONDS = 15.0  # a race may take, where it needs no more than the least number of rounds
FASTER, SHARE = "ratio >= 8", ">= 0.5"

Native = F.scaled_dot_product_attention


def run(bench: Bench, dtypes: list[str] = ["bfloat16", "float32"]) -> None:
    buffers = [torch.ones(COPIED, dtype=torch.uint8) for _ in range(2)]
    for dtype in dtypes[: bench.pick(len(dtypes), 1)]:
        for rows in ("head_major", "token_major"):
            for batch in BATCHES[: bench.pick(2, 1)]:
                for context in bench.pick(CONTEXTS, CONTEXTS[:1]):
                    layout = Layout(1, KV_HEADS, DIM, context, dtype=dtype, rows=rows)
                    with step(bench, layout, batch) as (query, key, value):
                        figures(bench, layout, query, key, value, buffers)


@contextmanager
def step(bench: Bench, layout: Layout, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of a batch of full sequences; K and V are views of a cache."""
    generator = torch.Generator().manual_seed(bench.seed)
    with KVCache(layout, slots=batch, budget_bytes=1 << 40) as cache:
        sequences = cache.open_batch(batch)
        for sequence in sequences:
            shape = (2, 1, KV_HEADS, layout.max_tokens, DIM)
            rows = torch.randn(shape, generator=generator).to(cache.dtype)
            rows[1, ..., -1, :] *= 64  # one token of 32k counts in the answer: none may be left out
            cache.append(0, rows[0], rows[1], [sequence])
        view = cache.view(sequences)
        query = torch.randn(batch, HEADS, 1, DIM, generator=generator).to(cache.dtype)
        yield query, view.k[0], view.v[0]


def figures(
    bench: Bench, layout: Layout, query: Tensor, key: Tensor, value: Tensor, buffers: list[Tensor]
) -> None:
    """Race the contestants once; one figure against torch, one against copy."""
    batch, context = query.shape[0], layout.max_tokens
    moved = 2 * key.numel() * key.itemsize
    name = f"decode_cpu/{layout.dtype}/{layout.rows}/{batch}x{context}"
    ours = partial(vattn.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    contestants: dict[str, Callable[[], object]] = {
        "ours": ours,
        "torch": partial(Native, query, key, value, enable_gqa=True),
        "packed": partial(packed, query, key, value),
        "copy": partial(buffers[0].copy_, buffers[1]),
    }
    if query.dtype == torch.float32:
        contestants["grouped"] = partial(grouped, query, key, value)
    gate = cache(partial(exact, query, key, value, ours))
    taken = race(bench, contestants, buffers)
    speed = {name: moved / sample.p50 / 1e9 for name, sample in taken.items()}
    speed["copy"] = 2 * COPIED / taken["copy"].p50 / 1e9
    shares = [
        moved / a / (2 * COPIED / b)
        for a, b in zip(taken["ours"].seconds, taken["copy"].seconds, strict=True)
    ]
    bench.figure(
        name,
        bench.versus(taken["ours"], taken["torch"]),
        "ms",
        gate=gate,
        target=FASTER if layout.dtype == "bfloat16" else None,
        peer="torch",
        impl=vattn.explain(query, key, value, enable_gqa=True).impl,
        gigabytes_per_second={name: round(rate, 2) for name, rate in speed.items()},
        threads=torch.get_num_threads(),
    )
    bench.figure(
        f"{name}/copy_share",
        median(shares),
        "of copy",
        gate=gate,
        target=SHARE if layout.dtype == "bfloat16" and layout.rows == "head_major" else None,
        gigabytes_per_second=round(speed["copy"], 2),
    )


def race(
    bench: Bench, contestants: dict[str, Callable[[], object]], buffers: list[Tensor]
) -> dict[str, Sample]:
    """Time all in the same rounds, each with other data in the processor's cache.

    Fewer rounds where one takes seconds: torch needs five for a gigabyte of bfloat16 on AVX2.
    """
    source, target = (buffer[:EVICTED] for buffer in buffers)
    with_setup = {name: partial(after, call) for name, call in contestants.items()}
    begun = perf_counter()
    for call in contestants.values():
        call()
    rounds = int(SECONDS / (perf_counter() - begun))
    return bench.race(
        with_setup,
        warmup=0,
        repeat=bench.pick(max(3, min(15, rounds)), 3),
        setup=lambda: target.copy_(source),
    )


def after(call: Callable[[], object], evicted: object) -> object:
    """Call, once the set-up is done."""
    return call()


def exact(query: Tensor, key: Tensor, value: Tensor, ours: Callable[[], Tensor]) -> bool:
    """Ours is as near to float64 as torch is (three times, and one rounding); two sequences."""
    out, groups = ours(), HEADS // KV_HEADS
    for b in {0, query.shape[0] - 1}:
        for h in range(KV_HEADS):
            heads = slice(h * groups, h * groups + groups)
            given = query[b : b + 1, heads], key[b : b + 1, h : h + 1], value[b : b + 1, h : h + 1]
            truth, _ = reference(*given)
            native = Native(*given, enable_gqa=True)
            rounding = torch.finfo(out.dtype).eps * truth.abs().max().item()
            allowed = 3 * (native.double() - truth).abs().max().item() + rounding
            error = (out[b : b + 1, heads].double() - truth).abs().max().item()
            assert error <= allowed, f"sequence {b}, KV head {h}: error {error:.2e} > {allowed:.2e}"
    return True
