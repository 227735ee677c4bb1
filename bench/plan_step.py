"""Planning one decode step: which pages do the next tokens of a whole batch need?

One lane a sequence (all layers of a token side by side), 64 tokens a page, lengths staggered so
that one sequence in 64 crosses into a new page at every step: 4 of 256, 16 of 1,024. Between two
timed calls the cache really grows (`extend` and `commit`), so every plan is another one. `shuffled`
has the same sequences in an order of slots that no slice can name. Thread CPU time, reading the
clock included. `floor` is the one comparison that no plan can leave out.

`grown` is the whole step: plan, take pages from the pool, map them, count the tokens. Its rival is
vLLM's `KVCacheManager.allocate_slots(request, 1)` over 256 requests without prefix caching, which
chooses blocks of 16 tokens and makes no system call; it is imported where it is installed, or from
an unpacked wheel on PYTHONPATH, and needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.harness import Bench
from vattn import KVCache, Layout
from vattn.batch import Batch

PAGE_TOKENS = 64
MAX_TOKENS = 16384
TARGETS = {256: "<= 10", 1024: "<= 15"}
AHEAD = 128  # at most one page in so many is mapped before it is needed
MANY_LANES = 32  # sequences of the default layout: 1,024 kernel maps each
RIVAL = "vllm"
RIVAL_SEQUENCES = 256


def run(bench: Bench) -> None:
    repeat = bench.pick(3000, 400)
    for count, target in TARGETS.items():
        for shuffled in (False, True):
            name = f"plan_step/{count}{'/shuffled' if shuffled else ''}"
            gate = partial(agrees, bench, count, shuffled)
            bench.figure(
                name,
                partial(plans, bench, count, shuffled, repeat),
                "us",
                gate=gate,
                target=target,
                pages_a_step=count / PAGE_TOKENS,
            )
        bench.figure(
            f"plan_step/{count}/floor",
            partial(floor, bench, count, repeat),
            "us",
            gate=partial(agrees, bench, count, False),
        )
    bench.figure(
        f"plan_step/{MANY_LANES}/default_layout",
        partial(many_lanes, bench, repeat),
        "us",
        gate=partial(lanes_agree, bench),
        lanes=default_layout().lanes,
    )
    rival = open_rival(bench)
    peer = bench.measure(rival, clock="thread", repeat=bench.pick(300, 50)) if rival else None
    for count in TARGETS:
        bench.figure(
            f"plan_step/{count}/grown",
            partial(grown, bench, count, repeat),
            "us",
            gate=partial(rows_arrive, bench),
            peer=RIVAL if count == RIVAL_SEQUENCES else None,
            peer_value=peer.p50 * 1e6 if peer and count == RIVAL_SEQUENCES else None,
        )


# ---- what is timed -------------------------------------------------------------------------------
def staggered(bench: Bench, count: int, shuffled: bool) -> tuple[KVCache, Batch]:
    """A cache of ``count`` sequences whose lengths modulo a page are evenly spread."""
    layout = Layout.all_layers(32, 8, 128, MAX_TOKENS, page_bytes=PAGE_TOKENS * (128 << 10))
    cache = KVCache(layout, slots=count, budget_bytes=1 << 60)
    sequences = cache.open_batch(count)
    pages = bench.rng.integers(1, 32, count)
    lengths = pages * PAGE_TOKENS + bench.rng.permutation(count) % PAGE_TOKENS
    if shuffled:
        sequences = [sequences[i] for i in bench.rng.permutation(count)]
    cache.extend(sequences, lengths)
    for sequence, length in zip(sequences, lengths.tolist(), strict=True):
        cache.commit([sequence], length)
    return cache, cache.batch(sequences)


def plans(bench: Bench, count: int, shuffled: bool, repeat: int) -> Any:
    """Time `KVCache.plan`; between two calls every sequence becomes a token longer."""
    return timed_plans(bench, *staggered(bench, count, shuffled), warmup=100, repeat=repeat)


def floor(bench: Bench, count: int, repeat: int) -> Any:
    """Time which sequences are full, between the same steps."""
    cache, batch = staggered(bench, count, shuffled=False)
    tokens, room = cache.tokens[batch.pick], cache.room[batch.pick]
    with cache:
        return bench.measure(
            lambda _: (tokens >= room).nonzero()[0],
            setup=partial(step, cache, batch),
            clock="thread",
            warmup=100,
            repeat=repeat,
        )


def timed_plans(bench: Bench, cache: KVCache, batch: Batch, *, warmup: int, repeat: int) -> Any:
    with cache:
        return bench.measure(
            lambda _: cache.plan(batch),
            setup=partial(step, cache, batch),
            clock="thread",
            warmup=warmup,
            repeat=repeat,
        )


def grown(bench: Bench, count: int, repeat: int) -> Any:
    """Time whole steps on real memory."""
    cache, batch = staggered(bench, count, shuffled=False)
    with cache:
        return bench.measure(partial(step, cache, batch), clock="thread", warmup=100, repeat=repeat)


def step(cache: KVCache, batch: Batch) -> None:
    """One token more for every sequence, without its rows."""
    cache.extend(batch, 1)
    cache.commit(batch, 1)


def default_layout() -> Layout:
    """What a KVCache of an 8B model takes by itself: head-major rows, 512 lanes of 8 KiB pages."""
    return Layout(32, 8, 128, MAX_TOKENS)


def spread(bench: Bench) -> tuple[KVCache, Batch]:
    """Sequences of the default layout, one of which crosses into a new page at every step."""
    cache = KVCache(default_layout(), slots=MANY_LANES, budget_bytes=1 << 60)
    sequences = cache.open_batch(MANY_LANES)
    for i, sequence in enumerate(sequences):
        cache.extend([sequence], 96 + i)
        cache.commit([sequence], 96 + i)
    return cache, cache.batch(sequences)


def many_lanes(bench: Bench, repeat: int) -> Any:
    """Time `KVCache.plan` where a page of a sequence is 512 pages, one a lane."""
    return timed_plans(bench, *spread(bench), warmup=40, repeat=min(repeat, 300))


# ---- gates ---------------------------------------------------------------------------------------
def agrees(bench: Bench, count: int, shuffled: bool) -> bool:
    """Step after step, the plan is what plain Python says, and growing maps exactly that."""
    cache, batch = staggered(bench, count, shuffled)
    with cache:
        lane, last = cache.layout.lane_pages, cache.arena.last[:, 0]
        for turn in range(PAGE_TOKENS):
            needs = needed(cache, batch)
            exact, plan = cache.plan(batch, ahead=False), cache.plan(batch)
            assert (plan is None) == (exact is None) == (not needs), f"step {turn}"
            expected = last.copy()
            if plan is not None and exact is not None:
                assert dict(zip(exact.slots.tolist(), exact.to.tolist(), strict=True)) == needs
                upto = dict(zip(plan.slots.tolist(), plan.to.tolist(), strict=True))
                assert upto.keys() == needs.keys()
                assert all(n <= upto[s] <= n + n // AHEAD + 1 for s, n in needs.items())
                pages = [s * lane + page for s in upto for page in range(int(last[s]), upto[s])]
                assert sorted(plan.pages.tolist()) == sorted(pages), "the pages of the plan"
                expected[plan.slots] = plan.to
            step(cache, batch)
            assert (last == expected).all(), "the pages that were mapped"
        cache.check()  # what is recorded as mapped agrees with `last`
    return True


def lanes_agree(bench: Bench) -> bool:
    """Every plan names the next page of each lane of the sequences that are full, and no other."""
    cache, batch = spread(bench)
    with cache:
        for turn in range(40):
            full = [s.slot for s in batch.sequences if cache.tokens[s.slot] == cache.room[s.slot]]
            plan = cache.plan(batch, ahead=False)
            pages = [] if plan is None else sorted(plan.pages.tolist())
            arena = cache.arena
            lanes = [
                slot * arena.slot_pages + lane * arena.lane_pages + int(arena.last[slot, lane])
                for slot in full
                for lane in range(arena.lanes)
            ]
            assert pages == sorted(lanes), f"step {turn}"
            step(cache, batch)
        cache.check()
    return True


def needed(cache: KVCache, batch: Batch) -> dict[int, int]:
    """Slots whose next token lies behind their last mapped page, and the pages they need then."""
    needs = {}
    for sequence in batch.sequences:
        slot = sequence.slot
        pages = (int(cache.tokens[slot]) + 1 + PAGE_TOKENS - 1) // PAGE_TOKENS
        if pages > int(cache.arena.last[slot, 0]):
            needs[slot] = pages
    return needs


def rows_arrive(bench: Bench, steps: int = 40) -> bool:
    """A small cache, filled step by step behind plans, holds what a concatenation of its rows
    holds, whatever the order of the slots."""
    layout = Layout.all_layers(2, 2, 16, 256, dtype="float32", page_bytes=4096)
    generator = torch.Generator().manual_seed(bench.seed)
    with KVCache(layout, slots=8, budget_bytes=1 << 30) as cache:
        sequences = cache.open_batch(8)
        batch = cache.batch([sequences[i] for i in bench.rng.permutation(8)])
        expected: list[list[torch.Tensor]] = [[], []]
        for _ in range(steps):
            cache.extend(batch, 1)
            for layer in range(2):
                rows = torch.randn(2, 8, 2, 1, 16, generator=generator)
                cache.append(layer, rows[0], rows[1], batch)
                expected[layer].append(rows)
        for layer in range(2):
            rows = torch.cat(expected[layer], dim=3)
            for i, sequence in enumerate(batch.sequences):
                assert torch.equal(sequence.k[layer], rows[0, i]), "K after the steps"
                assert torch.equal(sequence.v[layer], rows[1, i]), "V after the steps"
        cache.check()
    return True


# ---- the rival -----------------------------------------------------------------------------------
def open_rival(bench: Bench) -> Callable[[], None] | None:
    """vLLM's step over 256 requests; None, with the reason said, where it is not installed."""
    if bench.peer("vllm.v1.core.kv_cache_manager") is None:
        bench.missing[RIVAL] = bench.missing["vllm.v1.core.kv_cache_manager"]
        return None
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

    spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    manager = KVCacheManager(
        KVCacheConfig(200_000, [], [KVCacheGroupSpec(["layer"], spec)]),
        max_model_len=MAX_TOKENS,
        scheduler_block_size=16,
        hash_block_size=16,
        enable_caching=False,
    )
    requests = []
    for i, length in enumerate(bench.rng.integers(64, 2048, RIVAL_SEQUENCES).tolist()):
        request = Request(str(i), [1] * length, SamplingParams(max_tokens=MAX_TOKENS // 2), None)
        assert manager.allocate_slots(request, length) is not None
        request.num_computed_tokens = length
        requests.append(request)

    def allocate() -> None:
        for request in requests:
            manager.allocate_slots(request, 1)
            request.num_computed_tokens += 1

    return allocate
