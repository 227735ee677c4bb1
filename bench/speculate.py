"""Speculation: what is near when a layer wants it, and what recalling the rest costs.

The shipped model goes on with a novel it never saw, reading a part of its tokens in every layer; of
layers 1 and on only a part of the pages fits into the fast tier, the others lie in a file. Before a
layer reads, all that it is about to read and that is not in the fast tier is recalled, and the
model waits for it. Layer 0, which has no layer before it, stays in the fast tier.

    none     no hints: every recall is waited for; so InfiniGen's own release, which synchronises
             the device behind every layer (snu-comparch/InfiniGen#9)
    early    hints from the input of the layer before, late: behind its attention, gated: either
    hidden   bytes in the fast tier when wanted of those that were not when the step began

A hint takes `WIDER` times what is read: a page too many costs a copy in the background, one too few
a wait. In a layer Llama-3-8B reads weights worth the K and V of 106,000 tokens, the shipped model
6,300 of its own; ``--load`` computes each MLP so many more times, 16 make it 86,000. One thread
computes, so that the other core can copy. Behind a red gate: logits that differ in one bit from a
run without tiers, hints and recalls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from bench.harness import Bench
from bench.model_card import SHIPPED
from vattn.batch import Ints
from vattn.calibrate import calibrate, heads_of
from vattn.kernels.selection import Selection
from vattn.policies import Quest
from vattn.selector import Selector
from vattn.sequence import Sequence
from vattn.sparse import tokens_of
from vattn.speculate import GATE, Hooks, Looks, Prefetch, Speculator, When, warming
from vattn.tiers import FAST, Tiers
from vattn.tiers_order import Candidates

Mode = Literal["none", "early", "late", "gated"]
PAGE = 4096
PAGE_TOKENS = 32  # a page holds so many tokens of K, or V, of a head: what is chosen is what moves
LANES = 4  # of a layer: K and V of two heads
CHUNK = 512  # of the prompt
CALIBRATION = 100_000  # where in the novel the map and the cosines come from
TEXT = 300_000  # and the text
HIDDEN_TARGET = ">= 90"
WIDER = 3  # budget of a hint, of the budget that is read


@dataclass(frozen=True)
class Setting:
    """Tokens of the context, steps behind it, budget in tokens, the part of the pages of layers 1
    and on that the fast tier holds, and how many more times an MLP is computed."""

    context: int
    steps: int
    budget: int
    fast: float
    load: int


@dataclass
class Run:
    """What one mode did: for each layer pages wanted, those that lay in the slow tier when the step
    began, of these those in the fast tier, or hinted and not there yet, when wanted; seconds."""

    wanted: Ints
    away: Ints
    hidden: Ints
    late: Ints
    stall: float = 0.0
    hinted: dict[int, Ints] = field(default_factory=dict)  # pages, in this step
    seconds: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, layers: int) -> Run:
        """Nothing done yet."""
        wanted, away, hidden, late = np.zeros((4, layers), np.int64)
        return cls(wanted, away, hidden, late)

    @property
    def share(self) -> float:
        """Of what lay in the slow tier, what was there in time; 1.0 where nothing lay there."""
        return float(self.hidden.sum() / max(1, self.away.sum()))


def run(
    bench: Bench,
    context: Annotated[int, typer.Option(help="Tokens before the first step.")] = 3072,
    steps: Annotated[int, typer.Option(help="Steps; 0: 64, or 12.")] = 0,
    fast: Annotated[float, typer.Option(help="Part of layers 1.. in the fast tier.")] = 0.5,
    load: Annotated[int, typer.Option(help="More times that an MLP is computed.")] = 16,
) -> None:
    if bench.peer("transformers") is None:
        return bench.skip("transformers is not installed")
    context = bench.pick(context, min(context, 1536))
    torch.set_num_threads(1)
    setting = Setting(context, steps or bench.pick(64, 12), context // 8, fast, load)
    lm, ids, selector, speculators = prepared(setting)
    plain = decoded(lm, ids, setting, selector, None, tiers=False)
    runs = {mode: decoded(lm, ids, setting, selector, speculators[mode]) for mode in get_args(Mode)}
    peer = runs["none"]
    for mode, found in runs.items():
        gate = same(found, plain)
        for layer in range(len(found.wanted)):
            near = found.wanted[layer] - found.away[layer] + found.hidden[layer]
            bench.figure(
                f"speculate/resident/{mode}/layer{layer}",
                100 * near / max(1, found.wanted[layer]),
                "% pages",
                gate=gate,
                moment=moment_of(speculators[mode], layer),
            )
        bench.figure(
            f"speculate/hidden/{mode}",
            100 * found.share,
            "% bytes",
            gate=gate,
            target=HIDDEN_TARGET if mode == "gated" else None,
            recalled_bytes=int(found.away.sum()) * PAGE,
            hinted_too_late=100 * float(found.late.sum() / max(1, found.away.sum())),
        )
        step, others = (float(np.median(each.seconds)) * 1e3 for each in (found, peer))
        bench.figure(
            f"speculate/step/{mode}",
            step,
            "ms",
            gate=gate,
            peer="none: recall, then read" if mode != "none" else None,
            peer_value=others if mode != "none" else None,
            stalled_ms=found.stall / setting.steps * 1e3,
            without_tiers_ms=float(np.median(plain.seconds)) * 1e3,
        )
    return None


# ---- the model -----------------------------------------------------------------------------------
def prepared(
    setting: Setting,
) -> tuple[Any, Tensor, Selector, dict[Mode, Speculator | None]]:
    """The model, its text, what it reads, and who gives hints in each mode."""
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from bench.model.data import held_out
    from vattn.hf import register

    disable_progress_bar()
    register()
    lm = LlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    novel = torch.frombuffer(bytearray(held_out()), dtype=torch.uint8).long()
    known = calibrate(lm, novel[None, CALIBRATION : CALIBRATION + 1024])
    lm.set_attn_implementation("vattn")
    selector = Quest(budget_tokens=setting.budget, page_tokens=PAGE_TOKENS)
    wider = replace(selector, budget_tokens=WIDER * setting.budget)
    speculators: dict[Mode, Speculator | None] = {"none": None}
    gates: dict[When, float] = {"early": -1.0, "late": -1.0, "gated": GATE}
    for mode, gate in gates.items():
        speculators[mode] = Speculator(heads_of(lm), wider, known.cosines, when=mode, gate=gate)
    return lm, novel[None, TEXT : TEXT + setting.context + setting.steps], selector, speculators


@contextmanager
def loaded(lm: Any, times: int) -> Iterator[None]:
    """Compute every MLP so many more times."""

    def again(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        for _ in range(times):
            module.forward(*args)

    hooks = [layer.mlp.register_forward_hook(again) for layer in lm.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def moment_of(speculator: Speculator | None, layer: int) -> str:
    """When a layer's hint is made."""
    return (speculator.moment(layer) if speculator is not None else None) or "never"


# ---- a run ---------------------------------------------------------------------------------------
@torch.no_grad()
def decoded(
    lm: Any,
    ids: Tensor,
    setting: Setting,
    selector: Selector,
    speculator: Speculator | None,
    *,
    tiers: bool = True,
) -> Run:
    """One step a token behind the context."""
    from vattn.hf import VattnCache

    cache = VattnCache(
        lm.config,
        max_tokens=ids.shape[1] + 64,
        page_bytes=PAGE,
        selector=selector,
        tiers={"victims": first_layer_last} if tiers else None,
    )
    for at in range(0, setting.context, CHUNK):
        lm(ids[:, at : min(at + CHUNK, setting.context)], past_key_values=cache, use_cache=True)
    layers = lm.config.num_hidden_layers
    found, store = Run.of(layers), cache.store
    hooks: Any = nullcontext()
    begin: Callable[[], None] = lambda: None  # noqa: E731
    if store.tiers is not None:
        begin = watched(store, found)
        squeeze(store.tiers, store.sequences[0], setting.fast)
        if speculator is not None:
            hooks = Hooks(lm, speculator, *noted(store, found))
    with hooks, loaded(lm, setting.load):
        for at in range(setting.context, ids.shape[1]):
            begin()
            start = time.perf_counter()
            out = lm(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            found.seconds.append(time.perf_counter() - start)
            found.logits.append(out.logits)
    return found


def squeeze(tiers: Tiers, sequence: Sequence, share: float) -> None:
    """Send layers 1 and on to the slow tier, and leave room for a share of their pages."""
    cache = tiers.cache
    layers = range(1, cache.layout.layers)
    pages = sum(int((tiers.resident(sequence, layer) == FAST).sum()) for layer in layers)
    for layer in layers:
        tiers.demote(sequence, layer)
    room = int(share * pages)
    tiers.ahead = room // 2  # half waits for hints, half holds what was read last
    cache.pool.set_budget((cache.pool.mapped + room) * PAGE)


def watched(store: Any, found: Run) -> Callable[[], None]:
    """Count, time and recall what every layer is about to read; call the result at step begins."""
    tiers, sequence = store.tiers, store.sequences[0]
    arena, layout = tiers.arena, tiers.layout
    before = np.zeros(0, np.int64)  # pages in the slow tier when the step began

    def begin() -> None:
        nonlocal before
        pages = tiers.places.of(sequence, None, None)
        before = pages[tiers.slow.holds(arena.ids(pages))]
        found.hinted.clear()

    def watch(layer: int, slots: Ints, selection: Selection) -> None:
        start = time.perf_counter()
        tiers.settle()
        tokens = tokens_of(selection, 0, layout, int(sequence.lengths.max()))
        pages = tiers.places.of(sequence, layer, tokens)
        slow, was = tiers.slow.holds(arena.ids(pages)), np.isin(pages, before)
        found.wanted[layer] += len(pages)
        found.away[layer] += int((slow | was).sum())
        found.hidden[layer] += int((was & ~slow).sum())
        if slow.any():
            known = found.hinted.get(layer, pages[:0])
            found.late[layer] += int(np.isin(pages[slow], known).sum())
            tiers.promote(sequence, layer, tokens)
        found.stall += time.perf_counter() - start

    store.sparse.watchers.append(watch)
    return begin


def noted(store: Any, found: Run) -> tuple[Looks, Prefetch]:
    """What hooks need, and a note of the pages of every hint."""
    tiers, sequence = store.tiers, store.sequences[0]
    looks, prefetch = warming(store.sparse, tiers, store.sequences.copy)

    def note(layer: int, hint: Selection) -> None:
        tokens = tokens_of(hint, 0, tiers.layout, int(sequence.lengths.max()))
        found.hinted[layer] = tiers.places.of(sequence, layer, tokens)
        prefetch(layer, hint)

    return looks, note


def first_layer_last(pages: Candidates) -> NDArray[np.int64]:
    """Least recently used; those of layer 0, which no hint can bring back in time, last of all."""
    return np.maximum(pages.used, pages.arrived) + (pages.lane < LANES) * (1 << 40)


def same(found: Run, plain: Run) -> Callable[[], bool]:
    """Every step's logits are those of the run without tiers, to the last bit."""

    def gate() -> bool:
        for step, (ours, theirs) in enumerate(zip(found.logits, plain.logits, strict=True)):
            assert torch.equal(ours, theirs), f"step {step} differs from the run without tiers"
        assert found.away[1:].all(), "a layer recalled nothing: there is nothing to hide"
        return True

    return gate
