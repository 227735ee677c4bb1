"""One scene of `recall`: every index chooses for every query, and the choice is weighed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bench.indexes import FORCED, Within
from bench.recorded import Scene
from vattn.kernels import choose, sparse
from vattn.kernels.contract import EMPTY
from vattn.kernels.index import Index
from vattn.kernels.kv import KV
from vattn.kernels.selection import Selection
from vattn.policies import Exact, Random, SparQ, Window
from vattn.policies.members import tokens_chosen
from vattn.selector import Look, Selector

SLACK = 1e-3  # of a mass, in float32
ROUNDING = 1e-6


@dataclass(frozen=True)
class Found:
    """Means over the queries and heads of a scene.

    Args:
        mass: softmax mass of the tokens chosen.
        recall: that, of the mass of the best choice.
        beyond: the same without the sinks and the last tokens.
        error: of the output, relative to dense attention.
        read: tokens read, of the budget.
        wrong: what the gate found, or nothing.
    """

    mass: float
    recall: float
    beyond: float
    error: float
    read: float
    wrong: str


class Contest:
    """A scene, its dense attention, and what indexes choose of it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.kv_heads = len(scene.key)
        rows = scene.query.unflatten(1, (self.kv_heads, -1))
        places, n = scene.places, scene.tokens
        scores = torch.einsum("qhgd,hnd->qhgn", rows, scene.key) * scene.dim**-0.5
        scores.masked_fill_((torch.arange(n) > places[:, None])[:, None, None], EMPTY)
        self.lse = scores.logsumexp(-1)
        self.weight = scores.softmax(-1)
        self.out = torch.einsum("qhgn,hnd->qhgd", self.weight, scene.value)

    def found(self, within: Within, budgets: list[int], best: list[Found] | None) -> list[Found]:
        """What an index finds within each budget; ``best``: what there is to find, None: this."""
        selectors = [within(budget) for budget in budgets]
        index = self.index(selectors[0])
        chosen = [self.chosen(selector, index) for selector in selectors]
        tops = [None] * len(budgets) if best is None else best
        return [
            self.weighed(selection, budget, top)
            for selection, budget, top in zip(chosen, budgets, tops, strict=True)
        ]

    def bytes_read(self, selector: Selector) -> float:
        """Bytes of the index for a token and KV head, or what is read of half precision keys."""
        if isinstance(selector, Exact):
            return 2.0 * self.scene.dim
        if isinstance(selector, SparQ):
            return 2.0 * selector.rank
        return selector.bytes_per_token(self.scene.dim)

    # ---- choosing ------------------------------------------------------------------------------
    def index(self, selector: Selector) -> tuple[Tensor, ...]:
        """The records of all full pages, [1, Hkv, pages, width] each."""
        size = selector.page_tokens
        full = self.scene.tokens // size * size
        sides = (self.scene.key, self.scene.value)
        made = selector.record(0, *(side[:, :full].unflatten(1, (-1, size)) for side in sides))
        return tuple(part[None] for part in made)

    def look(self, parts: tuple[Tensor, ...], size: int) -> Look:
        """Each query as a sequence of its own: all are the scene, and end at the query's place."""
        lengths = self.scene.places + 1
        slots = torch.zeros_like(lengths)
        return Look(
            layer=0,
            kv=KV(self.scene.key[None], self.scene.value[None], lengths, slots=slots),
            index=Index(parts, lengths // size, slots) if parts else None,
            lengths=lengths.numpy(),
            scale=self.scene.dim**-0.5,
        )

    def chosen(self, selector: Selector, parts: tuple[Tensor, ...]) -> Selection:
        """What is chosen for each query: `Selector.select`, its scores taken for all at once."""
        query, size = self.scene.query, selector.page_tokens
        look = self.look(parts, size)
        own = type(selector).select is not Selector.select
        if own or isinstance(selector, (Random, Window)):
            selection = selector.select(query[:, :, None], look)
            assert selection is not None, "within the budget"
            return selection
        pages = look.pages(size)
        scene = self.scene
        whole = Look(
            layer=0,
            kv=KV(scene.key[None], scene.value[None]),
            index=Index(parts) if parts else None,
            lengths=np.array([scene.tokens]),
            scale=look.scale,
        )
        scores = selector.scores(query.transpose(0, 1)[None], whole, pages)
        scores = scores[0].unflatten(1, (-1, len(query))).permute(2, 0, 1, 3).contiguous()
        full = (look.counts(1) // size)[:, None, None, None]
        scores.masked_fill_(torch.arange(pages) >= full, EMPTY)
        joined = selector.joined(scores)
        choose.force(joined, look.counts(size), *selector.forced_pages(1))
        return Selection(*selector.pick(joined), size)

    # ---- weighing ------------------------------------------------------------------------------
    @cached_property
    def forced(self) -> float:
        """Mass of the sinks and the last tokens."""
        at, places = torch.arange(self.scene.tokens), self.scene.places[:, None]
        taken = (at < FORCED["sink_tokens"]) | (at > places - FORCED["recent_tokens"])
        return float((self.weight * taken[:, None, None]).sum(-1).mean())

    def weighed(self, selection: Selection, budget: int, best: Found | None) -> Found:
        scene, look = self.scene, self.look((), 1)
        members = tokens_chosen(selection, look, scene.tokens, self.kv_heads)[:, :, None]
        masses = (self.weight * members).sum(-1)
        mass = float(masses.mean())
        top = mass if best is None else best.mass
        out, lse, _ = sparse.attend(scene.query[:, :, None], look.kv, selection)
        off = out.view(self.out.shape) - self.out
        error = float((off.norm(dim=-1) / self.out.norm(dim=-1)).mean())
        wrong = []
        held = int(selection.count.max()) * selection.page_tokens
        if held > budget:
            wrong.append(f"{held} tokens of {budget}")
        if mass > top + SLACK:
            wrong.append(f"mass {mass:.4f} of tokens, {top:.4f} of the best")
        if selection.tail is None and selection.log_weights is None:
            share = (lse.view(self.lse.shape) - self.lse).exp()
            gap = float(((share - masses).abs() - SLACK * masses).max())
            if not gap <= ROUNDING:
                wrong.append(f"log-sum-exp of the kernel gives a mass that is {gap:.6f} off")
        read = float(members.sum(-1).float().mean()) / budget
        beyond = (mass - self.forced) / (top - self.forced)
        return Found(mass, mass / top, beyond, error, read, "; ".join(wrong))
