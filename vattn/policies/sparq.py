"""SparQ: tokens by the channels in which the query is largest, and the mean value for the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vattn.kernels import score
from vattn.kernels.contract import EMPTY
from vattn.kernels.selection import Selection
from vattn.policies.evidence import exact_sums, keys_themselves
from vattn.policies.members import tokens_chosen, tokens_of, tokens_there
from vattn.policies.tokens import TokenSelector
from vattn.selector import Caps, Look, SelectorError


@dataclass(frozen=True, kw_only=True)
class SparQ(TokenSelector):
    """Score a token by the ``rank`` channels in which the queries of its group are largest; tokens
    not chosen count with the mean of V and the share of the mass that the scores give them.

    SparQ Attention: Bandwidth-Efficient LLM Inference (arXiv 2312.04985). Channels are read from K
    where it lies, not from a second copy of K by channel: nothing is kept, and the bytes that the
    paper saves are not saved here. The mean of V is taken of V at each step.

    Args:
        rank: channels.
        mean_value: whether the rest counts at all.
    """

    rank: int = 32
    mean_value: bool = True

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "values", "query"}), "token")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise SelectorError(f"rank must be 1 or more, got {self.rank}")

    def scores(self, query: Tensor, look: Look, pages: int) -> Tensor:
        cut = largest(query, look.kv.key.shape[1], self.rank)
        return score.summaries(cut, keys_themselves(look), pages, scale=look.scale)

    def select(self, query: Tensor, look: Look) -> Selection | None:
        selection = super().select(query, look)
        if selection is None or not self.mean_value or query.shape[2] > 1:
            return selection  # the mean of V would hold tokens that an earlier query must not see
        scores = self.scores(query, look, look.pages(1))
        return replace(selection, tail=rest(scores, selection, query, look))


def largest(query: Tensor, kv_heads: int, rank: int) -> Tensor:
    """Query [B, Hq, L, D], 0 but in the ``rank`` channels of largest sum of |q_c| over the heads of
    a group, and longer by sqrt(|q|_1 / |q_r|_1): the temperature of the paper."""
    rows = query.float().unflatten(1, (kv_heads, -1))
    size = rows.abs()
    order = size.sum(2, keepdim=True).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(size[:, :, :1]).scatter_(-1, order[..., :rank], 1.0)
    share = (size * kept).sum(-1, keepdim=True) / size.sum(-1, keepdim=True)
    return (rows * kept * share.clamp_min(1e-9).rsqrt()).flatten(1, 2)


def rest(scores: Tensor, selection: Selection, query: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    """The tail of what is not chosen: mean of V [B, Hq, L, Dv] and its log-sum-exp [B, Hq, L], both
    float32, such that it takes the share that it has in ``scores`` [B, Hkv, R, n]."""
    batch, heads, length, _ = query.shape
    value, tokens = look.kv.value, scores.shape[-1]
    there = tokens_there(look, tokens)
    chosen = tokens_chosen(selection, look, tokens, value.shape[1])[:, :, None]
    left = scores.masked_fill(chosen | ~there[:, None, None], EMPTY).logsumexp(-1)
    taken = scores.masked_fill(~chosen, EMPTY).logsumexp(-1)
    mass = left - taken + exact_sums(query, look, tokens_of(selection))
    slots = range(batch) if look.kv.slots is None else look.kv.slots.tolist()
    means = [value[slot, :, :tokens][:, there[b]].float().mean(1) for b, slot in enumerate(slots)]
    mean = torch.stack(means).repeat_interleave(heads // value.shape[1], 1)[:, :, None]
    return mean.expand(-1, -1, length, -1), mass.reshape(batch, heads, length)
