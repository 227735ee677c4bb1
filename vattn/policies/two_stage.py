"""Two stages: pages by a small index, then tokens of these by a code that says more."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from vattn.kernels import choose
from vattn.kernels.contract import EMPTY
from vattn.kernels.index import Part
from vattn.kernels.selection import Selection
from vattn.policies.coded import Coded
from vattn.policies.evidence import gathered, records
from vattn.policies.members import every_page, tokens_of
from vattn.policies.nibbles import Nibbles
from vattn.policies.quest import Quest
from vattn.selector import Caps, Look, Selector, SelectorError


@dataclass(frozen=True, kw_only=True)
class TwoStage(Selector):
    """Let ``base`` take pages, and of their tokens take the best by ``code``.

    A page's codes lie side by side in its record; those of pages that ``base`` leaves out are not
    read. Two stages with a rerank are common: ParisKV2, Twilight (arXiv 2502.02770).

    Args:
        base: of the same pages; its budget is the tokens that ``code`` looks at, and should be
            larger than this selector's.
        code: of single tokens; its budget does not matter.
    """

    base: Selector = field(default_factory=lambda: Quest(budget_tokens=8192))
    code: Coded = field(default_factory=Nibbles)

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "query", "offline"}), "token")

    def __post_init__(self) -> None:
        super().__post_init__()
        base = self.base
        if base.page_tokens != self.page_tokens or base.budget_tokens < self.budget_tokens:
            raise SelectorError(
                f"base has page_tokens {base.page_tokens} and budget_tokens {base.budget_tokens}: "
                f"must be {self.page_tokens} and at least {self.budget_tokens}"
            )
        for name in ("sink_tokens", "recent_tokens"):
            if getattr(base, name) < getattr(self, name):
                raise SelectorError(
                    f"base.{name} must be at least {getattr(self, name)}, got {getattr(base, name)}"
                )

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        code = (Part(p.width * self.page_tokens, p.dtype) for p in self.code.parts(head_dim))
        return *self.base.parts(head_dim), *code

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        size = keys.shape[1:3]
        codes = self.code.summarise(layer, keys.flatten(1, 2)[:, :, None])
        flat = (part.unflatten(1, size).flatten(2) for part in codes)
        return *self.base.summarise(layer, keys), *flat

    def fits(self, query_tokens: int) -> bool:
        return super().fits(query_tokens) and self.base.fits(query_tokens)

    def pick(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        return choose.top_k(joined, self.budget_tokens)

    def select(self, query: Tensor, look: Look) -> Selection | None:
        if self.reads_all(look):
            return None
        first = len(self.base.parts(query.shape[-1]))
        own = records(look, 0, first) if first else None
        pages = self.base.select(query, replace(look, index=own, earlier={}))
        if pages is None:
            pages = every_page(look, self.page_tokens, look.kv.key.shape[1])
        plain = pages.tail is None and pages.log_weights is None
        if pages.page_tokens != self.page_tokens or not plain:
            raise SelectorError(
                f"base is {type(self.base).__name__}, which chose pages of {pages.page_tokens} "
                f"tokens{'' if plain else ' with weights'}: must be plain, of {self.page_tokens}"
            )
        tokens = tokens_of(pages)
        index = gathered(records(look, first), pages.ids, self.page_tokens)
        scores = self.code.scores(query, replace(look, index=index), tokens.shape[-1])
        coded = coded_tokens(look, self.page_tokens)
        ends = look.counts(1)[:, None, None]
        start = look.firsts(1)
        start = torch.zeros_like(ends) if start is None else start[:, None, None]
        unread = (tokens >= coded) | (tokens < start)
        joined = self.joined(scores.masked_fill(unread[:, :, None], EMPTY))
        recent = ends - (self.recent_tokens + query.shape[2] - 1)
        forced = (tokens < start + self.sink_tokens) | (tokens >= recent) | (tokens >= coded)
        joined.masked_fill_(forced, choose.FORCED)
        joined.masked_fill_((tokens < start) | (tokens >= ends), EMPTY)
        places, count = self.pick(joined)
        places = places.long().clamp_max(tokens.shape[-1] - 1)
        return Selection(tokens.gather(-1, places).int(), count, 1)


def coded_tokens(look: Look, page_tokens: int) -> Tensor:
    """Tokens of each sequence that have a record: [B, 1, 1]."""
    index = records(look)
    if index.counts is not None:
        return index.counts[:, None, None] * page_tokens
    return torch.full((index.batch, 1, 1), index.parts[0].shape[2] * page_tokens)
