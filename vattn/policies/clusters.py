"""Clusters: pages by one vector each, in two levels, chosen once for neighbouring layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vattn.kernels import choose, score
from vattn.kernels.contract import EMPTY
from vattn.kernels.index import Part
from vattn.kernels.selection import Selection
from vattn.policies.evidence import records
from vattn.selector import Caps, Look, Selector, SelectorError


@dataclass(frozen=True, kw_only=True)
class Clusters(Selector):
    """Score clusters by q . (alpha max + (1 - alpha) min) of their keys: take the best, score the
    halves of these in the same way, and take the best halves; layers share a choice.

    MPCache: MPC-Friendly KV Cache Eviction for Efficient Private LLM Inference (arXiv 2501.06807).
    A record tells of a cluster of ``page_tokens`` tokens: its vector, and those of its halves.

    Args:
        alpha: weight of the upper bounds; 0.5 scores by the centre.
        keep: share of the clusters whose halves are looked at; never less than the budget holds.
        layers: neighbouring layers that read what the first of them chose.
        dtype: of the vectors.
    """

    page_tokens: int = 32
    alpha: float = 0.6
    keep: float = 0.5
    layers: int = 2
    dtype: torch.dtype = torch.float16

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query"}), "page", "shared")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page_tokens % 2:
            raise SelectorError(f"page_tokens must be even, got {self.page_tokens}")
        for name in ("alpha", "keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise SelectorError(f"{name} must be 0 to 1, got {getattr(self, name)!r}")
        if self.layers < 1:
            raise SelectorError(f"layers must be 1 or more, got {self.layers!r}")

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return (Part(head_dim, self.dtype),) * 3

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        halves = keys.float().unflatten(2, (2, -1))
        low, high = halves.amin(3), halves.amax(3)
        low = torch.cat([low.amin(2, keepdim=True), low], 2)
        high = torch.cat([high.amax(2, keepdim=True), high], 2)
        return (self.alpha * high + (1 - self.alpha) * low).to(self.dtype).unbind(2)

    def select(self, query: Tensor, look: Look) -> Selection | None:
        leader = look.layer - look.layer % self.layers
        if leader != look.layer and leader in look.earlier:
            return look.earlier[leader]
        if self.reads_all(look):
            return None
        clusters = look.pages(self.page_tokens)
        scores = [
            look.readable(
                score.summaries(query, records(look, i, i + 1), clusters, scale=look.scale),
                self.page_tokens,
            )
            for i in range(3)
        ]
        first = self.survivors(self.joined(scores[0]), query, look)
        halves = torch.stack(scores[1:], -1).flatten(-2)
        parents = first.repeat_interleave(2, -1)
        second = self.joined(halves.masked_fill((parents == EMPTY)[:, :, None], EMPTY))
        second.masked_fill_(parents == choose.FORCED, choose.FORCED)
        size = self.page_tokens // 2
        choose.force(second, look.counts(size), 0, 0, look.firsts(size))
        return Selection(*choose.top_k(second, self.budget_tokens // size), size)

    def survivors(self, joined: Tensor, query: Tensor, look: Look) -> Tensor:
        """Scores [B, Hkv, clusters] of the clusters whose halves are looked at, -inf elsewhere."""
        size = self.page_tokens
        first, last = self.forced_pages(query.shape[2])
        first = max(first, look.first_pages(self.sink_tokens, size))
        choose.force(joined, look.counts(size), first, last, look.firsts(size))
        kept = max(self.budget_tokens // size, int(self.keep * joined.shape[-1]))
        order = joined.sort(dim=-1, descending=True, stable=True).indices
        return joined.scatter(-1, order[..., kept:], EMPTY)
