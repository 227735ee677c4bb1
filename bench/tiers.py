"""Tiers: what a step costs over KV that does not fit, and what it costs to move a sequence.

`over` holds KV four times as large as the fast tier. A dense step reads all of it where it lies,
and must give the bits that it gave before anything was demoted; a sparse step reads one eighth, in
pages of 16 tokens drawn at random. `swap` moves one sequence out and back. Its peers move as many
bytes between two buffers that are touched already: one memcpy, and, as paged caches swap, blocks of
16 tokens of a layer's K or V, a memcpy each or gathered by one torch call for each layer. All these
are timed by their thread's processor time, kernel work included: nothing in them waits, and what
other processes take of a busy machine falls out; the wall clock's ratio is noted beside it.
`unchanged` moves it out a second time; `first_read` reads it all after it came back, against the
second time; `background` is what the owner's thread has to do while another one copies.

The slow tier is a file, whose pages are committed before anything is timed. `memory` has it in
/dev/shm, which is memory and stays so: what a move itself costs. `disk` has it in the folder for
temporary files: the kernel keeps its pages in memory (the page cache) while it has some, and writes
them out behind our back; a page that was written out faults at its next write. What the disk itself
gives is measured apart, in the full run: `cold`, the cache dropped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import vattn
from bench.harness import Bench
from bench.timing import Comparison, Sample, quiet_gc
from vattn.allocator import libc
from vattn.allocator.errors import DriverError
from vattn.allocator.host import HostBackend
from vattn.allocator.pool import Pool
from vattn.allocator.tierfile import MADV_DONTNEED
from vattn.cache import KVCache
from vattn.kernels.kv import KV
from vattn.kernels.selection import Selection
from vattn.kernels.sparse import attend as attend_sparse
from vattn.layout import Layout
from vattn.sequence import Sequence
from vattn.tiers import Tiers

MIB = 1 << 20
HEADS, KV_HEADS, DIM = 32, 8, 128
TOKEN_BYTES = 2 * KV_HEADS * DIM * 2  # K and V of a layer
BLOCK_TOKENS = 16
SHARE = 8  # of the tokens, one is read by a sparse step
OVER = 4  # times the fast tier
CHUNK = 1024  # tokens appended at once
WARMUP = 2  # rounds
PLACES = {"memory": "/dev/shm", "disk": None}  # folders of the file
PEERS = ("blocks", "gathered", "memcpy")  # methods of `Buffers`


def run(bench: Bench) -> None:
    over(bench, bench.pick(2048, 256) * MIB)
    for place, folder in PLACES.items():
        if folder is None or Path(folder).is_dir():
            swap(bench, place, folder, bench.pick(2048, 512) * MIB)


@contextmanager
def opened(
    layers: int, nbytes: int, *, page_bytes: int, folder: str | None = None
) -> Iterator[tuple[Tiers, Sequence]]:
    """A cache with one sequence of ``nbytes`` bytes of random K and V, and tiers of that size; all
    pages are committed, the fast ones by huge pages where the kernel will."""
    tokens = nbytes // (layers * TOKEN_BYTES)
    layout = Layout(
        layers, KV_HEADS, DIM, tokens, dtype="bfloat16", rows="head_major", page_bytes=page_bytes
    )
    pool = Pool(HostBackend(page_bytes), budget_bytes=nbytes)
    with KVCache(layout, slots=1, pool=pool) as kept:
        make_ready(pool)
        file = None if folder is None else f"{folder}/vattn-bench-{os.getpid()}"
        tiers = Tiers(kept, slow_bytes=nbytes, file=file, ready_bytes=nbytes)
        sequence = kept.open()
        rng = torch.Generator().manual_seed(0)
        for start in range(0, tokens, CHUNK):
            some = min(CHUNK, tokens - start)
            new = torch.randn(1, KV_HEADS, some, DIM, generator=rng).to(torch.bfloat16)
            for layer in range(layers):
                kept.append(layer, new * (layer + 1), new.flip(-1), [sequence])
            kept.advance()
        yield tiers, sequence
    pool.close()


def make_ready(pool: Pool) -> None:
    """Make all of the pool's pages, and commit their bytes."""
    lent = pool.lend(pool.total)
    for page in lent.tolist():
        pool.backend.create(page, 1)
        try:
            pool.backend.warm(page, 1)
        except DriverError:  # no huge pages: committed all the same
            continue
    pool.return_warm(lent, len(lent))


# ---- a step over KV that does not fit ------------------------------------------------------------
class Steps:
    """A decode step of every layer: dense, and sparse with a selection that stays."""

    def __init__(self, tiers: Tiers, sequence: Sequence, layers: int, seed: int) -> None:
        self.view, self.layers = tiers.cache.view([sequence]), range(layers)
        rng = torch.Generator().manual_seed(seed)
        self.query = torch.randn(1, HEADS, 1, DIM, generator=rng).to(torch.bfloat16)
        self.kv = [KV(self.view.k[layer], self.view.v[layer]) for layer in self.layers]
        pages = sequence.length // BLOCK_TOKENS
        count = pages // SHARE
        chosen = [torch.randperm(pages, generator=rng)[:count].sort().values for _ in range(8)]
        ids = torch.stack(chosen)[None].to(torch.int32)
        counts = torch.full((1, KV_HEADS), count, dtype=torch.int32)
        self.selection = Selection(ids, counts, BLOCK_TOKENS)

    def dense(self) -> list[Tensor]:
        return [vattn.attend(self.query, self.view, layer) for layer in self.layers]

    def sparse(self) -> list[Tensor]:
        return [attend_sparse(self.query, kv, self.selection)[0] for kv in self.kv]


def over(bench: Bench, nbytes: int) -> None:
    """A dense and a sparse step over KV of ``nbytes``, three quarters of which lie in the file."""
    layers = bench.pick(4, 2)
    with opened(layers, nbytes, page_bytes=MIB // 4) as (tiers, sequence):
        steps = Steps(tiers, sequence, layers, bench.seed)
        before = steps.dense(), steps.sparse()
        tiers.cache.set_budget(nbytes // OVER)

        def same() -> bool:
            stats = tiers.stats()
            assert stats.fast_bytes <= stats.fast_budget_bytes == nbytes // OVER, stats
            assert stats.slow_bytes >= nbytes * (OVER - 1) // OVER, stats
            now = steps.dense(), steps.sparse()
            for name, old, new in zip(("dense", "sparse"), before, now, strict=True):
                assert all(map(torch.equal, old, new)), f"{name} is not bit-identical"
            return True

        run = partial(bench.compare, steps.sparse, steps.dense, warmup=2, repeat=bench.pick(20, 10))
        bench.figure(
            "tiers/over/sparse",
            run,
            "ms",
            gate=same,
            target="ratio >= 3",
            peer="dense",
            kv_bytes=nbytes,
            fast_bytes=nbytes // OVER,
            read_share=1 / SHARE,
        )
        if not bench.quick:
            cold(bench, tiers, steps, same)


def cold(bench: Bench, tiers: Tiers, steps: Steps, same: Callable[[], bool]) -> None:
    """Each step once, right after the page cache was dropped: what comes from the disk itself."""
    backend = tiers.arena.backend
    assert isinstance(backend, HostBackend)
    assert backend.file is not None
    seconds = {}
    for name, step in (("sparse", steps.sparse), ("dense", steps.dense)):
        nbytes = tiers.arena.pages * tiers.arena.page_bytes
        libc.advise_memory(tiers.arena.address, nbytes, MADV_DONTNEED)
        backend.file.forget_cache()
        begin = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - begin
    bench.figure(
        "tiers/over/cold/sparse",
        seconds["sparse"],
        "s",
        gate=same,
        peer="dense",
        peer_value=seconds["dense"],
        disk_bytes=tiers.stats().slow_bytes,
    )


# ---- moving a sequence ---------------------------------------------------------------------------
class Buffers:
    """Two touched buffers, of huge pages where the kernel will, and what is copied between them."""

    def __init__(self, nbytes: int, layers: int, rng: np.random.Generator) -> None:
        self.nbytes, self.block = nbytes, BLOCK_TOKENS * TOKEN_BYTES // 2
        self._maps = [mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON) for _ in "ab"]
        for memory in self._maps:
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.source, self.target = (torch.frombuffer(m, dtype=torch.uint8) for m in self._maps)
        self.source.fill_(1)
        self.target.fill_(2)
        many = nbytes // self.block
        self.pairs = np.stack([rng.permutation(many), rng.permutation(many)]) * self.block
        self.rows = torch.from_numpy(rng.permutation(many // layers))
        shape = layers, many // layers, self.block
        self.layers = list(zip(self.source.view(shape), self.target.view(shape), strict=True))

    def memcpy(self) -> None:
        ctypes.memmove(self.target.data_ptr(), self.source.data_ptr(), self.nbytes)

    def blocks(self) -> None:
        """Block by block, by two block tables."""
        source, target, block = self.source.data_ptr(), self.target.data_ptr(), self.block
        move = ctypes.memmove
        for here, there in self.pairs.T.tolist():
            move(target + there, source + here, block)

    def gathered(self) -> None:
        """A layer's blocks, of one block table, side by side."""
        for source, target in self.layers:
            torch.index_select(source, 0, self.rows, out=target)

    def work(self) -> bool:
        """Does each of the three copy everything?"""
        for copy in (self.memcpy, self.blocks, self.gathered):
            self.target.fill_(2)
            copy()
            assert int(self.target.max()) == 1, copy.__name__
        return True


class Swap:
    """One sequence in the fast tier, moved out and back; every step says what it copied."""

    def __init__(self, tiers: Tiers, sequence: Sequence, layers: int, nbytes: int) -> None:
        self.tiers, self.sequence, self.nbytes = tiers, sequence, nbytes
        self.layers = range(layers)
        self.before = self.digest()

    def out(self) -> None:
        copied = self.tiers.demote(self.sequence)
        assert copied == self.nbytes, f"{copied} of {self.nbytes} bytes were copied"

    def again(self) -> None:
        copied = self.tiers.demote(self.sequence)
        assert copied == 0, f"{copied} unchanged bytes were copied"

    def back(self) -> None:
        copied = self.tiers.promote(self.sequence)
        assert copied == self.nbytes, f"{copied} of {self.nbytes} bytes were copied"

    def background(self) -> float:
        """As `out`, on another thread; returns the processor's seconds that this one took."""
        begin = time.thread_time()
        move = self.tiers.start_demote(self.sequence)
        assert move.wait()
        assert move.copied == self.nbytes
        return time.thread_time() - begin

    def read(self) -> None:
        """Every byte once, as the next dense step does: page tables are filled on the way."""
        for layer in self.layers:
            self.sequence.k[layer].view(torch.int16).max()
            self.sequence.v[layer].view(torch.int16).max()

    def forget(self) -> None:
        """As if all had been written anew: no equal copies are left."""
        self.tiers.slow.drop_twins(self.tiers.slow.copies)

    def works(self) -> bool:
        """Every byte goes, comes back, and goes for nothing, and reads as it was each time."""
        for step in (self.out, self.back, self.again, self.back, self.forget):
            step()
            assert self.digest() == self.before, f"{step.__name__}: a byte is another"
            self.tiers.cache.check()
        return True

    def digest(self) -> bytes:
        """Of every row."""
        found = blake2b()
        for layer in self.layers:
            for side in (self.sequence.k[layer], self.sequence.v[layer]):
                for head in side:
                    found.update(head.contiguous().view(torch.uint8).numpy())
        return found.digest()


def swap(bench: Bench, place: str, folder: str | None, nbytes: int) -> None:
    """Move a sequence of ``nbytes`` out and back, in rounds with the peers."""
    layers = 4
    buffers = Buffers(nbytes, layers, bench.rng)
    with opened(layers, nbytes, page_bytes=2 * MIB, folder=folder) as (tiers, sequence):
        one = Swap(tiers, sequence, layers, nbytes)
        samples = cache(partial(rounds, one, buffers, bench.pick(9, 7)))
        gate = cache(lambda: one.works() and buffers.work())
        for name in ("out", "back"):
            for peer in PEERS:
                figure = bench.figure(
                    f"tiers/swap/{place}/{name}/{peer}",
                    partial(versus, bench, samples, name, f"{name}/{peer}"),
                    "ms",
                    gate=gate,
                    target="ratio >= 0.95" if peer == "memcpy" else None,
                    peer=peer,
                    nbytes=nbytes,
                )
                if figure.value is not None:
                    wall = versus(bench, samples, f"{name}/wall", f"{name}/{peer}/wall")
                    bench.note(f"{figure.name}, by the wall clock: {wall.ratio.value:.2f}x")
        bench.figure(
            f"tiers/swap/{place}/unchanged",
            partial(versus, bench, samples, "again", "out/memcpy"),
            "ms",
            gate=gate,
            peer="memcpy",
            copied_bytes=0,
        )
        bench.figure(
            f"tiers/swap/{place}/first_read",
            partial(versus, bench, samples, "read", "read again"),
            "ms",
            gate=gate,
            peer="second_read",
        )
        bench.figure(
            f"tiers/swap/{place}/background",
            partial(versus, bench, samples, "background", "out/memcpy"),
            "ms",
            gate=gate,
            peer="memcpy",
        )


def versus(
    bench: Bench, samples: Callable[[], dict[str, Sample]], name: str, peer: str
) -> Comparison:
    """Two contestants of the same rounds."""
    return bench.versus(samples()[name], samples()[peer])


def rounds(one: Swap, buffers: Buffers, count: int) -> dict[str, Sample]:
    """Every peer before, and in the next round after, each of `out` and `back`: "out/memcpy" is
    memcpy next to out."""
    taken: dict[str, list[float]] = {}

    def keep(name: str, seconds: float) -> None:
        taken.setdefault(name, []).append(seconds)

    def timed(name: str, act: Callable[[], object]) -> None:
        begin, wall = time.thread_time(), time.perf_counter()
        act()
        keep(name, time.thread_time() - begin)
        keep(f"{name}/wall", time.perf_counter() - wall)

    with quiet_gc():
        for turn in range(WARMUP + count):
            for name, act in (("out", one.out), ("back", one.back)):
                acts = [(f"{name}/{peer}", getattr(buffers, peer)) for peer in PEERS]
                acts.append((name, act))
                for called, action in acts[:: 1 - 2 * (turn % 2)]:
                    timed(called, action)
            timed("read", one.read)
            timed("read again", one.read)
            timed("again", one.again)
            one.back()
            one.forget()
            keep("background", one.background())
            one.back()
            one.forget()
    return {name: Sample(tuple(seconds[WARMUP:])) for name, seconds in taken.items()}
