"""Bytes mapped for each byte used, on real traces: at final length, and in a live replay.

`final`: every request at its end, by layout. `live`: arrivals, prefills, decode steps and ends of
the trace through a real KVCache, averaged over time. Nothing is shared between requests, and no
row is written. A live replay reports two senses of mapped:

    live     pages with at least one live row / rows in use           (used + wasted) / used
    mapped   every page mapped, those included that are mapped ahead, left over in an adopted slot,
             or parked in closed slots: reclaimable at once           mapped / used

`lean` is the same with ``retain_bytes=0``: nothing is kept for the next sequence, so every page
that is mapped anywhere counts, at the price of more system calls.

How little is enough: `budget` replays with the pages that live rows need at their peak as the
budget of all pages; the gate is red if a request is ever refused. Rivals hold the same tokens:
blocks of 16, and a reservation of the trace's longest request for each.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.harness import Bench
from bench.replay import BLOCK_TOKENS, Replay, Totals, needed_bytes
from bench.workload import TRACES, Request, load, prefix_hits
from vattn import KVCache, Layout
from vattn.allocator.errors import OutOfPages

SHAPE_8B = (32, 8, 128)  # layers, KV heads, head_dim: 128 KiB a token in bfloat16
TARGET = 1.02
LAYERS_CHECKED = 8  # requests replayed with all 32 layers, to check that layers do not matter
REAL_LENGTHS = 8  # final lengths that are really mapped


def run(
    bench: Bench,
    traces: Annotated[Path | None, typer.Option(help="Folder of the whole traces.")] = None,
    only: Annotated[str, typer.Option(help="One trace.")] = "",
    layers: Annotated[int, typer.Option(help="Layers in the live replay; no matter.")] = 1,
) -> None:
    if bench.quick:
        traces = None
    if traces is None:
        bench.note("samples of 200 to 500 requests; --traces DIR takes the whole files")
    for name in [only] if only else TRACES:
        requests = load(name, traces)
        at_the_end(bench, name, requests)
        live(bench, name, requests, layers)
        if any(request.blocks for request in requests):
            prefix_lost(bench, name, requests)


def layouts(longest: int) -> dict[str, Layout]:
    """The default and others, of an 8B model whose sequences have at most ``longest`` tokens."""
    shape = (*SHAPE_8B, longest)
    return {
        "default": Layout(*shape),
        "token_major_64k": Layout(*shape, rows="token_major"),
        "all_layers_2m": Layout.all_layers(*shape, page_bytes=2 << 20),
        "per_layer_2m": Layout(*shape, rows="token_major", page_bytes=2 << 20),
    }


# ---- at final length -----------------------------------------------------------------------------
def at_the_end(bench: Bench, name: str, requests: list[Request]) -> None:
    """Every request once, at its full length."""
    tokens = np.array([request.tokens for request in requests], np.int64)
    longest, total = int(tokens.max()), int(tokens.sum())
    blocks = float((-(-tokens // BLOCK_TOKENS)).sum()) * BLOCK_TOKENS / total
    facts: dict[str, Any] = {"requests": len(requests), "tokens": total, "longest": longest}
    for kind, layout in layouts(longest).items():
        ratio = needed_bytes(layout, tokens) / (total * layout.bytes_per_token)
        default = kind == "default"
        bench.figure(
            f"{name}/final/{kind}",
            ratio,
            "mapped/used",
            gate=partial(sums_agree, layout, tokens, bench, real=default),
            target=f"<= {TARGET}" if default else None,
            peer="16-token blocks",
            peer_value=blocks,
            page_bytes=layout.page,
            lanes=layout.lanes,
            tokens_per_page=layout.tokens_per_page,
            **facts,
        )
    bench.figure(
        f"{name}/final/max_length",
        longest * len(tokens) / total,
        "mapped/used",
        gate=bool((tokens <= longest).all()),
        **facts,
    )


def sums_agree(layout: Layout, tokens: np.ndarray, bench: Bench, *, real: bool) -> bool:
    """The vectorised sum is that of `Layout.waste`, request by request, to the byte; with ``real``
    also what a cache of this layout really maps for some of the lengths."""
    used = tokens * layout.bytes_per_token
    times = Counter(tokens.tolist())
    waste = sum(layout.waste(length) * count for length, count in times.items())
    assert needed_bytes(layout, tokens) == int(used.sum()) + waste, "needed_bytes"
    if not real:
        return True
    some = bench.rng.choice(tokens, REAL_LENGTHS).tolist()
    layout = layout.with_(layers=1)  # each layer is mapped like the others
    with KVCache(layout, slots=len(some), budget_bytes=1 << 60) as cache:
        for length in some:
            sequence = cache.open()
            cache.extend([sequence], length)
            cache.commit([sequence], length)
        count(cache)
        assert cache.stats().wasted_bytes == sum(map(layout.waste, some)), "wasted_bytes"
    return True


# ---- live ----------------------------------------------------------------------------------------
def live(bench: Bench, name: str, requests: list[Request], layers: int) -> None:
    """The trace at its own arrival times."""
    longest = max(request.tokens for request in requests)
    layout = Layout(*SHAPE_8B, longest).with_(layers=layers)
    totals = Totals()
    verdict = attempt(Replay(layout, requests, audit=count, totals=totals))
    gate = partial(went_through, verdict or layers_matter(layout, requests), totals)
    facts: dict[str, Any] = {
        "samples": totals.samples,
        "peak_sequences": totals.peak_sequences,
        "maps_of_32_layers": Layout(*SHAPE_8B, longest).maps_per_sequence() * totals.peak_sequences,
    }
    used = max(1, totals.used)
    bench.figure(
        f"{name}/live",
        (totals.used + totals.wasted) / used,
        "mapped/used",
        gate=gate,
        target=f"<= {TARGET}",
        peer="16-token blocks",
        peer_value=totals.paged / used,
        max_length=totals.reserved / used,
        **facts,
    )
    bench.figure(
        f"{name}/live/mapped",
        totals.mapped / used,
        "mapped/used",
        gate=gate,
        peer="max length",
        peer_value=totals.reserved / used,
        retained_share=(totals.ahead + totals.parked) / max(1, totals.mapped),
        open_sequences_share=totals.ahead / max(1, totals.mapped),
        parked_share=totals.parked / max(1, totals.mapped),
        calls_a_request=totals.calls / len(requests),
        **facts,
    )
    lean(bench, name, layout, requests)
    budget(bench, name, layout, requests, totals)


def lean(bench: Bench, name: str, layout: Layout, requests: list[Request]) -> None:
    """The same with nothing retained: every page that is mapped anywhere, against the rows."""
    totals = Totals()
    verdict = attempt(Replay(layout, requests, audit=count, retain_bytes=0, totals=totals))
    bench.figure(
        f"{name}/live/lean",
        totals.mapped / max(1, totals.used),
        "mapped/used",
        gate=partial(went_through, verdict, totals),
        target=f"<= {TARGET}",
        peer="16-token blocks",
        peer_value=totals.paged / max(1, totals.used),
        calls_a_request=totals.calls / len(requests),
    )


def budget(bench: Bench, name: str, layout: Layout, requests: list[Request], free: Totals) -> None:
    """The same again, with no page more than the live rows need at their peak."""
    limit = free.peak_needed
    totals = Totals()
    verdict = attempt(Replay(layout, requests, budget_bytes=limit, totals=totals))
    bench.figure(
        f"{name}/live/budget",
        limit / max(1, free.peak_used),
        "budget/peak used",
        gate=partial(went_through, verdict, totals),
        target=f"<= {TARGET}",
        late=totals.late,
    )


def attempt(replay: Replay) -> str:
    """Run a replay; says what went wrong, or nothing."""
    try:
        replay.run()
    except (OutOfPages, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def count(cache: KVCache) -> None:
    """The laws of the pool, and three ways to count the same bytes: page by page, by the pool, by
    the layout."""
    cache.pool.check()
    usage = cache.stats()
    tokens = cache.tokens[[sequence.slot for sequence in cache.sequences]]
    layout = cache.layout
    assert usage.mapped_bytes == usage.used_bytes + usage.wasted_bytes + usage.retained_bytes
    assert usage.mapped_bytes == cache.pool.mapped * layout.page, "nothing is shared"
    assert usage.used_bytes == int(tokens.sum()) * layout.bytes_per_token
    assert usage.wasted_bytes == sum(layout.waste(length) for length in tokens.tolist())


def layers_matter(layout: Layout, requests: list[Request]) -> str:
    """Replay the first requests with all 32 layers too: what differs, other than by the factor."""
    one, many = (
        Replay(layout.with_(layers=layers), requests[:LAYERS_CHECKED]).run()
        for layers in (layout.layers, SHAPE_8B[0])
    )
    scale = SHAPE_8B[0] / layout.layers
    parts = ("used", "wasted", "ahead", "parked")
    wrong = [part for part in parts if getattr(many, part) != scale * getattr(one, part)]
    return f"{', '.join(wrong)} of 32 layers differ" if wrong else ""


def went_through(verdict: str, totals: Totals) -> bool:
    """Nothing was refused, every check passed, something was sampled."""
    assert not verdict, verdict
    assert totals.samples > 0, "nothing was sampled"
    return True


# ---- prefixes ------------------------------------------------------------------------------------
def prefix_lost(bench: Bench, name: str, requests: list[Request]) -> None:
    """Tokens of prefixes seen before that whole pages cannot alias: the rest is rounded away."""
    hits = np.array(prefix_hits(requests), np.int64)
    total = int(hits.sum())
    longest = max(request.tokens for request in requests)
    for kind, layout in layouts(longest).items():
        full = hits * layout.row_bytes // layout.page
        lost = total - int((full * layout.page // layout.row_bytes).sum())
        bench.figure(
            f"{name}/prefix_lost/{kind}",
            100 * lost / max(1, total),
            "%",
            gate=partial(prefixes_agree, layout, hits, lost),
            prefix_share=total / sum(request.input_tokens for request in requests),
        )


def prefixes_agree(layout: Layout, hits: np.ndarray, lost: int) -> bool:
    """The vectorised sum is that of `Layout.split`, prefix by prefix."""
    tails = sum(layout.split(hit)[1] for hit in hits.tolist())
    assert lost * layout.row_bytes == tails, "prefix_lost"
    return True
