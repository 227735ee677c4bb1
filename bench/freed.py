"""Eviction gives memory back: bytes returned of those dropped, and what closing the gaps costs.

Layers of an 8B model (32 query heads, 8 KV heads of 128, bfloat16) hold a prompt of 8,192 tokens; a
policy keeps a quarter and one token more, so that each head's last page has a single row: the worst
case. `returned` is the physical memory that went back to the pool (`HeadCache.stats`), of the bytes
of rows that were dropped. `ragged` is the same for policies whose heads or layers keep different
numbers of tokens, of all bytes of K and V, three quarters of which they drop. `narrow` is the share
of all bytes that channels of K give back where every token stays. Queries and keys are drawn, with
heads that look at few tokens and heads that look at many; policies are shown the last 64 queries.
`page` has larger pages, and `shared` those of a device, 2 MiB, in ranges of all KV heads.
`compaction` is what an eviction adds to a layer's prompt after the choice, closing the gaps and
giving pages back, against attention of the same prompt alone, without projections and MLP: the
strictest prefill there is. Both by the processor time of one thread.

The gate of a figure: attention over what is left equals that of a float64 reference over all tokens
with the dropped ones masked, to 1e-3, for each layer; and the pool has as many pages less.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from bench.harness import Bench
from bench.kept.roster import Facts, Grain, adaptive, roster
from bench.timing import Sample, measure
from vattn.eviction import Eviction
from vattn.evictor import Evictor
from vattn.heads import HeadCache
from vattn.kernels.compact import as_rows

HEADS, KV_HEADS, DIM, WIDTH = 32, 8, 128, 256
ROW_BYTES = 2 * DIM * 2  # K and V of a token and KV head
TOKENS, LAYERS, SHOWN = 8192, 2, 64
KEPT = TOKENS // 4 + 1
GRAIN = Grain(4, 32, 32)
RAGGED = ("AdaKV", "PyramidKV", "CAKE", "KVzip")
QUICK = ("RandomTokens", "Streaming", "SnapKV", "TOVA", "H2O, steps", "KeyDiff")
CHANGES = {"Elastic", "Merging", "SubGen"}  # what they keep is not what it was: no masked reference
DEVICE_PAGE = 2 << 20
PAGES = (64 << 10, DEVICE_PAGE)
CLOSE = 1e-3
KVPRESS = (
    "kvpress with AdaKV returns nothing: it masks what it drops with a fake key, and says that "
    'this "does not reduce peak memory" (its attention_patch.py); that is not measured here'
)


def run(
    bench: Bench,
    policies: Annotated[list[str], typer.Option(help="Policies; all by default.")] = [],
) -> None:
    torch.set_num_threads(1)
    made, drawn = roster(), Drawn(bench.seed)
    names = policies or bench.pick(
        [name for name in made if name not in RAGGED and not adaptive(name)],
        [name for name in QUICK if name in made],
    )
    for name in names:
        returned(bench, f"freed/returned/{name}", drawn, name)
    for page in PAGES:
        label = f"freed/page/{page >> 10} KiB/SnapKV"
        returned(bench, label, drawn, "SnapKV", page, target=None)
    label = f"freed/shared/{DEVICE_PAGE >> 10} KiB/SnapKV"
    returned(bench, label, drawn, "SnapKV", DEVICE_PAGE, target=None, heads=KV_HEADS)
    ragged = [name for name in RAGGED if name in made and (not policies or name in policies)]
    for name in ragged:
        returned(bench, f"freed/ragged/{name}", drawn, name, ragged=True)
    if not policies or "ThinK" in policies:
        returned(bench, "freed/narrow/ThinK", drawn, "ThinK", narrow=True)
    bench.note(KVPRESS)
    if not policies:
        compaction(bench, drawn)


class Drawn:
    """K, V and queries of every layer. A head's queries are near some keys, of which a head that
    looks at few has the nearest; heads differ in how near."""

    def __init__(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        shape = LAYERS, 1, KV_HEADS, TOKENS, DIM
        self.key = torch.randn(shape, generator=rng).to(torch.bfloat16)
        self.value = torch.randn(shape, generator=rng).to(torch.bfloat16)
        sharp = torch.linspace(0.5, 4.0, KV_HEADS).repeat_interleave(HEADS // KV_HEADS)
        query = torch.randn((LAYERS, 1, HEADS, SHOWN, DIM), generator=rng)
        self.query = (query * sharp[:, None, None]).to(torch.bfloat16)
        self.hidden = torch.randn((LAYERS, 1, SHOWN, WIDTH), generator=rng)
        self.outputs = list(torch.randn((LAYERS, WIDTH, HEADS * DIM), generator=rng))
        mass = torch.rand((LAYERS, 1, KV_HEADS, TOKENS), generator=rng)
        self.mass = mass ** torch.linspace(1, 8, KV_HEADS)[:, None]
        self.weights = torch.randn((LAYERS, KV_HEADS, WIDTH), generator=rng)

    def facts(self) -> Facts:
        """What policies are told."""
        return Facts(
            TOKENS,
            lazy=lambda: 0.5,
            future=lambda: self.mass,
            retrieval=lambda: tuple((0, head) for head in range(KV_HEADS)),
            replay=lambda: tuple(self.mass),
            guess=lambda: (self.weights, torch.zeros(LAYERS, KV_HEADS)),
        )


@dataclass(frozen=True, eq=False)
class Freed:
    """Bytes before and after, and how far attention over the rest is from its reference."""

    before: int
    after: int
    dropped: int
    pages: int  # that the pool got back
    page_bytes: int
    apart: float

    def check(self) -> bool:
        """Raise AssertionError where something is wrong."""
        gone = self.before - self.after
        assert self.dropped > 0, "nothing was dropped"
        assert gone == self.pages * self.page_bytes, f"{gone} bytes, {self.pages} pages"
        assert self.apart < CLOSE, f"off by {self.apart} of the masked reference"
        return True


def returned(
    bench: Bench,
    label: str,
    drawn: Drawn,
    name: str,
    page_bytes: int | None = None,
    *,
    ragged: bool = False,
    narrow: bool = False,
    target: str | None = ">= 95",
    heads: int = 1,
) -> None:
    """One figure: the share of bytes that came back. ``narrow``: no token goes, and channels do;
    ``heads`` of a range."""
    evictor = roster()[name](TOKENS if narrow else KEPT, GRAIN, drawn.facts())
    freed = cache(partial(evicted, drawn, evictor, page_bytes, name not in CHANGES, heads))

    def share() -> float:
        found = freed()
        whole = found.before if ragged or narrow else found.dropped
        return 100 * (found.before - found.after) / whole

    bench.figure(
        label,
        share,
        "% of all bytes" if ragged or narrow else "% of dropped bytes",
        gate=lambda: freed().check(),
        target=">= 70" if ragged else ">= 18" if narrow else target,
        mapped_before=freed().before,
        mapped_after=freed().after,
        dropped=freed().dropped,
        page_bytes=freed().page_bytes,
        heads_per_range=heads,
        error=freed().apart if name not in CHANGES else None,
    )


def evicted(
    drawn: Drawn, evictor: Evictor, page_bytes: int | None, compare: bool, each: int = 1
) -> Freed:
    """Run a prompt under an evictor, ``each`` heads a range."""
    options: dict[str, Any] = {"page_bytes": page_bytes, "heads_per_range": each}
    with HeadCache(LAYERS, KV_HEADS, DIM, TOKENS + 1, device="cpu", **options) as heads:
        eviction = Eviction(heads, evictor, drawn.outputs)
        for layer in range(LAYERS):
            eviction.append(layer, drawn.key[layer], drawn.value[layer])
        heads.release()  # pages that were mapped ahead of rows
        before, free = heads.stats(), heads.cache.pool.free
        done = torch.zeros(1, HEADS, SHOWN, DIM, dtype=torch.bfloat16)
        for layer in range(LAYERS):
            query, hidden = drawn.query[layer], drawn.hidden[layer]
            eviction.attend(query, layer, hidden=hidden, attended=done)
        after = heads.stats()
        held = sum(int(heads.held(layer).sum()) for layer in range(LAYERS))
        dropped = (LAYERS * KV_HEADS * TOKENS - held) * ROW_BYTES
        if heads.narrowed is not None:
            narrow = sum(int(heads.narrowed.counts(layer).sum()) for layer in range(LAYERS))
            dropped += narrow * (DIM - heads.narrowed.width) * ROW_BYTES // (2 * DIM)
        worst = 0.0
        for layer in range(LAYERS if compare else 0):
            worst = max(worst, apart(drawn, heads, layer))
        return Freed(
            before.mapped_bytes,
            after.mapped_bytes,
            dropped,
            heads.cache.pool.free - free,
            heads.layout.page,
            worst,
        )


def apart(drawn: Drawn, heads: HeadCache, layer: int) -> float:
    """Attention of the last query over what is left, against a masked float64 reference over all
    tokens, rounded as ours is: the relative error. Channels that a token gave up are zeros."""
    query = drawn.query[layer][:, :, -1:].contiguous()
    ours = heads.attend_lse(query, layer)[0].double()
    mask = torch.zeros(KV_HEADS, TOKENS, dtype=torch.bool)
    positions, counts = heads.places(layer)[0], heads.held(layer)[0].tolist()
    for head, count in enumerate(counts):
        mask[head, positions[head, :count]] = True
    key, rows = drawn.key[layer][0].double(), heads.narrowed
    channels = None if rows is None else rows.channels(layer)
    if rows is not None and channels is not None:
        for head, many in enumerate(rows.counts(layer)[0].tolist()):
            gone = torch.ones(DIM, dtype=torch.bool)
            gone[channels[0, head]] = False
            key[head, rows.positions(layer)[0, head, :many, None], gone.nonzero().T] = 0.0
    q = query[0].double().unflatten(0, (KV_HEADS, -1)).squeeze(2)
    scores = q @ key.mT * DIM**-0.5
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    want = (weights @ drawn.value[layer][0].double()).flatten(0, 1)[None, :, None]
    want = want.to(torch.bfloat16).double()
    return float((ours - want).norm() / want.norm())


# ---- what it costs -------------------------------------------------------------------------------
def compaction(bench: Bench, drawn: Drawn) -> None:
    """Closing the gaps of a layer and giving pages back, against its attention."""
    samples = cache(partial(rounds, drawn, bench.pick(3, 1), bench.pick(20, 10)))

    def kept() -> bool:
        evictor = roster()["RandomTokens"](KEPT, GRAIN, drawn.facts())
        return evicted(drawn, evictor, None, True).check()

    bench.figure(
        "freed/compaction",
        lambda: 100 * samples()["compaction"].median / samples()["prefill"].median,
        "% of attention",
        gate=kept,
        target="<= 1",
        tokens=TOKENS,
        compaction_ms=1e3 * samples()["compaction"].median,
        prefill_ms=1e3 * samples()["prefill"].median,
        prefill="attention of the layer alone, causal, F.scaled_dot_product_attention",
    )


def rounds(drawn: Drawn, prefills: int, evictions: int) -> dict[str, Sample]:
    """Both, in turn."""
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, TOKENS, DIM, generator=rng).to(torch.bfloat16)
    key, value = drawn.key[0], drawn.value[0]
    prefill: list[float] = []
    compaction: list[float] = []
    with HeadCache(1, KV_HEADS, DIM, TOKENS, device="cpu") as heads:

        def filled() -> Tensor:
            heads.clear(0)
            heads.release()
            heads.append(0, key, value)
            return scattered(rng)

        timed = partial(measure, clock="thread", warmup=0)
        for _ in range(prefills):
            prefill += timed(partial(attention, query, key, value), repeat=1).seconds
            compaction += timed(partial(compact, heads), setup=filled, repeat=evictions).seconds
    return {"prefill": Sample(tuple(prefill)), "compaction": Sample(tuple(compaction))}


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A layer's attention of a prompt."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def scattered(rng: torch.Generator) -> Tensor:
    """A quarter of the rows of each head, here and there."""
    lots = torch.rand(1, KV_HEADS, TOKENS, generator=rng)
    bound = lots.kthvalue(KEPT, -1, keepdim=True).values
    return lots <= bound


def compact(heads: HeadCache, mask: Tensor) -> None:
    """What `Eviction` does with a choice."""
    heads.keep(0, *as_rows(mask))
    heads.release()
