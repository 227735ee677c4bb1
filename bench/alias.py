"""Sharing a prefix of 32k tokens of an 8B-shaped cache: address space moves, bytes do not.

8B-shaped: 32 layers, 8 KV heads of 128, bfloat16, 128 KiB a token, 4 GiB for the prefix. All of it
is mapped, only a few rows are ever written. `Sequence.share` takes one map call a lane: 1 with all
layers side by side, 64 with K and V of each layer in a lane of its own, 512 with each head in one.
`tail` shares 32k tokens and 5 more, whose page is copied. Wall clock.

`floor` is the one system call of all_layers alone: the kernel's mmap of the prefix at a second
address, through the same ctypes, with the same work between two calls.

The rival copies the same rows: torch's `copy_` between touched buffers of 256 MiB, a sixteenth of
the work, scaled up to 4 GiB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bench.harness import Bench, Sample
from vattn import KVCache, Layout
from vattn.sequence import Sequence

SHAPE_8B = (32, 8, 128)
TOKENS = 32 << 10
TAIL = 5
ROWS = (0, 1, 777, TOKENS // 2, TOKENS - 1)  # tokens that are written and compared
LAYERS = (0, 17, 31)
COPIED = 256 << 20
TARGET = "<= 30"
VERBS = ("map", "remap", "unmap", "duplicate", "create", "destroy", "zero")


def run(bench: Bench) -> None:
    copy = scaled_copy(bench)
    shape = (*SHAPE_8B, 2 * TOKENS)
    layouts = {
        "all_layers": Layout.all_layers(*shape, page_bytes=2 << 20),
        "per_layer": Layout(*shape, rows="token_major"),
        "per_head": Layout(*shape),
    }
    for name, layout in layouts.items():
        for tail in (0, TAIL) if name == "all_layers" else (0,):
            repeat = bench.pick(500, 50) if layout.lanes == 1 else bench.pick(20, 2)
            bench.figure(
                f"alias/{name}{'/tail' if tail else ''}",
                partial(sharing, bench, layout, TOKENS + tail, repeat),
                "us",
                gate=partial(shares, bench, layout, TOKENS + tail),
                target=TARGET if name == "all_layers" and not tail else None,
                peer="torch copy_, scaled",
                peer_value=copy.p50 * 1e6,
                lanes=layout.lanes,
                pages=layout.lanes * layout.pages(TOKENS),
                bytes=TOKENS * layout.bytes_per_token,
            )
    bench.figure(
        "alias/floor",
        partial(floor, bench, layouts["all_layers"], bench.pick(500, 50)),
        "us",
        gate=partial(maps, layouts["all_layers"]),
    )


@contextmanager
def donor(layout: Layout, tokens: int) -> Iterator[tuple[KVCache, Sequence]]:
    """A cache with one sequence of ``tokens`` tokens, mapped and counted, not written."""
    with KVCache(layout, slots=3, budget_bytes=1 << 60) as cache:
        sequence = cache.open()
        cache.extend([sequence], tokens)
        cache.commit([sequence], tokens)
        yield cache, sequence


def sharing(bench: Bench, layout: Layout, tokens: int, repeat: int) -> Sample:
    """Time `Sequence.share`; the child is closed, and its slot emptied, before the next call."""
    with donor(layout, tokens) as (cache, parent):
        children: list[Sequence] = []

        def clear() -> None:
            while children:
                children.pop().close()
            cache.advance()

        return bench.measure(
            lambda _: children.append(parent.share(tokens)), setup=clear, warmup=1, repeat=repeat
        )


def floor(bench: Bench, layout: Layout, repeat: int) -> Sample:
    """Time the map call of `sharing` alone, with the same work between two calls."""
    with donor(layout, TOKENS) as (cache, parent):
        backend, pages = cache.pool.backend, layout.pages(TOKENS)
        source, target = cache.arena.home, cache.arena.address + 2 * layout.slot_bytes

        def clear() -> None:
            backend.unmap(target, source, pages)
            parent.share(TOKENS).close()
            cache.advance()

        backend.map(target, source, pages)
        sample = bench.measure(
            lambda _: backend.map(target, source, pages), setup=clear, warmup=1, repeat=repeat
        )
        backend.unmap(target, source, pages)
        return sample


def scaled_copy(bench: Bench) -> Sample:
    """Seconds that torch takes to copy as many bytes as are shared."""
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.zeros(COPIED, dtype=torch.uint8)
    sample = bench.measure(lambda: target.copy_(source), repeat=bench.pick(15, 3), warmup=1)
    scale = TOKENS * Layout(*SHAPE_8B, TOKENS).bytes_per_token / COPIED
    return Sample(tuple(scale * seconds for seconds in sample.seconds))


# ---- gate ----------------------------------------------------------------------------------------
def shares(bench: Bench, layout: Layout, tokens: int) -> bool:
    """Parent and child read the same bytes, none was copied (but a tail's), one map call was made
    a lane, and the child's own tokens do not reach the parent."""
    with donor(layout, tokens) as (cache, parent):
        written = write(bench, parent)
        before, calls = cache.stats(), cache.stats().calls
        child = parent.share(tokens)
        after = cache.stats()
        made = {v: after.calls.get(v, 0) - calls.get(v, 0) for v in VERBS}
        copied = layout.split(tokens)[1] * layout.lanes
        tails = layout.lanes if copied else 0
        assert made["map"] + made["remap"] <= layout.lanes + tails, f"calls {made}"
        assert made["duplicate"] == tails, f"calls {made}"
        assert made["zero"] == made["destroy"] == 0, f"calls {made}"
        grown = after.resident_bytes - before.resident_bytes
        room = tails * layout.page
        assert grown <= room, f"{grown} bytes more are held, {room} are the tail's"
        shared = layout.split(tokens)[0] * layout.page * layout.lanes
        assert after.shared_bytes == shared, f"{after.shared_bytes} bytes shared, not {shared}"
        assert reads(child, written), "the child reads other bytes"
        behind = rows(bench, 1, 3)
        for layer in range(layout.layers):
            cache.append(layer, behind[0], behind[1], [child])
        assert child.length == tokens + 3
        assert parent.length == tokens
        assert reads(child, written), "appending changed the child's prefix"
        assert reads(parent, written), "appending to the child changed the parent"
        for layer in LAYERS:
            assert torch.equal(child.k[layer][:, -3:], behind[0, 0]), "the child's own K"
            assert torch.equal(child.v[layer][:, -3:], behind[1, 0]), "the child's own V"
        cache.check()
    return True


def maps(layout: Layout) -> bool:
    """The call of `floor` shows the donor's bytes at the second address."""
    with donor(layout, TOKENS) as (cache, _):
        backend, pages = cache.pool.backend, layout.pages(TOKENS)
        source, target = cache.arena.home, cache.arena.address + 2 * layout.slot_bytes
        backend.map(target, source, pages)
        for at in (0, TOKENS * layout.bytes_per_token - 8):
            ctypes.memset(cache.arena.address + at, 7, 8)
            assert ctypes.string_at(target + at, 8) == b"\7" * 8, "other bytes"
        backend.unmap(target, source, pages)
    return True


def rows(bench: Bench, batch: int, tokens: int) -> torch.Tensor:
    """Random K and V rows [2, batch, kv_heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(bench.seed)
    _, heads, dim = SHAPE_8B
    return torch.randn(2, batch, heads, tokens, dim, generator=generator).to(torch.bfloat16)


def write(bench: Bench, sequence: Sequence) -> torch.Tensor:
    """Fill some rows of some layers; returns them."""
    values = rows(bench, len(LAYERS), len(ROWS))
    for i, layer in enumerate(LAYERS):
        sequence.k[layer][:, list(ROWS)] = values[0, i]
        sequence.v[layer][:, list(ROWS)] = values[1, i]
    return values


def reads(sequence: Sequence, values: torch.Tensor) -> Any:
    """Does the sequence hold what `write` wrote?"""
    return all(
        torch.equal(sequence.k[layer][:, list(ROWS)], values[0, i])
        and torch.equal(sequence.v[layer][:, list(ROWS)], values[1, i])
        for i, layer in enumerate(LAYERS)
    )
