"""InfiniGen: tokens whose score, guessed from a few channels of skewed keys, comes near the best.

Offline, `skew` turns the space of each KV head such that few channels carry most of q . k:

    Q [g T, D]   the queries of the heads that share the KV head, K [T, D] its keys, both after the
                 rotary embedding (so the map is applied to q and k, and not folded into weights)
    Q = U S V^T,  A = V:    A^T A = 1  and  (Q A) (K A)^T = Q K^T
    columns of A in the order of what they carry; a record is the first ratio * D channels of k A
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vattn.kernels import choose, score
from vattn.kernels.contract import EMPTY
from vattn.kernels.index import Part
from vattn.kernels.selection import Selection
from vattn.kernels.summaries import DTYPES
from vattn.policies.evidence import records
from vattn.policies.maps import Map
from vattn.policies.tokens import TokenSelector
from vattn.selector import Caps, Look, SelectorError

Count = Literal["head", "shared"]
Order = Literal["query", "both"]


@dataclass(frozen=True, kw_only=True)
class InfiniGen(TokenSelector):
    """Read the tokens that score above the best of a query row minus ``alpha``, for any row of the
    KV head; at most ``budget_tokens``, the best of them.

    InfiniGen: Efficient Generative Inference of Large Language Models with Dynamic KV Cache
    Management (arXiv 2406.19707). What is read in any case does not count as the best.

    Args:
        map: from `skew`.
        alpha: in units of the logits: exp(-5) is 0.7% of the largest weight.
        count: "head": each KV head reads as many as pass; "shared": all read the mean of these
            counts over heads and sequences, as the authors' release does.
        dtype: of the records.
    """

    map: Map
    alpha: float = 5.0
    count: Count = "head"
    dtype: torch.dtype = torch.float16

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query", "offline"}), "token")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise SelectorError(f"alpha must be >= 0, got {self.alpha!r}")
        if self.count not in ("head", "shared"):
            raise SelectorError(f'count must be "head" or "shared", got {self.count!r}')
        if self.dtype not in DTYPES:
            raise SelectorError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}")

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return (Part(self.map.rank, self.dtype),)

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        return (self.map.keys(layer, keys).squeeze(2).to(self.dtype),)

    def scores(self, query: Tensor, look: Look, pages: int) -> Tensor:
        partial = self.map.queries(look.layer, query, look.kv.key.shape[1])
        return score.summaries(partial, records(look), pages, scale=look.scale)

    def select(self, query: Tensor, look: Look) -> Selection | None:
        if self.reads_all(look):
            return None
        scores = self.scores(query, look, look.pages(1))
        forced = (look.counts(1), *self.forced_pages(query.shape[2]), look.firsts(1))
        marks = choose.force(torch.zeros_like(scores[:, :1, 0]), *forced)
        best = scores.masked_fill(marks[:, :, None] != 0, EMPTY).amax(-1, keepdim=True)
        joined = (scores - best.masked_fill(best == EMPTY, 0.0)).amax(-2)
        return Selection(*self.pick(choose.force(joined, *forced)))

    def pick(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        chosen = choose.threshold(joined, self.alpha, 1, self.budget_tokens)
        if self.count == "head":
            return chosen
        forced = (joined == choose.FORCED).sum(-1, keepdim=True)
        most = chosen[1].float().mean().floor().clamp_min(1).maximum(forced)
        best, order = joined.sort(dim=-1, descending=True, stable=True)
        best[..., torch.arange(best.shape[-1], device=best.device) >= most] = EMPTY
        return choose.top_k(joined.scatter(-1, order, best), self.budget_tokens)


def skew(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    ratio: float = 0.3,
    *,
    order: Order = "query",
) -> Map:
    """The maps of every layer from what one text gives: a `Map` whose key and query maps are the
    first int(ratio * D) columns of A.

    Args:
        queries, keys: a tensor [Hq, T, D] and [Hkv, T, D] for each layer, after the rotary
            embedding.
        ratio: partial channels of D, 0 < ratio <= 1; 0.3 in the paper, 0.2 in its release.
        order: columns by the sum of |Q A| ("query", as for OPT), or such that the first 2n hold
            the first n by |Q A| and the first n by |K A| ("both", as for LLaMA).

    Raises:
        SelectorError: shapes that do not suit, or no such ratio.
    """
    if not 0 < ratio <= 1:
        raise SelectorError(f"ratio must be above 0 and at most 1, got {ratio!r}")
    maps = [_columns(q, k, order) for q, k in zip(queries, keys, strict=True)]
    whole = torch.stack(maps)
    partial = whole[..., : max(1, int(ratio * whole.shape[-1]))].contiguous()
    return Map(partial.new_zeros(whole.shape[:-1]), partial, partial)


def _columns(queries: Tensor, keys: Tensor, order: Order) -> Tensor:
    """A of one layer, [Hkv, D, D] float32, its columns in order."""
    heads, kv_heads = queries.shape[0], keys.shape[0]
    if queries.dim() != 3 or keys.dim() != 3 or heads % kv_heads:
        raise SelectorError(
            f"queries are {tuple(queries.shape)} and keys {tuple(keys.shape)}: must be [heads, "
            "tokens, head_dim], and query heads a multiple of KV heads"
        )
    rows = queries.double().unflatten(0, (kv_heads, -1)).flatten(1, 2)
    # V of Q = U S V^T: eigenvectors of Q^T Q, and its columns without forming U.
    axes = torch.linalg.eigh(rows.mT @ rows).eigenvectors
    rank = _ranks((rows @ axes).abs().sum(1))
    if order == "both":
        rank = torch.minimum(rank, _ranks((keys.double() @ axes).abs().sum(1)))
    place = rank.sort(dim=-1, stable=True).indices
    return axes.gather(-1, place[:, None].expand_as(axes)).float()


def _ranks(weight: Tensor) -> Tensor:
    """0 for the largest of each row."""
    return weight.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
