"""Landmarks: small pages by the mean of their keys, pages of unlike keys always."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vattn.kernels import choose, score
from vattn.kernels.index import Part
from vattn.kernels.selection import Selection
from vattn.policies.evidence import records
from vattn.selector import Caps, Look, Selector, SelectorError


@dataclass(frozen=True, kw_only=True)
class Landmark(Selector):
    """Score a page by q . mean of its keys; the pages whose keys are least like their mean are read
    in any case.

    ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference (arXiv 2410.21465).

    Args:
        outliers: pages of least cosine between a key and the mean, of each KV head.
        dtype: of the means.
    """

    page_tokens: int = 8
    join: choose.Join = "max"
    outliers: int = 48
    dtype: torch.dtype = torch.float16

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query"}), "page")

    def __post_init__(self) -> None:
        super().__post_init__()
        room = self.budget_tokens // self.page_tokens - sum(self.forced_pages(1))
        if not 0 <= self.outliers < room:
            raise SelectorError(
                f"outliers must be >= 0 and < {room}, the pages of budget_tokens "
                f"{self.budget_tokens} that nothing else takes, got {self.outliers}"
            )

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return Part(head_dim, self.dtype), Part(1, torch.float16)

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        keys = keys.float()
        mean = keys.mean(2)
        least = F.cosine_similarity(keys, mean[:, :, None], dim=-1).amin(-1, keepdim=True)
        return mean.to(self.dtype), least.half()

    def scores(self, query: Tensor, look: Look, pages: int) -> Tensor:
        return score.summaries(query, records(look, 0, 1), pages, scale=look.scale)

    def fits(self, query_tokens: int) -> bool:
        pages = sum(self.forced_pages(query_tokens)) + self.outliers
        return pages * self.page_tokens <= self.budget_tokens

    def select(self, query: Tensor, look: Look) -> Selection | None:
        if self.reads_all(look):
            return None
        size = self.page_tokens
        joined = self.joined(look.readable(self.scores(query, look, look.pages(size)), size))
        index = records(look, 1)
        for b in range(index.batch):
            (cosine,), n = index.read(b, joined.shape[-1])
            order = cosine[..., 0].sort(dim=-1, stable=True).indices[..., : self.outliers]
            joined[b, :, :n].scatter_(-1, order, choose.FORCED)
        first, last = self.forced_pages(query.shape[2])
        first = max(first, look.first_pages(self.sink_tokens, size))
        choose.force(joined, look.counts(size), first, last, look.firsts(size))
        return Selection(*self.pick(joined), size)
