"""One sparse decode step on a CPU against our own dense one: index, select, attend.

32 query heads, 8 KV heads of 128, one query token of one sequence, 2,048 tokens a KV head. K and V
lie in a `KVCache`; the records of keys beside it. Contestants, timed in the same rounds with other
data in the processor's cache before each:

    dense       vattn.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    NAME        SparseAttention(cache, selector).attend(query, view, 0)
    select      its selection alone: scores of all records, and the best of them

Keys are random: what a selector finds is not asked here (`bench recall`), only what it costs. The
gate is the error against float64 attention to the same tokens: at most three times that of our
dense kernel on a copy of these tokens, and one rounding. `--plot FILE` draws time against context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

import vattn
from bench.decode_cpu import DIM, EVICTED, HEADS, KV_HEADS, race
from bench.harness import Bench, Sample
from vattn import KVCache, Layout
from vattn.kernels import stream
from vattn.kernels.kv import KV
from vattn.kernels.selection import Selection, reference
from vattn.policies import MeanDeviation, Quest, Signs, TwoStage
from vattn.selector import Selector
from vattn.sequence import View
from vattn.sparse import SparseAttention

BUDGET = 2048
CONTEXTS = (8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10)
TARGETS = {32 << 10: "ratio >= 4", 128 << 10: "ratio >= 12"}
PIECE = 16 << 10  # tokens appended at once
SELECTORS: Mapping[str, Selector] = {
    "bounds16": Quest(budget_tokens=BUDGET, page_tokens=16),
    "bounds32": Quest(budget_tokens=BUDGET, page_tokens=32),
    "bounds64": Quest(budget_tokens=BUDGET, page_tokens=64),
    "deviation32": MeanDeviation(budget_tokens=BUDGET, page_tokens=32),
    "signs": Signs(budget_tokens=BUDGET),
    "two_stage": TwoStage(
        budget_tokens=BUDGET,
        page_tokens=32,
        base=Quest(budget_tokens=4 * BUDGET, page_tokens=32),
        code=Signs(),
    ),
}
QUICK = ("bounds16", "bounds32", "bounds64", "signs")


class Step(NamedTuple):
    """What one decode step is given, and what each way of doing it is."""

    query: Tensor
    key: Tensor
    value: Tensor
    view: View
    engines: dict[str, SparseAttention]


def run(
    bench: Bench,
    dtypes: list[str] = ["bfloat16", "float32"],
    plot: Annotated[Path | None, typer.Option(help="Draw time against context here.")] = None,
) -> None:
    for dtype in dtypes[: bench.pick(len(dtypes), 1)]:
        contexts = CONTEXTS if plot else tuple(TARGETS)
        taken = {}
        for context in contexts:
            with step(bench, dtype, context) as found:
                taken[context] = figures(bench, dtype, context, found)
        if plot is not None:
            draw(plot.with_stem(f"{plot.stem}_{dtype}"), dtype, taken)


@contextmanager
def step(bench: Bench, dtype: str, context: int) -> Iterator[Step]:
    """A full sequence in a cache, its records, and a query."""
    generator = torch.Generator().manual_seed(bench.seed)
    layout = Layout(1, KV_HEADS, DIM, context, dtype=dtype)
    with ExitStack() as opened:
        cache = opened.enter_context(KVCache(layout, slots=1, budget_bytes=1 << 40))
        sequence = cache.open()
        for start in range(0, context, PIECE):
            shape = (2, 1, KV_HEADS, min(PIECE, context - start), DIM)
            rows = torch.randn(shape, generator=generator).to(cache.dtype)
            cache.append(0, rows[0], rows[1], [sequence])
        view = cache.view([sequence])
        engines = {}
        for name, selector in SELECTORS.items():
            if not bench.quick or name in QUICK:
                engines[name] = opened.enter_context(SparseAttention(cache, selector))
        query = torch.randn(1, HEADS, 1, DIM, generator=generator).to(cache.dtype)
        yield Step(query, view.k[0], view.v[0], view, engines)


def figures(bench: Bench, dtype: str, context: int, found: Step) -> dict[str, Sample]:
    """Race all once; one figure a selector, against dense."""
    query, key, value, view, engines = found
    contestants: dict[str, Callable[[], object]] = {
        "dense": partial(vattn.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    }
    for name, engine in engines.items():
        contestants[name] = partial(engine.attend, query, view, 0)
        contestants[f"{name}/select"] = partial(engine.selection, query, view, 0)
    buffers = [torch.ones(EVICTED, dtype=torch.uint8) for _ in range(2)]
    taken = race(bench, contestants, buffers)
    for name, engine in engines.items():
        bench.figure(
            f"sparse_decode/{dtype}/{context >> 10}k/{name}",
            bench.versus(taken[name], taken["dense"]),
            "ms",
            gate=cache(partial(exact, found, engine)),
            target=TARGETS.get(context),
            peer="dense",
            select_ms=round(taken[f"{name}/select"].p50 * 1e3, 3),
            index_bytes_per_token=engine.selector.bytes_per_token(DIM),
            threads=torch.get_num_threads(),
        )
    return {name: sample for name, sample in taken.items() if "/" not in name}


def exact(found: Step, engine: SparseAttention) -> bool:
    """The sparse step is as near to float64 as our dense kernel is on a copy of the same tokens."""
    selection = engine.selection(found.query, found.view, 0)
    assert selection is not None, "the selector reads everything"
    lengths = torch.tensor([found.key.shape[2]])
    truth, _, _ = reference(found.query, KV(found.key, found.value, lengths), selection)
    dense = stream.stream(found.query, *chosen(found, selection))
    out = engine.attend(found.query, found.view, 0)
    rounding = torch.finfo(out.dtype).eps * truth.abs().max().item()
    allowed = 3 * (dense.double() - truth).abs().max().item() + rounding
    error = (out.double() - truth).abs().max().item()
    assert error <= allowed, f"error {error:.2e} > {allowed:.2e}"
    return True


def chosen(found: Step, selection: Selection) -> list[Tensor]:
    """Copies of the chosen rows of K and V: [1, KV heads, chosen, head_dim] each."""
    assert (selection.count == selection.ids.shape[2]).all(), "heads chose different numbers"
    inside = torch.arange(selection.page_tokens)
    tokens = (selection.ids.long()[..., None] * selection.page_tokens + inside).flatten(2)
    at = tokens[..., None].expand(*tokens.shape, DIM)
    return [tensor.gather(2, at) for tensor in (found.key, found.value)]


def draw(path: Path, dtype: str, taken: Mapping[int, Mapping[str, Sample]]) -> None:
    """Median time against context, both in powers of two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    contexts = list(taken)
    for name in taken[contexts[0]]:
        times = [taken[context][name].p50 * 1e3 for context in contexts]
        style = {"color": "black", "linewidth": 2.0} if name == "dense" else {"linewidth": 1.2}
        axes.plot(contexts, times, marker="o", markersize=4, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context >> 10}k" for context in contexts])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms a step and layer")
    axes.set_title(
        f"{BUDGET} of all tokens, {dtype}, {HEADS} heads, {KV_HEADS} KV heads of {DIM}, "
        f"{torch.get_num_threads()} threads"
    )
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)
