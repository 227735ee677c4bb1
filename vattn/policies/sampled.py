"""Sampled: the best tokens, and a weighted sample that stands for all others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from vattn.kernels.contract import EMPTY
from vattn.kernels.index import Part
from vattn.kernels.selection import Selection
from vattn.policies.evidence import exact_scores
from vattn.policies.exact import Exact
from vattn.policies.members import tokens_chosen, tokens_of, tokens_there
from vattn.policies.random_pages import uniform
from vattn.selector import Caps, Look, Selector, SelectorError


@dataclass(frozen=True, kw_only=True)
class Sampled(Selector):
    """Read what ``base`` takes, and of the other tokens an even sample, each for as many as it
    stands for: numerator and denominator of the softmax are unbiased.

    vAttention: Verified Sparse Attention (arXiv 2510.05688). With ``error`` the sample is as large
    as the central limit theorem asks for a denominator within that share of the truth.

    Args:
        budget_tokens: most tokens of a sequence that are read, base and sample.
        base: takes the tokens that weigh most, its budget below this one's.
        sample: share of the other tokens that is drawn at least.
        error: relative error of the denominator, None: ``sample`` decides alone.
        doubt: probability of a larger error.
        seed: of the draws, which differ between layers and steps.
    """

    page_tokens: int = 1
    base: Selector = field(default_factory=lambda: Exact(budget_tokens=1024))
    sample: float = 0.02
    error: float | None = None
    doubt: float = 0.05
    seed: int = 0

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query", "random"}), "token")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base.page_tokens != self.page_tokens:
            raise SelectorError(
                f"page_tokens must be the base's {self.base.page_tokens}, got {self.page_tokens}"
            )
        if self.base.budget_tokens >= self.budget_tokens:
            raise SelectorError(
                f"base.budget_tokens must be below {self.budget_tokens}, got "
                f"{self.base.budget_tokens}"
            )
        for name in ("sink_tokens", "recent_tokens"):
            if getattr(self.base, name) < getattr(self, name):
                raise SelectorError(
                    f"base.{name} must be at least {getattr(self, name)}, got "
                    f"{getattr(self.base, name)}"
                )
        for name in ("sample", "error", "doubt"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise SelectorError(f"{name} must be above 0 and below 1, got {value!r}")

    def fits(self, query_tokens: int) -> bool:
        return super().fits(query_tokens) and self.base.fits(query_tokens)

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        return self.base.parts(head_dim)

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        return self.base.summarise(layer, keys)

    def select(self, query: Tensor, look: Look) -> Selection | None:
        if self.reads_all(look):
            return None
        best = self.base.select(query, replace(look, earlier={}))
        if best is None:
            return None
        if best.tail is not None or best.log_weights is not None:
            raise SelectorError(
                f"base is {type(self.base).__name__}, whose choice has weights or a tail: must be "
                "plain tokens"
            )
        n, kv_heads = int(look.lengths.max()), look.kv.key.shape[1]
        chosen = tokens_chosen(best, look, n, kv_heads)
        left = tokens_there(look, n)[:, None] & ~chosen
        draws = uniform(tuple(left.shape), self.seed, look).masked_fill_(~left, torch.inf)
        order = draws.argsort(dim=-1)
        rest = left.sum(-1)
        size = self.sizes(query, look, best, order, rest)
        place = torch.arange(n, device=left.device)
        drawn = torch.zeros_like(left).scatter_(-1, order, place < size[..., None])
        count = (chosen | drawn).sum(-1)
        ids = place.where(chosen | drawn, n).sort(dim=-1).values[..., : int(count.max())]
        weight = (rest.clamp_min(1) / size.clamp_min(1)).log()[..., None]
        weights = weight * drawn.gather(-1, ids.clamp_max(n - 1))
        return Selection(ids.int(), count.int(), 1, weights.float())

    def sizes(
        self, query: Tensor, look: Look, best: Selection, order: Tensor, rest: Tensor
    ) -> Tensor:
        """How many of the ``rest`` [B, Hkv] tokens are drawn, the first of ``order``: [B, Hkv]."""
        most = rest.clamp_max(self.budget_tokens - self.base.budget_tokens)
        least = (self.sample * rest).ceil().long().clamp_min(2).minimum(most)
        if self.error is None:
            return least
        first = int(least.max())
        place = torch.arange(first, device=rest.device)
        outside = (place >= least[..., None])[:, :, None]
        known = exact_scores(query, look, tokens_of(best))
        drawn = exact_scores(query, look, order[..., :first]).masked_fill_(outside, EMPTY)
        top = torch.maximum(known.amax(-1, True), drawn.amax(-1, True))
        known, drawn = (known - top).exp().double(), (drawn - top).exp().double()
        number, others = (size.clamp_min(1)[..., None] for size in (least, rest))
        mean = drawn.sum(-1) / number
        squares = ((drawn - mean[..., None]).square() * ~outside).sum(-1)
        spread = (squares / (number - 1).clamp_min(1)).sqrt()
        total = known.sum(-1) + mean * others
        sigmas = NormalDist().inv_cdf(1 - self.doubt / 2)
        need = (sigmas * spread * others / (self.error * total)).square()
        need = need / (1 + need / others)  # drawn without putting back
        return need.amax(-1).ceil().long().maximum(least).minimum(most)
